"""What planning takes, on one core: no device is touched, and none is needed.

    python benchmarks/planning.py [--leaves 10000] [--devices 1024] [--lost 64]

Each line is one change. The columns are seconds: to build the plan, to add up its
totals, to list what one target gets and what one source sends, and to choose the order
of the devices of the new mesh.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

HEADER = (
    f"{'':<42}{'plan':>8}{'totals':>8}{'target':>8}{'source':>8}{'order':>8}"
    f"{'GB moved':>11}"
)


def grid(ids, data=1, tensor=1, num_per_host=8):
    import numpy as np

    from shardkit.places import Places

    ids = np.reshape(ids, (data, -1, tensor))
    return Places(("data", "fsdp", "tensor"), ids, ids // num_per_host)


def mixed_sizes(num, seed=0):
    """Half the leaves like those of a transformer, half each of its own size."""
    import numpy as np

    rng = np.random.default_rng(seed)
    repeated = rng.choice([1024, 4096, 11008, 16384], num // 2)
    return [*repeated.tolist(), *rng.integers(2000, 60000, num - num // 2).tolist()]


def state(places, sizes, cuts=(("fsdp",), ())):
    from shardkit.layout import Layout

    return {
        f"leaf{i}": Layout(places, (size, 1024), 4, cuts)
        for i, size in enumerate(sizes)
    }


def clock(function):
    """The result and the CPU time of one thread, which other programs do not change."""
    start = time.thread_time()
    result = function()
    return result, time.thread_time() - start


def measure(sources, target, lost=frozenset()):
    """Plans one change; returns the plan, the order or None, and the times."""
    from shardkit.device_order import choose_order
    from shardkit.transfer import plan_transfer

    plan, planning_s = clock(lambda: plan_transfer(sources, target, lost=lost))
    _, totals_s = clock(lambda: plan.totals)
    places = next(iter(target.values())).places
    some = int(places.ids.ravel()[places.ids.size // 2])
    _, target_s = clock(lambda: list(plan.for_target(some)))
    _, source_s = clock(lambda: list(plan.from_source(some)))
    order, order_s = clock(lambda: choose_order(sources[0], target))
    return plan, order, (planning_s, totals_s, target_s, source_s, order_s)


def report(name, plan, order, times):
    assert plan.totals.bytes_moved == plan.totals.min_bytes
    seconds = "".join(f"{value:8.2f}" for value in times)
    print(f"{name:<42}{seconds}{plan.totals.bytes_moved / 1e9:11.1f}")
    plain, chosen = order.plain_bytes_moved / 1e9, order.bytes_moved / 1e9
    print(f"    order: {chosen:.1f} GB instead of {plain:.1f}; {order.reason}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leaves", type=int, default=10000)
    parser.add_argument("--devices", type=int, default=1024)
    parser.add_argument("--lost", type=int, default=64)
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import numpy as np

    from shardkit.places import Medium

    num, lost = arguments.devices, arguments.lost
    sizes = mixed_sizes(arguments.leaves)
    different = np.random.default_rng(1).integers(2000, 60000, arguments.leaves)
    left, first = num - lost, range(lost)
    survivors = range(lost, num)
    print(HEADER)

    old = state(grid(range(num)), sizes)
    new = state(grid(survivors), sizes)
    name = f"{len(sizes)} leaves, fsdp {num} → {left}"
    report(name, *measure([old], new))
    new = state(grid(survivors), different)
    name = f"{len(sizes)} different leaves, fsdp {num} → {left}"
    report(name, *measure([state(grid(range(num)), different)], new))
    old = state(grid(range(num), data=8), different)
    name = f"… data 8 × fsdp {num // 8} → {left // 8}"
    report(name, *measure([old], state(grid(survivors, data=8), different)))
    old, new = state(grid(range(num)), sizes), state(grid(survivors), sizes)
    copies = state(grid(range(num)).on(Medium.HOST), sizes)
    name = f"{len(sizes)} leaves, {lost} lost, host copies"
    report(name, *measure([old, copies], new, lost=frozenset(first)))
    old = state(grid(range(64)), sizes[:100])
    new = state(grid(range(64), tensor=8), sizes[:100], (("fsdp",), ("tensor",)))
    report("100 leaves, fsdp 64 → fsdp 8 × tensor 8", *measure([old], new))

    many = 100_000
    old, new = state(grid(range(many)), [10**6]), state(grid(range(8, many)), [10**6])
    report(f"one leaf, fsdp {many} → {many - 8}", *measure([old], new))
    old = state(grid(range(many), data=many), [10**6])
    new = state(grid(range(16, many + 8), data=many - 8), [10**6])
    report(f"one leaf, data {many} → {many - 8}", *measure([old], new))


if __name__ == "__main__":
    main()
