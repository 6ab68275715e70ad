"""Lowering, compiling and keeping programs, one per placement.

Owns the executables. An executable is bound to its ordered devices, so it is kept
under (device ids, mesh, abstract arguments), and coming back to a placement compiles
nothing. In exact mode the lowered module is brought to a canonical form first.

The canonical form matters because XLA removes duplicate expressions while it
partitions a program over several devices, but not for a single one; the simplifier
then sees other shapes of the same arithmetic and other bits come out. Removing
duplicates before compiling shows every device count the same text. This is the one
place that reaches into MLIR; `tests/test_program.py` says for which versions.
"""

import collections
import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.mlir import passmanager

from shardkit.events import EventLog
from shardkit.group_hazards import check_branches, find_lookups
from shardkit.inexact import check_atomics
from shardkit.program_cache import compile_and_keep
from shardkit.tree import format_table

__all__ = ["Program", "in_this_context", "remove_duplicates"]

# Kernels are else chosen by timing them, so that another process, or a product that
# another device count fuses otherwise, can get other kernels and bits. Without, the
# library chooses by the shape of the product. Triton's kernels need the timing.
_EXACT_OPTIONS: dict[str, Any] = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
}


def in_this_context(work: Callable[[], Any]) -> Callable[[], Any]:
    """Lets work that runs in another thread see the settings of this one.

    JAX keeps what a `with` block sets per thread; numbers would else depend on who
    compiles. These are the settings that change numbers, but for `jax_enable_x64`,
    which changes the dtypes that a program is called with.

    Example:
        >>> with jax.default_matmul_precision("highest"):
        ...     work = in_this_context(lambda: jax.config.jax_default_matmul_precision)
        >>> work()
        'highest'
    """
    managers = {
        "jax_default_matmul_precision": jax.default_matmul_precision,
        "jax_numpy_dtype_promotion": jax.numpy_dtype_promotion,
        "jax_numpy_rank_promotion": jax.numpy_rank_promotion,
    }
    values = {name: getattr(jax.config, name) for name in managers}

    def run() -> Any:
        with contextlib.ExitStack() as stack:
            for name, manager in managers.items():
                stack.enter_context(manager(values[name]))
            return work()

    return run


def remove_duplicates(lowered: jax.stages.Lowered) -> None:
    """Removes duplicate expressions from a lowered module, in place."""
    module: Any = lowered.compiler_ir("stablehlo")
    with module.context:
        pipeline = passmanager.PassManager.parse("builtin.module(func.func(cse),cse)")
        pipeline.run(module.operation)


class Program:
    """A function that is compiled anew for every placement of its arguments.

    Args:
        fn: A function of arrays.
        name: What events call it.
        donate_argnums: Positions of the arguments whose memory it may reuse.
        exact: Whether to canonicalise before compiling.
        events: Where `compile` phases are recorded.
        groups: Mesh axis → size, where groups of devices compute a microbatch together.

    Attributes:
        name: What events call it.
        counts: `"trace"` and `"compile"`: how often each was done.

    Example:
        >>> double = Program(lambda x: x * 2)
        >>> float(double(jax.numpy.ones(()))), float(double(jax.numpy.ones(())))
        (2.0, 2.0)
        >>> double.counts["compile"]
        1
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        name: str = "program",
        donate_argnums: tuple[int, ...] = (),
        exact: bool = True,
        events: EventLog | None = None,
        groups: Mapping[str, int] | None = None,
    ) -> None:
        self.name = name
        self._exact = exact
        self._groups = groups or {}
        self._events = events or EventLog()
        self._lock = threading.Lock()
        self._executables: dict[Any, jax.stages.Compiled] = {}
        self.counts: collections.Counter[str] = collections.Counter()

        def counted(*args: Any) -> Any:
            self.counts["trace"] += 1
            return fn(*args)

        counted.__name__ = counted.__qualname__ = name
        self._jitted = jax.jit(counted, donate_argnums=donate_argnums)

    def find(self, *args: Any) -> jax.stages.Compiled | None:
        """Returns the executable for arguments placed like `args`, if there is one."""
        return self._executables.get(_placement_key(args))

    def compile(self, *args: Any) -> jax.stages.Compiled:
        """Returns the executable for arguments placed like `args`.

        Args:
            *args: Arrays, or `jax.ShapeDtypeStruct` with shardings.
        """
        key = _placement_key(args)
        with self._lock:
            if key not in self._executables:
                fields = {"program": self.name, "devices": _num_devices(args)}
                with self._events.phase("compile", **fields):
                    self._executables[key] = self._compile(args)
            return self._executables[key]

    def _compile(self, args: Any) -> jax.stages.Compiled:
        self.counts["compile"] += 1
        traced = self._jitted.trace(*args)
        platform = _platform(args)
        self._notice_lookups(traced.jaxpr)
        if self._exact:
            check_atomics(traced.jaxpr, platform)
        lowered, options = traced.lower(), None
        if self._exact:
            remove_duplicates(lowered)
            options = _EXACT_OPTIONS.get(platform)
        executable = compile_and_keep(lowered, options)
        if self._groups and platform == "cpu":
            check_branches(self.name, executable, self._groups)
        return executable

    def _notice_lookups(self, jaxpr: Any) -> None:
        """Says what may end the process, while there is one."""
        if found := find_lookups(jaxpr, self._groups):
            message = (
                f"{self.name}: XLA can end the process (Check failed: "
                "partition_group_list) where several axes of a group cut a look-up:\n"
                f"{format_table(found)}\n"
                "If it does, use sk.nn.embed(table, tokens, axis) and "
                "sk.nn.cross_entropy there, or only one of tensor, expert and context"
            )
            self._events.emit("notice", message=message, program=self.name)

    def __call__(self, *args: Any) -> Any:
        """Runs the program where its arguments are."""
        return self.compile(*args)(*args)


def _devices(args: Any) -> set[Any]:
    """The devices of the first argument that lies on any."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args))
    return next((x.device_set for x in shardings if x is not None), set())


def _num_devices(args: Any) -> int:
    return len(_devices(args)) or 1


def _platform(args: Any) -> str:
    devices = _devices(args)
    return next(iter(devices)).platform if devices else jax.default_backend()


def _placement_key(args: Any) -> Any:
    leaves, treedef = jax.tree.flatten(args)
    return treedef, tuple(_leaf_key(leaf) for leaf in leaves)


def _leaf_key(leaf: Any) -> Any:
    # A NamedSharding compares by its mesh, and a mesh by its ordered devices.
    return (
        jnp.shape(leaf),
        getattr(leaf, "dtype", None),
        getattr(leaf, "sharding", None),
    )
