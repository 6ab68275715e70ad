"""Whether snapshots keep up with the steps."""

from shardkit.snapshot.pace import Pace


def notes(stalls_s, every=1, between_s=1.0, copy_s=0.9):
    pace = Pace(every)
    return [
        pace.note(between_s * i, stall_s=stall_s, copy_s=copy_s)
        for i, stall_s in enumerate(stalls_s)
    ]


def test_what_keeps_up_is_not_told():
    assert not any(notes([0.09] * 50))
    # One that waits, as the memory is new, is no rule.
    assert not any(notes([0.5, 0.5, 0.5, 0.0] * 20))
    # Nor is a wait that nobody would feel.
    assert not any(notes([0.001] * 50, between_s=0.002))


def test_what_does_not_is_told_once_with_what_would():
    said = [text for text in notes([0.5] * 50, every=2) if text]
    assert len(said) == 1
    # A step takes (1 - 0.5) / 2 s.
    assert "snapshot.every=4" in said[0]


def test_more_than_now_is_proposed():
    assert "snapshot.every=6" in "".join(notes([0.2] * 50, every=5, copy_s=0.1))
