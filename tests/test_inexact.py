"""What is refused before it is compiled, and that its place is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import mean_loss

import shardkit as sk
from shardkit.errors import InexactError
from shardkit.inexact import check_atomics, check_operations, find_atomics

X = jnp.ones((4, 3))
FLAG = "--xla_gpu_deterministic_ops=true"


def host(x):
    return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@jax.custom_vjp
def host_in_gradient(x):
    return x


host_in_gradient.defvjp(lambda x: (x, None), lambda _, g: (host(g),))


def with_callback(params, microbatch, key):
    return mean_loss(params, microbatch, key) + host(microbatch["x"].sum())


def with_callback_in_gradient(params, microbatch, key):
    return host_in_gradient(mean_loss(params, microbatch, key))


def with_rbg(params, microbatch, key):
    key = jax.random.key(0, impl="rbg")
    return mean_loss(params, microbatch, key) * jax.random.uniform(key)


BAD = {
    "pure_callback": with_callback,
    "pure_callback ": with_callback_in_gradient,
    "key<rbg>": with_rbg,
}


@pytest.mark.parametrize("name", BAD)
def test_a_loss_that_cannot_be_exact_is_refused_with_its_line(make, name):
    with pytest.raises(InexactError, match=r"^loss cannot be exact") as caught:
        make(loss=BAD[name])
    message = str(caught.value)
    assert name.strip() in message
    assert "test_inexact.py" in message
    make(loss=BAD[name], consistency="fast")


@jax.custom_vjp
def host_in_value(x):
    return host(x)


host_in_value.defvjp(lambda x: (x, None), lambda _, g: (g,))


def test_a_loss_is_searched_without_its_gradient_too(make):
    def loss(*args):
        return host_in_value(mean_loss(*args))

    with pytest.raises(InexactError, match=r"^loss cannot be exact.*\n.*pure_callback"):
        make(loss=loss)


def test_a_key_from_outside_is_seen(make):
    key = jax.random.key(0, impl="rbg")

    def loss(*args):
        return mean_loss(*args) * jax.random.uniform(key)

    with pytest.raises(InexactError, match=r"key<rbg>"):
        make(loss=loss)


def test_the_first_state_is_searched(make):
    def init(key):
        return {"kernel": host(jnp.ones((5, 3))), "bias": jnp.ones(3)}

    with pytest.raises(InexactError, match=r"^init cannot be exact"):
        make(init=init)


def test_an_evaluation_loss_is_searched_too(make):
    with pytest.raises(InexactError, match=r"^eval_loss cannot be exact"):
        make(eval_loss=with_callback)


def test_a_loss_that_asks_for_a_mesh_axis_is_told_why_it_may_not(make):
    def loss(params, microbatch, key):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        return mean_loss(params, microbatch, key)

    with pytest.raises(InexactError, match=r"loss asks for a mesh axis .*data"):
        make(loss=loss)

    def broken(params, microbatch, key):
        return missing  # noqa: F821  # pyright: ignore[reportUndefinedVariable]

    with pytest.raises(NameError, match="missing"):
        make(loss=broken)


def test_an_optimizer_that_cannot_be_exact_is_refused(make):
    def update(updates, state, params=None):
        return jax.tree.map(host, updates), state

    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    with pytest.raises(InexactError, match=r"^the update cannot be exact"):
        make(tx=tx)


def test_keys_of_the_good_generator_pass():
    def draws(x):
        key, other = jax.random.split(jax.random.key(3))
        return x + jax.random.normal(key, x.shape) + jax.random.bernoulli(other)

    check_operations(jax.make_jaxpr(draws)(X), "draws")


SCATTERS = {
    "scatter-add": lambda x: x.at[jnp.array([0, 0])].add(1.0),
    "scatter-mul": lambda x: x.at[jnp.array([0, 0])].multiply(2.0),
    "scatter": lambda x: x.at[jnp.array([0, 0])].set(jnp.arange(6.0).reshape(2, 3)),
}


@pytest.mark.parametrize("name", SCATTERS)
def test_scatters_are_found_within_loops_and_functions(name):
    scatter = SCATTERS[name]

    def looped(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.jit(scatter)(x), x)

    found = find_atomics(jax.make_jaxpr(looped)(X))
    assert [operation for operation, _ in found] == [name]
    assert "test_inexact.py" in found[0][1]
    unique = jax.make_jaxpr(lambda x: x.at[jnp.array([0])].add(1, unique_indices=True))
    assert find_atomics(unique(X)) == []


def test_scatters_are_refused_on_gpus_unless_the_flag_is_set(monkeypatch):
    jaxpr = jax.make_jaxpr(SCATTERS["scatter-add"])(X)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    check_atomics(jaxpr, "cpu")
    with pytest.raises(InexactError, match="scatter-add") as caught:
        check_atomics(jaxpr, "gpu")
    assert FLAG in str(caught.value)
    monkeypatch.setenv("XLA_FLAGS", FLAG)
    check_atomics(jaxpr, "gpu")


def test_the_layers_have_no_scatters():
    table = jnp.ones((5, 3))
    tokens = jnp.array([[0, 1, 1, 4]])

    def loss(table):
        logits = sk.nn.embed(table, tokens) @ table.T
        return sk.nn.cross_entropy(logits, tokens).sum()

    assert find_atomics(jax.make_jaxpr(jax.grad(loss))(table)) == []
