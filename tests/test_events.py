import dataclasses
import time

import pytest

from shardkit.events import Event, EventLog


def recorded():
    events, log = [], EventLog()
    log.subscribe(events.append)
    return events, log


def test_emit_takes_no_time():
    events, log = recorded()
    before = time.monotonic()
    log.emit("notice", message="hello", count=3)
    [event] = events
    assert event.name == "notice"
    assert event.fields == {"message": "hello", "count": 3}
    assert before <= event.start_s == event.end_s <= time.monotonic()
    assert event.duration_s == 0


def test_phase_spans_its_block_and_takes_fields_from_both_ends():
    events, log = recorded()
    with log.phase("move", leaves=2) as fields:
        assert not events
        fields["bytes"] = 44
        time.sleep(0.01)
    [event] = events
    assert event.fields == {"leaves": 2, "bytes": 44}
    assert event.end_s - event.start_s == event.duration_s >= 0.01


def test_phases_nest_and_report_as_they_end():
    events, log = recorded()
    with log.phase("outer"), log.phase("inner"):
        log.emit("fact")
    assert [event.name for event in events] == ["fact", "inner", "outer"]
    fact, inner, outer = events
    assert outer.start_s <= inner.start_s <= fact.start_s
    assert fact.end_s <= inner.end_s <= outer.end_s


def test_listeners_are_called_in_order_and_from_when_they_came():
    log, seen = EventLog(), []
    log.subscribe(lambda event: seen.append(("first", event.name)))
    log.emit("a")
    log.subscribe(lambda event: seen.append(("second", event.name)))
    log.emit("b")
    assert seen == [("first", "a"), ("first", "b"), ("second", "b")]


def test_logs_do_not_share_listeners():
    events, _ = recorded()
    EventLog().emit("elsewhere")
    assert events == []


def test_a_failed_block_raises_its_own_error():
    _, log = recorded()
    with pytest.raises(RuntimeError, match="inside"), log.phase("move"):
        raise RuntimeError("inside")


def test_events_cannot_be_changed():
    event = Event(name="a", start_s=0.0, end_s=1.0, fields={}, thread="MainThread")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.name = "b"  # type: ignore[misc]
