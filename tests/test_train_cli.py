"""`train.py` as its users meet it: a process with an exit code and a directory."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from problems import CONFIG

ROOT = Path(__file__).parents[1]
STEPS = 12
DEADLINE_S = 120


class Command:
    """Runs `train.py` in a directory of its own."""

    def __init__(self, path, cache):
        self.path = path
        (path / "config.toml").write_text(CONFIG)
        keep = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        self.env = keep | {
            "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": str(cache),
            "PYTHONPATH": str(ROOT / "tests" / "workers"),
        }

    def start(self, *args, config="config.toml", **env):
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), config, *args],
            cwd=self.path,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *args, code=0, **options):
        """Runs to the end; returns what it printed, and asserts the exit code."""
        return self.finish(self.start(*args, **options), code)

    def finish(self, process, code=0):
        try:
            out, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == code, out + errors
        assert "Traceback" not in errors
        return out + errors

    def run_until(self, is_reached, *args, **env):
        """Starts a run and returns it when `is_reached()`."""
        process = self.start(*args, **env)
        deadline_s = time.monotonic() + DEADLINE_S
        while process.poll() is None and time.monotonic() < deadline_s:
            if is_reached():
                return process
            time.sleep(0.05)
        process.kill()
        raise AssertionError("".join(process.communicate()))

    def lines(self, out):
        path = self.path / out / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def steps(self, out):
        return [line for line in self.lines(out) if "event" not in line]

    def summary(self, out):
        return json.loads((self.path / out / "summary.json").read_text())

    def traced(self, out, kind):
        """What the trace has of a kind of event; it is whole, whenever it is read."""
        trace = json.loads((self.path / out / "trace.json").read_text())
        return [e["args"] for e in trace["traceEvents"] if e.get("cat") == kind]

    def saved(self, out):
        found = (self.path / out / "checkpoints").glob("*")
        return sorted(int(path.name) for path in found if path.name.isdigit())


@pytest.fixture(scope="module")
def train(tmp_path_factory, compile_cache):
    return Command(tmp_path_factory.mktemp("train"), compile_cache)


@pytest.fixture(scope="module")
def plain(train):
    """A run that nothing happens to; `--resume` on nothing starts."""
    train("--out", "plain", "--resume")
    return "plain"


@pytest.fixture(scope="module")
def resized(train):
    resize = ["--resize", "0:8,2:5,7:3,12:8,99:1"]
    said = train("--out", "resized", *resize, "--axis_rules.mpl", "tensor")
    return "resized", said


def test_inspecting_says_what_a_step_costs_and_leaves_nothing(train):
    before = set(train.path.iterdir())
    said = train("--inspect", "--devices", "5")
    assert "step on 5 devices, per device and execution\n" in said
    assert "evaluate on 5 devices" in said
    assert " x all-gather " in said
    assert set(train.path.iterdir()) == before


def test_a_resize_leaves_no_trace(train, plain, resized):
    out, _ = resized
    assert [line["step"] for line in train.steps(out)] == list(range(STEPS))
    counts = [line["num_devices"] for line in train.steps(out)]
    assert counts == [8] * 2 + [5] * 5 + [3] * 5
    for name in ("step", "loss", "loss_bits"):
        found = [line[name] for line in train.steps(out)]
        assert found == [line[name] for line in train.steps(plain)]
    ours, theirs = train.summary(out), train.summary(plain)
    assert ours["num_reconfigurations"] == 2
    assert theirs["num_reconfigurations"] == 0
    for name in ("final_loss", "eval_loss", "state_digest", "versions"):
        assert ours[name] == theirs[name]
    assert len(ours["state_digest"]) == 32
    assert ours["eval_loss"] > 0


def test_what_a_run_leaves_behind(train, resized):
    out, said = resized
    assert "12:8,99:1 is ignored, the run ends at step 12" in said
    assert "mpl" in said
    line = train.steps(out)[3]
    assert line["mesh"] == {"fsdp": 5}
    assert len(line["loss_bits"]) == 8
    assert line["step_s"] is None
    assert line["tokens_per_s"] is None
    line = train.steps(out)[4]
    assert line["step_s"] > 0
    assert line["tokens_per_s"] > 0
    changes = [e for e in train.lines(out) if e.get("event") == "reconfigure"]
    for change, step, before, after in zip(
        changes, (2, 7), (8, 5), (5, 3), strict=True
    ):
        assert change["step"] == step
        assert change["from_devices"] == before
        assert change["to_devices"] == after
        assert change["certified"] is True
        assert change["bytes_moved"] > 0
        times = {p["name"]: (p["start_s"], p["end_s"]) for p in change["phases"]}
        assert {"compile", "plan", "move", "old_step", "new_digest"} <= times.keys()
        assert all(0 <= start <= end for start, end in times.values())
    assert changes[0]["from_mesh"] == {"data": 2, "fsdp": 4}
    assert changes[0]["to_mesh"] == {"fsdp": 5}
    # Of the three that are kept the last is the end, though 12 were due anyway.
    assert train.saved(out) == [6, 9, 12]
    assert (train.path / out / "config.toml").exists()
    summary = train.summary(out)
    assert summary["steps"] == STEPS
    assert {"python", "jax", "jaxlib", "flax", "optax"} <= summary["versions"].keys()
    assert "8 -> 5 devices" in said
    assert summary["state_digest"] in said


def test_resuming_a_finished_run_changes_nothing(train, plain):
    before = {
        path: path.read_bytes()
        for path in (train.path / plain).rglob("*")
        if path.is_file()
    }
    assert "finished already" in train("--out", plain, "--resume", "--devices", "3")
    said = train("--out", plain, "--resume", "--steps", "2")
    assert f"at step {STEPS}, beyond step 2" in said
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.slow
def test_a_finished_run_can_be_prolonged(train, plain, resized):
    out, _ = resized
    rule = ["--axis_rules.mpl", "tensor"]
    train("--out", out, "--resume", *rule, "--steps", "14", "--devices", "3")
    assert [line["step"] for line in train.steps(out)] == list(range(14))
    assert train.summary(out)["steps"] == 14
    assert train.saved(out)[-1] == 14


def test_preempted_killed_and_resumed_a_run_is_what_it_would_have_been(train, plain):
    out, slow = "interrupted", {"STEP_S": "0.25"}

    def has_line(step):
        path = train.path / out / "metrics.jsonl"
        return path.exists() and f'"step": {step},' in path.read_text()

    process = train.run_until(lambda: has_line(1), "--out", out, **slow)
    process.send_signal(signal.SIGTERM)
    said = train.finish(process, code=75)
    words = [sys.executable, str(ROOT / "train.py"), f"{out}/config.toml"]
    command = shlex.join([*words, "--resume", "--out", out])
    assert said.endswith(f"is saved\ngo on with: {command}\n")
    [step] = train.saved(out)[-1:]
    assert [line["step"] for line in train.steps(out)] == list(range(step))

    again = ["--out", out, "--resume", "--devices", "5", "--train.log_every", "1"]
    # What is being written when it is killed may not be there.
    is_saved = lambda: has_line(7) and 6 in train.saved(out)  # noqa: E731
    process = train.run_until(is_saved, *again, **slow)
    process.kill()
    process.communicate()
    assert train.traced(out, "begin")[1] == {"step": step}
    assert 6 in train.saved(out)
    # A line that was cut off in the middle.
    with (train.path / out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')

    train("--out", out, "--resume", "--resize", "0:8,10:3")
    bits = [(line["step"], line["loss_bits"]) for line in train.steps(out)]
    assert bits == [(line["step"], line["loss_bits"]) for line in train.steps(plain)]
    for name in ("final_loss", "eval_loss", "state_digest"):
        assert train.summary(out)[name] == train.summary(plain)[name]
    assert [at["step"] for at in train.traced(out, "begin")] == [0, step, 6]
    assert [at["step"] for at in train.traced(out, "reconfigure")] == [10]


@pytest.mark.slow
def test_a_run_begins_from_the_checkpoint_of_another(train, plain):
    """The same parameters and moments, under another learning rate."""
    end = str(STEPS + 2)
    rate = ["--optimizer.learning_rate", "1e-4", "--steps", end]
    said = train("--from", plain, "--out", "other", *rate)
    assert f"other: steps {STEPS} to {end}" in said
    assert [line["step"] for line in train.steps("other")] == [STEPS, STEPS + 1]
    assert train.saved("other")[0] == STEPS
    assert train.saved(plain)[-1] == STEPS


@pytest.mark.slow
def test_preempted_while_it_compiles_it_leaves_and_goes_on_later(train):
    out = ["--out", "compiling", "--model.factory", "faulty:slow", "--steps", "2"]
    tracing = train.path / "tracing"
    process = train.run_until(tracing.exists, *out, TRACE_S="60")
    begin_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert "--resume --out compiling" in train.finish(process, code=75)
    # What is being compiled is not waited for.
    assert time.monotonic() - begin_s < 30
    assert train.steps("compiling") == []
    train(*out, "--resume")
    assert [line["step"] for line in train.steps("compiling")] == [0, 1]


def test_a_directory_in_use_is_not_touched(train, plain):
    said = train("--out", plain, code=2)
    assert "add --resume" in said
    said = train(
        "--out", plain, "--resume", "--seed", "4", "--optimizer.b1", "0.8", code=2
    )
    assert "train.seed: 0 there, 4 asked for" in said
    assert "optimizer.b1: None there, 0.8 asked for" in said


def test_a_loss_that_is_not_a_number_ends_with_3(train):
    text = CONFIG.replace(
        '"faulty:digits"', '"faulty:digits"\noptions = {nan_step = 4}'
    )
    (train.path / "nan.toml").write_text(text)
    said = train("--out", "nan", config="nan.toml", code=3)
    assert "NonFiniteError: step 4: the loss is nan" in said
    assert train.saved("nan") == [3]
    assert [line["step"] for line in train.steps("nan")] == [0, 1, 2, 3]


def test_a_failed_certificate_ends_with_3(train):
    text = CONFIG.replace("models.mlp:build", "faulty:build")
    text = text.replace(", num_layers = 1, dropout = 0.2", "")
    (train.path / "faulty.toml").write_text(text)
    args = ["--out", "faulty", "--resize", "4:4"]
    said = train(*args, config="faulty.toml", code=3)
    assert "CertificateError: step 4" in said
    assert "params/hidden_0/kernel" in said
    assert train.saved("faulty") == [3]
    assert [line["step"] for line in train.steps("faulty")] == [0, 1, 2, 3]
