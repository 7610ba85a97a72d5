"""The operator's environment: read once, checked, and nothing allowed that it does not say."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import pytest

from multitalk_runtime import settings as module
from multitalk_runtime.settings import Lora, Settings, SettingsError


def test_an_empty_environment_allows_nothing() -> None:
    settings = Settings.from_environment({})
    assert settings == Settings()
    assert (settings.s3_allowed, settings.volumes, settings.allow_addresses) == ((), (), ())
    assert settings.token is None


def test_everything_can_be_set() -> None:
    settings = Settings.from_environment(
        {
            "MODEL_PATH": "/m",
            "MT_WAN_DIR": "/w",
            "MT_LORA": "/l/a.safetensors:0.8, /l/b.safetensors",
            "MT_S3_BUCKETS": "one, two/in",
            "MT_VOLUMES": "/a,/b",
            "MT_ALLOW_ADDRESSES": "10.0.0.0/8",
            "MT_MAX_AUDIO_S": "12.5",
            "MT_MAX_IMAGE_BYTES": "1e6",
            "MT_TOKEN": "t0ken",
            "MT_OFFLOAD": "no",
            "MT_DEVICE": "cpu",
        }
    )
    assert settings.model_path == Path("/m")
    assert settings.wan_dir == Path("/w")
    assert settings.loras == (
        Lora(file=Path("/l/a.safetensors"), scale=0.8),
        Lora(file=Path("/l/b.safetensors")),
    )
    assert settings.s3_allowed == ("one", "two/in")
    assert settings.volumes == (Path("/a"), Path("/b"))
    assert settings.allow_addresses == (ipaddress.ip_network("10.0.0.0/8"),)
    assert (settings.max_audio_s, settings.max_image_bytes) == (12.5, 1_000_000)
    assert not settings.offload
    assert "t0ken" not in repr(settings)


def test_the_variables_of_the_old_images_keep_their_meaning() -> None:
    settings = Settings.from_environment(
        {
            "MODEL_PATH": "/runpod-volume/models",
            "AWS_S3_BUCKET_NAME": "media",
            "AWS_REGION": "eu-west-1",
            "BUCKET_ENDPOINT_URL": "https://s3.example",
        }
    )
    assert settings.model_path == Path("/runpod-volume/models")
    assert settings.s3_bucket == "media"
    assert settings.s3_allowed == ("media",)
    assert settings.s3_region == "eu-west-1"
    assert settings.s3_endpoint == "https://s3.example"


def test_an_empty_variable_counts_as_not_set() -> None:
    assert Settings.from_environment({"BUCKET_ENDPOINT_URL": " ", "MT_TOKEN": ""}) == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MT_MAX_PIXELS", "many"),
        ("MT_MAX_PIXELS", "-1"),
        ("MT_FETCH_S", "nan"),
        ("MT_JOB_S", "inf"),
        ("MT_ALLOW_ADDRESSES", "10.0.0.0/40"),
        ("MT_LORA", "a.safetensors:strong"),
        ("MT_OFFLOAD", "maybe"),
        ("BUCKET_ENDPOINT_URL", "s3.example"),
    ],
)
def test_what_can_not_be_used_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        Settings.from_environment({name: value})


def test_every_variable_is_in_the_table_and_in_the_docs() -> None:
    source = Path(module.__file__).read_text()
    read = set(re.findall(r'given(?:\.get\(|\[|, )"([A-Z0-9_]+)"', source)) - {"AWS_DEFAULT_REGION"}
    table = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", module.__doc__ or ""))
    assert read == table
    assert len(read) > 25
    docs = (Path(__file__).parents[2] / "docs/runtime.md").read_text()
    assert not [name for name in table if f"`{name}`" not in docs]
