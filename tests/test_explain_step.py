"""What is said of a trainer's own step: causes, leaves, memory."""

import math

import jax
import numpy as np
import pytest
from problems import linear

import shardkit as sk
from shardkit.explain.leaves import idle_slots, place_leaves
from shardkit.hlo import find_collectives, parse_module
from shardkit.hlo.flow import Flow, Value
from shardkit.labels import label, read_label
from shardkit.layout import LeafLayout
from shardkit.places import Places

FLOAT = np.dtype("float32")


@pytest.fixture(scope="module")
def compiled(devices):
    """The step of a small problem on data=2 × fsdp=4."""
    problem = {**linear(), "mesh": sk.MeshSpec(data=2, fsdp=4)}
    with sk.Trainer(**problem) as trainer:
        return trainer.inspect()["step"].compiled, trainer.layout


@pytest.fixture(scope="module")
def explained(compiled):
    step, _ = compiled
    mesh = jax.tree.leaves(step.input_shardings)[0].mesh
    return sk.explain_program(step, mesh)


def test_bytes_are_those_of_find_collectives(compiled, explained):
    kinds = find_collectives(compiled[0].as_text())
    assert {c.kind for c in kinds} >= {"all-gather", "reduce-scatter", "all-reduce"}
    for kind in kinds:
        own = [
            x
            for x in explained.exchanged
            if (x.kind, x.exchange.note) == (kind.kind, kind.note)
        ]
        assert sum(x.num_bytes for x in own) == kind.num_bytes
        assert sum(x.exchange.count for x in own) == kind.count


def test_every_collective_of_a_step_has_a_purpose(compiled, explained):
    _, leaves = compiled
    cut = [x.path for x in leaves if x.path.startswith("params/") and x.dim >= 0]
    whole = [x.path for x in leaves if x.path.startswith("params/") and x.dim < 0]
    assert cut
    by_cause = {}
    for each in explained.exchanged:
        for part in each.parts:
            by_cause.setdefault(part.cause, []).append((each, part))
    assert not by_cause.keys() & {"program", "partial", "lookup", "resharding"}
    assert not explained.reshardings
    [(gather, part)] = by_cause["gather"]
    assert (gather.kind, gather.span.axes) == ("all-gather", ("fsdp",))
    assert list(part.names) == cut
    scattered = [(e, p) for e, p in by_cause["sum"] if e.kind == "reduce-scatter"]
    assert [list(p.names) for _, p in scattered] == [cut]
    added = [p for e, p in by_cause["sum"] if e.span.axes == ("data", "fsdp")]
    assert [list(p.names) for p in added] == ([whole] if whole else [])
    assert by_cause["metrics"]
    assert all(part.source for parts in by_cause.values() for _, part in parts)


def test_what_a_label_says_is_what_travels(compiled):
    """The names of a gather, beside where its operand comes from in the text."""
    step, leaves = compiled
    module = parse_module(step.as_text())
    flow = Flow(module)
    names = {}
    flat = jax.tree_util.tree_flatten_with_path(step.args_info)[0]
    for (path, _), leaf in zip(flat, leaves, strict=False):
        names[f"args{jax.tree_util.keystr(path[1:])}"] = leaf.path
    [gather] = [
        i for i in module.computations[module.entry] if i.opcode == "all-gather"
    ]
    purpose, told = read_label(gather.op_name)
    sources = flow.sources(Value(module.entry, gather.operand_names[0]))
    assert all(map(flow.is_argument, sources))
    assert purpose == "gather"
    assert [names[flow.instruction(x).op_name] for x in sources] == list(told)


def test_arguments_are_all_that_xla_counts(explained):
    memory = explained.memory
    assert sum(x.num_bytes for x in memory.arguments) == memory.argument_bytes
    assert memory.is_assigned
    assert sum(x.num_bytes for x in memory.temporaries) <= memory.temp_bytes


def test_labels_are_read_back_whatever_names_have_in_them():
    names = ["a/b", "x{y}", "50%", "p, q", "é\n", "['k']"]
    seen = []

    def fn(x):
        with label("gather", names):
            seen.append(jax.numpy.sin(x))
        return seen[-1]

    text = jax.jit(fn).lower(1.0).compile().as_text()
    [entry] = [
        i
        for found in parse_module(text).computations.values()
        for i in found
        if i.opcode == "sine"
    ]
    assert read_label(entry.op_name) == ("gather", tuple(names))
    assert read_label("jit(f)/sin") is None


def places(**sizes):
    shape = tuple(sizes.values())
    return Places(tuple(sizes), np.arange(math.prod(shape)).reshape(shape), 0)


REASONS = {
    "not annotated": (("params/w", (8, 4), -1, None), {}),
    "a scalar": (("step", (), -1, None), {}),
    "no dim has a name": (("params/w", (8,), -1, (None,)), {}),
    "no rule for 'mlp'": (("params/w", (8, 4), -1, ("mlp", None)), {}),
    "dim 0, 'mlp', has size 1": (
        ("params/w", (1, 4), -1, ("mlp", None)),
        {"mlp": "fsdp"},
    ),
    "'mlp' goes to tensor, of size 1 on this mesh": (
        ("params/w", (8, 4), -1, ("mlp", None)),
        {"mlp": "tensor"},
    ),
    "'mlp' goes to data, which cuts no state": (
        ("params/w", (8, 4), -1, ("mlp", None)),
        {"mlp": "data"},
    ),
    "cut by fsdp only, and whole along data": (
        ("params/w", (8, 4), 0, ("mlp", None)),
        {"mlp": "fsdp"},
    ),
    "the optimizer's own: no parameter has its place": (
        ("opt_state/0/v", (3,), -1, None),
        {},
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_a_leaf_is_held_several_times(reason):
    (path, shape, dim, axes), rules = REASONS[reason]
    leaf = LeafLayout(path, shape, FLOAT, dim, axes)
    [found] = place_leaves([leaf], places(data=2, fsdp=2, tensor=1), rules)
    assert found.reason == reason
    assert found.num_copies == (4 if dim < 0 else 2)


def test_an_axis_of_size_one_cuts_nothing():
    leaf = LeafLayout("params/w", (8, 4), FLOAT, 0, ("mlp", None))
    [found] = place_leaves([leaf], places(data=4, fsdp=1), {"mlp": "fsdp"})
    assert found.reason == "fsdp has size 1 on this mesh"
    [alone] = place_leaves([leaf], places(data=1, fsdp=4), {"mlp": "fsdp"})
    assert (alone.reason, alone.num_copies) == ("", 1)


def test_a_moment_has_the_reason_of_its_parameter():
    leaves = [
        LeafLayout("params/norm/scale", (8,), FLOAT),
        LeafLayout("opt_state/0/mu/norm/scale", (8,), FLOAT),
    ]
    found = place_leaves(leaves, places(data=1, fsdp=2), {})
    assert [x.reason for x in found] == ["not annotated"] * 2


@pytest.mark.parametrize("shape", [(10, 3), (5, 2), (1, 7), (16,), (3, 5, 2)])
@pytest.mark.parametrize("fsdp", [2, 3, 8])
def test_padding_is_what_no_box_has(shape, fsdp):
    leaf = LeafLayout("params/w", shape, FLOAT, len(shape) - 1)
    on = places(data=2, fsdp=fsdp)
    [found] = place_leaves([leaf], on, {})
    held = sum(
        4 * math.prod(b - a for a, b in found.layout.box(id)) for id in range(2 * fsdp)
    )
    physical = 2 * fsdp * found.layout.piece_bytes
    assert found.padding_bytes * found.num_copies == physical - held
    assert found.padded_part == pytest.approx(1 - held / physical)


@pytest.mark.parametrize(("num", "count"), [(24, 8), (25, 8), (7, 3), (2, 4)])
def test_waiting_is_counted_as_rounds_without_work(num, count):
    found = idle_slots(num, {"data": 1, "fsdp": count})
    rounds = -(-num // count)
    assert found.num_waiting == rounds * count - num
    assert found.idle_part == pytest.approx(1 - num / (rounds * count))


def test_what_an_axis_of_a_group_does_not_divide_is_told():
    leaf = LeafLayout("params/w", (8, 5), FLOAT, -1, (None, "mlp"), (("tensor", 1),))
    [found] = place_leaves([leaf], places(tensor=2), {"mlp": "tensor"})
    assert found.reason == "'mlp' goes to tensor: 2 does not divide 5"
