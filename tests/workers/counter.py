"""A stand-in for a trainer: a state advanced in steps by all processes together.

Each step adds up what every process makes of the step's number, through process 0, so
that a peer that is gone or frozen holds up the others as a collective would. The state
is the same in all processes. Arguments: JSON.
"""

import hashlib
import json
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from workers import images

from shardkit.cluster import join

SIZE = 64
HALT_S = 30
MASK = (1 << 64) - 1


class Ring:
    """Sums over all processes, by TCP, at the address that JAX would coordinate at."""

    def __init__(self, assignment):
        self.count, self.index = assignment.num_processes, assignment.process_index
        host, port = assignment.coordinator.split(":")
        if self.index == 0:
            server = socket.create_server((host, int(port)))
            self.peers = [server.accept()[0] for _ in range(self.count - 1)]
        else:
            self.peers = [self._dial((host, int(port)))]
        for peer in self.peers:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _dial(self, address):
        while True:
            try:
                return socket.create_connection(address)
            except ConnectionRefusedError:
                time.sleep(0.002)

    def _read(self, peer):
        data = b""
        while len(data) < 8 * SIZE:
            part = peer.recv(8 * SIZE - len(data))
            if not part:
                raise RuntimeError("a peer is gone")
            data += part
        return struct.unpack(f"{SIZE}Q", data)

    def sum(self, values):
        if self.index == 0:
            for peer in self.peers:
                values = [
                    (a + b) & MASK
                    for a, b in zip(values, self._read(peer), strict=True)
                ]
            for peer in self.peers:
                peer.sendall(struct.pack(f"{SIZE}Q", *values))
            return values
        self.peers[0].sendall(struct.pack(f"{SIZE}Q", *values))
        return list(self._read(self.peers[0]))


def part(step, microbatch):
    return [
        (step * 6364136223846793005 + microbatch * 1442695040888963407 + i * i) & MASK
        for i in range(SIZE)
    ]


def advance(state, step, ring, num_microbatches=12):
    mine = [0] * SIZE
    for microbatch in range(ring.index, num_microbatches, ring.count):
        mine = [
            (a + b) & MASK for a, b in zip(mine, part(step, microbatch), strict=True)
        ]
    total = ring.sum(mine)
    return [
        (a * 2862933555777941757 + b) & MASK for a, b in zip(state, total, strict=True)
    ]


def restore(member, out):
    resume = member.assignment.resume
    if resume is not None:
        return resume.step, images.restore(member)
    saved = out / "checkpoint.json"
    if saved.exists():
        values = json.loads(saved.read_text())
        return values["step"], values["state"]
    return 0, [1] * SIZE


def save(out, step, state):
    draft = out / ".draft"
    draft.write_text(json.dumps({"step": step, "state": state}))
    draft.replace(out / "checkpoint.json")


def note(out, **fields):
    with (out / "notes.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.monotonic(), **fields}) + "\n")


def misbehave(options, assignment, step):
    """Does what a test asks for, at its step."""
    if step != options.get("at") or assignment.generation > options.get("until", 99):
        return
    if assignment.process_index == options.get("process", 0):
        if options.get("stops_agent"):
            os.kill(os.getppid(), signal.SIGSTOP)
        if "error" in options:
            raise ValueError(options["error"])
        if "exit" in options:
            print("this is the end", file=sys.stderr)
            sys.exit(options["exit"])


def main():
    options = json.loads(sys.argv[1])
    out = Path(options["out"])
    if "start_exit" in options:
        print("a config that is none", file=sys.stderr)
        sys.exit(options["start_exit"])
    member = join(preload=lambda: time.sleep(options.get("preload_s", 0)))
    if member is None:
        sys.exit("not in a cluster")
    assignment = member.assignment
    note(
        out,
        what="begin",
        pid=os.getpid(),
        parent=os.getppid(),
        generation=assignment.generation,
        process=assignment.process_index,
        host=assignment.host,
        num_processes=assignment.num_processes,
        num_devices=assignment.num_devices,
        offset=assignment.device_offset,
        local=assignment.num_local_devices,
        silence_s=member.deadlines.silence_s,
    )
    member.progress(-1, "restore")
    step, state = restore(member, out)
    member.progress(step, "step")
    ring, mine = Ring(assignment), images.Images(assignment, SIZE, options)
    while step < options["steps"]:
        if member.boundary(step) == "halt":
            if member.leaving():
                member.progress(step, "save")
                if assignment.process_index == 0:
                    save(out, step, state)
                member.halted(step)
                sys.exit(75)
            member.wait_protected(step, HALT_S)
            member.halted(step)
            sys.exit(0)
        misbehave(options, assignment, step)
        state = advance(state, step, ring)
        step += 1
        time.sleep(options.get("pause_s", 0.02))
        member.progress(step, "step")
        slot = member.reserve(mine.num_bytes)
        mine.write(slot.memory, step, state)
        member.commit(slot, step)
        if options.get("times"):
            since_s = time.monotonic()
            assert member.wait_protected(step, HALT_S)
            note(out, what="protected", step=step, s=time.monotonic() - since_s)
        member.progress(step, "step", loss=1.0 / step)
        if assignment.process_index == 0:
            note(out, what="step", step=step, generation=assignment.generation)
    digest = hashlib.sha256(struct.pack(f"{SIZE}Q", *state)).hexdigest()
    if assignment.process_index == 0:
        (out / "digest").write_text(digest)
        print(f"digest {digest}")
    member.finished({"digest": digest})


if __name__ == "__main__":
    main()
