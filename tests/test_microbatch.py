import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.microbatch import Grid

grids = st.builds(Grid, st.integers(1, 100), st.integers(1, 130))


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
    assert grid.counts.max() - grid.counts.min() <= 1
    assert grid.max_count == grid.counts.max()


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
