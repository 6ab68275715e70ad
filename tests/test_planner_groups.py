"""What is predicted of groups of devices, beside what XLA makes of them."""

import collections

import jax
import numpy as np
import optax
import pytest

from benchmarks import predicted_placements
from models import gpt, moe
from shardkit.errors import ConfigError
from shardkit.mesh import GROUP_AXES
from shardkit.planner.compiled_peak import compile_microbatch
from shardkit.planner.exchanges import microbatch_exchanges, state_exchanges
from shardkit.planner.ledger import Habits
from shardkit.planner.memory import memory
from shardkit.planner.meshes import Meshes
from shardkit.planner.reading import read_model

TINY = {"num_layers": 1, "embed_dim": 32, "mlp_dim": 48, "vocab_size": 64}
MICROBATCH = {"tokens": jax.ShapeDtypeStruct((4, 17), np.int32)}
PAIRS = predicted_placements.PAIRS


def read(model):
    habits = Habits.of(jax.default_backend())
    return read_model(model, MICROBATCH, optax.adamw(1e-3), habits=habits)


@pytest.mark.parametrize(
    ("model", "group"),
    [
        (gpt.build(**TINY), {"tensor": 2}),
        (moe.build(**TINY, capacity_per_row=True), {"tensor": 2, "expert": 2}),
    ],
    ids=["gpt", "moe"],
)
def test_a_compiled_microbatch_exchanges_what_was_predicted(
    model, group, compile_cache
):
    facts = read(model)
    asked = compile_microbatch(model, MICROBATCH, facts, group)
    predicted = collections.Counter()
    for (kind, axis), num_bytes in facts.work.buffers(group).items():
        predicted[kind, (axis,)] += int(num_bytes)
    assert +predicted == asked.exchanges
    meshes = Meshes.of(group, 6)
    estimate, known = (
        memory(x, meshes)["activations"][0]
        for x in (facts, facts.with_peak(group, asked.peak_bytes))
    )
    assert known == asked.peak_bytes
    assert estimate == pytest.approx(known, rel=0.5)


def test_what_a_compiler_said_holds_for_its_groups_alone():
    facts = read(gpt.build(**TINY)).with_peak({"tensor": 2}, 1000)
    sizes = {"fsdp": [1, 2, 2, 2], "tensor": [2, 2, 1, 2], "context": [1, 1, 1, 2]}
    found = memory(facts, Meshes.of(sizes, 6))["activations"]
    assert found[0] == found[1] == 1000
    assert 1000 not in found[2:]
    twice = facts.with_rows(8)
    assert memory(twice, Meshes.of(sizes, 6))["activations"][0] == 2000


def test_groups_of_more_devices_than_there_are_cannot_be_compiled():
    model = gpt.build(**TINY)
    with pytest.raises(ConfigError, match="up to 8 devices"):
        compile_microbatch(model, MICROBATCH, read(model), {"tensor": 4, "expert": 4})


def test_a_group_of_one_device_exchanges_nothing():
    facts = read(moe.build(**TINY))
    meshes = Meshes.of({"data": [1, 2], "fsdp": [8, 4]}, 8)
    assert not any(x.num_bytes.any() for x in microbatch_exchanges(facts, meshes))
    groups = [x for x in state_exchanges(facts, meshes) if x.axis in GROUP_AXES]
    assert not any(x.num_bytes.any() for x in groups)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_compiled_steps_do_what_was_predicted(number, compile_cache):
    found = predicted_placements.compare(number)
    _, known = found["estimates"]
    assert known == pytest.approx(1, rel=0.1)
    assert set(found["classes"]) == set(PAIRS[number].classes.split())
