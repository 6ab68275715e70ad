"""Which mesh is chosen for a device count, and what is told of it."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
from auto_meshes import APART, FREE, changed, planner, write_profile

import shardkit as sk
from shardkit.planner import profile as profiles
from shardkit.planner.auto_mesh import AutoMesh, find_profile

SLOW_TO_START = changed(start_s=1e-3)


@pytest.fixture
def free(tmp_path):
    """A profile by which all devices are best."""
    return write_profile(tmp_path, FREE)


def test_what_is_told_of_a_plan_is_json_and_whole(free):
    plan = planner(AutoMesh(profile=free)).choose(8).plan
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    assert plan["step_s"] == pytest.approx(sum(plan["time_s"].values()))
    assert plan["memory_bytes"] == pytest.approx(sum(plan["memory"].values()))
    assert plan["memory_bytes"] <= plan["limit_bytes"] == 0.9 * 4e9
    times = [plan["step_s"], *(x["step_s"] for x in plan["runners_up"])]
    assert times == sorted(times)
    assert all(x["why"] for x in plan["runners_up"])


def test_a_move_has_to_pay_in_the_steps_that_are_left(tmp_path):
    auto = AutoMesh(profile=write_profile(tmp_path, SLOW_TO_START))
    found = planner(auto)
    old = found.choose(2).sizes
    assert math.prod(old.values()) == 2

    def sizes(steps_left, horizon=10**6):
        asked = {"old": old, "horizon": horizon, "steps_left": steps_left}
        return found.choose(8, **asked)

    moved = sizes(10**6)
    assert math.prod(moved.sizes.values()) == 8
    saved = found.choose(2).plan["step_s"] - moved.plan["step_s"]
    turn = moved.plan["move_s"] / saved
    assert sizes(math.ceil(turn) + 1).sizes == moved.sizes
    stays = sizes(math.floor(turn) - 1)
    assert stays.sizes == old
    assert stays.plan["num_idle"] == 6
    assert stays.plan["move_s"] == 0
    assert "moving takes 1" in stays.plan["notes"][0]
    assert "6 of 8 devices stay idle" in stays.plan["notes"][1]
    # What a guess has prepared is not asked to pay: it is the same whenever it comes.
    assert found.choose(8, old=old, horizon=10**6).sizes == moved.sizes
    # A run that is at its end when it gets there would go nowhere.
    assert sizes(None, horizon=1).sizes == old


def test_every_process_has_a_device_in_use(tmp_path):
    auto = AutoMesh(profile=write_profile(tmp_path, APART))
    one = planner(auto).choose(8).sizes
    assert math.prod(one.values()) == 1
    five = planner(auto, num_processes=5).choose(8).sizes
    assert math.prod(five.values()) >= 5
    again = planner(auto, num_processes=5).choose(8).sizes
    assert again == five


def test_an_optimizer_in_host_memory_takes_none_of_a_device(free):
    auto = AutoMesh(profile=free)
    plans = [planner(auto, offload=x).choose(8).plan for x in (False, True)]
    assert [p["memory"]["optimizer"] > 0 for p in plans] == [True, False]
    assert [p["time_s"]["offload"] > 0 for p in plans] == [False, True]


def test_sums_of_floats_keep_no_bits(free):
    for exact, kind in ((True, "exact"), (False, "equivalent")):
        found = planner(AutoMesh(profile=free), exact=exact)
        chosen = found.choose(4, old=found.choose(8).sizes)
        assert chosen.plan["consistency"] == kind


def fake(kind, limit=None, platform="gpu"):
    stats = None if limit is None else {"bytes_limit": limit}
    return SimpleNamespace(
        device_kind=kind,
        platform=platform,
        process_index=0,
        memory_stats=lambda: stats,
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("cpu", "cpu"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
    ],
)
def test_devices_say_what_they_are(kind, name):
    expected = profiles.load_profile(name)
    assert find_profile(AutoMesh(), [fake(kind)]) == expected
    pool = [fake(kind, 7e9), fake(kind, 5e9)]
    least = dataclasses.replace(expected, memory_bytes=5e9)
    assert find_profile(AutoMesh(), pool) == least
    given = find_profile(AutoMesh(memory_bytes=2e9, profile="h100"), pool)
    assert (given.memory_bytes, given.name) == (2e9, profiles.load_profile("h100").name)


def test_a_size_that_is_given_holds_wherever_a_state_was_saved(free):
    auto = AutoMesh(profile=free, axes=("context",), tensor=2)
    chosen = planner(auto).choose(8, old={"tensor": 4})
    assert chosen.sizes["tensor"] == 2
    assert chosen.plan["consistency"] == "equivalent"


@pytest.mark.parametrize("kind", ["NVIDIA GH200 480GB", "TPU v4", "TPU v6 lite"])
def test_devices_that_nobody_knows_are_asked_about(kind):
    with pytest.raises(sk.ConfigError, match=r"no profile of .*profile.*cpu, h100"):
        find_profile(AutoMesh(), [fake(kind)])
