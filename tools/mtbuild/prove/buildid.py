"""The name of a build by what goes into it: the same inputs, the same id, so nothing is built twice."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mtbuild.digest import Digest

__all__ = ["build_id"]


def build_id(
    *,
    dockerfile: str,
    lock: str,
    base: Digest,
    runtime_sha256: str,
    platform: str,
    output: Mapping[str, str],
) -> str:
    """64 hex digits: sha256 over canonical JSON (sorted keys, no blanks, UTF-8) of everything that goes in.

    `lock` is the text of requirements.lock, `runtime_sha256` empty where no runtime goes in, `output` the
    output options and labels that change the image's bytes.
    """
    parts = {
        "base": str(base),
        "dockerfile": dockerfile,
        "lock": lock,
        "output": dict(output),
        "platform": platform,
        "runtime": runtime_sha256,
    }
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
