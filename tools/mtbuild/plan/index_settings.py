"""Where packages come from, as this machine is configured: uv's settings, then pip's, then the default.

No index has its address in this project. The order is uv's own: environment before configuration files, extra
indexes before the default one, and the first index that has a project is the only one asked for it.
Sources: uv's "Package indexes" and "Environment variables" pages; pip's "Configuration" page.
"""

from __future__ import annotations

import ast
import configparser
import importlib.util
import os
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from mtbuild.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["IndexSettings", "Source", "redact"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One index. `url` ends in a slash and holds no credentials; `user` and `password` may be empty."""

    url: str
    user: str = ""
    password: str = ""
    origin: str = ""  # which setting named it, for messages

    @classmethod
    def of(cls, text: str, *, origin: str, user: str = "", password: str = "") -> Source:
        """From a URL that may carry `user:password@`; raises InputError for what is no URL."""
        parts = urlsplit(text.strip())
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            msg = f"{redact(text)!r} is not the URL of a package index"
            raise InputError(msg, where=origin, fix="write http(s)://HOST/…/simple/")
        return cls(
            url=urlunsplit(
                (parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/") + "/", "", "")
            ),
            user=unquote(parts.username or "") or user,
            password=unquote(parts.password or "") or password,
            origin=origin,
        )

    @property
    def with_credentials(self) -> str:
        """The URL as a child process needs it. Never print or write it."""
        if not self.user:
            return self.url
        scheme, rest = self.url.split("://", 1)
        secret = f":{quote(self.password, safe='')}" if self.password else ""
        return f"{scheme}://{quote(self.user, safe='')}{secret}@{rest}"


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """Indexes in the order they are asked. `notes` say what was configured but is not used."""

    sources: tuple[Source, ...]
    default_is_builtin: bool
    ca_file: Path | None
    ca_dir: Path | None
    notes: tuple[str, ...]

    @classmethod
    def from_environment(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        project: Path | None = None,
        home: Path | None = None,
        system: Path = Path("/"),
    ) -> IndexSettings:
        """From environment variables and configuration files, those of `project` (here) before the user's.

        `home` and `system` are for tests.
        """
        env = os.environ if environ is None else environ
        home = home or Path(env.get("HOME") or Path.home())
        notes: list[str] = []
        uv = _uv(env, (project or Path.cwd(), home, system), notes.append)
        pip = _pip(env, home, system, notes.append)
        default = uv.default or pip.default
        builtin = default is None
        if default is None:
            default = Source.of(_library_default(), origin="the library's default")
        # pip's extra indexes count only where uv has no index of its own: one tool's settings, no mixture.
        extras = uv.extras if (uv.extras or uv.default) else pip.extras
        sources = tuple(dict.fromkeys((*extras, default)))
        ca = next(
            (env[k] for k in ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE") if env.get(k)), pip.cert
        )
        ca_dir = env.get("SSL_CERT_DIR", "").split(os.pathsep)[0]
        return cls(
            sources=sources,
            default_is_builtin=builtin,
            ca_file=_existing(ca, "CA bundle", notes.append),
            ca_dir=Path(ca_dir) if ca_dir and Path(ca_dir).is_dir() else None,
            notes=tuple(notes),
        )


@dataclass(kw_only=True)
class _Found:
    default: Source | None = None
    extras: tuple[Source, ...] = ()
    cert: str | None = None


def redact(text: str) -> str:
    """A URL or message without `user:password@`."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def _library_default() -> str:
    """pypi_simple's own constant, read from its source: an import costs every plan a third of a second."""
    spec = importlib.util.find_spec("pypi_simple")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / "__init__.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else ():
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                name = node.target.id if isinstance(node.target, ast.Name) else ""
                if name == "PYPI_SIMPLE_ENDPOINT":
                    return str(ast.literal_eval(node.value))
    from pypi_simple import PYPI_SIMPLE_ENDPOINT

    return PYPI_SIMPLE_ENDPOINT


def _existing(path: str | None, what: str, note: Callable[[str], None]) -> Path | None:
    if not path:
        return None
    if not Path(path).is_file():
        note(f"{what} {path} is not there; the system's certificates are used")
        return None
    return Path(path)


def _usable(url: str, origin: str, note: Callable[[str], None]) -> bool:
    if re.match(r"https?://", url.strip()):
        return True
    note(f"{origin}: {redact(url)} is ignored: mtbuild reads indexes over HTTP only")
    return False


def _uv(env: Mapping[str, str], places: tuple[Path, Path, Path], note: Callable[[str], None]) -> _Found:
    found = _Found()
    extras: list[Source] = []

    def add(text: str, origin: str, *, default: bool = False, name: str = "") -> None:
        named = re.match(r"([A-Za-z0-9._-]+)=(.+)", text)  # UV_INDEX allows NAME=URL
        if named:
            name, text = named.groups()
        if not _usable(text, origin, note):
            return
        key = re.sub(r"[^A-Z0-9]", "_", name.upper())
        source = Source.of(
            text,
            origin=origin,
            user=env.get(f"UV_INDEX_{key}_USERNAME", "") if key else "",
            password=env.get(f"UV_INDEX_{key}_PASSWORD", "") if key else "",
        )
        if default:
            found.default = found.default or source
        else:
            extras.append(source)

    for variable in ("UV_INDEX", "UV_EXTRA_INDEX_URL"):
        for word in env.get(variable, "").split():
            add(word, variable)
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if env.get(variable):
            add(env[variable], variable, default=True)
    if env.get("UV_FIND_LINKS"):
        note(
            "UV_FIND_LINKS is ignored: mtbuild plans from indexes only, so that everybody gets the same files"
        )
    if env.get("UV_NO_CONFIG", "").lower() not in {"1", "true", "yes"}:
        for path in _uv_files(env, *places):
            _uv_file(path, add, note)
    found.extras = tuple(extras)
    return found


def _uv_files(env: Mapping[str, str], project: Path, home: Path, system: Path) -> tuple[Path, ...]:
    if env.get("UV_CONFIG_FILE"):
        return (Path(env["UV_CONFIG_FILE"]),)
    own = project / "uv.toml"
    user = Path(env.get("XDG_CONFIG_HOME") or home / ".config")
    return (
        own if own.is_file() else project / "pyproject.toml",  # uv's own order of these two
        user / "uv" / "uv.toml",
        system / "etc" / "xdg" / "uv" / "uv.toml",
        system / "etc" / "uv" / "uv.toml",
    )


def _uv_file(path: Path, add: Callable[..., None], note: Callable[[str], None]) -> None:
    if not path.is_file():
        return
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"can't be read as TOML: {error}"
        raise InputError(msg, where=str(path), fix="correct the file, or set UV_NO_CONFIG=1") from error
    if path.name == "pyproject.toml":
        data = data.get("tool", {}).get("uv", {})
    pip = data.get("pip", {})
    for entry in data.get("index", []):
        if entry.get("explicit"):
            continue  # uv itself uses those only for packages that name them
        add(entry["url"], str(path), default=bool(entry.get("default")), name=entry.get("name", ""))
    for section in (data, pip):
        for url in section.get("extra-index-url", []):
            add(url, str(path))
        if section.get("index-url"):
            add(section["index-url"], str(path), default=True)
        if section.get("find-links"):
            note(f"{path}: find-links is ignored: mtbuild plans from indexes only")


def _pip(env: Mapping[str, str], home: Path, system: Path, note: Callable[[str], None]) -> _Found:
    """pip's files, weakest first, and over them its environment variables."""
    options: dict[str, tuple[str, str]] = {}
    for path in _pip_files(env, home, system):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            msg = f"can't be read as pip configuration: {error}"
            raise InputError(
                msg, where=str(path), fix="correct the file, or set PIP_CONFIG_FILE=/dev/null"
            ) from error
        for section in ("global", "install"):
            if parser.has_section(section):
                options.update({key: (value, str(path)) for key, value in parser.items(section)})
    for key in ("index-url", "extra-index-url", "find-links", "cert"):
        variable = f"PIP_{key.upper().replace('-', '_')}"
        if env.get(variable):
            options[key] = (env[variable], variable)
    found = _Found(cert=options["cert"][0] if "cert" in options else None)
    if "find-links" in options:
        note(f"{options['find-links'][1]}: find-links is ignored: mtbuild plans from indexes only")
    if "index-url" in options and _usable(options["index-url"][0], options["index-url"][1], note):
        found.default = Source.of(options["index-url"][0], origin=options["index-url"][1])
    if "extra-index-url" in options:
        text, origin = options["extra-index-url"]
        found.extras = tuple(Source.of(u, origin=origin) for u in text.split() if _usable(u, origin, note))
    return found


def _pip_files(env: Mapping[str, str], home: Path, system: Path) -> tuple[Path, ...]:
    chosen = env.get("PIP_CONFIG_FILE")
    if chosen == os.devnull:
        return ()  # pip's own way to say: no file at all
    user = Path(env.get("XDG_CONFIG_HOME") or home / ".config")
    files = [
        system / "etc" / "xdg" / "pip" / "pip.conf",
        system / "etc" / "pip.conf",
        home / ".pip" / "pip.conf",
        user / "pip" / "pip.conf",
        Path(env.get("VIRTUAL_ENV") or sys.prefix) / "pip.conf",
    ]
    return (*files, Path(chosen)) if chosen else tuple(files)
