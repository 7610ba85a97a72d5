"""Wheels where a build finds them: from a real index on loopback, and in the engine's cache."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import pytest
from tiny_cell import ROOT, commit, lock_of, tiny, wheel

from mtbuild.digest import Reference
from mtbuild.errors import InputError
from mtbuild.paths import Paths
from mtbuild.plan.index import Index
from mtbuild.prove import wheel_store
from mtbuild.prove.engine import Engine


def test_a_wheel_that_no_index_has_any_more(project: Paths) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "tools" / "plan"))
    from local_index import LocalIndex, serve

    from mtbuild.plan.index_settings import IndexSettings, Source

    name, content = wheel("torch", "0.0.1", {"torch/__init__.py": ""})
    other, changed = wheel("torch", "0.0.1", {"torch/__init__.py": "spun again\n"})
    with serve(LocalIndex(files={other: changed})) as served:
        index = Index(
            IndexSettings(
                sources=(Source.of(f"{served.url}/simple/", origin="test"),),
                default_is_builtin=False,
                ca_file=None,
                ca_dir=None,
                notes=(),
            )
        )
        with pytest.raises(InputError, match="with the locked hash"):
            wheel_store.download(
                lock_of(tiny(), [(name, content)], project.root), project.wheels, index=index
            )
        told: list[str] = []
        fresh = lock_of(tiny(), [(other, changed)], project.root)
        wheel_store.download(fresh, project.wheels, index=index, note=told.append)
        assert wheel_store.path_of(fresh.wheels[0], project.wheels).read_bytes() == changed
        assert told == ["downloading 1 wheels, 0.00 GB"]
        before = len(served.seen)
        wheel_store.download(fresh, project.wheels, index=index)
        assert len(served.seen) == before  # what is there is not asked for again


@pytest.mark.engine
def test_wheels_of_one_cell_don_t_push_out_those_of_another(
    engine: Engine, registry: str, base: Reference, project: Paths, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    first, second = (
        commit(tiny(), project, secrets.token_hex(4)),
        commit(tiny(), project, secrets.token_hex(4)),
    )
    told: list[str] = []
    for lock in (first, second, first, second):
        wheel_store.fill(lock, paths=project, engine=engine, base=base, log=log, note=told.append)
    assert [text.split(",")[0] for text in told][-1] == "handing 1 wheels to the engine"  # the salted one
    assert len(told) == 2
