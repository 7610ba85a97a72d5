"""Keys are made once, with rights for their owner only, and never overwritten."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from mtbuild.errors import InputError
from mtbuild.proc import run
from mtbuild.publish.keys import SIGNING_KEY, Keys, PublicKey, trusted_keys


def test_a_key_is_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    first = Keys.ensure(folder)
    private = folder / "mtbuild.key"
    assert private.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    before = private.read_bytes()
    assert Keys.ensure(folder).trusted == first.trusted
    assert private.read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"mtbuild.key", "mtbuild.pub"}


def _ensure(folder: Path) -> str:
    return Keys.ensure(folder).own.public.hint


def test_two_processes_end_with_one_key(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        hints = pool.map(_ensure, [tmp_path / "keys"] * 8)
    assert len(set(hints)) == 1


def test_a_lost_public_half_is_made_again_and_a_foreign_one_is_not_replaced(tmp_path: Path) -> None:
    keys = Keys.ensure(tmp_path)
    public = tmp_path / "mtbuild.pub"
    public.unlink()
    assert Keys.ensure(tmp_path).own.public == keys.own.public
    foreign = Keys.ensure(tmp_path / "other").own.public.pem
    public.write_bytes(foreign)
    with pytest.raises(InputError, match="not the public half"):
        Keys.ensure(tmp_path)
    assert public.read_bytes() == foreign


def test_a_broken_key_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mtbuild.key").write_text("no key")
    with pytest.raises(InputError) as caught:
        Keys.ensure(tmp_path)
    assert caught.value.where == str(tmp_path / "mtbuild.key")
    assert (tmp_path / "mtbuild.key").read_text() == "no key"


@pytest.mark.parametrize(
    "key",
    [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)],
    ids=["P-384", "RSA"],
)
def test_only_p256_is_taken(tmp_path: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
    pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "x.pub").write_bytes(pem)
    with pytest.raises(InputError, match="not an ECDSA P-256 public key"):
        PublicKey.load(tmp_path / "x.pub")


def test_every_public_key_in_the_folder_is_believed(tmp_path: Path) -> None:
    runner = Keys.ensure(tmp_path / "runner").own.public
    keys = Keys.ensure(tmp_path / "keys")
    (tmp_path / "keys" / "gpu-runner.pub").write_bytes(runner.pem)
    assert Keys.ensure(tmp_path / "keys").trusted == (keys.own.public, runner)
    assert set(trusted_keys(tmp_path / "keys")) == {keys.own.public, runner}
    assert trusted_keys(tmp_path, (tmp_path / "keys" / "gpu-runner.pub",)) == (runner,)


def test_without_a_key_to_believe_there_is_nothing_to_verify_with(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        trusted_keys(tmp_path)
    assert "--key" in caught.value.fix
    assert not list(tmp_path.iterdir())


def test_no_key_shows_in_a_repr(tmp_path: Path) -> None:
    keys = Keys.ensure(tmp_path)
    assert "PRIVATE" not in repr(keys)
    assert "ellipticcurve" not in repr(keys).lower()


def pem_of(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, *, password: bytes | None = None) -> str:
    kind = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, kind).decode()


def inside(pem: str) -> list[str]:
    """The lines of a PEM that must appear nowhere."""
    return [line for line in pem.replace("\\n", "\n").splitlines() if line and not line.startswith("-----")]


@pytest.mark.parametrize("line_end", ["\n", "\\n", "\r\n"], ids=["lines", "escaped", "windows"])
def test_a_key_from_the_environment_signs_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_end: str
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    monkeypatch.setenv(SIGNING_KEY, pem_of(key).strip().replace("\n", line_end))
    keys = Keys.ensure(tmp_path / "keys")
    assert keys.own.public == PublicKey.of(key.public_key())
    assert keys.own.public.verifies(keys.own.sign(b"x"), b"x")
    assert trusted_keys(tmp_path / "keys") == keys.trusted == (keys.own.public,)
    assert list(tmp_path.rglob("*")) == []
    monkeypatch.delenv(SIGNING_KEY)
    kept = Keys.ensure(tmp_path / "keys")
    monkeypatch.setenv(SIGNING_KEY, pem_of(key))
    assert Keys.ensure(tmp_path / "keys").trusted == (keys.own.public, kept.own.public)
    assert trusted_keys(tmp_path / "keys", (tmp_path / "keys" / "mtbuild.pub",)) == (kept.own.public,)


P256 = pem_of(ec.generate_private_key(ec.SECP256R1()))


@pytest.mark.parametrize(
    "value",
    [
        "",
        " \n",
        "not a key, but a secret all the same",
        P256[:120],
        P256.replace("PRIVATE", "PUBLIC"),
        P256[:60] + "!!" + P256[62:],
        pem_of(ec.generate_private_key(ec.SECP256R1()), password=b"pass"),
        pem_of(ec.generate_private_key(ec.SECP384R1())),
        pem_of(rsa.generate_private_key(65537, 2048)),
    ],
    ids=["empty", "blank", "text", "cut", "public", "spoilt", "encrypted", "P-384", "RSA"],
)
def test_a_value_that_is_no_key_is_refused_and_never_shown(tmp_path: Path, value: str) -> None:
    """By the command line, as a CI job runs it: nothing of the value is in its output, nor on disk."""
    (tmp_path / "matrix.yaml").write_text("schema: 1\nbases: {}\ncells: []\n")
    words = ["--root", str(tmp_path), "pick", "--sm", "9.0", "--release", "127.0.0.1:9/none"]
    done = subprocess.run(
        [sys.executable, "-c", "from mtbuild.cli import main; main()", "--verbose", *words],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), SIGNING_KEY: value},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert f"error: {SIGNING_KEY}: " in done.stderr
    assert "fix: " in done.stderr
    said = done.stdout + done.stderr
    assert not [line for line in inside(value) if line.strip() and line in said]
    assert not list(tmp_path.rglob("*.key"))


def test_a_good_key_shows_in_no_failure_and_reaches_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIGNING_KEY, P256)
    keys = Keys.ensure(tmp_path)
    assert not [line for line in inside(P256) if line in repr(keys)]
    seen = run([sys.executable, "-c", "import os; print(dict(os.environ))"], timeout_s=30)
    assert SIGNING_KEY not in seen.output
    assert "PATH" in seen.output
