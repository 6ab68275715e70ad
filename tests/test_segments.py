"""Memory that outlives its process: whose it is, and that all of it is there."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shardkit.errors import ConfigError, RestoreError, SaveError
from shardkit.snapshot import segments as module
from shardkit.snapshot.segments import (
    Segments,
    default_directory,
    list_runs,
    reclaim,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def segments(tmp_path):
    return Segments("r1", "host-0", tmp_path)


@pytest.fixture
def start(tmp_path):
    """Runs a program that is killed at the end; returns it once it has said a line."""
    started = []

    def start(program):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


MAKE = """
import sys, time
from pathlib import Path
from shardkit.snapshot.segments import Segments
made = Segments("r1", "host-0", Path(sys.argv[1])).create("slot0", 100)
made.memory[:5] = b"still"
print("ready", flush=True)
time.sleep(60)
"""


def test_what_a_killed_process_wrote_is_there(segments, start):
    process = start(MAKE)
    with segments.open("slot0") as found:
        found.memory[5:8] = b"!!!"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert bytes(found.memory[:8]) == b"still!!!"
    assert segments.names() == ["slot0"]
    with segments.open("slot0") as again:
        assert bytes(again.memory) == b"still!!!" + bytes(92)


def test_only_what_nobody_maps_is_reclaimed(segments, start, tmp_path):
    other = Segments("r2", "host-0", tmp_path)
    other.create("a", 10).close()
    process = start(MAKE)
    segments.create("second", 10).close()
    # Run r1 is alive: the other segment of it stays too.
    assert reclaim(directory=tmp_path) == ["shardkit-r2-host-0-a"]
    assert segments.names() == ["second", "slot0"]
    process.kill()
    process.wait()
    assert len(reclaim(directory=tmp_path)) == 2
    assert os.listdir(tmp_path) == []


def test_what_was_just_made_is_not_reclaimed_yet(tmp_path):
    segments = Segments("r2", "host-0", tmp_path)
    segments.create("a", 10).close()
    os.utime(segments.path("a"), (0, 0))
    segments.create("b", 10).close()
    assert reclaim(directory=tmp_path, idle_s=60) == []
    os.utime(segments.path("b"), (0, 0))
    assert len(reclaim(directory=tmp_path, idle_s=60)) == 2


def test_reclaiming_a_run_takes_all_its_hosts_and_nothing_else(segments, tmp_path):
    kept = segments.create("a", 10)
    Segments("r1", "b", tmp_path).create("a", 20).close()
    Segments("r10", "b", tmp_path).create("a", 20).close()
    (tmp_path / "shardkit-r1-notes").write_text("not a segment's name")
    (tmp_path / "shardkit-r1-h-link").symlink_to(tmp_path / "x")
    assert list_runs(tmp_path) == {"r1": 30, "r10": 20}
    assert reclaim("r1", tmp_path) == ["shardkit-r1-b-a", "shardkit-r1-host-0-a"]
    assert list_runs(tmp_path) == {"r10": 20}
    kept.memory[:] = b"unlinked!!"  # Whoever maps it keeps it.
    kept.close()


def test_losing_a_host_loses_its_segments_alone(segments, tmp_path):
    other = Segments("r1", "host-0-b", tmp_path)
    for one in (segments, other):
        one.create("a", 10).close()
        one.create("b.1", 10).close()
    assert segments.unlink_all() == ["a", "b.1"]
    segments.unlink("a")
    assert (segments.names(), other.names()) == ([], ["a", "b.1"])


def test_a_segment_is_of_zeros_and_private(segments, tmp_path):
    before = os.umask(0)
    try:
        segments.create("a", 5000).close()
    finally:
        os.umask(before)
    path = tmp_path / "shardkit-r1-host-0-a"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == bytes(5000)
    # All its memory is there already.
    assert path.stat().st_blocks * 512 >= 5000


def test_there_is_one_of_each_name(segments):
    segments.create("a", 10).close()
    with pytest.raises(SaveError, match="is there already"):
        segments.create("a", 10)
    assert segments.names() == ["a"]


def test_closing_twice_or_with_arrays_left(segments):
    segment = segments.create("a", 64)
    array = np.frombuffer(segment.memory, np.uint8)
    segment.close()
    assert array.sum() == 0
    del array
    segment.close()
    segment.close()


@pytest.mark.parametrize(
    "name",
    ["", ".." + "/x", "/etc/passwd", "a-b", "a\0", "a\n", "é", "x" * 65, None, 7],
)
def test_names_stay_where_they_are_put(segments, tmp_path, name):
    for attempt in (
        lambda: segments.create(name, 10),
        lambda: segments.open(name),
        lambda: segments.unlink(name),
        lambda: Segments(name, "h", tmp_path),
    ):
        with pytest.raises(ConfigError, match="expected the name of a"):
            attempt()
    with pytest.raises(ConfigError, match="host"):
        Segments("r", "a/b", tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_longest_names_fit(tmp_path):
    segments = Segments("r" * 64, "h" * 100, tmp_path)
    segments.create("n" * 64, 10).close()
    assert segments.names() == ["n" * 64]


def replace_by(path, how):
    if how == "missing":
        return "No such file"
    if how == "folder":
        path.mkdir()
        return "Is a directory"
    if how == "fifo":
        os.mkfifo(path, 0o600)
        return "something that is no file"
    real = path.with_name("real")
    real.write_bytes(b"x" * 10)
    real.chmod(0o600)
    if how == "symlink":
        path.symlink_to(real)
        return "symbolic link"
    if how == "hard link":
        path.hardlink_to(real)
        return "a second name"
    real.rename(path)
    if how == "mode":
        path.chmod(0o660)
        return "mode 0660"
    assert how == "empty"
    path.write_bytes(b"")
    return "an empty one"


@pytest.mark.parametrize(
    "how", ["missing", "folder", "fifo", "symlink", "hard link", "mode", "empty"]
)
def test_what_is_no_segment_is_refused(segments, tmp_path, how):
    expected = replace_by(tmp_path / "shardkit-r1-host-0-a", how)
    with pytest.raises(RestoreError, match=expected):
        segments.open("a")


def test_another_users_segments_are_refused_and_left_alone(segments, monkeypatch):
    segments.create("a", 10).close()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(RestoreError, match="one of user"):
        segments.open("a")
    assert segments.names() == []
    assert reclaim("r1", segments.directory) == []


def test_no_room_is_one_clear_error_and_leaves_nothing(segments, monkeypatch):
    with pytest.raises(SaveError, match="expected room for") as found:
        segments.create("a", 1 << 60)
    assert found.value.errno == errno.ENOSPC

    def full(fd, offset, num_bytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    # It may also fill up after it was looked at.
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SaveError, match="shm-size"):
        segments.create("a", 100)
    assert os.listdir(segments.directory) == []


def test_systems_that_cannot_allocate_get_zeros(segments, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(module, "_ZEROS_BYTES", 1000)
    with segments.create("a", 2500) as made:
        assert bytes(made.memory) == bytes(2500)


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_a_segment_has_bytes(segments, num_bytes):
    with pytest.raises(ConfigError, match="1 byte or more"):
        segments.create("a", num_bytes)


def test_the_default_directory_can_be_written():
    directory = default_directory()
    run = f"test{os.getpid()}"
    segments = Segments(run, "h")
    try:
        with segments.create("a", 1 << 20) as made:
            assert made.num_bytes == 1 << 20
        assert segments.directory == directory
    finally:
        assert reclaim(run) == [f"shardkit-{run}-h-a"]
