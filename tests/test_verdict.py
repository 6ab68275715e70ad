import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import shardkit as sk


def stateless(fn):
    """A transformation of each update alone."""
    return optax.stateless_with_tree_map(lambda update, _: fn(update))


def with_state(first, then):
    """A transformation whose state changes from `first` to `then`."""
    return optax.GradientTransformation(
        lambda params: first, lambda updates, state, params=None: (updates, then)
    )


def callback(x):
    return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


REFUSED = {
    "pure_callback": (stateless(callback), "host code"),
    "random_split of key<rbg>": (
        optax.add_noise(0.1, 0.5, jax.random.key(0, impl="rbg")),
        "threefry",
    ),
    "update": (stateless(lambda x: lax.psum(x, "fsdp")), "mesh axis"),
    "updates matrix": (
        stateless(lambda x: x[None]),
        "float32[256,192] before an update and is float32[1,256,192] after it",
    ),
    "state": (with_state({"a": 0}, {"b": 0}), "- a; + b"),
    "state mean": (
        with_state({"mean": jnp.zeros(3)}, {"mean": jnp.zeros(3, jnp.bfloat16)}),
        "float32[3] before an update and is bfloat16[3] after it",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_used_is_refused_with_the_reason(what):
    tx, reason = REFUSED[what]
    said = sk.exactness(tx)
    assert (said.is_exact, said.verdict, said.whole) == (False, "refused", ())
    reasons = [refusal for refusal in said.refused if refusal.what == what]
    assert any(reason in refusal.reason for refusal in reasons), said
    assert str(said).startswith("refused:\n")
    assert reason in str(said)


def test_what_is_refused_is_told_where_it_is():
    for tx in (REFUSED["pure_callback"][0], REFUSED["update"][0]):
        assert "test_verdict.py" in sk.exactness(tx).refused[0].where


def test_all_that_is_asked_for_is_told():
    [refusal] = sk.exactness(optax.scale_by_zoom_linesearch(3)).refused
    for name in ("'value'", "'grad'", "'value_fn'"):
        assert name in refusal.reason


def test_errors_of_other_kinds_say_which():
    def fails(x):
        raise KeyError("scale")

    [refusal] = sk.exactness(stateless(fails)).refused
    assert refusal.reason == "KeyError: 'scale'"


def test_operations_on_whole_arrays_are_told_with_their_source():
    params = {"a": np.ones((4, 6), np.float32), "b": np.ones((4, 6), np.float32)}
    said = sk.exactness(stateless(jnp.exp), params)
    assert said.verdict == "exact, computed whole"
    told = [(work.operation, work.type) for work in said.whole]
    assert told == [("exp", "float32[4,6]")] * 2
    assert "test_verdict.py" in said.whole[0].source
    assert "exp of float32[4,6]  × 2  " in str(said)


def test_the_state_is_told_as_it_would_be_cut():
    params = {"w": sk.axes(jnp.ones((4, 6), jnp.bfloat16), "embed", None)}
    said = sk.exactness(optax.adam(1e-3), params)
    assert said.verdict == "exact"
    cuts = {leaf.path: (leaf.dim, leaf.dtype) for leaf in jax.tree.leaves(said.state)}
    assert cuts["opt_state/0/mu/w"] == (1, jnp.bfloat16)
    assert cuts["opt_state/0/count"] == (-1, jnp.int32)


def test_parameters_that_no_run_takes_are_refused_as_a_run_does():
    with pytest.raises(sk.PartitionError, match="int32"):
        sk.exactness(optax.sgd(1e-2), {"counter": jnp.zeros(3, jnp.int32)})
