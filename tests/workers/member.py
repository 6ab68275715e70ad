"""One of several processes that train together, with 8 devices in all.

python member.py PORT PROCESS_ID NUM_PROCESSES DIRECTORY

Process 0 prints the bits as JSON.
"""

import json
import sys
from pathlib import Path

from job import join


def main(port, process_id, num_processes, directory):
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests.parent)]

    import jax

    jax.config.update("jax_num_cpu_devices", 8 // int(num_processes))
    join(port, process_id, num_processes)
    assert len(jax.devices()) == 8

    from problems import evaluated_digits

    import shardkit as sk
    from shardkit.testing import run_digest

    trainer, evaluated = evaluated_digits(directory)
    found = run_digest(trainer, 3)
    trainer.save()
    found |= {"after": run_digest(trainer, 6, {0: 8, 4: 6})}
    found |= {"evaluated": list(evaluated)}
    trainer.restore()
    found |= {"restored": trainer.state_digest()}
    seen = [m.step for m in trainer.run(6, sk.scripted({4: 6, 5: sk.Lost(4)}))]
    found |= {"seen": seen, "after a loss": trainer.state_digest()}
    trainer.close()
    if int(process_id) == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
