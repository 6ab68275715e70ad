"""The exceptions shardkit raises.

Every one also subclasses the built-in exception that an ordinary handler would
catch, and every message says where, what was expected, what was found and what
to do about it. This module imports nothing.
"""

__all__ = [
    "CertificateError",
    "ClusterError",
    "ConfigError",
    "DamagedError",
    "DataError",
    "Halted",
    "InexactError",
    "LostStateError",
    "MembershipError",
    "MeshError",
    "NonFiniteError",
    "PartitionError",
    "Preempted",
    "RestoreError",
    "SaveError",
    "ShardkitError",
    "TornError",
    "reason",
]


class ShardkitError(Exception):
    """The root of the family."""


class ConfigError(ShardkitError, ValueError):
    """A configuration, a flag or a run directory that cannot be used."""


class DataError(ShardkitError, ValueError):
    """A corpus or a batch that cannot be used."""


class MeshError(ShardkitError, ValueError):
    """A mesh that cannot be built from the devices that are there."""


class PartitionError(ShardkitError, ValueError):
    """Leaves whose logical axes cannot be mapped to the mesh."""


class InexactError(ShardkitError, ValueError):
    """Something that cannot keep its bits when the device count changes."""


class MembershipError(ShardkitError, ValueError):
    """A schedule or a request for devices that are not there."""


class LostStateError(ShardkitError, RuntimeError):
    """Shards that went with their devices and exist nowhere else."""


class ClusterError(ShardkitError, RuntimeError):
    """A run of several processes that cannot go on, or cannot be joined."""


class CertificateError(ShardkitError, RuntimeError):
    """Two placements computed different bits for the same step."""


class NonFiniteError(ShardkitError, RuntimeError):
    """The loss or the state is no longer finite."""


class Preempted(ShardkitError, RuntimeError):
    """The run was asked to leave; it has saved and can be resumed."""


class Halted(ShardkitError, RuntimeError):
    """The run stopped for other processes to go on from its snapshot."""


class RestoreError(ShardkitError, RuntimeError):
    """A checkpoint that is missing, damaged or belongs to another run."""


class SaveError(ShardkitError, OSError):
    """A checkpoint that could not be written; those before it are whole."""


class DamagedError(RestoreError):
    """A checkpoint whose bits are not those that were saved."""


class TornError(RestoreError):
    """A snapshot that was not committed, or whose bytes are not those written."""


def reason(error: Exception) -> str:
    """Says why something failed, in words and without the system's numbers.

    >>> reason(FileNotFoundError(2, "No such file or directory", "a.toml"))
    'No such file or directory'
    """
    return str(getattr(error, "strerror", None) or error)
