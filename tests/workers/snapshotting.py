"""One of several processes that lose devices and go on from their snapshots.

python snapshotting.py PORT PROCESS_ID NUM_PROCESSES DIRECTORY

Every image is a file in the directory, which stands for memory that outlives the
process; what is read of those of others is counted. Process 0 prints what it saw as
JSON, each writes how many bytes it fetched in every restore, and of which images.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from job import TIMEOUT_S, join


def main(port, process_id, num_processes, directory):
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests.parent)]

    import jax

    jax.config.update("jax_num_cpu_devices", 4 // int(num_processes))
    join(port, process_id, num_processes)

    from problems import PROBLEMS, fields_of

    import shardkit as sk
    from shardkit.cluster import ImageRef, remote_images

    # Else all of it would be fetched with what says what is in it.
    remote_images._FIRST_BYTES, remote_images._GAP_BYTES = 256, 64

    class Files:
        """Two newest steps as files; committed when those of all processes are."""

        run, generation, num_losses = "files", 0, 0

        def __init__(self):
            self._steps, self.fetched = [], []

        def host(self, process):
            return f"host-{process}"

        def reserve(self, num_bytes):
            return Buffer(num_bytes)

        def commit(self, slot, step):
            path = self._path(step, int(process_id))
            partial = path.with_suffix(".partial")
            partial.write_bytes(slot.memory)
            partial.rename(path)
            deadline_s = time.monotonic() + TIMEOUT_S
            paths = [self._path(step, i) for i in range(int(num_processes))]
            while not all(path.exists() for path in paths):
                assert time.monotonic() < deadline_s, paths
                time.sleep(0.01)
            self._steps = [*self._steps, step][-2:]

        def _path(self, step, process):
            return Path(directory) / f"{step}-{process}.image"

        def steps(self):
            return list(self._steps)

        def images(self, step):
            refs = []
            for process in range(int(num_processes)):
                path, host = self._path(step, process), self.host(process)
                place = {"host": host, "address": "", "name": path.name}
                size = path.stat().st_size
                refs.append(ImageRef(**place, process=process, num_bytes=size))
            self.fetched.append({})
            found = remote_images.open_images(self, refs)
            # What was fetched until now says what is in them.
            self.fetched[-1].clear()
            return found

        @property
        def assignment(self):
            return argparse.Namespace(host=self.host(int(process_id)))

        def fetch_all(self, spans):
            found, counts = [], self.fetched[-1]
            for ref, start, size in spans:
                data = (Path(directory) / ref.name).read_bytes()[start : start + size]
                found.append(memoryview(data))
                if ref.process != int(process_id):
                    counts[ref.name] = counts.get(ref.name, 0) + size
            return found

        def forget(self, step=None):
            self._steps = [] if step is None else [s for s in self._steps if s != step]

    class Buffer:
        def __init__(self, num_bytes):
            self.memory = memoryview(bytearray(num_bytes))

    events, store = [], Files()
    log = sk.EventLog()
    log.subscribe(events.append)
    trainer = sk.Trainer(
        **PROBLEMS["linear-clip-adam-ema"]() | {"mesh": sk.MeshSpec(data=1, fsdp=-1)},
        snapshot=sk.SnapshotConfig(store=store),
        certify="always",
        events=log,
    )
    script = sk.scripted({2: sk.Lost(3), 3: sk.Lost(2)})
    seen = [m.step for m in trainer.run(4, membership=script)]
    found = {
        "seen": seen,
        "state": trainer.state_digest(),
        "certified": [x["certified"] for x in fields_of(events, "reconfigure")],
        "rewinds": fields_of(events, "rewind"),
    }
    trainer.close()
    counts = json.dumps(store.fetched)
    (Path(directory) / f"fetched-{process_id}.json").write_text(counts)
    if int(process_id) == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
