"""The loop: gradients, compilations, certificates, losses and signals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    LINEAR_BATCH,
    consume,
    fields_of,
    linear,
    linear_data,
    linear_errors,
    mean_loss,
    weighted_loss,
)

import shardkit as sk
from shardkit.placement import Placement
from shardkit.testing import assert_same_bits, run_digest

RECORD = optax.trace(decay=0.0)
"""A transformation whose state is the gradient that it was given last."""


def float64_gradient(params, batch, weights):
    """The gradient of Σ weight · |error|² / Σ weight, by hand."""
    x, y, kernel, bias, weights = (
        np.asarray(a, np.float64)
        for a in (batch["x"], batch["y"], params["kernel"], params["bias"], weights)
    )
    error = 2 * (x @ kernel + bias - y) * weights[:, None] / weights.sum()
    return {"kernel": x.T @ error, "bias": error.sum(axis=0)}


@pytest.mark.parametrize("consistency", ["exact", "fast"])
def test_the_gradient_of_unequal_microbatches_is_that_of_the_batch(make, consistency):
    trainer, _ = make(loss=weighted_loss, tx=RECORD, consistency=consistency)
    params = jax.tree.map(np.asarray, trainer.state.params)
    batch = linear_data(0)
    [metrics] = consume(trainer, 1)
    found = trainer.state.opt_state.trace

    def whole(params):
        out = weighted_loss(params, batch, None)
        return out.loss_sum / out.weight

    loss, plain = jax.value_and_grad(whole)(params)
    by_hand = float64_gradient(params, batch, batch["counts"])
    for name in params:
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[name], by_hand[name], rtol=1e-5, atol=3e-7)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    assert metrics.metrics["weight"] == batch["counts"].sum()
    norm = np.sqrt(sum(np.sum(g**2) for g in by_hand.values()))
    np.testing.assert_allclose(metrics.metrics["grad_norm"], norm, rtol=1e-6)


def test_a_scalar_loss_is_the_mean_over_microbatches(make):
    trainer, _ = make(tx=RECORD)
    params = jax.tree.map(np.asarray, trainer.state.params)
    [metrics] = consume(trainer, 1)
    by_hand = float64_gradient(params, linear_data(0), np.ones(LINEAR_BATCH))
    for name, found in trainer.state.opt_state.trace.items():
        # The mean over three outputs too, which the one by hand sums.
        np.testing.assert_allclose(found, by_hand[name] / 3, rtol=1e-5, atol=3e-7)
    np.testing.assert_allclose(
        metrics.loss, np.mean(linear_errors(params, linear_data(0)) ** 2), rtol=1e-6
    )


def test_a_power_of_two_loss_scale_changes_no_bit(make):
    plain, _ = make()
    scaled, _ = make(loss_scale=sk.LossScale(initial=2.0**9, growth_interval=None))
    for trainer in (plain, scaled):
        consume(trainer, 3)
    assert_same_bits(scaled.state.params, plain.state.params)
    assert_same_bits(scaled.state.opt_state, plain.state.opt_state)


def test_a_known_placement_compiles_and_traces_nothing(make):
    num_calls = []

    def counted(*args):
        num_calls.append(args)
        return mean_loss(*args)

    trainer, events = make(loss=counted)
    consume(trainer, 4, {0: 8, 2: 4})
    num_before = len(num_calls)
    consume(trainer, 9, {0: 8, 2: 4, 4: 8, 6: 4, 8: 8})
    assert trainer.compiles["step"] == 2
    assert len(num_calls) == num_before
    compiled = [fields["program"] for fields in fields_of(events, "compile")]
    assert compiled.count("step") == 2
    assert len(fields_of(events, "reconfigure")) == 4


def test_the_state_is_donated(make):
    trainer, events = make(ema=0.9)
    for count in (8, 3):
        consume(trainer, trainer.step + 1, {0: count})
        # Pieces, not the unpadded copies that `trainer.state` makes.
        placement, state = trainer._controller.start()
        consume(trainer, trainer.step + 1, {0: count})
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        assert placement.not_donated == []
    assert not [n for n in fields_of(events, "notice") if "donated" in n["message"]]


def test_what_cannot_be_donated_is_named(make, monkeypatch):
    compile_step = Placement.compile

    def compile_without_donation(placement):
        compile_step(placement)
        run = placement.executable
        placement.executable = lambda state, *rest: run(
            jax.tree.map(jnp.copy, state), *rest
        )

    monkeypatch.setattr("shardkit.placement._TOLD_BYTES", 0)
    monkeypatch.setattr(Placement, "compile", compile_without_donation)
    trainer, events = make()
    consume(trainer, 2)
    notices = [fields["message"] for fields in fields_of(events, "notice")]
    [message] = [text for text in notices if "donated" in text]
    assert "params/kernel" in message


def test_metrics_come_one_step_behind_and_all_of_them(make):
    trainer, _ = make()
    steps_begun = [(m.step, trainer.step) for m in trainer.run(steps=4)]
    assert steps_begun == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(trainer.run(steps=4)) == []
    seen = consume(trainer, 7)
    assert [(m.step, m.num_devices, m.mesh) for m in seen] == [
        (4, 8, {"data": 2, "fsdp": 4}),
        (5, 8, {"data": 2, "fsdp": 4}),
        (6, 8, {"data": 2, "fsdp": 4}),
    ]
    assert seen[0].loss_bits == np.float32(seen[0].loss).tobytes()[::-1].hex()
    assert seen[1].tokens_per_s > 0


@pytest.mark.parametrize(
    ("certify", "verdicts"),
    [
        ("always", [True, True, True, True]),
        ("first", [True, None, True, None]),
        ("off", [None, None, None, None]),
    ],
)
def test_certification(make, certify, verdicts):
    trainer, events = make(certify=certify)
    script = {1: 4, 2: 8, 3: 3, 4: 8}
    twin, _ = make(certify="off")
    assert run_digest(trainer, 5, script) == run_digest(twin, 5)
    changes = fields_of(events, "reconfigure")
    assert [change["certified"] for change in changes] == verdicts
    assert [change["step"] for change in changes] == [1, 2, 3, 4]
    assert {
        name: value
        for name, value in changes[2].items()
        if name not in ("bytes_moved", "plain_bytes_moved", "phases")
    } == {
        "step": 3,
        "from_devices": 8,
        "to_devices": 3,
        "from_mesh": {"data": 2, "fsdp": 4},
        "to_mesh": {"fsdp": 3},
        "consistency": "exact",
        "was_ready": False,
        "certified": verdicts[2],
        "move_certified": certify != "off",
    }
    assert changes[1]["bytes_moved"] > 0


def axis_index(axes):
    """Which device this is; what no loss or optimizer should look at."""
    try:
        return jax.lax.axis_index(axes).astype(jnp.float32)
    except NameError:
        # There is no mesh yet where only shapes are asked for.
        return jnp.float32(0)


def depends_on_the_device(params, microbatch, key):
    return mean_loss(params, microbatch, key) * (1 + axis_index(("data", "fsdp")))


def test_a_loss_that_depends_on_the_device_fails_its_certificate(make):
    trainer, events = make(loss=depends_on_the_device)
    with pytest.raises(sk.CertificateError, match=r"step 1: .*kernel") as caught:
        consume(trainer, 3, {1: 4})
    message = str(caught.value)
    assert "'fsdp': 4" in message
    assert "'fsdp': 2" in message
    assert "metrics/grad_norm" in message
    assert "on_failed_certificate='continue'" in message
    assert fields_of(events, "reconfigure") == []
    # The run goes on where it can.
    assert [m.num_devices for m in consume(trainer, 4)][-1] == 8
    assert int(trainer.state.step) == 4


def test_an_optimizer_that_depends_on_the_device_names_its_leaves(make):
    def add_noise(updates, state, params=None):
        # A piece of a kernel knows where it is; biases are whole.
        noise = axis_index("fsdp")
        return jax.tree.map(lambda g: g + noise * (g.ndim == 2), updates), state

    noise = optax.GradientTransformation(lambda params: optax.EmptyState(), add_noise)
    trainer, _ = make(tx=optax.chain(noise, optax.sgd(0.1)))
    with pytest.raises(sk.CertificateError, match="1 leaves: params/kernel"):
        consume(trainer, 3, {1: 4})


def test_what_failed_its_certificate_is_looked_at_again(make):
    options = {"certify": "first", "on_failed_certificate": "continue"}
    trainer, events = make(loss=depends_on_the_device, **options)
    consume(trainer, 6, {1: 4, 2: 8, 3: 4})
    verdicts = [change["certified"] for change in fields_of(events, "reconfigure")]
    assert verdicts == [False, False, False]
    notices = [event["message"] for event in fields_of(events, "notice")]
    failed = [message for message in notices if "other bits" in message]
    assert len(failed) == 3
    assert all("goes on with the new devices" in message for message in failed)


def test_settings_of_a_block_reach_what_is_compiled_in_it(make):
    seen = []

    def loss(*args):
        seen.append(jax.config.jax_default_matmul_precision)
        return mean_loss(*args)

    with jax.default_matmul_precision("highest"):
        trainer, _ = make(loss=loss)
        consume(trainer, 2, {1: 3})
    assert set(seen) == {"highest"}


def test_nothing_to_count_in_an_evaluation_is_an_error(make):
    def nothing(index):
        return linear_data(index) | {"counts": np.zeros(LINEAR_BATCH, np.float32)}

    evaluation = sk.EvalConfig(data=nothing, every=0)
    trainer, _ = make(loss=weighted_loss, eval=evaluation)
    with pytest.raises(sk.NonFiniteError, match="weight of all 1 batches"):
        trainer.evaluate()


def test_an_evaluation_may_have_other_leaves_and_rows(make):
    def held_out(index):
        batch = {name: x[:8] for name, x in linear_data(index).items()}
        return batch | {"unused": np.ones(8)}

    def eval_loss(params, microbatch, key):
        return mean_loss(params, microbatch, key) * microbatch["unused"].mean()

    evaluation = sk.EvalConfig(data=held_out, every=0)
    trainer, _ = make(eval_loss=eval_loss, eval=evaluation, num_microbatches=4)
    loss = np.mean(linear_errors(trainer.state.params, held_out(0)) ** 2)
    np.testing.assert_allclose(trainer.evaluate()["loss"], loss, rtol=1e-5)


def test_a_failed_certificate_need_not_stop_the_run(make):
    trainer, events = make(loss=depends_on_the_device, on_failed_certificate="continue")
    seen = consume(trainer, 4, {1: 4})
    assert [m.num_devices for m in seen] == [8, 4, 4, 4]
    [change] = fields_of(events, "reconfigure")
    assert change["certified"] is False
    [notice] = fields_of(events, "notice")
    assert "params/kernel" in notice["message"]


def test_evaluation_comes_when_it_is_due_and_names_the_metrics(make):
    batches = [linear_data(100 + index) for index in range(3)]
    evaluation = sk.EvalConfig(data=batches.__getitem__, every=2, num_batches=3)
    trainer, events = make(loss=weighted_loss, eval=evaluation)
    consume(trainer, 5, {3: 3})
    assert [fields["step"] for fields in fields_of(events, "eval")] == [2, 4]
    found = trainer.evaluate()
    params = trainer.state.params
    outputs = [weighted_loss(params, batch, None) for batch in batches]
    loss = sum(o.loss_sum for o in outputs) / sum(o.weight for o in outputs)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    assert found.keys() == {"loss", "largest"}


def test_evaluation_uses_the_average_if_there_is_one(make):
    evaluation = sk.EvalConfig(data=linear_data, every=0)
    trainer, _ = make(loss=weighted_loss, eval=evaluation, ema=0.5)
    consume(trainer, 3)
    out = weighted_loss(trainer.state.ema, linear_data(0), None)
    loss = trainer.evaluate()["loss"]
    np.testing.assert_allclose(loss, out.loss_sum / out.weight, rtol=1e-5)


def drawing_loss(params, microbatch, key):
    return mean_loss(params, microbatch, key) * 0 + jax.random.uniform(key)


def test_every_batch_of_an_evaluation_draws_anew_and_the_same_everywhere(make):
    def evaluated(num_batches, mesh):
        evaluation = sk.EvalConfig(data=linear_data, every=0, num_batches=num_batches)
        trainer, _ = make(loss=drawing_loss, eval=evaluation, mesh=mesh)
        return trainer.evaluate()["loss"], consume(trainer, 1)[0].loss

    one, trained = evaluated(1, sk.MeshSpec())
    two, _ = evaluated(2, sk.MeshSpec())
    assert len({one, two, trained}) == 3
    assert evaluated(2, sk.MeshSpec(data=2)) == (two, trained)


def test_a_batch_unlike_the_first_is_named(make):
    def data(step):
        return {k: x[: 12 if step == 3 else None] for k, x in linear_data(step).items()}

    trainer, _ = make(data=data)
    with pytest.raises(sk.DataError, match=r"data\(3\): .* first batch"):
        consume(trainer, 6)
    assert trainer.step == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"consistency": "loose"}, sk.ConfigError, "'exact', 'fast', found 'loose'"),
        ({"certify": "never"}, sk.ConfigError, "certify .* found 'never'"),
        ({"num_microbatches": 7}, sk.DataError, "24.*7|7.*24"),
        ({"num_microbatches": 16385}, sk.ConfigError, "num_microbatches.*16384"),
        ({"mesh": sk.MeshSpec(tensor=16)}, sk.MeshError, "at least 16 devices"),
        ({"mesh": sk.MeshSpec(tensor=2, expert=5)}, sk.MeshError, "least 10 devices"),
        (
            {"axis_rules": {"in": "fsdp", "inn": "fsdp"}, "strict": True},
            sk.PartitionError,
            "inn",
        ),
        (
            {"init": lambda key: {"w": jnp.ones(4)}, "axis_rules": {}, "strict": True},
            sk.PartitionError,
            "w",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)[0].state  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": lambda: {}}, r"init must be .*\(key\), found \(\): too many"),
        ({"loss": lambda p: 0}, r"loss must be .*\(params, microbatch, key\), found"),
        ({"eval_loss": lambda x, y: 0}, r"eval_loss must be .*found \(x, y\)"),
        ({"data": iter(())}, r"data must be .*\(step\), found tuple_iterator"),
        ({"mesh": 4}, r"mesh must be .* or an sk.AutoMesh, found 4"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(make, options, message):
    with pytest.raises(sk.ConfigError, match=message):
        make(**options)


def test_a_membership_of_the_wrong_kind_is_named(make):
    trainer, _ = make()
    with pytest.raises(sk.MembershipError, match=r"sk\.scripted.*found \{1: 2\}"):
        list(trainer.run(3, {1: 2}))


def test_a_loss_with_something_beside_it_is_told_of_metrics(make):
    def loss(*args):
        return mean_loss(*args), {"aux": 1}

    with pytest.raises(sk.PartitionError, match=r"LossOutput.*found a tuple.*metrics"):
        make(loss=loss)


def test_notices_that_nobody_listens_to_are_logged(caplog):
    rules = {**linear()["axis_rules"], "nobody": "fsdp"}
    with sk.Trainer(**linear() | {"axis_rules": rules}):
        pass
    [record] = caplog.records
    assert record.name == "shardkit"
    assert "nobody" in record.message


def test_a_script_beyond_the_pool_is_refused_before_anything_runs(make):
    trainer, _ = make()
    with pytest.raises(sk.MembershipError, match=r"from 1 to 8.*found \{3: 9\}"):
        consume(trainer, 4, {3: 9})
    assert trainer.step == 0
