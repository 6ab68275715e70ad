import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

from shardkit.errors import ConfigError
from shardkit.exact_sum import (
    INITIAL_EXPONENT,
    Accumulator,
    exact_sum,
    exact_sums,
    is_summable,
    next_exponent,
    peak_bits,
)
from shardkit.mesh import MeshSpec

SIZE = 64
# A value at the top of its binade makes the largest digits.
BIGGEST = np.nextafter(np.float32(1), np.float32(0))
jit_sum = jax.jit(exact_sum, static_argnums=1)


def bits(x):
    return np.asarray(x).view(np.uint32).tolist()


def filled(values, size=SIZE):
    """Appends zeros, so that everything has a shape that is compiled already."""
    return np.array([*values, *[0] * (size - len(values))], np.float32)


def error_bound(values, exact):
    """What the docstring promises, with one more bit for the rounding to float32."""
    peak = max((abs(float(v)) for v in values), default=0.0)
    return len(values) * peak * 2.0**-46 + abs(exact) * 2.0**-23


# Below 2**-60 the grid itself ends: about 1e-18, less than any norm is of interest.
magnitudes = st.floats(2.0**-60, 2.0**110, width=32)
floats = st.one_of(
    st.just(0.0), magnitudes, magnitudes.map(lambda x: -x), st.floats(-2, 2, width=32)
)
addends = st.lists(floats, max_size=SIZE)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=addends)
def test_the_sum_is_close_to_the_true_one(values):
    exact = math.fsum(values)
    found = float(jit_sum(filled(values), (0,)))
    assert abs(found - exact) <= max(error_bound(values, exact), 2.0**-102)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=addends, seed=st.integers(0, 2**32 - 1))
def test_no_order_changes_a_bit(values, seed):
    x = filled(values)
    shuffled = np.random.default_rng(seed).permutation(x)
    assert bits(jit_sum(x, (0,))) == bits(jit_sum(shuffled, (0,)))


@pytest.mark.parametrize("size", [1, 2, 8191, 8192, 8193, 16385, 100_000])
def test_the_largest_digits_do_not_overflow(size):
    x = np.full(size, BIGGEST)
    for addends in (x, -x, np.where(np.arange(size) % 2, x, -x)):
        exact = math.fsum(addends)
        found = float(jit_sum(addends, (0,)))
        assert abs(found - exact) <= abs(exact) * 2.0**-23


@pytest.mark.parametrize("size", [8193, 30_000])
def test_long_sums_are_exact_and_order_free(size):
    rng = np.random.default_rng(size)
    x = (rng.normal(size=size) * 2.0 ** rng.integers(-20, 20, size)).astype(np.float32)
    found = jit_sum(x, (0,))
    exact = math.fsum(x)
    assert abs(float(found) - exact) <= error_bound(x, exact)
    assert bits(found) == bits(jit_sum(x[::-1].copy(), (0,)))
    assert bits(found) == bits(jit_sum(np.sort(x), (0,)))


def test_cancellation_leaves_what_is_left():
    x = filled([1e36, 1.0, -1e36, 2.0**-9])
    # 1 is below 2**-46 of the peak.
    assert float(jit_sum(x, (0,))) == 0
    x = filled([2.0**40, 1.0, -(2.0**40), 2.0**-4])
    assert float(jit_sum(x, (0,))) == 1.0625
    assert math.copysign(1, float(jit_sum(filled([-0.0]), (0,)))) == 1


def sum_over_devices(x, num_devices, dims, spec):
    mesh = MeshSpec().build(jax.devices()[:num_devices])
    fn = functools.partial(
        exact_sum,
        dims=dims,
        pmax=lambda x: lax.pmax(x, "fsdp"),
        psum=lambda x: lax.psum(x, "fsdp"),
    )
    return jax.jit(
        jax.shard_map(
            fn, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False
        )
    )(x)


@pytest.mark.parametrize("num_devices", range(1, 9))
def test_no_grouping_over_devices_changes_a_bit(num_devices):
    rng = np.random.default_rng(0)
    scales = 2.0 ** rng.integers(-30, 30, (50, 3))
    x = (rng.normal(size=(50, 3)) * scales).astype(np.float32)
    x[7, 1] = np.nan
    expected = bits(jit_sum(x, (0,)))
    # Other groups, of other sizes, in another order; zeros where there is no more.
    x = x[rng.permutation(50)]
    rows = -(-50 // num_devices) * num_devices
    x = np.concatenate([x, np.zeros((rows - 50, 3), np.float32)])
    found = sum_over_devices(x, num_devices, (0,), PartitionSpec("fsdp"))
    assert bits(found) == expected


@pytest.mark.parametrize(
    "dims", [(0,), (1,), (2,), (0, 1), (2, 0), (0, 1, 2), (), (1, 2)]
)
def test_several_dims_are_summed_as_one(dims):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 9, 5)).astype(np.float32)
    found = np.asarray(jit_sum(x, dims))
    np.testing.assert_allclose(
        found, x.astype(np.float64).sum(axis=dims), rtol=1e-6, atol=1e-7, strict=False
    )
    assert found.dtype == np.float32
    if not dims:
        np.testing.assert_array_equal(found, x)
    last = np.moveaxis(x, dims, range(3 - len(dims), 3))
    flat = last.reshape(*last.shape[: 3 - len(dims)], -1)
    assert bits(found) == bits(jit_sum(flat, (flat.ndim - 1,)))


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((3, 9, 5), (0, 2)), ((8193, 2), (0, 1)), ((2, 8193), (0,)), ((0, 4), (0, 1))],
)
def test_dims_that_are_not_merged_are_summed_to_the_same_bits(shape, dims):
    rng = np.random.default_rng(1)
    scales = 2.0 ** rng.integers(-40, 40, shape)
    x = (rng.normal(size=shape) * scales).astype(np.float32)
    x.flat[-1:] = np.inf
    sums = jax.jit(lambda x: exact_sums([(x, dims), (x, (1,))], merges=False))(x)
    merged = jax.jit(lambda x: exact_sums([(x, dims), (x, (1,))]))(x)
    assert [bits(s) for s in sums] == [bits(s) for s in merged]


def test_each_sum_has_its_own_grid():
    x = np.array([[2.0**100, 2.0**-55], [2.0**99, 2.0**-56]], np.float32)
    np.testing.assert_array_equal(
        jit_sum(x, (0,)), [1.5 * 2.0**100, 1.5 * 2.0**-55], strict=False
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_low_precision_is_summed_in_full(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=500).astype(jnp.dtype(dtype))
    found = jit_sum(x, (0,))
    assert found.dtype == jnp.float32
    exact = math.fsum(x.astype(np.float64))
    assert abs(float(found) - exact) <= error_bound(x, exact)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**120, -(2.0**127)])
def test_what_cannot_be_summed_is_nan_where_it_is(bad):
    x = np.ones((4, 3), np.float32)
    x[2, 1] = bad
    np.testing.assert_array_equal(jit_sum(x, (0,)), np.float32([4, np.nan, 4]))
    assert np.isnan(jit_sum(x, (0, 1)))


def test_the_largest_magnitudes_that_can_be_summed():
    biggest = np.nextafter(np.float32(2.0**120), np.float32(0))
    x = filled([biggest] * 60)
    assert float(jit_sum(x, (0,))) == pytest.approx(60 * float(biggest), rel=1e-6)
    assert is_summable(peak_bits(jnp.float32(biggest)))
    assert not is_summable(peak_bits(jnp.float32(2.0**120)))
    assert not is_summable(peak_bits(jnp.float32(np.inf)))
    assert not is_summable(peak_bits(jnp.float32(np.nan)))


def test_nothing_sums_to_zero():
    assert float(jit_sum(np.zeros(0, np.float32), (0,))) == 0
    found = jit_sum(np.zeros((2, 0), np.float32), (1,))
    np.testing.assert_array_equal(found, np.zeros(2), strict=False)
    assert jit_sum(np.zeros((0, 2), np.float32), (1,)).shape == (0,)


def test_the_smallest_magnitudes_vanish_without_harm():
    tiny = np.float32([1e-45, 1e-40, -1e-38, 0.0])
    assert abs(float(jit_sum(filled(tiny), (0,)))) <= 1e-37
    assert float(jit_sum(filled([1.0, *tiny]), (0,))) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=SIZE))
def test_peak_bits_order_like_magnitudes(values):
    x = filled(values)
    peak = np.asarray(peak_bits(x)).view(np.float32)
    if np.isnan(x).any():
        assert np.isnan(peak)
    else:
        assert peak == np.abs(x).max()


def test_peak_bits_of_dims_and_of_nothing():
    x = np.float32([[1, -3], [2, 0.5]])
    assert np.asarray(peak_bits(x, [1])).view(np.float32).tolist() == [3, 2]
    assert int(peak_bits(jnp.zeros((0,)))) == 0


MAX_ADDENDS = 2**14
COUNTS = [1, 2, 3, 24, 255, 1000, MAX_ADDENDS]


@functools.partial(jax.jit, static_argnums=1)
def limbs_of(x, num_addends, exponent):
    sums = Accumulator(num_addends)

    def add(limbs, row):
        return sums.add(limbs, row, exponent), None

    return lax.scan(add, sums.zeros(x.shape[1:]), x)[0]


@functools.partial(jax.jit, static_argnums=1)
def total_of(limbs, num_addends, exponent):
    return Accumulator(num_addends).total(limbs, exponent)


def accumulate(x, exponent, num_addends=None):
    num_addends = num_addends or len(x)
    limbs = limbs_of(x, num_addends, np.int32(exponent))
    return total_of(limbs, num_addends, np.int32(exponent))


def unit_of(exponent, num_addends):
    """The finest step of the grid, as the docstring has it."""
    return 2.0 ** (exponent - 61 + 2 * math.ceil(math.log2(num_addends)))


@pytest.mark.parametrize("num_addends", COUNTS)
@pytest.mark.parametrize("exponent", [-60, -3, 0, 17, 120])
def test_accumulator_is_close_to_float64(num_addends, exponent):
    rng = np.random.default_rng(num_addends)
    x = rng.uniform(-1, 1, (num_addends, 40)) * 2.0 ** rng.integers(-25, 1, 40)
    x = (x * 2.0**exponent).astype(np.float32)
    found = np.asarray(accumulate(x, exponent), np.float64)
    exact = np.array([math.fsum(column) for column in x.T])
    bound = num_addends * unit_of(exponent, num_addends) + abs(exact) * 2.0**-23
    assert (abs(found - exact) <= bound).all()
    shuffled = accumulate(rng.permutation(x), exponent)
    assert bits(shuffled) == bits(accumulate(x, exponent))


@pytest.mark.parametrize("num_addends", COUNTS)
def test_accumulator_holds_the_largest_addends(num_addends):
    x = np.full((num_addends, 2), BIGGEST) * np.float32([1, -1])
    exact = num_addends * float(BIGGEST)
    np.testing.assert_allclose(accumulate(x, 0), [exact, -exact], rtol=2**-23)


@pytest.mark.parametrize("num_addends", COUNTS)
def test_accumulator_holds_the_largest_low_limbs(num_addends):
    # Halves of the coarse grid's step: ties, which the low limb takes whole.
    high_step = 2.0 ** (math.ceil(math.log2(num_addends)) - 30)
    row = np.float32([0.5, -0.5, 1.5, -1.5, 2.5]) * np.float32(high_step)
    x = np.tile(row, (num_addends, 1))
    np.testing.assert_array_equal(
        accumulate(x, 0), num_addends * row.astype(np.float64), strict=False
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(
        st.floats(-float(BIGGEST), float(BIGGEST), width=32), min_size=8, max_size=8
    ),
    exponent=st.integers(-60, 120),
    cut=st.integers(0, 8),
    num_addends=st.sampled_from([8, 9]),
)
def test_accumulators_of_two_devices_are_added_as_integers(
    values, exponent, cut, num_addends
):
    scale = np.float32(2.0**exponent)
    x = np.array(values, np.float32)[:, None] * scale
    whole = accumulate(x, exponent, num_addends)
    # What a device does not have is as good as zeros.
    mine, yours = x.copy(), x.copy()
    mine[cut:], yours[:cut] = 0, 0
    limbs = [limbs_of(part, num_addends, np.int32(exponent)) for part in (yours, mine)]
    limbs = tuple(np.asarray(a) + np.asarray(b) for a, b in zip(*limbs, strict=True))
    assert bits(total_of(limbs, num_addends, np.int32(exponent))) == bits(whole)
    exact = math.fsum(x[:, 0].astype(np.float64))
    bound = 8 * unit_of(exponent, num_addends) + abs(exact) * 2.0**-23
    assert abs(float(whole[0]) - exact) <= bound


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.floats(-1, 1, width=32), max_size=7),
    peak=st.floats(2.0**-60, 2.0**110, width=32),
)
@example(parts=[2.0**-24, 3 * 2.0**-25, 2.0**-26], peak=1.0)
def test_the_most_addends_keep_the_bits_of_float32(parts, peak):
    x = (filled([1, *parts], 8) * np.float32(peak))[None]
    exponent, _ = next_exponent(jnp.int32(INITIAL_EXPONENT), peak_bits(x))
    found = np.asarray(accumulate(x, exponent, MAX_ADDENDS), np.float64)
    # Half of the last bit of a float32 as large as the peak, but for the rounding of
    # the total itself.
    bound = 2.0**-25 * peak + abs(x[0].astype(np.float64)) * 2.0**-24
    assert (abs(found - x[0]) <= bound).all()


def test_more_addends_are_refused():
    Accumulator(MAX_ADDENDS)
    with pytest.raises(ConfigError, match=r"at most 16384, .*found 16385"):
        Accumulator(MAX_ADDENDS + 1)


def test_accumulator_of_one_addend_returns_it():
    x = np.float32([[0.75, -BIGGEST, 2.0**-31, -(2.0**-31), 3 * 2.0**-31, 2.0**-24]])
    np.testing.assert_array_equal(accumulate(x, 0), x[0])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(exponent=st.integers(-60, 120), value=st.floats(0, 2.0**125, width=32))
def test_next_exponent_holds_the_peak_and_256_times_it(exponent, value):
    found, outgrown = next_exponent(jnp.int32(exponent), peak_bits(np.float32(value)))
    if value == 0 or value >= 2.0**120:
        # Nothing is known, or nothing helps: no second pass.
        assert (int(found), bool(outgrown)) == (exponent, False)
        return
    assert bool(outgrown) == (value >= 2.0**exponent)
    assert value < 2.0 ** int(found)
    assert -60 <= int(found) <= 120
    room = int(found) - (math.frexp(value)[1])
    assert room == 8 or int(found) == 120 or (room > 8 and int(found) == -52)
    # The grid that was chosen is not outgrown by what chose it.
    assert not next_exponent(found, peak_bits(np.float32(value)))[1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_next_exponent_learns_nothing_from_what_is_not_finite(value):
    found, outgrown = next_exponent(jnp.int32(7), peak_bits(np.float32(value)))
    assert (int(found), bool(outgrown)) == (7, False)


def test_the_initial_grid_is_outgrown_by_any_real_gradient():
    initial = jnp.int32(INITIAL_EXPONENT)
    for value in (1e-12, 1.0, 1e12):
        found, outgrown = next_exponent(initial, peak_bits(np.float32(value)))
        assert outgrown
        assert value < 2.0 ** int(found)
    assert not next_exponent(initial, peak_bits(np.float32(1e-20)))[1]
