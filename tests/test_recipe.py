import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardkit.annotations import axes
from shardkit.errors import ConfigError, InexactError, PartitionError
from shardkit.exact_sum import INITIAL_EXPONENT
from shardkit.model import LossOutput
from shardkit.recipe import LossScale, Recipe, update_arguments
from shardkit.state_layout import lay_out

RULES = {"embed": "fsdp"}
KEY = jax.random.key(0)


def init(key):
    return {
        "w": axes(jax.random.normal(key, (6, 4)), "embed", "mlp"),
        "v": axes(jnp.ones((4, 6)), "mlp", "embed"),
        "b": jnp.zeros(4),
        "scale": jnp.ones(()),
    }


def loss(params, microbatch, key):
    return jnp.float32(0)


def recipe_of(tx=None, **options):
    options = {"init": init, "loss": loss, "num_microbatches": 2} | options
    return Recipe(tx=tx or optax.adamw(1e-2), **options)


def cuts(recipe, rules=RULES, **options):
    """Path → cut dim of all leaves that are cut."""
    layout, *_ = lay_out(recipe, rules, **options)
    return {leaf.path: leaf.dim for leaf in jax.tree.leaves(layout) if leaf.dim >= 0}


PARAMS = {"params/v": 1, "params/w": 0}


def test_moments_follow_their_parameters():
    assert cuts(recipe_of()) == PARAMS | {
        "opt_state/0/mu/v": 1,
        "opt_state/0/mu/w": 0,
        "opt_state/0/nu/v": 1,
        "opt_state/0/nu/w": 0,
    }


def test_factored_moments_follow_their_dims():
    found = cuts(recipe_of(optax.adafactor(1e-2, min_dim_size_to_factor=2)))
    factored = {path.split("/")[-2:][0] + path[-2:]: dim for path, dim in found.items()}
    # w is [embed=6, mlp=4], v its transpose: what is left of `embed` is cut.
    assert found.keys() >= PARAMS.keys()
    rows_or_columns = [path for path in found if "v_row" in path or "v_col" in path]
    assert len(rows_or_columns) == 2, factored
    assert all(found[path] == 0 for path in rows_or_columns)


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.sgd(1e-2), 0),
        (optax.sgd(1e-2, momentum=0.9), 2),
        (optax.lion(1e-3), 2),
        (optax.lamb(1e-3), 4),
        (optax.rmsprop(1e-3), 2),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), 4),
        (optax.MultiSteps(optax.adam(1e-3), 4), 6),
        (optax.apply_if_finite(optax.adam(1e-3), 3), 4),
        (optax.inject_hyperparams(optax.adam)(1e-3), 4),
        (optax.masked(optax.adam(1e-3), lambda p: {k: k == "w" for k in p}), 2),
        (optax.noisy_sgd(1e-2, key=jax.random.key(3)), 0),
    ],
)
def test_state_of_an_optimizer_that_is_cut(tx, expected):
    found = cuts(recipe_of(tx))
    in_state = [path for path in found if path.startswith("opt_state")]
    assert len(in_state) == expected
    assert all(found[path] == (0 if path.endswith("w") else 1) for path in in_state)


def test_the_layout_covers_the_whole_state():
    recipe = recipe_of(ema=0.9, loss_scale=LossScale())
    layout, *_ = lay_out(recipe, RULES)
    state = jax.eval_shape(recipe.first_state, KEY)
    assert jax.tree.structure(layout) == jax.tree.structure(state)
    for leaf, x in zip(jax.tree.leaves(layout), jax.tree.leaves(state), strict=True):
        assert (leaf.shape, leaf.dtype) == (x.shape, x.dtype)
    paths = [leaf.path for leaf in jax.tree.leaves(layout)]
    assert len(set(paths)) == len(paths)
    assert {"ema/w": 0, "ema/v": 1}.items() <= cuts(recipe).items()
    assert lay_out(recipe_of(exact=False), RULES)[0].grad_exponent is None


def delayed(num_steps):
    """Applies gradients late: each buffer takes what another had."""

    def first(params):
        return [jax.tree.map(jnp.zeros_like, params) for _ in range(num_steps)]

    def update(grads, state, params=None):
        return state[0], [*state[1:], grads]

    return optax.GradientTransformation(first, update)


def test_the_cut_spreads_until_nothing_changes():
    # Only after three rounds does the gradient's cut reach the first buffer.
    found = cuts(recipe_of(delayed(3)))
    assert found == PARAMS | {
        f"opt_state/{i}/{name}": dim
        for i in range(3)
        for name, dim in (("w", 0), ("v", 1))
    }


def test_a_state_whose_cut_never_settles_still_has_a_layout():
    def update(grads, state, params=None):
        return grads, state.T + grads["square"]

    tx = optax.GradientTransformation(lambda p: p["square"] * 0, update)
    recipe = recipe_of(
        tx, init=lambda k: {"square": axes(jnp.ones((4, 4)), "embed", None)}
    )
    assert lay_out(recipe, RULES)[0].opt_state.dim in (0, 1)


@jax.tree_util.register_pytree_node_class
class Plain:
    """A pytree that is equal to nothing but itself."""

    def __init__(self, w: Any) -> None:
        self.w = w

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_any_pytree_can_be_parameters():
    recipe = recipe_of(init=lambda k: Plain(axes(jnp.ones((6, 4)), "embed", None)))
    layout, *_ = lay_out(recipe, RULES)
    assert isinstance(layout.params, Plain)
    assert sorted(leaf.dim for leaf in jax.tree.leaves(layout.opt_state)) == [-1, 0, 0]


def test_parameters_of_other_dtypes_are_refused_all_at_once():
    def bad(key):
        return {
            "fine": jnp.ones(3, jnp.bfloat16),
            "counter": jnp.zeros((2,), jnp.int32),
            "flag": jnp.zeros((), bool),
            "complex": jnp.zeros((2,), jnp.complex64),
            "nested": [jax.random.key(0)],
        }

    with pytest.raises(PartitionError) as caught:
        lay_out(recipe_of(optax.identity(), init=bad), RULES)
    lines = str(caught.value).splitlines()
    found = dict(line.split() for line in lines if line.startswith("  "))
    assert found == {
        "counter": "int32",
        "flag": "bool",
        "complex": "complex64",
        "nested/0": "key<fry>",
    }


def test_float64_is_refused():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        with pytest.raises(PartitionError, match="float64"):
            lay_out(recipe_of(init=lambda k: {"w": jnp.ones(3, jnp.float64)}), RULES)
    finally:
        jax.config.update("jax_enable_x64", before)


def test_half_precision_parameters_keep_their_dtype():
    def half(key):
        return {"w": axes(jnp.ones((6, 4), jnp.bfloat16), "embed", None)}

    recipe = recipe_of(init=half, ema=0.9, loss_scale=LossScale())
    state = jax.eval_shape(recipe.first_state, KEY)
    new, _ = jax.eval_shape(recipe.update, *update_arguments(state, lambda x: x))
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(
        lambda x: x.dtype, state
    )


def test_layout_reports_rules_strictness_and_path_rules():
    recipe = recipe_of()
    _, warnings, _ = lay_out(recipe, {"embed": "fsdp", "embd": "fsdp"})
    assert len(warnings) == 1
    assert "'embd'" in warnings[0]
    with pytest.raises(PartitionError, match="'embd'"):
        lay_out(recipe, {"embed": "fsdp", "embd": "fsdp"}, strict=True)
    with pytest.raises(PartitionError, match=r"b\s+\(4,\)"):
        lay_out(recipe, RULES, strict=True)
    assert cuts(recipe, path_rules={"b": ("embed",)})["params/b"] == 0
    assert cuts(recipe, rules={}) == {}


def test_an_optimizer_that_cannot_be_exact_is_refused():
    def update(grads, state, params=None):
        def host(x):
            return jax.pure_callback(lambda x: x, jax.typeof(x), x)

        return jax.tree.map(host, grads), state

    tx = optax.GradientTransformation(lambda params: (), update)
    with pytest.raises(InexactError, match="pure_callback"):
        lay_out(recipe_of(tx), RULES)


def test_an_optimizer_that_needs_more_than_a_run_gives_is_refused():
    tx = optax.chain(optax.clip(1.0), optax.contrib.reduce_on_plateau())
    with pytest.raises(ConfigError, match="asks for 'value'") as caught:
        lay_out(recipe_of(tx), RULES)
    assert "sk.exactness" in str(caught.value)
    with pytest.raises(ConfigError, match="asks for 'value'"):
        lay_out(recipe_of(tx, exact=False), RULES)


def test_a_state_that_an_update_changes_the_shape_of_is_refused():
    def update(grads, state, params=None):
        return grads, jnp.concatenate([state, state])

    tx = optax.GradientTransformation(lambda params: jnp.zeros(3), update)
    with pytest.raises(ConfigError, match=r"float32\[3\] before .* float32\[6\] after"):
        lay_out(recipe_of(tx), RULES)


def test_an_error_that_is_not_the_optimizers_stays_what_it_is(monkeypatch):
    def fails(*args):
        raise RuntimeError("elsewhere")

    monkeypatch.setattr("shardkit.recipe.optax.apply_updates", fails)
    with pytest.raises(RuntimeError, match="elsewhere"):
        lay_out(recipe_of(), RULES)


def test_what_an_update_leaves_alone_is_cut_like_its_parameter():
    def update(grads, state, params=None):
        return jax.tree.map(jnp.subtract, state["first"], params), state

    tx = optax.GradientTransformation(lambda params: {"first": params}, update)
    found = cuts(recipe_of(tx))
    assert found == PARAMS | {"opt_state/first/v": 1, "opt_state/first/w": 0}


# The first state and the update.


def test_the_first_state():
    recipe = recipe_of(ema=0.9, loss_scale=LossScale(initial=8.0))
    state = recipe.first_state(KEY)
    assert (state.step.dtype, int(state.step)) == (jnp.int32, 0)
    assert jax.tree.leaves(state.grad_exponent) == [INITIAL_EXPONENT] * 4
    assert [float(x) for x in state.loss_scale] == [8, 0]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state.ema, state.params)
    assert all(jax.tree.leaves(same))
    bare = recipe_of(exact=False).first_state(KEY)
    assert (bare.ema, bare.grad_exponent, bare.loss_scale) == (None, None, None)


def test_the_first_state_is_a_function_of_the_key():
    recipe = recipe_of()
    one, same, other = [
        np.asarray(recipe.first_state(jax.random.key(seed)).params["w"]).tobytes()
        for seed in (0, 0, 1)
    ]
    assert one == same != other


def gradient(state, value):
    return jax.tree.map(lambda x: jnp.full_like(x, value), state.params)


def test_an_update_is_what_optax_computes():
    recipe = recipe_of(ema=0.75)
    state = recipe.first_state(KEY)
    grads = gradient(state, 0.5)
    new, metrics = jax.jit(recipe.update)(state, grads, state.grad_exponent, None)
    tx = optax.adamw(1e-2)
    updates, _ = tx.update(grads, tx.init(state.params), state.params)
    params = optax.apply_updates(state.params, updates)
    ema = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, state.params, params)
    close = dict(rtol=1e-6, atol=1e-7)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **close), new.params, params
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), new.ema, ema)
    assert int(new.step) == 1
    assert float(metrics["grad_norm"]) == pytest.approx(0.5 * np.sqrt(24 + 24 + 4 + 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_changes_the_scale_alone(bad):
    recipe = recipe_of(ema=0.9, loss_scale=LossScale(initial=8.0, growth_interval=2))
    state = recipe.first_state(KEY)
    state, _ = recipe.update(state, gradient(state, 0.5), state.grad_exponent, None)
    assert [float(x) for x in state.loss_scale] == [8, 1]
    grads = gradient(state, 0.5)
    grads["b"] = grads["b"].at[2].set(bad)
    exponents = jax.tree.map(lambda x: x + 3, state.grad_exponent)
    new, metrics = jax.jit(recipe.update)(state, grads, exponents, None)
    assert not np.isfinite(metrics["grad_norm"])
    assert [float(x) for x in new.loss_scale] == [4, 0]
    assert int(new.step) == 2
    assert jax.tree.leaves(new.grad_exponent) == jax.tree.leaves(exponents)
    for a, b in zip(
        jax.tree.leaves((new.params, new.opt_state, new.ema)),
        jax.tree.leaves((state.params, state.opt_state, state.ema)),
        strict=True,
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def follow(scale, steps):
    """Plays good (1) and bad (0) steps; returns the scale after each."""
    current, history = scale.first(), []
    for finite in steps:
        current = scale.next(current, jnp.bool_(finite))
        history.append(float(current[0]))
    return history


def test_the_loss_scale_grows_and_falls():
    scale = LossScale(initial=8.0, factor=4.0, growth_interval=2)
    assert follow(scale, [1, 1, 1, 1]) == [8, 32, 32, 128]
    # A bad step starts the count again.
    assert follow(scale, [1, 0, 1, 1, 1]) == [8, 2, 2, 8, 8]
    assert follow(scale, [0, 0, 0, 0]) == [2, 1, 1, 1]
    assert follow(LossScale(initial=8.0, growth_interval=1), [1, 1, 0]) == [16, 32, 16]


def test_a_fixed_loss_scale_stays():
    assert follow(LossScale(initial=8.0, growth_interval=None), [1, 0, 1, 0]) == [8] * 4


def test_the_loss_scale_does_not_grow_out_of_float32():
    # Where all gradients are zero, every step is good.
    scale = LossScale(initial=2.0**50, growth_interval=1)
    history = follow(scale, [1] * 100 + [0] * 60)
    assert max(history) == 2.0**60
    assert history[-1] == 1


# What a loss may return.


def abstract(shape=(4, 3)):
    return jax.ShapeDtypeStruct(shape, np.float32)


def test_output_structure_of_scalars_and_of_loss_outputs():
    def detailed(params, microbatch, key):
        return LossOutput(microbatch.sum(), 3, {"hits": jnp.int32(1)})

    params = jax.eval_shape(recipe_of().first_state, KEY).params
    train, evaluation, _ = recipe_of(eval_loss=detailed).output_structure(
        params, None, abstract(), abstract()
    )
    assert (train.num_leaves, evaluation.num_leaves) == (2, 3)
    out = evaluation.unflatten([1.0, 2.0, 3.0])
    assert out == LossOutput(1.0, 2.0, {"hits": 3.0})
    train, evaluation, _ = recipe_of().output_structure(
        params, None, abstract(), abstract()
    )
    assert train == evaluation


@pytest.mark.parametrize("name", ["loss", "eval_loss"])
def test_losses_that_are_not_scalars_are_refused_with_their_parts(name):
    def per_row(params, microbatch, key):
        return LossOutput(microbatch.sum(1), 1.0, {"rows": microbatch[0]})

    recipe = dataclasses.replace(recipe_of(), **{name: per_row})
    params = jax.eval_shape(recipe.first_state, KEY).params
    with pytest.raises(PartitionError) as caught:
        recipe.output_structure(params, None, abstract(), abstract())
    message = str(caught.value)
    assert message.startswith(f"{name} must return scalars")
    assert "loss_sum" in message
    assert "(2,)" in message
    assert "metrics/rows" in message
    assert "weight" not in message
