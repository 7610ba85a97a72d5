"""Making a short prompt richer with a language model: DashScope's service or a local Qwen.

Optional, and never called by MultiTalk itself. What each needs is imported at first use, from the extra
`prompt`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = [
    "DashScopePromptExpander",
    "MissingExtraError",
    "PromptExpander",
    "PromptOutput",
    "QwenPromptExpander",
]

RULES_EN = """You rewrite prompts for a video generation model. Answer with the rewritten prompt alone.
Keep what the user asks for: subjects, actions, names, quoted text, style.
Add what a camera would see: looks, clothes, movement, place, light, framing, the camera's movement.
Write in English, in plain sentences that describe one continuous shot, in 80 to 100 words."""
RULES_ZH = """你为视频生成模型改写提示词，只回答改写后的提示词。
保留用户的要求：主体、动作、名称、引号中的文字、风格。
补充镜头会看到的内容：主体的外貌与衣着、动作、环境、光线、景别与运镜。
用中文，以通顺的句子描述一个连续的镜头，80到100字。"""
PICTURE_EN = (
    "\nA picture is given: the video starts from it. Describe what it shows, and let the movement follow."
)
PICTURE_ZH = "\n已给出一张图片，视频由它开始。描述图中的内容，并写出接下来的动作。"
PICTURES_EN = (
    "\nTwo pictures are given: the video's first and last frame. Describe how the one becomes the other."
)
PICTURES_ZH = "\n已给出两张图片：视频的第一帧与最后一帧。描述画面如何由前者变为后者。"
RULES = {"en": (RULES_EN, PICTURE_EN, PICTURES_EN), "zh": (RULES_ZH, PICTURE_ZH, PICTURES_ZH)}
MAX_SEED = 2**31 - 1


class MissingExtraError(ImportError):
    """An optional package is absent; the message names the extra that brings it."""


@dataclass(frozen=True)
class PromptOutput:
    """What came out. With `status` False, `prompt` is the input and `message` says why."""

    status: bool
    prompt: str
    seed: int
    system_prompt: str
    message: str

    def add_custom_field(self, key: str, value: Any) -> None:
        """Attach a further value."""
        object.__setattr__(self, key, value)


def require(module: str, extra: str = "prompt") -> ModuleType:
    """Import an optional module. Raises MissingExtraError."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        msg = f"prompt extension needs {module} ({error}): pip install 'multitalk-runtime[{extra}]'"
        raise MissingExtraError(msg) from error


class PromptExpander(ABC):
    """Calls a language model with the rules for a rewrite; subclasses know which model."""

    def __init__(self, model_name: str, is_vl: bool = False, device: int | str = 0, **kwargs: Any) -> None:
        self.model_name, self.is_vl, self.device = model_name, is_vl, device

    @abstractmethod
    def chat(self, system_prompt: str, prompt: str, images: Sequence[Any], seed: int) -> tuple[str, str]:
        """The model's answer, and whatever it returned in full (for `PromptOutput.message`)."""

    def decide_system_prompt(self, tar_lang: str = "zh", multi_images_input: bool = False) -> str:
        """The rules, in the language ('en' or 'zh') of the wanted prompt."""
        if tar_lang not in RULES:
            msg = f"tar_lang is {tar_lang!r}; choose one of {', '.join(RULES)}"
            raise ValueError(msg)
        rules, picture, pictures = RULES[tar_lang]
        return rules + (pictures if multi_images_input else picture if self.is_vl else "")

    def __call__(
        self,
        prompt: str,
        system_prompt: str | None = None,
        tar_lang: str = "zh",
        image: Any = None,
        seed: int = -1,
    ) -> PromptOutput:
        """Prompt (and picture or pictures, where the model reads them) → `PromptOutput`.

        A model that fails or answers nothing leaves the prompt as it was, with `status` False. Raises
        MissingExtraError, and ValueError for a picture that the model can't read.
        """
        images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
        if images and not self.is_vl:
            msg = f"{self.model_name} reads no pictures; use a VL model (is_vl=True)"
            raise ValueError(msg)
        if self.is_vl and not images:
            msg = f"{self.model_name} is a VL model and needs image="
            raise ValueError(msg)
        system_prompt = system_prompt or self.decide_system_prompt(tar_lang, len(images) > 1)
        seed = seed if seed >= 0 else secrets.randbelow(MAX_SEED)
        try:
            answer, message = self.chat(system_prompt, prompt, images, seed)
        except MissingExtraError:
            raise
        except Exception as error:  # noqa: BLE001  (a failed extension must not fail the video)
            return PromptOutput(False, prompt, seed, system_prompt, f"{type(error).__name__}: {error}")
        answer = clean(answer)
        if not answer:
            return PromptOutput(False, prompt, seed, system_prompt, f"the model answered nothing: {message}")
        return PromptOutput(True, answer, seed, system_prompt, message)


def clean(answer: str) -> str:
    """The rewritten prompt on one line, without a reasoning model's thoughts or quotation marks around it."""
    answer = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
    return re.sub(r"\s+", " ", answer).strip().strip('"“”').strip()


class DashScopePromptExpander(PromptExpander):
    """Alibaba's DashScope service. The key is `api_key` or the variable DASH_API_KEY."""

    def __init__(
        self,
        api_key: str | None = None,
        model_name: str | None = None,
        max_image_size: int = 512 * 512,
        retry_times: int = 4,
        is_vl: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name or ("qwen-vl-max" if is_vl else "qwen-plus"), is_vl, **kwargs)
        self.api_key = api_key or os.environ.get("DASH_API_KEY")
        if not self.api_key:
            msg = "DashScope needs a key: pass api_key or set DASH_API_KEY"
            raise ValueError(msg)
        self.max_image_size, self.retry_times = max_image_size, retry_times
        if "DASH_API_URL" in os.environ:
            require("dashscope").base_http_api_url = os.environ["DASH_API_URL"]

    def chat(self, system_prompt: str, prompt: str, images: Sequence[Any], seed: int) -> tuple[str, str]:
        """See `PromptExpander.chat`; tries `retry_times` times, then raises RuntimeError."""
        dashscope = require("dashscope")
        options = {"model": self.model_name, "seed": seed, "api_key": self.api_key}
        user: Any = prompt
        service = dashscope.Generation
        if images:
            service = dashscope.MultiModalConversation
            user = [*({"image": self._data(image)} for image in images), {"text": prompt}]
        else:
            options["result_format"] = "message"
        messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": user}]
        problem = ""
        for _ in range(self.retry_times):
            response = service.call(messages=messages, **options)
            if response.status_code == 200:
                content = response.output["choices"][0]["message"]["content"]
                text = content if isinstance(content, str) else content[0]["text"]
                return text, json.dumps(response, ensure_ascii=False, default=str)
            problem = f"{response.status_code} {response.code}: {response.message}"
        msg = f"DashScope failed {self.retry_times} times: {problem}"
        raise RuntimeError(msg)

    def _data(self, image: Any) -> str:
        """A picture within `max_image_size` pixels as a data: address."""
        import base64
        import io

        from .qwen_vl_utils import fetch_image

        buffer = io.BytesIO()
        fetch_image({"image": image, "max_pixels": self.max_image_size}).save(buffer, format="PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class QwenPromptExpander(PromptExpander):
    """A Qwen on this machine: `model_name` is a folder, or one of `model_dict`'s names in the Hugging Face
    cache.
    """

    model_dict = {  # noqa: RUF012
        "QwenVL2.5_3B": "Qwen/Qwen2.5-VL-3B-Instruct",
        "QwenVL2.5_7B": "Qwen/Qwen2.5-VL-7B-Instruct",
        "Qwen2.5_3B": "Qwen/Qwen2.5-3B-Instruct",
        "Qwen2.5_7B": "Qwen/Qwen2.5-7B-Instruct",
        "Qwen2.5_14B": "Qwen/Qwen2.5-14B-Instruct",
    }

    def __init__(
        self, model_name: str | None = None, device: int | str = 0, is_vl: bool = False, **kwargs: Any
    ) -> None:
        name = model_name or ("QwenVL2.5_7B" if is_vl else "Qwen2.5_14B")
        super().__init__(self.model_dict.get(name, name), is_vl, device, **kwargs)
        if not Path(self.model_name).is_dir() and self.model_name not in self.model_dict.values():
            msg = f"{self.model_name}: no such folder, nor one of {', '.join(self.model_dict)}"
            raise ValueError(msg)
        self._loaded: tuple[Any, Any] | None = None

    def chat(self, system_prompt: str, prompt: str, images: Sequence[Any], seed: int) -> tuple[str, str]:
        """See `PromptExpander.chat`. The model is loaded at the first call and stays."""
        import torch

        from .qwen_vl_utils import process_vision_info

        processor, model = self._load()
        user: Any = [*({"type": "image", "image": i} for i in images), {"type": "text", "text": prompt}]
        messages = [
            {"role": "system", "content": system_prompt},
            {"role": "user", "content": user if images else prompt},
        ]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        media = {"images": process_vision_info(messages)[0]} if images else {}
        inputs = processor(text=[text], return_tensors="pt", padding=True, **media).to(model.device)
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = model.generate(**inputs, max_new_tokens=512)
        answer = output[:, inputs["input_ids"].shape[1] :]
        answer = processor.batch_decode(answer, skip_special_tokens=True)[0]
        return answer, json.dumps({"content": answer}, ensure_ascii=False)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            transformers = require("transformers")
            processor_class = transformers.AutoProcessor if self.is_vl else transformers.AutoTokenizer
            model_class = (
                transformers.AutoModelForImageTextToText if self.is_vl else transformers.AutoModelForCausalLM
            )
            model = model_class.from_pretrained(self.model_name, torch_dtype="auto")
            device = f"cuda:{self.device}" if isinstance(self.device, int) else self.device
            model = model.to(device if _has_cuda() or not device.startswith("cuda") else "cpu").eval()
            self._loaded = processor_class.from_pretrained(self.model_name), model
        return self._loaded


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
