"""Checkpoints of one and of two devices beside torch.distributed.checkpoint.

    python benchmarks/checkpoint_dcp.py --torch-python PATH [--gib 0.5] [--rounds 5]

The rival runs in another Python, which has torch, as one process per device on the
CPU, joined by gloo: float32 state in DTensors cut along dim 0, as FSDP2 cuts it, saved
by `dcp.save` and loaded in place by `dcp.load` onto as many processes as are wanted.
Ours is one process of as many emulated devices, which saves by `Checkpoints.save` and
`wait`, and restores with every block verified; the other verifies nothing. The leaves
and their bytes are the same. Both run anew in every round, in turn; times are taken
inside, from when every process is there until all are done, without starting up.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Nothing but torch is there where the rival runs.
CHANGES = ((2, 1), (1, 2))
NUM_REPEATS = 3
GROUP = [(4096, 4096), *[(1024, 4096)] * 3, *[(512, 512)] * 15, *[(16384,)] * 16]


def shapes_of(num_bytes):
    size = sum(4 * shape[0] * (*shape, 1)[1] for shape in GROUP)
    return GROUP * max(1, round(num_bytes / size))


def dcp_process(phase, directory, shapes):
    """One of the rival's processes: saves, or loads several times."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    state = {
        f"x{i}": distribute_tensor(
            torch.randn(shape, generator=generator), mesh, [Shard(0)]
        )
        for i, shape in enumerate(shapes)
    }
    sums = [float(x.to_local().double().abs().sum()) for x in state.values()]
    times = []
    for turn in range(1 if phase == "save" else NUM_REPEATS):
        if phase == "load":
            for x in state.values():
                x.to_local().zero_()
        dist.barrier()
        start_s = time.perf_counter()
        if phase == "save":
            dcp.save(state, checkpoint_id=directory)
        else:
            dcp.load(state, checkpoint_id=directory)
        dist.barrier()
        times.append(time.perf_counter() - start_s)
        assert turn or sums == [
            float(x.to_local().double().abs().sum()) for x in state.values()
        ]
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(times), flush=True)
    dist.destroy_process_group()


def our_process(phase, directory, shapes, count):
    """Saves, or restores several times, on some devices."""
    sys.path.insert(0, str(ROOT))
    import jax

    jax.config.update("jax_num_cpu_devices", count)
    import numpy as np

    from benchmarks import checkpoint_ways as ways

    leaves = {f"x{i}": (shape, 0) for i, shape in enumerate(shapes)}
    way = ways.Ours(directory, leaves)
    times = []
    if phase == "save":
        rng = np.random.default_rng(0)
        placement = ways.on(count, leaves)
        state = {
            path: jax.device_put(
                rng.standard_normal(leaf.shape, np.float32),
                leaf.sharding(placement.mesh),
            )
            for path, leaf in placement.layout.items()
        }
        start_s = time.perf_counter()
        way.save(jax.block_until_ready(state))
        way.wait()
        times.append(time.perf_counter() - start_s)
    for _ in range(NUM_REPEATS if phase == "load" else 0):
        start_s = time.perf_counter()
        state = jax.block_until_ready(way.restore(count))
        times.append(time.perf_counter() - start_s)
        del state
    way.close()
    print("RESULT " + json.dumps(times), flush=True)


def start(command, count, *, is_torch):
    """Runs one phase; returns its seconds."""
    port = 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count if is_torch else 1):
        more = {"OMP_NUM_THREADS": "1"} if is_torch else {"JAX_PLATFORMS": "cpu"}
        more |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        more |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                command,
                env=os.environ | more,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outs = [process.communicate(timeout=600) for process in processes]
    lines = [x for x in outs[0][0].splitlines() if x.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"a child process failed: {outs[0][1][-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def measure(change, arguments):
    """Every round saves and loads by each in turn; seconds by phase and way."""
    found = {}
    pythons = {"shardkit": sys.executable, "dcp": arguments.torch_python}
    for _ in range(arguments.rounds):
        for way, python in pythons.items():
            with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
                for phase, count in zip(("save", "load"), change, strict=True):
                    command = [python, __file__, "--gib", str(arguments.gib)]
                    command += ["--child", way, phase, directory, str(count)]
                    times = start(command, count, is_torch=way == "dcp")
                    rows = {"save until committed": times[0]}
                    if phase == "load":
                        rows = {
                            "load, the first": times[0],
                            "load, again": statistics.median(times[1:]),
                        }
                    for name, spent_s in rows.items():
                        found.setdefault(name, {}).setdefault(way, []).append(spent_s)
    return found


def report(arguments):
    num_bytes = sum(4 * s[0] * (*s, 1)[1] for s in shapes_of(arguments.gib * 2**30))
    print(
        "| devices | | | ms, median [quartiles] | GB/s | / dcp, median [quartiles] |\n"
        + "|---" * 6
        + "|"
    )
    for change in CHANGES:
        for name, ways in measure(change, arguments).items():
            for way, times in ways.items():
                low, middle, high = statistics.quantiles(times, n=4)
                pairs = zip(times, ways["dcp"], strict=True)
                a, b, c = statistics.quantiles([x / y for x, y in pairs], n=4)
                print(
                    f"| {change[0]} to {change[1]} | {name} | {way} | "
                    f"{1e3 * middle:.0f} [{1e3 * low:.0f}, {1e3 * high:.0f}] | "
                    f"{num_bytes / middle / 1e9:.2f} | "
                    + ("" if way == "dcp" else f"{b:.2f} [{a:.2f}, {c:.2f}]")
                    + " |",
                    flush=True,
                )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-python", help="a Python that has torch")
    parser.add_argument("--gib", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where to save; a temporary one by default")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, phase, directory, count = arguments.child
        shapes = shapes_of(arguments.gib * 2**30)
        if way == "dcp":
            dcp_process(phase, directory, shapes)
        else:
            our_process(phase, directory, shapes, int(count))
        return
    if not arguments.torch_python:
        raise SystemExit("--torch-python: expected a Python that has torch")
    out = subprocess.run(
        [arguments.torch_python, "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    sys.path.insert(0, str(ROOT))
    import jax

    jax.config.update("jax_platforms", "cpu")
    from benchmarks import common

    version, cores = out.stdout.strip(), os.cpu_count()
    print(f"{common.describe_machine()}, torch {version}, {cores} cores")
    report(arguments)


if __name__ == "__main__":
    main()
