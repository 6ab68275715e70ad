import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.errors import ConfigError
from shardkit.microbatch import Grid, checked_speeds

even_grids = st.builds(Grid, st.integers(1, 100), st.integers(1, 130))
speeds = st.lists(st.floats(0.05, 20), min_size=1, max_size=12).map(tuple)
uneven_grids = st.builds(
    lambda num, speeds: Grid(num, len(speeds), speeds), st.integers(1, 60), speeds
)
grids = even_grids | uneven_grids


@settings(max_examples=100, deadline=None, derandomize=True)
@given(grid=grids)
def test_every_microbatch_is_computed_once_in_order(grid):
    dealt = [
        microbatch
        for start, count in zip(grid.starts, grid.counts, strict=True)
        for microbatch in range(start, start + count)
    ]
    assert dealt == list(range(grid.num_microbatches))
    assert len(grid.counts) == grid.num_devices
    assert grid.max_count == max(2, grid.counts.max())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(grid=even_grids)
def test_devices_that_are_alike_differ_by_at_most_one(grid):
    assert grid.counts.max() - grid.counts.min() <= 1
    alike = Grid(grid.num_microbatches, grid.num_devices, (0.7,) * grid.num_devices)
    np.testing.assert_array_equal(alike.counts, grid.counts)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(num=st.integers(1, 7), speeds=speeds.filter(lambda x: len(x) <= 3))
def test_no_other_dealing_is_done_earlier(num, speeds):
    def last(counts):
        return max(count / speed for count, speed in zip(counts, speeds, strict=True))

    dealings = [
        counts
        for counts in itertools.product(range(num + 1), repeat=len(speeds))
        if sum(counts) == num
    ]
    found = Grid(num, len(speeds), speeds).counts
    assert last(found) == min(map(last, dealings))


@pytest.mark.parametrize("speed", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_a_speed_is_a_number_above_zero(speed):
    with pytest.raises(ConfigError, match="above 0"):
        checked_speeds({0: 1.0, 3: speed})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(grid=grids)
def test_a_devices_slots_begin_with_its_own_microbatches(grid):
    slots = grid.slots.reshape(grid.num_devices, grid.max_count)
    for row, start, count in zip(slots, grid.starts, grid.counts, strict=True):
        np.testing.assert_array_equal(row[:count], np.arange(start, start + count))
    # What is loaded and not computed must be there to be loaded.
    assert slots.min() >= 0
    assert slots.max() < grid.num_microbatches


def test_the_grid_is_made_of_int32():
    grid = Grid(num_microbatches=5, num_devices=3)
    assert {grid.counts.dtype, grid.starts.dtype} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(grid.slots, [0, 1, 2, 3, 4, 4])
