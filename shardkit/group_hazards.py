"""What groups of devices may not do at once, found before it stops a run.

Owns two defects of XLA that end the process or wait for ever, where several groups
compute microbatches side by side. It changes no program.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.extend import core

from shardkit.errors import PartitionError
from shardkit.hlo import Instruction, Module, parse_module
from shardkit.jaxprs import equations
from shardkit.mesh import BATCH_AXES, GROUP_AXES
from shardkit.nn import IN_PIECES
from shardkit.tree import format_table

__all__ = ["check_branches", "find_lookups"]

_LOOPS = ("shardkit", "gradient.py")
"""Where the loops over microbatches are."""


def find_lookups(jaxpr: Any, mesh: Mapping[str, int]) -> list[tuple[str, str]]:
    """Lists look-ups at which XLA may end the process, if a group cuts them.

    XLA of JAX 0.10 to 0.12 fails where one axis of a group cuts the dim that is
    indexed, another one the indices or what is looked up, and there are several groups.
    What is cut is for XLA to decide, so that those it partitions otherwise are listed
    too.

    Args:
        jaxpr: Of a step.
        mesh: Mesh axis → size.

    Returns:
        Shape of the table and source line, for each.

    Example:
        >>> import jax
        >>> look_up = jax.make_jaxpr(lambda table, i: table[i])
        >>> closed = look_up(jax.numpy.ones((8, 2)), jax.numpy.array([0, 5]))
        >>> [shape for shape, _ in find_lookups(closed, {"fsdp": 2, "tensor": 2})]
        []
        >>> mesh = {"fsdp": 2, "tensor": 2, "context": 2}
        >>> [shape for shape, _ in find_lookups(closed, mesh)]
        ['float32[8,2]']
    """
    sizes = [mesh.get(axis, 1) for axis in GROUP_AXES]
    cutting = [size for size in sizes if size > 1]
    if len(cutting) < 2 or not _several_groups(mesh):
        return []
    found = [
        (str(eqn.invars[0].aval), line)
        for eqn, line in equations(jaxpr)
        if eqn.primitive.name == "gather" and _can_be_cut(eqn, cutting)
    ]
    return list(dict.fromkeys(found))


def _several_groups(mesh: Mapping[str, int]) -> bool:
    return math.prod(mesh.get(axis, 1) for axis in BATCH_AXES) > 1


def _can_be_cut(eqn: core.JaxprEqn, sizes: list[int]) -> bool:
    """Whether axes can cut a dim that is indexed, and there are indices to cut."""
    if IN_PIECES in str(eqn.source_info.name_stack):
        return False
    avals: list[Any] = [var.aval for var in eqn.invars]
    table, indices = (aval.shape for aval in avals)
    pieces = eqn.params["slice_sizes"]
    indexed = [
        table[dim]
        for dim in eqn.params["dimension_numbers"].start_index_map
        if pieces[dim] < table[dim]
    ]
    has_many = math.prod(indices[:-1]) > 1
    return has_many and any(dim % size == 0 for dim in indexed for size in sizes)


def check_branches(name: str, executable: Any, mesh: Mapping[str, int]) -> None:
    """Refuses a program of CPUs in which a branch exchanges with neighbours.

    XLA's collective-permute waits there for all devices of the program, and groups
    whose data take another branch never come; nor do those whose data end a loop
    earlier.

    Args:
        name: What the program is called.
        executable: What was compiled, for CPUs.
        mesh: Mesh axis → size.

    Raises:
        PartitionError: Naming every such exchange and the line that caused it.
    """
    if not _several_groups(mesh):
        return
    text = executable.as_text()
    if "collective-permute" not in text:
        return
    module = parse_module(text)
    rows = []
    for each in _within_choices(module):
        if each.opcode.removesuffix("-start") == "collective-permute":
            frames = module.frames(each)
            line = f"{frames[0].file}:{frames[0].line}" if frames else "unknown line"
            rows.append((each.op_name, line))
    if rows:
        raise PartitionError(
            f"{name}: these exchange with neighbours in a branch that some groups of "
            "devices may not take, or a loop of which the data say how often it runs, "
            "for which CPUs would wait for ever:\n"
            + format_table(list(dict.fromkeys(rows)))
            + "\nCompute both branches and choose with jnp.where, give the loop "
            "a fixed number of passes, or take one group."
        )


def _within_choices(module: Module) -> Iterator[Instruction]:
    """Yields what is computed only where, or as often as, data say so."""
    names = [
        call.name
        for instructions in module.computations.values()
        for each in instructions
        if each.opcode == "conditional" or _is_open_loop(each, module)
        for call in each.calls()
    ]
    seen = set(names)
    while names:
        for each in module.computations.get(names.pop(), []):
            yield each
            called = {call.name for call in each.calls()} - seen
            seen |= called
            names += called


def _is_open_loop(instruction: Instruction, module: Module) -> bool:
    """Whether data say how often a loop of a loss runs.

    Of the loops over microbatches all groups make as many passes.
    """
    if instruction.opcode != "while":
        return False
    frames = module.frames(instruction)
    is_own = not frames or Path(frames[0].file).parts[-2:] == _LOOPS
    return not is_own and any(call.note for call in instruction.calls())
