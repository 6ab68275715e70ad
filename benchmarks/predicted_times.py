"""How well predicted step times agree with measured ones.

    python benchmarks/predicted_times.py [--limit-s 1200] [--out found.json]
    python benchmarks/predicted_times.py --devices 2          # on two GPUs

Calibrates a profile first, then times the steps of models on every mesh that the
planner compares for the devices there are. The meshes of a workload are timed in turn,
in every round, and their times divided by the median of the round; workloads are
compared by a step that is the same for all, timed beside them: a machine that becomes
slower in between disturbs no order. Prints the rank
correlation of predicted and measured times, and how far the mesh that is predicted to
be best is from the one that was measured to be.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

# Name → options of models.mlp or models.gpt.
MODELS = {
    "mlp 256": {"hidden_dim": 256},
    "mlp 512": {"hidden_dim": 512},
    "mlp 1536": {"hidden_dim": 1536},
    "gpt 64": {"num_layers": 2, "embed_dim": 64, "num_heads": 2, "mlp_dim": 192},
    "gpt 128": {"num_layers": 4, "embed_dim": 128, "num_heads": 4, "mlp_dim": 384},
    "gpt 256": {"num_layers": 2, "embed_dim": 256, "num_heads": 4, "mlp_dim": 1024},
    "gpt 30M": {"num_layers": 6, "embed_dim": 512, "num_heads": 8, "mlp_dim": 2048},
    "gpt 124M": {"num_layers": 12, "embed_dim": 768, "num_heads": 12, "mlp_dim": 3072},
    "gpt 600M": {
        **{"num_layers": 12, "embed_dim": 2048, "num_heads": 16, "mlp_dim": 5632}
    },
}
# Model, length of a row, microbatches, rows of each, and what is not the default.
CPU_WORK = [
    ("mlp 512", 0, 8, 16, ()),
    ("mlp 1536", 0, 8, 16, ()),
    ("gpt 128", 128, 24, 1, ()),
    ("gpt 64", 64, 8, 4, ("remat",)),
    ("mlp 256", 0, 24, 256, ()),
    ("gpt 64", 64, 24, 1, ()),
    ("mlp 512", 0, 16, 128, ("fast",)),
    ("gpt 256", 32, 8, 2, ()),
]
GPU_WORK = [
    ("gpt 124M", 1024, 8, 8, ("bfloat16",)),
    ("gpt 30M", 1024, 8, 8, ("bfloat16",)),
    ("gpt 600M", 1024, 4, 4, ("bfloat16", "remat")),
    ("gpt 124M", 1024, 8, 8, ("bfloat16", "remat")),
    ("gpt 124M", 512, 4, 2, ("bfloat16",)),
    ("gpt 600M", 1024, 4, 4, ("bfloat16", "remat", "fast")),
    ("gpt 124M", 1024, 8, 8, ("bfloat16", "fast")),
    ("gpt 30M", 512, 32, 8, ("bfloat16", "fast")),
    ("gpt 124M", 1024, 4, 4, ()),
]
GPU_VOCABULARY = 32_000
LIMIT_S = {"cpu": 1200.0, "gpu": 270.0}
HEADER = ("workload", "meshes", "Spearman", "Kendall", "pairs apart", "in order")
HEADER += ("chosen", "measured best", "chosen / best")


def make_model(name, length, how, vocab_size):
    from models import gpt, mlp

    options = MODELS[name]
    if name.startswith("mlp"):
        return mlp.build(dropout=0.0, **options)
    return gpt.build(
        vocab_size=vocab_size,
        max_sequence_length=length,
        scan_layers=True,
        remat="remat" in how,
        compute_dtype="bfloat16" if "bfloat16" in how else "float32",
        **options,
    )


def make_batch(name, length, rows, vocab_size):
    import numpy as np

    from benchmarks import common

    if not name.startswith("mlp"):
        return common.random_tokens(rows, length, vocab_size)
    image = np.random.default_rng(0).random((rows, 64), np.float32)
    return {"image": image, "label": np.zeros(rows, np.int32)}


def all_meshes(job, topology):
    """Every mesh that a search would compare, over all axes that are not fixed."""
    from shardkit.mesh import GROUP_AXES, MESH_AXES
    from shardkit.planner.candidates import inner_sizes, outer_meshes
    from shardkit.planner.quotas import Quotas

    [(_, num, facts)] = job.blocks()
    cut = [n for leaf in facts.params for n in leaf.shape if "fsdp" in leaf.cuts]
    found = []
    for row in inner_sizes(facts.divisors, topology.num_devices, job.fixed):
        groups = Quotas(topology, math.prod(row[axis] for axis in GROUP_AXES))
        meshes = outer_meshes(row, groups, num, max(cut, default=1), job.fixed)
        found += [
            {axis: int(meshes.sizes[axis][i]) for axis in MESH_AXES}
            for i in range(len(meshes))
        ]
    return found


class Workload:
    """One model and batch, on all meshes."""

    def __init__(self, work, on_cpu, num):
        import jax
        import optax

        from shardkit.mesh import GROUP_AXES
        from shardkit.planner.meshes import Topology
        from shardkit.planner.reading import read_model
        from shardkit.planner.search import Job

        name, length, count, rows, how = work
        size = f"{length}-token rows" if length else "rows"
        self.name = ", ".join([f"{name}: {count} × {rows} {size}", *how])
        self.exact, self.count, self.tx = "fast" not in how, count, optax.adamw(1e-3)
        vocab_size = 256 if on_cpu else GPU_VOCABULARY
        self.model = make_model(name, length, how, vocab_size)
        self.batch = make_batch(name, length, rows * count, vocab_size)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), self.batch
        )
        self.facts = read_model(self.model, like, self.tx)
        job = Job(
            facts={"as configured": self.facts},
            global_batch_size=rows * count,
            num_microbatches=[count],
            exact=self.exact,
            # Switch on what the step can do by naming fewer axes here.
            fixed=dict.fromkeys(GROUP_AXES, 1),
        )
        self.topology = Topology(num, num)
        self.meshes = all_meshes(job, self.topology)

    def predict(self, sizes, profile):
        """What a step takes, by parts."""
        import numpy as np

        from shardkit.planner.cost import predict
        from shardkit.planner.meshes import Meshes

        meshes = Meshes.of(sizes, self.count)
        costs = predict(self.facts, meshes, profile, self.topology, exact=self.exact)
        return {name: float(np.sum(part)) for name, part in costs.time_s.items()}

    def step(self, sizes):
        """The step itself, compiled and warm."""
        from shardkit.planner.timed_step import TimedStep

        return TimedStep(
            self.model, self.tx, self.batch, self.count, sizes, exact=self.exact
        )


def measure(workload, anchor, rounds):
    """Seconds of a step on every mesh in every round, and of the anchor beside them."""
    steps = [workload.step(sizes) for sizes in workload.meshes]
    times, beside = [[] for _ in steps], []
    for number in range(rounds):
        beside.append(anchor.clock(3))
        # In another order every time, as what ran before leaves its caches.
        order = list(range(len(steps)))
        for i in order[:: -1 if number % 2 else 1]:
            times[i].append(steps[i].clock())
        beside[-1] = (beside[-1] + anchor.clock(3)) / 2
    return times, beside


def interval(values, seed=0):
    """The 95 % interval of a median, by resampling."""
    import numpy as np

    some = np.random.default_rng(seed).choice(values, (1000, len(values)))
    return np.quantile(np.median(some, axis=1), [0.025, 0.975]).tolist()


def agreement(rows):
    """Rank correlations over all rows, and over pairs whose intervals do not meet."""
    from scipy.stats import kendalltau, spearmanr

    measured = [row["measured_s"] for row in rows]
    predicted = [row["predicted_s"] for row in rows]
    right = wrong = 0
    for a, b in itertools.combinations(rows, 2):
        low, high = sorted((a, b), key=lambda row: row["measured_s"])
        if low["interval_s"][1] < high["interval_s"][0]:
            is_right = low["predicted_s"] < high["predicted_s"]
            right, wrong = right + is_right, wrong + (not is_right)
    apart = right + wrong
    return {
        "num": len(rows),
        "spearman": float(spearmanr(predicted, measured)[0]),
        "kendall": float(kendalltau(predicted, measured)[0]),
        "num_apart": apart,
        "kendall_apart": (right - wrong) / apart if apart else 1.0,
        "right_apart": right / apart if apart else 1.0,
    }


def chosen(rows):
    """How far the mesh predicted to be best is from the best that was measured."""
    best = min(rows, key=lambda row: row["measured_s"])
    choice = min(rows, key=lambda row: row["predicted_s"])
    return choice, best, choice["measured_s"] / best["measured_s"]


def show(rows, workloads):
    """Prints the table of workloads, and what holds for all together."""
    print(f"\n| {' | '.join(HEADER)} |\n{'|---' * len(HEADER)}|")
    for name in workloads:
        some = [row for row in rows if row["workload"] == name]
        found, (choice, best, ratio) = agreement(some), chosen(some)
        cells = [
            *(name, found["num"], f"{found['spearman']:.2f}"),
            *(f"{found['kendall']:.2f}", found["num_apart"]),
            *(f"{found['right_apart']:.0%}", choice["mesh"], best["mesh"]),
            f"{ratio:.3f}",
        ]
        print("| " + " | ".join(map(str, cells)) + " |")
    found = agreement(rows)
    print(
        f"\nAll {found['num']}: Spearman {found['spearman']:.3f}, Kendall "
        f"{found['kendall']:.3f}; of {found['num_apart']} pairs that are apart by more "
        f"than the spread {found['right_apart']:.1%} are in order (Kendall "
        f"{found['kendall_apart']:.3f}).",
        flush=True,
    )


def make_rows(workload, profile, times, beside):
    """What was predicted and measured on every mesh of a workload."""
    rows = []
    # Beside the other meshes in the same round; all together beside the anchor.
    usual = [statistics.median(some) for some in zip(*times, strict=True)]
    unit = statistics.median(a / b for a, b in zip(usual, beside, strict=True))
    for sizes, seconds in zip(workload.meshes, times, strict=True):
        ratios = [a / b * unit for a, b in zip(seconds, usual, strict=True)]
        parts_s = workload.predict(sizes, profile)
        mesh = " ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)
        rows.append(
            {
                "workload": workload.name,
                "mesh": mesh or "one device",
                "ratio": statistics.median(ratios),
                "ratio_interval": interval(ratios),
                "seconds": seconds,
                "anchor_s": statistics.median(beside),
                "predicted_s": sum(parts_s.values()),
                "parts_s": parts_s,
            }
        )
    return rows


def report(rows, workloads, facts, out):
    """Prints what was found so far, and writes it."""
    # The step beside which all were timed takes the same for all.
    usual_s = statistics.median(row["anchor_s"] for row in rows)
    for row in rows:
        row["measured_s"] = row["ratio"] * usual_s
        row["interval_s"] = [x * usual_s for x in row["ratio_interval"]]
    for row in [row for row in rows if row["workload"] == workloads[-1]]:
        low, high = row["interval_s"]
        print(
            f"{row['mesh']:<16} {1e3 * row['measured_s']:8.1f} ms "
            f"[{1e3 * low:.1f}, {1e3 * high:.1f}]  predicted "
            f"{1e3 * row['predicted_s']:8.1f} ms"
        )
    show(rows, workloads)
    if out:
        out.write_text(json.dumps({**facts, "rows": rows}, indent=1))


def get_profile(arguments, devices):
    """Returns a profile and its table, measured now unless one is given."""
    from shardkit.planner.calibrator import calibrate, guess_base
    from shardkit.planner.profile import profile_table, read_profile

    base = arguments.profile or guess_base(devices[0])
    table, where = profile_table(base)
    if not arguments.profile:
        limit_s = arguments.calibrate_s
        table = calibrate(table, base, devices, limit_s=limit_s).table
    print(json.dumps(table["measured"], indent=1, ensure_ascii=False), flush=True)
    return read_profile(table, where), table


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit-s", type=float, help=f"about; {LIMIT_S} by default")
    parser.add_argument("--calibrate-s", type=float, default=60)
    parser.add_argument("--profile", help="measured before; else calibrated now")
    parser.add_argument("--only", default="", help="workloads with this in their name")
    parser.add_argument("--out", type=Path, help="all that was found, as JSON")
    parser.add_argument("--cache", help="where compiled programs are kept")
    arguments = parser.parse_args()
    os.environ.setdefault("PJRT_NPROC", str(max(8, arguments.devices)))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    start_s = time.monotonic()
    import jax

    jax.config.update("jax_num_cpu_devices", arguments.devices)
    from benchmarks import common
    from shardkit.program_cache import use_program_cache

    if arguments.cache:
        use_program_cache(arguments.cache)
    platform = jax.default_backend()
    limit_s = arguments.limit_s or LIMIT_S[platform]
    machine = f"{common.describe_machine()}, {os.cpu_count()} cores"
    print(machine, flush=True)
    devices = jax.devices()[: arguments.devices]
    profile, table = get_profile(arguments, devices)
    make = functools.partial(Workload, on_cpu=platform == "cpu", num=len(devices))
    work = CPU_WORK if platform == "cpu" else GPU_WORK
    anchor = make(work[0]).step({"data": 1})
    rows, done, longest_s = [], [], 0.0
    for workload in map(make, work):
        if arguments.only not in workload.name:
            continue
        began_s = time.monotonic()
        if done and began_s - start_s + longest_s > limit_s:
            print(f"left out, as time is up: {workload.name}")
            continue
        times, beside = measure(workload, anchor, arguments.rounds)
        rows += make_rows(workload, profile, times, beside)
        longest_s = max(longest_s, time.monotonic() - began_s)
        print(f"{workload.name}: {time.monotonic() - began_s:.0f} s", flush=True)
        done.append(workload.name)
        report(rows, done, {"machine": machine, "profile": table}, arguments.out)
        # Programs of the CPU take a part each of the mappings that a process may have.
        gc.collect()
    print(f"{time.monotonic() - start_s:.0f} s in all")


if __name__ == "__main__":
    main()
