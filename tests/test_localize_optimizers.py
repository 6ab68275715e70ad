"""One update of some optimizers, on random parameters, gradients and state.

`test_optimizers.py` has all of them, from their first state on.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sharded import (
    COUNTS,
    assert_close,
    assert_same_bits,
    is_key,
    on_host,
    on_shards,
    traced,
)

from shardkit.annotations import axes
from shardkit.recipe import Recipe
from shardkit.state_layout import lay_out


def decays(params):
    return jax.tree.map(lambda x: x.ndim >= 2, params)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1, mask=decays),
    "lion": lambda: optax.lion(1e-2, weight_decay=0.1),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda: optax.adafactor(
        1e-2, min_dim_size_to_factor=2, momentum=0.9, weight_decay_rate=1e-3
    ),
    "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1, mask=decays),
    "adagrad": lambda: optax.adagrad(1e-2),
    "accumulates": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "clip_by_global_norm": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), optax.clip(0.01), optax.adam(1e-2)
    ),
    "adaptive_grad_clip": lambda: optax.chain(
        optax.adaptive_grad_clip(0.01), optax.sgd(1e-2, momentum=0.9)
    ),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.sgd(1e-2)),
}
UPDATED = {"adamw": COUNTS, "adafactor": (1, 8), "lamb": (1, 3), "accumulates": (1, 8)}
LOCAL_OPTIMIZERS = ("adamw", "lion", "sgd", "adagrad", "clip_by_global_norm", "ema")


def init(key):
    shapes = {"w": (5, 3), "e": (4, 7), "g": (7,), "s": ()}
    keys = jax.random.split(key, len(shapes))
    names = {"w": ("cut", None), "e": (None, "cut"), "g": ("cut",)}
    return {
        name: axes(jax.random.normal(k, shape), *names.get(name, (None,) * len(shape)))
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def problem(tx, exact=True):
    """Returns an update, its arguments and how they are cut."""
    recipe = Recipe(
        init=init, loss=lambda p, x, k: 0.0, tx=tx, num_microbatches=1, exact=exact
    )
    layout, *_ = lay_out(recipe, {"cut": "fsdp"})
    state = recipe.first_state(jax.random.key(0))
    rng = np.random.default_rng(0)

    def moments(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return (0.01 * abs(rng.normal(size=x.shape))).astype(x.dtype)
        return x

    state = dataclasses.replace(state, opt_state=jax.tree.map(moments, state.opt_state))
    state = jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), state)
    grads = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), state.params
    )
    dims = jax.tree.map(lambda leaf: leaf.dim, layout)
    return (
        recipe.update,
        [state, grads, state.grad_exponent, None],
        [dims, dims.params, dims.grad_exponent, None],
    )


@pytest.mark.parametrize(
    "name",
    # The others are updated in `test_optimizers` too.
    ["adamw", *(pytest.param(n, marks=pytest.mark.slow) for n in [*UPDATED][1:])],
)
def test_optimizers_update_to_the_same_bits_on_any_number_of_shards(name):
    update, args, dims = problem(OPTIMIZERS[name]())
    one = on_shards(update, args, dims, 1)
    assert_close(one.out, on_host(jax.jit(update)(*args)))
    for count in UPDATED[name][1:]:
        assert_same_bits(on_shards(update, args, dims, count).out, one.out)


@pytest.mark.parametrize("name", LOCAL_OPTIMIZERS)
def test_common_optimizers_gather_nothing(name):
    assert traced(*problem(OPTIMIZERS[name]()))[1] == []


@pytest.mark.parametrize("where", [("w", (4, 2)), ("s", ())])
def test_a_gradient_that_is_not_finite_is_seen_by_all_shards(where):
    update, args, dims = problem(OPTIMIZERS["if_finite"]())
    name, index = where
    args[1][name] = np.array(args[1][name])
    args[1][name][index] = np.nan
    one, many = [on_shards(update, args, dims, count) for count in (1, 8)]
    assert_same_bits(many.out, one.out)
    state, _ = many.out
    assert_same_bits(state.params, args[0].params)
    assert int(state.opt_state.notfinite_count) == 1
