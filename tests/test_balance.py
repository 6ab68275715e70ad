"""Slow processes and the state machine: fewer microbatches, or none; how long."""

import pytest
from worlds import begin, kill

from shardkit.cluster.settings import Limits
from shardkit.cluster.split import plan_hosts

ALIKE = {"host-0": 1.0, "host-1": 1.0, "host-2": 1.0}
SLOW = ALIKE | {"host-2": 2.0}
LIMITS = Limits(settle_steps=1, straggler_steps=4, first_quarantine_s=20)
REST_S = LIMITS.straggler_rest_s


def measure(world, busy, seconds=1):
    """Time passes, in which processes tell what they need for a microbatch."""
    for _ in range(seconds):
        quotas = quotas_of(world) or (4,) * len(world.running())
        for host, agent in world.agents.items():
            for worker in agent.running():
                mine = quotas[worker.assignment["process_index"]]
                worker.told["facts"] = {"busy_s": busy[host] * mine, "work": mine}
        world.wait()


def quotas_of(world):
    live = world.machine.live
    return live and live.seats[0].assignment.quotas


def until_new(world, busy, limit_s=100):
    """Measures until there is another generation; returns how long that took."""
    generation, since_s = world.machine.generation, world.now_s
    for _ in range(limit_s):
        if world.machine.generation > generation:
            return world.now_s - since_s
        measure(world, busy)
    raise AssertionError(f"still generation {generation}; told {world.told}")


def test_slow_workers_get_less_and_the_slowest_nothing():
    world = begin(limits=LIMITS)
    until_new(world, SLOW)
    assert quotas_of(world) == (5, 5, 2)
    assert any("2 (0.5 of the median) is slow" in text for text in world.told)
    until_new(world, ALIKE | {"host-1": 20.0})
    assert world.machine.live.hosts == ("host-0", "host-2")
    assert world.machine.hosts["host-1"].until_s is not None


def test_who_is_quick_again_gets_back_what_it_had_but_not_at_once():
    world = begin(limits=LIMITS)
    until_new(world, SLOW)
    assert until_new(world, ALIKE) >= REST_S - LIMITS.straggler_steps
    assert quotas_of(world) == (4, 4, 4)
    # Each change costs a generation, so that they come ever more rarely.
    assert until_new(world, SLOW, 300) >= 2 * REST_S - 2 * LIMITS.straggler_steps
    assert quotas_of(world) == (5, 5, 2)


def test_what_was_decided_survives_a_killed_process():
    world = begin(limits=LIMITS)
    until_new(world, SLOW)
    kill(world, "host-1")
    until_new(world, SLOW)
    assert quotas_of(world) == (5, 5, 2)


def test_what_was_decided_does_not_survive_another_set_of_hosts():
    world = begin(limits=LIMITS)
    until_new(world, SLOW)
    world.lose("host-0")
    until_new(world, SLOW)
    assert world.machine.live.hosts == ("host-1", "host-2")
    assert quotas_of(world) is None
    until_new(world, SLOW)
    assert world.machine.live.hosts == ("host-0", "host-1", "host-2")
    assert quotas_of(world) is None


def test_the_next_supervisor_knows_what_was_decided():
    world = begin(limits=LIMITS)
    until_new(world, SLOW)
    world.restart_supervisor()
    measure(world, SLOW, 5)
    kill(world, "host-1")
    until_new(world, SLOW)
    assert quotas_of(world) == (5, 5, 2)
    world.restart_supervisor()
    assert until_new(world, ALIKE) > 2 * LIMITS.straggler_steps


def test_nothing_is_done_where_it_is_not_asked_for():
    world = begin(limits=LIMITS, stragglers="ignore")
    measure(world, SLOW, 50)
    assert world.machine.generation == 1


def test_nobody_is_left_out_of_whom_all_are_needed():
    world = begin(limits=LIMITS, min_devices=6)
    until_new(world, ALIKE | {"host-1": 20.0})
    assert world.machine.live.hosts == ("host-0", "host-1", "host-2")
    assert quotas_of(world) == (6, 1, 5)


def test_nobody_is_left_out_with_others_of_its_host():
    world = begin(limits=LIMITS, hosts=plan_hosts(3, 2, 6))
    assert [seat.assignment.host for seat in world.machine.live.seats] == [
        *("host-0", "host-0", "host-1")
    ]
    for _ in range(30):
        for agent in world.agents.values():
            for worker in agent.running():
                is_slow = worker.assignment["process_index"] == 1
                busy_s = 40.0 if is_slow else 1.0
                worker.told["facts"] = {"busy_s": busy_s, "work": 4}
        world.wait()
        if world.machine.generation > 1:
            break
    assert len(world.machine.live.hosts) == 2
    assert quotas_of(world)[1] == 1


def states(world):
    found = [w for agent in world.agents.values() for w in agent.workers.values()]
    return [(w.state, w.prepared["quotas"]) for w in found if w.prepared]


def test_standbys_prepare_for_what_was_decided_before_anybody_halts():
    world = begin(limits=LIMITS, prepares=True)
    measure(world, ALIKE, 10)
    assert states(world) == [("hot", None)] * 3
    until_new(world, SLOW)
    assert quotas_of(world) == (5, 5, 2)
    # Those that had prepared for what there was before were of no use any more.
    assert states(world) == [("exited", None), ("running", (5, 5, 2))] * 3
    measure(world, SLOW, 10)
    kill(world, "host-1")
    until_new(world, SLOW)
    assert quotas_of(world) == (5, 5, 2)
    assert [x for x, _ in states(world)].count("running") == 3


def test_standbys_that_never_are_ready_are_not_waited_for_for_ever(monkeypatch):
    world = begin(limits=LIMITS, prepares=True)
    monkeypatch.setattr("world_hosts.PREPARE_TIMES", 10**6)
    measure(world, ALIKE, 10)
    assert until_new(world, SLOW) >= REST_S
    assert quotas_of(world) == (5, 5, 2)


def test_who_is_left_out_is_not_prepared_for():
    world = begin(limits=LIMITS, prepares=True)
    measure(world, ALIKE, 10)
    assert until_new(world, ALIKE | {"host-1": 20.0}) < REST_S / 2
    assert world.machine.live.hosts == ("host-0", "host-2")


def test_who_was_not_measured_is_not_taken_for_quick():
    world = begin(limits=LIMITS)
    for _ in range(30):
        for host in ("host-1", "host-2"):
            for worker in world.agents[host].running():
                worker.told["facts"] = {"busy_s": SLOW[host], "work": 4}
        world.wait()
    assert world.machine.generation == 1


@pytest.mark.parametrize("told_for", [3, 7])
def test_one_measurement_is_told_with_many_steps_and_counts_once(told_for):
    world = begin(limits=LIMITS)
    for step in range(LIMITS.straggler_steps * told_for - 1):
        for host, agent in world.agents.items():
            for worker in agent.running():
                number = step // told_for
                facts = {"busy_s": SLOW[host], "work": 4, "busy_step": number}
                worker.told["facts"] = facts
        world.wait()
        if step < (LIMITS.straggler_steps - 1) * told_for:
            assert world.machine.live.speeds.speeds() == {}
    world.until(lambda: world.machine.generation == 2)
