"""What workers ask of their agent about snapshots.

Owns the answers: memory to write into, whether an image is whole, where one is.
Invariant: an image counts once its header was read and found to be what it was said to
be. Protecting images is not done here.
"""

import asyncio
from typing import Any

from shardkit.cluster.records import Assignment
from shardkit.cluster.slots import Image, Slots
from shardkit.cluster.threads import in_thread
from shardkit.errors import ShardkitError
from shardkit.snapshot.head import IMAGE, read_head

__all__ = ["Desk"]


class Desk:
    """Answers the workers of one host.

    Args:
        slots: What there is.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._freed = asyncio.Event()
        self._making: dict[tuple[int, int], asyncio.Task[None]] = {}

    async def answer(
        self, assignment: Assignment, header: dict[str, Any]
    ) -> dict[str, Any]:
        """Answers a question of a worker."""
        try:
            match header["type"]:
                case "reserve":
                    return await self._reserve(assignment, header["num_bytes"])
                case "commit":
                    return self._commit(assignment, header)
            if self._slots.find(header["name"]) is None:
                raise ShardkitError("there is no such image any more")
            return {"type": "file", "path": str(self._slots.path(header["name"]))}
        except ShardkitError as error:
            return {"type": "refused", "why": str(error)}

    def freed(self) -> None:
        """Learns that older images may be overwritten now."""
        self._freed.set()
        self._freed = asyncio.Event()

    async def _reserve(self, assignment: Assignment, num_bytes: int) -> dict[str, Any]:
        key = (assignment.generation, assignment.process_index)
        try:
            while (name := self._slots.reserve(*key, num_bytes)) is None:
                if self._slots.may_grow(*key) and key not in self._making:
                    task = asyncio.ensure_future(self._make(assignment, num_bytes))
                    self._making[key] = task
                    task.add_done_callback(lambda task: self._made(key, task))
                if key in self._making:
                    # It is to be found again, also if who asked is gone by then.
                    await asyncio.shield(self._making[key])
                else:
                    await self._freed.wait()
        except OSError as error:
            raise ShardkitError(
                f"no memory for a snapshot of {num_bytes} bytes: {error.strerror}"
            ) from None
        path = str(self._slots.path(name))
        return {"type": "slot", "name": name, "path": path, "num_bytes": num_bytes}

    async def _make(self, assignment: Assignment, num_bytes: int) -> None:
        """Gets a worker one more segment; the loop waits for none of it."""
        slots, key = self._slots, (assignment.generation, assignment.process_index)
        try:
            name = slots.new_name("image")
            slots.add(*key, await in_thread(slots.create, name, num_bytes))
        except OSError:
            # Until a step of this generation is whole, those before it are there too.
            if slots.count(*key) and slots.has_older(key[0]):
                await self._freed.wait()
            elif slots.count(*key) or not slots.drop_older(key[0], _used(assignment)):
                raise

    def _made(self, key: tuple[int, int], task: asyncio.Task[None]) -> None:
        del self._making[key]
        # Who asked for it may not be there any more to hear why not.
        task.exception()

    def _commit(self, assignment: Assignment, header: dict[str, Any]) -> dict[str, Any]:
        name, step = header["name"], header["step"]
        key = (assignment.generation, assignment.process_index)
        segment = self._slots.given_out(*key, name)
        if segment is None:
            raise ShardkitError(f"segment {name} was not given out")
        head = read_head(segment.memory, f"segment {name}")
        found = (head.magic, head.step, head.generation, head.process)
        expected = (IMAGE, step, *key)
        if found != expected or head.num_bytes > segment.num_bytes:
            raise ShardkitError(
                f"segment {name}: expected the image of step, generation and process "
                f"{expected[1:]}, found {found[1:]} of {head.num_bytes} bytes"
            )
        self._slots.commit(
            Image(
                name=name,
                step=step,
                generation=key[0],
                process=key[1],
                num_bytes=head.num_bytes,
                protected_bytes=head.solid_bytes,
                head_bytes=head.body_start,
            )
        )
        return {"type": "committed"}


def _used(assignment: Assignment) -> set[str]:
    """The images on a worker's host that its generation goes on from."""
    images = assignment.resume.images if assignment.resume else ()
    return {image.name for image in images if image.host == assignment.host}
