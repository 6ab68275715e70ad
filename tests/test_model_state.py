"""State beside the parameters: carried, combined in one order, never dropped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit.recipe import Recipe
from shardkit.state_layout import lay_out

ROWS, WIDTH, GRID = 26, 7, 13
DECAY = 0.9


def init(key):
    params = {
        "up": sk.axes(jax.random.normal(key, (5, WIDTH)), "embed", "mlp"),
        "scale": sk.axes(jnp.ones(WIDTH), "mlp"),
        "down": jax.random.normal(key, (WIDTH,)),
    }
    state = {
        "mean": sk.axes(jnp.zeros(WIDTH), "mlp"),
        "var": jnp.ones(WIDTH, jnp.bfloat16),
        "calls": jnp.int32(0),
        "last_seen": jnp.zeros((2, 5)),
        "is_warm": jnp.array(False),
        "table": jnp.arange(3.0),
        "key": jax.random.key(7),
    }
    return sk.Variables(params, state)


def loss(params, state, microbatch, key):
    x = microbatch["x"] @ params["up"]
    mean, var = x.mean(0), x.var(0)
    normal = (x - mean) * jax.lax.rsqrt(var + 1e-3) * params["scale"]
    noise = jax.random.bernoulli(key, 0.8, normal.shape)
    out = jnp.where(noise, normal, 0) @ params["down"]
    old = state["var"].astype(jnp.float32)
    left = {
        **state,
        "mean": DECAY * state["mean"] + (1 - DECAY) * mean,
        "var": (DECAY * old + (1 - DECAY) * var).astype(jnp.bfloat16),
        "calls": state["calls"] + 1,
        "last_seen": microbatch["x"],
        "is_warm": state["calls"] >= GRID,
    }
    return sk.LossOutput(((out - 1) ** 2).sum(), out.size, state=left)


def eval_loss(params, state, microbatch, key):
    x = microbatch["x"] @ params["up"] - state["mean"]
    x = x * jax.lax.rsqrt(state["var"].astype(jnp.float32) + 1e-3) * params["scale"]
    return sk.LossOutput(((x @ params["down"] - 1) ** 2).sum(), x.shape[0])


def data(step):
    x = np.random.default_rng(step).normal(size=(ROWS, 5)).astype(np.float32)
    return {"x": x}


COMBINE = {"calls": "sum", "last_seen": "last", "is_warm": "last"}


def make(**changes):
    options = {
        "init": init,
        "loss": loss,
        "eval_loss": eval_loss,
        "tx": optax.adamw(0.01),
        "data": data,
        "num_microbatches": GRID,
        "axis_rules": {"embed": "fsdp", "mlp": "fsdp"},
        "combine": COMBINE,
        "certify": "off",
        "eval": sk.EvalConfig(data=data, every=2, num_batches=2),
    }
    return sk.Trainer(**options | changes)


def run(trainer, steps, counts):
    losses = [m.loss for m in trainer.run(steps, membership=sk.scripted(counts))]
    return losses, trainer.state_digest(), trainer.evaluate()


@pytest.mark.parametrize(
    "counts",
    [{0: 8, 2: 5, 3: 2, 4: 8}, pytest.param({0: 3}, marks=pytest.mark.slow)],
)
def test_any_devices_leave_the_same_bits(counts):
    assert run(make(), 6, counts) == run(make(), 6, {0: 1})


def test_what_is_left_is_what_the_rules_say():
    trainer = make()
    list(trainer.run(3, membership=sk.scripted({0: 5})))
    state = jax.tree.map(np.asarray, {**trainer.state.model_state, "key": 0})
    mean, var = np.zeros(WIDTH), np.ones(WIDTH)
    reference = make()
    for step in range(3):
        list(reference.run(step, membership=sk.scripted({0: 1})))
        up = np.asarray(reference.state.params["up"], np.float64)
        x = (data(step)["x"] @ up).reshape(GRID, -1, WIDTH)
        mean = DECAY * mean + (1 - DECAY) * x.mean(1).mean(0)
        var = DECAY * var + (1 - DECAY) * x.var(1).mean(0)
    np.testing.assert_allclose(state["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["var"].astype(float), var, rtol=0.02)
    assert state["calls"] == 3 * GRID
    np.testing.assert_array_equal(state["last_seen"], data(2)["x"][-2:])
    assert state["is_warm"]
    np.testing.assert_array_equal(state["table"], np.arange(3.0))


def test_a_saved_state_comes_back(tmp_path):
    config = sk.CheckpointConfig(directory=tmp_path, every=2)
    wanted = run(make(), 6, {0: 1})
    trainer = make(checkpoint=config)
    list(trainer.run(4, membership=sk.scripted({0: 8})))
    trainer.close()
    trainer = make(checkpoint=config)
    assert trainer.restore() == 4
    assert run(trainer, 6, {0: 3})[1:] == wanted[1:]


def test_a_step_that_is_skipped_leaves_the_state():
    def overflowing(params, state, microbatch, key):
        out = loss(params, state, microbatch, key)
        factor = jnp.where(state["calls"] == GRID, jnp.inf, 1.0)
        return dataclasses.replace(out, loss_sum=out.loss_sum * factor)

    trainer = make(loss=overflowing, loss_scale=sk.LossScale(), eval=None)
    steps = trainer.run(3, membership=sk.scripted({0: 3}))
    next(steps, None)
    steps.close()
    assert int(trainer.state.model_state["calls"]) == GRID


def test_fast_is_exact_but_for_rounding():
    exact, fast = make(), make(consistency="fast")
    for trainer in (exact, fast):
        list(trainer.run(4, membership=sk.scripted({0: 5})))
    for name in ("mean", "var", "calls", "last_seen"):
        one, other = (np.asarray(t.state.model_state[name]) for t in (exact, fast))
        np.testing.assert_allclose(one.astype(float), other.astype(float), rtol=2e-2)


def test_changes_without_a_rule_are_named_together():
    with pytest.raises(sk.PartitionError) as caught:
        make(combine={"is_warm": "mean", "calls": "sum"})
    message = str(caught.value)
    assert "is_warm  bool[]  found mean  can be last" in message
    assert "calls" not in message
    with pytest.raises(sk.PartitionError, match=r"calls +int32\[\] +found no rule"):
        make(combine={})


def test_random_keys_that_change_are_refused():
    def drawing(params, state, microbatch, key):
        out = loss(params, state, microbatch, key)
        left = out.state | {"key": jax.random.split(state["key"])[0]}
        return dataclasses.replace(out, state=left)

    with pytest.raises(sk.PartitionError, match="key"):
        make(loss=drawing, combine={**COMBINE, "key": "last"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: None, "calls .*found nothing"),
        (lambda s: {**s, "more": s["mean"]}, "more .*expected nothing"),
        (lambda s: {**s, "mean": s["mean"][:3]}, r"mean .*float32\[7\].*float32\[3\]"),
        (lambda s: {**s, "calls": jnp.float32(0)}, r"int32\[\].*float32\[\]"),
    ],
)
def test_another_state_than_was_given_is_refused(change, message):
    def changed(*arguments):
        out = loss(*arguments)
        return dataclasses.replace(out, state=change(out.state))

    with pytest.raises(sk.PartitionError, match=message):
        make(loss=changed)


def test_a_loss_without_the_state_is_told_so():
    with pytest.raises(sk.ConfigError, match="params, state, microbatch, key"):
        make(loss=lambda params, microbatch, key: 0.0)


def test_a_state_of_a_model_without_one_is_refused():
    def stateful(params, microbatch, key):
        return sk.LossOutput(params["w"].sum(), 1, state={"n": jnp.int32(0)})

    with pytest.raises(sk.PartitionError, match=r"n .*expected nothing"):
        make(init=lambda key: {"w": jnp.zeros(3)}, loss=stateful, eval_loss=None)


@pytest.mark.parametrize("count", [pytest.param(6, marks=pytest.mark.slow), 8])
def test_as_many_devices_as_microbatches_leave_the_same_bits(count):
    def narrow(step):
        return {"x": data(step)["x"][:24]}

    changes = {"data": narrow, "num_microbatches": 6, "eval": None, "combine": COMBINE}

    def init_six(key):
        made = init(key)
        return sk.Variables(made.params, made.state | {"last_seen": jnp.zeros((4, 5))})

    found = []
    for num_devices in (1, count):
        trainer = make(init=init_six, **changes)
        steps = trainer.run(3, membership=sk.scripted({0: num_devices}))
        found.append(([m.loss_bits for m in steps], trainer.state_digest()))
    assert found[0] == found[1]


VALUES = {
    "infinite": (np.inf, np.inf),
    "negative_zero": (-0.0, -0.0),
    "reset": (1e9, 0.1),
    "ones": (0.0, 1.0),
    "huge": (0.0, 2e36),
}


@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit, jax.checkpoint])
def test_what_all_microbatches_leave_alike_is_what_is_left(wrapped):
    def init(key):
        state = {name: jnp.full(3, old) for name, (old, _) in VALUES.items()}
        state |= {"kept": jnp.array([-0.0, jnp.nan]), "key": jax.random.key(1)}
        return sk.Variables({"w": jnp.ones(5)}, {**state, "sum": jnp.array(-jnp.inf)})

    @wrapped
    def loss(params, state, microbatch, key):
        # The sum of each is unlike in the compiler's eyes.
        zero = 0 * jnp.floor(jnp.abs(microbatch["x"][0, 0]) / 1e9)
        left = {name: new + zero for name, (_, new) in VALUES.items()}
        left = {name: jnp.broadcast_to(x, 3) for name, x in left.items()}
        left["negative_zero"] = state["negative_zero"] * (1 + zero)
        left |= {"sum": state["sum"] + zero}
        value = (microbatch["x"] @ params["w"]).sum()
        return sk.LossOutput(value, jnp.float32(1), state={**state, **left})

    trainer = make(
        init=init,
        loss=loss,
        eval_loss=None,
        eval=None,
        combine={"sum": "sum"},
        axis_rules={},
    )
    list(trainer.run(1, membership=sk.scripted({0: 3})))
    found = trainer.state.model_state
    for name, (_, new) in VALUES.items():
        wanted = np.full(3, new, np.float32)
        assert np.asarray(found[name]).tobytes() == wanted.tobytes(), name
    # Handed on, whatever the loss is wrapped in: nothing is computed of it.
    assert np.signbit(found["kept"][0])
    assert np.isneginf(found["sum"])


def test_cut_keys_stay_together():
    def init(key):
        return sk.Variables({"w": jnp.ones(5)}, {"keys": jax.random.split(key, 4)})

    def loss(params, state, microbatch, key):
        value = (microbatch["x"] @ params["w"]).sum()
        return sk.LossOutput(value, jnp.float32(1), state=state)

    changes = {"init": init, "loss": loss, "eval_loss": None, "eval": None}
    rules = {"combine": {}, "axis_rules": {}, "path_rules": {"keys": ("fsdp",)}}
    digests = []
    for count in (1, 3):
        trainer = make(**changes, **rules)
        list(trainer.run(1, membership=sk.scripted({0: count})))
        digests.append(trainer.state_digest())
    assert digests[0] == digests[1]


def test_axes_of_a_copy_in_the_state_are_its_own():
    def init(key):
        w = jnp.ones((4, 8))
        return sk.Variables(
            {"w": sk.axes(w, None, "mlp")}, {"w": sk.axes(w, "embed", None)}
        )

    recipe = Recipe(
        init=init, loss=loss, tx=optax.adam(0.1), num_microbatches=GRID, ema=0.9
    )
    layout, *_ = lay_out(recipe, {})
    axes = {leaf.path: leaf.axes for leaf in jax.tree.leaves(layout)}
    assert axes["params/w"] == axes["ema/w"] == (None, "mlp")
    assert axes["model_state/w"] == ("embed", None)
    assert axes["opt_state/0/mu/w"] == (None, "mlp")


def test_an_evaluation_on_other_batches_may_leave_another_state():
    def loss(params, state, microbatch, key):
        value = (microbatch["x"] @ params["w"]).sum()
        left = {"seen": microbatch["x"]}
        return sk.LossOutput(value, jnp.float32(len(microbatch["x"])), state=left)

    trainer = make(
        init=lambda key: sk.Variables({"w": jnp.ones(5)}, {"seen": jnp.zeros((2, 5))}),
        loss=loss,
        eval_loss=None,
        combine={"seen": "last"},
        axis_rules={},
        eval=sk.EvalConfig(
            data=lambda step: {"x": np.ones((52, 5), np.float32)}, every=0
        ),
    )
    assert trainer.evaluate()["loss"] == 5.0
