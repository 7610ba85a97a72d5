"""The configured package index: which files a project has. No address is written in this project."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.utils import canonicalize_name

from mtbuild.errors import InfrastructureError
from mtbuild.plan.index_settings import IndexSettings, redact
from mtbuild.plan.once import Once
from mtbuild.plan.tags import by_version

if TYPE_CHECKING:
    from collections.abc import Callable

    from packaging.version import Version

    from mtbuild.plan.fetch import Fetcher
    from mtbuild.plan.index_settings import Source

__all__ = ["Index", "Link", "write_atomically"]

_FRESH_S = (
    600.0  # how long an index page is believed without asking again; what public indexes themselves grant
)
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.01"


@dataclass(frozen=True, kw_only=True)
class Link:
    """One file of a project's index page. `sha256` and `size` (bytes) are None where the page omits them."""

    filename: str
    url: str
    sha256: str | None
    size: int | None
    requires_python: str | None
    yanked: bool
    metadata_sha256: str | None = None


class Index:
    """uv's settings, else pip's, else the default of the library; extra indexes first, as uv does.

    Pages are kept for ten minutes in `cache`, where one is given; then they are asked for again. Where the
    index can't be reached, the kept page is used with a note: what it says of a published file stays true.
    """

    def __init__(
        self,
        settings: IndexSettings,
        *,
        cache: Path | None = None,
        note: Callable[[str], None] | None = None,
        fetcher: Fetcher | None = None,
        fresh_s: float = _FRESH_S,
    ) -> None:
        self.settings = settings
        self._cache = cache
        self._note = note or (lambda text: None)
        self._given = fetcher
        self._fresh_s = fresh_s
        self._once = Once()
        for text in settings.notes:
            self._note(text)

    @classmethod
    def from_environment(
        cls, *, cache: Path | None = None, note: Callable[[str], None] | None = None
    ) -> Index:
        """From this process's environment and the user's uv and pip configuration."""
        return cls(IndexSettings.from_environment(), cache=cache, note=note)

    def keep_pages_in(self, cache: Path) -> None:
        """Keeps pages there from now on, unless a place was given before."""
        self._cache = self._cache or cache

    @cached_property
    def fetcher(self) -> Fetcher:
        """The HTTP side, made on first use."""
        from mtbuild.plan.fetch import Fetcher

        return self._given or Fetcher(self.settings)

    @property
    def bytes(self) -> int:
        """Bytes received so far."""
        return self.fetcher.bytes

    @property
    def described(self) -> str:
        """The indexes in the order they are asked, without credentials."""
        return ", ".join(
            f"{source.url} ({source.origin})" if source.origin else source.url
            for source in self.settings.sources
        )

    def links(self, project: str) -> tuple[Link, ...]:
        """All files of a project, from the first index that has it; empty where none has."""
        name = canonicalize_name(project)
        return self._once(("links", name), lambda: self._links(name))

    def _links(self, name: str) -> tuple[Link, ...]:
        for source in self.settings.sources:
            links = self._page(source, name)
            if links:
                return links
        return ()

    def versions(self, project: str) -> dict[Version, list[Link]]:
        """The same by version, newest first; files whose name tells none are left out."""
        name = canonicalize_name(project)
        return self._once(("versions", name), lambda: by_version(self.links(name)))

    def uv_env(self) -> dict[str, str]:
        """Environment for a uv subprocess that makes it use the same indexes and CA; nothing goes to disk."""
        *extras, default = self.settings.sources
        env = {"UV_NO_CONFIG": "1", "UV_INDEX": " ".join(source.with_credentials for source in extras)}
        if not self.settings.default_is_builtin:
            env["UV_DEFAULT_INDEX"] = default.with_credentials
        if self.settings.ca_file is not None:
            env["SSL_CERT_FILE"] = str(self.settings.ca_file)
        return {key: value for key, value in env.items() if value}

    def _page(self, source: Source, name: str) -> tuple[Link, ...]:
        url = f"{source.url}{name}/"
        kept = self._kept(url)
        if kept is not None and time.time() - kept["fetched"] < self._fresh_s:
            return _links(kept["links"])
        headers = {"Accept": _ACCEPT}
        if kept is not None and kept["etag"]:
            headers["If-None-Match"] = kept["etag"]
        try:
            answer = self.fetcher.get(url, headers)
            if answer.status not in {200, 304, 404}:
                msg = f"{redact(url)} answered with HTTP status {answer.status}"
                fix = "check the index that uv or pip is configured with, and its credentials"
                raise InfrastructureError(msg, fix=fix)
        except InfrastructureError as error:
            if kept is None:
                raise
            self._note(f"{name}: the page kept earlier is used, because {error.message}")
            return _links(kept["links"])
        if answer.status == 304 and kept is not None:
            rows = kept["links"]
        elif answer.status == 404:
            rows = []
        else:
            rows = _rows(answer.content, answer.headers.get("content-type", ""), url, name)
        self._keep(url, {"fetched": time.time(), "etag": answer.headers.get("etag", ""), "links": rows})
        return _links(rows)

    def _file(self, url: str) -> Path | None:
        key = hashlib.sha256(url.encode()).hexdigest()
        return self._cache / "pages" / f"{key}.json" if self._cache is not None else None

    def _kept(self, url: str) -> dict[str, Any] | None:
        path = self._file(url)
        if path is None:
            return None
        try:
            data: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return data if {"fetched", "etag", "links"} <= data.keys() else None

    def _keep(self, url: str, data: dict[str, Any]) -> None:
        path = self._file(url)
        if path is not None:
            write_atomically(path, json.dumps(data, separators=(",", ":")).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """So that two processes, or a kill, never leave half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _rows(content: bytes, content_type: str, url: str, name: str) -> list[list[Any]]:
    """What is kept of a page: the fields of Link, in order."""
    from pypi_simple import ProjectPage, UnsupportedRepoVersionError

    try:
        if "json" in content_type:
            page = ProjectPage.from_json_data(json.loads(content), base_url=url)
        else:
            page = ProjectPage.from_html(name, content, base_url=url)
    except (ValueError, UnsupportedRepoVersionError) as error:
        msg = f"{redact(url)} is not an index page: {error}"
        raise InfrastructureError(msg, fix="check the index that uv or pip is configured with") from error
    return [
        [
            package.filename,
            redact(package.url.partition("#")[0]),
            package.digests.get("sha256"),
            package.size,
            package.requires_python,
            package.is_yanked,
            (package.metadata_digests or {}).get("sha256"),
        ]
        for package in page.packages
        if package.filename.endswith((".whl", ".tar.gz", ".zip"))
    ]


def _links(rows: list[list[Any]]) -> tuple[Link, ...]:
    return tuple(
        Link(
            filename=row[0],
            url=row[1],
            sha256=row[2],
            size=row[3],
            requires_python=row[4],
            yanked=row[5],
            metadata_sha256=row[6],
        )
        for row in rows
    )
