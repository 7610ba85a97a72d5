"""What a test asks of the GPU it runs on."""

from __future__ import annotations

import pytest
import torch


def needs(floor: tuple[int, int], what: str) -> None:
    """Skip the test, saying why, on a GPU below compute capability `floor`: such a one has no `what`."""
    here = torch.cuda.get_device_capability()
    if here < floor:
        # needed: the units are not in that GPU, so nothing could be tried
        pytest.skip(
            f"{what} begins with compute capability {floor[0]}.{floor[1]}; this GPU has {here[0]}.{here[1]}"
        )
