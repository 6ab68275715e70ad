"""How a process that a cluster has started becomes part of it.

Owns `join`, which all of a user's program stands behind. Invariants: without a cluster
it does nothing; a standby has imported what it needs and taken no device.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from shardkit.cluster.channel import Channel
from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.member import Member
from shardkit.cluster.processes import die_with_parent
from shardkit.cluster.records import Assignment
from shardkit.cluster.wire import WireError
from shardkit.errors import ClusterError

__all__ = ["join"]


def join(
    preload: Callable[[], Any] | None = None,
    prepare: Callable[[Assignment], Any] | None = None,
) -> Member | None:
    """Joins the cluster that started this process, if one did.

    Blocks until the process is needed, which for a standby may be never.

    Args:
        preload: Imports what the program needs; it must not take any device.
        prepare: Does all that can be done before it is known what to go on from, for
            what this process is likely to become; it may take devices, and meet the
            others. What it becomes is the same, or it becomes nothing.

    Returns:
        What the process is in its generation; None if no cluster started it.

    Raises:
        ClusterError: If the agent that started it cannot be reached.
    """
    address = os.environ.get("SHARDKIT_AGENT")
    if not address:
        return None
    die_with_parent()
    try:
        deadlines = Deadlines.of_environment(os.environ)
        token = os.environ["SHARDKIT_TOKEN"]
        worker = int(os.environ["SHARDKIT_WORKER"])
        limit_s = deadlines.connect_s
        channel = Channel(address, token, "the agent of this host", limit_s)
        channel.send({"type": "worker", "worker": worker, "pid": os.getpid()})
        if preload is not None:
            preload()
        channel.send({"type": "ready", "prepares": prepare is not None})
        header = channel.receive(what="an assignment").header
        if header["type"] == "prepare":
            assert prepare is not None
            prepare(Assignment.from_json(header["assignment"]))
            channel.send({"type": "ready", "prepares": False})
            header = channel.receive(what="an assignment").header
        if header["type"] == "stale":
            channel.close()
            raise WireError(
                f"{channel.peer} waits for no worker {worker}: another process has "
                "joined as that, maybe the one that started this"
            )
    except (KeyError, ValueError, WireError) as error:
        raise ClusterError(
            f"SHARDKIT_AGENT={address}: cannot join the cluster: {error}. Unset it to "
            "run without one."
        ) from None
    assignment = Assignment.from_json(header["assignment"])
    member = Member(channel, assignment, deadlines, token)
    if assignment.process_index == 0:
        _take_terminal()
    _tell_crashes(member)
    return member


def _take_terminal() -> None:
    """Speaks where the launcher does, as its process 0."""
    descriptor = os.environ.get("SHARDKIT_TERMINAL")
    if descriptor and descriptor.isdecimal():
        sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.dup2(int(descriptor), 1)
        # It was a file when the interpreter chose how to buffer.
        sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore


def _tell_crashes(member: Member) -> None:
    before = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, where: Any) -> None:
        text = "".join(traceback.format_exception(kind, error, where))
        member.failed(kind.__name__, str(error), text)
        before(kind, error, where)

    sys.excepthook = tell
