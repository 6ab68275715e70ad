import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from shardkit.jaxprs import flatten
from shardkit.local_rules import Shard
from shardkit.operations import is_light
from shardkit.regions import Round, cost_of, used_outside, values_to_join

MATRIX, VECTOR = jnp.ones((4, 6)), jnp.ones(6)


def equation(fn, *args):
    return jax.make_jaxpr(fn)(*args).eqns[-1]


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: x + 1, 24),
        (lambda x: x @ VECTOR, 2 * 4 * 6),
        (lambda x: lax.dot_general(x, x, (((1,), (1,)), ((0,), (0,)))), 2 * 4 * 6),
        (lambda x: lax.linalg.qr(x, full_matrices=False), 4 * 4 * 4 * 6),
        (
            lambda x: lax.scan(lambda c, _: (c @ x.T @ x, None), x, length=5)[0],
            5 * (384 + 24),
        ),
        (
            lambda x: lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ x.T @ x, x),
            384 + 24,
        ),
        (lambda x: lax.conv(x[None, None], x[None, None], (1, 1), "SAME"), -math.inf),
    ],
    ids=["add", "vector", "batched", "qr", "scan", "cond", "convolution"],
)
def test_costs_are_the_operations_that_are_usually_taken(fn, expected):
    assert cost_of(equation(fn, MATRIX)) == expected


def regions_of(fn, *dims):
    """The regions of the first round, and the names that are left."""
    args = [MATRIX] * len(dims)
    closed = jax.make_jaxpr(fn)(*args)
    values = []
    pieces = [Shard(x, dim, 4) for x, dim in zip(args, dims, strict=True)]
    steps, outs = flatten(closed.jaxpr, closed.consts, pieces, values, Shard)

    def light(eqn):
        return is_light(eqn, exact=True)

    found, waiting, unknown = Round(values_to_join(steps, light), light), [], set()
    for step in steps:
        _, ins, produced = step
        if unknown.isdisjoint(ins) and not found.touches(ins):
            found.open(step)
        elif not unknown.isdisjoint(ins) or not found.join(step, values):
            waiting.append(step)
            unknown.update(produced)
    names = [[eqn.primitive.name for eqn, _, _ in r.steps] for r in found.regions]
    wanted = [len(values) for _, values in used_outside(found.regions, waiting, outs)]
    return names, [eqn.primitive.name for eqn, _, _ in waiting], wanted


def test_what_leads_to_another_product_joins_and_what_follows_the_last_does_not():
    names, left, wanted = regions_of(lambda x: jnp.exp(-jnp.exp(x)) * 2 + 1, 0)
    assert names == [["exp", "neg", "exp"]]
    assert left == ["mul", "add"]
    assert wanted == [1]


def test_what_meets_pieces_waits():
    names, left, _ = regions_of(lambda x, y: jnp.exp(jnp.exp(x) * y), 0, 0)
    assert names == [["exp"]]
    assert left == ["mul", "exp"]


def test_regions_meet_in_products_only():
    names, left, _ = regions_of(lambda x, y: jnp.exp(x) @ jnp.exp(y).T, 0, 0)
    assert sorted(map(sorted, names)) == [["dot_general", "exp", "exp", "transpose"]]
    assert left == []
    names, left, _ = regions_of(lambda x, y: jnp.exp(jnp.exp(x) + jnp.exp(y)), 0, 0)
    assert names == [["exp"], ["exp"]]
    assert left == ["add", "exp"]


def test_keys_are_never_made_in_a_region():
    def draw(x):
        seed = jnp.exp(x)[0, 0].astype(jnp.uint32)
        return jax.random.bits(jax.random.wrap_key_data(jnp.stack([seed, seed])))

    names, left, _ = regions_of(draw, 0)
    assert not any("random_wrap" in region for region in names)
    assert "random_wrap" in left
