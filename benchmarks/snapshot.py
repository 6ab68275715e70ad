"""What a snapshot after every step costs the steps.

    python benchmarks/snapshot.py [--config tiny|gpt2_124m] [--rounds 9] [--steps 8]

Two runs are alike but for their snapshots, and go on in turn, some steps each, so that
a busy machine disturbs them alike; the ratio is taken within each round. A step is
timed from when the host saw the end of the one before, so that the copy of each is on
its way during the next. `stall` is what the thread that trains was held up by the
snapshot itself, `copy` how long one took in the background. Tokens are random; the
batch is smaller than the config's.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

HEADER = (
    "| config | devices | ms a step, without | with | ratio, median [quartiles] "
    "| stall, ms [quartiles] | stall / step | copy, ms [quartiles] | MiB a snapshot "
    "| MiB more a device |\n" + "|---" * 10 + "|"
)


class Run:
    """A trainer that goes on a few steps at a time."""

    def __init__(self, problem, snapshot):
        import shardkit as sk

        self.events = []
        log = sk.EventLog()
        log.subscribe(self.events.append)
        self.trainer = sk.Trainer(
            init=problem.model.init,
            loss=problem.model.loss,
            tx=problem.tx,
            data=lambda step: problem.batch,
            axis_rules=problem.model.axis_rules,
            num_microbatches=problem.num_microbatches,
            certify="off",
            snapshot=snapshot,
            events=log,
        )

    @property
    def snapshots(self):
        """What takes them."""
        return self.trainer._controller._snapshots

    def go(self, num_steps):
        """Runs so many steps; returns the seconds of those between others."""
        steps = self.trainer.step + num_steps
        found = [m.step_s for m in self.trainer.run(steps)]
        # Outside the clock, or it would disturb the other run.
        self.snapshots.wait()
        return [x for x in found if x is not None]

    def taken(self, name):
        """A field of every snapshot, but for those while programs were compiled."""
        events = [event for event in self.events if event.name == "snapshot"]
        return [event.fields[name] for event in events[3:]]


def spread(values, scale=1.0, digits=2):
    low, middle, high = (scale * x for x in statistics.quantiles(values, n=4))
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def measure(name, rounds, steps):
    import shardkit as sk
    from benchmarks.resize import Problem

    problem = Problem(name)
    runs = {"without": Run(problem, None), "with": Run(problem, sk.SnapshotConfig())}
    for run in runs.values():
        run.go(4)
    found = {kind: [] for kind in runs}
    for turn in range(rounds):
        for kind in list(runs)[:: 1 if turn % 2 else -1]:
            found[kind].append(statistics.median(runs[kind].go(steps)))
    digests = {run.trainer.state_digest() for run in runs.values()}
    assert len(digests) == 1, "snapshots changed bits"
    ratios = [a / b for a, b in zip(found["with"], found["without"], strict=True)]
    step_s = {kind: statistics.median(times) for kind, times in found.items()}
    run = runs["with"]
    placement, _ = run.trainer._controller.start()
    memory = run.snapshots.predict(placement.staging)
    stalls_s, copies_s = run.taken("stall_s"), run.taken("copy_s")
    cells = [
        name,
        placement.num_devices,
        *(f"{1e3 * step_s[kind]:.1f}" for kind in ("without", "with")),
        spread(ratios, digits=4),
        spread(stalls_s, 1e3),
        f"{100 * statistics.median(stalls_s) / step_s['without']:.2f} %",
        spread(copies_s, 1e3),
        f"{memory['image_bytes'] / 2**20:.1f}",
        f"{memory['device_bytes'] / 2**20:.1f}",
    ]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    for run in runs.values():
        run.trainer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="tiny", choices=("tiny", "gpt2_124m"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.config == "tiny":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("PJRT_NPROC", "8")
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    from benchmarks import common

    print(common.describe_machine())
    print(HEADER)
    measure(arguments.config, arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
