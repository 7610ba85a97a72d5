"""The token split for any number of ranks. The other rules stand beside their modules: VAE pieces in
test_vae_properties, buckets in test_preprocess, clip counts in test_clips, skip lists in test_teacache.
"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from wan.distributed.xdit_context_parallel import UlyssesParallel, column_counts
from wan.modules.rope import video_table


def ranks(size: int) -> list[UlyssesParallel]:
    """What each of `size` processes would hold, without starting any: `split` talks to nobody."""
    out = []
    for rank in range(size):
        parallel = object.__new__(UlyssesParallel)
        parallel.group, parallel.size, parallel.rank, parallel._grid = None, size, rank, None
        out.append(parallel)
    return out


grids = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 12))


@given(grids, st.data())
def test_every_token_has_one_rank_and_keeps_its_frame(
    grid: tuple[int, int, int], data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, grid[2]))
    frames, height, width = grid
    tokens = torch.arange(frames * height * width)[None, :, None]
    parts = [parallel.split(tokens, grid) for parallel in ranks(size)]
    assert sorted(torch.cat(parts, dim=1).flatten().tolist()) == list(range(frames * height * width))
    for part, columns in zip(parts, column_counts(width, size), strict=True):
        assert part.shape == (1, frames * height * columns, 1)
        frame = part.flatten() // (
            height * width
        )  # audio keys belong to a frame: each gets an equal, ordered share
        assert frame.tolist() == sorted(frame.tolist())
        assert frame.bincount(minlength=frames).tolist() == [height * columns] * frames


@given(grids, st.data())
def test_positions_travel_with_their_tokens(grid: tuple[int, int, int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, grid[2]))
    table = video_table(grid, 12, "cpu")
    index = torch.arange(table.cos.shape[0])[None, :, None]
    for parallel in ranks(size):
        own = parallel.split(index, grid).flatten()
        assert torch.equal(parallel.split(table.cos[None], grid)[0], table.cos[own])
        assert torch.equal(parallel.split(table.sin[None], grid)[0], table.sin[own])
