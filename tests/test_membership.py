import errno
import json
import os
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.errors import MembershipError
from shardkit.membership import Change, Lost, combine, scripted, signals, watch_file

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


def play(source, steps, num_devices):
    """Follows a source as a run does; returns `(devices, lost)` at every step."""
    history = []
    for step in steps:
        change = source.poll(step, num_devices) or Change()
        moves = change.num_devices not in (None, num_devices)
        num_devices = change.num_devices or num_devices
        history.append((num_devices, moves and change.lost))
    return history


def noticed(num_devices):
    return Change(num_devices, grace_s=30.0)


def test_a_script_holds_from_each_step_on():
    source = scripted({2: 6, 4: Lost(3), 6: 8})
    history = play(source, range(8), 8)
    assert [count for count, _ in history] == [8, 8, 6, 6, 3, 3, 8, 8]
    assert [step for step, (_, lost) in enumerate(history) if lost] == [4]


scripts = st.dictionaries(
    st.integers(0, 12), st.integers(1, 8) | st.builds(Lost, st.integers(1, 8))
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(script=scripts, start=st.integers(0, 12))
def test_a_resumed_script_is_where_an_uninterrupted_one_would_be(script, start):
    whole = play(scripted(script), range(13), 8)
    resumed = play(scripted(script), range(start, 13), 8)
    assert [n for n, _ in resumed] == [n for n, _ in whole[start:]]
    # What was lost in the past is not lost again.
    lost = [start + i for i, (_, lost) in enumerate(resumed) if lost]
    assert all(isinstance(script.get(step), Lost) for step in lost)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(script=scripts, back_to=st.integers(0, 12), reached=st.integers(0, 12))
def test_a_run_that_went_back_keeps_its_devices_and_loses_nothing_twice(
    script, back_to, reached
):
    source = scripted(script)
    count = play(source, range(reached + 1), 8)[-1][0]
    again = play(source, range(min(back_to, reached), reached + 1), count)
    assert again == [(count, False)] * len(again)


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ({-1: 4}, "-1: 4"),
        ({3: 0}, "3: 0"),
        ({3: 9}, "3: 9"),
        ({3: Lost(9), 4: -1, 5: 8}, "3: 9, 4: -1"),
    ],
)
def test_an_impossible_script_is_refused_with_all_that_is_wrong(script, found):
    with pytest.raises(MembershipError, match=found):
        scripted(script).check(8)
    scripted({0: 1, 5: Lost(8)}).check(8)


def test_a_script_is_copied():
    script = {3: 4}
    source = scripted(script)
    script[3] = 99
    assert source.poll(3, 8) == Change(4)


def test_a_file_asks_once_per_writing(tmp_path):
    path = tmp_path / "devices.json"
    source = watch_file(path)
    source.check(8)
    assert source.poll(0, 8) is None
    path.write_text('{"num_devices": 6}')
    assert source.poll(1, 8) == noticed(6)
    assert source.poll(2, 6) is None
    path.write_text('{"num_devices": 3, "lost": true}')
    assert source.poll(3, 6) == Change(3, lost=True)
    path.unlink()
    assert source.poll(4, 3) is None
    assert not source.leaving()


def test_a_file_and_who_watches_it_say_how_long_a_change_may_wait(tmp_path):
    path = tmp_path / "devices.json"
    source = watch_file(path, grace_s=7)
    for step, (text, grace_s) in enumerate(
        [
            ('{"num_devices": 5}', 7),
            ('{"num_devices": 4, "grace_s": 0}', 0),
            ('{"num_devices": 3, "grace_s": 0.25}', 0.25),
            # What is lost waits for nobody.
            ('{"num_devices": 2, "grace_s": 9, "lost": true}', 0),
        ]
    ):
        path.write_text(text)
        change = source.poll(step, 8)
        assert (change.num_devices, change.grace_s) == (5 - step, grace_s)


@pytest.mark.parametrize("grace_s", [-1, "3", None, True, float("nan"), float("inf")])
def test_what_is_no_time_is_refused(tmp_path, grace_s):
    for make in (signals, lambda **options: watch_file(tmp_path, **options)):
        with pytest.raises(MembershipError, match="grace_s: expected a number"):
            make(grace_s=grace_s)


def test_every_torn_request_is_refused_once_and_then_followed(tmp_path):
    path, request = tmp_path / "devices.json", '{"num_devices": 12, "lost": false}'
    for end in range(len(request)):
        source = watch_file(path)
        path.write_text(request[:end])
        with pytest.raises(MembershipError, match="half-written"):
            source.poll(0, 8)
        assert source.poll(1, 8) is None
        path.write_text(request)
        assert source.poll(2, 8) == noticed(12)


@pytest.mark.parametrize(
    "request_",
    [
        "",
        "6",
        "null",
        "[6]",
        '"num_devices"',
        "{}",
        '{"num_devices": "6"}',
        '{"num_devices": 6.0}',
        '{"num_devices": true}',
        '{"num_devices": null}',
        '{"num_devices": NaN}',
        '{"num_devices": [6]}',
        '{"devices": 6}',
        '{"num_devices": 6, "lots": true}',
        '{"num_devices": 6, "lost": "false"}',
        '{"num_devices": 6, "lost": 1}',
        '{"num_devices": 6, "lost": null}',
        '{"num_devices": 6, "grace_s": "5"}',
        '{"num_devices": 6, "grace_s": -1}',
        '{"num_devices": 6, "grace_s": true}',
        '{"num_devices": 6, "grace_s": NaN}',
        '{"num_devices": 6, "grace_s": Infinity}',
    ],
)
def test_a_wrong_request_is_shown_to_who_wrote_it(tmp_path, request_):
    path = tmp_path / "devices.json"
    path.write_text(request_)
    with pytest.raises(MembershipError) as caught:
        watch_file(path).poll(0, 8)
    assert str(path) in str(caught.value)
    assert repr(request_) in str(caught.value)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(content=st.binary(max_size=40))
def test_no_content_of_a_file_raises_anything_else(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("watched") / "devices.json"
    path.write_bytes(content)
    with pytest.raises(MembershipError):
        watch_file(path).poll(0, 8)


def unreadable_paths(directory):
    """Kind → a path where there is something that cannot be read."""
    (directory / "file").write_text("{}")
    (directory / "loop").symlink_to(directory / "loop")
    (directory / "directory").mkdir()
    os.mkfifo(directory / "fifo")
    return {
        "directory": directory / "directory",
        "fifo": directory / "fifo",
        "under a file": directory / "file" / "devices.json",
        "loop": directory / "loop",
        "long name": directory / ("x" * 300),
        "null byte": directory / "x\0y",
    }


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "kind",
    ["directory", "fifo", "under a file", "loop", "long name", "null byte"],
)
def test_what_cannot_be_read_is_told_once(tmp_path, kind):
    path = unreadable_paths(tmp_path)[kind]
    source = watch_file(path)
    source.check(8)
    with pytest.raises(MembershipError) as caught:
        source.poll(0, 8)
    assert str(path) in str(caught.value)
    assert source.poll(1, 8) is None


def test_a_directory_that_becomes_a_file_is_followed(tmp_path):
    path = tmp_path / "devices.json"
    source = watch_file(path)
    for step in (0, 10):
        path.mkdir()
        with pytest.raises(MembershipError, match="not a regular file"):
            source.poll(step, 8)
        path.rmdir()
        assert source.poll(step + 1, 8) is None
    path.write_text('{"num_devices": 6}')
    assert source.poll(20, 8) == noticed(6)


def test_a_file_that_may_not_be_read_is_read_once_it_may(tmp_path, monkeypatch):
    path = tmp_path / "devices.json"
    path.write_text('{"num_devices": 6}')
    source = watch_file(path)

    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        with pytest.raises(MembershipError, match="Permission denied"):
            source.poll(0, 8)
        assert source.poll(1, 8) is None
    # Neither its time nor its size has changed.
    assert source.poll(2, 8) == noticed(6)
    assert source.poll(3, 6) is None


def test_endless_nesting_is_wrong_content(tmp_path):
    path = tmp_path / "devices.json"
    path.write_text("[" * 100_000)
    with pytest.raises(MembershipError, match="half-written"):
        watch_file(path).poll(0, 8)


def test_a_file_moved_into_place_is_a_new_request(tmp_path):
    path, other = tmp_path / "devices.json", tmp_path / "new.json"
    source = watch_file(path)
    for step, count in enumerate((6, 5, 4)):
        other.write_text(json.dumps({"num_devices": count}))
        # The same size at the same time, as a coarse clock would have it.
        os.utime(other, ns=(step, 10**18 + step))
        other.rename(path)
        assert source.poll(step, 8) == noticed(count)


@pytest.fixture
def handlers():
    """Handlers of the test's own, whose calls are counted."""
    calls = []
    before = {n: signal.signal(n, lambda n, _: calls.append(n)) for n in NUMBERS}
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


def test_signals_ask_for_more_fewer_and_leaving(handlers):
    source = signals()
    stop = source.start()
    try:
        assert source.poll(0, 8) is None
        send(signal.SIGUSR1)
        assert source.poll(1, 8) == noticed(7)
        assert source.poll(2, 7) is None
        for _ in range(3):
            send(signal.SIGUSR1)
        send(signal.SIGUSR2)
        assert source.poll(3, 7) == noticed(5)
        send(signal.SIGUSR1)
        send(signal.SIGUSR2)
        assert source.poll(4, 5) is None
        assert not source.leaving()
        send(signal.SIGTERM)
        assert source.leaving()
        assert source.poll(5, 5) == Change(leave=True)
    finally:
        stop()
    assert handlers == []


@pytest.mark.parametrize("kind", ["function", signal.SIG_IGN, signal.SIG_DFL])
def test_signals_give_the_handlers_back(handlers, kind):
    if kind != "function":
        for number in NUMBERS:
            signal.signal(number, kind)
    before = [signal.getsignal(number) for number in NUMBERS]
    source = signals()
    assert [signal.getsignal(number) for number in NUMBERS] == before
    stop = source.start()
    assert all(signal.getsignal(n) not in before for n in NUMBERS)
    stop()
    assert [signal.getsignal(number) for number in NUMBERS] == before
    if kind == "function":
        send(signal.SIGUSR1)
        assert handlers == [signal.SIGUSR1]
        assert source.poll(0, 8) is None


def test_combined_sources_start_and_stop_together(handlers):
    before = [signal.getsignal(number) for number in NUMBERS]
    inner, outer = signals(), signals()
    source = combine(inner, scripted({}), outer)
    stop = source.start()
    send(signal.SIGTERM)
    # The last that started hears a signal; one is enough to leave.
    assert not inner.leaving()
    assert outer.leaving()
    assert source.leaving()
    stop()
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_signals_need_the_main_thread(handlers):
    errors = []

    def start():
        try:
            signals().start()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert len(errors) == 1


class Asks:
    """A source that always asks for the same."""

    def __init__(self, change):
        self.change, self.num_polls = change, 0

    def poll(self, step, num_devices):
        self.num_polls += 1
        return self.change


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], None),
        ([None, None], None),
        ([Change(4), None], Change(4)),
        ([Change(4), Change(6)], Change(6)),
        ([Change(4), Change(8)], Change(4)),
        ([Change(4, lost=True), Change(6)], Change(6)),
        ([Change(4, lost=True), Change(8)], Change(4, lost=True)),
        ([Change(8), Change()], None),
        ([Change(leave=True), Change(6)], Change(leave=True)),
        ([Change(6), Change(leave=True)], Change(leave=True)),
    ],
)
def test_leaving_comes_first_then_the_last_that_moves(changes, expected):
    sources = [Asks(change) for change in changes]
    assert combine(*sources).poll(0, 8) == expected
    # Each is asked each time, so that none has a stale request waiting.
    assert all(source.num_polls == 1 for source in sources)


def test_combined_sources_are_all_checked():
    with pytest.raises(MembershipError, match="9"):
        combine(scripted({0: 4}), scripted({0: 9})).check(8)


def test_a_source_in_trouble_does_not_keep_the_others_from_being_heard(tmp_path):
    membership = combine(scripted({0: 4}), watch_file(tmp_path))
    assert membership.poll(0, 8) == Change(num_devices=4)
    # Told once there is nothing else to do.
    with pytest.raises(MembershipError, match="not a regular file"):
        membership.poll(1, 4)
    assert membership.poll(2, 4) is None
