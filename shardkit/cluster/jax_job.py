"""Makes JAX in this process one of several that compute together.

Owns how a generation's processes find each other: the only module of the cluster that
knows JAX, which it imports when it is asked to.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from shardkit.cluster.records import Assignment
from shardkit.cluster.wire import parse_address
from shardkit.errors import ClusterError

__all__ = ["environment_for_jax", "start_jax"]

_POLL_S = 0.002
_SHARE_KERNELS = "--xla_gpu_shard_autotuning"
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")


def environment_for_jax(
    env: Mapping[str, str], drivers: tuple[str, ...] = _GPU_DRIVERS
) -> dict[str, str]:
    """Adds what a process must be started with, where there are GPUs.

    By default XLA has the processes of a job time a part of the kernels each, and wait
    for what the others found: up to 24 hours for a process that takes the program from
    a cache and so never compiles it, as after a recovery.

    Args:
        env: What the process would get; a setting of the user's stays, and so does
            an `XLA_FLAGS` that names a file, which should have it.
        drivers: The files of which one is there if there are GPUs.

    Example:
        >>> environment_for_jax({"XLA_FLAGS": "--a"}, drivers=("/",))
        {'XLA_FLAGS': '--a --xla_gpu_shard_autotuning=false'}
    """
    flags = env.get("XLA_FLAGS", "")
    # What is no flag is the name of a file with flags.
    is_file = bool(flags) and not flags.lstrip().startswith("-")
    has_gpus = any(Path(path).exists() for path in drivers)
    if _SHARE_KERNELS in flags or is_file or not has_gpus:
        return dict(env)
    return {**env, "XLA_FLAGS": f"{flags} {_SHARE_KERNELS}=false".strip()}


def start_jax(assignment: Assignment, *, timeout_s: float) -> None:
    """Joins this process to the others of its generation; before devices are used.

    Args:
        assignment: Which of them it is.
        timeout_s: For all of them to be there.

    Raises:
        ClusterError: If process 0 is not there in time.
        RuntimeError: If others are not, as JAX says it.
    """
    import jax

    if assignment.num_processes == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM from whoever asks this process to leave.
    jax.config.update("jax_enable_preemption_service", False)
    end_s = time.monotonic() + timeout_s
    is_first = assignment.process_index == 0
    if not is_first:
        # JAX waits a second before it tries again.
        _wait_for(assignment.coordinator, timeout_s)
    # Unless told otherwise it would listen on all interfaces.
    bind = assignment.coordinator if is_first else None
    jax.distributed.initialize(
        coordinator_address=assignment.coordinator,
        num_processes=assignment.num_processes,
        process_id=assignment.process_index,
        local_device_ids=_local_devices(assignment),
        initialization_timeout=max(1, int(end_s - time.monotonic())),
        cluster_detection_method="deactivate",
        coordinator_bind_address=bind,
    )


def _local_devices(assignment: Assignment) -> list[int]:
    """The accelerators of this machine that are this process's."""
    first = assignment.device_offset
    if os.environ.get("SHARDKIT_MACHINE_IS_HOST"):
        # Hosts number their own from 0.
        mine = assignment.hosts.index(assignment.host)
        each = assignment.num_local_devices
        first = (assignment.process_index - mine) * each
    return list(range(first, first + assignment.num_local_devices))


def _wait_for(address: str, timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(parse_address(address), timeout_s).close()
            return
        except OSError as error:
            if time.monotonic() > end_s:
                raise ClusterError(
                    f"process 0 did not listen at {address} for {timeout_s:g} s "
                    f"(meet_s): {error.strerror or error}"
                ) from None
        time.sleep(_POLL_S)
