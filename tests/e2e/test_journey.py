"""The history that must never come back: V70 to V73 re-enacted on the real engine.

V70 died of a full disk while it installed its dependencies, V71's handler did not find its inputs, V71.1 had
no `wan.configs`, V72 had no C compiler and an xFormers built for another PyTorch; V73 is the repair. Each is
built for real here, or refused before it costs anything.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
from commands import ROOT, Done, mtbuild

from mtbuild.digest import Reference
from mtbuild.paths import Paths
from mtbuild.plan.lock import Lock
from mtbuild.plan.matrix import load
from mtbuild.prove.build import build, builds_of
from mtbuild.prove.disk import NotEnoughSpace
from mtbuild.prove.engine import connect, retire
from mtbuild.prove.layers import wheels_in_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mtbuild.plan.cell import Cell
    from mtbuild.plan.matrix import Matrix

pytestmark = pytest.mark.engine


# ------ V70: disk full


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_v70_a_disk_that_is_too_small_is_named_before_anything_is_downloaded(
    tiny_disk: Path, main_job: Done, registry_host: str, tmp_path: Path
) -> None:
    """A clone whose wheel cache lies on a small disk, and a cell that the engine holds nothing of."""
    assert main_job.code == 0, str(main_job)
    clone = _clone(tmp_path / "clone")
    paths = Paths(root=clone, cache=tiny_disk)
    engine = connect(Paths.of(ROOT))
    with pytest.raises(NotEnoughSpace) as raised:
        build(
            _unbuilt(load(clone / "matrix.yaml"), wheels_in_layers(engine)),
            paths=paths,
            engine=engine,
            staging=f"{registry_host}/mt-staging",
            base=Reference.parse(_base_reference()),
        )
    error = raised.value
    assert error.exit_code == 3
    assert error.missing > 2_000_000_000
    assert "wheels to download" in error.message
    assert str(tiny_disk) in error.message
    assert error.fix.startswith("remove")
    assert not list(tiny_disk.rglob("*.whl")), "something was downloaded"


def test_v70_the_log_of_a_build_that_ran_full_is_diagnosed(tmp_path: Path, main_job: Done) -> None:
    assert main_job.code == 0, str(main_job)
    engine = connect(Paths.of(ROOT))
    (tmp_path / "Dockerfile").write_text(
        dedent("""\
        ARG BASE
        FROM ${BASE}
        RUN --mount=type=tmpfs,target=/opt,size=8m head -c 64m /dev/zero > /opt/libtorch_cuda.so
        """)
    )
    base = _base_reference()
    command = [
        *engine.buildx,
        "build",
        "--progress=plain",
        "--no-cache",
        f"--build-arg=BASE={base}",
        str(tmp_path),
    ]
    build = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert build.returncode != 0
    log = tmp_path / "build.log"
    log.write_text(build.stdout + build.stderr)
    diagnosis = mtbuild("diagnose", log)
    assert diagnosis.code == 0, str(diagnosis)
    assert "No space left on device" in diagnosis.out
    assert "disk" in diagnosis.out.lower()


def _clone(folder: Path) -> Path:
    """The project with a state of its own, and nothing of it copied."""
    folder.mkdir()
    for name in ("matrix.yaml", "images", "templates", "wan", "multitalk_runtime", "tools"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("pyproject.toml", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def _unbuilt(matrix: Matrix, built: frozenset[str]) -> Cell:
    """A cell on v73's base whose torch is in no layer of the engine."""
    base = matrix.cell("v73").base
    for cell in matrix.cells:
        torch = [w for w in Lock.load(ROOT / "images" / cell.id).wheels if w.name == "torch"]
        if cell.base == base and built.isdisjoint(w.sha256 for w in torch):
            return cell
    pytest.fail("the engine holds every cell's torch: `make clean-engine`")


def _base_reference() -> str:
    """The base image of v73, as its build recorded it."""
    (done, *_) = [b for b in builds_of(Paths.of(ROOT)) if b.cell_name == "v73"]
    return f"{done.ref.host}/mt-base@{done.base_digest}"


# ------ V72: no compiler, xFormers for another torch


def test_v72_is_refused_for_both_reasons_before_any_wheel_is_downloaded(
    outcomes: dict[str, dict[str, Any]],
) -> None:
    v72 = outcomes["v72"]
    assert (v72["state"], v72["as_expected"], v72["digest"]) == ("refused", True, None)
    why = mtbuild("matrix", "--why", "v72")
    assert why.code == 0
    assert "xformers 0.0.23.post1 requires torch==2.1.2; this cell has torch 2.7.1" in why.out
    assert "no C compiler" in why.out
    assert "xformers 0.0.31" in why.out  # the fix
    plain = mtbuild("build", "v72")
    assert plain.code == 1
    assert "no C compiler" in plain.err


@pytest.fixture(scope="module")
def v72_studied(outcomes: dict[str, dict[str, Any]]) -> str:
    """V72 as it was, built in spite of the rules: a reference by digest."""
    assert outcomes["v73"]["state"] in ("checked", "published")  # shares V73's layers
    built = mtbuild("build", "v72", "--override-compat", "to see the suite refuse it", "--json")
    assert built.code == 0, str(built)
    reference: str = built.json["ref"]
    return reference


@pytest.fixture(scope="module")
def v72_smoked(v72_studied: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    evidence = tmp_path_factory.mktemp("v72") / "evidence.json"
    return mtbuild("smoke", v72_studied, "--cell", "v72", "--out", evidence, "--json"), evidence


def _statuses(smoked: Done) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for result in smoked.json["results"]:
        found.setdefault(result["check"], set()).add(result["status"])
    return found


def test_v72_built_all_the_same_is_refused_by_the_suite_for_both_reasons(
    v72_smoked: tuple[Done, Path],
) -> None:
    smoked, _ = v72_smoked
    assert smoked.code == 1, str(smoked)
    statuses = _statuses(smoked)
    assert statuses["compiler"] == {"failed"}
    assert statuses["xformers.extension"] == {"failed"}
    texts = {result["check"]: result for result in smoked.json["results"]}
    assert "2.1.2" in str(texts["xformers.extension"])
    assert texts["compiler"]["fix"]


def test_v72_can_never_be_published(v72_studied: str, v72_smoked: tuple[Done, Path]) -> None:
    _, evidence = v72_smoked
    refused = mtbuild("publish", v72_studied, "--cell", "v72", "--evidence", evidence)
    assert refused.code == 1, str(refused)
    assert "override" in refused.err or "forced past" in refused.err


def test_minimal_on_top_of_v72_mends_the_compiler_and_not_xformers(
    v72_studied: str, registry_host: str, tmp_path: Path
) -> None:
    """The flavour `minimal` adds compiler, headers and environment; it can't make an xFormers fit."""
    project = _clone(tmp_path / "clone")
    (project / "images").unlink()
    (project / "matrix.yaml").unlink()
    (project / "matrix.yaml").write_text(
        dedent(f"""\
        schema: 1
        bases:
          v72: {{kind: image, ref: "{v72_studied}", glibc: "2.36", python: ["3.11"]}}
        cells:
          - name: v72-minimal
            flavour: minimal
            base: v72
            python: "3.11"
            torch: "2.7.1"
            cuda: "12.6"
            triton: "3.3.1"
            xformers: "0.0.23.post1"
            no_deps: [xformers]
            targets: ["8.0", "9.0"]
            expect: refused
        registry:
          staging: {registry_host}/mt-staging
          release: {registry_host}/multitalk
        """)
    )
    locked = mtbuild("lock", "v72-minimal", root=project)
    assert locked.code == 0, str(locked)
    rendered = mtbuild("render", "v72-minimal", root=project)
    assert rendered.code == 0, str(rendered)
    built = mtbuild("build", "v72-minimal", "--override-compat", "a compiler for V72", "--json", root=project)
    assert built.code == 0, str(built)
    smoked = mtbuild("smoke", built.json["ref"], "--cell", "v72-minimal", "--json", root=project)
    assert smoked.code == 1, str(smoked)
    statuses = _statuses(smoked)
    assert statuses["compiler"] == {"passed"}
    assert statuses["headers"] == {"passed"}
    assert statuses["triton.stub"] == {"passed"}
    assert statuses["xformers.extension"] == {"failed"}


# ------ V71: input handling broke; V71.1: a package of the model was missing


PACKAGES = "/opt/venv/lib/python3.11/site-packages"


@pytest.fixture(scope="module")
def derived(
    outcomes: dict[str, dict[str, Any]], registry_host: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, str], str]]:
    """Makes an image from V73's digest and one RUN line, pushed to staging: a reference by digest."""
    assert outcomes["v73"]["state"] in ("checked", "published"), outcomes["v73"]
    start = f"{registry_host}/mt-staging@{outcomes['v73']['digest']}"
    engine = connect(Paths.of(ROOT))
    made: list[Reference] = []

    def build(name: str, line: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        (folder / "Dockerfile").write_text(
            f"FROM {start}\nUSER 0\nRUN --network=none {line}\nUSER 65532:65532\n"
        )
        target = f"{registry_host}/mt-staging"
        command = [
            *engine.buildx,
            "build",
            "--provenance=false",
            "--sbom=false",
            f"--metadata-file={folder}/made.json",
            f"--output=type=image,name={target}:{name},push=true,oci-mediatypes=true",
            str(folder),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        digest = json.loads((folder / "made.json").read_text())["containerimage.digest"]
        made.append(Reference.parse(f"{target}@{digest}"))
        return str(made[-1])

    yield build
    retire(engine, made)


def _refused(reference: str, folder: Path) -> tuple[dict[str, set[str]], dict[str, dict[str, Any]]]:
    """Statuses by check, and the result of each, of a smoke run that must not pass; its evidence proves
    nothing either."""
    evidence = folder / "evidence.json"
    smoked = mtbuild("smoke", reference, "--cell", "v73", "--out", evidence, "--json")
    assert smoked.code == 1, str(smoked)
    published = mtbuild("publish", reference, "--cell", "v73", "--evidence", evidence)
    assert published.code != 0, str(published)
    return _statuses(smoked), {result["check"]: result for result in smoked.json["results"]}


def test_v71_an_image_whose_handler_finds_no_default_inputs_is_refused(
    derived: Callable[[str, str], str], tmp_path: Path
) -> None:
    inputs = f"{PACKAGES}/multitalk_runtime/inputs.py"
    reference = derived(
        "v71",
        f"sed -i 's|image = IMAGE$|image = IMAGE.with_name(\"example.png\")|' {inputs} "
        f"&& grep -q example.png {inputs} "
        f"&& rm {PACKAGES}/multitalk_runtime/__pycache__/inputs.*.pyc",  # Python trusts them unchecked
    )
    statuses, results = _refused(reference, tmp_path)
    assert statuses["handler.inputs"] == {"failed"}
    assert statuses["generate"] == {"failed"}
    assert statuses["imports.runtime"] == {"passed"}, "it imports; only a job shows it"
    assert statuses["imports.wan"] == {"passed"}
    handler = results["handler.inputs"]
    assert handler["message"].startswith("default inputs: ")
    assert "FileNotFoundError" in handler["message"]
    assert "example.png" in handler["message"]
    assert "V71" in handler["diagnosis"]
    assert handler["fix"]


def test_v71_1_an_image_without_the_models_configs_is_refused(
    derived: Callable[[str, str], str], tmp_path: Path
) -> None:
    reference = derived("v71.1", f"rm -r {PACKAGES}/wan/configs")
    statuses, results = _refused(reference, tmp_path)
    assert statuses["imports.wan"] == {"failed"}
    assert statuses["generate"] == {"failed"}
    imports = results["imports.wan"]
    assert "modules of wan do not import" in imports["message"]
    assert "configs" in imports["message"]
    assert imports["fix"]


# ------ V73: the repair


def test_v73_is_built_proven_and_published_to_checked(outcomes: dict[str, dict[str, Any]]) -> None:
    v73 = outcomes["v73"]
    assert v73["state"] == "checked", v73  # no GPU vouches for it here
    assert v73["as_expected"]
    assert v73["digest"].startswith("sha256:")
    assert any(tag.endswith("-checked") for tag in v73["tags"])
    assert not any(not tag.endswith("-checked") for tag in v73["tags"]), "a CPU can't vouch for a GPU"


def test_v73_is_what_a_deployer_picks_and_can_verify(outcomes: dict[str, dict[str, Any]]) -> None:
    picked = mtbuild("pick", "--channel", "checked", "--json")
    assert picked.code == 0, str(picked)
    assert outcomes["v73"]["digest"] in picked.out
    strict = mtbuild("pick", "--gpu", "NVIDIA H200", "--driver", "580.65")
    assert strict.code == 1, "nothing here is verified on a GPU"
    name = next(word for word in mtbuild("pick", "--channel", "checked").out.split() if "@sha256:" in word)
    verified = mtbuild("verify", name)
    assert verified.code == 0, str(verified)


def test_v73_run_again_does_nothing_and_changes_nothing(outcomes: dict[str, dict[str, Any]]) -> None:
    again = mtbuild("matrix", "--json")
    assert again.code == 0, str(again)
    v73 = next(cell for cell in again.json["cells"] if cell["name"] == "v73")
    assert v73["digest"] == outcomes["v73"]["digest"]
    assert v73["tags"] == outcomes["v73"]["tags"]
    assert v73["reused"] == ["build", "smoke", "publish"]


def test_the_other_cells_end_planned(outcomes: dict[str, dict[str, Any]]) -> None:
    others = {name: cell["state"] for name, cell in outcomes.items() if name not in ("v72", "v73")}
    assert set(others.values()) == {"planned"}
    assert set(others) == {"t241", "t260", "t280", "t291", "t210", "t211", "t213", "t215"}


def test_the_disk_that_all_of_this_took_is_within_the_budget(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes["v73"]["size_bytes"] < 5_000_000_000
    assert shutil.disk_usage(ROOT).free > 2_000_000_000
