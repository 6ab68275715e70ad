"""From `kill -9` of one of four processes to the next step, beside other ways.

    python benchmarks/recovery.py [--rounds 5] [--only ours,orbax,torchft]
        [--torch-python PATH]

All train a model of the size of `configs/tiny.toml` on this machine, in turn, and lose
process 2 at a random moment. Ours is `shardkit launch`, whose standbys have prepared;
`orbax` and `torchft` are described in recovery_rivals.py. Only ours goes on with the
same bits, and only ours and `orbax` with all four processes; torchft goes on with
three, which compute less, and the fourth comes back later.
"""

import argparse
import functools
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import recovery_rivals as rivals  # noqa: E402
from benchmarks.processes import DEADLINE_S, FailedError, table, versions  # noqa: E402
from shardkit.cluster.asking import Asker, find_address  # noqa: E402
from shardkit.cluster.wire import WireError  # noqa: E402
from shardkit.errors import ShardkitError  # noqa: E402

SETTLED = 12


def ours(rng, redundancy, config, num_processes, num_devices):
    """One round; seconds of each phase."""
    with tempfile.TemporaryDirectory() as directory:
        cluster = Path(directory) / "cluster"
        launcher = subprocess.Popen(
            [
                *(sys.executable, "-m", "shardkit", "launch", "--processes"),
                *(str(num_processes), "--out-dir", str(cluster)),
                *("--redundancy", redundancy, "--"),
                *(sys.executable, "train.py", config, "--resize", f"0:{num_devices}"),
                *("--devices", str(num_devices), "--steps", "100000"),
                *("--train.eval_batches", "0", "--checkpoint.every", "100000"),
                *("--out", f"{directory}/run"),
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            return measured(launcher, cluster, rng)
        finally:
            launcher.send_signal(signal.SIGINT)
            try:
                launcher.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                launcher.kill()


def measured(launcher, cluster, rng):
    """Waits until all is ready, ends one process, and waits until it is made good."""
    on_accelerators = os.environ.get("JAX_PLATFORMS") != "cpu"
    wanted = 1 if on_accelerators else 2
    status = wait_until(
        launcher,
        cluster,
        lambda s: (s.step or 0) >= SETTLED and enough(s, wanted),
    )
    time.sleep(rng.random() * (status.step_s or 1.0))
    status = wait_until(launcher, cluster, lambda s: True)
    workers = [worker for host in status.hosts for worker in host.workers]
    killed_s = time.time()
    os.kill(workers[-1].pid, signal.SIGKILL)
    status = wait_until(
        launcher,
        cluster,
        lambda s: s.recoveries and s.recoveries[-1].phases[-1].name == "first_step",
    )
    recovery = status.recoveries[-1]
    phases = {phase.name: phase.s for phase in recovery.phases}
    phases["next step"] = recovery.started_s - killed_s + recovery.total_s
    later = wait_until(launcher, cluster, lambda s: (s.step or 0) >= status.step + 4)
    return phases | {"ordinary step": later.step_s, "lost steps": recovery.lost_steps}


def enough(status, wanted):
    return all((host.standbys or 0) >= wanted for host in status.hosts)


def wait_until(launcher, cluster, is_so):
    """Asks for the status until it is as wanted."""
    end_s = time.monotonic() + DEADLINE_S
    asker = None
    while time.monotonic() < end_s:
        if launcher.poll() is not None:
            raise FailedError(launcher.stdout.read().decode()[-3000:])
        try:
            asker = asker or Asker(find_address(cluster))
            status = asker.ask(10.0)
            if is_so(status):
                return status
        except (ShardkitError, WireError):
            asker = None
        time.sleep(0.02)
    raise FailedError(f"it was not so for {DEADLINE_S} s")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="ours,orbax,torchft")
    parser.add_argument("--redundancy", default="none")
    parser.add_argument("--config", default="configs/tiny.toml")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--torch-python", help="a Python that has torch and torchft")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = arguments.only.split(",")
    rng = random.Random(arguments.seed)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{versions(sys.executable, 'jax', 'orbax-checkpoint')}"
    )
    torchft = argparse.Namespace(
        torch_python=arguments.torch_python, async_quorum=False
    )
    with tempfile.TemporaryDirectory() as programs:
        ways = {
            "ours": functools.partial(
                ours,
                rng,
                arguments.redundancy,
                arguments.config,
                arguments.processes,
                arguments.devices,
            ),
            "orbax": functools.partial(
                rivals.restart_from_orbax, ["--every", "1"], programs, rng
            ),
            "torchft": functools.partial(
                rivals.replace_in_torchft, torchft, 500, 500, rng
            ),
        }
        found = {name: [] for name in names}
        failures = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                try:
                    found[name].append(ways[name]())
                except FailedError as error:
                    failures[name].append(str(error))
    for name in names:
        table(name, found[name], failures[name])


if __name__ == "__main__":
    main()
