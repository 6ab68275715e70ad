"""What is said between the processes of a cluster about generations and images.

Owns the records and their JSON. Invariant: what `from_json` reads back equals what
was written. No record is ever of two generations.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["Assignment", "ImageRef", "Resume"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """Where the image of a snapshot is.

    Attributes:
        host: The host that has it in memory.
        address: `"ip:port"` of that host's agent.
        name: The name of its segment.
        process: Which process of its generation wrote it.
        num_bytes: Its size.
    """

    host: str
    address: str
    name: str
    process: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """The snapshot that a generation goes on from.

    Attributes:
        step: How many steps are in it.
        images: All images of it that exist, by process.
    """

    step: int
    images: tuple[ImageRef, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What a worker is in a generation.

    Attributes:
        generation: Which generation; each is greater than all before it.
        process_index: Which of its processes, from 0.
        num_processes: How many it has.
        coordinator: `"ip:port"`, free on the host of process 0, never used before.
        num_devices: How many devices all processes have together.
        num_local_devices: How many of these are this process's.
        device_offset: The number of the first of them.
        host: The host that the process is on.
        hosts: The host of each process.
        resume: The snapshot to go on from; None to begin, or to go on from disk.
        quotas: Microbatches of each process, if they are to differ.
        redundancy: How snapshots are protected.
        attempt: How many generations have begun at this step before.
        leave: Whether to do no step at all: take the state, save it and leave.
    """

    generation: int
    process_index: int
    num_processes: int
    coordinator: str
    num_devices: int
    num_local_devices: int
    device_offset: int
    host: str
    hosts: tuple[str, ...] = ()
    resume: Resume | None = None
    quotas: tuple[int, ...] | None = None
    redundancy: str = "none"
    attempt: int = 0
    leave: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Assignment":
        """Reads what `to_json` made.

        Example:
            >>> one = Assignment(
            ...     generation=2, process_index=0, num_processes=1,
            ...     host="host-0", hosts=("host-0",),
            ...     coordinator="127.0.0.1:9", num_devices=2, num_local_devices=2,
            ...     device_offset=0, resume=Resume(step=7, images=()), quotas=(3,))
            >>> Assignment.from_json(one.to_json()) == one
            True
        """
        resume, quotas = values["resume"], values["quotas"]
        if resume is not None:
            images = tuple(ImageRef(**image) for image in resume["images"])
            resume = Resume(step=resume["step"], images=images)
        quotas = None if quotas is None else tuple(quotas)
        hosts = tuple(values["hosts"])
        return cls(**{**values, "resume": resume, "quotas": quotas, "hosts": hosts})
