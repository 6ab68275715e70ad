"""What the compiler made of a program.

Owns `ProgramExplanation`: the collectives of any program on a mesh with their causes,
what was laid out anew unasked, and what memory is taken for. It compiles and runs
nothing, and knows nothing of trainers.
"""

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from shardkit.explain.advice import Resharding, explain_resharding
from shardkit.explain.arguments import Argument, read_arguments
from shardkit.explain.exchanges import Exchanged, list_exchanged
from shardkit.explain.memory import Memory, explain_memory
from shardkit.explain.tables import plain_text
from shardkit.hlo import parse_module
from shardkit.hlo.flow import Flow

__all__ = ["ProgramExplanation", "explain_program"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramExplanation:
    """What was found in a compiled program; its text says the most of it.

    Attributes:
        mesh: Axis → size, the outermost first.
        arguments: What the program is called with, in order.
        exchanged: Its collectives, in the order of execution.
        reshardings: Those that nobody asked for, with what would remove them.
        memory: What the memory of a device is taken for.
    """

    mesh: Mapping[str, int]
    arguments: tuple[Argument, ...]
    exchanged: tuple[Exchanged, ...]
    reshardings: tuple[Resharding, ...]
    memory: Memory

    def __str__(self) -> str:
        return plain_text(self.exchanged, self.reshardings, self.memory)


def explain_program(
    program: jax.stages.Compiled | str,
    mesh: Mesh | Mapping[str, int],
    *,
    names: Mapping[str, str] | None = None,
) -> ProgramExplanation:
    """Says what devices exchange in a program, why, and what their memory is for.

    Works for any program that `jax.jit` has compiled for all devices of a mesh.

    Args:
        program: What was compiled; or its text alone, `Compiled.as_text()`, of which
            less can be told.
        mesh: For which, or its axes with their sizes.
        names: What to call arguments, by the names that JAX has for them.

    Example:
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> from shardkit.mesh import MeshSpec
        >>> mesh = MeshSpec().build(jax.devices()[:1])
        >>> x = jax.ShapeDtypeStruct(
        ...     (8, 4), "float32", sharding=NamedSharding(mesh, PartitionSpec("data")))
        >>> found = explain_program(jax.jit(lambda x: x @ x.T).lower(x).compile(), mesh)
        >>> found.exchanged, found.arguments[0].spec
        ((), (('data',), ()))
    """
    sizes = mesh if isinstance(mesh, Mapping) else dict(mesh.shape)
    compiled = None if isinstance(program, str) else program
    text = program if isinstance(program, str) else program.as_text() or ""
    module = parse_module(text)
    flow = Flow(module)
    arguments = read_arguments(module, compiled, names)
    exchanged = list_exchanged(module, flow, sizes, arguments)
    return ProgramExplanation(
        mesh=sizes,
        arguments=tuple(arguments),
        exchanged=tuple(exchanged),
        reshardings=tuple(
            explain_resharding(each, flow, sizes, arguments)
            for each in exchanged
            if each.is_resharding
        ),
        memory=explain_memory(module, flow, arguments, compiled),
    )
