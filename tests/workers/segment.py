"""Trains a part of a run in a process of its own, and prints the bits as JSON.

python segment.py PROBLEM DIRECTORY NUM_DEVICES NUM_CORES STEPS
"""

import json
import os
import sys
from pathlib import Path


def main(problem, directory, num_devices, num_cores, steps):
    # Before JAX starts its threads.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[: int(num_cores)])
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests.parent)]

    import jax

    jax.config.update("jax_num_cpu_devices", int(num_devices))

    from problems import PROBLEMS

    import shardkit as sk
    from shardkit.testing import run_digest

    checkpoint = sk.CheckpointConfig(directory=directory)
    trainer = sk.Trainer(**PROBLEMS[problem](), checkpoint=checkpoint)
    assert len(jax.devices()) == int(num_devices)
    if any(Path(directory).iterdir()):
        trainer.restore()
    found = run_digest(trainer, int(steps))
    trainer.save()
    trainer.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
