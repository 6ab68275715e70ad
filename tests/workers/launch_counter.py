"""Launches counters: JSON of the settings that differ and of the counter's options."""

import json
import sys
from pathlib import Path

from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.launch import launch, new_run, open_directory
from shardkit.cluster.settings import Limits, Settings
from shardkit.cluster.split import plan_hosts

COUNTER = Path(__file__).with_name("counter.py")


def main():
    options = json.loads(sys.argv[1])
    counter = options["counter"]
    with open_directory(Path(options["directory"])) as (directory, codes):
        run, token = new_run()
        processes = options.get("processes", 4)
        command = (sys.executable, str(COUNTER), json.dumps(counter))
        settings = Settings(
            run=run,
            token=token,
            argv=tuple(options.get("argv", command)),
            directory=str(directory),
            hosts=plan_hosts(
                processes,
                options.get("hosts", processes),
                options.get("devices", 2 * processes),
            ),
            min_devices=options.get("min_devices", 1),
            deadlines=Deadlines.read(options.get("deadlines", {})),
            limits=Limits(**options.get("limits", {})),
            redundancy=options.get("redundancy", "none"),
        )
        codes.append(launch(settings, engine=options.get("engine", "local")))
    sys.exit(codes[0])


if __name__ == "__main__":
    main()
