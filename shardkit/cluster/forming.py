"""Who is what in a new generation.

Owns how workers, devices and the coordinator are given out. Invariant: processes and
devices are contiguous over the hosts in their order, and split as evenly as possible,
so that a generation of the same hosts is always the same.
"""

from collections.abc import Sequence

from shardkit.cluster.hosts import Host
from shardkit.cluster.live import Seat
from shardkit.cluster.records import Assignment, Resume
from shardkit.cluster.split import split

__all__ = ["make_seats"]


def make_seats(
    hosts: Sequence[Host],
    *,
    generation: int,
    resume: Resume | None,
    quotas: tuple[int, ...] | None,
    redundancy: str,
    attempt: int,
    leave: bool,
) -> list[Seat]:
    """Gives the ready workers of some hosts their assignments.

    Args:
        hosts: Who takes part, in order; each has enough workers that are ready.
        generation: The number of the generation.
        resume: What to go on from.
        quotas: Microbatches of each process; ignored if there is another number of
            processes now.
        redundancy: How snapshots are protected.
        attempt: How many generations came no further than this step.
        leave: Whether it is only to save the state.
    """
    workers = [
        (host, id) for host in hosts for id in host.ready()[: host.plan.num_processes]
    ]
    num_devices = sum(host.plan.num_devices for host in hosts)
    local = split(num_devices, len(workers))
    first = hosts[0].report
    ip = first["address"].rpartition(":")[0]
    return [
        Seat(
            id,
            Assignment(
                generation=generation,
                process_index=process,
                num_processes=len(workers),
                coordinator=f"{ip}:{first['port']}",
                num_devices=num_devices,
                num_local_devices=local[process],
                device_offset=sum(local[:process]),
                host=host.name,
                hosts=tuple(host.name for host, _ in workers),
                resume=resume,
                quotas=quotas if quotas and len(quotas) == len(workers) else None,
                redundancy=redundancy,
                attempt=attempt,
                leave=leave,
            ),
        )
        for process, (host, id) in enumerate(workers)
    ]
