"""What exactness costs: a step of shardkit beside hand-written ones.

    python benchmarks/step_overhead.py [--rounds 15] [--devices 1,2,4,8]

The rivals do the same work, which is checked first: the same rows in the same
microbatches, state cut alike, donation, the same optimizer, and no determinism flag.
One is `jax.jit` with shardings, the other a `jax.shard_map` whose loop over
microbatches needs no other device. All are timed in turn within each round, so that a
busy machine disturbs them alike.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--embed", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    os.environ.setdefault("PJRT_NPROC", "8")
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    from benchmarks import common
    from models import gpt

    print(common.describe_machine())
    model = gpt.build(
        vocab_size=256,
        num_layers=arguments.layers,
        num_heads=4,
        embed_dim=arguments.embed,
        mlp_dim=3 * arguments.embed,
        max_sequence_length=arguments.length,
        dropout=0.1,
        scan_layers=True,
    )
    batch = common.random_tokens(48, arguments.length, 256)
    print(common.HEADER)
    for count in map(int, arguments.devices.split(",")):
        devices = jax.devices()[:count]
        common.check_same_work(model, devices, batch, 24)
        common.compare(model, devices, batch, 24, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
