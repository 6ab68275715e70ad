"""What is left standing after something went wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit import carry
from shardkit.host_copies import copy_on_host
from shardkit.state_moves import move_state
from shardkit.waits import Waiter


def init(key):
    return {"w": sk.axes(jax.random.normal(key, (12, 3)), "embed", None)}


def loss(params, microbatch, key):
    return jnp.mean((microbatch["x"] @ params["w"]) ** 2)


def batches(step):
    return {"x": np.random.default_rng(step).normal(size=(8, 12)).astype(np.float32)}


def make_trainer(**changes):
    options = {
        "init": init,
        "loss": loss,
        "tx": optax.sgd(0.01),
        "data": batches,
        "num_microbatches": 4,
        "axis_rules": {"embed": "fsdp"},
    }
    return sk.Trainer(**{**options, **changes})


def test_after_a_failed_certificate_the_run_stands_on_the_old_devices(tmp_path):
    def partial(params, microbatch, key):
        try:
            # The index of a device leaves its trace in the loss.
            factor = 1 + jax.lax.axis_index("fsdp")
        except NameError:  # traced for its structure, outside of any mesh
            factor = 1
        return loss(params, microbatch, key) * factor

    checkpoint = sk.CheckpointConfig(directory=tmp_path)
    trainer = make_trainer(loss=partial, checkpoint=checkpoint)
    steps = trainer.run(4, membership=sk.scripted({0: 4, 2: 2}))
    with pytest.raises(sk.CertificateError):
        list(steps)
    assert trainer.step == int(trainer.state.step) == 3
    trainer.save()
    trainer.close()


@pytest.mark.parametrize("verdict", ["stop", "continue"])
def test_a_move_that_alters_a_bit_is_found_before_anything_is_used_up(
    monkeypatch, verdict
):
    def altered(*args, **kwargs):
        moved = move_state(*args, **kwargs)
        change = {"w": moved.tree.params["w"].at[5, 1].multiply(-1)}
        tree = dataclasses.replace(moved.tree, params=change)
        return dataclasses.replace(moved, tree=tree)

    trainer = make_trainer(on_failed_certificate=verdict)
    list(trainer.run(2, membership=sk.scripted({0: 4})))
    before = trainer.state_digest()
    monkeypatch.setattr("shardkit.elastic.move_state", altered)
    with pytest.raises(sk.CertificateError, match=r"altered 1 leaves: params/w\. The"):
        list(trainer.run(4, membership=sk.scripted({2: 2})))
    assert trainer.step == int(trainer.state.step) == 2
    assert trainer.state_digest() == before
    monkeypatch.undo()
    list(trainer.run(4, membership=sk.scripted({2: 2})))
    with make_trainer() as other:
        list(other.run(4))
        assert other.state_digest() == trainer.state_digest()
    trainer.close()


@pytest.mark.parametrize("num_copied", [0, 1])
def test_a_move_that_fails_loses_only_what_it_has_used_up(monkeypatch, num_copied):
    class Full(RuntimeError):
        pass

    def waves_of_one(kinds, **options):
        yield from ([path] for path in kinds)

    def copy(kinds, *args, **options):
        if len(copied) == num_copied:
            raise Full
        copied.append(kinds)
        return copy_on_host(kinds, *args, **options)

    copied = []
    trainer = make_trainer(certify="off")
    list(trainer.run(2, membership=sk.scripted({0: 4})))
    with monkeypatch.context() as patch:
        patch.setattr(carry, "waves", waves_of_one)
        patch.setattr(carry, "copy_on_host", copy)
        with pytest.raises(Full):
            list(trainer.run(4, membership=sk.scripted({2: 3})))
    if num_copied:
        with pytest.raises(sk.LostStateError, match="step 2 was lost"):
            trainer.state_digest()
    else:
        list(trainer.run(4, membership=sk.scripted({2: 3})))
        with make_trainer() as other:
            list(other.run(4))
            assert other.state_digest() == trainer.state_digest()
    trainer.close()


def test_state_and_step_agree_when_a_listener_fails():
    events = sk.EventLog()

    def fail(event):
        if event.name == "reconfigure":
            raise OSError("disk full")

    events.subscribe(fail)
    trainer = make_trainer(events=events)
    with pytest.raises(OSError, match="disk full"):
        list(trainer.run(4, membership=sk.scripted({0: 4, 2: 2})))
    assert trainer.step == int(trainer.state.step) == 3
    trainer.close()


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path):
    def rooted(params, microbatch, key):
        return jnp.mean(jnp.sqrt(jnp.abs(microbatch["x"] @ params["w"])))

    def data(step):
        x = batches(step)["x"]
        return {"x": x * (step != 2)}

    checkpoint = sk.CheckpointConfig(directory=tmp_path, every=1, keep=None)
    trainer = make_trainer(loss=rooted, data=data, checkpoint=checkpoint)
    with pytest.raises(sk.NonFiniteError, match="step 2"):
        list(trainer.run(5))
    assert trainer.restore() == 2
    assert np.isfinite(np.asarray(trainer.state.params["w"])).all()
    trainer.close()


def test_leaves_with_one_path_are_refused():
    def clash(key):
        return {"a/b": jnp.zeros(2), "a": {"b": jnp.ones(2)}}

    with pytest.raises(sk.PartitionError, match=r"params\.a\.b"):
        make_trainer(init=clash)


def test_a_request_that_cannot_be_met_is_told_and_the_run_goes_on(tmp_path):
    path = tmp_path / "devices.json"
    path.write_text('{"num_devices": 99}')
    notices = []
    events = sk.EventLog()
    events.subscribe(lambda e: notices.append(e.fields) if e.name == "notice" else None)
    trainer = make_trainer(events=events)
    assert len(list(trainer.run(2, membership=sk.watch_file(path)))) == 2
    assert any("99" in notice["message"] for notice in notices)
    trainer.close()


def test_the_average_of_half_precision_weights_moves():
    def half(key):
        return {"w": jnp.full((4, 3), 0.01, jnp.bfloat16)}

    def data(step):
        return {"x": np.ones((8, 4), np.float32)}

    trainer = make_trainer(init=half, data=data, ema=0.999, tx=optax.sgd(1.0))
    list(trainer.run(3))
    ema, params = trainer.state.ema["w"], trainer.state.params["w"]
    assert ema.dtype == jnp.float32
    assert not np.array_equal(ema, np.full((4, 3), 0.01, np.float32))
    assert not np.array_equal(ema, np.asarray(params, np.float32))
    trainer.close()


def test_work_that_times_out_is_not_taken_for_waiting():
    def work():
        raise TimeoutError("the file system is gone")

    with pytest.raises(TimeoutError, match="file system"):
        Waiter()(work)


def test_a_large_loss_scale_and_weight_do_not_make_the_gradient_vanish():
    def weighted(params, microbatch, key):
        weight = jnp.float32(2.0**14)
        return sk.LossOutput(loss(params, microbatch, key) * weight * 1e-6, weight)

    scale = sk.LossScale(initial=2.0**112, growth_interval=None)
    trainer = make_trainer(loss=weighted, loss_scale=scale)
    [metrics] = trainer.run(1)
    assert 0 < metrics.metrics["grad_norm"] < np.inf
    trainer.close()
