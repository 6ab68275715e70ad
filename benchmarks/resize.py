"""A change of device count, from the decision to the end of the first step after it.

    python benchmarks/resize.py [--config tiny|gpt2_124m] [--rounds 5] [--restarts 3]

From each time an ordinary step on the new devices is taken away. The rivals are what
one does today: `device_put` of the state and `jax.jit` of the step again, and a save
by Orbax and a new process that restores to the new mesh, with and without JAX's cache
of compiled programs filled before. Ours has its program on standby; nothing else is
special. The model and its optimizer are the config's; the tokens are random.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

STEPS_BETWEEN = 6
HEADER = "| case | | ms, median [quartiles] | / shardkit | ordinary step, ms |\n" + (
    "|---" * 5 + "|"
)
# Rows of tokens of the global batch, where the config's would take minutes.
SIZES = {"tiny": (24, 24), "gpt2_124m": (48, 24)}


class Problem:
    """What is trained: a config's model on random tokens."""

    def __init__(self, name):
        from benchmarks import common
        from models import gpt
        from shardkit.recipe import Recipe
        from shardkit.state_layout import lay_out

        config = tomllib.loads((ROOT / "configs" / f"{name}.toml").read_text())
        self.name = name
        self.model = gpt.build(**config["model"]["options"])
        rows, self.num_microbatches = SIZES[name]
        self.length = config["data"]["sequence_length"]
        self.vocab_size = config["model"]["options"].get("vocab_size", 256)
        self.batch = common.random_tokens(rows, self.length, self.vocab_size)
        self.tx = common.optimizer()
        self.recipe = Recipe(
            init=self.model.init,
            loss=self.model.loss,
            tx=self.tx,
            num_microbatches=self.num_microbatches,
        )
        self.layout, *_ = lay_out(self.recipe, self.model.axis_rules)

    def rival(self, num_devices):
        """A hand-written step, compiled for the first devices."""
        import jax
        import numpy as np
        from jax.sharding import Mesh

        from benchmarks.rivals import AXIS, Rival, with_shard_map

        mesh = Mesh(np.array(jax.devices()[:num_devices]), (AXIS,))
        return Rival(with_shard_map, self.recipe, self.layout, mesh, self.batch)


def cases(num_devices):
    if num_devices >= 8:
        return [(8, 6), (6, 8), (8, 4), (4, 8), (8, 1)]
    return [(1, 2), (2, 1)]


def ours(problem, pairs, rounds):
    """Goes through every pair of counts again and again; times and phases by pair."""
    import jax

    import shardkit as sk

    events = sk.EventLog()
    found = []
    events.subscribe(
        lambda event: (
            found.append(event) if event.name in ("reconfigure", "first_step") else None
        )
    )
    order = [count for pair in pairs * rounds for count in pair]
    script = {STEPS_BETWEEN * i: count for i, count in enumerate(order)}
    counts = tuple(dict.fromkeys(order))
    trainer = sk.Trainer(
        init=problem.model.init,
        loss=problem.model.loss,
        tx=problem.tx,
        data=lambda step: problem.batch,
        axis_rules=problem.model.axis_rules,
        num_microbatches=problem.num_microbatches,
        certify="off",
        standby=len(counts),
        standby_counts=counts,
        devices=jax.devices()[: max(counts)],
        events=events,
    )
    steps_s = {count: [] for count in counts}
    with trainer:
        total = STEPS_BETWEEN * len(order)
        for m in trainer.run(total, membership=sk.scripted(script)):
            if m.step % STEPS_BETWEEN == STEPS_BETWEEN - 2:
                trainer.wait_for_standby(timeout_s=600)
            if m.step_s is not None:
                steps_s[m.num_devices].append(m.step_s)
    ordinary_s = {count: statistics.median(times) for count, times in steps_s.items()}
    times = {pair: [] for pair in pairs}
    changes = [e for e in found if e.name == "reconfigure"]
    firsts = [e for e in found if e.name == "first_step"]
    for change, first in zip(changes, firsts, strict=True):
        pair = change.fields["from_devices"], change.fields["to_devices"]
        if pair in times:
            phases = {
                p["name"]: p["end_s"] - p["start_s"] for p in change.fields["phases"]
            }
            phases["first step"] = first.end_s - first.start_s
            spent_s = first.end_s - change.start_s - ordinary_s[pair[1]]
            times[pair].append((spent_s, change.fields["was_ready"], phases))
    return times, ordinary_s


def by_device_put(problem, pair, rounds):
    """Moves the state by `device_put` and compiles the step again."""
    import jax

    times, ordinary_s = [], []
    old = problem.rival(pair[0])
    for _ in range(rounds):
        old.start()
        jax.block_until_ready(old.step())
        start_s = time.perf_counter()
        state = old._state
        new = problem.rival(pair[1])
        new._state = jax.device_put(state, new._shardings)
        place_rest(new, old)
        jax.block_until_ready((new.step(), new._state))
        spent_s = time.perf_counter() - start_s
        ordinary_s.append(ordinary_step(new))
        times.append(spent_s - ordinary_s[-1])
    return times, statistics.median(ordinary_s)


def place_rest(new, old=None):
    import jax

    new._tokens = jax.device_put(new._tokens, new._rows)
    key = jax.random.key(0) if old is None else old._key
    new._key = jax.device_put(key, new._whole)


def ordinary_step(runner):
    """Seconds per step, while steps follow one another."""
    import jax

    times = []
    for _ in range(STEPS_BETWEEN):
        start_s = time.perf_counter()
        jax.block_until_ready((runner.step(), runner._state))
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def by_restart(problem, pair, rounds, cache):
    """Saves by Orbax and goes on in a new process."""
    import jax
    import orbax.checkpoint as ocp

    old = problem.rival(pair[0])
    old.start()
    jax.block_until_ready(old.step())
    times, ordinary_s = [], []
    for turn in range(rounds + bool(cache)):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "state"
            start_s = time.time()
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, old._state)
                checkpointer.wait_until_finished()
            command = [sys.executable, __file__, "--config", problem.name]
            command += ["--child", str(path), str(pair[1]), str(cache or "")]
            out = subprocess.run(command, capture_output=True, text=True, timeout=600)
        lines = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
        if not lines:
            raise SystemExit(f"a child process failed: {out.stderr[-3000:]}")
        end_s, step_s = json.loads(lines[0].removeprefix("RESULT "))
        if turn >= bool(cache):
            times.append(end_s - start_s - step_s)
            ordinary_s.append(step_s)
    return times, statistics.median(ordinary_s)


def child(problem, path, num_devices):
    """What the new process does until its first step is done."""
    import jax
    import orbax.checkpoint as ocp

    new = problem.rival(num_devices)
    first = lambda key: tuple(  # noqa: E731
        getattr(problem.recipe.first_state(key), name)
        for name in ("step", "params", "opt_state")
    )
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(first, jax.random.key(0)),
        new._shardings,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        new._state = checkpointer.restore(path, like)
    place_rest(new)
    jax.block_until_ready((new.step(), new._state))
    end_s = time.time()
    print("RESULT " + json.dumps([end_s, ordinary_step(new)]), flush=True)


def row(name, way, times, base_s, ordinary_s):
    times = [1e3 * t for t in times]
    # Of a single one no quartiles can be told.
    low, middle, high = statistics.quantiles(times if times[1:] else times * 2, n=4)
    ratio = "" if way == "shardkit" else f"{middle / 1e3 / base_s:.1f}"
    print(
        f"| {name} | {way} | {middle:.1f} [{low:.1f}, {high:.1f}] | {ratio} "
        f"| {1e3 * ordinary_s:.1f} |",
        flush=True,
    )


def report(problem, rounds, restarts):
    import jax

    pairs = cases(len(jax.devices()))
    times, ordinary_s = ours(problem, pairs, rounds + 1)
    print(HEADER)
    for pair in pairs:
        name = f"{pair[0]} to {pair[1]}"
        # The first may have come before its program was ready, and on GPUs the first
        # program on some devices also makes them known to each other.
        mine = [spent_s for spent_s, _, _ in times[pair][1:]]
        base_s = statistics.median(mine)
        row(name, "shardkit", mine, base_s, ordinary_s[pair[1]])
        print(f"| {name} | the first time | {1e3 * times[pair][0][0]:.1f} | | |")
        found, step_s = by_device_put(problem, pair, rounds)
        row(name, "device_put and jit again", found, base_s, step_s)
        if restarts:
            found, step_s = by_restart(problem, pair, restarts, None)
            row(name, "Orbax, new process", found, base_s, step_s)
            with tempfile.TemporaryDirectory() as cache:
                found, step_s = by_restart(problem, pair, restarts, cache)
            row(name, "the same, programs cached", found, base_s, step_s)
    print("\nPhases of shardkit's, ms, medians, and the first time:\n")
    for pair in pairs:
        first, *rest = [phases for _, _, phases in times[pair]]
        cells = [
            f"{phase} {1e3 * statistics.median(p.get(phase, 0.0) for p in rest):.1f} "
            f"({1e3 * first.get(phase, 0.0):.1f})"
            for phase in rest[0]
        ]
        ready = "ready" if times[pair][0][1] else "not ready"
        print(f"- {pair[0]} to {pair[1]}: {', '.join(cells)}; at first {ready}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if arguments.config == "tiny":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    if arguments.child:
        path, count, cache = arguments.child
        if cache:
            jax.config.update("jax_compilation_cache_dir", cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        child(Problem(arguments.config), path, int(count))
        return
    from benchmarks import common

    print(common.describe_machine())
    report(Problem(arguments.config), arguments.rounds, arguments.restarts)


if __name__ == "__main__":
    main()
