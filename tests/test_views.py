import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import DTYPES, Recorded, bits, random_array

from shardkit.checkpoint.layout_views import (
    ConcatView,
    FillView,
    IndexView,
    SliceView,
    StackView,
    TransposeView,
)
from shardkit.checkpoint.reshape_view import ReshapeView
from shardkit.checkpoint.value_views import (
    CastView,
    EqualView,
    MeanView,
    NormalView,
    is_lossless,
    round_once,
)
from shardkit.checkpoint.views import (
    ArrayView,
    as_dtype,
    box_shape,
    box_slices,
    iter_boxes,
    whole_box,
)
from shardkit.errors import ConfigError, RestoreError

MODULES = "views layout_views reshape_view value_views remap merge remap_toml"
shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)
properties = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def boxes_of(draw, shape):
    edges = (draw(st.tuples(st.integers(0, n), st.integers(0, n))) for n in shape)
    return tuple((min(pair), max(pair)) for pair in edges)


@st.composite
def reshapes(draw):
    """A shape, and another with as many elements."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 5]), max_size=6))
    cuts = [sorted(draw(st.lists(st.integers(0, len(factors)), max_size=4)))] * 2
    cuts[1] = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=4)))
    return tuple(
        tuple(
            math.prod(factors[a:b])
            for a, b in zip([0, *cut], [*cut, len(factors)], strict=True)
        )
        for cut in cuts
    )


@properties
@given(shapes, st.sampled_from([1, 2, 8]), st.integers(1, 400))
def test_boxes_tile_a_shape_once_and_in_order(shape, itemsize, limit_bytes):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    boxes = list(iter_boxes(shape, itemsize, limit_bytes))
    seen = [n for box in boxes for n in numbers[box_slices(box)].ravel().tolist()]
    assert seen == list(range(numbers.size))
    largest = max(math.prod(box_shape(box)) * itemsize for box in boxes)
    assert largest <= max(limit_bytes, itemsize)


def test_boxes_are_as_large_as_the_limit_allows():
    assert len(list(iter_boxes((1000, 10), 4, 40 * 100))) == 10
    assert list(iter_boxes((), 4, 1)) == [()]
    assert not list(iter_boxes((3, 0), 4, 100))


@properties
@given(reshapes(), st.sampled_from(DTYPES), st.sampled_from([0, 16, 2**20]), st.data())
def test_reshape_reads_what_numpy_would(shapes, dtype, scratch_bytes, data):
    source, target = shapes
    array = random_array(source, dtype)
    recorded = Recorded(array)
    view = ReshapeView(recorded, target, scratch_bytes)
    box = data.draw(boxes_of(target))
    found = view.read(box)
    assert found.flags.c_contiguous
    assert bits(found) == bits(array.reshape(target)[box_slices(box)])
    if scratch_bytes == 0:
        assert recorded.num_bytes <= 2 * found.nbytes


def test_a_narrow_box_of_a_reshaped_matrix_reads_little_at_once():
    array = np.arange(2**22, dtype=np.float32)
    recorded = Recorded(array)
    view = ReshapeView(recorded, (2048, 2048))
    assert (view.read(((0, 2048), (7, 8)))[:, 0] == array[7::2048]).all()
    largest = max(math.prod(box_shape(box)) * 4 for box in recorded.boxes)
    assert largest <= 256 * 1024
    assert recorded.num_bytes <= array.nbytes
    # Heads of a projection lie densely: half of each row is read in one go.
    recorded = Recorded(array.reshape(2048, 2048))
    heads = ReshapeView(recorded, (2048, 16, 128))
    heads.read(((0, 2048), (0, 8), (0, 128)))
    assert recorded.boxes == [((0, 2048), (0, 1024))]


def chain(data, array, view):
    """Applies one random operation to an array, and to a view of it."""
    ndim = array.ndim
    kinds = ["stack", "reshape", "average"]
    kinds += ["transpose", "slice", "index", "concat", "pad"] if ndim else []
    kind = data.draw(st.sampled_from(kinds))
    dim = data.draw(st.integers(0, ndim - 1)) if ndim else 0
    size = array.shape[dim] if ndim else 0
    match kind:
        case "transpose":
            dims = data.draw(st.permutations(range(ndim)))
            return array.transpose(dims), TransposeView(view, dims)
        case "slice":
            ((start, stop),) = data.draw(boxes_of((size,)))
            rows = (slice(None),) * dim + (slice(start, stop),)
            return array[rows], SliceView(view, dim, start, stop)
        case "index" if size:
            index = data.draw(st.integers(0, size - 1))
            return array.take(index, dim), IndexView(view, dim, index)
        case "concat":
            return np.concatenate([array] * 2, dim), ConcatView([view] * 2, dim)
        case "pad":
            shape = [*array.shape[:dim], 2, *array.shape[dim + 1 :]]
            fill = np.full(shape, 1, array.dtype)
            padded = ConcatView([view, FillView(shape, array.dtype, 1)], dim)
            return np.concatenate([array, fill], dim), padded
        case "reshape":
            shape = (*array.shape[: dim + 1][::-1], *array.shape[dim + 1 :])
            return array.reshape(shape), ReshapeView(view, shape, 8)
        case "stack":
            return np.stack([array] * 2, dim), StackView([view] * 2, dim)
        case _:
            return array, EqualView([view, view])


@properties
@given(shapes, st.sampled_from(DTYPES), st.integers(1, 5), st.data())
def test_chains_of_views_are_chains_of_arrays(shape, dtype, length, data):
    array = random_array(shape, dtype)
    view = ArrayView(array)
    for _ in range(length):
        array, view = chain(data, array, view)
    assert (view.shape, view.dtype) == (array.shape, array.dtype)
    assert view.nbytes == array.nbytes
    box = data.draw(boxes_of(array.shape))
    found = view.read(box)
    assert found.flags.c_contiguous
    assert bits(found) == bits(array[box_slices(box)])


@pytest.mark.parametrize("dims", [(1, 0, 2), (2, 1, 0), (0, 2, 1), (2, 0, 1)])
def test_large_transposes_are_copied_in_tiles(dims):
    array = np.arange(70 * 33 * 130, dtype=np.int32).reshape(70, 33, 130)
    found = TransposeView(ArrayView(array), dims).read(
        whole_box(array.transpose(dims).shape)
    )
    assert found.flags.c_contiguous
    assert (found == array.transpose(dims)).all()


@properties
@given(shapes.filter(bool), st.data())
def test_what_moves_elements_reads_no_others(shape, data):
    array = random_array(shape, "float32")
    recorded = Recorded(array)
    view = ConcatView([TransposeView(recorded, range(len(shape)))] * 2, 0)
    view = StackView([view, view], 0)
    box = data.draw(boxes_of(view.shape))
    view.read(box)
    assert recorded.num_bytes == math.prod(box_shape(box)) * 4


def exact_rounding(value, dtype):
    """The nearest number of a small dtype, ties to even, by looking at all of them."""
    numbers = np.arange(2 ** (8 * dtype.itemsize)).astype(f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        table = numbers.view(dtype).astype(np.float64)
        finite = np.isfinite(table) & (np.signbit(table) == np.signbit(value))
        distance = np.where(finite, np.abs(table - value), np.inf)
    nearest = np.flatnonzero(distance == distance.min())
    return numbers[
        nearest[numbers[nearest] % 2 == 0][0] if len(nearest) > 1 else nearest
    ]


@properties
@given(
    st.sampled_from(["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16"]),
    st.floats(-400, 400),
    st.sampled_from([0.0, 2.0**-40, -(2.0**-40)]),
)
def test_float64_is_rounded_once(dtype, value, nudge):
    dtype = as_dtype(dtype)
    number = float(np.array(value).astype(dtype))
    bits = int(np.array(value).astype(dtype).view(f"u{dtype.itemsize}"))
    above = float(np.array(bits + 1, f"u{dtype.itemsize}").view(dtype))
    if math.isfinite(above):
        # Next to a tie, where rounding twice goes wrong.
        value = (number + above) / 2 * (1 + nudge)
    found = round_once(np.array([value]), dtype).view(f"u{dtype.itemsize}")
    assert found == exact_rounding(value, dtype)


def test_rounding_keeps_what_is_no_number():
    found = round_once(np.array([np.nan, np.inf, -np.inf, -0.0]), as_dtype("bfloat16"))
    assert np.isnan(found[0])
    assert found[1:].astype(float).tolist() == [np.inf, -np.inf, 0.0]
    assert np.signbit(found.astype(float))[3]


@properties
@given(
    shapes,
    st.sampled_from(["float32", "bfloat16", "float8_e4m3fn", "float64"]),
    st.lists(st.floats(0.01, 10), min_size=1, max_size=4),
)
def test_means_are_those_of_float64(shape, dtype, weights):
    dtype = as_dtype(dtype)
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=shape).astype(dtype) for _ in weights]
    view = MeanView([ArrayView(array) for array in arrays], weights)
    found = view.read(whole_box(shape)).astype(np.float64)
    wide = [array.astype(np.float64) for array in arrays]
    expected = np.average(wide, axis=0, weights=weights)
    rounding = 2.0 ** -(ml_dtypes.finfo(dtype).nmant + 1)
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    error = np.abs(found - expected)
    assert (error <= rounding * np.abs(expected) + smallest + 1e-14).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "float64"])
def test_means_of_equals_keep_every_bit(dtype):
    array = random_array((64, 64), dtype)
    view = MeanView([ArrayView(array)] * 3, [0.1, 0.7, 0.3])
    assert bits(view.read(whole_box(array.shape))) == bits(array)


def test_means_do_not_depend_on_the_boxes_nor_read_what_weighs_nothing():
    arrays = [random_array((40, 8), "bfloat16", seed) for seed in range(3)]
    view = MeanView([ArrayView(array) for array in arrays], [1, 2, 4])
    whole = view.read(whole_box(view.shape))
    for box in iter_boxes(view.shape, 2, 50):
        assert bits(view.read(box)) == bits(whole[box_slices(box)])
    unread = Recorded(np.full(3, np.inf, np.float32))
    ones = ArrayView(np.ones(3, np.float32))
    assert MeanView([ones, unread], [1, 0]).read(((0, 3),)).tolist() == [1, 1, 1]
    assert not unread.boxes


def test_copies_have_to_agree():
    one, other = ArrayView(np.int32([1, 2])), ArrayView(np.int32([1, 3]))
    assert EqualView([one, one]).read(((0, 2),)).tolist() == [1, 2]
    with pytest.raises(RestoreError, match="1 of 2 elements of copy 1 of a leaf int32"):
        EqualView([one, other]).read(((0, 2),))
    zeros = [ArrayView(np.float32([zero])) for zero in (0.0, -0.0)]
    with pytest.raises(RestoreError):
        EqualView(zeros).read(((0, 1),))


def test_casts_lose_no_numbers_silently():
    bf16 = as_dtype("bfloat16")
    view = CastView(ArrayView(np.float32([1e30, 1.00390625])), bf16)
    assert view.read(((1, 2),)).astype(float).tolist() == [1.0]
    large = CastView(ArrayView(np.float32([1, 1e30])), as_dtype("float16"))
    assert large.read(((0, 1),)).tolist() == [1]
    with pytest.raises(RestoreError, match="1 of 2 values are too large for float16"):
        large.read(((0, 2),))
    for source, target in [("float32", "int32"), ("int32", "int8"), ("int8", "uint8")]:
        with pytest.raises(ConfigError, match=f"{source} cannot be cast to {target}"):
            CastView(ArrayView(np.zeros(1, source)), as_dtype(target))
    wide = CastView(ArrayView(np.array([-8, 7], "int4")), np.dtype("int32"))
    assert wide.read(((0, 2),)).tolist() == [-8, 7]


def test_what_is_lossless():
    names = ["float8_e4m3fn", "bfloat16", "float32", "float64"]
    dtypes = [as_dtype(name) for name in names]
    for low, small in enumerate(dtypes):
        for high, large in enumerate(dtypes):
            assert is_lossless(small, large) == (low <= high)
    assert not is_lossless(as_dtype("float16"), as_dtype("bfloat16"))


def test_values_that_do_not_fit_are_refused():
    assert FillView((1,), as_dtype("bfloat16"), 0.1).read(((0, 1),)).shape == (1,)
    for dtype, value in [("int32", 0.5), ("uint8", -1), ("float8_e5m2", 1e9)]:
        with pytest.raises(ConfigError, match=f"{dtype} cannot hold"):
            FillView((1,), as_dtype(dtype), value)


def test_normal_numbers_are_normal_and_know_their_place():
    view = NormalView((100, 300), np.dtype("float32"), 2.0, 7, "params/w")
    whole = view.read(whole_box(view.shape))
    for box in iter_boxes(view.shape, 4, 999):
        assert bits(view.read(box)) == bits(whole[box_slices(box)])
    assert abs(whole.mean()) < 0.05
    assert abs(whole.std() - 2) < 0.05
    assert len(np.unique(whole)) > 29_000
    for seed, name in [(8, "params/w"), (7, "params/v")]:
        other = NormalView((100, 300), np.dtype("float32"), 2.0, seed, name)
        found = other.read(whole_box(view.shape))
        assert abs(np.corrcoef(found.ravel(), whole.ravel())[0, 1]) < 0.05


def test_dtypes_are_those_that_arrays_can_have():
    for name in DTYPES:
        assert as_dtype(name).name == name
    for name in ["float33", "object", "O", "finfo", "<f4", "str", "i4, f4", ""]:
        with pytest.raises(ConfigError, match="expected the name of a dtype"):
            as_dtype(name)


def test_none_of_it_needs_jax():
    names = ", ".join(f"shardkit.checkpoint.{name}" for name in MODULES.split())
    code = f"import sys, {names}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
