"""Run inside an image: the DiT's golden outputs, with nothing but what the image has. Prints one JSON line.

Usage: python3 golden_dit.py FOLDER, where FOLDER holds `tests/wan/goldens.py` and `tests/golden`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(sys.argv[1]) / "wan"))

import goldens
import torch

import wan
from wan.modules.multitalk_model import WanModel

errors = {}
for name in ("dit_single_fp32", "dit_multi_fp32"):
    model = goldens.fill(WanModel(**goldens.config(name)), name)
    stored, made = goldens.load(name), goldens.regenerate(name)
    with torch.no_grad():
        (out,) = model(
            x=[stored["x"]],
            t=stored["t"],
            context=[made.get("context", stored.get("context"))],
            seq_len=10_000,
            clip_fea=made["clip_fea"],
            y=stored["y"],
            audio=made["audio"],
            ref_target_masks=stored["ref_target_masks"],
        )
    errors[name] = goldens.error(out, stored["out"])
print(json.dumps({"torch": torch.__version__, "wan": wan.__file__, "errors": errors}))
