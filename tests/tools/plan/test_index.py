"""Where packages come from: settings of uv and pip, credentials, certificates, pages."""

from __future__ import annotations

import datetime
import ssl
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from local_index import LocalIndex, serve, wheel

from mtbuild.errors import InfrastructureError, InputError
from mtbuild.plan.fetch import Fetcher
from mtbuild.plan.index import Index
from mtbuild.plan.index_settings import IndexSettings, Source, redact

if TYPE_CHECKING:
    from pathlib import Path

UV, PIP, EXTRA = "https://uv.example/simple/", "https://pip.example/simple/", "https://extra.example/simple/"


def settings(
    tmp_path: Path, env: dict[str, str] | None = None, files: dict[str, str] | None = None
) -> IndexSettings:
    """As if this machine had only these files and variables."""
    for name, text in (files or {}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    env = {"VIRTUAL_ENV": str(tmp_path / "venv"), **(env or {})}
    project, home, system = (tmp_path / name for name in ("project", "home", "system"))
    return IndexSettings.from_environment(env, project=project, home=home, system=system)


def urls(found: IndexSettings) -> list[str]:
    return [source.url for source in found.sources]


PIP_CONF = "home/.config/pip/pip.conf"
UV_TOML = "home/.config/uv/uv.toml"


@pytest.mark.parametrize(
    ("env", "files", "expected"),
    [
        ({"UV_DEFAULT_INDEX": UV}, {}, [UV]),
        ({"UV_INDEX_URL": UV}, {}, [UV]),
        ({"UV_INDEX_URL": UV, "PIP_INDEX_URL": PIP}, {}, [UV]),
        ({"PIP_INDEX_URL": PIP}, {}, [PIP]),
        ({"PIP_INDEX_URL": PIP.rstrip("/")}, {}, [PIP]),
        ({"PIP_INDEX_URL": PIP, "PIP_EXTRA_INDEX_URL": EXTRA}, {}, [EXTRA, PIP]),
        ({"UV_DEFAULT_INDEX": UV, "UV_INDEX": f"mine={EXTRA}"}, {}, [EXTRA, UV]),
        ({"UV_DEFAULT_INDEX": UV, "PIP_EXTRA_INDEX_URL": EXTRA}, {}, [UV]),
        ({"UV_INDEX": EXTRA, "PIP_INDEX_URL": PIP}, {}, [EXTRA, PIP]),
        ({}, {PIP_CONF: f"[global]\nindex-url = {PIP}\n"}, [PIP]),
        (
            {},
            {
                "system/etc/pip.conf": f"[global]\nindex-url={EXTRA}\n",
                PIP_CONF: f"[global]\nindex-url={PIP}\n",
            },
            [PIP],
        ),
        ({"PIP_INDEX_URL": PIP}, {PIP_CONF: f"[global]\nindex-url = {EXTRA}\n"}, [PIP]),
        ({}, {"venv/pip.conf": f"[install]\nindex-url = {PIP}\n"}, [PIP]),
        ({}, {UV_TOML: f'index-url = "{UV}"\n', PIP_CONF: f"[global]\nindex-url = {PIP}\n"}, [UV]),
        (
            {},
            {UV_TOML: f'[[index]]\nurl = "{UV}"\ndefault = true\n[[index]]\nurl = "{EXTRA}"\n'},
            [EXTRA, UV],
        ),
        (
            {},
            {"project/pyproject.toml": f'[tool.uv]\nindex-url = "{PIP}"\n', UV_TOML: f'index-url = "{UV}"\n'},
            [PIP],
        ),
        ({}, {"project/uv.toml": f'index-url = "{PIP}"\n', "project/pyproject.toml": "[tool.uv]\n"}, [PIP]),
        ({"UV_NO_CONFIG": "1", "PIP_INDEX_URL": PIP}, {UV_TOML: f'index-url = "{UV}"\n'}, [PIP]),
        (
            {"PIP_CONFIG_FILE": "/dev/null", "UV_INDEX_URL": UV},
            {PIP_CONF: "[global]\ncert = /nowhere\n"},
            [UV],
        ),
    ],
)
def test_order_of_settings(
    tmp_path: Path, env: dict[str, str], files: dict[str, str], expected: list[str]
) -> None:
    found = settings(tmp_path, env, files)
    assert urls(found) == expected
    assert not found.default_is_builtin


def test_default_is_the_librarys(tmp_path: Path) -> None:
    from pypi_simple import PYPI_SIMPLE_ENDPOINT

    found = settings(tmp_path)
    assert urls(found) == [PYPI_SIMPLE_ENDPOINT]
    assert found.default_is_builtin
    assert "UV_DEFAULT_INDEX" not in Index(found).uv_env(), "uv has the same default itself"


def test_file_indexes_and_find_links_are_ignored_with_a_note(tmp_path: Path) -> None:
    extra = f"extra-index-url =\n  file:///mirror/simple\n  {EXTRA}\n"
    conf = f"[global]\nindex-url = {PIP}\n{extra}find-links = /wheels\n"
    found = settings(tmp_path, {"UV_FIND_LINKS": "/more"}, {PIP_CONF: conf})
    assert urls(found) == [EXTRA, PIP]
    for word in ("file:///mirror", "find-links", "UV_FIND_LINKS"):
        assert any(word in note for note in found.notes)


def test_credentials_are_parted_from_the_address(tmp_path: Path) -> None:
    env = {"UV_DEFAULT_INDEX": "https://me:s%40fe@uv.example/simple", "UV_INDEX": f"my-own={EXTRA}"}
    found = settings(tmp_path, {**env, "UV_INDEX_MY_OWN_USERNAME": "u", "UV_INDEX_MY_OWN_PASSWORD": "p"})
    assert [(s.url, s.user, s.password) for s in found.sources] == [(EXTRA, "u", "p"), (UV, "me", "s@fe")]
    index = Index(found)
    assert "s%40fe" not in index.described and "s@fe" not in index.described
    uv = index.uv_env()
    assert uv["UV_DEFAULT_INDEX"] == "https://me:s%40fe@uv.example/simple/"
    assert uv["UV_INDEX"] == "https://u:p@extra.example/simple/"


def test_broken_settings_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"uv\.toml: can't be read as TOML"):
        settings(tmp_path, {}, {UV_TOML: "index-url = \n"})
    with pytest.raises(InputError, match=r"pip\.conf: can't be read"):
        settings(tmp_path, {"UV_NO_CONFIG": "1"}, {PIP_CONF: "index-url\n"})


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"])
def test_ca_bundle(tmp_path: Path, variable: str) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("")
    assert settings(tmp_path, {variable: str(bundle)}).ca_file == bundle
    gone = settings(tmp_path, {variable: "/nowhere.pem"})
    assert gone.ca_file is None
    assert any("/nowhere.pem" in note for note in gone.notes)


def test_redact() -> None:
    assert (
        redact("see https://me:secret@host/simple and http://x/") == "see https://host/simple and http://x/"
    )


# ── against servers ──────────────────────────────────────────────────────────────────────────────


def index_of(*servers: LocalIndex, user: str = "", cache: Path | None = None, **more: Any) -> Index:
    found = IndexSettings(
        sources=tuple(
            Source.of(server.url.replace("://", f"://{user}@" if user else "://") + "/simple", origin="test")
            for server in servers
        ),
        default_is_builtin=False,
        ca_file=more.pop("ca_file", None),
        ca_dir=None,
        notes=(),
    )
    return Index(found, cache=cache, fetcher=Fetcher(found, backoff_s=0.01), **more)


def some(name: str, version: str) -> dict[str, bytes]:
    return dict([wheel(name, version, {f"{name}/__init__.py": ""}, requires=[], tag="py3-none-any")])


@pytest.mark.parametrize("html", [False, True])
def test_pages_in_both_forms(html: bool) -> None:
    with serve(LocalIndex(files=some("thing", "1.0"), html=html)) as server:
        (link,) = index_of(server).links("Thing")
    assert (link.filename, link.yanked) == ("thing-1.0-py3-none-any.whl", False)
    assert link.url == f"{server.url}/files/thing-1.0-py3-none-any.whl"
    assert link.sha256 is not None and len(link.sha256) == 64


def test_the_first_index_that_has_it_is_the_only_one_asked() -> None:
    with (
        serve(LocalIndex(files=some("thing", "1.0"))) as private,
        serve(LocalIndex(files=some("thing", "9.9"))) as public,
    ):
        index = index_of(private, public)
        assert [link.filename for link in index.links("thing")] == ["thing-1.0-py3-none-any.whl"]
        assert index.links("other") == ()
        assert public.paths("/simple/thing/") == []
        assert len(public.paths("/simple/other/")) == 1


def test_credentials_reach_their_host_and_no_other() -> None:
    with (
        serve(LocalIndex(files=some("thing", "1.0"))) as elsewhere,
        serve(LocalIndex(files=some("thing", "1.0"), account="me:s@fe", files_at=elsewhere.url)) as private,
    ):
        index = index_of(private, user="me:s%40fe")
        (link,) = index.links("thing")
        answer = index.fetcher.get(f"{link.url}.metadata")
        assert answer.status == 200 and answer.content.startswith(b"Metadata-Version")
        index.fetcher.range(link.url, -10, -1)
    assert all("authorization" in headers for _, headers in private.seen)
    assert len(elsewhere.seen) == 2
    assert not any("authorization" in headers for _, headers in elsewhere.seen)


def test_credentials_from_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password s@fe\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with serve(LocalIndex(files=some("thing", "1.0"), account="me:s@fe")) as server:
        assert index_of(server).links("thing")


def test_wrong_credentials_are_one_clear_error_without_them() -> None:
    with (
        serve(LocalIndex(files=some("thing", "1.0"), account="me:right")) as server,
        pytest.raises(InfrastructureError, match="HTTP status 401") as caught,
    ):
        index_of(server, user="me:wr0ng").links("thing")
    assert "wr0ng" not in str(caught.value)
    assert "credentials" in caught.value.fix


def test_no_server_at_all() -> None:
    with serve(LocalIndex()) as server:
        pass
    with pytest.raises(InfrastructureError, match="could not be read after 5 attempts") as caught:
        index_of(server).links("thing")
    assert "nothing was changed" in caught.value.fix


def test_page_is_kept_then_asked_again_then_used_without_the_index(tmp_path: Path) -> None:
    said: list[str] = []
    with serve(LocalIndex(files=some("thing", "1.0"), etag='"one"')) as server:
        first = index_of(server, cache=tmp_path).links("thing")
        assert index_of(server, cache=tmp_path).links("thing") == first
        assert len(server.seen) == 1, "a fresh page is not asked for again"
        assert index_of(server, cache=tmp_path, fresh_s=0).links("thing") == first
        assert server.seen[1][1]["if-none-match"] == '"one"'
    assert index_of(server, cache=tmp_path, fresh_s=0, note=said.append).links("thing") == first
    assert "the page kept earlier is used" in said[0]


@pytest.fixture
def authority(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for 127.0.0.1, made on the spot."""
    import ipaddress

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    bundle, private = tmp_path / "ca.pem", tmp_path / "key.pem"
    bundle.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(bundle, private)
    return bundle, context


def test_own_ca(authority: tuple[Path, ssl.SSLContext]) -> None:
    bundle, context = authority
    with serve(LocalIndex(files=some("thing", "1.0")), tls=context) as server:
        assert index_of(server, ca_file=bundle).links("thing")
        with pytest.raises(InfrastructureError) as caught:
            index_of(server).links("thing")
    assert "SSL_CERT_FILE" in caught.value.fix


def test_uv_uses_the_same_index_and_credentials(tmp_path: Path) -> None:
    """`uv_env` is all that uv needs: a private index, nothing on disk, no other setting."""
    from mtbuild import proc

    with serve(LocalIndex(files=some("thing", "1.0"), account="me:s@fe")) as server:
        env = index_of(server, user="me:s%40fe").uv_env()
        done = proc.run(
            [
                sys.executable,
                "-m",
                "uv",
                "pip",
                "compile",
                "--no-header",
                "--cache-dir",
                tmp_path / "uv",
                "-",
            ],
            timeout_s=60,
            env=env,
            stdin="thing\n",
        )
    assert "thing==1.0" in done.output
    assert "s@fe" not in done.output + done.errors


def test_importing_the_plan_starts_no_network_code() -> None:
    """A warm plan needs neither the HTTP client nor the page parser: each costs a third of a second."""
    heavy = "{'httpx', 'requests', 'pypi_simple'}"
    code = f"import sys, mtbuild.plan.suggest, mtbuild.plan.compat; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"
