"""A calibration finds what is there, and writes what `plan` reads."""

import copy

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.config.toml import dump_toml
from shardkit.inexact import check_atomics
from shardkit.planner.calibration import Sample, calibrated, fit, predicted_s
from shardkit.planner.calibrator import guess_base
from shardkit.planner.measuring import Experiment, experiments, measure
from shardkit.planner.profile import load_profile, profile_table, read_profile

# Seconds per unit of what no machine has all of.
TRUE = {
    "flops float32": 1 / 60e12,
    "flops bfloat16": 1 / 300e12,
    "products": 4e-6,
    "bytes": 1 / 3e12,
    "written": 0.5 / 3e12,
    "fresh": 1 / 40e9,
    "sent": 1 / 250e9,
    "hops": 9e-6,
}


def times(true, *, noise=0.0, disturbed=(), seed=0):
    """The programs of a calibration with the times that coefficients give them."""
    found = list(experiments("gpu", 4, ["float32", "bfloat16"]))
    rng = np.random.default_rng(seed)
    samples = []
    for number, x in enumerate(found):
        seconds = sum(true[name] * amount for name, amount in x.amounts.items())
        seconds *= np.exp(noise * rng.standard_normal())
        seconds *= 4.0 if number in disturbed else 1.0
        samples.append(Sample(x.name, x.amounts, seconds))
    return samples


@pytest.fixture(scope="module")
def programs():
    """Traced once; times are another matter."""
    return times(TRUE)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(factors=st.lists(st.floats(-1.5, 1.5), min_size=8, max_size=8))
def test_coefficients_of_any_size_are_found(programs, factors):
    true = {
        name: value * 10**factor
        for (name, value), factor in zip(TRUE.items(), factors, strict=True)
    }
    samples = [
        Sample(x.name, x.amounts, predicted_s(Sample("", x.amounts, 0), true))
        for x in programs
    ]
    found = fit(samples)
    assert found.keys() == true.keys()
    for x in samples:
        assert predicted_s(x, found) == pytest.approx(x.seconds, rel=1e-6)
    # One that is too small beside the others in every program cannot be seen.
    for name, value in true.items():
        part = max(x.amounts.get(name, 0) * value / x.seconds for x in samples)
        if part > 1e-3:
            assert found[name] == pytest.approx(value, rel=1e-3)


def test_noise_and_a_few_disturbed_programs_change_little():
    found = fit(times(TRUE, noise=0.02, disturbed=(3, 11, 20)))
    for name, value in TRUE.items():
        assert found[name] == pytest.approx(value, rel=0.15), name


def test_what_is_known_already_is_not_fitted():
    samples = [
        Sample("a", {"steps": 1.0}, 5.0, known_s=3.0),
        Sample("b", {"steps": 2.0}, 10.0, known_s=6.0),
    ]
    assert fit(samples) == pytest.approx({"steps": 2.0})
    assert predicted_s(samples[1], {"steps": 2.0}) == pytest.approx(10.0)
    # More known than there was is nothing, not less.
    assert fit([Sample("a", {"steps": 1.0}, 5.0, known_s=6.0)]) == {"steps": 0.0}


def test_a_calibrated_profile_is_read_as_it_was_written(programs, tmp_path):
    base, _ = profile_table("h200")
    before = copy.deepcopy(base)
    table, kept = calibrated(base, programs)
    assert base == before
    table["measured"]["by"] = "a test"
    path = tmp_path / "mine.toml"
    path.write_text(dump_toml(table))
    profile = load_profile(path)
    assert profile == read_profile(table, "here")
    assert profile.measured_by == "a test"
    assert profile.flops_s("bfloat16") == pytest.approx(300e12, rel=1e-3)
    assert profile.flops_s("float32") == pytest.approx(60e12, rel=1e-3)
    assert profile.memory_bytes_s == pytest.approx(3e12, rel=1e-3)
    assert profile.written_fraction == pytest.approx(0.5, rel=1e-3)
    assert profile.product_overhead_s == pytest.approx(4e-6, rel=1e-3)
    assert profile.fresh_byte_s == pytest.approx(1 / 40e9, rel=1e-3)
    inside, old = profile.links["inside"], load_profile("h200")
    assert inside.bandwidth_bytes_s == pytest.approx(250e9, rel=1e-3)
    assert inside.latency_s == pytest.approx(9e-6, rel=1e-3)
    # What it cannot see from one host, or was given no time for, is as it was.
    assert profile.links["between"] == old.links["between"]
    assert profile.step_overhead_s == old.step_overhead_s
    assert {"link_fraction.between", "step_overhead_s", "start_s"} <= {*kept}
    assert not {"memory_fraction", "flops_fraction.bfloat16"} & {*kept}


def test_a_machine_beyond_its_datasheet_has_another(programs):
    base, _ = profile_table("cpu")
    profile = read_profile(calibrated(base, programs)[0], "here")
    assert profile.flops_fraction["float32"] == 1.0
    assert profile.flops_s("float32") == pytest.approx(60e12, rel=1e-3)
    # Emulated hosts are one machine.
    assert profile.links["between"] == profile.links["inside"]


def test_what_a_device_alone_has_of_a_host(programs):
    base, _ = profile_table("cpu")
    slower = {name: n * (1.25 if "flops" in name else 2) for name, n in TRUE.items()}
    alone = [
        Sample(x.name, x.amounts, predicted_s(Sample("", x.amounts, 0), slower))
        for x in programs
        if "products" in x.amounts
    ]
    profile = read_profile(calibrated(base, programs, alone)[0], "here")
    assert profile.alone_fraction == pytest.approx({"products": 0.8, "others": 0.5})
    # No more than all of it.
    faster = [Sample(x.name, x.amounts, x.seconds / 4) for x in alone]
    profile = read_profile(calibrated(base, programs, faster)[0], "here")
    assert profile.alone_fraction == {"products": 1.0, "others": 1.0}
    kept = calibrated(base, programs)[1]
    assert "alone_fraction.others" in kept


def test_a_program_counts_what_it_does():
    some = {x.name: x for x in experiments("cpu", 8, ["float32"])}
    rows, length, embed = 1, 128, 128
    # Per layer twelve squares of the width and two products of attention, twice as
    # much again in the gradient, but for that of the first layer's input.
    tokens, layers = rows * length, 2
    forward = 2 * tokens * layers * (12 * embed**2 + 2 * length * embed)
    amounts = some["gradient 1×128×128 float32"].amounts
    assert amounts["flops float32"] == pytest.approx(3 * forward, rel=1e-9)
    assert some["all-reduce 4 KiB over 8"].amounts == {"sent": 7168.0, "hops": 3.0}
    assert some["all-gather 4 KiB over 2"].amounts == {"sent": 2048.0, "hops": 1.0}


def test_nothing_is_timed_that_an_exact_step_on_gpus_may_not_have():
    for x in experiments("cpu", 2, ["float32"]):
        if "written" in x.amounts:
            one_pass, args = x.make(1)
            inside = jax.tree.map(lambda a: a[0], args)
            check_atomics(jax.make_jaxpr(one_pass)(inside), "gpu")


def test_time_that_is_up_ends_it(devices):
    made = []

    def slow(number):
        def make(num):
            made.append(number)
            return lambda x: x + 1, np.zeros((num, 8), np.float32)

        return Experiment(str(number), make, {"bytes": 64.0})

    samples, alone = measure(
        map(slow, range(1000)), devices[:2], is_shared=True, limit_s=0.0
    )
    assert made == [0]
    assert len(samples) == 1
    assert not alone
    # Both devices did it.
    assert samples[0].amounts == {"bytes": 128.0}
    assert samples[0].seconds > 0


@pytest.fixture
def run(verb):
    return verb("calibrate")


def test_the_verb_writes_a_profile_that_plan_reads(run, verb, tmp_path):
    path = tmp_path / "mine.toml"
    found = run("--devices", 2, "--limit-s", 2, "--out", path, "--json")
    profile = load_profile(path)
    assert profile == read_profile(found["profile"], "here")
    assert profile.devices_per_host == 2
    assert profile.measured_by.startswith("shardkit calibrate on 2 × emulated")
    assert "start_s" in found["kept"]
    assert "start_s" in profile.measured_by
    assert all(x["seconds"] > 0 for x in found["samples"])
    config = "configs/digits.toml"
    plan = verb("plan")(config, "--devices", 2, "--profile", path, "--json")
    assert plan["profile"]["is_measured"]


def test_bad_input_is_told_before_anything_is_measured(run, tmp_path):
    assert "expected at most 8, found 9" in run("--devices", 9, code=2)
    assert "expected cpu, h100" in run("--profile", "h300", code=2)
    assert "directory that is there" in run("--out", tmp_path / "a/b.toml", code=2)
    assert "expected a .toml file" in run("--out", tmp_path / "b.txt", code=2)
    (tmp_path / "c.toml").mkdir()
    assert "expected a .toml file" in run("--out", tmp_path / "c.toml", code=2)
    assert "1 or more, found '0'" in run("--limit-s", 0, code=2)


def test_devices_are_known_by_their_kind():
    class Device:
        device_kind = "NVIDIA H200"

    assert guess_base(Device()) == "h200"
    Device.device_kind = "TPU v5 lite"
    assert guess_base(Device()) == "v5e"
    # A GH200 has another chip and another memory than what its name contains.
    for kind in ("NVIDIA B300", "NVIDIA GH200 480GB"):
        Device.device_kind = kind
        with pytest.raises(Exception, match=rf"datasheet of '{kind}'.*--profile"):
            guess_base(Device())


def test_a_profile_that_cannot_be_is_refused():
    table, _ = profile_table("h200")
    table["datasheet"]["devices_per_host"] = 0.5
    table["measured"]["flops_fraction"]["bfloat61"] = 0.5
    with pytest.raises(Exception, match="there is no peak of it") as caught:
        read_profile(table, "mine.toml")
    assert "devices_per_host: expected a whole number, found 0.5" in str(caught.value)
