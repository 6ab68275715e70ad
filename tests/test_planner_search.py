"""The chosen mesh is the best of all, and what is said of the others is true."""

import dataclasses
import itertools
import math
import time

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import gpt
from shardkit.errors import ConfigError
from shardkit.mesh import MeshSpec, consistency_class
from shardkit.microbatch import Grid
from shardkit.planner.cost import predict
from shardkit.planner.elastic_choice import choose_next
from shardkit.planner.meshes import Meshes, Topology
from shardkit.planner.profile import Link, load_profile
from shardkit.planner.quotas import Quotas
from shardkit.planner.reading import read_model
from shardkit.planner.search import Job, search

# What it reaches is said here, as a calibration may find other figures.
H200 = dataclasses.replace(
    load_profile("h200"),
    links={
        "inside": Link(bandwidth_bytes_s=0.75 * 450e9, latency_s=8e-6),
        "between": Link(bandwidth_bytes_s=0.8 * 50e9, latency_s=2e-5),
        "offload": Link(bandwidth_bytes_s=0.8 * 64e9, latency_s=1e-5),
    },
    flops_fraction={"float32": 0.6, "bfloat16": 0.6},
    memory_fraction=0.8,
    written_fraction=0.4,
    fresh_byte_s=0.0,
    product_overhead_s=5e-6,
    step_overhead_s=1e-3,
    microbatch_overhead_s=2e-5,
)


def tokens(rows, length):
    return {"tokens": jax.ShapeDtypeStruct((rows, length + 1), np.int32)}


@pytest.fixture(scope="module")
def small():
    """Two ways to keep the activations of a small model."""
    options = {"num_layers": 2, "scan_layers": True, "num_heads": 6, "embed_dim": 48}
    options |= {"mlp_dim": 96, "vocab_size": 96}
    return {
        name: read_model(
            gpt.build(remat=remat, **options), tokens(1, 8), optax.adamw(1e-3)
        )
        for name, remat in (("kept", False), ("remat", True))
    }


@pytest.fixture(scope="module")
def llama():
    """A model of a billion parameters, activations made again."""
    model = gpt.build(
        "llama_1b", scan_layers=True, remat=True, compute_dtype="bfloat16"
    )
    return {"remat": read_model(model, tokens(1, 4096), optax.adamw(1e-3))}


def divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


def all_totals(job, topology, profile, limit):
    """Predicts every mesh there is; mesh → the least time of those that fit."""
    found = {}
    speeds = sorted(topology.speeds, reverse=True)
    for _, num, facts in job.blocks():
        for inner in itertools.product(
            *(divisors(facts.divisors[a]) for a in ("tensor", "expert", "context"))
        ):
            per_group = math.prod(inner)
            most = topology.num_devices // per_group
            for data, fsdp in itertools.product(range(1, most + 1), repeat=2):
                if data * fsdp > most:
                    continue
                slowest = speeds[per_group - 1 :: per_group][: data * fsdp]
                counts = Grid(num, data * fsdp, tuple(slowest)).counts
                rounds = max(counts / (slowest or 1.0))
                sizes = dict(zip(("tensor", "expert", "context"), inner, strict=True))
                slots = Quotas(topology, per_group).most(num, np.array([rounds]))
                sizes |= {"data": data, "fsdp": fsdp}
                meshes = Meshes.of(sizes, num, rounds, most=slots)
                costs = predict(facts, meshes, profile, topology, exact=job.exact)
                if costs.memory_bytes[0] > limit:
                    continue
                name = (data, fsdp, *inner)
                total = float(costs.step_s[0])
                found[name] = min(total, found.get(name, math.inf))
    return found


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    num_devices=st.integers(1, 13),
    per_host=st.sampled_from([2, 4, 8]),
    rows=st.sampled_from([6, 10, 12]),
    latency=st.sampled_from([1e-7, 1e-4]),
    room=st.sampled_from([0.42, 1.2, 3.0]),
    slow=st.integers(0, 2),
)
def test_no_mesh_is_faster(small, num_devices, per_host, rows, latency, room, slow):
    links = {
        name: dataclasses.replace(link, latency_s=latency)
        for name, link in H200.links.items()
    }
    profile = dataclasses.replace(H200, links=links)
    speeds = (0.4,) * min(slow, num_devices) + (1.0,) * max(num_devices - slow, 0)
    topology = Topology(num_devices, per_host, speeds if slow else ())
    facts = {"remat": small["remat"]}
    job = Job(facts=facts, global_batch_size=rows, num_microbatches=[rows])
    limit = room * 1e6
    expected = all_totals(job, topology, profile, limit)
    if not expected:
        with pytest.raises(ConfigError, match="no mesh"):
            search(job, topology, profile, memory_limit_bytes=limit)
        return
    plan = search(job, topology, profile, memory_limit_bytes=limit, num_runners_up=3)
    found = [plan.best, *(choice for choice, _ in plan.runners_up)]
    wanted = sorted(expected.values())[: len(found)]
    assert [x.step_s for x in found] == pytest.approx(wanted, rel=1e-9)
    assert len(found) == min(4, len(expected))
    assert all(x.memory_bytes <= limit for x in found)
    assert sum(plan.counts) == rows
    assert plan.num_idle == num_devices - plan.best.num_devices


@pytest.mark.parametrize(("num_devices", "per_host"), [(6, 6), (9, 4)])
def test_no_mesh_is_faster_where_devices_share_a_host(small, num_devices, per_host):
    profile = load_profile("cpu")
    profile = dataclasses.replace(
        profile, devices_per_host=per_host, step_overhead_s=1e-4, fresh_byte_s=0.0
    )
    topology = Topology(num_devices, per_host)
    job = Job(
        facts={"kept": small["kept"]}, global_batch_size=10, num_microbatches=[10]
    )
    expected = all_totals(job, topology, profile, math.inf)
    plan = search(job, topology, profile, memory_limit_bytes=1e12, num_runners_up=3)
    found = [plan.best, *(choice for choice, _ in plan.runners_up)]
    wanted = sorted(expected.values())[:4]
    assert [x.step_s for x in found] == pytest.approx(wanted, rel=1e-9)


def test_the_best_of_all_microbatches_and_of_remat_too(small):
    job = Job(facts=small, global_batch_size=12, may_offload=True)
    topology, limit = Topology(6, 4), 6e6
    options = {
        (remat, num): search(
            dataclasses.replace(
                job, facts={remat: small[remat]}, num_microbatches=[num]
            ),
            topology,
            H200,
            memory_limit_bytes=limit,
        ).best.step_s
        for remat in small
        for num in divisors(12)
    }
    plan = search(job, topology, H200, memory_limit_bytes=limit)
    assert plan.best.step_s == min(options.values())
    assert options[plan.best.remat, plan.best.num_microbatches] == plan.best.step_s


def test_a_tighter_limit_makes_activations_again_then_cuts_then_gives_up(llama):
    job = Job(facts=llama, global_batch_size=64, num_microbatches=[64])
    limits = [100e9, 30e9, 22e9]
    plans = [
        search(job, Topology(8, 8), H200, memory_limit_bytes=limit) for limit in limits
    ]
    assert plans[0].best.step_s <= plans[1].best.step_s <= plans[2].best.step_s
    assert plans[2].best.sizes["tensor"] * plans[2].best.sizes["context"] > 1
    why = [reason for _, reason in plans[2].too_large]
    assert any("memory over by" in reason for reason in why)
    with pytest.raises(ConfigError, match="no mesh of 8 devices fits in 1"):
        search(job, Topology(8, 8), H200, memory_limit_bytes=2**30)


def test_reasons_name_the_axis_and_its_link(llama):
    job = Job(facts=llama, global_batch_size=32, num_microbatches=[32])
    plan = search(job, Topology(16, 8), H200, num_runners_up=40)
    by_mesh = {tuple(x.sizes.values()): why for x, why in plan.runners_up}
    assert plan.best.sizes["tensor"] == plan.best.sizes["context"] == 1
    assert "communication over data between hosts" in by_mesh[16, 1, 1, 1, 1]
    assert all(why.startswith("time ×") for why in by_mesh.values())
    text = str(plan)
    assert text.startswith("data=") or text.startswith("fsdp=")


@pytest.mark.parametrize("num_devices", [99_991, 100_000])
def test_a_hundred_thousand_devices_take_less_than_a_second(llama, num_devices):
    job = Job(facts=llama, global_batch_size=2**16, may_offload=True)
    topology = Topology(num_devices, 8)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        plan = search(job, topology, H200)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0
    assert plan.best.num_devices <= num_devices
    # All microbatches are computed by somebody.
    assert sum(plan.counts) == plan.best.num_microbatches


def test_devices_are_left_idle_where_that_is_faster(small):
    job = Job(facts=small, global_batch_size=12, num_microbatches=[12])
    plan = search(job, Topology(7, 8), H200, memory_limit_bytes=1e9)
    assert plan.best.num_devices < 7
    assert plan.num_idle == 7 - plan.best.num_devices
    [note] = [note for note in plan.notes if "idle" in note]
    assert f"{plan.num_idle} of 7 devices stay idle; with all of them" in note


def test_slow_devices_get_less_or_nothing(llama):
    job = Job(facts=llama, global_batch_size=40, num_microbatches=[40])
    speeds = (1.0,) * 6 + (0.5,) * 2
    plan = search(job, Topology(8, 8, speeds), H200)
    assert plan.best.num_devices == 8
    assert max(plan.counts[:6]) == 6
    assert max(plan.counts[6:]) <= 3
    assert any("to 6 microbatches" in note for note in plan.notes)
    plan = search(job, Topology(8, 8, (1.0,) * 7 + (0.01,)), H200)
    assert plan.best.num_devices == 7


def test_sizes_can_be_given(llama):
    job = Job(
        facts=llama,
        global_batch_size=64,
        num_microbatches=[64],
        fixed={"tensor": 4, "fsdp": 2},
    )
    plan = search(job, Topology(16, 8), H200)
    assert plan.best.mesh == MeshSpec(data=2, fsdp=2, tensor=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_microbatches": [5]}, "divide them"),
        ({"global_batch_size": 0}, "at least one row"),
        ({"fixed": {"model": 2}}, "found \\['model'\\]"),
    ],
)
def test_jobs_that_cannot_be_are_refused(small, options, message):
    with pytest.raises(ConfigError, match=message):
        Job(**{"facts": small, "global_batch_size": 12, **options})


def test_more_microbatches_than_can_be_added_exactly_are_not_considered(small):
    job = Job(facts={"kept": small["kept"]}, global_batch_size=2**15)
    assert max(num for _, num, _ in job.blocks()) == 2**14
    fast = dataclasses.replace(job, exact=False)
    assert max(num for _, num, _ in fast.blocks()) == 2**15
    with pytest.raises(ConfigError, match="at most 16384"):
        dataclasses.replace(job, num_microbatches=[2**15])


def test_topologies_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="above 0"):
        Topology(0, 8)
    with pytest.raises(ConfigError, match="a speed for each of 4"):
        Topology(4, 8, (1.0,))


def next_mesh(llama, num_devices, steps, **options):
    given = {"facts": llama, "global_batch_size": 64, "num_microbatches": [64]}
    job = Job(**given, fixed=options.pop("fixed", {}))
    return choose_next(
        job, Topology(num_devices, 8), H200, remaining_steps=steps, **options
    )


def test_few_steps_stay_where_they_are_and_many_move(llama):
    old = {"data": 4}
    few = next_mesh(llama, 8, 3, old=old)
    assert (few.best.sizes["data"], few.move_s) == (4, 0.0)
    assert few.plan.num_idle == 4
    many = next_mesh(llama, 8, 100_000, old=old)
    assert many.best.num_devices == 8
    assert many.move_s > H200.start_s
    # Neither would have been better off with the other's mesh.
    assert few.remaining_s == pytest.approx(3 * few.best.step_s)
    assert many.remaining_s < 100_000 * few.best.step_s


def test_after_a_loss_copies_that_are_whole_go_on_without_a_move_of_state(llama):
    fixed = {"fsdp": 1, "tensor": 1, "expert": 1, "context": 1}
    plan = next_mesh(llama, 7, 10, old={"data": 8}, num_lost=1, fixed=fixed)
    assert plan.best.sizes["data"] == 7
    assert plan.move_s == H200.start_s
    assert plan.consistency == "exact"


def test_a_change_of_tensor_is_equivalent_and_of_data_exact():
    assert consistency_class({"data": 8, "tensor": 2}, {"fsdp": 3, "tensor": 2}) == (
        "exact"
    )
    for axis in ("tensor", "expert", "context"):
        assert consistency_class({"data": 8}, {"data": 4, axis: 2}) == "equivalent"


def test_nothing_left_to_do_is_refused(llama):
    with pytest.raises(ConfigError, match="found 0 steps"):
        next_mesh(llama, 8, 0, old={"data": 8})
