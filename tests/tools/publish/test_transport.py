"""Signing in: docker's configuration, basic and bearer, and where credentials must not go."""

from __future__ import annotations

import base64
import json
import secrets
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import bcrypt
import httpx
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID
from publish_samples import push_image

from mtbuild.errors import CommandError, InputError
from mtbuild.paths import Paths
from mtbuild.prove.programs import ensure_programs
from mtbuild.publish.registry import Repository
from mtbuild.publish.transport import (
    Credentials,
    RegistryDeniedError,
    RegistryError,
    Transport,
    credentials_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def real_registry(folder: Path, auth: dict[str, Any]) -> Iterator[str]:
    """Distribution with an `auth` section of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "version": "0.1",
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": f"127.0.0.1:{port}", "secret": "s"},
        "auth": auth,
    }
    (folder / "config.yml").write_text(yaml.safe_dump(settings))
    program = ensure_programs(Paths.of(folder)) / "usr/bin/docker-registry"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OTEL_TRACES_EXPORTER": "none"}
    process = subprocess.Popen(
        [program, "serve", folder / "config.yml"], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            try:
                httpx.get(f"http://127.0.0.1:{port}/v2/", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def docker_config(folder: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))


def basic(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def test_a_password_of_dockers_configuration_opens_a_real_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "htpasswd").write_bytes(b"me:" + bcrypt.hashpw(b"open sesame", bcrypt.gensalt(4)) + b"\n")
    auth = {"htpasswd": {"realm": "r", "path": str(tmp_path / "htpasswd")}}
    with real_registry(tmp_path, auth) as host:
        docker_config(tmp_path, monkeypatch, {"auths": {host: {"auth": basic("me", "open sesame")}}})
        with Repository.open(f"{host}/a/b") as repository:
            manifest = push_image(repository)
            assert repository.manifest(manifest.digest).body == manifest.body
        docker_config(tmp_path, monkeypatch, {"auths": {host: {"auth": basic("me", "wrong")}}})
        with Repository.open(f"{host}/a/b") as repository, pytest.raises(RegistryDeniedError) as caught:
            repository.manifest(manifest.digest)
        assert f"docker login {host}" in caught.value.fix
        assert "wrong" not in str(caught.value)
        docker_config(tmp_path, monkeypatch, {})
        with (
            Repository.open(f"{host}/a/b") as repository,
            pytest.raises(RegistryDeniedError, match="has none"),
        ):
            repository.manifest(manifest.digest)


class TokenService:
    """Distribution's token protocol, with real signed tokens; remembers what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "token service")])
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(1)
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.bundle = folder / "token.pem"
        self.bundle.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        self.asked: list[tuple[str, str, dict[str, list[str]]]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self._give(parse_qs(urlsplit(self.path).query))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self._give(parse_qs(body))

            def _give(self, query: dict[str, list[str]]) -> None:
                service.asked.append((self.command, self.headers.get("Authorization", ""), query))
                scopes = " ".join(query.get("scope", [])).split()
                data = json.dumps({"token": service.token(scopes)}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.realm = f"http://127.0.0.1:{self.server.server_address[1]}/token"

    def token(self, scopes: list[str]) -> str:
        def encode(data: bytes) -> str:
            return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

        der = self.certificate.public_bytes(serialization.Encoding.DER)
        header = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        now = int(time.time())
        claims = {
            "iss": "me",
            "aud": "registry",
            "sub": "",
            "jti": secrets.token_hex(4),
            "nbf": now - 60,
            "iat": now,
            "exp": now + 300,
            "access": access,
        }
        signed = f"{encode(json.dumps(header).encode())}.{encode(json.dumps(claims).encode())}"
        r, s = decode_dss_signature(self.key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{encode(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def test_a_bearer_token_is_fetched_for_each_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = TokenService(tmp_path)
    auth = {
        "token": {
            "realm": service.realm,
            "service": "registry",
            "issuer": "me",
            "rootcertbundle": str(service.bundle),
        }
    }
    try:
        with real_registry(tmp_path, auth) as host:
            docker_config(tmp_path, monkeypatch, {"auths": {host: {"auth": basic("me", "pass")}}})
            near = Transport(host)
            staging, release = Repository(near, "x/staging"), Repository(near, "x/release")
            manifest = push_image(staging)
            for blob in manifest.blobs:
                release.copy_blob(staging, blob)  # mounts: needs both repositories in one token
            release.put_manifest(manifest, tag="t")
            assert release.manifest("t").digest == manifest.digest
            scopes = [tuple(query["scope"]) for _, _, query in service.asked]
            assert ("repository:x/release:pull,push", "repository:x/staging:pull") in scopes
            assert {header for _, header, _ in service.asked} == {f"Basic {basic('me', 'pass')}"}
            before = len(service.asked)
            release.manifest("t")
            assert len(service.asked) == before  # a token is kept
            near.close()
            docker_config(tmp_path, monkeypatch, {"auths": {host: {"identitytoken": "refresh me"}}})
            with Repository.open(f"{host}/x/release") as repository:
                repository.manifest("t")
            method, header, query = service.asked[-1]
            assert (method, header, query["refresh_token"]) == ("POST", "", ["refresh me"])
    finally:
        service.server.shutdown()
        service.server.server_close()


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            answer(self)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_credentials_stay_behind_when_a_blob_lies_elsewhere() -> None:
    seen: list[str | None] = []

    def store(request: BaseHTTPRequestHandler) -> None:
        seen.append(request.headers.get("Authorization"))
        request.send_response(200)
        request.send_header("Content-Length", "4")
        request.end_headers()
        request.wfile.write(b"data")

    with answering(store) as elsewhere:

        def redirect(request: BaseHTTPRequestHandler) -> None:
            if request.headers.get("Authorization") is None:
                request.send_response(401)
                request.send_header("WWW-Authenticate", 'Basic realm="r"')
            else:
                request.send_response(307)
                request.send_header("Location", f"http://{elsewhere}/blob")
            request.send_header("Content-Length", "0")
            request.end_headers()

        with answering(redirect) as host:
            transport = Transport(host, credentials=Credentials(username="me", password="secret"))
            from mtbuild.digest import Digest

            assert Repository(transport, "a/b").blob(Digest.of(b"data")) == b"data"
    assert seen == [None]


def test_a_token_service_without_tls_gets_no_credentials() -> None:
    def challenge(request: BaseHTTPRequestHandler) -> None:
        request.send_response(401)
        request.send_header("WWW-Authenticate", 'Bearer realm="http://tokens.example.org/",service="s"')
        request.send_header("Content-Length", "0")
        request.end_headers()

    with answering(challenge) as host:
        transport = Transport(host, credentials=Credentials(username="me", password="secret"))
        with pytest.raises(RegistryDeniedError, match="without TLS"):
            Repository(transport, "a/b").tags()


def test_an_unknown_way_to_sign_in_is_named() -> None:
    def challenge(request: BaseHTTPRequestHandler) -> None:
        request.send_response(401)
        request.send_header("WWW-Authenticate", "Negotiate")
        request.send_header("Content-Length", "0")
        request.end_headers()

    with answering(challenge) as host, pytest.raises(RegistryError, match="'Negotiate'"):
        Repository(Transport(host), "a/b").tags()


def test_a_credential_helper_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-mine"
    helper.write_text('#!/bin/sh\nread host\necho "{\\"Username\\": \\"u-$host\\", \\"Secret\\": \\"p\\"}"\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    docker_config(tmp_path, monkeypatch, {"credHelpers": {"ghcr.io": "mine"}})
    assert credentials_for("ghcr.io") == Credentials(username="u-ghcr.io", password="p")
    assert credentials_for("quay.io") is None
    docker_config(tmp_path, monkeypatch, {"credsStore": "absent"})
    with pytest.raises(CommandError) as caught:
        credentials_for("ghcr.io")
    assert "docker-credential-absent" in caught.value.fix


def test_a_broken_docker_configuration_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with pytest.raises(InputError) as caught:
        credentials_for("ghcr.io")
    assert caught.value.where == str(tmp_path / "config.json")


def test_docker_hub_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker_config(
        tmp_path, monkeypatch, {"auths": {"https://index.docker.io/v1/": {"auth": basic("me", "pass")}}}
    )
    assert credentials_for("docker.io") == Credentials(username="me", password="pass")
    with Transport("docker.io") as transport:
        assert str(transport.base) == "https://registry-1.docker.io"


def test_secrets_are_in_no_repr() -> None:
    text = repr(Credentials(username="me", password="hush", identity_token="quiet"))
    assert "hush" not in text
    assert "quiet" not in text
