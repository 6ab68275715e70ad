"""The process of an agent on this machine.

Owns its command line, and its end: when its launcher is gone, or asks for it, it gives
back all it has.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from shardkit.cluster.agent import Agent
from shardkit.cluster.settings import Settings
from shardkit.snapshot.segments import Segments

__all__ = ["main"]


async def _watch_launcher(agent: Agent) -> None:
    """Ends the agent when the pipe from its launcher does."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    await reader.read()
    agent.stop("its launcher is gone")


async def _serve(settings: Settings, host: str, life: int, ip: str) -> str:
    segments = Segments(settings.run, host)
    agent = Agent(settings, host, segments, ip=ip, pass_fds=(life,))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, agent.stop, "it was asked to end")
    watching = asyncio.create_task(_watch_launcher(agent))
    try:
        return await agent.run()
    finally:
        watching.cancel()


def main(argv: list[str]) -> int:
    """Is the process of an agent.

    Args:
        argv: Its host, a file descriptor that is open for as long as the agent or any
            of its workers lives, and where others reach it if that is not this machine
            alone. The settings are on standard input.
    """
    settings = Settings.from_json(json.loads(sys.stdin.buffer.readline()))
    ip = argv[2] if len(argv) > 2 else "127.0.0.1"
    why = asyncio.run(_serve(settings, argv[0], int(argv[1]), ip))
    log = Path(settings.directory) / "workers" / f"{argv[0]}.log"
    with log.open("a", encoding="utf-8") as file:
        print(f"agent {os.getpid()} ended: {why}", file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
