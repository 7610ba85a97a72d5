"""Prompt extension: rules, languages, failures that must not stop a video, absent packages named."""

import sys

import pytest
from PIL import Image

from wan.utils.prompt_extend import (
    DashScopePromptExpander,
    MissingExtraError,
    PromptExpander,
    QwenPromptExpander,
    clean,
)


class Echo(PromptExpander):
    """A model that repeats what it was told."""

    def chat(self, system_prompt, prompt, images, seed):
        if prompt == "fail":
            msg = "no connection"
            raise ConnectionError(msg)
        return ("" if prompt == "nothing" else f"{prompt}, {len(images)} pictures, seed {seed}"), "raw"


def test_a_prompt_is_extended():
    out = Echo("echo")("a cat", tar_lang="en", seed=4)
    assert (out.status, out.prompt, out.seed, out.message) == (True, "a cat, 0 pictures, seed 4", 4, "raw")
    assert "English" in out.system_prompt
    assert "中文" in Echo("echo")("a cat").system_prompt
    out.add_custom_field("extra", 1)
    assert out.extra == 1


def test_own_rules_and_a_random_seed():
    seeds = {Echo("echo")("a", system_prompt="mine").seed for _ in range(3)}
    assert len(seeds) == 3
    assert Echo("echo")("a", system_prompt="mine").system_prompt == "mine"


@pytest.mark.parametrize(
    ("prompt", "reason"), [("fail", "ConnectionError: no connection"), ("nothing", "nothing")]
)
def test_a_failing_model_leaves_the_prompt(prompt, reason):
    out = Echo("echo")(prompt)
    assert not out.status
    assert out.prompt == prompt
    assert reason in out.message


def test_pictures_choose_the_rules():
    image = Image.new("RGB", (4, 4))
    one, two = (Echo("echo", is_vl=True)("a", tar_lang="en", image=i) for i in (image, [image, image]))
    assert "starts from it" in one.system_prompt
    assert "first and last frame" in two.system_prompt
    assert "2 pictures" in two.prompt
    with pytest.raises(ValueError, match="reads no pictures"):
        Echo("echo")("a", image=image)
    with pytest.raises(ValueError, match="needs image="):
        Echo("echo", is_vl=True)("a")


def test_unknown_language():
    with pytest.raises(ValueError, match="tar_lang is 'fr'"):
        Echo("echo")("a", tar_lang="fr")


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [("  a\n cat ", "a cat"), ('"a cat"', "a cat"), ("<think>hm\n</think>\na cat", "a cat"), ("“猫”", "猫")],
)
def test_answers_are_cleaned(answer, prompt):
    assert clean(answer) == prompt


def test_absent_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "dashscope", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delenv("DASH_API_URL", raising=False)
    for expander in (DashScopePromptExpander(api_key="x"), QwenPromptExpander(str(tmp_path))):
        with pytest.raises(MissingExtraError, match=r"multitalk-runtime\[prompt\]"):
            expander("a cat")


def test_missing_key_and_unknown_model(monkeypatch):
    monkeypatch.delenv("DASH_API_KEY", raising=False)
    with pytest.raises(ValueError, match="DASH_API_KEY"):
        DashScopePromptExpander()
    with pytest.raises(ValueError, match="no such folder"):
        QwenPromptExpander("somewhere/else")
    assert QwenPromptExpander().model_name == "Qwen/Qwen2.5-14B-Instruct"
