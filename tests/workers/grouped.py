"""One of several processes whose devices compute microbatches in groups.

python grouped.py PORT PROCESS_ID NUM_PROCESSES MESH CHANGES

MESH and CHANGES are JSON. Process 0 prints losses and digest as JSON.
"""

import json
import sys
from pathlib import Path

from job import join


def main(port, process_id, num_processes, mesh, changes):
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests.parent)]

    import jax

    jax.config.update("jax_num_cpu_devices", 8 // int(num_processes))
    join(port, process_id, num_processes)
    assert len(jax.devices()) == 8

    from test_groups import ADAM, losses_and_digest, trainer_of

    changes = {int(step): count for step, count in json.loads(changes).items()}
    trainer = trainer_of("gpt", json.loads(mesh), tx=ADAM, devices=jax.devices())
    found = losses_and_digest(trainer, 4, changes)
    if int(process_id) == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
