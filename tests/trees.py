"""Random arrays, trees of them, and views that know what was read."""

import math

import numpy as np

from shardkit.checkpoint.views import (
    ArrayView,
    View,
    as_bits,
    as_dtype,
    box_shape,
    box_slices,
    whole_box,
)

DTYPES = ["float32", "bfloat16", "int32", "float8_e4m3fn", "int4", "bool", "float64"]


class Recorded(View):
    """Counts what is read of an array."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.boxes = []

    def read(self, box):
        assert all(0 <= a <= b <= n for (a, b), n in zip(box, self.shape, strict=True))
        self.boxes.append(box)
        return np.ascontiguousarray(self.array[box_slices(box)]).reshape(box_shape(box))

    @property
    def num_bytes(self):
        sizes = (math.prod(box_shape(box)) for box in self.boxes)
        return sum(sizes) * self.dtype.itemsize


def bits(array):
    return array.shape, array.dtype, as_bits(array).tolist()


def random_array(shape, dtype, seed=0):
    """Any bits that the dtype has, NaNs included."""
    dtype = as_dtype(dtype)
    generator = np.random.default_rng(seed)
    if dtype.name in ("int4", "bool"):
        return generator.integers(0, 2, shape).astype(dtype)
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(generator.bytes(size), dtype).reshape(shape)


def tree_of(**shapes):
    """A tree of random arrays by paths in which `__` stands for `/`."""
    return {
        path.replace("__", "/"): random_array(shape, "float32", seed)
        for seed, (path, shape) in enumerate(shapes.items())
    }


def views(arrays):
    return {path: ArrayView(array) for path, array in arrays.items()}


def read(tree):
    return {path: view.read(whole_box(view.shape)) for path, view in tree.items()}


def same(found, expected):
    assert {path: bits(a) for path, a in found.items()} == {
        path: bits(np.ascontiguousarray(a)) for path, a in expected.items()
    }


def layers(num, *shape, dtype="float32", root="params"):
    return {
        f"{root}/layers/{i}/{name}": random_array(shape, dtype, 10 * i + k)
        for i in range(num)
        for k, name in enumerate("qkv")
    }


def adam(arrays, *names):
    return {
        path.replace("params", name, 1): random_array(array.shape, "float32", n)
        for n, name in enumerate(names)
        for path, array in arrays.items()
    }
