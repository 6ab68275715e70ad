"""Useful steps over those that were possible, while faults happen at random.

    python benchmarks/goodput.py [--every 10,30] [--faults 100] [--seed 0]
        [--config configs/digits.toml] [--processes 4] [--redundancy parity:2]
        [--kinds kill,freeze,host,slow,corrupt,supervisor]

First a launched run that nobody hurts, for the time of a step; then, for every mean
time between failures, a run that `shardkit chaos` hurts, with so many steps that all
faults fall into it. Goodput is counted from the first fault's clock to the last fault:
steps that were done, times the time of a step, over the time that went by. Then one
process without a supervisor does the same steps: its digest must be that of each run.
Ends with 1 if a digest differs, or if a run lost more than the step in flight.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.processes import FailedError, versions  # noqa: E402
from shardkit.cluster.asking import Asker, find_address  # noqa: E402
from shardkit.cluster.wire import WireError  # noqa: E402
from shardkit.errors import ShardkitError  # noqa: E402

KINDS = "kill,freeze,host,slow,corrupt,supervisor"
# Short windows, so that what is frozen is missed soon.
DEADLINES = "step_floor_s=6,silence_s=3,end_s=5,snapshot_s=20,slot_s=25,mute_s=8"
STUCK_S = 300.0


class Launched:
    """A run under a supervisor, in a directory of its own."""

    def __init__(self, directory, arguments, steps):
        self.cluster, self.out = directory / "cluster", directory / "run"
        self.log = (directory / "log").open("w+")
        self._asker = None
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "shardkit", "launch", "--out-dir"),
                *(str(self.cluster), "--processes", str(arguments.processes)),
                *("--redundancy", arguments.redundancy, "--deadlines", DEADLINES),
                *("--", *program(arguments, steps, self.out)),
            ],
            cwd=ROOT,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def status(self):
        """The newest status; None while nobody answers."""
        try:
            self._asker = self._asker or Asker(find_address(self.cluster))
            return self._asker.ask(5.0)
        except (ShardkitError, WireError):
            self._asker = None
            return None

    def until(self, is_so):
        """Waits for a status; fails if the run makes no step for long."""
        best, moved_s = -1, time.monotonic()
        while self.process.poll() is None:
            status = self.status()
            if status is not None and is_so(status):
                return status
            step = -1 if status is None else status.step or 0
            if step > best:
                best, moved_s = step, time.monotonic()
            if time.monotonic() - moved_s > STUCK_S:
                raise FailedError(f"no step after {best} in {STUCK_S:g} s\n{self.end}")
            time.sleep(0.2)
        return None

    @property
    def end(self):
        """The last that was said."""
        self.log.seek(0)
        return self.log.read()[-4000:]

    def close(self):
        """Ends the run, if it has not ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()


def program(arguments, steps, out):
    """The training itself."""
    num = str(arguments.processes)
    return [
        *(sys.executable, "train.py", arguments.config, "--devices", num),
        *("--resize", f"0:{num}", "--steps", str(steps), "--mesh.data", "1"),
        *("--mesh.fsdp", "-1", "--train.eval_every", "0", "--train.eval_batches", "0"),
        *("--checkpoint.every", "500", "--out", str(out)),
    ]


def digest(out):
    """What the state came to."""
    return json.loads((out / "summary.json").read_text())["state_digest"]


def unhurt_step_s(arguments):
    """The time of a step when nothing happens."""
    with tempfile.TemporaryDirectory() as directory:
        run = Launched(Path(directory), arguments, 10**6)
        try:
            first = run.until(lambda s: (s.step or 0) >= arguments.warm)
            start_s = time.monotonic()
            time.sleep(arguments.warm_s)
            last = run.until(lambda s: s.step is not None)
            if first is None or last is None:
                raise FailedError(run.end)
            return (time.monotonic() - start_s) / (last.step - first.step)
        finally:
            run.close()


def hurt(arguments, every_s, steps):
    """One run among faults: its digest, and what it came to."""
    with tempfile.TemporaryDirectory() as directory:
        run = Launched(Path(directory), arguments, steps)
        try:
            first = run.until(lambda s: (s.step or 0) >= arguments.warm)
            if first is None:
                raise FailedError(run.end)
            start_s = time.monotonic()
            chaos = subprocess.Popen(
                [
                    *(sys.executable, "-m", "shardkit", "chaos", str(run.cluster)),
                    *("--faults", str(arguments.faults), "--every", str(every_s)),
                    *("--seed", str(arguments.seed), "--kinds", arguments.kinds),
                    "--json",
                ],
                cwd=ROOT,
                stdout=subprocess.PIPE,
            )
            try:
                newest = run.until(lambda _: chaos.poll() is not None)
                spent_s = time.monotonic() - start_s
            finally:
                chaos.terminate()
            if newest is None:
                raise FailedError(f"it ended before the last fault\n{run.end}")
            faults = json.loads(chaos.communicate()[0])["faults"]
            last, at_last = newest, newest.step or 0
            while newest is not None:
                last = newest
                newest = run.until(lambda s, at=newest.step or 0: (s.step or 0) > at)
            if run.process.wait(60):
                raise FailedError(run.end)
            return digest(run.out), faults, spent_s, first.step, at_last, last
        finally:
            run.close()


def report(arguments, every_s, step_s, found):
    """A line of the table."""
    _, faults, spent_s, first, at_last, last = found
    done = sum("nobody" not in fault["whom"] for fault in faults)
    times = sorted(r.total_s for r in last.recoveries if r.total_s is not None)
    middle = times[len(times) // 2] if times else 0.0
    lost = [r.lost_steps or 0 for r in last.recoveries]
    print(
        f"| {every_s:g} | {done} | {len(last.recoveries)} | {middle:.2f} | "
        f"{max(times, default=0.0):.2f} | {sum(lost)} | {max(lost, default=0)} | "
        f"{(at_last - first) * step_s / spent_s:.3f} | {arguments.seed} |",
        flush=True,
    )


def main():
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", default="10,30", help="seconds between faults")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="configs/digits.toml")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--redundancy", default="parity:2")
    parser.add_argument("--kinds", default=KINDS)
    parser.add_argument("--warm", type=int, default=50, help="steps before faults")
    parser.add_argument("--warm-s", type=float, default=20, help="to measure a step")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), *sys.path]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{versions(sys.executable, 'jax')}; {arguments.processes} processes, "
        f"{arguments.config}, {arguments.redundancy}, {arguments.kinds}"
    )
    step_s = unhurt_step_s(arguments)
    print(f"A step when nothing happens: {1e3 * step_s:.1f} ms\n")
    print(
        "| mean s between | faults | recoveries | median s | longest s | steps lost "
        "| at once | goodput | seed |\n|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    is_bad = False
    for every_s in map(float, arguments.every.split(",")):
        # The last fault may be three deviations late.
        slack = 1.2 + 3 / arguments.faults**0.5
        steps = arguments.warm + int(slack * arguments.faults * every_s / step_s)
        found = hurt(arguments, every_s, steps)
        report(arguments, every_s, step_s, found)
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "alone"
            alone = program(arguments, steps, out)
            subprocess.run(alone, cwd=ROOT, check=True, capture_output=True)
            wanted = digest(out)
        if found[0] != wanted:
            print(f"digest: expected {wanted}, found {found[0]}")
            is_bad = True
    sys.exit(is_bad)


if __name__ == "__main__":
    main()
