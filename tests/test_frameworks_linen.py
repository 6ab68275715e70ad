"""Flax Linen modules, as their users write them."""

import flax.linen as nn
import frameworks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardkit as sk

WIDTH = frameworks.WIDTH
INPUT = jax.ShapeDtypeStruct((2, WIDTH), "float32")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            use_bias=False,
            use_scale=False,
            name="norm",
        )(x)
        calls = self.variable("counts", "calls", lambda: jnp.int32(0))
        if train:
            calls.value += 1
        normal = nn.initializers.lecun_normal()
        # Linen itself would constrain these where it finds a mesh.
        boxed = nn.with_partitioning(normal, ("embed", "mlp"))
        x = nn.Dense(WIDTH, use_bias=False, kernel_init=boxed, name="dense")(x)
        x = nn.Dropout(0.2, deterministic=not train)(jnp.tanh(x))
        self.sow("penalties", "size", (x**2).mean())
        return x


def loss(apply, microbatch, train=True):
    x, sown = apply(microbatch["x"], train=train, mutable=["penalties"])
    penalty = sown["penalties"]["size"][0]
    return ((x - microbatch["y"]) ** 2).mean() + 0.1 * penalty


def eval_loss(apply, microbatch):
    return loss(apply, microbatch, train=False)


def build(module=None, loss=loss, **options):
    given = {
        "eval_loss": eval_loss,
        "temporary": ["penalties"],
        "combine": {"counts/*": "sum"},
        "axis_rules": {"mlp": "fsdp"},
    }
    return sk.from_linen(module or Net(), INPUT, loss, **given | options)


def test_any_devices_leave_the_same_bits_and_every_collection_is_carried_on():
    single, state = frameworks.run(build(), {0: 1})
    assert frameworks.run(build(), frameworks.CHANGES)[0] == single
    assert set(state) == {"batch_stats", "counts"}
    mean, var = frameworks.batch_statistics(0.9)
    norm = state["batch_stats"]["norm"]
    np.testing.assert_allclose(norm["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm["var"], var, rtol=1e-5)
    assert state["counts"]["calls"] == frameworks.STEPS * frameworks.GRID


def test_axes_are_read_from_boxes():
    params = frameworks.cut_dims(build(), {"mlp": "fsdp"}).params
    assert params == {"dense": {"kernel": (None, "fsdp")}}
    logical = nn.with_logical_partitioning(nn.initializers.ones, (None, "mlp"))
    dense = nn.Dense(3, kernel_init=logical)
    params = frameworks.cut_dims(build(dense), {"mlp": "fsdp"}).params
    assert params["kernel"] == (None, "fsdp")


def test_masks_are_those_of_the_microbatch():
    losses = frameworks.losses_of(build())
    assert len(set(losses.values())) == 4
    assert losses == frameworks.losses_of(build())


def test_calls_follow_one_another_and_draw_masks_of_their_own():
    seen = []

    def twice(apply, microbatch):
        seen.extend(apply(microbatch["x"], train=True) for _ in range(2))
        return loss(apply, microbatch)

    model = build(loss=twice)
    first = frameworks.made(model)
    key = jax.random.key(1)
    out = model.loss(first.params, first.state, frameworks.data(0), key)
    assert out.state["counts"]["calls"] == 3
    assert not np.array_equal(*seen)


def test_evaluation_draws_nothing_and_takes_running_statistics():
    model = build()
    first = frameworks.made(model)
    evaluate = jax.jit(model.eval_loss)
    args = first.params, first.state, frameworks.data(0)
    outs = [evaluate(*args, jax.random.key(n)) for n in (0, 1)]
    assert outs[0].loss_sum == outs[1].loss_sum
    assert outs[0].state["counts"]["calls"] == 0
    moved = {**first.state, "batch_stats": {"norm": {"mean": 2.0, "var": 3.0}}}
    moved = jax.tree.map(lambda x: jnp.full((WIDTH,), x) if x else x, moved)
    moved["counts"] = first.state["counts"]
    other = evaluate(first.params, moved, frameworks.data(0), jax.random.key(0))
    assert other.loss_sum != outs[0].loss_sum


def message_of(*args, **options):
    with pytest.raises(sk.PartitionError) as caught:
        frameworks.trainer(build(*args, **options))
    return str(caught.value)


def test_counters_without_a_rule_are_named():
    assert "counts/calls  int32[]  found no rule" in message_of(combine={})


def test_collections_that_grow_are_named():
    message = message_of(temporary=[])
    assert "penalties/size/1" in message
    assert "temporary=" in message


def test_params_that_are_no_floats_are_named():
    class Bad(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.param("table", lambda key: jnp.arange(3))
            return nn.Dense(3, name="dense")(x)

    message = message_of(Bad())
    assert "table  int32[3]" in message
    assert "dense" not in message
    assert "self.variable" in message
