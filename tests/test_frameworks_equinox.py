"""Equinox modules, as their users write them."""

import sys
from collections.abc import Callable

import equinox as eqx
import frameworks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import shardkit as sk

WIDTH = frameworks.WIDTH


class Net(eqx.Module):
    norm: eqx.nn.BatchNorm
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    order: Array
    activation: Callable

    def __init__(self, key):
        self.norm = eqx.nn.BatchNorm(
            WIDTH, "batch", channelwise_affine=False, momentum=0.9, mode="batch"
        )
        linear = eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=key)
        named = sk.axes(linear.weight, "mlp", "embed")
        self.linear = eqx.tree_at(lambda x: x.weight, linear, named)
        self.dropout = eqx.nn.Dropout(0.2)
        self.order = jnp.arange(WIDTH)[::-1]
        # A new function whenever a module is made.
        self.activation = lambda x: jnp.tanh(x)

    def __call__(self, x, state, key):
        x, state = self.norm(x[self.order], state)
        return self.dropout(self.activation(self.linear(x)), key=key), state


make = eqx.nn.make_with_state(Net)


def loss(module, state, microbatch, key):
    keys = jax.random.split(key, len(microbatch["x"]))
    mapped = jax.vmap(module, (0, None, 0), (0, None), axis_name="batch")
    x, state = mapped(microbatch["x"], state, keys)
    return ((x - microbatch["y"]) ** 2).mean(), state


def build(make=make, loss=loss, **options):
    given = {"combine": {"*counter": "last"}, "axis_rules": {"mlp": "fsdp"}}
    return sk.from_equinox(make, loss, **given | options)


def plain(key):
    return eqx.nn.MLP(WIDTH, WIDTH, 9, 1, key=key)


def plain_loss(module, microbatch, key):
    x = microbatch["x"] + 0.1 * jax.random.normal(key, microbatch["x"].shape)
    return ((jax.vmap(module)(x) - microbatch["y"]) ** 2).mean()


@pytest.mark.slow
def test_any_devices_leave_the_same_bits_and_the_state_is_carried_on():
    single, state = frameworks.run(build(), {0: 1})
    assert frameworks.run(build(), frameworks.CHANGES)[0] == single
    layers = state["layers"]
    assert layers["Net.norm.batch_counter"] == frameworks.STEPS
    mean, var = frameworks.batch_statistics(0.9)
    found_mean, found_var = layers["Net.norm.batch_state_index"]
    np.testing.assert_allclose(found_mean, mean[::-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_var, var[::-1], rtol=1e-5)
    np.testing.assert_array_equal(state["constants"].order, np.arange(WIDTH)[::-1])


def test_params_are_the_floats_of_the_module_with_their_axes():
    first = build().init(jax.random.key(0))
    assert isinstance(first.params, Net)
    dims = frameworks.cut_dims(build(), {"mlp": "fsdp"}).params
    assert dims.linear.weight == ("fsdp", None)
    assert first.params.order is first.params.activation is None
    assert first.state["constants"].order.dtype == jnp.int32


def test_modules_without_a_state_need_none():
    losses = frameworks.losses_of(build(plain, plain_loss, combine=None))
    assert len(set(losses.values())) == 4


def test_masks_are_those_of_the_microbatch():
    losses = frameworks.losses_of(build())
    assert len(set(losses.values())) == 4
    assert losses == frameworks.losses_of(build())


def test_evaluation_draws_nothing_and_takes_running_statistics():
    model = build()
    first = frameworks.made(model)
    evaluate = jax.jit(model.eval_loss)
    args = first.params, first.state, frameworks.data(0)
    outs = [evaluate(*args, jax.random.key(n)) for n in (0, 1)]
    assert outs[0].loss_sum == outs[1].loss_sum
    assert outs[0].state["layers"]["Net.norm.batch_counter"] == 0
    layers = {**first.state["layers"]}
    layers["Net.norm.batch_counter"] += 2
    moved = {**first.state, "layers": layers}
    other = evaluate(first.params, moved, frameworks.data(0), jax.random.key(0))
    assert other.loss_sum != outs[0].loss_sum


def message_of(*args, **options):
    with pytest.raises(sk.PartitionError) as caught:
        frameworks.trainer(build(*args, **options))
    return str(caught.value)


def test_counters_without_a_rule_are_named():
    message = message_of(combine={})
    assert "layers/Net.norm.batch_counter  int32[]  found no rule" in message


def test_a_state_that_was_not_taken_out_is_refused():
    def by_hand(key):
        module = Net(key)
        return eqx.nn.delete_init_state(module), eqx.nn.State(module)

    for make in (Net, by_hand):
        assert "eqx.nn.make_with_state" in message_of(make)


def test_a_loss_that_drops_the_state_is_refused():
    dropping = lambda *args: loss(*args)[0]  # noqa: E731
    assert "(loss, state), found" in message_of(loss=dropping)


def test_complex_params_are_named():
    def complex_one(key):
        return eqx.nn.Linear(2, 2, dtype=jnp.complex64, key=key)

    message = message_of(complex_one, plain_loss, combine=None)
    assert "weight  complex64[2, 2]" in message


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(sk.ConfigError, match="pip install equinox"):
        build()
