"""Runs whose batch grows and shrinks: the same bits on any devices, and the right ones.

The oracle is a loop in plain JAX on one device that takes every step's mean over all
its microbatches; the bits are those of a run on one device, never interrupted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import fields_of
from test_snapshot_losses import Losing

import shardkit as sk
from shardkit.checkpoint.reader import open_checkpoint
from shardkit.gradient import LOSS_STREAM
from shardkit.keys import root_key, step_key, stream
from shardkit.membership import Change
from shardkit.testing import run_digest

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 60
ROWS, STEPS, SEED = 3, 7, 4
RAMP = sk.BatchRamp({0: 5, 3: 12, 5: 5})
SCRIPT = {2: 5, 3: 2, 4: 8, 5: 5, 6: 8}
"""Device counts by step: just before, on and just after boundaries."""


def init(key):
    params = {
        "kernel": sk.axes(jax.random.normal(key, (5, 3)), "in", "out"),
        "bias": sk.axes(jnp.ones(3), "out"),
    }
    state = {"mean": jnp.zeros(3), "seen": jnp.int32(0), "last": jnp.float32(0)}
    return sk.Variables(params, state)


def loss(params, state, microbatch, key):
    # Dropout of whole rows: the keys are what matters.
    kept = microbatch["x"] * jax.random.bernoulli(key, 0.8, (ROWS, 1))
    out = kept @ params["kernel"] + params["bias"][None]
    left = {
        "mean": 0.9 * state["mean"] + 0.1 * out.mean(axis=0),
        "seen": state["seen"] + len(kept),
        "last": microbatch["x"][-1, 0],
    }
    losses = jnp.sum((out - microbatch["y"]) ** 2, axis=1) * microbatch["counts"]
    return sk.LossOutput(
        losses.sum(), microbatch["counts"].sum(), {"largest": losses.max()}, state=left
    )


def eval_loss(params, state, microbatch, key):
    out = microbatch["x"] @ params["kernel"] - state["mean"][None]
    return jnp.mean((out - microbatch["y"]) ** 2)


def optimizer(ramp=RAMP):
    rate = sk.scale_to_batch(optax.cosine_decay_schedule(0.02, 10), ramp, "sqrt")
    return optax.sgd(rate, momentum=0.9)


def batches(rows):
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(50, 5)).astype(np.float32),
        "y": rng.normal(size=(50, 3)).astype(np.float32),
        "counts": (rng.random(50) < 0.7).astype(np.float32),
    }
    return sk.data.ArrayBatches(arrays, global_batch_size=rows, seed=1)


def problem(ramp=RAMP, **options):
    return {
        "init": init,
        "loss": loss,
        "eval_loss": eval_loss,
        "tx": optimizer(ramp),
        "data": batches(ramp.rows(ROWS)),
        "num_microbatches": ramp,
        "seed": SEED,
        "axis_rules": {"in": "fsdp"},
        "combine": {"seen": "sum", "last": "last"},
        "mesh": sk.MeshSpec(data=2, fsdp=-1),
        "events": sk.EventLog(),
        **options,
    }


@pytest.fixture(scope="module")
def uninterrupted(compile_cache):
    """Metrics, evaluations and states of the run on one device, by step."""
    found = {"steps": {}, "evals": {}, "states": {}, "digests": {}}
    config = sk.EvalConfig(data=batches(RAMP(0) * ROWS))
    options = problem(devices=jax.devices()[:1], eval=config)
    with sk.Trainer(**options) as trainer:
        for step in range(STEPS + 1):
            found["states"][step] = jax.tree.map(np.asarray, trainer.state)
            found["digests"][step] = trainer.state_digest()
            if step == 5:
                found["evals"][step] = trainer.evaluate()
            if step < STEPS:
                found["steps"] |= run_digest(trainer, step + 1)["steps"]
    return found


@pytest.fixture(scope="module")
def elastic(tmp_path_factory, compile_cache):
    """A trainer that went through the script, saved every step and evaluated one."""
    seen = {"eval": {}, "certified": []}
    trainer = sk.Trainer(
        **problem(),
        eval=sk.EvalConfig(data=batches(RAMP(0) * ROWS), every=5),
        checkpoint=sk.CheckpointConfig(
            directory=tmp_path_factory.mktemp("run"), every=1, keep=None
        ),
        certify="always",
    )

    def listen(event):
        if event.name == "eval":
            fields = dict(event.fields)
            seen["eval"][fields.pop("step")] = fields
        if event.name == "reconfigure":
            seen["certified"].append(event.fields["certified"])

    trainer.events.subscribe(listen)
    with trainer:
        trainer.save()
        seen["bits"] = run_digest(trainer, STEPS, SCRIPT)
        yield trainer, seen


def check_equal(found, uninterrupted, first=0):
    """Compares what `run_digest` has found from a step on."""
    assert found["state"] == uninterrupted["digests"][STEPS]
    assert found["steps"] == {
        step: bits for step, bits in uninterrupted["steps"].items() if step >= first
    }


def test_every_step_is_the_mean_over_its_own_microbatches(uninterrupted):
    """The oracle: sums in float64 over single microbatches, updates by optax."""
    root, tx, data = root_key(SEED), optimizer(), batches(RAMP.rows(ROWS))
    made = init(stream(root, "init"))
    is_annotated = lambda x: hasattr(x, "names")  # noqa: E731
    params = jax.tree.map(lambda x: x.value, made.params, is_leaf=is_annotated)
    state, opt_state = made.state, tx.init(params)

    def total(params, *rest):
        out = loss(params, *rest)
        return out.loss_sum, out

    def weighted(*gradients):
        return (np.sum(gradients, axis=0, dtype=float) / weight).astype(np.float32)

    grad = jax.jit(jax.value_and_grad(total, has_aux=True))
    for step in range(STEPS):
        rows = {k: x.reshape(RAMP(step), ROWS, -1) for k, x in data(step).items()}
        rows["counts"] = rows["counts"][..., 0]
        outs, grads = [], []
        for i in range(RAMP(step)):
            key = step_key(root, LOSS_STREAM, step, i)
            microbatch = {name: x[i] for name, x in rows.items()}
            (_, out), found = grad(params, state, microbatch, key)
            outs.append(out)
            grads.append(found)
        weight = sum(float(out.weight) for out in outs)
        mean = jax.tree.map(weighted, *grads)
        updates, opt_state = tx.update(mean, opt_state, params)
        params = optax.apply_updates(params, updates)
        state = {
            "mean": np.mean([out.state["mean"] for out in outs], axis=0),
            "seen": state["seen"] + RAMP(step) * ROWS,
            "last": outs[-1].state["last"],
        }
        after = uninterrupted["states"][step + 1]
        pairs = (after.params, params), (after.model_state, state)
        for found, wanted in pairs:
            for name in wanted:
                close = {"rtol": 1e-4, "atol": 1e-5}
                np.testing.assert_allclose(found[name], wanted[name], **close)
        loss_sum = sum(float(out.loss_sum) for out in outs)
        bits = bytes.fromhex(uninterrupted["steps"][step]["loss"])
        told = np.frombuffer(bits, np.float32)[0]
        assert told == pytest.approx(loss_sum / weight, rel=1e-5)
    # The rows of all steps, each counted once.
    assert after.model_state["seen"] == RAMP.rows(ROWS).before(STEPS)


def test_changes_at_boundaries_leave_no_trace(elastic, uninterrupted):
    _, seen = elastic
    check_equal(seen["bits"], uninterrupted)
    assert seen["certified"][: len(SCRIPT)] == [True] * len(SCRIPT)
    # At a boundary: what is evaluated on has the size that it always has.
    assert seen["eval"] == {5: uninterrupted["evals"][5]}


@pytest.mark.parametrize(
    ("step", "script"), [(2, {0: 5, 4: 8}), (3, {0: 2, 4: 8}), (4, {0: 8}), (5, {0: 5})]
)
def test_a_resume_at_a_boundary_leaves_no_trace(step, script, elastic, uninterrupted):
    trainer, _ = elastic
    assert trainer.restore(step) == step
    assert trainer.state_digest() == uninterrupted["digests"][step]
    trainer.restore(step)
    check_equal(run_digest(trainer, STEPS, script), uninterrupted, first=step)


def test_each_size_of_the_batch_has_one_program_on_each_mesh(elastic):
    trainer, _ = elastic
    known = trainer._controller.placements._known.values()
    ready = {
        place.num_devices: {num for num, x in place._by_count.items() if x.is_compiled}
        for place in known
    }
    assert ready == {8: {5, 12}, 5: {5, 12}, 2: {12}}
    # What depends on no grid is shared.
    compiles = trainer.compiles
    assert (compiles["step"], compiles["evaluate"], compiles["init"]) == (5, 1, 1)


def test_a_checkpoint_says_where_the_data_go_on(elastic):
    trainer, _ = elastic
    directory = trainer._controller._history.directory
    for step, rows in ((2, 15), (3, 36), (4, 36), (5, 15)):
        found = open_checkpoint(directory, step).manifest
        assert found.data["examples"] == RAMP.rows(ROWS).before(step)
        assert found.data["rows"] == rows
        assert found.run["grid"] == "0:5,3:12,5:5"


@pytest.mark.parametrize("other", [{0: 5, 3: 12, 6: 5}, {0: 5}])
def test_another_ramp_is_another_run(other, elastic):
    trainer, _ = elastic
    directory = trainer._controller._history.directory
    config = sk.CheckpointConfig(directory=directory)
    with sk.Trainer(**problem(sk.BatchRamp(other)), checkpoint=config) as second:
        with pytest.raises(sk.RestoreError, match=r"grid .*saved '0:5,3:12,5:5'.*now"):
            second.restore()


def test_the_noise_needs_two_microbatches_at_every_step():
    with pytest.raises(sk.ConfigError, match=r"at least 2 microbatches.*0:5,3:1"):
        sk.Trainer(**problem(sk.BatchRamp({0: 5, 3: 1}), noise_scale=True))


def test_a_constant_ramp_is_the_number_that_it_is(make, tmp_path):
    config = sk.CheckpointConfig(directory=tmp_path)
    trainer, _ = make(num_microbatches=8, checkpoint=config)
    trainer.save()
    same, _ = make(num_microbatches=sk.BatchRamp({0: 8, 5: 8}), checkpoint=config)
    assert same.restore() == 0


def test_the_next_size_is_made_ready_before_it_is_needed(compile_cache):
    ramp, ahead = sk.BatchRamp({0: 5, 3: 12}), {"standby": 1, "standby_counts": [5]}
    options = problem(ramp, tx=optimizer(), certify="off", **ahead)
    with sk.Trainer(**options) as trainer:
        placements = trainer._controller.placements
        for metrics in trainer.run(STEPS):
            if metrics.step == 0:
                # A step is told when the next one is under way.
                assert trainer.wait_for_standby(TIMEOUT_S)
                here, there = placements.on(8), placements.on(5)
                compiled = here.with_grid(12).is_compiled, there.is_compiled
                assert compiled == (True, True)
                assert not there.with_grid(12).is_compiled
        # In the new phase it thinks of changes anew.
        assert trainer.wait_for_standby(TIMEOUT_S)
        assert there.with_grid(12).is_compiled


def test_lost_devices_at_a_boundary_are_certified(uninterrupted, compile_cache):
    options = problem(snapshot=sk.SnapshotConfig())
    events = []
    options["events"].subscribe(events.append)
    with sk.Trainer(**options) as trainer:
        found = run_digest(trainer, STEPS, {3: sk.Lost(5), 4: 8})
    check_equal(found, uninterrupted)
    # The step that is repeated is one of 5 microbatches. That 8 devices can be trusted
    # with these says nothing of the 12 of the next.
    assert [f["certified"] for f in fields_of(events, "reconfigure")] == [True, True]


class GrowingBack(Losing):
    """Has all devices again one step after they were lost."""

    def poll(self, step, num_devices):
        return Change(8) if num_devices == 2 else super().poll(step, num_devices)


def test_a_run_goes_back_over_a_boundary(uninterrupted, compile_cache):
    options = problem(snapshot=sk.SnapshotConfig(every=3), certify="off")
    events = []
    options["events"].subscribe(events.append)
    with sk.Trainer(**options) as trainer:
        script = GrowingBack(trainer, {5: sk.Lost(2)})
        seen = [m.step for m in trainer.run(STEPS, membership=script)]
        assert trainer.state_digest() == uninterrupted["digests"][STEPS]
    # Lost before a step of 5 microbatches, found again before one of 12.
    assert [f["step"] for f in fields_of(events, "rewind")] == [3]
    assert seen == [0, 1, 2, 3, 4, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    counts=st.lists(st.sampled_from([2, 3, 7, 13]), min_size=2, max_size=3),
    starts=st.sets(st.integers(1, STEPS - 1), min_size=2, max_size=2),
    script=st.dictionaries(
        st.integers(0, STEPS - 1), st.integers(1, 8), min_size=2, max_size=4
    ),
)
def test_any_ramp_through_any_changes(counts, starts, script, compile_cache):
    ramp = sk.BatchRamp(zip([0, *sorted(starts)], counts, strict=False))
    found = []
    for changes in (script, {0: 1}):
        options = problem(ramp, ema=0.9, noise_scale=True, certify="off")
        with sk.Trainer(**options) as trainer:
            found.append(run_digest(trainer, STEPS, changes))
    assert found[0] == found[1]


RUN = [
    *(sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / "digits.toml")),
    *("--devices", "8", "--steps", "14", "--checkpoint.every", "3"),
    *("--data.batch_ramp", "5:36,10:12", "--optimizer.scale_to_batch", "sqrt"),
    *("--train.eval_every", "5"),
]


def train(directory, *words, launch=()):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PJRT_NPROC": "8"}
    found = subprocess.run(
        [*launch, *RUN, *words], cwd=directory, env=env, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stderr


def digest(directory):
    return json.loads((directory / "summary.json").read_text())["state_digest"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(3600)
def test_the_program_follows_a_ramp_alone_and_supervised(tmp_path):
    train(tmp_path, "--out", "alone", "--resize", "0:8,5:5,10:2,11:8", "--twin")
    assert json.loads((tmp_path / "alone" / "summary.json").read_text())["twin"]
    # The first of them stops just after the boundary.
    train(tmp_path, "--out", "resumed", "--resize", "0:3", "--steps", "6")
    train(tmp_path, "--out", "resumed", "--resize", "0:8", "--resume")
    assert digest(tmp_path / "resumed") == digest(tmp_path / "alone")
    launch = (
        *(sys.executable, "-m", "shardkit", "launch", "--processes", "2"),
        *("--fault", "kill@forward:step=5,process=1", "--"),
    )
    resize = ("--out", "together", "--resize", "0:8")
    said = train(tmp_path, *resize, launch=launch)
    assert "going on from step" in said
    assert digest(tmp_path / "together") == digest(tmp_path / "alone")
