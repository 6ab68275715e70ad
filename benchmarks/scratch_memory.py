"""Whether a move keeps the limit on memory that it was given, on real devices.

    python benchmarks/scratch_memory.py [--gib 4] [--case NAME ...]

Each case runs in a process of its own, since an allocator's peak is never reset. The
bound is the larger of what a device holds before and after, and the limit.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

HEADER = (
    "| case | limit, MiB | before, MiB | after, MiB | peak, MiB | bound, MiB | kept |\n"
    + "|---" * 7
    + "|"
)
CASES = {
    "2 to 1": ((2, 0), (1, 0)),
    "1 to 2": ((1, 0), (2, 0)),
    "2 to 1, all whole": ((2, 0), (1, None)),
    "rows to copies": ((2, 0), (2, None)),
    "copies to rows": ((2, None), (2, 0)),
    "rows to columns": ((2, 0), (2, 1)),
}
# 0 for the least.
LIMITS = (0, 256 << 20, 2 << 30)


def one(name, limit, num_bytes):
    import jax
    import jax.numpy as jnp

    import shardkit as sk
    from benchmarks.reshard import shapes_of, sharding

    devices = jax.devices()[:2]
    stats = lambda key: [d.memory_stats()[key] for d in devices]  # noqa: E731
    (old, old_dim), (new, new_dim) = CASES[name]
    shapes = shapes_of("large", num_bytes) + [(48 * i, 96) for i in range(1, 40)]
    place = lambda n, dim, s: sharding(n, dim, len(s))  # noqa: E731
    tree = []
    for i, shape in enumerate(shapes):
        make = jax.jit(
            lambda i, shape=shape: jnp.full(shape, i, jnp.float32),
            out_shardings=place(old, old_dim, shape),
        )
        tree.append(jax.block_until_ready(make(i)))
    wanted = [place(new, new_dim, shape) for shape in shapes]
    if limit == 0:
        try:
            sk.reshard(tree, wanted, donate=True, scratch_bytes=0)
        except sk.ConfigError as error:
            limit = int(str(error).split("needs ")[1].split()[0])
    before = stats("bytes_in_use")
    moved = sk.reshard(tree, wanted, donate=True, scratch_bytes=limit)
    jax.block_until_ready(moved)
    del tree
    after, peak = stats("bytes_in_use"), stats("peak_bytes_in_use")
    assert all(bool((x == i).all()) for i, x in enumerate(moved))
    print("RESULT " + json.dumps([limit, before, after, peak]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--case", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    num_bytes = int(arguments.gib * 2**30)
    if arguments.one:
        name, limit = arguments.one
        one(name, int(limit), num_bytes)
        return
    print(HEADER, flush=True)
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, __file__, "--gib", str(arguments.gib), "--one"]
    for name in arguments.case:
        for limit in LIMITS:
            out = subprocess.run(
                [*command, name, str(limit)],
                capture_output=True,
                text=True,
                timeout=300,
                env=environment,
            )
            lines = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
            if not lines:
                raise SystemExit(f"{name}: {out.stderr[-2000:]}")
            limit, *rest = json.loads(lines[0].removeprefix("RESULT "))
            for device, (b, a, p) in enumerate(zip(*rest, strict=True)):
                bound = max(b, a) + limit
                cells = [limit, b, a, p, bound]
                cells = [f"{x / 2**20:.1f}" for x in cells]
                print(
                    f"| {name}, device {device} | {' | '.join(cells)} "
                    f"| {'yes' if p <= bound else 'NO'} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
