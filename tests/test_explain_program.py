"""What is said of hand-written programs whose collectives are known."""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import shardkit as sk
from shardkit.explain.exchanges import place_of
from shardkit.hlo import find_collectives
from shardkit.hlo.text import Frame
from shardkit.labels import label

SIZES = {"data": 2, "tensor": 4}
P = PartitionSpec


@pytest.fixture(scope="module")
def mesh(devices):
    axes = (AxisType.Auto, AxisType.Auto)
    return Mesh(np.array(devices).reshape(2, 4), tuple(SIZES), axis_types=axes)


@pytest.fixture(scope="module")
def explain(mesh):
    """Compiles a function of float32 arrays, and explains it."""

    def run(fn, *args, out=None):
        abstract = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, spec, dtype in (
                (*arg, jnp.float32) if len(arg) == 2 else arg for arg in args
            )
        ]
        options = {} if out is None else {"out_shardings": NamedSharding(mesh, out)}
        compiled = jax.jit(fn, **options).lower(*abstract).compile()
        found = sk.explain_program(compiled, mesh)
        agrees_with_find_collectives(found, compiled.as_text())
        return found

    return run


def agrees_with_find_collectives(found, text):
    totals = {}
    for each in found.exchanged:
        key = each.kind, each.exchange.note
        count, num_bytes = totals.get(key, (0, 0))
        totals[key] = count + each.exchange.count, num_bytes + each.num_bytes
        assert sum(part.num_bytes for part in each.parts) == each.exchange.num_bytes
    expected = {
        (c.kind, c.note): (c.count, c.num_bytes) for c in find_collectives(text)
    }
    assert totals == expected


def line_of(fn, words):
    """Where in this file a function has a line with these words."""
    lines, first = inspect.getsourcelines(fn)
    [at] = [n for n, line in enumerate(lines) if words in line]
    return f"{__file__}:{first + at}"


def matmul(x, w):
    return jnp.tanh(x @ w)


def mlp(x, up, down):
    hidden = jnp.tanh(x @ up)
    hidden = hidden * 2
    return hidden @ down


def look_up(table, ids):
    return table[ids]


def shift(x):
    return jnp.roll(x, 1, axis=0)


def plus_one(x):
    return x + 1


def sine(x):
    return jnp.sin(x)


def scan(x, ws):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, ws)[0]


X, W, UP, DOWN = (64, 32), (32, 16), (32, 128), (128, 16)
DATA, TENSOR = P("data", None), P(None, "tensor")

# Function, arguments, result's sharding → collectives: kind, axes, count, bytes of
# each, cause, names, and words of the line that is to blame.
KNOWN = {
    "a weight is needed whole": (
        (matmul, (X, DATA), (W, P("tensor", None))),
        DATA,
        [("all-gather", "tensor", 1, 32 * 16 * 4, "resharding", ["w"], "x @ w")],
    ),
    "rows of a product": (
        (matmul, (X, P("data", "tensor")), (W, P("tensor", None))),
        None,
        [("all-reduce", "tensor", 1, 32 * 16 * 4, "partial", ["x", "w"], "x @ w")],
    ),
    "column, then row": (
        (mlp, (X, DATA), (UP, TENSOR), (DOWN, P("tensor", None))),
        DATA,
        [("all-reduce", "tensor", 1, 32 * 16 * 4, "partial", None, "hidden @ down")],
    ),
    "a result is asked for whole": (
        (plus_one, (X, DATA)),
        P(),
        [("all-gather", "data", 1, 64 * 32 * 4, "resharding", ["x"], "x + 1")],
    ),
    "another dim": (
        (sine, (X, P("tensor", None))),
        TENSOR,
        [("all-to-all", "tensor", 1, 16 * 32 * 4, "resharding", ["x"], "jnp.sin")],
    ),
    "axes in another order": (
        (plus_one, (X, P(("data", "tensor")))),
        P(("tensor", "data")),
        [
            (
                "collective-permute",
                "data tensor",
                1,
                8 * 32 * 4,
                "resharding",
                ["x"],
                None,
            )
        ],
    ),
    "a shift along a cut dim": (
        (shift, (X, P("tensor", None))),
        None,
        [("collective-permute", "tensor", 1, 32 * 4, "resharding", ["x"], "jnp.roll")],
    ),
    "rows of a table": (
        (look_up, (X, P("tensor", None)), ((8,), P(), jnp.int32)),
        None,
        [("all-reduce", "tensor", 1, 8 * 32 * 4, "lookup", ["table"], "table[ids]")],
    ),
    "in a loop": (
        (scan, (X, P("data", "tensor")), ((5, 32, 32), P(None, "tensor", None))),
        DATA,
        [
            ("all-reduce", "tensor", 5, 32 * 32 * 4, "partial", ["x", "ws"], "c @ w"),
            ("all-gather", "tensor", 1, 32 * 32 * 4, "resharding", None, None),
        ],
    ),
    "nothing": ((matmul, (X, DATA), (W, P())), None, []),
}


@pytest.mark.parametrize("case", KNOWN)
def test_collectives_have_axes_bytes_causes_and_lines(case, explain):
    (fn, *args), out, expected = KNOWN[case]
    found = explain(fn, *args, out=out).exchanged
    for each, want in zip(found, expected, strict=True):
        kind, axes, count, num_bytes, cause, names, words = want
        assert (each.kind, str(each.span)) == (kind, axes)
        assert (each.exchange.count, each.exchange.num_bytes) == (count, num_bytes)
        [part] = each.parts
        assert part.cause == cause
        assert names is None or list(part.names) == names
        if words is not None:
            assert part.source == line_of(fn, words)


def test_an_explicit_collective_is_the_programs_own(explain, mesh):
    def body(x):
        return lax.psum(lax.all_gather(x, "tensor", tiled=True), "data")

    fn = jax.shard_map(
        body, mesh=mesh, in_specs=P("tensor"), out_specs=P(), check_vma=False
    )
    found = explain(fn, (X, P("tensor")))
    assert [(e.kind, str(e.span)) for e in found.exchanged] == [
        ("all-gather", "tensor"),
        ("all-reduce", "data"),
    ]
    assert [p.cause for e in found.exchanged for p in e.parts] == ["program"] * 2
    assert [p.operation for e in found.exchanged for p in e.parts] == [
        "all_gather",
        "psum",
    ]
    assert not found.reshardings
    assert "the program's own (psum)" in str(found)


# The remedy that is told, and the program after it.
REMEDIES = {
    "a weight": (
        (matmul, (X, DATA), (W, P("tensor", None))),
        DATA,
        "annotate w: P(None, None) in place of P('tensor', None), ×4 the memory",
        (matmul, (X, DATA), (W, P(None, None))),
        DATA,
    ),
    "two columns": (
        (mlp, (X, DATA), (UP, TENSOR), (DOWN, TENSOR)),
        P("data", "tensor"),
        "the cut comes with up P(None, 'tensor'): leave that dim whole; or cut down "
        "(now P(None, 'tensor')) by tensor along the dim that is summed over, so that "
        "partial results are added instead",
        (mlp, (X, DATA), (UP, TENSOR), (DOWN, P("tensor", None))),
        DATA,
    ),
    "two columns, the first whole": (
        (mlp, (X, DATA), (UP, TENSOR), (DOWN, TENSOR)),
        P("data", "tensor"),
        "leave that dim whole",
        (mlp, (X, DATA), (UP, P()), (DOWN, TENSOR)),
        P("data", "tensor"),
    ),
    "a result": (
        (plus_one, (X, DATA)),
        P(),
        "out_shardings: let data cut dim 0 of this result",
        (plus_one, (X, DATA)),
        P("data"),
    ),
    "another dim": (
        (sine, (X, P("tensor", None))),
        TENSOR,
        "annotate x: P(None, 'tensor') in place of P('tensor', None)",
        (sine, (X, TENSOR)),
        TENSOR,
    ),
    "an order": (
        (plus_one, (X, P(("data", "tensor")))),
        P(("tensor", "data")),
        "name the axes in one order, in all annotations of it: data tensor",
        (plus_one, (X, P(("tensor", "data")))),
        P(("tensor", "data")),
    ),
    "a shift": (
        (shift, (X, P("tensor", None))),
        None,
        "leave whole the dim along which that works, which tensor cuts",
        (shift, (X, TENSOR)),
        None,
    ),
}


@pytest.mark.parametrize("case", REMEDIES)
def test_the_annotation_that_is_told_removes_the_resharding(case, explain):
    before, out, words, after, better_out = REMEDIES[case]
    [told] = explain(before[0], *before[1:], out=out).reshardings
    assert words in told.remedy
    assert not explain(after[0], *after[1:], out=better_out).reshardings


def test_of_text_alone_the_same_collectives_are_told(mesh):
    x = jax.ShapeDtypeStruct(X, jnp.float32, sharding=NamedSharding(mesh, DATA))
    w = jax.ShapeDtypeStruct(
        W, jnp.float32, sharding=NamedSharding(mesh, P("tensor", None))
    )
    out = NamedSharding(mesh, DATA)
    compiled = jax.jit(matmul, out_shardings=out).lower(x, w).compile()
    whole = sk.explain_program(compiled, mesh)
    told = sk.explain_program(compiled.as_text(), SIZES, names={"w": "the weight"})
    [known], [found] = whole.exchanged, told.exchanged
    assert (found.kind, found.span, found.num_bytes) == (
        known.kind,
        known.span,
        known.num_bytes,
    )
    [resharding] = told.reshardings
    assert (
        "the weight, cut by tensor, is needed whole by dot_general" in resharding.what
    )
    assert resharding.remedy == "leave whole the dim of it that tensor cuts"
    assert told.arguments[0].spec is None
    assert told.memory.temp_bytes is None


def test_arguments_that_are_not_used_are_left_out(explain):
    found = explain(lambda unused, x: x * 2, ((4,), P()), (X, DATA))
    [argument] = found.arguments
    assert (argument.name, argument.shape) == ("x", X)
    assert argument.spec == (("data",), ())
    assert argument.num_bytes == 32 * 32 * 4


def test_frames_are_those_of_the_call(explain):
    def inner(x):
        return lax.psum(x, "tensor")

    def outer(x):
        return inner(x) * 2

    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), tuple(SIZES))
    fn = jax.shard_map(outer, mesh=mesh, in_specs=P("tensor"), out_specs=P())
    compiled = jax.jit(fn).lower(jnp.ones(8)).compile()
    [each] = sk.explain_program(compiled, mesh).exchanged
    frames = each.parts[0].frames
    lines = [f"{frame.file}:{frame.line}" for frame in frames[:2]]
    assert lines == [line_of(inner, "psum"), line_of(outer, "inner(x)")]
    assert frames[0].function.endswith("inner")


def test_the_line_is_that_of_the_model_wherever_shardkit_is():
    """Its own lines are short; of what a model calls the line of the call is told."""
    home = Path(sk.__file__).parents[1]
    step = Frame(f"{home}/shardkit/gradient.py", 5)
    user, flax = Frame("net.py", 7), Frame("/x/site-packages/flax/linen.py", 3)
    called = Frame(f"{home}/shardkit/logical_axes.py", 9)
    assert place_of([step, user]) == "shardkit/gradient.py:5"
    assert place_of([called, flax, user, step]) == "net.py:7"
    assert place_of([called]) == "shardkit/logical_axes.py:9"
    assert place_of([flax]) == "/x/site-packages/flax/linen.py:3"
    assert place_of([]) == ""


def test_older_text_has_its_lines_in_the_instructions():
    text = """
ENTRY %main (x: f32[4]) -> f32[16] {
  %x = f32[4]{0} parameter(0), metadata={op_name="p[\\'w\\']"}
  ROOT %all = f32[16]{0} all-gather(%x), replica_groups={{0,1,2,3}}, METADATA
}
"""
    metadata = (
        r"""op_name="jit(f)/dot_general" source_file="a \"b\".py" source_line=7"""
    )
    text = text.replace("METADATA", f"dimensions={{0}}, metadata={{{metadata}}}")
    found = sk.explain_program(text, {"data": 1, "tensor": 4})
    [each] = found.exchanged
    assert each.parts[0].source == 'a "b".py:7'
    assert each.parts[0].names == ("p['w']",)
    assert each.span.axes == ("tensor",)


def test_beside_a_labelled_collective_what_the_partitioner_adds_is_told(mesh):
    """Manual over one axis, with the other left to the compiler, as a step can be."""

    def step(x, up, down):
        with label("gather", ["params/up"]):
            up = lax.all_gather(up, "data", tiled=True)
        hidden = jnp.tanh(x @ up)
        out = hidden @ down
        with label("metrics"):
            return lax.psum((out * out).sum(), "data")

    fn = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P("data"), P("data"), P()),
        out_specs=P(),
        axis_names={"data"},
        check_vma=False,
    )
    specs = (X, DATA), (UP, P("data", "tensor")), (DOWN, TENSOR)
    abstract = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in specs
    ]
    found = sk.explain_program(jax.jit(fn).lower(*abstract).compile(), mesh)
    told = {(e.kind, str(e.span), p.cause) for e in found.exchanged for p in e.parts}
    assert told == {
        ("all-gather", "data", "gather"),
        ("all-gather", "tensor", "resharding"),
        ("all-reduce", "tensor", "partial"),
        ("all-reduce", "data", "metrics"),
    }
    [gather] = [e for e in found.exchanged if e.parts[0].cause == "gather"]
    assert gather.parts[0].names == ("params/up",)
    remedies = [each.remedy for each in found.reshardings]
    assert any("cut down (now P(None, 'tensor')) by tensor" in x for x in remedies)
    assert all("up P('data', 'tensor')" in x or "up: P('data'" in x for x in remedies)
