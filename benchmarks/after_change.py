"""Speed after a change of device count, beside runs that began on that count.

    python benchmarks/after_change.py [--counts 7,6,5,4,3,2,1] [--rounds 7]

One run begins on all devices and changes to N; the static ones begin on N, one for
each way to lay the mesh out, and the best of them is what counts. All are kept and
stepped in turn, some steps each, so that a busy machine disturbs them alike. Tokens
per second; the ratio is taken within each round.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

STEPS = 4
HEADER = (
    "| devices | best static mesh | tokens/s, static | after the change | ratio, "
    "median [quartiles] |\n" + "|---" * 5 + "|"
)


class Run:
    """A trainer that is stepped a few steps at a time."""

    def __init__(self, problem, pool, mesh, script):
        import shardkit as sk

        self._trainer = sk.Trainer(
            init=problem.model.init,
            loss=problem.model.loss,
            tx=problem.tx,
            data=lambda step: problem.batch,
            mesh=mesh,
            axis_rules=problem.model.axis_rules,
            num_microbatches=problem.num_microbatches,
            certify="off",
            devices=pool,
        )
        self._script = sk.scripted(script)
        self._tokens = problem.batch["tokens"][:, 1:].size
        self.go(1 + max(script))

    def go(self, num_steps):
        """Runs so many steps more; returns tokens per second."""
        steps = self._trainer.step + num_steps
        start_s = time.perf_counter()
        for _ in self._trainer.run(steps, membership=self._script):
            pass
        return num_steps * self._tokens / (time.perf_counter() - start_s)

    def close(self):
        """Ends background work."""
        self._trainer.close()


def measure(problem, pool, count, rounds):
    import shardkit as sk

    changed = Run(problem, pool, sk.MeshSpec(), {0: len(pool), 2: count})
    meshes = {"fsdp": sk.MeshSpec(), "data": sk.MeshSpec(data=-1, fsdp=1)}
    static = {
        name: Run(problem, pool[:count], mesh, {0: count})
        for name, mesh in meshes.items()
    }
    runs = {"changed": changed, **static}
    for run in runs.values():
        run.go(STEPS)
    found = {name: [] for name in runs}
    for turn in range(rounds):
        order = list(runs) if turn % 2 else list(runs)[::-1]
        for name in order:
            found[name].append(runs[name].go(STEPS))
    for run in runs.values():
        run.close()
    best = max(static, key=lambda name: statistics.median(found[name]))
    ratios = [a / b for a, b in zip(found["changed"], found[best], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    speeds = [statistics.median(found[name]) for name in (best, "changed")]
    print(
        f"| {count} | {best} | {speeds[0]:.0f} | {speeds[1]:.0f} "
        f"| {middle:.3f} [{low:.3f}, {high:.3f}] |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--counts", default="7,6,5,4,3,2,1")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.config == "tiny":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("PJRT_NPROC", "8")
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    from benchmarks import common
    from benchmarks.resize import Problem

    print(common.describe_machine())
    print(HEADER)
    problem, pool = Problem(arguments.config), jax.devices()
    for count in map(int, arguments.counts.split(",")):
        if count < len(pool):
            measure(problem, pool, count, arguments.rounds)


if __name__ == "__main__":
    main()
