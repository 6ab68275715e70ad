"""What a run with a ramp waits for at a boundary, and in whose time."""

import dataclasses
import threading
import time

from problems import fields_of
from test_ramp_training import STEPS, TIMEOUT_S, optimizer, problem

import shardkit as sk


def test_what_compiles_at_a_boundary_is_no_part_of_a_step(compile_cache):
    options = problem(sk.BatchRamp({0: 5, 3: 12}), tx=optimizer(), certify="off")
    with sk.Trainer(**options) as trainer:
        is_timed = [m.step_s is not None for m in trainer.run(STEPS)]
    # Nor are the beginning and the end.
    assert is_timed == [False, True, False, False, True, True, False]


def test_a_change_with_notice_waits_for_the_program_of_its_own_phase(compile_cache):
    options, events = problem(sk.BatchRamp({0: 5, 3: 12}), tx=optimizer()), []
    options["events"].subscribe(events.append)
    may_begin = threading.Event()
    with sk.Trainer(**options, certify="off") as trainer:
        placements = trainer._controller.placements
        preparing = placements.preparing

        def held(num_devices):
            prepare = preparing(num_devices)
            return lambda: may_begin.wait(TIMEOUT_S) and prepare()

        placements.preparing = held
        # Steps of either phase can go on where the run is.
        trainer.ready()
        for metrics in trainer.run(1000, Announced({2: 5})):
            if metrics.step == 4:
                may_begin.set()
            if metrics.num_devices == 5:
                break
            time.sleep(0.01)
    [fields] = fields_of(events, "reconfigure")
    assert fields["step"] > 3
    assert fields["was_ready"]


class Announced:
    """A script of which every change comes with notice."""

    def __init__(self, script):
        self._script = sk.scripted(script)

    def __getattr__(self, name):
        return getattr(self._script, name)

    def poll(self, step, num_devices):
        change = self._script.poll(step, num_devices)
        return dataclasses.replace(change, grace_s=TIMEOUT_S) if change else None
