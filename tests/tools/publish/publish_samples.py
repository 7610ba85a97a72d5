"""What the tests of publish/ share: images of random bytes, reports, and a proxy that makes faults.

Registries are real (CNCF distribution). Reports are written here, since no GPU is needed to judge one.
"""

from __future__ import annotations

import http.client
import json
import secrets
import threading
import urllib.parse
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from mtbuild.digest import Digest, Reference
from mtbuild.plan.cell import Base, Cell
from mtbuild.prove.report import CheckResult, ContainerRun, Fact, SmokeReport, required_checks
from mtbuild.publish import evidence
from mtbuild.publish.evidence import Statement
from mtbuild.publish.policy import Policy
from mtbuild.publish.promote import publish
from mtbuild.publish.registry import INDEX, MANIFEST, Manifest, Repository

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mtbuild.paths import Paths
    from mtbuild.publish.dsse import Envelope
    from mtbuild.publish.keys import Keys
    from mtbuild.publish.promote import Promotion

SUITE = Digest.of(b"the suite")
NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
USERS = ("65532:65532", "1234567890:0")
H200 = {"name": "NVIDIA H200", "sm": "9.0", "driver": "580.95.05"}
RTX4090 = {"name": "NVIDIA GeForce RTX 4090", "sm": "8.9", "driver": "570.124.06"}
SHUT_IN: dict[str, Any] = {  # as `prove/container.py` reads it back from the engine
    "read_only": True,
    "network": "none",
    "cap_drop": ["ALL"],
    "cap_add": [],
    "privileged": False,
    "security_opt": ["no-new-privileges"],
    "memory_bytes": 12 * 2**30,
    "pids": 1024,
}

BASE = Base(name="bookworm", kind="bootstrap", glibc="2.36", python=("3.11",), suite="bookworm")


def cell_of(**changes: Any) -> Cell:
    """V73, or a cell that differs from it."""
    known: dict[str, Any] = {
        "name": "v73",
        "flavour": "runtime-deps",
        "base": BASE,
        "python": "3.11",
        "torch": "2.7.1",
        "cuda": "12.6",
        "triton": "3.3.1",
        "xformers": "0.0.31",
        "compiler": True,
        "targets": ("8.0", "8.6", "8.9", "9.0"),
    }
    return Cell(**{**known, **changes})


V73 = cell_of()


@dataclass(frozen=True, kw_only=True)
class SampleBuild:
    """A build record with the fields of `BuildRecord`."""

    cell_id: str
    cell_name: str
    build_id: str
    ref: Reference
    size_bytes: int = 12345
    override: str | None = None
    created: str = "2026-11-22T10:00:00Z"


def push_image(repository: Repository, *, layers: int = 2, labels: dict[str, str] | None = None) -> Manifest:
    """An image of random layers; its manifest has odd white space, so that only its own bytes will do."""
    config = json.dumps({"architecture": "amd64", "os": "linux", "config": {"Labels": labels or {}}}).encode()
    parts = [repository.put_blob(config, media_type="application/vnd.oci.image.config.v1+json")]
    for _ in range(layers):
        data = secrets.token_bytes(4096)
        parts.append(repository.put_blob(data, media_type="application/vnd.oci.image.layer.v1.tar+zstd"))
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": parts[0].to_json(),
        "layers": [part.to_json() for part in parts[1:]],
    }
    manifest = Manifest(body=json.dumps(document, indent=3).encode() + b"\n", media_type=MANIFEST)
    repository.put_manifest(manifest, tag=f"bld-{manifest.digest.short}")
    return manifest


def build_of(repository: Repository, manifest: Manifest, cell: Cell = V73, **changes: Any) -> SampleBuild:
    build = SampleBuild(
        cell_id=cell.id,
        cell_name=cell.name,
        build_id=Digest.of(b"build " + manifest.body).hex,
        ref=repository.reference(manifest.digest),
    )
    return replace(build, **changes)


def report_of(
    ref: Reference,
    *,
    cell: Cell = V73,
    gpu: dict[str, str] | None = None,
    finished: datetime = NOW - timedelta(hours=1),
    bad: dict[str, str] | None = None,
    suite: Digest = SUITE,
) -> SmokeReport:
    """A report that passes, but for the checks in `bad` (check → status; "absent" leaves it out)."""
    tier = "cpu" if gpu is None else "gpu"
    required = required_checks(cell, tier, runtime=True)
    bad = bad or {}
    results = tuple(
        CheckResult(
            check=check,
            status=bad.get(check, "passed"),  # type: ignore[arg-type]
            user=user,
            seconds=0.5,
            message="as it should be" if check not in bad else "it did not work",
        )
        for user in USERS
        for check in required
        if bad.get(check) != "absent"
    )
    facts = [
        Fact(name="digest", value=str(ref.digest), observed_by="host"),
        Fact(name="container.settings", value={user: dict(SHUT_IN) for user in USERS}, observed_by="host"),
    ]
    if gpu is not None:
        facts += [Fact(name=f"gpu.{name}", value=value, observed_by="host") for name, value in gpu.items()]
        facts.append(Fact(name="gpu.held_bytes", value={USERS[0]: 2**30}, observed_by="host"))
        facts.append(Fact(name="gpu.memory_bytes", value=24 * 2**30, observed_by="host"))
    facts.append(Fact(name="suite.torch.version", value=f"{cell.torch}+cu126", observed_by="image"))
    fine = {"passed", "degraded"} if "degraded" in cell.allow else {"passed"}
    facts.append(Fact(name="suite.xformers.built_for_cuda", value=1208, observed_by="image"))
    failed = not set(bad.values()) <= fine
    return SmokeReport(
        ref=ref,
        cell_id=cell.id,
        cell_name=cell.name,
        tier=tier,
        required=required,
        allow_degraded="degraded" in cell.allow,
        results=results,
        runs=tuple(
            ContainerRun(user=user, exit_status=int(failed), oom_killed=False, seconds=9.0) for user in USERS
        ),
        facts=tuple(facts),
        suite=suite,
        started=_text(finished - timedelta(minutes=1)),
        finished=_text(finished),
    )


def policy_of(build: SampleBuild, keys: Keys | None, *, cell: Cell = V73, channel: str = "checked") -> Policy:
    tier = "gpu" if channel == "verified" else "cpu"
    return Policy(
        channel=channel,  # type: ignore[arg-type]
        cell_id=cell.id,
        build_id=build.build_id,
        required=required_checks(cell, tier, runtime=True),  # type: ignore[arg-type]
        basic=required_checks(cell, "cpu", runtime=True),
        allow_degraded="degraded" in cell.allow,
        max_age_days=90,
        suite=SUITE,
        signers=tuple(key.hint for key in keys.trusted) if keys else ("me",),
    )


def signed(report: SmokeReport, build: SampleBuild, keys: Keys, *, cell: Cell = V73) -> Envelope:
    return evidence.sign(evidence.statement(report, cell, build=build), keys.own)


def statement_of(report: SmokeReport, build: SampleBuild, **changes: Any) -> Statement:
    """A statement as `evidence.verify` gives it, signed by "me"."""
    said = Statement(subject=report.digest, report=report, build_id=build.build_id, override=None)
    known = {"signer": "me", "envelope": Digest.of(json.dumps(report.to_json()).encode())}
    return replace(said, **{**known, **changes})


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Desk:
    """Everything a publication needs, so that tests name only what they change."""

    staging: Repository
    release: Repository
    build: SampleBuild
    keys: Keys
    paths: Paths

    def publish(
        self, *envelopes: Envelope, channel: str = "checked", cell: Cell = V73, **changes: Any
    ) -> Promotion:
        build = changes.pop("build", self.build)
        known: dict[str, Any] = {
            "cell": cell,
            "build": build,
            "envelopes": envelopes,
            "release": self.release.name,
            "channel": channel,
            "paths": self.paths,
            "keys": self.keys,
            "policy": policy_of(build, self.keys, cell=cell, channel=channel),
            "now": NOW,
        }
        return publish(build.ref, **{**known, **changes})

    def signed(self, *, build: SampleBuild | None = None, cell: Cell = V73, **changes: Any) -> Envelope:
        made = build or self.build
        return signed(report_of(made.ref, cell=cell, **changes), made, self.keys, cell=cell)

    def tags(self) -> set[str]:
        return {tag for tag in self.release.tags() if not tag.startswith("sha256-")}


@dataclass
class Faults:
    """What the proxy does to requests. `writes` counts the requests that change something (PUT, POST)."""

    writes: int = 0
    fail_after_writes: int | None = None  # drop every connection once so many writes went through
    answer_lost: bool = False  # the write that is one too many is done, only its answer is lost
    statuses: list[int] = field(default_factory=list)  # answered to the next requests, one each
    referrers: bool = False  # serve the referrers API, which distribution 2.8 lacks
    page: int | None = None  # list tags in pages of this size, which distribution 2.8 does not
    requests: list[str] = field(default_factory=list)
    rewrite: Callable[[str, bytes], bytes] = lambda _path, body: body


def _paged(path: str, data: bytes, size: int) -> tuple[bytes, str]:
    """One page of tags as the distribution specification describes it, with the link to the next."""
    bare, _, query = path.partition("?")
    last = dict(urllib.parse.parse_qsl(query)).get("last", "")
    listed = json.loads(data)
    rest = [tag for tag in sorted(listed["tags"]) if tag > last]
    page = rest[:size]
    link = f'<{bare}?n={size}&last={page[-1]}>; rel="next"' if len(rest) > size else ""
    return json.dumps({**listed, "tags": page}).encode(), link


@contextmanager
def proxy(upstream: str) -> Iterator[tuple[str, Faults]]:
    """A proxy on loopback before a registry; gives its `host:port` and its faults."""
    faults = Faults()
    lock = threading.Lock()
    children: dict[str, list[dict[str, Any]]] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

        def log_message(self, *_: object) -> None:
            pass

        def _drop(self) -> None:
            self.close_connection = True
            self.connection.close()

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                faults.requests.append(f"{self.command} {self.path}")
                status = faults.statuses.pop(0) if faults.statuses else None
                writing = self.command in ("PUT", "POST", "PATCH", "DELETE")
                limit = faults.fail_after_writes
                down = limit is not None and faults.writes >= limit
                lost = down and faults.answer_lost and writing and faults.writes == limit
                faults.writes += writing
            if status is not None:
                self._answer(status, {"Content-Length": "0"}, b"")
                return
            if down and not lost:
                self._drop()
                return
            parts = self.path.split("/")
            if faults.referrers and "referrers" in parts:
                index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": children.get(parts[-1], [])}
                self._answer(200, {"Content-Type": INDEX}, json.dumps(index).encode())
                return
            connection = http.client.HTTPConnection(upstream, timeout=30)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection",)}
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            data = answer.read()
            got = dict(answer.getheaders())
            connection.close()
            if lost:
                self._drop()
                return
            if faults.referrers and self.command == "PUT" and "manifests" in parts and answer.status == 201:
                subject = json.loads(body).get("subject")
                if subject:
                    entry = {
                        "mediaType": MANIFEST,
                        "digest": got["Docker-Content-Digest"],
                        "size": len(body),
                        "artifactType": json.loads(body).get("artifactType"),
                    }
                    children.setdefault(subject["digest"], []).append(entry)
                    got["OCI-Subject"] = subject["digest"]
            if faults.page and self.path.partition("?")[0].endswith("/tags/list"):
                data, got["Link"] = _paged(self.path, data, faults.page)
            if self.command == "GET":
                data = faults.rewrite(self.path, data)
            self._answer(answer.status, got, data)

        def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_PATCH = do_DELETE = _handle  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
