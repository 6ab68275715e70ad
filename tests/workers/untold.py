"""`train.py`, of which process 0 is killed once, with two steps that it never told.

It is at the point of writing a step when the state after the next one is in a snapshot.
The environment's `UNTOLD_MARK` is a file that is there when that was done.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import train
from shardkit.report import Report

STEP = 6
OTHERS_S = 1


def main():
    mark, taken = Path(os.environ["UNTOLD_MARK"]), threading.Event()
    tell, hear = Report.step, Report.event

    def event(self, event):
        hear(self, event)
        if event.name == "snapshot" and event.fields["step"] == STEP + 2:
            taken.set()

    def step(self, metrics):
        is_first = "process" not in self.directory.path.name
        if metrics.step == STEP and is_first and not mark.exists():
            mark.touch()
            taken.wait()
            time.sleep(OTHERS_S)
            os.kill(os.getpid(), signal.SIGKILL)
        tell(self, metrics)

    Report.event, Report.step = event, step
    return train.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
