"""What lossless compression is worth for a real training state, and what it costs.

    python benchmarks/compression.py [--steps 200] [--embed-dim 256]

A small GPT is trained on the standard library's sources; its state is written once in
full and once as the difference to a state 1 and 50 steps before, in each of the ways
that `write_checkpoint` knows. Ratios are bytes on disk over bytes in memory, of the
parameters and of AdamW's moments each; speeds are of writing and of reading all.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

WAYS = ("none", "zstd", "planes")
PARTS = {"params": "params/", "moment 1": "opt_state/", "moment 2": "opt_state/"}


def states(steps, embed_dim):
    """The leaves of three states of one run: 50 steps and 1 step before, and last."""
    import jax
    import numpy as np
    import optax

    import shardkit as sk
    from models import gpt
    from shardkit.keys import raw
    from shardkit.tree import named_leaves

    model = gpt.build(
        num_layers=2, embed_dim=embed_dim, num_heads=4, mlp_dim=3 * embed_dim
    )
    corpus = sk.data.TextCorpus.open()
    batches = sk.data.TextBatches(
        corpus, split="train", global_batch_size=8, sequence_length=128, seed=0
    )
    trainer = sk.Trainer(
        init=model.init,
        loss=model.loss,
        tx=optax.adamw(1e-3),
        data=batches,
        num_microbatches=2,
        devices=jax.devices()[:1],
    )
    found = []
    for end in (steps - 50, steps - 1, steps):
        for _ in trainer.run(end):
            pass
        leaves = named_leaves(trainer.state)
        found.append({path: np.array(raw(x)) for path, x in leaves})
    trainer.close()
    return found


def part_of(path):
    if path.startswith("params/"):
        return "params"
    if "/mu/" in path or "/nu/" in path:
        return "moment 1" if "/mu/" in path else "moment 2"
    return None


def measure(tree, compress):
    """Writes and reads a tree; returns bytes on disk and the seconds of both."""
    from shardkit.checkpoint.reader import open_checkpoint
    from shardkit.checkpoint.store import write_checkpoint
    from shardkit.checkpoint.views import whole_box

    with tempfile.TemporaryDirectory() as root:
        start_s = time.perf_counter()
        where = write_checkpoint(root, tree, compress=compress)
        write_s = time.perf_counter() - start_s
        size = sum(x.stat().st_size for x in where.rglob("*") if x.is_file())
        start_s = time.perf_counter()
        for view in open_checkpoint(where).views.values():
            view.read(whole_box(view.shape))
        return size, write_s, time.perf_counter() - start_s


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--embed-dim", type=int, default=256)
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from benchmarks import common
    from shardkit.checkpoint.delta import delta
    from shardkit.checkpoint.views import ArrayView

    before50, before1, last = states(arguments.steps, arguments.embed_dim)
    print(common.describe_machine())
    print("| what | | in memory, MiB | on disk / in memory | write MB/s | read MB/s |")
    print("|---|---|---|---|---|---|")
    views = [
        {path: ArrayView(x) for path, x in tree.items()}
        for tree in (before50, before1, last)
    ]
    for part in PARTS:
        mine = [{p: v for p, v in tree.items() if part_of(p) == part} for tree in views]
        total = sum(view.nbytes for view in mine[2].values())
        kinds = {
            "whole": mine[2],
            "since 1 step": delta(mine[2], mine[1]),
            "since 50 steps": delta(mine[2], mine[0]),
        }
        for kind, tree in kinds.items():
            for way in WAYS:
                # The first write of a shape compiles its digests.
                measure(tree, way)
                size, write_s, read_s = measure(tree, way)
                print(
                    f"| {part}, {kind} | {way} | {total / 2**20:.1f} "
                    f"| {size / total:.3f} | {total / 1e6 / write_s:.0f} "
                    f"| {total / 1e6 / read_s:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
