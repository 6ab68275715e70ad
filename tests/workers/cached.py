"""Trains through a change of devices with a program cache, as JSON.

python cached.py DIRECTORY NUM_VISIBLE [PORT PROCESS_ID NUM_PROCESSES]

Prints which programs were loaded and which were not, by name, and the bits.
"""

import json
import logging
import os
import re
import sys
from pathlib import Path

from job import join

LINE = re.compile(r"(hit|MISS) for '(?:jit_)?(\w+)'")


class Looked(logging.Handler):
    """Notes what JAX says of its cache."""

    def __init__(self):
        super().__init__()
        self.found = {"hit": [], "MISS": []}

    def emit(self, record):
        match = LINE.search(record.getMessage())
        if match:
            self.found[match.group(1)].append(match.group(2))


def main(directory, num_visible, *job):
    os.umask(0o022)
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests.parent)]

    import jax

    jax.config.update("jax_num_cpu_devices", int(num_visible))
    if job:
        join(*job)
    looked = Looked()
    logger = logging.getLogger("jax._src.compiler")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(looked)
    logger.propagate = False

    from problems import linear, linear_data

    import shardkit as sk
    from shardkit.testing import run_digest

    assert sk.use_program_cache(directory)
    trainer = sk.Trainer(
        **linear(), certify="always", eval=sk.EvalConfig(data=linear_data, every=2)
    )
    found = run_digest(trainer, 4, {2: 6})
    trainer.close()
    ours = {"init", "step", "evaluate", "digest"}
    for name, programs in looked.found.items():
        found[name] = sorted(ours.intersection(programs))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
