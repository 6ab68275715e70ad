"""Goes on with a run that saves after every step, until it is killed or done.

python killed.py DIRECTORY CACHE NUM_DEVICES KEEP STEPS

Prints JSON: where it begins, when it has saved, and where it ends; with the digest of
the state at both ends.
"""

import json
import os
import sys
from pathlib import Path


def main(directory, cache, num_devices, keep, steps):
    os.umask(0o022)
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests.parent)]

    import jax

    jax.config.update("jax_num_cpu_devices", int(num_devices))

    from problems import linear

    import shardkit as sk
    from shardkit.checkpoint.reader import saved_steps

    def tell(*values):
        print(json.dumps(values), flush=True)

    sk.use_program_cache(cache)
    config = sk.CheckpointConfig(directory=directory, every=1, keep=int(keep))
    trainer = sk.Trainer(**linear(), checkpoint=config)
    if saved_steps(Path(directory)):
        trainer.restore()
    tell(trainer.step, trainer.state_digest())
    for number, metrics in enumerate(trainer.run(steps=int(steps))):
        if number == 2:  # One save is done by now, and the next under way.
            tell(metrics.step)
    tell(trainer.step, trainer.state_digest())
    trainer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
