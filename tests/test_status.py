"""The status of a run: read whatever is told, drawn, found and asked for."""

import asyncio
import contextlib
import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from rich.cells import cell_len
from rich.console import Console
from statuses import json_values, make_status, odd_statuses

from shardkit.cluster.asking import Asker, Over, find_address, newest_run
from shardkit.cluster.status import Status
from shardkit.cluster.wire import Closed, Unanswered, WireError, accept
from shardkit.command.main import main
from shardkit.errors import ConfigError
from shardkit.report.status_table import render

ROOT = Path(__file__).parents[1]
TOKEN = "a secret"


def draw(status, width, **options):
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(render(status, **options))
    return out.getvalue()


def test_what_is_told_is_read_and_told_again():
    said = make_status()
    status = Status.from_json(json.loads(json.dumps(said)))
    assert status.to_json() == json.loads(json.dumps(said))
    assert status.hosts[1].workers[0].speed == 0.62
    assert status.recoveries[-1].phases[3].name == "form"


def test_what_is_missing_or_of_another_type_is_as_if_not_said():
    said = make_status(step="many", loss=True, hosts=[7, {"host": 3}], more="unknown")
    del said["snapshot"]
    status = Status.from_json(said)
    assert (status.step, status.loss, status.snapshot) == (None, None, None)
    assert [host.host for host in status.hosts] == ["?"]
    assert status.devices == 6


def test_numbers_that_json_lacks_survive():
    status = Status.from_json({"loss": float("nan"), "losses": [[1, float("inf")]]})
    text = json.dumps(status.to_json(), allow_nan=False)
    again = Status.from_json(json.loads(text))
    assert again.loss != again.loss
    assert again.losses == ((1, float("inf")),)


@pytest.mark.parametrize("said", [None, [], "status", 3])
def test_what_is_no_object_is_refused(said):
    with pytest.raises(ConfigError, match="expected a JSON object"):
        Status.from_json(said)


def test_what_a_terminal_would_obey_is_spelled_out():
    cause = "died: \x1b]0;title\x07\x1b[2J\nTraceback"
    recovery = {**make_status()["recoveries"][0], "cause": cause}
    status = Status.from_json(make_status(recoveries=[recovery], run="[red]x"))
    text = draw(status, 140)
    assert "\x1b" not in text
    assert "\\x1b[2J" in text
    # Markup of rich is text, too.
    assert "[red]x" in text


@settings(deadline=None)
@given(odd_statuses())
def test_nothing_that_is_told_breaks_a_viewer(said):
    status = Status.from_json(said)
    assert Status.from_json(status.to_json()).to_json() == status.to_json()
    for line in draw(status, 80, max_rows=3).splitlines():
        assert cell_len(line) <= 80


@settings(deadline=None)
@given(json_values)
def test_no_json_breaks_the_reader(said):
    with contextlib.suppress(ConfigError):
        draw(Status.from_json(said), 80)


@pytest.mark.parametrize("width", [80, 140])
def test_everything_fits(width):
    text = draw(Status.from_json(make_status()), width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    for part in (
        *("tiny-001", "running", "generation 3", "step 120 of 400", "loss 2.1034"),
        *("210 ms", "6 (fsdp=6)", "97.0 %", "step 119, 0.2 s old", "117 MiB"),
        *("parity, + 39.1 MiB (33 %)", "quarantined", "0.62×", "standby", "heard"),
        *("host-3 went 3 times and is kept out for 42 s", "host-3 was lost"),
        *("1.70 s", "back at step 118", "lost steps 1", "28.6 MiB", "first step 520"),
        *("form 800 ms", "waits for 2 more devices", "fetched 19.1 MiB"),
        *(["78.2 MiB + 26 MiB of 104 MiB"] if width == 140 else []),
        "predicted 313 MiB in all",
    ):
        assert part in text, part
    assert "…" not in text


def test_hosts_in_trouble_come_first_where_there_is_little_room():
    hosts = make_status()["hosts"]
    text = draw(Status.from_json(make_status(hosts=hosts)), 80, max_rows=2)
    assert "host-1 " in text
    assert "host-3 " in text
    assert "host-0 " not in text
    assert "and 2 more hosts" in text


def test_a_recovery_that_goes_on_and_a_run_that_has_not_begun():
    recovery = {**make_status()["recoveries"][0], "total_s": None}
    assert "not over yet" in draw(Status.from_json({"recoveries": [recovery]}), 80)
    assert "forming" in draw(Status.from_json({"run": "x", "state": "forming"}), 80)


class Supervisor:
    """Answers as a supervisor does, in a thread, on a socket that outlives it.

    Args:
        path: The run's directory.
        tell: Makes an answer of the number of the question, or None not to answer,
            or "break" to end the connection.
    """

    def __init__(self, path, tell, token=TOKEN):
        self._tell, self._token, self.asked = tell, token, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        (path / "cluster").mkdir(parents=True)
        address = {"address": f"127.0.0.1:{self.port}", "token": TOKEN}
        (path / "cluster" / "address.json").write_text(json.dumps(address))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        self._over = asyncio.Event()
        self._loop.run_until_complete(self._listen())
        self._loop.close()

    async def _listen(self):
        server = await asyncio.start_server(self._serve, sock=self._listening)
        await self._over.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _serve(self, reader, writer):
        try:
            link = await accept(reader, writer, self._token, 5)
            while True:
                assert (await link.receive()).header["type"] == "status"
                told = self._tell(self.asked)
                self.asked += 1
                if told == "break":
                    break
                if told is not None:
                    link.post({"type": "status", "status": told})
        except WireError:
            pass
        finally:
            writer.close()

    def close(self):
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join(10)


@pytest.fixture
def supervise(tmp_path):
    made = []

    def supervise(tell, name="tiny-001", **options):
        path = tmp_path / "runs" / name
        made.append(Supervisor(path, tell, **options))
        return path, made[-1]

    yield supervise
    for each in made:
        each.close()


def test_a_run_is_asked_again_and_again_over_one_connection(supervise):
    path, _ = supervise(lambda number: make_status(step=number))
    with Asker(find_address(path)) as asker:
        assert [asker.ask(5).step for _ in range(3)] == [0, 1, 2]


def test_a_supervisor_that_starts_again_is_waited_for(supervise):
    path, _ = supervise(lambda number: "break" if number < 2 else make_status())
    with Asker(find_address(path)) as asker:
        assert asker.ask(10).step == 120


def test_who_does_not_answer_is_named_in_time(supervise):
    path, _ = supervise(lambda number: None)
    begin = time.monotonic()
    with Asker(find_address(path)) as asker, pytest.raises(Unanswered, match=path.name):
        asker.ask(0.5)
    assert time.monotonic() - begin < 3


def test_a_connection_that_always_breaks_ends_in_time(supervise):
    path, _ = supervise(lambda number: "break")
    with Asker(find_address(path)) as asker, pytest.raises(Closed):
        asker.ask(1)


def test_a_run_that_is_over_is_told_from_one_that_is_silent(supervise):
    path, supervisor = supervise(lambda number: make_status())
    supervisor.close()
    begin = time.monotonic()
    with Asker(find_address(path)) as asker, pytest.raises(Over):
        asker.ask(20)
    assert time.monotonic() - begin < 5


def test_another_process_on_the_same_port_is_not_believed(supervise):
    path, _ = supervise(lambda number: make_status(), token="another")
    with Asker(find_address(path)) as asker, pytest.raises(WireError):
        asker.ask(2)


def test_the_directory_of_a_run_and_the_one_in_it_mean_the_same(supervise):
    path, _ = supervise(lambda number: make_status())
    assert find_address(path) == find_address(path / "cluster")
    assert find_address(path / "cluster").directory == path
    assert TOKEN not in repr(find_address(path))


def test_the_newest_run_is_taken(supervise):
    old, _ = supervise(lambda number: make_status(), "b-old")
    new, _ = supervise(lambda number: make_status(), "a-new")
    os.utime(old / "cluster" / "address.json", (1, 1))
    assert find_address(newest_run(new.parent)).directory == new


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"address": 3, "token": "x"}', '{"address": "x"}']
)
def test_a_damaged_address_is_named(tmp_path, text):
    (tmp_path / "address.json").write_text(text)
    with pytest.raises(ConfigError, match=r"address\.json"):
        find_address(tmp_path)


def test_the_command_shows_a_run(supervise, capsys, monkeypatch):
    path, _ = supervise(lambda number: make_status())
    monkeypatch.chdir(path.parents[1])
    assert main(["status"]) == 0
    assert "generation 3" in capsys.readouterr().out
    assert main(["status", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(make_status()))


def test_the_command_says_what_is_not_there(supervise, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["status", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["status"]) == 2
    assert "shardkit launch" in capsys.readouterr().err
    path, supervisor = supervise(lambda number: make_status())
    supervisor.close()
    assert main(["status", str(path), "--json"]) == 1
    out, errors = capsys.readouterr()
    assert not out
    assert "the run has ended" in errors
    assert errors.count("\n") == 1


def watch(path, until):
    """Runs the live table on a terminal; returns the exit code and what it showed."""
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "shardkit", "status", str(path)]
    env = {**os.environ, "COLUMNS": "100", "LINES": "40", "TERM": "xterm"}
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=ROOT, env=env
    ) as process:
        os.close(terminal)
        shown = b""
        # On Linux a terminal whose other end is gone is an error.
        with contextlib.suppress(OSError):
            while data := os.read(master, 1 << 16):
                shown += data
                until(process, shown)
        os.close(master)
        return process.wait(30), shown.decode()


def test_the_live_table_ends_with_the_run(supervise):
    def tell(number):
        state = "ended" if number >= 3 else "running"
        return make_status(step=200 + number, state=state)

    path, _ = supervise(tell)
    code, shown = watch(path, lambda process, shown: None)
    assert code == 0
    assert "step 200 of 400" in shown
    assert "step 203 of 400" in shown
    assert shown.rindex("ended") > shown.rindex("running")


def test_ctrl_c_leaves_the_live_table(supervise):
    path, _ = supervise(lambda number: make_status())

    sent = []

    def until(process, shown):
        if b"step 120" in shown and not sent:
            sent.append(process.send_signal(signal.SIGINT))

    code, shown = watch(path, until)
    assert code == 0
    assert "Traceback" not in shown


def test_the_live_table_outlives_a_supervisor_that_is_started_again(supervise):
    def tell(number):
        return {1: "break", 4: make_status(state="ended")}.get(number, make_status())

    path, supervisor = supervise(tell)
    code, _ = watch(path, lambda process, shown: None)
    assert code == 0
    assert supervisor.asked == 5
