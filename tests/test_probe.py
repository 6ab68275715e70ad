"""How fast a process is, measured between steps: when, on what, and what is told."""

from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from shardkit.cluster.records import Assignment
from shardkit.mesh import MeshSpec
from shardkit.microbatch import Grid
from shardkit.probe import SpeedProbe
from shardkit.supervised import Part
from shardkit.trainer import Trainer

ROUND_S = 0.0003


class Machine:
    """Devices with a clock: rounds take time, steps take time, nothing else does."""

    def __init__(self, num_devices=1, factors=(1.0,)):
        self.now_s, self.log, self.factors = 0.0, [], list(factors)
        self.devices = [SimpleNamespace(id=i) for i in range(num_devices)]

    def load(self, device):
        def run(num_rounds):
            self.log.append((device.id, num_rounds))
            factor = self.factors[0] if len(self.factors) == 1 else self.factors.pop(0)
            self.now_s += num_rounds * ROUND_S * factor

        return run

    def probe(self, **options):
        options = {"clock_s": lambda: self.now_s, "load": self.load, **options}
        return SpeedProbe(self.devices, **options)


def place(machine, counts=None, num_others=1):
    """A placement on some devices, first those of others."""
    others = [SimpleNamespace(id=100 + i) for i in range(num_others)]
    devices = np.array([*others, *machine.devices])
    counts = np.array(counts or [2] * len(devices))
    return SimpleNamespace(
        mesh=SimpleNamespace(devices=devices), grid=SimpleNamespace(counts=counts)
    )


def follow(machine, probe, *, num_steps, step_s, placement=None):
    """Does steps; returns before which of them something was measured, and for how
    long each was held up."""
    found = {}
    for step in range(num_steps):
        start_s = machine.now_s
        probe(step, placement or place(machine), [])
        if machine.now_s > start_s:
            found[step] = machine.now_s - start_s
        machine.now_s += step_s
    return found


@pytest.mark.parametrize("step_s", [0.0005, 0.02, 0.3, 5.0])
def test_it_takes_a_hundredth_of_the_time_at_most(step_s):
    machine = Machine()
    probe = machine.probe()
    machine.now_s = 0.0
    found = follow(machine, probe, num_steps=20_000, step_s=step_s)
    # What is not known yet is how long a step takes.
    first = next(iter(found.values()))
    assert len(found) > 2
    assert sum(found.values()) - first <= 0.01 * machine.now_s


def test_processes_measure_before_the_same_steps_whatever_each_has_found():
    quick, slow = Machine(factors=[1.0]), Machine(factors=[1.7])
    slow_probe, quick_probe = slow.probe(), quick.probe()
    before = follow(slow, slow_probe, num_steps=5000, step_s=0.05)
    found = follow(quick, quick_probe, num_steps=5000, step_s=0.05)
    assert len(before) > 20
    assert min(len(before), len(found)) == len(before.keys() & found.keys())


def test_what_is_told_is_the_time_of_a_microbatch_on_each_device():
    machine = Machine(num_devices=2)
    probe = machine.probe()
    placement = place(machine, counts=[9, 3, 2])
    follow(machine, probe, num_steps=6, step_s=1.0, placement=placement)
    facts = probe.facts
    assert facts["work"] == 5
    assert facts["busy_step"] == 4
    # One after another here, which devices are not: each round takes twice as long.
    assert facts["busy_s"] == pytest.approx(2 * ROUND_S * 5 / 2)


def test_only_the_devices_that_take_part_are_measured():
    machine = Machine(num_devices=3)
    probe = machine.probe()
    placement = place(machine)
    placement.mesh.devices = placement.mesh.devices[:3]
    placement.grid.counts = placement.grid.counts[:3]
    machine.log.clear()
    follow(machine, probe, num_steps=5, step_s=1.0, placement=placement)
    assert {device for device, _ in machine.log} == {0, 1}
    assert probe.facts["work"] == 4


def test_each_device_of_a_group_has_what_the_group_has():
    machine = Machine(num_devices=3)
    probe = machine.probe()
    # Two groups of two: the second and a half of the first are here.
    placement = place(machine, counts=[3, 2])
    follow(machine, probe, num_steps=6, step_s=1.0, placement=placement)
    assert probe.facts["work"] == 3 + 2 + 2
    assert probe.facts["busy_s"] == pytest.approx(3 * ROUND_S * 7 / 3)


def test_who_takes_no_part_measures_nothing():
    machine = Machine()
    probe = machine.probe()
    placement = place(machine, num_others=2)
    placement.mesh.devices = placement.mesh.devices[:2]
    placement.grid.counts = placement.grid.counts[:1]
    follow(machine, probe, num_steps=6, step_s=1.0, placement=placement)
    assert probe.facts == {}


def test_who_has_nothing_to_do_is_measured_too():
    machine = Machine()
    probe = machine.probe()
    idle = place(machine, counts=[24, 0])
    follow(machine, probe, num_steps=5, step_s=1.0, placement=idle)
    assert probe.facts["busy_s"] == pytest.approx(ROUND_S)
    assert probe.facts["work"] == 1


def test_queues_are_empty_before_the_clock_starts():
    machine = Machine()
    machine.probe()
    before_each = [rounds for _, rounds in machine.log[::2]]
    assert set(before_each) == {0}


@pytest.mark.parametrize(
    ("asked", "num_processes", "measures"),
    [
        ("balance", 2, True),
        ("balance", 1, False),
        ("ignore", 2, False),
        (None, 2, False),
    ],
)
def test_who_is_asked_for_its_speed(asked, num_processes, measures, monkeypatch):
    monkeypatch.setenv("SHARDKIT_RUN", "ab")
    monkeypatch.delenv("SHARDKIT_STRAGGLERS", raising=False)
    if asked is not None:
        monkeypatch.setenv("SHARDKIT_STRAGGLERS", asked)
    assignment = Assignment(
        generation=1,
        process_index=0,
        num_processes=num_processes,
        coordinator="127.0.0.1:1",
        num_devices=num_processes,
        num_local_devices=1,
        device_offset=0,
        host="host-0",
        hosts=("host-0",) * num_processes,
    )
    found = Part(assignment).probe(jax.devices()[:1])
    assert isinstance(found, SpeedProbe) == measures


def train(probe):
    def init(key):
        return {"w": jax.random.normal(key, (8,))}

    def loss(params, microbatch, key):
        return ((microbatch["x"] @ params["w"] - 1) ** 2).mean()

    def data(step):
        return {"x": np.random.default_rng(step).normal(size=(8, 8))}

    trainer = Trainer(
        init=init,
        loss=loss,
        tx=optax.sgd(0.1),
        data=data,
        mesh=MeshSpec(data=1),
        num_microbatches=4,
        devices=jax.devices()[:2],
        probe=probe,
    )
    with trainer:
        losses = [m.loss_bits for m in trainer.run(steps=12)]
        return losses, trainer.state_digest()


def test_it_leaves_no_trace_in_a_run():
    # All the time it likes, so that it measures before every step.
    probe = SpeedProbe(jax.devices()[:2], part=1e9)
    assert probe.facts == {}
    assert train(probe) == train(None)
    facts = probe.facts
    assert facts["busy_s"] > 0
    assert facts["work"] == Grid(4, 2).counts.sum()
    assert facts["busy_step"] == 11
