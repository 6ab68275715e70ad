"""How well predicted step times agree with measured ones.

    python benchmarks/predicted_times.py [--limit-s 1200] [--out found.json]
    python benchmarks/predicted_times.py --devices 2          # on two GPUs

Calibrates a profile first, then times the steps of models on every mesh that the
planner compares for the devices there are. The meshes of a workload are timed in turn in
every round, and beside one step that is the same for all, by which times are divided:
a machine that becomes slower in between disturbs no order. Prints the rank correlation of
predicted and measured times, and how far the mesh that is predicted to be best is from
the one that was measured to be.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

# Model options, rows of a microbatch, microbatches.
CPU_MODELS = {
    "small": {"num_layers": 4, "embed_dim": 128, "num_heads": 4, "mlp_dim": 384},
    "wide": {"num_layers": 2, "embed_dim": 512, "num_heads": 8, "mlp_dim": 2048},
    "tiny": {"num_layers": 2, "embed_dim": 64, "num_heads": 2, "mlp_dim": 192},
}
CPU_LENGTH = {"tiny": 64, "small": 128, "wide": 32}
# Model, rows of a microbatch, microbatches, remat, compute dtype, exact.
CPU_WORK = [
    ("wide", 1, 8, False, "float32", True),
    ("small", 1, 24, False, "float32", True),
    ("tiny", 4, 8, False, "float32", True),
    ("small", 1, 24, True, "float32", True),
    ("wide", 2, 24, False, "float32", True),
    ("small", 2, 8, False, "float32", False),
]
GPU_MODELS = {
    "124M": {"num_layers": 12, "embed_dim": 768, "num_heads": 12, "mlp_dim": 3072},
    "30M": {"num_layers": 6, "embed_dim": 512, "num_heads": 8, "mlp_dim": 2048},
    "600M": {"num_layers": 12, "embed_dim": 2048, "num_heads": 16, "mlp_dim": 5632},
}
GPU_WORK = [
    ("124M", 8, 8, False, "bfloat16", True),
    ("30M", 8, 8, False, "bfloat16", True),
    ("600M", 4, 4, True, "bfloat16", True),
    ("124M", 8, 8, True, "bfloat16", True),
    ("124M", 2, 4, False, "bfloat16", True),
    ("600M", 4, 4, True, "bfloat16", False),
    ("124M", 8, 8, False, "bfloat16", False),
    ("30M", 16, 32, False, "bfloat16", False),
]


def make_model(name, remat, dtype, on_cpu):
    from models import gpt

    models = CPU_MODELS if on_cpu else GPU_MODELS
    return gpt.build(
        vocab_size=256 if on_cpu else 32000,
        max_sequence_length=length_of(name, on_cpu),
        scan_layers=True,
        remat=remat,
        compute_dtype=dtype,
        **models[name],
    )


def length_of(name, on_cpu):
    return CPU_LENGTH[name] if on_cpu else 1024


def all_meshes(job, topology):
    """Every mesh that a search would compare, with all axes that the job leaves open."""
    from shardkit.mesh import MESH_AXES
    from shardkit.planner.candidates import inner_sizes, outer_meshes
    from shardkit.planner.model_facts import INNER_AXES
    from shardkit.planner.quotas import Quotas

    [(_, num, facts)] = job.blocks()
    cut = [n for leaf in facts.params for n in leaf.shape if "fsdp" in leaf.cuts]
    found = []
    for row in inner_sizes(facts.divisors, topology.num_devices, job.fixed):
        groups = Quotas(topology, int_product(row[axis] for axis in INNER_AXES))
        meshes = outer_meshes(row, groups, num, max(cut, default=1), job.fixed)
        found += [
            {axis: int(meshes.sizes[axis][i]) for axis in MESH_AXES}
            for i in range(len(meshes))
        ]
    return found


def int_product(numbers):
    total = 1
    for number in numbers:
        total *= number
    return total


class Workload:
    """One model and batch, on all meshes."""

    def __init__(self, work, on_cpu, num_devices):
        import jax

        from benchmarks import common
        from shardkit.planner.meshes import Topology
        from shardkit.planner.model_facts import INNER_AXES
        from shardkit.planner.reading import read_model
        from shardkit.planner.search import Job

        name, rows, count, remat, dtype, exact = work
        self.name = (
            f"{name}, {count} × {rows} rows, {dtype}"
            + ", remat" * remat
            + (", exact" if exact else ", fast")
        )
        self.exact, self.count, self.tx = exact, count, common.optimizer()
        self.model = make_model(name, remat, dtype, on_cpu)
        vocab = 256 if on_cpu else 32000
        length = length_of(name, on_cpu)
        self.batch = common.random_tokens(rows * count, length, vocab)
        like = {"tokens": jax.ShapeDtypeStruct((rows, length + 1), "int32")}
        self.facts = read_model(self.model, like, self.tx)
        job = Job(
            facts={"as configured": self.facts},
            global_batch_size=rows * count,
            num_microbatches=[count],
            exact=exact,
            # Switch on what the step can do by naming fewer axes here.
            fixed=dict.fromkeys(INNER_AXES, 1),
        )
        self.topology = Topology(num_devices, num_devices)
        self.meshes = all_meshes(job, self.topology)

    def predict(self, sizes, profile):
        from shardkit.planner.cost import predict
        from shardkit.planner.meshes import Meshes

        meshes = Meshes.of(sizes, self.count)
        return predict(self.facts, meshes, profile, self.topology, exact=self.exact)

    def step(self, sizes):
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
    print("\n| workload | meshes | Spearman | Kendall | pairs apart | in order "
          "| chosen | measured best | chosen / best |\n" + "|---" * 9 + "|")  # fmt: skip
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--limit-s", type=float, default=1200)
    parser.add_argument("--calibrate-s", type=float, default=60)
    parser.add_argument("--profile", help="measured before; else calibrated now")
    parser.add_argument("--only", help="workloads with this in their name")
    parser.add_argument("--out", type=Path, help="all that was found, as JSON")
    parser.add_argument("--cache", help="where compiled programs are kept")
    arguments = parser.parse_args()
    os.environ.setdefault("PJRT_NPROC", str(max(8, arguments.devices)))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    start_s = time.monotonic()
    import jax

    jax.config.update("jax_num_cpu_devices", arguments.devices)
    from benchmarks import common
    from shardkit.planner.calibrator import calibrate, guess_base
    from shardkit.planner.profile import profile_table, read_profile
    from shardkit.program_cache import use_program_cache

    if arguments.cache:
        use_program_cache(arguments.cache)
    on_cpu = jax.default_backend() == "cpu"
    print(f"{common.describe_machine()}, {os.cpu_count()} cores", flush=True)
    devices = jax.devices()[: arguments.devices]
    base = arguments.profile or guess_base(devices[0])
    table, where = profile_table(base)
    if not arguments.profile:
        found = calibrate(table, base, devices, limit_s=arguments.calibrate_s)
        table = found.table
        print(json.dumps(table["measured"], indent=1), flush=True)
    profile = read_profile(table, where)
    work = CPU_WORK if on_cpu else GPU_WORK
    anchor = Workload(work[0], on_cpu, len(devices)).step({"data": 1})
    rows, done, longest_s = [], [], 0.0
    for each in work:
        workload = Workload(each, on_cpu, len(devices))
        began_s = time.monotonic()
        if arguments.only and arguments.only not in workload.name:
            continue
        if done and began_s - start_s + longest_s > arguments.limit_s:
            print(f"left out, as time is up: {workload.name}")
            continue
        times, beside = measure(workload, anchor, arguments.rounds)
        longest_s = max(longest_s, time.monotonic() - began_s)
        usual_s = statistics.median(beside)
        done.append(workload.name)
        for sizes, seconds in zip(workload.meshes, times, strict=True):
            ratios = [a / b for a, b in zip(seconds, beside, strict=True)]
            cost = workload.predict(sizes, profile)
            mesh = " ".join(f"{a}={n}" for a, n in sizes.items() if n > 1)
            rows.append(
                {
                    "workload": workload.name,
                    "mesh": mesh or "one device",
                    "sizes": sizes,
                    "ratio": statistics.median(ratios),
                    "ratio_interval": interval(ratios),
                    "seconds": seconds,
                    "anchor_s": usual_s,
                    "predicted_s": float(cost.step_s[0]),
                    "parts_s": {k: float(v[0] if getattr(v, "ndim", 0) else v)
                                for k, v in cost.time_s.items()},  # fmt: skip
                }
            )
        took_s = time.monotonic() - began_s
        print(f"{workload.name}: {len(times)} meshes, {took_s:.0f} s", flush=True)
        gc.collect()
    # Each is as many of the same step; how long that takes is the same for all.
    usual_s = statistics.median(row["anchor_s"] for row in rows)
    for row in rows:
        row["measured_s"] = row["ratio"] * usual_s
        row["interval_s"] = [x * usual_s for x in row["ratio_interval"]]
    for row in rows:
        low, high = row["interval_s"]
        print(
            f"{row['workload']:<38} {row['mesh']:<16} {1e3 * row['measured_s']:8.1f} ms "
            f"[{1e3 * low:.1f}, {1e3 * high:.1f}]  predicted "
            f"{1e3 * row['predicted_s']:8.1f}"
        )
    show(rows, done)
    print(f"{time.monotonic() - start_s:.0f} s in all")
    if arguments.out:
        found = {"machine": common.describe_machine(), "profile": table, "rows": rows}
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
