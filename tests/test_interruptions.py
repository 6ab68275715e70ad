"""What ends a run or takes its devices away, and what is left of it."""

import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from problems import consume, fields_of, linear, linear_data, mean_loss

import shardkit as sk
from shardkit import placement
from shardkit.checkpoint import manager, sums
from shardkit.testing import run_digest
from shardkit.waits import POLL_S


def collect(run, error, message, then=lambda step: None):
    """Follows a run to the error that it ends with; returns the steps it yielded."""
    seen = []

    def follow():
        for metrics in run:
            seen.append(metrics.step)
            then(metrics.step)

    with pytest.raises(error, match=message):
        follow()
    return seen


def test_lost_devices_are_made_good_by_replicas(make):
    trainer, events = make(certify="always")
    twin, _ = make()
    expected = run_digest(twin, 8)
    # On 2 × 4 the second replica survives whole, on 8 → 4 and on 4 → 2.
    assert run_digest(trainer, 8, {3: sk.Lost(4), 5: sk.Lost(2)}) == expected
    changes = fields_of(events, "reconfigure")
    assert [change["certified"] for change in changes] == [None, None]
    assert fields_of(events, "rewind") == []


def test_lost_devices_without_replicas_repeat_steps(make, tmp_path):
    checkpoint = sk.CheckpointConfig(directory=tmp_path, every=3)
    trainer, events = make(mesh=sk.MeshSpec(data=1, fsdp=-1), checkpoint=checkpoint)
    twin, _ = make()
    script = sk.scripted({5: sk.Lost(4), 7: 8})
    seen = list(trainer.run(steps=9, membership=script))
    assert [m.step for m in seen] == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8]
    assert [m.num_devices for m in seen][4:] == [8, 4, 4, 4, 4, 8, 8]
    assert trainer.state_digest() == run_digest(twin, 9)["state"]
    assert fields_of(events, "rewind") == [
        {"step": 3, "repeats": 2, "source": "checkpoint"}
    ]
    [notice] = fields_of(events, "notice")
    assert "step 3 restored" in notice["message"]
    lost, back = fields_of(events, "reconfigure")
    assert lost["certified"] is None
    assert [phase["name"] for phase in lost["phases"]] == [
        *("derive", "plan", "restore", "compile")
    ]
    assert back["certified"] is True


def test_lost_devices_without_anything_saved_end_the_run(make, tmp_path):
    checkpoint = sk.CheckpointConfig(directory=tmp_path, every=5)
    for options in ({}, {"checkpoint": checkpoint}):
        trainer, _ = make(mesh=sk.MeshSpec(data=1, fsdp=-1), **options)
        with pytest.raises(sk.LostStateError, match="params/kernel"):
            consume(trainer, 4, {2: sk.Lost(4)})


def test_a_loss_that_is_not_finite_ends_the_run_with_what_was_saved(make, tmp_path):
    def breaking(step):
        batch = linear_data(step)
        if step == 4:
            batch["x"][0, 0] = np.nan
        return batch

    checkpoint = sk.CheckpointConfig(directory=tmp_path, every=1, keep=None)
    for scale in (None, sk.LossScale(growth_interval=None)):
        trainer, events = make(data=breaking, checkpoint=checkpoint, loss_scale=scale)
        seen = collect(trainer.run(steps=9), sk.NonFiniteError, "step 4: .* nan")
        assert seen == [0, 1, 2, 3]
        assert max(fields["step"] for fields in fields_of(events, "checkpoint")) == 4
        assert trainer.restore() == 4
        assert all(
            np.isfinite(leaf).all() for leaf in jax.tree.leaves(trainer.state.params)
        )
        checkpoint = sk.CheckpointConfig(
            directory=tmp_path / "scaled", every=1, keep=None
        )


def test_sigterm_saves_and_leaves_and_the_run_goes_on_later(make, tmp_path):
    checkpoint = sk.CheckpointConfig(directory=tmp_path)
    trainer, _ = make(checkpoint=checkpoint)
    handler = signal.getsignal(signal.SIGTERM)
    run = trainer.run(steps=9, membership=sk.signals())

    def leave(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    seen = collect(run, sk.Preempted, r"step \d+ is saved", leave)
    assert signal.getsignal(signal.SIGTERM) is handler
    # Nothing that was computed is kept from the listener.
    assert seen == list(range(trainer.step))
    again, _ = make(checkpoint=checkpoint)
    assert again.restore() == trainer.step
    twin, _ = make()
    assert run_digest(again, 9)["state"] == run_digest(twin, 9)["state"]


class SlowTrace:
    """Lets a function get SIGTERM, and then wait, when it is traced to be compiled."""

    def __init__(self):
        self.is_on, self.released = threading.Event(), threading.Event()

    def __call__(self, fn):
        def traced(*args):
            is_main = threading.current_thread() is threading.main_thread()
            if self.is_on.is_set() and not is_main:
                os.kill(os.getpid(), signal.SIGTERM)
                assert self.released.wait(60)
            return fn(*args)

        return traced

    def leaves(self, trainer, script, message):
        """Asserts that a run ends so, while the function is still being traced."""
        self.is_on.set()
        membership = sk.combine(sk.scripted(script), sk.signals())
        try:
            with pytest.raises(sk.Preempted, match=message):
                list(trainer.run(steps=9, membership=membership))
            assert not self.released.is_set()
        finally:
            self.is_on.clear()
            self.released.set()


@pytest.mark.parametrize("at_step", [0, 3])
def test_sigterm_is_heard_while_a_step_compiles(make, tmp_path, at_step):
    slow = SlowTrace()
    checkpoint = sk.CheckpointConfig(directory=tmp_path)
    trainer, _ = make(loss=slow(mean_loss), checkpoint=checkpoint)
    consume(trainer, at_step)
    slow.leaves(trainer, {at_step: 4}, f"step {at_step} is saved")
    again, _ = make(checkpoint=checkpoint)
    assert again.restore() == at_step
    twin, _ = make()
    assert run_digest(again, 6)["state"] == run_digest(twin, 6)["state"]


def test_sigterm_is_heard_while_the_first_state_compiles(make, tmp_path):
    slow = SlowTrace()
    init = slow(linear()["init"])
    trainer, _ = make(init=init, checkpoint=sk.CheckpointConfig(directory=tmp_path))
    slow.leaves(trainer, {}, "nothing has changed since step 0")
    assert not any(tmp_path.iterdir())


def test_sigterm_is_heard_while_an_evaluation_compiles(make, tmp_path):
    slow = SlowTrace()
    trainer, events = make(
        eval_loss=slow(mean_loss),
        checkpoint=sk.CheckpointConfig(directory=tmp_path),
        eval=sk.EvalConfig(data=linear_data, every=2),
    )
    slow.leaves(trainer, {}, "step 2 is saved")
    assert fields_of(events, "eval") == []


def test_sigterm_while_a_checkpoint_is_written_still_saves(make, tmp_path, monkeypatch):
    def seal(directory, manifest):
        if manifest.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5 * POLL_S)
        sums.seal(directory, manifest)

    monkeypatch.setattr(manager, "seal", seal)
    checkpoint = sk.CheckpointConfig(directory=tmp_path, every=2)
    trainer, _ = make(checkpoint=checkpoint)
    with pytest.raises(sk.Preempted, match=r"step \d is saved"):
        list(trainer.run(steps=10**6, membership=sk.signals()))
    again, _ = make(checkpoint=checkpoint)
    assert 2 in again.saved_steps
    assert again.restore() == trainer.step
    assert again.state_digest() == trainer.state_digest()


def test_sigterm_is_heard_while_a_batch_is_waited_for(make, tmp_path):
    released = threading.Event()

    def stuck(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            assert released.wait(60)
        return linear_data(step)

    trainer, _ = make(data=stuck, checkpoint=sk.CheckpointConfig(directory=tmp_path))
    try:
        run = trainer.run(steps=9, membership=sk.signals())
        seen = collect(run, sk.Preempted, r"step \d is saved")
        # What is saved has been looked at, and nobody misses a step of it.
        assert seen == list(range(trainer.step))
        assert trainer.step <= 3
    finally:
        released.set()


def test_sigterm_while_a_batch_is_waited_for_saves_no_nan(make, tmp_path):
    released = threading.Event()

    def stuck(step):
        batch = linear_data(step)
        if step == 2:
            batch["x"][0, 0] = np.nan
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            assert released.wait(60)
        return batch

    checkpoint = sk.CheckpointConfig(directory=tmp_path)
    trainer, _ = make(data=stuck, checkpoint=checkpoint)
    try:
        with pytest.raises((sk.NonFiniteError, sk.Preempted)):
            list(trainer.run(steps=9, membership=sk.signals()))
    finally:
        released.set()
    assert all(step <= 2 for step in trainer.saved_steps)


def test_what_is_done_between_two_steps_is_not_given_up(make, tmp_path):
    trainer, _ = make(
        checkpoint=sk.CheckpointConfig(directory=tmp_path),
        eval=sk.EvalConfig(data=linear_data, every=0, num_batches=3),
    )
    seen = []

    def evaluate(step):
        seen.append(step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            assert trainer.evaluate()["loss"] > 0

    run = trainer.run(steps=9, membership=sk.signals())
    collect(run, sk.Preempted, "is saved", evaluate)
    assert seen == list(range(trainer.step))
    assert trainer.saved_steps == [trainer.step]


@pytest.mark.parametrize(
    ("mesh", "count"),
    [
        (sk.MeshSpec(data=2, fsdp=-1), 1),
        pytest.param(sk.MeshSpec(data=-1, fsdp=2), 3, marks=pytest.mark.slow),
        pytest.param(sk.MeshSpec(data=-1, fsdp=1), 4, marks=pytest.mark.slow),
    ],
)
def test_sigterm_during_a_certificate_waits_for_its_end(
    make, tmp_path, monkeypatch, mesh, count
):
    # On one shard a step names the sharding of what it returns otherwise.
    step, compiled = placement.Placement.step, []

    def signalled(self, *args):
        found = step(self, *args)
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            compiled.append(len(fields_of(events, "compile")))
        return found

    monkeypatch.setattr(placement.Placement, "step", signalled)
    checkpoint = sk.CheckpointConfig(directory=tmp_path)
    trainer, events = make(checkpoint=checkpoint, mesh=mesh, certify="always")
    membership = sk.combine(sk.scripted({2: count}), sk.signals())
    with pytest.raises(sk.Preempted, match="step 3 is saved"):
        list(trainer.run(steps=9, membership=membership))
    [change] = fields_of(events, "reconfigure")
    assert change["certified"] is True
    assert compiled[0] == compiled[-1] == len(fields_of(events, "compile"))
    twin, _ = make()
    assert trainer.state_digest() == run_digest(twin, 3)["state"]


def test_an_error_within_a_certificate_leaves_a_state_that_can_be_saved(
    make, tmp_path, monkeypatch
):
    step = placement.Placement.step

    def broken(self, *args):
        if self.num_devices == 4:
            raise RuntimeError("out of memory")
        return step(self, *args)

    monkeypatch.setattr(placement.Placement, "step", broken)
    checkpoint = sk.CheckpointConfig(directory=tmp_path)
    trainer, _ = make(checkpoint=checkpoint, certify="always")
    with pytest.raises(RuntimeError, match="out of memory"):
        consume(trainer, 5, {2: 4})
    trainer.save()
    assert trainer.saved_steps == [trainer.step] == [3]
    twin, _ = make()
    assert trainer.state_digest() == run_digest(twin, 3)["state"]


def test_after_a_move_that_failed_only_what_is_saved_is_left(
    make, tmp_path, monkeypatch
):
    checkpoint = sk.CheckpointConfig(directory=tmp_path, every=2)
    trainer, _ = make(checkpoint=checkpoint, certify="off")
    make_array = jax.make_array_from_single_device_arrays

    def exhausted(shape, sharding, arrays):
        if shape == (3,):
            raise RuntimeError("out of memory")
        return make_array(shape, sharding, arrays)

    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", exhausted)
    with pytest.raises(RuntimeError, match="out of memory"):
        consume(trainer, 5, {3: 4})
    monkeypatch.undo()
    with pytest.raises(sk.LostStateError, match="step 3 was lost in a move"):
        trainer.save()
    assert trainer.restore() == 2
    twin, _ = make()
    assert run_digest(trainer, 5)["state"] == run_digest(twin, 5)["state"]


def test_after_a_loss_nothing_is_saved_from_lost_devices(make, tmp_path):
    slow = SlowTrace()
    checkpoint = sk.CheckpointConfig(directory=tmp_path)
    mesh = sk.MeshSpec(data=1, fsdp=-1)
    trainer, _ = make(loss=slow(mean_loss), checkpoint=checkpoint, mesh=mesh)
    consume(trainer, 1)
    trainer.save()
    consume(trainer, 3)
    slow.leaves(trainer, {3: sk.Lost(4)}, "step 1 is saved")
    assert trainer.saved_steps == [1]


def test_sigterm_is_heard_while_evaluating(make, tmp_path, monkeypatch):
    evaluate, evaluated = placement.Placement.evaluate, []

    def signalled(self, params, batch, step, index):
        evaluated.append(index)
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, params, batch, step, index)

    monkeypatch.setattr(placement.Placement, "evaluate", signalled)
    trainer, events = make(
        checkpoint=sk.CheckpointConfig(directory=tmp_path),
        eval=sk.EvalConfig(data=linear_data, every=2, num_batches=9),
    )
    with pytest.raises(sk.Preempted, match="step 2 is saved"):
        list(trainer.run(steps=9, membership=sk.signals()))
    assert evaluated == [0, 1]
    assert fields_of(events, "eval") == []


def test_a_request_that_cannot_be_met_does_not_end_the_run(make, tmp_path):
    wish = tmp_path / "devices.json"
    wish.write_text('{"num_devices": 99}')
    trainer, events = make(certify="off")
    membership = sk.combine(sk.watch_file(wish), sk.signals())
    for metrics in trainer.run(steps=8, membership=membership):
        assert metrics.num_devices == 8
        if metrics.step == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        if metrics.step == 4:
            wish.write_text("{")
    notices = [fields["message"] for fields in fields_of(events, "notice")]
    for message, found in zip(notices, ("found 99", "found 9", "'{'"), strict=True):
        assert found in message


def test_sigusr_takes_and_gives_a_device(make):
    trainer, _ = make(certify="off")
    counts = []
    sent = {1: signal.SIGUSR1, 4: signal.SIGUSR2}
    for metrics in trainer.run(steps=9, membership=sk.signals(grace_s=0)):
        counts.append(metrics.num_devices)
        if number := sent.get(metrics.step):
            os.kill(os.getpid(), number)
    assert sorted(set(counts)) == [7, 8]
    assert counts[0] == counts[-1] == 8
    assert counts == sorted(counts[:5], reverse=True) + sorted(counts[5:])
