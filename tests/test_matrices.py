import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from sharded import assert_close, assert_same_bits, normal, on_shards, traced
from updates import Problem, different_leaves, init_of, mesh_of, run_updates

from shardkit import matrices
from shardkit.local_rules import Shard
from shardkit.localize import Localizer
from shardkit.matrices import Task, assign, compute
from shardkit.program import Program
from shardkit.shards import Shards


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 9))
def test_the_busiest_has_at_most_a_third_more_than_is_needed(costs, count):
    owners = assign(costs, count)
    loads = [
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == i)
        for i in range(count)
    ]
    assert sum(loads) == sum(costs)
    ordered = sorted(costs, reverse=True)
    # No assignment is better than this.
    pair = ordered[count - 1] + ordered[count] if len(costs) > count else 0
    bound = max(sum(costs) / count, *ordered[:1], pair)
    assert max(loads) <= bound * 4 / 3 or not costs


ARGS = {
    "x": normal(5, 3),
    "y": normal(3, 4, seed=1),
    "half": normal(7, seed=2).astype(jnp.bfloat16),
    "flags": normal(6, 2, seed=3) > 0,
    "whole": normal(3, seed=4),
}
DIMS = {"x": 0, "y": 1, "half": 0, "flags": 0, "whole": -1}


def tasks_of(args, dims):
    """Tasks with results of several dtypes, cut and whole."""

    def shard(name):
        dim = dims[name]
        if dim < 0:
            return Shard(args[name])
        return Shard(args[name], dim, ARGS[name].shape[dim])

    def task(fn, names, out_dims, cost):
        results = jax.eval_shape(fn, [ARGS[name] for name in names])
        return Task(fn, [shard(name) for name in names], results, out_dims, cost)

    return [
        task(lambda a: [a[0] @ a[1], a[0].sum(0)], ["x", "y"], [1, None], 60.0),
        task(lambda a: [jnp.sort(a[0])], ["half"], [0], 7.0),
        task(lambda a: [a[0].T, a[0].any()], ["flags"], [1, None], 12.0),
        task(lambda a: [jnp.exp(a[0])], ["whole"], [None], 3.0),
        task(lambda a: [a[0] * a[1]], ["x", "whole"], [0], 15.0),
    ]


def compute_on(count, chosen=slice(None)):
    """Computes the tasks on `count` shards; their results, whole."""
    mesh, shards = mesh_of(1, count), Shards("fsdp", count)
    split = {
        name: x if DIMS[name] < 0 else np.asarray(shards.split(x, DIMS[name]))
        for name, x in ARGS.items()
    }
    specs = {
        name: PartitionSpec() if dim < 0 else PartitionSpec("fsdp")
        for name, dim in DIMS.items()
    }

    def spmd(args):
        args = {name: x if DIMS[name] < 0 else x[0] for name, x in args.items()}
        found = compute(tasks_of(args, DIMS)[chosen], shards)
        return [
            [
                x.array if x.dim is None else shards.gather(x.array, x.dim, x.size)
                for x in results
            ]
            for results in found
        ]

    fn = jax.shard_map(
        spmd, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False
    )
    args = {
        name: jax.device_put(x, jax.NamedSharding(mesh, specs[name]))
        for name, x in split.items()
    }
    return jax.tree.map(np.asarray, Program(fn)(args)), jax.jit(fn).lower(args)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("least", [0, 10, 1 << 20])
def test_tasks_give_the_same_bits_whoever_computes_them(count, least, monkeypatch):
    monkeypatch.setattr(matrices, "WORTH_SENDING", least)
    found, _ = compute_on(count)
    expected = [
        [np.asarray(x) for x in jax.jit(task.fn)([x.array for x in task.args])]
        for task in tasks_of(ARGS, dict.fromkeys(DIMS, -1))
    ]
    assert_same_bits(found, expected)


def test_each_large_task_is_in_the_program_of_one_shard(monkeypatch):
    monkeypatch.setattr(matrices, "WORTH_SENDING", 0)
    _, lowered = compute_on(3)
    text = lowered.as_text()
    assert text.count("stablehlo.dot_general") == 1
    assert text.count("stablehlo.case") == 1
    # Both ways, a buffer for each of float32, bfloat16 and bool.
    assert text.count('"stablehlo.all_to_all"') == 6
    _, lowered = compute_on(3, slice(3, 4))
    assert lowered.as_text().count('"stablehlo.all_to_all"') == 1
    monkeypatch.setattr(matrices, "WORTH_SENDING", 1 << 20)
    _, lowered = compute_on(3)
    assert "stablehlo.case" not in lowered.as_text()


# Functions of whole arrays, whose products are shared out.


def polynomials(args):
    """Products that belong together, by leaf, and a sum in which they meet."""

    def one(x):
        x = x / jnp.sqrt(jnp.sum(x * x))
        a = x @ x.T
        return 1.5 * x - 0.5 * (a @ x)

    out = {name: one(x) for name, x in args.items()}
    return out, sum(jnp.sum(jnp.abs(x)) for x in out.values())


MATRICES = {"rows": normal(3, 5), "columns": normal(4, 5, seed=1), "all": normal(6, 5)}
CUTS = {"rows": 0, "columns": 1, "all": -1}


def largest_array(fn, x, count):
    """The elements of the largest array of a function of rows on `count` shards."""

    def spmd(piece):
        localizer = Localizer(Shards("fsdp", count))
        return localizer(fn, [piece], [0], [jax.ShapeDtypeStruct(x.shape, x.dtype)])[0]

    rows, everywhere = PartitionSpec("fsdp"), PartitionSpec()
    mapped = jax.shard_map(
        spmd,
        mesh=mesh_of(1, count),
        in_specs=rows,
        out_specs=everywhere,
        check_vma=False,
    )
    types = re.findall(r"tensor<((?:\d+x)+)\w+>", jax.jit(mapped).lower(x).as_text())
    return max(math.prod(map(int, dims.split("x")[:-1])) for dims in types)


@pytest.fixture
def computed(monkeypatch):
    """The tasks of each round; all of them are large."""
    rounds, real = [], matrices.compute
    monkeypatch.setattr(matrices, "WORTH_SENDING", 0)
    monkeypatch.setattr(
        matrices,
        "compute",
        lambda tasks, shards: rounds.append(tasks) or real(tasks, shards),
    )
    return rounds


def test_the_products_of_a_matrix_are_one_task(computed):
    dims, _ = traced(polynomials, [MATRICES], [CUTS])
    assert [len(tasks) for tasks in computed] == [3]
    assert sorted(task.cost for task in computed[0]) == [180, 320, 720]
    # What follows the last product is done on pieces again.
    assert dims == (CUTS, -1)


def test_what_only_moves_is_never_sent(computed):
    def fn(x, y):
        return x + jnp.eye(5) + jnp.concatenate([y, y], 1)[:, :5]

    traced(fn, [normal(5, 5), normal(5, 3)], [0, -1])
    assert computed == []


def test_a_convolution_is_done_by_all(computed):
    def fn(x, y):
        return jnp.convolve(x, y)

    args = [normal(13), normal(25, seed=1)]
    one, many = [on_shards(fn, args, [0, 0], count) for count in (1, 3)]
    assert_same_bits(many.out, one.out)


def test_a_result_that_all_want_is_not_held_for_each(computed):
    def fn(x):
        return x.T @ x

    x = normal(8, 64)
    one, many = [on_shards(fn, [x], [0], count) for count in (1, 8)]
    assert_same_bits(many.out, one.out)
    assert many.dims == -1
    dims, _ = traced(fn, [x], [0])
    assert dims == -1
    assert largest_array(fn, x, 8) == 64 * 64


def test_tasks_that_meet_in_a_product_are_one(computed):
    def shampoo(args):
        x = args["rows"]
        left, right = x @ x.T, x.T @ x
        return left @ jnp.sin(x) @ right, left

    traced(shampoo, [MATRICES], [CUTS])
    assert [len(tasks) for tasks in computed] == [1]


def test_products_on_one_of_many_shards_have_the_bits_of_one_device(computed):
    one, many = [on_shards(polynomials, [MATRICES], [CUTS], n) for n in (1, 3)]
    assert_same_bits(many.out, one.out)
    assert many.dims == one.dims
    assert_close(one.out, jax.jit(polynomials)(MATRICES))


@pytest.mark.slow
def test_muon_keeps_its_bits_with_matrices_that_are_large():
    shapes = {f"matrix{i}": (256, 128 + 80 * i) for i in range(5)} | {"vector": (5,)}
    one = Problem.of(optax.contrib.muon(1e-2), init_of(shapes))
    expected, _ = run_updates([one], mesh_of(1, 1), 2)
    for mesh in ((1, 8), (1, 5), (1, 2), (2, 3)):
        found, _ = run_updates([one], mesh_of(*mesh), 2)
        assert not different_leaves(found, expected)
