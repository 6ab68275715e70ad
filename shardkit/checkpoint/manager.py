"""Checkpoints on disk that any mesh can read.

Owns saving a state through Orbax and restoring it onto another mesh. What is stored
is logical: every leaf under its path with its unpadded shape, beside a JSON record
with the digest of each leaf. Invariant: what is restored has the digests that were
saved, or an error is raised. Retention is Orbax's; the atomic commit too.
"""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardkit.digest import combine_digests
from shardkit.errors import RestoreError
from shardkit.keys import is_key_dtype, raw
from shardkit.layout import SHARD_AXIS, LeafLayout
from shardkit.placement import Placement
from shardkit.state_moves import from_host, to_host
from shardkit.tree import format_table

__all__ = ["CheckpointConfig", "Checkpoints", "fingerprint"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where and when a `Trainer` saves.

    Attributes:
        directory: Created if it is not there.
        every: Steps between saves; 0 saves only when asked, or when leaving.
        keep: How many checkpoints stay; None for all.
    """

    directory: str | Path
    every: int = 0
    keep: int | None = 2


def fingerprint() -> dict[str, str]:
    """What the bits of a run depend on besides the program and its inputs."""
    found = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }
    if found["platform"] == "cpu":
        # How XLA cuts a matrix product follows the size of its thread pool.
        found["threads"] = os.environ.get("PJRT_NPROC", f"unset, {os.cpu_count()}")
        found["machine"] = platform.machine()
    return found


class Checkpoints:
    """The checkpoints of one run; a thin layer over `orbax.checkpoint`.

    Args:
        config: Where, and how many.

    Attributes:
        directory: Where, as an absolute path.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.directory = Path(config.directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._abandoned: set[int] = set()

    def steps(self) -> list[int]:
        """The steps that are saved, oldest first, but for those gone back from."""
        return sorted(set(self._manager.all_steps()) - self._abandoned)

    def go_back(self, step: int) -> None:
        """Takes a step for the newest; the next save removes what is after it."""
        self._abandoned = {s for s in self._manager.all_steps() if s > step}

    def save(
        self,
        step: int,
        state: Any,
        placement: Placement,
        digests: Mapping[str, np.ndarray],
        manifest: Mapping[str, Any],
    ) -> None:
        """Saves a state; returns when it is committed."""
        layout, mesh = placement.layout, placement.mesh
        leaves = {}
        for array, leaf in zip(
            jax.tree.leaves(state), jax.tree.leaves(layout), strict=True
        ):
            padded = leaf.is_padded(mesh.shape[SHARD_AXIS])
            leaves[_name(leaf)] = to_host(array, leaf) if padded else raw(array)
        record = {
            "step": step,
            "digest": combine_digests(digests, layout),
            "leaves": {
                leaf.path: {
                    "shape": list(leaf.shape),
                    "dtype": str(leaf.dtype),
                    "digest": _hex(digests[leaf.path]),
                }
                for leaf in jax.tree.leaves(layout)
            },
            "fingerprint": fingerprint(),
            "manifest": dict(manifest),
        }
        args = self._ocp.args
        if step in self._abandoned:
            self._manager.delete(step)
        self._manager.save(
            step,
            args=args.Composite(
                state=args.StandardSave(leaves), record=args.JsonSave(record)
            ),
            # Without it nothing would be saved, nor said, before an abandoned step.
            force=True,
        )
        # What was kept no longer may be gone already.
        for other in self._abandoned & set(self._manager.all_steps()) - {step}:
            self._manager.delete(other)
        self._abandoned = set()

    def record(self, step: int | None = None) -> dict[str, Any]:
        """Reads what was recorded beside a state, the newest by default.

        Raises:
            RestoreError: If there is no such checkpoint, or it cannot be read.
        """
        saved = self.steps() if step is None else sorted(self._manager.all_steps())
        if not saved or (step is not None and step not in saved):
            raise RestoreError(
                f"{self.directory}: expected a checkpoint"
                + ("" if step is None else f" of step {step}")
                + f", found {saved or 'none'}"
            )
        args = self._ocp.args
        try:
            found = self._manager.restore(
                saved[-1] if step is None else step,
                args=args.Composite(record=args.JsonRestore()),
            )
        except Exception as error:
            raise RestoreError(
                f"{self.directory}: the record of the checkpoint cannot be read: "
                f"{error}"
            ) from error
        return found["record"]

    def check(
        self, record: Mapping[str, Any], manifest: Mapping[str, Any]
    ) -> list[str]:
        """Compares a record with the run that wants to go on from it.

        Returns:
            What differs in the environment, and could therefore change bits.

        Raises:
            RestoreError: If the checkpoint is of another run.
        """
        saved = record["manifest"]
        manifest = json.loads(json.dumps(manifest))
        rows = [
            (key, f"saved {saved.get(key)!r}", f"now {value!r}")
            for key in sorted(manifest.keys() | saved.keys())
            if saved.get(key) != (value := manifest.get(key))
        ]
        if rows:
            raise RestoreError(
                f"{self.directory}: the checkpoint is of another run\n"
                + format_table(rows)
            )
        now = fingerprint()
        return [
            f"{key} was {record['fingerprint'].get(key)}, is {value}"
            for key, value in now.items()
            if record["fingerprint"].get(key) != value
        ]

    def load(self, record: Mapping[str, Any], placement: Placement) -> Any:
        """Restores a state onto a placement, and compares all digests.

        Raises:
            RestoreError: Naming every leaf that is missing, extra, reshaped, recast
                or damaged.
        """
        layout, mesh = placement.layout, placement.mesh
        _compare_leaves(record["leaves"], layout, str(self.directory))
        leaves, treedef = jax.tree.flatten(layout)
        replicated = NamedSharding(mesh, PartitionSpec())
        count = mesh.shape[SHARD_AXIS]
        wanted = {
            _name(leaf): _storage(
                leaf, replicated if leaf.is_padded(count) else leaf.sharding(mesh)
            )
            for leaf in leaves
        }
        args = self._ocp.args
        try:
            found = self._manager.restore(
                record["step"], args=args.Composite(state=args.StandardRestore(wanted))
            )["state"]
        except Exception as error:
            raise RestoreError(
                f"{self.directory}: step {record['step']} cannot be read: {error}"
            ) from error
        # One after the other: a leaf is held twice, not the state.
        state = [_place(found.pop(_name(leaf)), leaf, mesh) for leaf in leaves]
        state = treedef.unflatten(state)
        self._check_digests(record, placement.digest(state))
        return state

    def _check_digests(
        self, record: Mapping[str, Any], digests: Mapping[str, np.ndarray]
    ) -> None:
        bad = [
            path
            for path, lanes in digests.items()
            if _hex(lanes) != record["leaves"][path]["digest"]
        ]
        if bad:
            raise RestoreError(
                f"{self.directory}: step {record['step']} is damaged: {len(bad)} "
                f"leaves are not what was saved: {', '.join(bad[:8])}. Restore another "
                f"step of {self.steps()}."
            )

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def _hex(lanes: np.ndarray) -> list[str]:
    return [f"{int(lane):08x}" for lane in lanes]


def _name(leaf: LeafLayout) -> str:
    return leaf.path.replace("/", ".")


def _storage(leaf: LeafLayout, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    abstract = leaf.abstract
    if is_key_dtype(leaf.dtype):
        abstract = jax.eval_shape(jax.random.key_data, abstract)
    return jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, sharding=sharding)


def _place(array: Any, leaf: LeafLayout, mesh: Mesh) -> Any:
    """Turns a stored array into a leaf, in memory that can be donated."""
    if is_key_dtype(leaf.dtype):
        return jax.random.wrap_key_data(array)
    if leaf.is_padded(mesh.shape[SHARD_AXIS]):
        return from_host(np.asarray(array.addressable_data(0)), leaf, mesh)
    # Arrays as Orbax returns them can refuse donation without a word.
    return jax.jit(jnp.copy, out_shardings=leaf.sharding(mesh))(array)


def _compare_leaves(saved: Mapping[str, Any], layout: Any, where: str) -> None:
    wanted = {
        leaf.path: (list(leaf.shape), str(leaf.dtype))
        for leaf in jax.tree.leaves(layout)
    }
    found = {path: (x["shape"], x["dtype"]) for path, x in saved.items()}
    rows = [
        (
            path,
            f"expected {_describe(wanted.get(path))}",
            f"found {_describe(found.get(path))}",
        )
        for path in sorted(wanted.keys() | found.keys())
        if wanted.get(path) != found.get(path)
    ]
    if rows:
        raise RestoreError(
            f"{where}: {len(rows)} leaves of the checkpoint are not those of this run\n"
            + format_table(rows)
            + "\nRestore with the model and the optimizer that were saved."
        )


def _describe(leaf: tuple[list[int], str] | None) -> str:
    return "nothing" if leaf is None else f"{leaf[1]}{leaf[0]}"
