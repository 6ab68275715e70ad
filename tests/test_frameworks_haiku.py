"""Haiku functions, as their users write them."""

import frameworks
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardkit as sk

WIDTH = frameworks.WIDTH
INPUT = jax.ShapeDtypeStruct((2, WIDTH), "float32")
AVERAGES = "batch_norm/~/{}_ema"


@hk.transform_with_state
def net(x, is_training):
    norm = hk.BatchNorm(create_scale=False, create_offset=False, decay_rate=0.9)
    x = jnp.tanh(hk.Linear(WIDTH, with_bias=False)(norm(x, is_training)))
    return hk.dropout(hk.next_rng_key(), 0.2, x) if is_training else x


def loss(apply, microbatch, is_training=True):
    x = apply(microbatch["x"], is_training)
    return ((x - microbatch["y"]) ** 2).mean()


def eval_loss(apply, microbatch):
    return loss(apply, microbatch, is_training=False)


def build(transformed=net, loss=loss, **options):
    given = {"eval_loss": eval_loss, "combine": {"**/counter": "last"}}
    return sk.from_haiku(transformed, (INPUT, True), loss, **given | options)


@pytest.mark.slow
def test_any_devices_leave_the_same_bits_and_the_state_is_carried_on():
    rules = {"path_rules": {"linear/w": ("embed", "mlp")}}
    model = build(axis_rules={"mlp": "fsdp"})
    single, state = frameworks.run(model, {0: 1}, **rules)
    assert frameworks.run(model, frameworks.CHANGES, **rules)[0] == single
    mean, var = (state[AVERAGES.format(name)] for name in ("mean", "var"))
    assert mean["counter"] == var["counter"] == frameworks.STEPS
    # Haiku's averages begin at 0 and are divided by what is then missing of 1.
    expected, _ = frameworks.batch_statistics(0.9)
    missing = 1 - 0.9**frameworks.STEPS
    np.testing.assert_allclose(mean["average"][0], expected / missing, rtol=1e-4)


def test_masks_are_those_of_the_microbatch():
    losses = frameworks.losses_of(build())
    assert len(set(losses.values())) == 4
    assert losses == frameworks.losses_of(build())


def test_a_function_without_a_state_draws_for_every_call():
    @hk.transform
    def plain(x, is_training):
        return hk.dropout(hk.next_rng_key(), 0.5, hk.Linear(WIDTH)(x))

    seen = []

    def twice(apply, microbatch):
        seen.extend(apply(jnp.ones((4, WIDTH)), True) for _ in range(2))
        return loss(apply, microbatch)

    model = build(plain, twice, combine=None)
    first = frameworks.made(model)
    assert first.state == {}
    model.loss(first.params, first.state, frameworks.data(0), jax.random.key(1))
    assert not np.array_equal(*seen)


def test_evaluation_takes_running_statistics():
    model = build()
    first = frameworks.made(model)
    evaluate = jax.jit(model.eval_loss)
    args = frameworks.data(0), jax.random.key(0)
    out = evaluate(first.params, first.state, *args)
    moved = jax.tree.map(lambda x: x + 1, first.state)
    assert evaluate(first.params, moved, *args).loss_sum != out.loss_sum
    assert out.state[AVERAGES.format("mean")]["counter"] == 0


def message_of(*args, **options):
    with pytest.raises(sk.PartitionError) as caught:
        frameworks.trainer(build(*args, **options))
    return str(caught.value)


def test_counters_without_a_rule_are_named():
    message = message_of(combine={})
    assert f"{AVERAGES.format('mean')}/counter  int32[]" in message


def test_params_that_are_no_floats_are_named():
    @hk.transform
    def bad(x, is_training):
        hk.get_parameter("table", [3], jnp.int32, init=jnp.ones)
        return hk.Linear(WIDTH)(x)

    message = message_of(bad)
    assert "~/table  int32[3]" in message
    assert "linear" not in message


def test_what_is_not_transformed_is_refused():
    with pytest.raises(sk.ConfigError, match=r"hk.transform .* found function"):
        build(lambda x: x)
