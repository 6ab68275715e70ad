"""The hosts of an imagined cluster: agents, workers, images in memory."""

import numpy as np

from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.settings import Limits, Settings
from shardkit.cluster.split import plan_hosts
from shardkit.snapshot.image import ImageWriter
from shardkit.snapshot.layout import ImageLayout, MeshRecord, Piece, SnapshotLeaf

DEADLINES = Deadlines(
    heartbeat_s=1,
    grace_s=0.5,
    silence_s=4,
    end_s=6,
    restart_s=10,
    connect_s=2,
    request_s=3,
    step_floor_s=8,
    step_factor=3,
    mute_s=20,
    form_s=30,
    slot_s=30,
    halt_s=20,
    meet_s=10,
    start_s=40,
    restore_s=40,
    snapshot_s=30,
    save_s=60,
    eval_s=60,
    compile_s=60,
    first_step_s=100,
    exit_s=10,
    orphan_s=50,
    leave_s=200,
    wait_s=90,
).check()


def make_settings(**options):
    limits = Limits(
        settle_steps=1, first_quarantine_s=20, recoveries_without_progress=5
    )
    values = {
        "run": "ab",
        "token": "secret",
        "argv": ("program",),
        "directory": "/nowhere",
        "hosts": plan_hosts(3, 3, 6),
        "deadlines": DEADLINES,
        "limits": limits,
        **options,
    }
    return Settings(**values)


def make_image(run, host, image):
    """The bytes of an image, of which each process has its part."""
    count, me = image["num_processes"], image["process"]
    ids = tuple(range(count))
    layout = ImageLayout.plan(
        run=run,
        host=host,
        process=me,
        num_processes=count,
        leaves=[SnapshotLeaf("state", (count,), "uint8", 0)],
        mesh=MeshRecord(("fsdp",), (count,), ids, ids, ("",) * count),
        pieces=[Piece(0, me, ((me, me + 1),))],
        meta_room_bytes=32,
    )
    memory = bytearray(layout.num_bytes)
    generation = image["generation"]
    writer = ImageWriter(
        memoryview(memory), layout, step=image["step"], generation=generation
    )
    writer.put(0, np.uint8([me]))
    writer.commit({})
    return memory


SIZES = {"num_bytes": 8, "protected_bytes": 8, "head_bytes": 8}


PREPARE_TIMES = 5
"""How often an agent reports while a standby prepares."""


class Worker:
    def __init__(self, id, prepares=False):
        self.id, self.state, self.assignment = id, "ready", None
        self.prepares, self.left, self.prepared = prepares, 0, None
        self.step, self.phase, self.code, self.told = -1, "start", None, {}
        self.by_us, self.ended_s = False, None
        self.halt = None

    def report(self, now_s):
        found = {
            "worker": self.id,
            "pid": 1,
            "state": self.state,
            "age_s": 0.0,
            "silent_s": 0.0,
            "prepares": self.prepares,
        }
        if self.assignment is not None:
            found["generation"] = self.assignment["generation"]
            found["process"] = self.assignment["process_index"]
            found |= {"step": self.step, "phase": self.phase, "facts": {}, **self.told}
        if self.code is not None:
            self.ended_s = now_s if self.ended_s is None else self.ended_s
            age_s = now_s - self.ended_s
            found |= {"code": self.code, "status": f"ended with {self.code}"}
            found |= {"ended_by_us": self.by_us, "exit_age_s": age_s}
            found |= {"tail": []}
        return found


class Agent:
    """What an agent does, without any process; messages reach it or do not."""

    def __init__(self, host, incarnation, prepares=False):
        self.host, self.incarnation = host, str(incarnation)
        self.prepares = prepares
        self.generation = self.ended = self.keep = 0
        self.protected, self.workers, self.images = [0, -1], {}, []
        # What protects which step; and images that were rebuilt or damaged.
        self.guards, self.made, self.rebuilds, self.damaged = {}, {}, [], set()
        self.num_started, self.failed = 0, None
        # No two machines began to count at the same time.
        self.clock_s = 1e5 * len(host) * int(incarnation) - 3e4 * ord(host[-1])

    def report(self, now_s, beat=True):
        return {
            "type": "report",
            "host": self.host,
            "incarnation": self.incarnation,
            "beat": beat,
            "said_s": now_s + self.clock_s,
            "address": "127.0.0.1:1",
            "port": 1,
            "generation": self.generation,
            "ended": self.ended,
            "keep": self.keep,
            "protected": list(self.protected),
            "workers": [worker.report(now_s) for worker in self.workers.values()],
            "images": self.images,
            "guards": [list(key) for key in self.guards],
            "guard_failed": self.failed,
            "rebuilds": list(self.rebuilds),
        }

    def start_standbys(self):
        waiting = [w for w in self.workers.values() if w.state == "ready"]
        for _ in range(self.keep - len(waiting)):
            self.workers[self.num_started] = Worker(self.num_started, self.prepares)
            self.num_started += 1
        for worker in self.workers.values():
            if worker.state == "preparing":
                worker.left -= 1
                worker.state = "preparing" if worker.left else "hot"

    def running(self):
        return [w for w in self.workers.values() if w.state == "running"]

    def obey(self, header):
        kind = header["type"]
        if kind == "keep":
            self.keep = header["count"]
        elif kind == "assign":
            given = header["assignment"]
            worker = self.workers.get(header["worker"])
            is_new = given["generation"] > self.ended
            if worker and worker.state == "hot" and is_new:
                # What it has prepared for is all that it can be.
                for key in ("process_index", "num_processes", "host", "quotas"):
                    assert given[key] == worker.prepared[key], key
            if worker and worker.state in ("ready", "hot") and is_new:
                self.generation = given["generation"]
                worker.assignment, worker.state = given, "running"
        elif kind == "prepare":
            worker = self.workers.get(header["worker"])
            if worker and worker.state == "ready":
                worker.prepared, worker.state = header["assignment"], "preparing"
                worker.left = PREPARE_TIMES
        elif kind == "drop":
            for worker in self.workers.values():
                if worker.state in ("preparing", "hot"):
                    worker.state, worker.code, worker.by_us = "exited", -9, True
        elif kind == "end":
            for worker in self.running():
                if worker.assignment["generation"] <= header["of"]:
                    worker.state, worker.code, worker.by_us = "exited", -9, True
            self.ended = max(self.ended, header["of"])
            self.generation = max(self.generation, self.ended)
        elif kind == "protected":
            self.protected = [header["of"], header["step"]]
            keep = [x for x in self.images if x["generation"] >= header["of"]]
            self.images = keep
            newest = (header["of"], header["step"])
            self.guards = {k: v for k, v in self.guards.items() if k >= newest}
        elif kind in ("propose", "confirm", "release"):
            if header["of"] != self.generation:
                return
            for worker in self.running():
                self.agree(worker, header)

    def agree(self, worker, header):
        step = header["step"]
        if header["type"] == "propose" and not (worker.halt and worker.halt[1]):
            accepts = worker.step < step
            worker.halt = [step, False] if accepts else None
            worker.told["answered"] = {
                "step": step,
                "accepted": accepts,
                "begun": worker.step,
            }
        elif header["type"] == "confirm" and worker.halt and worker.halt[0] == step:
            worker.halt[1] = True
        elif header["type"] == "release" and worker.halt and not worker.halt[1]:
            worker.halt = None
