"""Which image wins, and what the others are told."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from mtbuild.digest import Digest
from mtbuild.errors import InputError
from mtbuild.publish.catalog import Catalog, Entry, Run
from mtbuild.publish.evidence import Device
from mtbuild.publish.gpus import Floor, covers, floors, highest, normal_name, sm_of
from mtbuild.publish.pick import Choice, NoPickError, Wish, pick
from mtbuild.publish.vsa import Image

H200 = Device(name="NVIDIA H200", sm="9.0", driver="580.95.05", vram_gib=140.0)
RTX4090 = Device(name="NVIDIA GeForce RTX 4090", sm="8.9", driver="570.124.06", vram_gib=24.0)
L40S = Device(name="NVIDIA L40S", sm="8.9", driver="570.124.06", vram_gib=48.0)
NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
NEVER = "2999-01-01T00:00:00Z"
AMPERE_TO_HOPPER = ("8.0", "8.6", "8.9", "9.0")


def run_on(device: Device | None, *, passed: bool = True, finished: str = "2026-11-22T11:00:00Z") -> Run:
    tier = "cpu" if device is None else "gpu"
    evidence = Digest.of(repr((device, passed, finished)).encode())
    end = datetime.fromisoformat(finished) + timedelta(days=90)
    return Run(
        tier=tier,
        device=device,
        passed=passed,
        finished=finished,
        evidence=evidence,
        expires=f"{end:%Y-%m-%dT%H:%M:%SZ}",
    )


def entry(torch: str, *runs: Run, channel: str = "verified", **changes: Any) -> Entry:
    cuda = {"2.7.1": "12.6", "2.10.0": "12.8", "2.15.0": "13.2"}[torch]
    triton = {"2.7.1": "3.3.1", "2.10.0": "3.6.0", "2.15.0": "3.9.0"}[torch]
    known: dict[str, Any] = {
        "cell_id": f"torch{torch}-cu{cuda.replace('.', '')}-py311",
        "cell_name": f"t{torch}",
        "build_id": Digest.of(torch.encode()).hex,
        "tag": f"torch{torch}-tag" + ("-checked" if channel == "checked" else ""),
        "flavour": "runtime-deps",
        "platform": "linux/amd64",
        "python": "3.11",
        "torch": torch,
        "cuda": cuda,
        "triton": triton,
        "xformers": None,
        "targets": AMPERE_TO_HOPPER if torch == "2.7.1" else (*AMPERE_TO_HOPPER, "10.0", "12.0"),
        "floors": floors(torch=torch, cuda=cuda, triton=triton),
        "degraded": (),
        "size_bytes": 3_000_000_000,
        "created": "2026-11-22T10:00:00Z",
    }
    return Entry(
        digest=Digest.of(f"{torch} {channel}".encode()),
        channel=channel,
        verified_at="2026-11-22T12:00:00Z",
        verdict=Digest.of(b"verdict"),
        image=Image(**{**known, **changes}),
        runs=runs,
        expires=max((run.expires for run in runs if run.passed and run.expires), default=NEVER),
    )


def choose(*entries: Entry, now: datetime = NOW, **wish: Any) -> Choice:
    known = {
        "gpu": None,
        "sm": None,
        "driver": None,
        "vram_gib": None,
        "channel": "verified",
        "expected": False,
    }
    return pick(Catalog(repository="ghcr.io/acme/mt", entries=entries), Wish.of(**{**known, **wish}), now=now)


def why_none(*entries: Entry, **wish: Any) -> str:
    with pytest.raises(NoPickError) as caught:
        choose(*entries, **wish)
    assert caught.value.exit_code == 1
    assert caught.value.fix
    return caught.value.message


def test_what_ran_on_this_gpu_wins_over_what_is_newer() -> None:
    old, new = entry("2.7.1", run_on(RTX4090)), entry("2.10.0", run_on(L40S))
    choice = choose(old, new, gpu="RTX 4090", driver="570.86")
    assert (choice.winner.entry, choice.winner.match) == (old, "same-gpu")
    assert choice.name == f"ghcr.io/acme/mt:torch2.7.1-tag@{old.digest}"
    assert [other.lost for other in choice.others] == ["same-sm, beaten by same-gpu"]
    assert choice.docker_run.endswith(choice.name)
    assert "/cache:exec" in choice.docker_run


def test_what_the_gate_refuses_since_is_not_offered() -> None:
    refused = replace(
        entry("2.7.1", run_on(H200)),
        expires=None,
        objections=("generate (as 65532:65532) failed on a CPU: x",),
    )
    message = why_none(refused, gpu="H200", driver="580.95")
    assert "refused since it came out: generate (as 65532:65532) failed on a CPU: x" in message
    older = entry("2.7.1", run_on(H200), tag="older")
    assert choose(refused, older, gpu="H200").winner.entry == older


def test_expired_evidence_is_no_evidence() -> None:
    only = entry("2.7.1", run_on(H200))
    assert only.expires == "2027-02-20T11:00:00Z"
    end = datetime(2027, 2, 20, 11, 0, 0, tzinfo=UTC)
    assert choose(only, gpu="H200", now=end).to_json()["expires"] == only.expires
    with pytest.raises(NoPickError) as caught:
        choose(only, gpu="H200", expected=True, now=end + timedelta(seconds=1))
    assert "its evidence expired on 2027-02-20T11:00:00Z: smoke it again" in caught.value.message
    assert "mtbuild smoke" in caught.value.fix
    fresh = entry("2.7.1", run_on(H200, finished="2027-01-01T00:00:00Z"), tag="fresh")
    choice = choose(only, fresh, gpu="H200", now=end + timedelta(days=1))
    assert choice.winner.entry == fresh
    assert choice.others[0].lost.startswith("its evidence expired on")


def test_a_run_that_is_too_old_no_longer_vouches_for_its_gpu() -> None:
    """Another model's fresh run keeps the image public, but says nothing of this one."""
    both = entry("2.7.1", run_on(RTX4090), run_on(H200, finished="2027-01-01T00:00:00Z"))
    late = datetime(2027, 3, 1, tzinfo=UTC)
    assert choose(both, gpu="H200", now=late).winner.match == "same-gpu"
    with pytest.raises(NoPickError, match="its run on NVIDIA GeForce RTX 4090 is too old since 2027-02-20"):
        choose(both, gpu="RTX 4090", now=late)
    untried = choose(both, gpu="RTX 4090", expected=True, now=late).winner
    assert (untried.match, untried.run and untried.run.device) == ("expected", RTX4090)
    # a failure never wears off
    bad = entry("2.7.1", run_on(RTX4090, passed=False), run_on(H200, finished="2027-01-01T00:00:00Z"))
    with pytest.raises(NoPickError, match="failed on NVIDIA GeForce RTX 4090"):
        choose(bad, gpu="RTX 4090", expected=True, now=late)


def test_a_catalog_of_schema_1_does_not_say_and_pick_says_so() -> None:
    def old(one: Entry) -> Entry:
        return replace(one, expires=None, runs=tuple(replace(run, expires=None) for run in one.runs))

    choice = choose(old(entry("2.7.1", run_on(H200))), gpu="H200", now=NOW + timedelta(days=1000))
    assert choice.winner.match == "same-gpu"
    assert any("does not say when evidence expires" in note for note in choice.winner.notes)
    bad = run_on(None, passed=False, finished="2026-11-23T11:00:00Z")
    assert "failed its newest run on a CPU (2026-11-23" in why_none(
        old(entry("2.7.1", run_on(H200), bad)), gpu="H200", driver="580.95"
    )
    assert "failed its newest run on a CPU" in why_none(
        old(entry("2.7.1", bad, channel="checked")), channel="checked"
    )


def test_the_same_capability_wins_over_never_run() -> None:
    choice = choose(entry("2.7.1", run_on(RTX4090)), entry("2.10.0", run_on(H200)), sm="8.9", expected=True)
    assert (choice.winner.entry.image.torch, choice.winner.match) == ("2.7.1", "same-sm")
    assert choice.others[0].lost == "expected, beaten by same-sm"


def test_of_two_alike_the_newer_torch_then_the_newer_build_wins() -> None:
    later = entry("2.7.1", run_on(H200), created="2026-11-23T00:00:00Z", tag="later")
    choice = choose(entry("2.7.1", run_on(H200)), entry("2.10.0", run_on(H200)), later, sm="9.0")
    assert choice.winner.entry.image.torch == "2.10.0"
    assert [other.lost for other in choice.others] == [
        "torch 2.7.1 is older than 2.10.0",
        "torch 2.7.1 is older than 2.10.0",
    ]
    assert choose(entry("2.7.1", run_on(H200)), later, sm="9.0").winner.entry == later


def test_degraded_loses_against_whole() -> None:
    degraded = entry("2.15.0", run_on(H200), degraded=("xformers.extension",))
    choice = choose(degraded, entry("2.7.1", run_on(H200)), sm="9.0")
    assert choice.winner.entry.image.torch == "2.7.1"
    assert choice.others[0].lost == "degraded (xformers.extension)"
    assert "degraded: xformers.extension" in choose(degraded, sm="9.0").winner.notes


def test_expected_comes_only_on_request() -> None:
    only = entry("2.10.0", run_on(H200))
    assert "never ran on this GPU" in why_none(only, gpu="B200")
    assert choose(only, gpu="B200", expected=True).winner.match == "expected"


def test_known_bad_never_wins() -> None:
    bad = entry("2.10.0", run_on(RTX4090, passed=False))
    assert "failed on NVIDIA GeForce RTX 4090" in why_none(bad, gpu="RTX 4090", expected=True)
    assert "failed on" in why_none(bad, gpu="L40S", expected=True)  # the same capability
    both = entry("2.10.0", run_on(RTX4090, passed=False), run_on(L40S))
    assert "failed on" in why_none(both, gpu="RTX 4090")
    assert choose(both, gpu="L40S").winner.match == "same-gpu"


def test_no_code_for_the_gpu_is_a_reason() -> None:
    message = why_none(entry("2.7.1", run_on(H200)), gpu="RTX 5090", expected=True)
    assert "has no code for sm_120 (built for 8.0, 8.6, 8.9, 9.0)" in message


@pytest.mark.parametrize(
    ("torch", "sm", "driver", "fits"),
    [
        ("2.7.1", "8.9", "525.60.13", True),
        ("2.7.1", "8.9", "520.61.05", False),
        ("2.7.1", "8.9", "470.256.02", False),
        ("2.15.0", "8.9", "580.65.06", True),
        ("2.15.0", "8.9", "580", True),
        ("2.15.0", "8.9", "575.57.08", False),
    ],
)
def test_the_driver_must_reach_the_floor(torch: str, sm: str, driver: str, fits: bool) -> None:
    only = entry(torch, run_on(RTX4090))
    if fits:
        assert choose(only, sm=sm, driver=driver).winner.entry == only
    else:
        assert f"yours is {driver}" in why_none(only, sm=sm, driver=driver)


def test_the_floor_is_the_highest_of_torch_extensions_and_ptxas() -> None:
    cu12 = floors(torch="2.7.1", cuda="12.6", triton="3.3.1", extensions=(("xformers", "13.0"),))
    assert highest(cu12, "8.9") == Floor(component="xformers (CUDA 13.0)", driver="580")
    mixed = floors(torch="2.10.0", cuda="12.8", triton="3.9.0")  # whose ptxas is CUDA 13's from sm_90 on
    assert highest(mixed, "8.9").driver == "525"
    assert highest(mixed, "9.0").driver == highest(mixed, None).driver == "580"
    with pytest.raises(InputError, match="no driver floor is known for CUDA 14"):
        floors(torch="9", cuda="14.0", triton="3.9.0")


def test_the_checked_channel_asks_for_untried_images_itself() -> None:
    checked = entry("2.7.1", run_on(None), channel="checked")
    assert "checked only" in why_none(checked, gpu="RTX 4090")
    choice = choose(checked, channel="checked")
    assert (choice.winner.entry, choice.winner.match) == (checked, "expected")
    verified = entry("2.7.1", run_on(RTX4090))
    assert choose(checked, verified, channel="checked", gpu="RTX 4090").winner.entry == verified


def test_an_older_driver_and_less_memory_than_was_tried_are_told() -> None:
    choice = choose(entry("2.7.1", run_on(L40S)), gpu="L40S", driver="560.35.05", vram_gib=24)
    assert choice.winner.notes == (
        "tried with driver 570.124.06, yours is older",
        "tried with 48 GiB of GPU memory, yours has 24",
    )


def test_an_empty_catalog_says_so() -> None:
    assert "nothing is released there" in why_none(sm="9.0")


def test_a_wish_is_checked_and_named() -> None:
    for wish, where in (
        ({"sm": "nine"}, "--sm"),
        ({"sm": "9"}, "--sm"),
        ({"sm": "9.0", "driver": "x"}, "--driver"),
        ({"sm": "9.0", "vram_gib": -3.0}, "--vram"),
        ({"sm": "9.0", "vram_gib": float("nan")}, "--vram"),
    ):
        with pytest.raises(InputError) as caught:
            choose(**wish)
        assert caught.value.where == where
    with pytest.raises(InputError, match="for which GPU"):
        choose()
    with pytest.raises(InputError, match="Did you mean 'RTX 4090'"):
        choose(gpu="GeForce RTX 4091")


@pytest.mark.parametrize(
    ("name", "sm"),
    [
        ("NVIDIA GeForce RTX 4090", "8.9"),
        ("rtx4090", "8.9"),
        ("RTX 4090 Laptop GPU", "8.9"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "8.9"),
        ("NVIDIA H100 80GB HBM3", "9.0"),
        ("NVIDIA H100 PCIe", "9.0"),
        ("H100 NVL", "9.0"),
        ("NVIDIA A100-SXM4-80GB", "8.0"),
        ("NVIDIA A100 80GB PCIe", "8.0"),
        ("Tesla T4", "7.5"),
        ("Tesla V100-SXM2-16GB", "7.0"),
        ("NVIDIA A10G", "8.6"),
        ("NVIDIA RTX A4000", "8.6"),
        ("NVIDIA RTX 4000 Ada Generation", "8.9"),
        ("Quadro RTX 4000", "7.5"),
        ("NVIDIA L4", "8.9"),
        ("NVIDIA L40S", "8.9"),
        ("NVIDIA H200", "9.0"),
        ("NVIDIA H20", "9.0"),
        ("NVIDIA B200", "10.0"),
        ("NVIDIA B300 SXM6 AC", "10.3"),
        ("NVIDIA GeForce RTX 5090", "12.0"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "12.0"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "12.0"),
        ("Radeon RX 7900", None),
        ("L45", None),
        ("H2000", None),
    ],
)
def test_a_name_gives_its_capability_or_an_error(name: str, sm: str | None) -> None:
    if sm is None:
        with pytest.raises(InputError, match="--sm"):
            raise InputError(str(_error(name)), fix="")
    else:
        assert sm_of(name) == sm


def _error(name: str) -> InputError:
    with pytest.raises(InputError) as caught:
        sm_of(name)
    return caught.value


def test_names_compare_without_vendor_case_and_spaces() -> None:
    assert normal_name("NVIDIA GeForce RTX 4090") == normal_name("rtx 4090") == normal_name("RTX4090")
    assert normal_name("RTX 4090") != normal_name("RTX 4090 D")


capability = st.builds("{}.{}".format, st.integers(7, 12), st.integers(0, 9))


@given(targets=st.lists(capability, max_size=5), sm=capability)
def test_code_runs_on_its_own_major_from_its_minor_on(targets: list[str], sm: str) -> None:
    want = Version(sm)
    expected = [
        t for t in targets if t.split(".")[0] == sm.split(".")[0] and int(t.split(".")[1]) <= want.minor
    ]
    assert covers(tuple(targets), sm) == bool(expected)


devices = st.sampled_from([H200, RTX4090, L40S, None])
entries = st.builds(
    lambda torch, runs, channel, created: replace(
        entry(torch, *runs, channel=channel, created=f"2026-11-{created:02}T00:00:00Z")
    ),
    st.sampled_from(["2.7.1", "2.10.0", "2.15.0"]),
    st.lists(st.builds(run_on, devices, passed=st.booleans()), max_size=4),
    st.sampled_from(["verified", "checked"]),
    st.integers(1, 28),
)


@given(listed=st.lists(entries, max_size=6), data=st.data())
def test_a_pick_always_fits_and_every_other_has_a_reason(listed: list[Entry], data: st.DataObject) -> None:
    wish: dict[str, Any] = {
        "gpu": data.draw(st.sampled_from(["RTX 4090", "H200", "L40S", "B200"])),
        "driver": data.draw(st.sampled_from([None, "470.0", "560.35", "590.1"])),
        "channel": data.draw(st.sampled_from(["verified", "checked"])),
        "expected": data.draw(st.booleans()),
    }
    try:
        choice = choose(*listed, **wish)
    except NoPickError as error:
        assert all(candidate.lost for candidate in error.candidates)
        return
    sm = sm_of(wish["gpu"])
    image = choice.winner.entry.image
    assert covers(image.targets, sm)
    assert wish["driver"] is None or Version(wish["driver"]) >= Version(highest(image.floors, sm).driver)
    assert choice.winner.match != "known-bad"
    assert wish["channel"] == "checked" or choice.winner.entry.channel == "verified"
    assert len(choice.others) == len(listed) - 1
    assert all(other.lost for other in choice.others)
    if choice.winner.match == "expected":
        assert wish["expected"] or wish["channel"] == "checked"
