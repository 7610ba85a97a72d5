"""Text cleaning and tokenisation, by the `tokenizers` library and a model folder's `tokenizer.json`."""

from __future__ import annotations

import html
import json
import os
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from wan.tensor_files import CheckpointError

__all__ = ["HuggingfaceTokenizer", "basic_clean", "canonicalize", "whitespace_clean"]

Clean = Literal["whitespace", "lower", "canonicalize"]
CLEANINGS = (None, "whitespace", "lower", "canonicalize")


def basic_clean(text: str) -> str:
    """Repair broken Unicode (ftfy), resolve HTML entities twice (`&amp;quot;`), strip."""
    import ftfy  # here, not above: its tables take a tenth of a second that only a prompt needs

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def whitespace_clean(text: str) -> str:
    """Every run of white space becomes one space; strip."""
    return re.sub(r"\s+", " ", text).strip()


def canonicalize(text: str, keep_punctuation_exact_string: str | None = None) -> str:
    """Lower case, no punctuation (except that exact string), underscores to spaces, single spaces."""
    remove = str.maketrans("", "", string.punctuation)
    text = text.replace("_", " ")
    if keep_punctuation_exact_string:
        parts = text.split(keep_punctuation_exact_string)
        text = keep_punctuation_exact_string.join(part.translate(remove) for part in parts)
    else:
        text = text.translate(remove)
    return whitespace_clean(text.lower())


class HuggingfaceTokenizer:
    """Texts → token ids, padded and cut to `seq_len` (or to the longest text if that is None).

    `name` is a folder with `tokenizer.json`, such as `google/umt5-xxl` of a Wan checkpoint; nothing is
    downloaded. `clean`: None, 'whitespace' (what umT5 gets), 'lower' or 'canonicalize'. Special tokens
    (umT5: `</s>` at the end) count towards `seq_len` and survive the cut. Raises CheckpointError if the
    folder has no usable tokenizer.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        seq_len: int | None = None,
        clean: Clean | None = None,
        **kwargs: Any,
    ) -> None:
        if clean not in CLEANINGS:
            msg = f"clean must be one of {CLEANINGS}, got {clean!r}"
            raise ValueError(msg)
        if kwargs:
            msg = f"unknown option {', '.join(kwargs)}: tokenizer.json decides everything else"
            raise TypeError(msg)
        self.name, self.seq_len, self.clean = str(name), seq_len, clean
        folder = Path(name)
        self.tokenizer = _load(folder / "tokenizer.json")
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.pad_token = _pad_token(folder)
        pad_id = self.tokenizer.token_to_id(self.pad_token)
        if pad_id is None:
            fix = "The files of the folder belong to different tokenizers: download it again"
            raise CheckpointError(
                folder, f"the padding token {self.pad_token!r} is not in the vocabulary", fix
            )
        self.pad_id = pad_id
        self.tokenizer.enable_padding(pad_id=pad_id, pad_token=self.pad_token, length=seq_len)
        if seq_len is None:
            self.tokenizer.no_truncation()
        else:
            self.tokenizer.enable_truncation(seq_len)

    @overload
    def __call__(
        self, sequence: str | Sequence[str], *, return_mask: Literal[True], add_special_tokens: bool = True
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self, sequence: str | Sequence[str], *, return_mask: bool = False, add_special_tokens: bool = True
    ) -> Tensor: ...

    def __call__(
        self, sequence: str | Sequence[str], *, return_mask: bool = False, add_special_tokens: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """ids [B, L] int64, and with `return_mask` the mask [B, L] int64 (1 = token, 0 = padding)."""
        texts = [sequence] if isinstance(sequence, str) else list(sequence)
        encodings = self.tokenizer.encode_batch(
            [self.cleaned(text) for text in texts], add_special_tokens=add_special_tokens
        )
        ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.long)
        if not return_mask:
            return ids
        return ids, torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.long)

    def cleaned(self, text: str) -> str:
        """The text as the tokenizer sees it."""
        if self.clean is None:
            return text
        text = basic_clean(text)
        if self.clean == "canonicalize":
            return canonicalize(text)
        text = whitespace_clean(text)
        return text.lower() if self.clean == "lower" else text


def _load(path: Path) -> Any:
    from tokenizers import Tokenizer

    if not path.is_file():
        fix = "Name the tokenizer's folder, such as google/umt5-xxl in the checkpoint folder"
        raise CheckpointError(path, "no such file", fix)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise CheckpointError(path, f"not a tokenizer ({error})", "Download it again") from error


def _pad_token(folder: Path) -> str:
    """From tokenizer_config.json or special_tokens_map.json; `<pad>`, the T5 and XLM-R families' own,
    without them.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            token = json.loads(path.read_text(encoding="utf-8")).get("pad_token")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(path, f"can't be read ({error})", "Download it again") from error
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return "<pad>"
