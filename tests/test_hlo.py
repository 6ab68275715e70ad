"""Collectives counted in the text of compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from shardkit.hlo import Collective, find_collectives, shape_bytes

GROUP = 4
FLOATS = 12


def compile_spmd(fn, devices):
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, GROUP), ("outer", "inner"))
    spec = PartitionSpec("inner")
    spmd = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=(spec, PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )

    def abstract(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    x = abstract((GROUP * FLOATS,), jnp.float32, spec)
    n = abstract((), jnp.int32, PartitionSpec())
    return jax.jit(spmd).lower(x, n).compile()


def repeat(body, num_passes):
    return lambda x, n: lax.fori_loop(0, num_passes or n, body, x)


def shift(x, _=None):
    return lax.ppermute(x, "inner", [(i, (i + 1) % GROUP) for i in range(GROUP)])


def add_all(_, x):
    return lax.psum(jnp.sin(x), "inner")


def scan_of_loops(x, n):
    def body(x, _):
        return lax.fori_loop(0, 3, add_all, x), None

    return lax.scan(body, x, None, length=7)[0]


PIECE, WHOLE = 4 * FLOATS, 4 * FLOATS * GROUP
CASES = {
    "gather": (
        lambda x, n: lax.all_gather(x, "inner", tiled=True),
        [("all-gather", 1, WHOLE, "")],
    ),
    "sum": (lambda x, n: lax.psum(x, "outer"), [("all-reduce", 1, PIECE, "")]),
    "scatter": (
        lambda x, n: lax.psum_scatter(x, "inner", tiled=True),
        [("reduce-scatter", 1, PIECE, "")],
    ),
    "exchange": (
        lambda x, n: lax.all_to_all(x, "inner", 0, 0, tiled=True),
        [("all-to-all", 1, PIECE, "")],
    ),
    "shift": (shift, [("collective-permute", 1, PIECE, "")]),
    "known loop": (repeat(add_all, 5), [("all-reduce", 5, 5 * PIECE, "")]),
    "loop in loop": (scan_of_loops, [("all-reduce", 21, 21 * PIECE, "")]),
    "unknown loop": (
        repeat(add_all, None),
        [("all-reduce", 1, PIECE, "per pass of a loop")],
    ),
    "branch": (
        lambda x, n: lax.cond(n > 3, lambda: lax.psum(x, "inner"), lambda: x * 2),
        [("all-reduce", 1, PIECE, "if a branch is taken")],
    ),
    "two and one": (
        lambda x, n: shift(lax.psum(jnp.sin(lax.psum(x, "inner")), "outer")),
        [("all-reduce", 2, 2 * PIECE, ""), ("collective-permute", 1, PIECE, "")],
    ),
    "none": (lambda x, n: x * n, []),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_known_of_a_program_is_found_in_it(case, devices):
    fn, expected = CASES[case]
    found = find_collectives(compile_spmd(fn, devices).as_text())
    assert [(c.kind, c.count, c.num_bytes, c.note) for c in found] == expected


ASYNCHRONOUS = """
HloModule jit_f

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%scatter (p: bf16[64]) -> bf16[8] {
  %p = bf16[64]{0:T(256)(2,1)} parameter(0)
  ROOT %piece = bf16[8]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

ENTRY %main (a: f32[4], b: bf16[64]) -> (f32[32], bf16[8]) {
  %a = f32[4]{0} parameter(0)
  %b = bf16[64]{0} parameter(1)
  %gather-start = (f32[4]{0}, f32[32]{0}) all-gather-start(%a), metadata={op_name="f(("}
  %gather = f32[32]{0} all-gather-done(%gather-start)
  %s = ((bf16[64]{0}), bf16[8]{0}, u32[]) async-start(%b), calls=%scatter
  %u = ((bf16[64]{0}), bf16[8]{0}, u32[]) async-update(%s), calls=%scatter
  %d = bf16[8]{0} async-done(%u), calls=%scatter
  %p = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(f32[4] %a)
  ROOT %out = (f32[32]{0}, /*index=1*/bf16[8]{0}) tuple(%gather, %d)
}
"""


def test_what_is_asynchronous_is_counted_once():
    assert find_collectives(ASYNCHRONOUS) == (
        Collective(kind="all-gather", count=1, num_bytes=128),
        Collective(kind="collective-permute", count=1, num_bytes=16),
        Collective(kind="reduce-scatter", count=1, num_bytes=128),
    )


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [
        ("f8e4m3fn[3,5]{1,0}", 15),
        ("c64[2]", 16),
        ("u4[5]{0:E(4)}", 3),
        ("token[]", 0),
        ("(bf16[<=3], pred[2])", 8),
    ],
)
def test_bytes_of_shapes(shape, num_bytes):
    assert shape_bytes(shape) == num_bytes
