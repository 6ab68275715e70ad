"""The state machine alone: no time but what is passed in."""

import json

import pytest
from worlds import World, begin, crash, kill

from shardkit.cluster.generations import Machine
from shardkit.cluster.orders import EndRun


def test_it_forms_when_all_hosts_are_there():
    world = begin()
    assert world.machine.generation == 1
    assert world.machine.live.num_devices == 6
    assert world.machine.live.hosts == ("host-0", "host-1", "host-2")


def test_a_run_that_finishes_ends_with_code_0():
    world = World(last_step=5)
    world.until(lambda: world.ended)
    assert world.ended == EndRun(0, "")
    assert world.machine.next_s() is None


def test_a_killed_worker_costs_no_step_that_was_whole():
    world = begin()
    kill(world, "host-1")
    world.until(lambda: world.machine.generation == 2)
    assert world.machine.recoveries[0].lost_steps == 0
    assert world.machine.live.num_devices == 6
    assert "process 1 on host-1" in world.machine.recoveries[0].cause


def test_a_lost_host_is_gone_on_without_and_taken_in_again():
    world = begin()
    world.lose("host-2")
    world.until(lambda: world.machine.generation == 2)
    assert world.machine.live.num_devices == 4
    # Without redundancy what only that host had is lost, and a step with it.
    world.until(lambda: world.machine.generation == 3)
    assert world.machine.live.num_devices == 6
    assert world.machine.recoveries[1].cause == "host-2 can take part"


def test_a_flapping_host_waits_longer_each_time():
    world = begin()
    waits = []
    for _ in range(5):
        world.until(lambda: "host-2" in world.agents)
        world.lose("host-2")
        until_s = world.machine.hosts["host-2"].until_s
        waits.append(None if until_s is None else until_s - world.now_s)
    assert waits == [None, None, 20, 40, 80]


def test_a_crash_that_repeats_elsewhere_is_the_programs():
    world = begin()
    crash(world, "host-0", message="no layer at 0x12")
    world.until(lambda: world.machine.generation == 2)
    # It begins at the step of the crash, and never comes further.
    world.wait(2, steps=False)
    for worker in world.running():
        worker.step, worker.phase = world.machine.recoveries[0].step, "step"
    crash(world, "host-2", message="no layer at 0x34")
    world.until(lambda: world.ended)
    assert world.ended.code == 1
    assert "as before: that is the program's own error\nwhere" in world.ended.message
    assert "the state is saved" in world.ended.message


def test_what_a_crash_does_to_its_peers_is_not_the_cause():
    world = begin()
    crash(world, "host-0", kind="RuntimeError", message="a peer is gone")
    kill(world, "host-2")
    world.until(lambda: world.machine.generation == 2)
    assert "process 2 on host-2" in world.machine.recoveries[0].cause


def test_the_first_to_crash_is_the_cause_whenever_that_is_heard():
    world = begin()
    # What host-2 says is late for once, and heard when host-0 was already.
    world.delays = {"host-2": 0.4}
    crash(world, "host-0", kind="RuntimeError", message="a peer is gone", age_s=0.2)
    crash(world, "host-2", message="no layer", age_s=0.3)
    world.until(lambda: world.machine.generation == 2)
    assert "process 2 on host-2" in world.machine.recoveries[0].cause


def test_trouble_of_the_cluster_is_not_the_programs_verdict():
    world = begin()
    crash(world, "host-0", code=2, kind="Unanswered", message="nobody said")
    world.until(lambda: world.machine.generation == 2)
    crash(world, "host-0", code=2, kind="ConfigError", message="no such file")
    world.until(lambda: world.ended)
    assert world.ended.code == 2


def test_kills_without_progress_end_the_run():
    world = begin()
    for _ in range(20):
        if world.ended:
            break
        world.until(lambda: world.running() or world.ended)
        if world.running():
            worker = world.running()[0]
            worker.state, worker.code = "exited", -9
        world.wait(2, steps=False)
    assert world.ended.code == 1
    assert "5 generations in a row came no further than step" in world.ended.message


def test_below_min_devices_it_waits_and_then_leaves():
    world = begin(min_devices=6)
    world.machine.hosts["host-1"].losses = [world.now_s] * 2
    world.machine.hosts["host-1"].num_quarantines = 5
    world.lose("host-1")
    world.until(lambda: world.machine.waiting.until_s is not None)
    assert "2 more devices: 4 of at least 6" in world.told[-1]
    world.until(lambda: world.ended)
    assert world.ended.code == 1
    assert "waited 90 s (wait_s)" in world.ended.message
    assert "no state could be saved" in world.ended.message


def test_leaving_is_agreed_and_saved():
    world = begin()
    world.carry_out(world.machine.leave("asked", world.now_s))
    world.until(lambda: world.ended)
    assert world.ended == EndRun(75, "asked\nthe state is saved")
    assert world.generations == [1]


def test_leaving_before_anything_began_ends_at_once():
    world = World()
    world.carry_out(world.machine.leave("asked", world.now_s))
    assert world.ended == EndRun(75, "asked")


def test_frozen_processes_are_ended():
    world = begin()
    world.wait(12, steps=False)
    world.until(lambda: world.machine.generation == 2)
    assert "come further than step" in world.machine.recoveries[0].cause


@pytest.mark.parametrize("drops", range(1, 12))
def test_no_single_lost_message_matters(drops):
    world = begin()
    kill(world, "host-1")
    world.tell()
    world.drops = drops
    step = world.machine.live.step
    world.until(lambda: world.machine.live and world.machine.live.step > step + 5)
    assert world.machine.live.num_devices == 6


def test_the_next_supervisor_knows_what_this_one_did():
    world = begin()
    kill(world, "host-1")
    world.until(lambda: world.machine.generation == 2)
    world.restart_supervisor()
    assert world.machine.generation == 2
    step = world.machine.live.step
    world.until(lambda: world.machine.live.step > step + 5)
    assert world.machine.generation == 2
    assert len(world.machine.recoveries) == 1


def test_memory_is_json():
    world = begin()
    kill(world, "host-0")
    world.until(lambda: world.machine.generation == 2)
    world.carry_out(world.machine.leave("asked", world.now_s))
    text = json.dumps(world.machine.to_json())
    again = Machine(world.settings, world.now_s, memory=json.loads(text))
    assert again.state == "running"
    assert json.dumps(again.to_json()) == text
