"""Which tiles the blocks of a direct kernel compute: the kernel's own list, compiled for the host, against what must be
covered. A counter decides between blocks, so every run may deal them otherwise."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.host_build import compile_shim, needs_gxx

pytestmark = needs_gxx

WEIGHTS = 256
HALF = 64


class Kind(enum.IntEnum):
    """Of kernels, as the shim counts them: by the tile's tokens, and two blocks an SM."""

    SWAPPED = 0
    TWO_BLOCKS = 1
    HALVES = 2
    THREE_WARPGROUPS = 3

    @property
    def tokens(self) -> int:
        return (32, 32, 128, 192)[self]


LONG_K, SHORT_K = 7168, 2048

# kind, rows of each group, n, k, blocks -> [tiles, 6] of all blocks, and what the counter holds afterwards
List = Callable[[Kind, list[int], int, int, int], tuple[np.ndarray, int]]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> List:
    folder = tmp_path_factory.mktemp("schedule")
    stand_ins = folder / "stand_ins"  # the shim has what these would declare
    (stand_ins / "direct").mkdir(parents=True)
    for name in ("dependent_launch.cuh", "direct/config.cuh"):
        (stand_ins / name).write_text("#pragma once\n")
    handle = compile_shim("schedule_shim", folder, "-pthread", f"-I{stand_ins}")

    def listed(kind: Kind, rows: list[int], n: int, k: int, blocks: int) -> tuple[np.ndarray, int]:
        offsets = np.cumsum([0, *rows], dtype=np.int32)
        most = sum(-(-count // 32) + 1 for count in rows) * -(-n // WEIGHTS) * 2 + blocks
        out, counter = np.zeros((most, 6), np.int32), np.zeros(1, np.int32)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (offsets, counter, out)]
        count = handle.list_tiles_of_all(kind, pointers[0], len(rows), n, k, blocks, *pointers[1:])
        return out[:count], int(counter[0])

    return listed


ROWS = st.lists(
    st.one_of(st.integers(0, 200), st.sampled_from([0, 63, 64, 65, 128, 129, 192, 256, 320, 449, 900])),
    min_size=1,
    max_size=9,
)


@settings(max_examples=400)
@given(st.sampled_from(Kind), ROWS, st.integers(1, 7), st.sampled_from([SHORT_K, LONG_K]), st.integers(1, 12))
def test_every_row_meets_all_weights_once(
    listed: List, kind: Kind, rows: list[int], across: int, k: int, blocks: int
) -> None:
    blocks *= 1 + (kind == Kind.TWO_BLOCKS)
    tiles, counter = listed(kind, rows, across * WEIGHTS, k, blocks)
    assert counter == 0, "the next launch counts from there"
    ends = tiles[tiles[:, 3] == 0]
    assert sorted(ends[:, 0]) == list(range(blocks)), "each block's list ends once"
    offsets = np.cumsum([0, *rows])
    met = np.zeros((offsets[-1], across), int)
    for _, group, first_row, count, weight_tile, half in tiles[tiles[:, 3] > 0]:
        assert offsets[group] <= first_row and first_row + count <= offsets[group + 1]
        assert count <= (HALF if half else kind.tokens) and not (half and kind != Kind.HALVES)
        met[first_row : first_row + count, weight_tile] += 1
    assert (met == 1).all()


@given(st.integers(1, 64), st.integers(1, 3), st.integers(1, 6))
def test_the_last_of_three_tiles_is_taken_two_by_two(listed: List, tail: int, more: int, across: int) -> None:
    """So that all that one block takes is as long: whole tiles and pairs of halves, on one block of each."""
    rows = (more + 1) * 128 + tail
    items = (more + 1) * across + -(-across // 2)
    tiles, _ = listed(Kind.HALVES, [rows], across * WEIGHTS, LONG_K, items)
    of_block = [tiles[(tiles[:, 0] == block) & (tiles[:, 3] > 0)] for block in range(items)]
    halves = [block for block in of_block if block[:, 5].any()]
    assert all(len(block) == 1 for block in of_block if not block[:, 5].any())
    assert [len(block) for block in halves] == [2] * (across // 2) + [1] * (across % 2)
    assert all((block[:, 3] == tail).all() for block in halves)


@pytest.mark.parametrize(("k", "half"), [(SHORT_K, True), (LONG_K, False)])
def test_rows_beside_one_whole_tile_keep_its_pace_where_k_is_long(listed: List, k: int, half: bool) -> None:
    tiles, _ = listed(Kind.HALVES, [128 + 30], 4 * WEIGHTS, k, 8)
    tails = tiles[tiles[:, 3] == 30]
    assert len(tails) == 4 and (tails[:, 5] == half).all()


@pytest.mark.parametrize(("left", "halved"), [(1, True), (4, True), (5, False), (8, False)])
def test_a_last_round_of_few_tiles_is_shared(listed: List, left: int, halved: bool) -> None:
    """By up to two blocks a tile, of eight that all had one before."""
    tiles, _ = listed(Kind.HALVES, [128], (8 + left) * WEIGHTS, LONG_K, 8)
    halves = tiles[tiles[:, 5] == 1]
    assert sorted(halves[:, 2]) == ([0] * left + [64] * left if halved else [])


@pytest.mark.parametrize("kind", [Kind.SWAPPED, Kind.HALVES, Kind.THREE_WARPGROUPS])
@pytest.mark.parametrize("count", range(1, 13))
def test_tiles_too_few_for_all_blocks_are_spread(listed: List, kind: Kind, count: int) -> None:
    """Over all but the last blocks, a quarter of those without: six neighbours of twelve have about half of them."""
    blocks, rows = 12, 32
    tiles, _ = listed(kind, [rows], count * WEIGHTS, LONG_K, blocks)
    of_block = [((tiles[:, 0] == block) & (tiles[:, 3] > 0)).sum() for block in range(blocks)]
    assert sum(of_block) == count and of_block[0] == 1
    assert count == blocks or of_block[-1] == 0
    among = blocks - (blocks - count) // 4
    for first in range(among - 5):
        assert abs(sum(of_block[first : first + 6]) - 6 * count / among) < 1


@pytest.mark.parametrize("count", range(1, 13))
def test_an_sm_s_second_block_begins_where_all_first_ones_have_a_tile(listed: List, count: int) -> None:
    """Of six SMs, whose first blocks are the first six."""
    tiles, _ = listed(Kind.TWO_BLOCKS, [32], count * WEIGHTS, LONG_K, 12)
    begun = [bool(((tiles[:, 0] == block) & (tiles[:, 3] > 0)).any()) for block in range(12)]
    assert sum(begun[:6]) == min(count, 6) and sum(begun[6:]) == max(count - 6, 0)
