"""Predicted memory, collectives and times, beside compiled programs."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from models import gpt, moe
from shardkit.errors import ConfigError
from shardkit.planner.compiled_peak import compile_microbatch
from shardkit.planner.cost import predict
from shardkit.planner.exchanges import microbatch_exchanges, state_exchanges
from shardkit.planner.memory import memory
from shardkit.planner.meshes import Meshes, Topology
from shardkit.planner.placement_model import StateBytes
from shardkit.planner.profile import load_profile, profile_names
from shardkit.planner.reading import read_model
from shardkit.planner.strategies import gather_once

SMALL = {"num_layers": 2, "scan_layers": True}
WIDE = {
    **{"num_layers": 2, "scan_layers": True, "embed_dim": 256, "mlp_dim": 1024},
    **{"norm": "layer", "mlp": "gelu", "positions": "learned", "use_bias": True},
    "tie_embeddings": False,
}


def plain():
    """Two matrices, which compile quickly."""

    def init(key):
        return {
            "up": sk.axes(jnp.ones((256, 384)), "embed", "mlp"),
            "down": sk.axes(jnp.ones((384, 256)), "mlp", "embed"),
            "scale": jnp.ones(256),
        }

    def loss(params, microbatch, key):
        x = microbatch["tokens"].astype(jnp.float32)
        y = jnp.tanh(x @ params["up"]) @ params["down"] * params["scale"][None]
        return jnp.sum((y - x) ** 2)

    return sk.Model(init=init, loss=loss, axis_rules={"embed": "fsdp"})


MODELS = {
    "plain": (plain, 64, 255),
    "small": (lambda: gpt.build(**SMALL), 2, 64),
    "remat": (lambda: gpt.build(**SMALL, remat=True), 2, 64),
    "unrolled": (lambda: gpt.build(num_layers=2), 2, 64),
    "wide": (lambda: gpt.build(**WIDE), 1, 32),
    "experts": (moe.build, 2, 32),
}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
}


def compare(name, mesh, num_devices, *, exact=True, tx="adamw", num_microbatches=8):
    """Returns a compiled step's report, and what was predicted of it."""
    build, rows, length = MODELS[name]
    model, optimizer = build(), OPTIMIZERS[tx]()

    def data(step):
        return {"tokens": np.zeros((num_microbatches * rows, length + 1), np.int32)}

    trainer = sk.Trainer(
        **model,
        tx=optimizer,
        data=data,
        mesh=mesh,
        num_microbatches=num_microbatches,
        consistency="exact" if exact else "fast",
    )
    report = trainer.inspect(num_devices)["step"]
    trainer.close()
    microbatch = {"tokens": jax.ShapeDtypeStruct((rows, length + 1), np.int32)}
    facts = read_model(model, microbatch, optimizer)
    meshes = Meshes.of(mesh.sizes(num_devices), num_microbatches)
    peak = compile_microbatch(model, microbatch, facts).peak_bytes
    asked = facts.with_peak({}, peak)
    total = [sum(memory(x, meshes, exact=exact).values())[0] for x in (facts, asked)]
    exchanges = collections.Counter()
    assert not any(x.num_bytes for x in microbatch_exchanges(facts, meshes))
    for x in state_exchanges(facts, meshes, exact=exact):
        if x.axis in ("data", "fsdp"):
            exchanges[x.kind, x.state == "peaks"] += int(x.num_bytes[0])
    return report, total, dict(exchanges)


def check(name, mesh, num_devices, **options):
    report, (estimate, asked), exchanges = compare(name, mesh, num_devices, **options)
    kept = report.argument_bytes + report.output_bytes - report.reused_bytes
    total = kept + report.temp_bytes
    assert asked == pytest.approx(total, rel=0.1)
    assert estimate == pytest.approx(total, rel=0.25)
    compiled = {(c.kind, bool(c.note)): c.num_bytes for c in report.collectives}
    assert exchanges == compiled


def test_a_compiled_step_takes_what_was_predicted():
    check("plain", sk.MeshSpec(data=2, fsdp=-1), 6)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("name", "tx", "data", "fsdp", "num_devices"),
    [
        ("small", "adamw", 1, -1, 8),
        ("small", "clipped", -1, 1, 8),
        ("small", "sgd", 1, 1, 1),
        ("remat", "adamw", 2, -1, 4),
        ("unrolled", "adamw", 1, -1, 7),
        ("wide", "clipped", 1, -1, 4),
        ("wide", "adamw", 4, 2, 8),
        ("experts", "adamw", 2, -1, 4),
    ],
)
def test_compiled_steps_take_what_was_predicted(
    name, tx, data, fsdp, num_devices, exact
):
    check(name, sk.MeshSpec(data=data, fsdp=fsdp), num_devices, exact=exact, tx=tx)


def test_shardkits_own_step_is_the_strategy_that_gathers_once(facts):
    meshes = Meshes.of({"data": 2, "fsdp": 4}, 8)
    cut = [leaf for leaf in facts.params if "fsdp" in leaf.cuts]
    size = float(sum(leaf.num_bytes for leaf in cut))
    sizes = StateBytes(params=size, grads=size, opt_state=2 * size)
    volume = gather_once().volume(sizes, {"data": 2, "fsdp": 4})
    found = {
        (x.kind, x.axis): x.sent_bytes[0]
        for x in state_exchanges(facts, meshes, exact=False)
        if x.state in ("params", "grads") and x.sent_bytes[0]
    }
    assert found == {(x.kind, x.axis): x.sent_bytes for x in volume.exchanges}


@pytest.fixture(scope="module")
def facts():
    """A small model with two rows in a microbatch."""
    microbatch = {"tokens": jax.ShapeDtypeStruct((2, 65), np.int32)}
    return read_model(gpt.build(**SMALL), microbatch, optax.adamw(1e-3))


def test_memory_falls_where_it_is_cut(facts):
    sizes = {"fsdp": [1, 2, 4, 1, 1], "tensor": [1, 1, 1, 2, 4]}
    kinds = memory(facts, Meshes.of(sizes, 8))
    params = facts.state_bytes("params")
    assert kinds["params"][0] == params
    # Norms stay whole.
    assert params / 4 < kinds["params"][2] < params / 3.9
    assert kinds["gathered"][0] == kinds["gathered"][2] == params
    assert kinds["gathered"][3] == pytest.approx(params / 2, rel=0.01)
    assert kinds["activations"][4] < kinds["activations"][3] < kinds["activations"][0]
    assert kinds["sums"][0] == 2 * params
    fast = memory(facts, Meshes.of(sizes, 8), exact=False)
    assert fast["sums"][0] == params


def test_offloading_takes_the_optimizer_out_of_memory_and_costs_time(facts):
    profile, topology = load_profile("h200"), Topology(8, 8)
    meshes = Meshes.of({"fsdp": 8}, 8, offload=[False, True])
    costs = predict(facts, meshes, profile, topology)
    assert costs.memory["optimizer"][0] > 0
    assert costs.memory["optimizer"][1] == 0
    assert costs.time_s["offload"][0] == 0
    assert costs.step_s[1] > costs.step_s[0]


def test_an_axis_between_hosts_is_slower(facts):
    profile = load_profile("h100")
    meshes = Meshes.of({"data": 2, "fsdp": 8}, 16)
    near = predict(facts, meshes, profile, Topology(16, 16)).time_s
    far = predict(facts, meshes, profile, Topology(16, 8)).time_s
    across = predict(facts, meshes, profile, Topology(16, 4)).time_s
    assert near["over data"] < far["over data"]
    assert near["over fsdp"] == far["over fsdp"] < across["over fsdp"]


def test_where_groups_of_devices_lie():
    topology = Topology(32, 8)
    meshes = Meshes.of(
        {"data": [4, 2, 1, 1], "fsdp": [8, 4, 32, 3], "tensor": [1, 4, 1, 4]}, 1
    )
    together = [
        meshes.on_one_host(axis, topology).tolist()
        for axis in ("data", "fsdp", "tensor")
    ]
    # Groups of 12 sit across hosts; those along tensor do not.
    assert together == [[1, 1, 1, 1], [8, 2, 8, 2], [1, 4, 1, 4]]


def test_devices_that_share_cores_do_not_compute_faster_together(facts):
    profile, topology = load_profile("cpu"), Topology(8, 8)
    half = dict.fromkeys(profile.alone_fraction, 0.5)
    profile = dataclasses.replace(profile, alone_fraction=half)
    meshes = Meshes.of({"data": [1, 8, 3]}, 8)
    compute = predict(facts, meshes, profile, topology).time_s["compute"]
    # Whoever is alone keeps half of the host busy, and each further one half of what is
    # idle; and of three that compute three, three and two microbatches, the last
    # leaves its part to the others.
    busy = np.array([1 / 2, 1 - 2**-8, 7 / 8])
    assert compute * busy == pytest.approx(compute[0] / 2)
    costs = predict(facts, meshes, profile, topology)
    time_s = costs.time_s
    assert time_s["packing"][1] == pytest.approx(8 * time_s["packing"][0])
    meshes = Meshes.of({"data": [1, 8]}, 8)
    other = dataclasses.replace(profile, is_shared=False)
    compute = predict(facts, meshes, other, topology).time_s["compute"]
    assert compute[0] == pytest.approx(8 * compute[1])


def test_half_the_peak_is_twice_the_time(facts):
    profile, topology = load_profile("h200"), Topology(1, 8)
    slow = dataclasses.replace(
        profile,
        flops_fraction={k: v / 2 for k, v in profile.flops_fraction.items()},
        memory_fraction=profile.memory_fraction / 2,
        product_overhead_s=profile.product_overhead_s * 2,
    )
    meshes = Meshes.of({}, 4)
    times = [predict(facts, meshes, p, topology).time_s for p in (profile, slow)]
    assert times[1]["compute"] == pytest.approx(2 * times[0]["compute"])


def test_only_large_pieces_of_memory_are_made_anew(facts):
    profile, topology = load_profile("cpu"), Topology(8, 8)
    meshes = Meshes.of({"data": [1, 8]}, 8)
    assert not predict(facts, meshes, profile, topology).time_s["allocating"].any()
    costs = predict(facts.with_rows(4096), meshes, profile, topology)
    # What it has before and after a step is not given to it anew.
    fresh = costs.memory_bytes - sum(
        costs.memory[kind]
        for kind in ("params", "optimizer", "model state", "batch", "other")
    )
    assert costs.time_s["allocating"] == pytest.approx(
        fresh * meshes.num_devices * profile.fresh_byte_s
    )


def test_products_and_what_is_between_them_take_turns(facts):
    profile, topology = load_profile("h200"), Topology(1, 8)
    meshes, work = Meshes.of({}, 4), facts.work
    fields = {"product_overhead_s": 0.0, "written_fraction": 0.0}
    times = {
        name: predict(
            facts, meshes, dataclasses.replace(profile, **{**fields, **some}), topology
        ).time_s["compute"][0]
        for name, some in {
            "work": {},
            "each": {"product_overhead_s": 1.0},
            "between": {"written_fraction": 1.0},
        }.items()
    }
    assert times["each"] - times["work"] == pytest.approx(4 * work.num_products)
    between = 4 * 2 * sum(work.other_bytes.values()) / profile.memory_bytes_s
    assert times["between"] - times["work"] == pytest.approx(between)


@pytest.mark.parametrize("name", profile_names())
def test_profiles_say_who_measured_what(name):
    profile = load_profile(name)
    assert profile.measured_by
    assert all(0 < part <= 1 for part in profile.flops_fraction.values())
    assert profile.flops_s("float8_e4m3fn") == profile.flops_s("float32")
    assert profile.peak("float32") > 0
    assert profile.peak("float8_e4m3fn") == profile.peak("float32")


def test_an_unknown_profile_is_refused():
    with pytest.raises(ConfigError, match="expected cpu, h100, h200, v5e, v5p or"):
        load_profile("h300")
    with pytest.raises(ConfigError, match="No such file"):
        load_profile("h300.toml")


def test_all_that_is_wrong_with_a_profile_is_said_at_once(tmp_path):
    from importlib.resources import files

    text = (files("shardkit.planner") / "profiles" / "h100.toml").read_text()
    text = text.replace("memory_bytes = 80e9", 'memory_bytes = "80 GB"')
    text = text.replace("bfloat16 = 0.6", "bfloat16 = 1.6")
    text = text.replace("between = 50e9", "betwixt = 50e9")
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}:"
    assert sorted(line.strip().partition(":")[0] for line in lines[1:]) == [
        "datasheet.bandwidth_bytes_s.between",
        "datasheet.bandwidth_bytes_s.betwixt",
        "datasheet.memory_bytes",
        "measured.flops_fraction.bfloat16",
    ]
    path.write_text("name = ")
    with pytest.raises(ConfigError, match="not TOML"):
        load_profile(path)


def test_an_axis_that_cuts_nothing_is_as_fast_as_data():
    rows = {"tokens": jax.ShapeDtypeStruct((8, 256), jnp.int32)}
    facts = read_model(plain(), rows, optax.adamw(1e-3), axis_rules={})
    assert any("nothing is cut by fsdp" in note for note in facts.notes)
    meshes = Meshes.of({"data": [8, 1, 2], "fsdp": [1, 8, 4]}, 8)
    profile, topology = load_profile("h100"), Topology(8, 8)
    found = predict(facts, meshes, profile, topology)
    step_s = sum(found.time_s.values())
    assert step_s[1:] == pytest.approx([step_s[0]] * 2, rel=0.01)
