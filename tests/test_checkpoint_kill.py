"""`kill -9` at random instants loses nothing that was committed, and no bit."""

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from problems import consume

from shardkit.checkpoint.reader import open_checkpoint, saved_steps

WORKER = Path(__file__).parent / "workers" / "killed.py"
COUNTS = (8, 3, 1, 5, 4)
DEADLINE_S = 120
FAR = 1_000_000


class Killed:
    """A run in processes of which each is killed, and the twin that is left alone."""

    def __init__(self, directory, cache, twin, *, keep, seed):
        self.directory, self.cache = directory, cache
        self.twin, self.keep = twin, keep
        self.rng = random.Random(seed)
        self.table, self.num_committed = Counter(), 0

    def start(self, generation, steps):
        """Starts a process on another device count; it ends by itself in any case."""
        count = COUNTS[generation % len(COUNTS)]
        args = [self.directory, self.cache, count, self.keep, steps]
        process = subprocess.Popen(
            [sys.executable, WORKER, *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        timer = threading.Timer(DEADLINE_S, process.kill)
        timer.daemon = True
        timer.start()
        return process, timer

    def check(self, line, process):
        """Compares what a process prints with the twin at the same step."""
        assert line, process.communicate()[1]
        step, digest = json.loads(line)
        consume(self.twin, step)
        assert digest == self.twin.state_digest(), f"wrong bits at step {step}"
        return step

    def generation(self, number):
        """Lets a process run for a while, kills it, and looks at what is there."""
        before = saved_steps(self.directory)
        process, timer = self.start(number, FAR)
        if is_early := self.rng.random() < 0.15:
            time.sleep(self.rng.uniform(0, 4))
        else:
            step = self.check(process.stdout.readline(), process)
            assert step == max(before, default=0), "a committed step was lost"
            assert process.stdout.readline(), process.communicate()[1]
            time.sleep(self.rng.uniform(0, 0.5))
        listed = saved_steps(self.directory)
        process.kill()
        process.communicate()
        timer.cancel()
        assert process.returncode == -9
        left = saved_steps(self.directory)
        self.committed(listed, left)
        self.num_committed += len(set(listed) - set(before))
        self.table["early" if is_early else "while stepping"] += 1
        unfinished = [p for p in self.directory.glob("*tmp*") if p.is_dir()]
        self.table["while saving"] += bool(unfinished)
        self.table["while deleting"] += len(left) > self.keep

    def committed(self, listed, left):
        """Checks that what is to be kept is there, and whole."""
        kept = sorted({*listed, *left})[-self.keep :]
        assert set(kept) <= set(left), f"of {listed} and newer ones, {left} are left"
        for step in kept:
            saved = open_checkpoint(self.directory, step)
            assert saved.check_files() == []

    def run(self, num_kills):
        for number in range(num_kills):
            self.generation(number)
        steps = max(saved_steps(self.directory), default=0) + 3
        process, timer = self.start(num_kills, steps)
        first, _, last = (process.stdout.readline() for _ in range(3))
        self.check(first, process)
        assert self.check(last, process) == steps
        assert process.wait(DEADLINE_S) == 0
        process.communicate()
        timer.cancel()
        # What was not complete, or no longer kept, is gone.
        assert saved_steps(self.directory) == [*range(steps + 1)][-self.keep :]
        left = sorted(path.name for path in self.directory.iterdir())
        assert left == sorted(map(str, saved_steps(self.directory)))
        return steps


def test_three_kills_lose_nothing(make, tmp_path, compile_cache):
    twin, _ = make()
    run = Killed(tmp_path, compile_cache, twin, keep=1, seed=1)
    assert run.run(3) > 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("keep", [1, 2])
def test_kills_at_random_instants_lose_nothing(make, tmp_path, compile_cache, keep):
    twin, _ = make()
    run = Killed(tmp_path, compile_cache, twin, keep=keep, seed=keep)
    steps = run.run(50)
    print(
        f"\nkeep={keep}: 50 kills {dict(run.table)}, "
        f"{run.num_committed} committed steps seen, 0 lost, final step {steps} equal"
    )
    assert run.table["while saving"]
