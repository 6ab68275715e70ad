"""Checkpoints beside plain Orbax: saving, restoring onto other meshes, memory.

    python benchmarks/checkpoint.py [--gib 1] [--rounds 7] [--leaves large|many]
        [--only ours,orbax,raw] [--children 3] [--directory PATH]

Float32 state with the bits of normal numbers, cut along one dim, on 8 emulated devices;
with JAX_PLATFORMS=cuda, on all GPUs (and --targets that there are so many of).
Orbax is its CheckpointManager with all defaults, asynchronous and compressing; and,
as a second rival, without compression, which is how shardkit stores. Every round makes
a new state, saves it by each in turn in a new directory, and restores it by each. The
files are in the page cache. Ours records and verifies digests of all blocks on the
way; Orbax verifies nothing. Memory is that of a new process, which restores once: the
most it ever held, less what it held before, less what it was asked for.
"""

import argparse
import collections
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.checkpoint_ways import (  # noqa: E402
    Orbax,
    Ours,
    RawOrbax,
    Training,
    nested,
    num_devices,
    on,
    shapes_of,
    size_of,
)

TARGETS = (8, 4, 3)
EMULATED_DEVICES = 8
PROMISE_MIB = 512
STEPS = 5
WAYS = {"ours": Ours, "orbax": Orbax, "raw": RawOrbax}
NAMES = {"ours": "shardkit", "orbax": "Orbax", "raw": "Orbax, no compression"}


def clock(function, *arguments):
    """Seconds, and what was returned, when it is there."""
    import jax

    gc.collect()
    start_s = time.perf_counter()
    found = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start_s, found


def disk_bytes(directory):
    return sum(
        path.stat().st_size for path in Path(directory).rglob("*") if path.is_file()
    )


def check(name, state, wanted, leaves):
    """Compares some leaves of what was restored."""
    import numpy as np

    flat = nested(state) if isinstance(state, dict) and name == "ours" else state
    for path in list(leaves)[:: max(1, len(leaves) // 8)]:
        found = flat
        for part in path.split("/"):
            found = found[part]
        box = tuple(slice(0, n) for n in leaves[path][0])
        same = np.asarray(found)[box].tobytes() == np.asarray(wanted[path]).tobytes()
        assert same, (name, path)


def one_round(ways, training, leaves, found, *, where, seed, checked, targets):
    """Saves and restores by each way in turn; adds the seconds to `found`."""
    import jax

    directories, open_ways = {}, {}
    for name in ways:
        training.start(seed)
        directories[name] = tempfile.TemporaryDirectory(dir=where)
        wanted = None
        way = open_ways[name] = WAYS[name](directories[name].name, leaves)
        ordinary_s = statistics.median(training.timed_step() for _ in range(STEPS))
        if checked:
            wanted = jax.block_until_ready(
                jax.tree.map(lambda x: x.copy(), training.state)
            )
        gc.collect()
        start_s = time.perf_counter()
        way.save(training.state)
        call_s = time.perf_counter() - start_s
        step_s = training.timed_step()
        way.wait()
        row = found[name]
        row["save, the call"].append(call_s)
        row["save, all that a step waits"].append(call_s + step_s - ordinary_s)
        row["save until committed"].append(time.perf_counter() - start_s)
        row["bytes"] = [disk_bytes(directories[name].name)]
        training.state = None
        if checked:
            check(name, way.restore(num_devices()), wanted, leaves)
            wanted = None
    for count in targets:
        for name, way in open_ways.items():
            spent_s, state = clock(way.restore, count)
            del state
            found[name][restore_from(count)].append(spent_s)
    if "ours" in open_ways:
        for name in ("verify", "remap") if "state/layers/up_0" in leaves else ():
            spent_s, state = clock(getattr(open_ways["ours"], name))
            del state
            found["ours"][name].append(spent_s)
    for name, way in open_ways.items():
        way.close()
        directories[name].cleanup()


def restore_from(count):
    return f"restore {num_devices()} to {count}"


def quartiles(values):
    return statistics.quantiles(values if values[1:] else values * 2, n=4)


def print_times(found, num_bytes, num_leaves):
    print("\n| | | ms, median [quartiles] | GB/s | / Orbax | / no compression |")
    print("|---" * 6 + "|")
    cases = dict.fromkeys(case for row in found.values() for case in row)
    for case in cases:
        if case in ("bytes", "verify", "remap"):
            continue
        for name, row in found.items():
            low, middle, high = quartiles([1e3 * t for t in row[case]])
            cells = [case, NAMES[name], f"{middle:.1f} [{low:.1f}, {high:.1f}]"]
            cells.append(f"{num_bytes / middle / 1e6:.2f}")
            for rival in ("orbax", "raw"):
                is_rival = name != "ours" or rival not in found
                cells.append("" if is_rival else ratio(row[case], found[rival][case]))
            print(f"| {' | '.join(cells)} |", flush=True)
    sizes = {NAMES[name]: row["bytes"][0] for name, row in found.items()}
    cells = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items())
    print(f"\nMiB on disk, of {num_bytes / 2**20:.1f} in {num_leaves} leaves: {cells}")
    mine = found.get("ours", {})
    if "remap" in mine:
        low, middle, high = quartiles([1e3 * t for t in mine["remap"]])
        plain = restore_from(num_devices())
        speed = ratio(mine[plain], mine["remap"])
        print(
            f"Remapped (files verified, transposed, unstacked): {middle:.1f} ms "
            f"[{low:.1f}, {high:.1f}]; speed / shardkit's {plain}: {speed}"
        )
        low, middle, high = quartiles([1e3 * t for t in mine["verify"]])
        size = mine["bytes"][0]
        print(
            f"All files verified: {middle:.1f} ms [{low:.1f}, {high:.1f}], "
            f"{size / middle / 1e6:.2f} GB/s"
        )


def print_first(found):
    """What the first of everything takes in a process, programs being made."""
    for name, row in found.items():
        cells = [
            f"{case} {1e3 * row[case][0]:.0f}"
            for case in row
            if case not in ("bytes", "verify", "remap")
        ]
        print(f"The first time, {NAMES[name]}, ms: {', '.join(cells)}", flush=True)


def ratio(times, others):
    """The median of the ratios of each round, with its quartiles."""
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    low, middle, high = quartiles(ratios)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def memory_bytes(name):
    text = Path("/proc/self/status").read_text()
    (line,) = [x for x in text.splitlines() if x.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def child(name, directory, count, leaves):
    """Restores once, and prints what it took."""
    way = WAYS[name](directory, leaves)
    placement = on(count, leaves)
    wanted = sum(leaf.piece_bytes(count) * count for leaf in placement.layout.values())
    gc.collect()
    before = memory_bytes("VmRSS")
    # Forgets the peak of starting up.
    Path("/proc/self/clear_refs").write_text("5")
    spent_s, state = clock(way.remap) if count == 0 else clock(way.restore, count)
    peak = memory_bytes("VmHWM") - before
    del state
    print("RESULT " + json.dumps([spent_s, peak, wanted]), flush=True)


def in_children(ways, training, leaves, arguments):
    """Prints time and peak memory of new processes that restore."""
    print(
        "\n| a new process | | s, median [quartiles] | target, MiB | peak, MiB, most "
        f"of all | beside the target (promise: {PROMISE_MIB}) |\n" + "|---" * 6 + "|"
    )
    directories = {}
    for name in ways:
        training.start(0)
        directory = tempfile.TemporaryDirectory(dir=arguments.directory)
        directories[name] = directory
        way = WAYS[name](directory.name, leaves)
        way.save(training.state)
        way.wait()
        way.close()
    training.state = None
    gc.collect()
    for count in arguments.targets:
        results = {name: [] for name in ways}
        for _ in range(arguments.children):
            for name in ways:
                command = [sys.executable, __file__, "--gib", str(arguments.gib)]
                command += ["--leaves", arguments.leaves, "--child", name]
                command += [directories[name].name, str(count)]
                out = subprocess.run(command, capture_output=True, text=True)
                lines = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
                if not lines:
                    raise SystemExit(f"a child process failed: {out.stderr[-3000:]}")
                results[name].append(json.loads(lines[0].removeprefix("RESULT ")))
        for name, rows in results.items():
            low, middle, high = quartiles([row[0] for row in rows])
            peak, wanted = max(row[1] for row in rows), rows[0][2]
            print(
                f"| {restore_from(count)} | {NAMES[name]} | {middle:.2f} [{low:.2f}, "
                f"{high:.2f}] | {wanted / 2**20:.0f} | {peak / 2**20:.0f} | "
                f"{(peak - wanted) / 2**20:.0f} |",
                flush=True,
            )
    for directory in directories.values():
        directory.cleanup()


def cannot_cut(leaves, where):
    """What Orbax says to a mesh that does not divide, without padding by hand."""
    import jax
    import orbax.checkpoint as ocp

    path, (shape, dim) = next(iter(leaves.items()))
    leaf = on(3, {path: (shape, dim)})
    x = jax.numpy.zeros(shape)
    like = jax.ShapeDtypeStruct(
        shape, x.dtype, sharding=leaf.layout[path].sharding(leaf.mesh)
    )
    with tempfile.TemporaryDirectory(dir=where) as directory:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(directory) / "x", {"x": x})
            checkpointer.wait_until_finished()
            try:
                checkpointer.restore(Path(directory) / "x", {"x": like})
            except Exception as error:
                return f"{type(error).__name__}: {str(error).splitlines()[0]:.160}"
    return "nothing: it restored"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--children", type=int, default=3)
    parser.add_argument("--leaves", choices=["large", "many"], default="large")
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)))
    parser.add_argument("--directory", help="where to save; a temporary one by default")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.targets = [int(count) for count in arguments.targets.split(",")]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_num_cpu_devices", EMULATED_DEVICES)
    leaves = shapes_of(arguments.leaves, int(arguments.gib * 2**30))
    if arguments.child:
        name, directory, count = arguments.child
        child(name, directory, int(count), leaves)
        return
    import orbax.checkpoint as ocp

    from benchmarks import common

    print(
        f"{common.describe_machine()}, Orbax {ocp.__version__}, {os.cpu_count()} cores"
    )
    ways = arguments.only.split(",")
    training = Training(leaves)
    found = {name: collections.defaultdict(list) for name in ways}
    for turn in range(arguments.rounds + 1):
        order = ways[turn % len(ways) :] + ways[: turn % len(ways)]
        times = (
            {name: collections.defaultdict(list) for name in ways}
            if turn == 0
            else found
        )
        one_round(
            order,
            training,
            leaves,
            times,
            where=arguments.directory,
            seed=turn,
            checked=turn == 0,
            targets=arguments.targets,
        )
        if turn == 0:
            print_first(times)
    if arguments.rounds:
        print_times(found, size_of(leaves), len(leaves))
    if 3 in arguments.targets:
        print(
            f"Orbax, 8 to 3 without padding: {cannot_cut(leaves, arguments.directory)}"
        )
    if arguments.children:
        in_children(ways, training, leaves, arguments)


if __name__ == "__main__":
    main()
