"""A worker's side, with a line that says what a test wants."""

import json
import threading
from pathlib import Path

import pytest
from clusters import ASSIGNMENT

from shardkit.cluster import Assignment, ImageRef, Member, Resume
from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.fetching import Span
from shardkit.cluster.wire import (
    Closed,
    Unanswered,
)
from shardkit.errors import ClusterError


class Line:
    """A member's line to an agent that answers as a test says."""

    peer = "the agent"

    def __init__(self, answers=()):
        self.sent, self.answers = [], dict(answers)
        self.waiting = []
        self.arrived = threading.Condition()

    def send(self, header):
        with self.arrived:
            self.sent.append(header)
            answer = self.answers.get(header["type"])
            if answer is not None:
                self.waiting.append({**answer, "id": header["id"]})
            self.arrived.notify_all()

    def say(self, **header):
        with self.arrived:
            self.waiting.append(header)
            self.arrived.notify_all()

    def receive(self, **_):
        from shardkit.cluster.wire import Frame

        with self.arrived:
            self.arrived.wait_for(lambda: self.waiting)
            header = self.waiting.pop(0)
        if header["type"] == "gone":
            raise Closed("gone")
        return Frame(header, b"")

    def close(self):
        self.say(type="gone")


@pytest.fixture
def member():
    made = []

    def make(answers=(), assignment=ASSIGNMENT, **deadlines):
        line, lost = Line(answers), threading.Event()
        values = {"request_s": 0.1, "slot_s": 0.2, "halt_s": 0.2}
        limits = Deadlines(**{**values, **deadlines})
        found = Member(line, assignment, limits, "token", on_lost=lost.set)
        made.append(found)
        return found, line, lost

    yield make
    for found in made:
        found.close()


def answered(line):
    def look():
        return [x for x in line.sent if x["type"] == "answered"]

    with line.arrived:
        assert line.arrived.wait_for(look, 5)
    return look()[-1]


def test_a_boundary_answers_at_once_and_waits_only_for_a_halt(member):
    found, line, _ = member(halt_s=5)
    assert found.boundary(0) == found.boundary(1) == "go"
    line.say(type="propose", step=1, leave=False)
    assert answered(line) == {
        "type": "answered",
        "step": 1,
        "accepted": False,
        "begun": 1,
    }
    line.sent.clear()
    line.say(type="propose", step=3, leave=True)
    assert answered(line)["accepted"]
    assert found.boundary(2) == "go"
    threading.Timer(0.05, line.say, (), {"type": "confirm", "step": 3}).start()
    assert not found.leaving()
    assert found.boundary(3) == "halt"
    assert found.leaving()


def test_a_halt_that_is_taken_back_is_gone_on_from(member):
    found, line, _ = member(halt_s=5)
    line.say(type="propose", step=0, leave=False)
    assert answered(line)["accepted"]
    threading.Timer(0.05, line.say, (), {"type": "release", "step": 0}).start()
    assert found.boundary(0) == "go"


def test_a_halt_that_nobody_decides_ends_in_an_error(member):
    found, line, _ = member()
    line.say(type="propose", step=0, leave=False)
    assert answered(line)["accepted"]
    with pytest.raises(Unanswered, match="whether all processes halt before step 0"):
        found.boundary(0)


def test_memory_that_does_not_come_is_said_to_be_missing(member):
    found, line, _ = member()
    with pytest.raises(
        Unanswered, match="did not answer with memory for a snapshot of"
    ):
        found.reserve(100)
    found, other, _ = member({"reserve": {"type": "refused", "why": "no memory"}})
    with pytest.raises(ClusterError, match="the agent: no memory"):
        found.reserve(100)
    # That costs a snapshot. Who goes on has not failed, and is not the cause of
    # whatever ends it later.
    assert "failed" not in {x["type"] for x in line.sent + other.sent}


def test_protection_of_another_generation_does_not_count(member):
    found, line, _ = member()
    line.say(type="protected", of=2, step=9)
    line.say(type="protected", of=3, step=4)
    assert found.wait_protected(4, 5)
    assert found.protected_step == 4
    assert not found.wait_protected(5, 0.05)


def test_what_is_stale_or_without_an_agent_ends(member):
    _, line, lost = member()
    line.say(type="stale")
    assert lost.wait(5)
    _, line, lost = member()
    line.say(type="gone")
    assert lost.wait(5)


def test_progress_never_waits_and_the_newest_counts(member):
    found, line, _ = member()
    for step in range(1000):
        found.progress(step, "step", loss=0.5)
    with line.arrived:
        told = {"type": "progress", "step": 999, "phase": "step"}
        told["facts"] = {"loss": 0.5}
        assert line.arrived.wait_for(lambda: told in line.sent, 5)
    assert len(line.sent) < 200


def test_images_are_read_within_their_bounds(member, segments):
    name = "image"
    segments.create(name, 16).close()
    segments.path(name).write_bytes(bytes(range(16)))
    found, _, _ = member({"where": {"type": "file", "path": str(segments.path(name))}})
    ref = ImageRef(host="host-0", address="", name=name, process=0, num_bytes=16)
    spans = [Span(ref, 3, 4), Span(ref, 0, 1)]
    assert [bytes(x) for x in found.fetch_all(spans)] == [bytes([3, 4, 5, 6]), b"\0"]
    with pytest.raises(ClusterError, match="bytes 10 to 17 were asked for, it has 16"):
        found.fetch_all([Span(ref, 10, 7)])


def test_what_was_fetched_is_told(member):
    found, line, _ = member()
    found.restored()
    assert {"type": "restored", "fetched_bytes": 0} in line.sent


def test_memory_of_what_was_gone_on_from_is_given_back(member, segments):
    segments.create("image", 16).close()
    path = str(segments.path("image"))
    answers = {"where": {"type": "file", "path": path}}
    found, _, _ = member(answers | {"reserve": {"type": "refused", "why": "no"}})
    ref = ImageRef(host="host-0", address="", name="image", process=0, num_bytes=16)
    assert bytes(found.fetch_all([Span(ref, 0, 2)])[0]) == bytes(2)
    assert path in Path("/proc/self/maps").read_text()
    with pytest.raises(ClusterError):
        found.reserve(16)
    assert path not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("loss", [float("nan"), {1}])
def test_what_cannot_be_told_is_refused_where_it_is_said(member, loss):
    found, line, _ = member()
    with pytest.raises((TypeError, ValueError), match="JSON"):
        found.progress(1, "step", loss=loss)
    found.progress(2, "step", loss=1.0)
    with line.arrived:
        assert line.arrived.wait_for(
            lambda: any(x.get("step") == 2 for x in line.sent), 5
        )


def test_assignments_survive_json():
    import dataclasses

    ref = ImageRef(host="h", address="a:1", name="n", process=1, num_bytes=5)
    one = dataclasses.replace(
        ASSIGNMENT, resume=Resume(step=4, images=(ref, ref)), quotas=(1, 2)
    )
    assert Assignment.from_json(json.loads(json.dumps(one.to_json()))) == one
