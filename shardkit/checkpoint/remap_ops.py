"""The operations of the remap language by their names.

Owns nothing but the list. Invariant: what is listed is what TOML can spell.
"""

from shardkit.checkpoint.remap_dims import Pad, Reshape, Slice, Transpose, Unpad
from shardkit.checkpoint.remap_joins import Fuse, Split, Stack, Unstack
from shardkit.checkpoint.remap_op import Op
from shardkit.checkpoint.remap_values import Average, Cast, Drop, Init

__all__ = [
    "OPS",
    "Average",
    "Cast",
    "Drop",
    "Fuse",
    "Init",
    "Op",
    "Pad",
    "Reshape",
    "Slice",
    "Split",
    "Stack",
    "Transpose",
    "Unpad",
    "Unstack",
]

OPS: dict[str, type[Op]] = {
    op.word: op
    for op in (
        *(Transpose, Reshape, Stack, Unstack, Fuse, Split, Pad, Unpad, Slice),
        *(Cast, Average, Init, Drop),
    )
}
"""Every operation by its name in TOML."""
