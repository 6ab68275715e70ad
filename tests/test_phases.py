"""What a change of devices says of itself."""

import pytest
from problems import consume

MOVED = ["derive", "compile", "plan", "move"]
CERTIFIED = [
    *("derive", "compile", "plan", "move", "compare", "batch"),
    *("old_step", "old_digest", "new_step", "new_digest"),
]


@pytest.mark.parametrize(
    ("certify", "names", "num_first"), [("always", CERTIFIED, 0), ("off", MOVED, 1)]
)
def test_the_phases_of_a_change_follow_one_another(make, certify, names, num_first):
    trainer, events = make(certify=certify)
    consume(trainer, 3, {1: 4})
    [change] = [event for event in events if event.name == "reconfigure"]
    phases = change.fields["phases"]
    assert [phase["name"] for phase in phases] == names
    edges = [phase[edge] for phase in phases for edge in ("start_s", "end_s")]
    assert edges == sorted(edges)
    assert edges[0] == 0
    # Between them, and at the end, there is next to nothing.
    assert change.duration_s - 0.2 < edges[-1] <= change.duration_s
    assert sum(p["end_s"] - p["start_s"] for p in phases) > change.duration_s - 0.2
    moved = change.fields["bytes_moved"]
    assert {p["name"]: p["bytes"] for p in phases if p["bytes"]} == {"move": moved}
    firsts = [event for event in events if event.name == "first_step"]
    assert [event.fields for event in firsts] == [{"step": 1}] * num_first
    for event in firsts:
        assert change.end_s <= event.start_s < event.end_s
