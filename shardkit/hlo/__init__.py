"""Reading the text of compiled programs.

JAX is not imported, so that the text of any machine can be read anywhere.
"""

from shardkit.hlo.collectives import (
    Collective,
    Exchange,
    find_collectives,
    find_exchanges,
)
from shardkit.hlo.text import Instruction, Module, parse_module, shape_bytes

__all__ = [
    "Collective",
    "Exchange",
    "Instruction",
    "Module",
    "find_collectives",
    "find_exchanges",
    "parse_module",
    "shape_bytes",
]
