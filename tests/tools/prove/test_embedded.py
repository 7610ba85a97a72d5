"""The embedded engine, for real: started, found, survived, revived, stopped, removed.

These tests run a second engine with a cache of its own and without network, beside the one that builds use.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from docker import DockerClient

from mtbuild.errors import InfrastructureError
from mtbuild.paths import Paths
from mtbuild.proc import run
from mtbuild.prove import embedded
from mtbuild.prove.base import make_tar
from mtbuild.prove.service import boot_id

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]


def test_the_configuration_keeps_everything_in_its_own_folder(tmp_path: Path) -> None:
    settings = embedded.configuration(embedded.Daemon(folder=tmp_path))
    for key in ("data-root", "exec-root", "pidfile"):
        assert Path(str(settings[key])).is_relative_to(tmp_path)
    assert settings["hosts"] == [f"unix://{tmp_path}/docker.sock"]
    assert settings["features"] == {"containerd-snapshotter": True, "cdi": True}
    assert "iptables" not in settings
    assert embedded.configuration(embedded.Daemon(folder=tmp_path, network=False))["iptables"] is False


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("write /x: no space left on device", "disk is full"),
        ("failed to create NAT chain DOCKER: iptables failed", "iptables NAT"),
        ("mount overlay: operation not permitted", "--privileged"),
        ("something else", "make clean-engine"),
    ],
)
def test_a_daemon_that_does_not_start_says_what_to_do(log: str, words: str) -> None:
    assert words in embedded._start_fix(log)


def test_a_path_that_the_kernel_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(InfrastructureError, match="too long for the kernel") as raised:
        embedded.ensure_engine(Paths(root=tmp_path, cache=tmp_path / ("long" * 30)))
    assert "MTBUILD_CACHE" in raised.value.fix


# --- for real ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own() -> Iterator[Paths]:
    """A cache of its own (with a short path), the programs shared with the machine's."""
    programs = embedded.ensure_programs(Paths.of(ROOT))
    folder = Path(tempfile.mkdtemp(prefix="mtb-"))
    paths = Paths(root=folder, cache=folder / "c")
    paths.engine.mkdir(parents=True)
    (paths.engine / "programs").symlink_to(programs)
    yield paths
    embedded.stop_engine(paths)
    if paths.engine.exists():
        embedded.clean_engine(paths)
    shutil.rmtree(folder)


def daemon(paths: Paths) -> embedded.Daemon:
    return embedded.ensure_engine(paths, network=False)


def tiny_image(client: DockerClient, name: str) -> None:
    data = BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        entry = tarfile.TarInfo("hello")
        entry.size = 5
        tar.addfile(entry, BytesIO(b"hello"))
    client.api.import_image_from_data(data.getvalue(), repository=name, tag="1")


def programs_of(one: embedded.Daemon) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
            except OSError:
                continue
            if (str(one.folder) in words and "dockerd\0" in words) or str(one.exec) in words:
                found.append(int(entry.name))
    return found


@pytest.mark.engine
def test_it_survives_its_starter_and_is_found_again(own: Paths) -> None:
    code = (
        "from pathlib import Path; from mtbuild.paths import Paths; from mtbuild.prove import embedded;"
        f"p = Paths(root=Path({str(own.root)!r}), cache=Path({str(own.cache)!r}));"
        "embedded.ensure_engine(p, network=False)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=180)
    one = embedded.Daemon(folder=own.engine, network=False)
    assert one.alive()
    pid = one.service.pid()
    assert daemon(own).service.pid() == pid


@pytest.mark.engine
def test_two_that_start_it_at_once_get_the_same_one(own: Paths) -> None:
    embedded.stop_engine(own)
    code = (
        "from pathlib import Path; from mtbuild.paths import Paths; from mtbuild.prove import embedded;"
        f"p = Paths(root=Path({str(own.root)!r}), cache=Path({str(own.cache)!r}));"
        "print(embedded.ensure_engine(p, network=False).service.pid())"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in "12"]
    pids = {one.communicate(timeout=180)[0].strip() for one in both}
    assert pids == {str(embedded.Daemon(folder=own.engine).service.pid())}


@pytest.mark.engine
def test_a_start_that_was_killed_before_its_record_leaves_no_second_daemon(own: Paths) -> None:
    one = daemon(own)
    first = one.service.pid()
    one.service.record.unlink()
    again = daemon(own)
    assert again.alive()
    assert again.service.pid() != first
    daemons = [pid for pid in programs_of(one) if Path(f"/proc/{pid}/comm").read_text() == "dockerd\n"]
    assert daemons == [again.service.pid()]


@pytest.mark.engine
def test_a_killed_one_is_started_anew_with_its_images(own: Paths) -> None:
    one = daemon(own)
    client = DockerClient(base_url=one.url)
    tiny_image(client, "kept")
    pid = one.service.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    again = daemon(own)
    assert again.service.pid() != pid
    assert [image.tags for image in client.images.list()] == [["kept:1"]]


@pytest.mark.engine
def test_a_stale_record_harms_nobody(own: Paths) -> None:
    """After a reboot the record names whatever runs under that id now: here, this test itself."""
    embedded.stop_engine(own)
    one = embedded.Daemon(folder=own.engine, network=False)
    one.service.record.write_text(json.dumps({"pid": os.getpid(), "started": 1, "boot": boot_id()}))
    (one.folder / "docker.pid").write_text(str(os.getpid()))
    (one.folder / "boot").write_text("an earlier boot")
    (one.exec / "left-over").mkdir(parents=True)
    again = daemon(own)
    assert again.alive()
    assert again.service.pid() != os.getpid()
    assert not (one.exec / "left-over").exists(), "run-time state of another boot was kept"


@pytest.mark.engine
def test_stopping_leaves_no_process_and_keeps_images(own: Paths) -> None:
    one = daemon(own)
    tiny_image(DockerClient(base_url=one.url), "kept")
    assert embedded.stop_engine(own)
    assert not one.alive()
    assert programs_of(one) == []
    assert not embedded.stop_engine(own), "it was stopped once already"
    again = daemon(own)
    assert ["kept:1"] in [image.tags for image in DockerClient(base_url=again.url).images.list()]


@pytest.mark.engine
def test_stopping_after_a_crash_ends_what_the_daemon_left(own: Paths) -> None:
    one = daemon(own)
    pid = one.service.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    embedded.stop_engine(own)
    end = time.monotonic() + 10
    while programs_of(one) and time.monotonic() < end:
        time.sleep(0.1)
    assert programs_of(one) == [], "containerd runs on"


@pytest.mark.engine
def test_stopping_after_a_crash_ends_containers(own: Paths) -> None:
    one = daemon(own)
    client = DockerClient(base_url=one.url)
    client.api.import_image_from_file(
        str(make_tar("bookworm", paths=Paths.of(ROOT))), repository="debian", tag="1"
    )
    container = client.containers.run("debian:1", ["sleep", "600"], detach=True, network_mode="none")
    container.reload()
    inside = container.attrs["State"]["Pid"]
    os.kill(inside, 0)
    pid = one.service.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    embedded.stop_engine(own)
    end = time.monotonic() + 10
    while Path(f"/proc/{inside}/cmdline").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{inside}").exists(), "the container runs on"


@pytest.mark.engine
def test_cleaning_removes_everything(own: Paths) -> None:
    one = daemon(own)
    tiny_image(DockerClient(base_url=one.url), "gone")
    programs = (own.engine / "programs").resolve()
    embedded.clean_engine(own)
    assert not own.engine.exists()
    assert programs_of(one) == []
    assert str(own.engine) not in Path("/proc/mounts").read_text()
    assert (programs / "versions.json").exists(), "a link was followed"
    assert embedded.clean_engine(own) == 0


@pytest.mark.engine
def test_a_full_disk_is_one_clear_error() -> None:
    programs = embedded.ensure_programs(Paths.of(ROOT))
    folder = Path(tempfile.mkdtemp(prefix="mtb-"))
    run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], timeout_s=30)
    try:
        paths = Paths(root=folder, cache=folder / "c")
        paths.engine.mkdir(parents=True)
        (paths.engine / "programs").symlink_to(programs)
        with pytest.raises(
            InfrastructureError, match=r"has 0\.1 GB free; the engine needs 2\.1 GB"
        ) as raised:
            daemon(paths)
        assert "MTBUILD_CACHE" in raised.value.fix
        assert embedded.Daemon(folder=paths.engine).service.pid() is None
    finally:
        run(["umount", folder], timeout_s=30)
        folder.rmdir()


@pytest.mark.engine
def test_the_public_clients_run() -> None:
    folder = embedded.public_clients(Paths.of(ROOT))
    for program in ("cosign", "crane", "oras"):
        run([folder / program, "version"], timeout_s=60)
