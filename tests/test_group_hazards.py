"""What would end a process or never end is told before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk

ROWS, LENGTH, VOCAB = 2, 8, 6


def batch_of(step):
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, VOCAB, (4 * ROWS, LENGTH)).astype(np.int32)
    return {"tokens": tokens}


def branching(params, microbatch, key):
    """Shifts positions if the tokens say so."""
    x = params["table"][0] * microbatch["tokens"]
    x = sk.constrain(x, None, "context")

    def shift(x):
        return sk.constrain(jnp.roll(x, 1, axis=1), None, "context")

    x = jax.lax.cond(microbatch["tokens"][0, 0] % 2 == 0, shift, jnp.tanh, x)
    return jnp.mean(x**2)


def choosing(params, microbatch, key):
    """The same by computing both."""
    x = params["table"][0] * microbatch["tokens"]
    x = sk.constrain(x, None, "context")
    is_even = microbatch["tokens"][0, 0] % 2 == 0
    return jnp.mean(jnp.where(is_even, jnp.roll(x, 1, axis=1), jnp.tanh(x)) ** 2)


def repeating(params, microbatch, key, *, num_passes=None):
    """Shifts positions as often as the tokens say, or so many times."""
    x = params["table"][0] * microbatch["tokens"]
    num = microbatch["tokens"][0, 0] if num_passes is None else num_passes

    def shift(_, x):
        return sk.constrain(jnp.roll(x, 1, axis=1), None, "context")

    kept = jax.lax.stop_gradient(sk.constrain(x, None, "context"))
    return jnp.mean(x * jax.lax.fori_loop(0, num, shift, kept))


def looking_up(params, microbatch, key):
    """Looks into a table that no axis cuts."""
    rows = params["table"][microbatch["tokens"]]
    return jnp.mean(sk.constrain(rows, None, "context") ** 2)


def looking_into_pieces(params, microbatch, key):
    rows = sk.nn.embed(params["table"][:, None], microbatch["tokens"], "tensor")
    return jnp.mean(sk.constrain(rows, None, "context", None) ** 2)


def messages_of(loss, **mesh):
    events, heard = sk.EventLog(), []
    events.subscribe(heard.append)
    with sk.Trainer(
        init=lambda key: {"table": jax.random.normal(key, (VOCAB,))},
        loss=loss,
        tx=optax.sgd(0.1),
        data=batch_of,
        num_microbatches=4,
        mesh=sk.MeshSpec(**mesh),
        devices=jax.devices()[: np.prod(list(mesh.values()))],
        events=events,
        certify="off",
    ) as trainer:
        list(trainer.run(1))
    return [x.fields["message"] for x in heard if x.name == "notice"]


def test_neighbours_in_a_branch_are_refused():
    with pytest.raises(sk.PartitionError) as caught:
        messages_of(branching, data=2, fsdp=1, context=2)
    assert "neighbours in a branch" in str(caught.value)
    assert "test_group_hazards.py:" in str(caught.value)
    assert "jnp.where" in str(caught.value)
    # One group waits for nobody.
    assert not messages_of(branching, fsdp=1, context=2)
    assert not messages_of(choosing, data=2, fsdp=1, context=2)


def test_neighbours_in_a_loop_of_unknown_length_are_refused():
    with pytest.raises(sk.PartitionError) as caught:
        messages_of(repeating, data=2, fsdp=1, context=2)
    assert "number of passes" in str(caught.value)
    assert "test_group_hazards.py:" in str(caught.value)
    assert not messages_of(repeating, fsdp=1, context=2)
    fixed = functools.partial(repeating, num_passes=3)
    assert not messages_of(fixed, data=2, fsdp=1, context=2)


def test_look_ups_that_may_end_the_process_are_told():
    mesh = {"fsdp": 2, "tensor": 2, "context": 2}
    _, message = messages_of(looking_up, **mesh)
    assert "float32[6]" in message
    assert "test_group_hazards.py:" in message
    assert "sk.nn.embed" in message
    assert len(messages_of(looking_into_pieces, **mesh)) == 1
    assert not messages_of(looking_into_pieces, fsdp=2, expert=2, context=2)
    [message] = messages_of(looking_up, fsdp=1, tensor=2, context=2)
    assert "no rule cuts a parameter by it" in message
    assert not messages_of(looking_up, fsdp=2, context=2)
