"""What single files in wheels say: parsers, no I/O. Foreign Python is parsed, never run."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass

__all__ = [
    "CppLib",
    "FlashWindow",
    "attention_offered",
    "attention_wanted",
    "cpp_lib",
    "flash_window",
    "torch_cuda",
]

_OPERATORS = ("_flash_attention_forward", "_efficient_attention_forward")


@dataclass(frozen=True, kw_only=True)
class CppLib:
    """`xformers/cpp_lib.json`: what the native code was really built for. `cuda` as "12.8"."""

    torch: str
    cuda: str | None
    arch_list: str
    text: str  # the file's own words, for quotes


@dataclass(frozen=True, kw_only=True)
class FlashWindow:
    """flash-attn versions that xformers accepts; outside: a fallback if `guarded`, else ImportError."""

    first: str
    last: str
    guarded: bool
    text: str  # the source lines, for quotes


def torch_cuda(source: str) -> tuple[str | None, str | None]:
    """`torch/version.py` → (its own version with the local part, CUDA version or None for a CPU build)."""
    version = re.search(r"^__version__\s*=\s*'([^']+)'", source, re.MULTILINE)
    cuda = re.search(r"^cuda\s*(?::[^=]+)?=\s*'([\d.]+)'", source, re.MULTILINE)
    return version.group(1) if version else None, cuda.group(1) if cuda else None


def cpp_lib(text: str) -> CppLib | None:
    """`cpp_lib.json` → what it was built for; None where it names no torch (pure Python builds)."""
    try:
        data = json.loads(text)
        version, env = data["version"], data.get("env") or {}
    except (ValueError, KeyError, TypeError):
        return None
    if not version.get("torch"):
        return None
    number = version.get("cuda")
    cuda = f"{number // 100}.{number % 100}" if isinstance(number, int) else None
    quote = f'"version": {{"cuda": {json.dumps(number)}, "torch": {json.dumps(version["torch"])}}}'
    return CppLib(
        torch=version["torch"], cuda=cuda, arch_list=env.get("TORCH_CUDA_ARCH_LIST") or "", text=quote
    )


def flash_window(source: str) -> FlashWindow | None:
    """`xformers/ops/fmha/flash.py` → the window it hard-codes; None where it has none."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    return _window(tree, guarded=False, source=source)


def _window(node: ast.AST, *, guarded: bool, source: str) -> FlashWindow | None:
    found: dict[str, tuple[str, int]] = {}
    for child in ast.iter_child_nodes(node):
        # Only a handler for ImportError makes the check harmless: it falls back to another kernel.
        inner = guarded or (isinstance(node, ast.Try) and child in node.body and _catches_import_error(node))
        if isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
            name = child.targets[0].id
            if name in {"FLASH_VER_MIN", "FLASH_VER_LAST"}:
                found[name] = (_version(child.value), child.lineno)
        elif isinstance(child, ast.Compare) and (exact := _exact(child)):
            found = {"FLASH_VER_MIN": (exact, child.lineno), "FLASH_VER_LAST": (exact, child.lineno)}
        guarded_here = inner
        if len(found) == 2:
            lines = source.splitlines()
            numbers = sorted({line for _, line in found.values()})
            return FlashWindow(
                first=found["FLASH_VER_MIN"][0],
                last=found["FLASH_VER_LAST"][0],
                guarded=guarded_here,
                text="; ".join(lines[number - 1].strip() for number in numbers),
            )
        deeper = _window(child, guarded=inner, source=source)
        if deeper is not None:
            return deeper
    return None


def _catches_import_error(node: ast.Try) -> bool:
    names = {
        n.id for h in node.handlers if h.type is not None for n in ast.walk(h.type) if isinstance(n, ast.Name)
    }
    return bool(names & {"ImportError", "Exception"}) or any(h.type is None for h in node.handlers)


def _version(node: ast.expr) -> str:
    """`(2, 7, 1)` or `parse_version("2.7.1")`."""
    if isinstance(node, ast.Tuple):
        return ".".join(str(part.value) for part in node.elts if isinstance(part, ast.Constant))
    strings = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return strings[0] if strings else ""


def _exact(node: ast.Compare) -> str | None:
    """`flash_ver_parsed != (2, 3, 6)`: the older, one-version form."""
    left, right = node.left, node.comparators[0]
    if isinstance(left, ast.Name) and left.id == "flash_ver_parsed" and isinstance(node.ops[0], ast.NotEq):
        return _version(right) if isinstance(right, ast.Tuple) else None
    return None


def attention_offered(native_functions: str) -> tuple[str, ...]:
    """torch's `native_functions.yaml` → schemas of the attention operators that xformers calls."""
    found = []
    for operator in _OPERATORS:
        match = re.search(rf"^- func: ({operator}\(.*)$", native_functions, re.MULTILINE)
        if match:
            found.append(f"aten::{match.group(1).strip()}")
    return tuple(found)


def attention_wanted(source: str) -> tuple[str, ...]:
    """`xformers/ops/fmha/torch_attention_compat.py` → schemas it accepts, any one of each operator's."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ()
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return tuple(
        dict.fromkeys(
            s for s in strings if any(s.startswith(f"aten::{operator}(") for operator in _OPERATORS)
        )
    )
