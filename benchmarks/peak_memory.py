"""What gathering the whole parameters costs: peak memory beside per-layer FSDP.

    python benchmarks/peak_memory.py [--sizes 1,4,16,64]

The rival is what one would write to save memory: a scan over stacked layers, each
gathered where it is used and again in the backward pass, so that a device holds
little more of parameters and gradient sums than its pieces. All run the same model
with the same recomputation on the same microbatches, on 8 emulated devices. Steps are
only compiled; the bytes are XLA's: arguments, temporaries, and what is returned in
memory of its own.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

NUM_DEVICES = 8
LENGTH = 128
# About so many MiB of parameters: layers and width.
SIZES = {1: (4, 64), 4: (5, 128), 16: (9, 192), 64: (20, 256)}
HEADER = (
    "| parameters, MiB | state a device, MiB | rival | fast | exact | fast / rival "
    "| exact / rival |\n" + "|---" * 7 + "|"
)


def measure(num_layers, embed_dim):
    """Prints the row of one size."""
    import dataclasses

    import jax

    from benchmarks import common, rivals
    from models import gpt

    config = gpt.GPTConfig(
        num_layers=num_layers,
        num_heads=embed_dim // 32,
        embed_dim=embed_dim,
        mlp_dim=3 * embed_dim,
        max_sequence_length=LENGTH,
        scan_layers=True,
        remat=True,
    )
    model = gpt.build(**dataclasses.asdict(config))
    batch = common.random_tokens(32, LENGTH, config.vocab_size)
    make = functools.partial(
        common.Ours, model, common.optimizer(), jax.devices(), batch, 16
    )
    fast, exact = make(exact=False), make(exact=True)
    rival = rivals.Rival(
        functools.partial(rivals.with_layer_gather, config),
        fast.recipe,
        fast.layout,
        fast.placement.mesh,
        batch,
    )
    held = [(fast.layout.params, 1), (fast.layout, NUM_DEVICES)]
    sizes = [
        sum(leaf.piece_bytes(num) for leaf in jax.tree.leaves(tree))
        for tree, num in held
    ]
    peaks = [common.memory_bytes(x.compiled) for x in (rival, fast, exact)]
    cells = [f"{x / 2**20:.1f}" for x in sizes + peaks]
    cells += [f"{x / peaks[0]:.2f}" for x in peaks[1:]]
    print(f"| {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1,4,16,64")
    arguments = parser.parse_args()
    import jax

    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    from benchmarks import common

    print(common.describe_machine())
    print(HEADER)
    for size in map(int, arguments.sizes.split(",")):
        measure(*SIZES[size])


if __name__ == "__main__":
    main()
