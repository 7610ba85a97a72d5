"""mtmodels: the published files at real size in two seconds, each thing that can be wrong, and fetching."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import Hub, keys, write_published
from safetensors.torch import load_file, save_file

from multitalk_runtime import fetch_models
from multitalk_runtime import verify as verify_module
from multitalk_runtime.errors import Fault
from multitalk_runtime.model_dirs import ModelDirs
from multitalk_runtime.models import check_models, main
from multitalk_runtime.published import ModelFile, PublishedModel, fold, published_shapes, shapes_of
from multitalk_runtime.verify import verify

VAE = "Wan2.1_VAE.pth"
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> ModelDirs:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def tiny(tiny_models: Path, tmp_path: Path) -> ModelDirs:
    """The tiny models as links, so that a test can replace one file."""
    root = tmp_path / "models"
    shutil.copytree(tiny_models, root, copy_function=lambda a, b: Path(b).symlink_to(a))
    return ModelDirs.under(root)


def replaced(path: Path) -> Path:
    """The same file as a copy of its own."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


def test_ninety_gigabytes_in_two_seconds(published: ModelDirs) -> None:
    reports = [verify(published) for _ in range(2)]
    assert reports[0].problems == []
    assert reports[0].layout == "published"
    assert reports[0].bytes > 92e9
    assert reports[0].tensors == 1633 + 242 + 377 + 194 + 211
    assert min(r.seconds for r in reports) < 2


def test_checking_published_files_needs_no_torch(published: ModelDirs) -> None:
    code = "import sys; from multitalk_runtime.models import main; r = main(sys.argv[1:])\n"
    code += "assert 'torch' not in sys.modules; sys.exit(r)"
    command = [sys.executable, "-c", code, "verify", str(published.wan.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "all well; 17 files, 92.5" in done.stdout


def test_the_shapes_are_those_of_wan_and_of_the_golden_lists() -> None:
    expected = published_shapes()
    assert shapes_of() == expected
    assert expected["dit"] == keys("dit_multitalk_i2v_14B")
    assert expected["t5"] == keys("t5_umt5_xxl_encoder")
    assert expected["vae"] == keys("vae")
    assert expected["wav2vec"] == keys("wav2vec2_base")
    clip = {n.removeprefix("visual."): s for n, s in keys("clip_xlm_roberta_vit_h_14").items()}
    assert all(clip[name] == shape for name, shape in expected["clip"].items())
    with pytest.raises(ValueError, match="differ"):
        fold({"blocks.0.a": (1,), "blocks.1.b": (1,)}, "blocks")


def test_a_published_file_of_another_size(published: ModelDirs, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(published.wan.parent, root, copy_function=lambda a, b: Path(b).symlink_to(a))
    dirs = ModelDirs.under(root)
    path = dirs.wan / VAE
    path.unlink()
    with path.open("wb") as file:
        file.truncate(507_609_881)
    shard = dirs.wan / "diffusion_pytorch_model-00003-of-00007.safetensors"
    shard.unlink()
    found = {(p.file, p.kind) for p in verify(dirs).problems}
    assert found == {(VAE, "size"), (shard.name, "missing")}
    assert {m.file.name for m in fetch_models.plan(dirs)} == {VAE, shard.name}


def test_a_base_of_another_kind(published: ModelDirs, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(published.wan.parent, root, copy_function=lambda a, b: Path(b).symlink_to(a))
    config = replaced(root / published.wan.name / "config.json")
    config.write_text(config.read_text().replace('"in_dim": 36', '"in_dim": 16'))
    problems = verify(ModelDirs.under(root)).problems
    assert [p.problem for p in problems] == ["in_dim is 16, not 36"]


def test_the_tiny_model_is_all_well(tiny_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_models), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layout"] == "custom"
    assert report["problems"] == []
    assert main(["plan", str(tiny_models)]) == 0


def pointer(path: Path) -> None:
    path.unlink()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def emptied(path: Path) -> None:
    path.unlink()
    path.touch()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def unfinished(path: Path) -> None:
    path.rename(path.with_name(path.name + ".part"))


def shortened(path: Path) -> None:
    content = replaced(path).read_bytes()
    path.write_bytes(content[:-100])


def text(path: Path) -> None:
    path.unlink()
    path.write_text("<html>404</html>" * 100)


def code(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (Path("pwned"),)

    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": Evil()}))


def renamed_tensor(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    path.unlink()
    state["encoder.other"] = state.pop("encoder.conv1.weight")
    torch.save(state, path)


def reshaped(path: Path) -> None:
    state = load_file(path)
    path.unlink()
    name = "patch_embedding.weight"
    state[name] = state[name][:, :16].contiguous()
    save_file(state, path)


def quantised(path: Path) -> None:
    state = load_file(path)
    path.unlink()
    save_file({k: v.to(torch.int8) for k, v in state.items()}, path)


def normalising(path: Path) -> None:
    replaced(path).write_text('{"do_normalize": true}')


CASES: list[tuple[Callable[[Path], None], str, str, str]] = [
    (Path.unlink, SHARD, "missing", "no such file"),
    (Path.unlink, VAE, "missing", "no such file"),
    (Path.unlink, "config.json", "missing", "no such file"),
    (Path.unlink, "google/umt5-xxl/tokenizer.json", "missing", "no such file"),
    (pointer, VAE, "content", "Git-LFS pointer"),
    (emptied, VAE, "content", "empty"),
    (dangling, VAE, "content", "leads nowhere"),
    (unfinished, VAE, "content", "has not ended"),
    (shortened, SHARD, "content", "not an intact safetensors"),
    (shortened, VAE, "content", "can't be read"),
    (text, SHARD, "content", "not an intact safetensors"),
    (text, VAE, "content", "can't be read"),
    (text, "config.json", "content", "not JSON"),
    (code, VAE, "content", "refused"),
    (renamed_tensor, VAE, "tensors", "encoder.conv1.weight"),
    (reshaped, SHARD, "tensors", "patch_embedding.weight [256, 16, 1, 2, 2], not [256, 36, 1, 2, 2]"),
    (quantised, SHARD, "tensors", "not of a floating-point type"),
]


@pytest.mark.parametrize(("spoil", "name", "kind", "words"), CASES)
def test_each_problem_is_listed_with_its_fix(
    tiny: ModelDirs,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    name: str,
    kind: str,
    words: str,
) -> None:
    spoil(tiny.wan / name)
    assert main(["verify", str(tiny.wan.parent)]) == 1
    shown = capsys.readouterr().out
    assert words in shown
    assert "fix: " in shown
    problems = [p for p in verify(tiny).problems if words in p.problem]
    assert [p.kind for p in problems][:1] == [kind]
    assert problems[0].fix
    assert not Path("pwned").exists()
    with pytest.raises(Fault) as caught:
        check_models(tiny)
    assert caught.value.code in ("model.missing", "model.invalid")
    assert str(tiny.wan.parent) not in caught.value.message


def test_another_speech_model_and_no_audio_weights(tiny: ModelDirs) -> None:
    normalising(tiny.wav2vec / "preprocessor_config.json")
    (tiny.multitalk / "multitalk.safetensors").unlink()
    found = {p.file: p for p in verify(tiny).problems}
    assert "do_normalize" in found["preprocessor_config.json"].problem
    assert found["multitalk.safetensors"].kind == "missing"
    assert "MeiGen-MultiTalk" in found["multitalk.safetensors"].fix


def test_an_index_that_names_what_is_not_there(tiny: ModelDirs) -> None:
    index = replaced(tiny.wan / "diffusion_pytorch_model.safetensors.index.json")
    content = json.loads(index.read_text())
    content["weight_map"]["x"] = "diffusion_pytorch_model-00009-of-00009.safetensors"
    index.write_text(json.dumps(content))
    assert [p.file for p in verify(tiny).problems] == ["diffusion_pytorch_model-00009-of-00009.safetensors"]


def test_convert_then_verify_with_hashes(
    tiny: ModelDirs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert main(["convert", str(tiny.wan.parent), str(out)]) == 0
    assert main(["verify", str(out), "--full", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert (report["layout"], report["hashed"]) == ("converted", 5)
    dit = next(out.glob("diffusion_pytorch_model*.safetensors"))
    content = bytearray(dit.read_bytes())
    content[-1] ^= 1
    dit.write_bytes(content)
    assert main(["verify", str(out)]) == 0  # names and shapes are right
    problems = verify(ModelDirs.under(out), full=True).problems
    assert [(p.file, p.kind) for p in problems] == [(dit.name, "hash")]
    assert main(["convert", str(tiny.wan.parent), str(out)]) == 2  # not empty


# --- fetching, with a small list of files in place of the published one ------------------------------------

CONTENT = {
    "acme/wan/config.json": b"{}",
    "acme/wan/sub/weights.pth": bytes(range(256)) * 5000,
    "acme/talk/multitalk.safetensors": b"t" * 70_000,
}


@pytest.fixture
def small_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def file(repo: str, name: str) -> ModelFile:
        body = CONTENT[f"acme/{repo}/{name}"]
        return ModelFile(name=name, size=len(body), sha256=hashlib.sha256(body).hexdigest(), network="vae")

    models = (
        PublishedModel(key="wan", repo="acme/wan", revision="a" * 40,
                       files=(file("wan", "config.json"), file("wan", "sub/weights.pth"))),
        PublishedModel(key="multitalk", repo="acme/talk", revision="b" * 40,
                       files=(file("talk", "multitalk.safetensors"),)),
    )  # fmt: skip
    monkeypatch.setattr(verify_module, "MODELS", models)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(CONTENT) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


def all_there(root: Path) -> bool:
    dirs = ModelDirs.under(root)
    places = {"acme/wan": dirs.wan, "acme/talk": dirs.multitalk}
    return all(
        (places["/".join(name.split("/")[:2])] / "/".join(name.split("/")[2:])).read_bytes() == body
        for name, body in CONTENT.items()
    )


@pytest.mark.usefixtures("small_list")
def test_from_the_hub(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "models"
    assert main(["plan", str(root)]) == 1
    assert "3 files missing, 1.35 MB" in capsys.readouterr().out
    assert main(["fetch", str(root), "--from", "hub", "--endpoint", hub.address]) == 0
    assert all_there(root)
    assert all("a" * 40 in a or "b" * 40 in a for a in hub.asked)  # the revisions that were checked
    hub.asked.clear()
    assert main(["plan", str(root)]) == 0
    assert main(["fetch", str(root), "--endpoint", hub.address]) == 0
    assert hub.asked == []  # what is there is left alone


@pytest.mark.usefixtures("small_list")
def test_a_hub_that_has_something_else(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files["acme/wan/sub/weights.pth"] = b"x" * len(CONTENT["acme/wan/sub/weights.pth"])
    assert main(["fetch", str(tmp_path), "--endpoint", hub.address]) == 3
    assert "SHA-256 is not the published one" in capsys.readouterr().err
    assert not (ModelDirs.under(tmp_path).wan / "sub" / "weights.pth").exists()
    del hub.files["acme/wan/sub/weights.pth"]
    assert main(["fetch", str(tmp_path), "--endpoint", hub.address]) == 3
    assert "acme/wan has no sub/weights.pth" in capsys.readouterr().err


@pytest.mark.usefixtures("small_list")
def test_from_s3(s3: Any, s3_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {"wan": "Wan2.1-I2V-14B-480P", "talk": "MeiGen-MultiTalk"}
    for name, body in CONTENT.items():
        _, repo, rest = name.split("/", 2)
        s3.put_object(Bucket="media", Key=f"weights/{folders[repo]}/{rest}", Body=body)
    root = tmp_path / "models"
    where = ["--from", "s3://media/weights", "--endpoint", s3_server]
    assert main(["fetch", str(root), *where]) == 0, capsys.readouterr().err
    assert all_there(root)
    s3.delete_object(Bucket="media", Key="weights/MeiGen-MultiTalk/multitalk.safetensors")
    assert main(["fetch", str(tmp_path / "again"), *where]) == 3
    assert "multitalk.safetensors" in capsys.readouterr().err


@pytest.mark.usefixtures("small_list")
def test_from_a_volume(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume, root = tmp_path / "volume", tmp_path / "models"
    assert main(["fetch", str(volume), "--endpoint", hub.address]) == 0
    assert main(["fetch", str(root), "--from", str(volume)]) == 0
    assert all_there(root)
    assert not list(root.rglob("*.part"))
    assert main(["fetch", str(tmp_path / "x"), "--from", str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err


@pytest.mark.usefixtures("small_list")
def test_space_is_checked_before_the_first_byte(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetch_models.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    assert main(["fetch", str(tmp_path / "models"), "--endpoint", hub.address]) == 3
    assert "are free" in capsys.readouterr().err
    assert hub.asked == []
    assert not (tmp_path / "models").exists()


def test_the_real_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path), "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert 92.4e9 < content["bytes"] < 92.7e9
    assert len(content["missing"]) == 17
    assert {m["repo"] for m in content["missing"]} >= {"MeiGen-AI/MeiGen-MultiTalk"}
