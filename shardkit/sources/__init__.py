"""Data of many kinds whose batches are a function of the step.

What is read by index becomes batches through `Examples`: files (`JsonLines`,
`TextFiles`, `TokenFile`), documents (`tokenize`, `Documents`, `Packed`), `Mixture`s and
`Part`s of others, and what other packages offer. `from_iterable` is for the rest.
"""

from shardkit.sources.documents import Documents as Documents
from shardkit.sources.examples import Examples as Examples
from shardkit.sources.files import TextFiles as TextFiles
from shardkit.sources.iterables import from_iterable as from_iterable
from shardkit.sources.jsonl import JsonLines as JsonLines
from shardkit.sources.mixture import Mixture as Mixture
from shardkit.sources.packing import Packed as Packed
from shardkit.sources.part import Part as Part
from shardkit.sources.token_files import TokenFile as TokenFile
from shardkit.sources.tokenizing import tokenize as tokenize

__all__ = [
    "Documents",
    "Examples",
    "JsonLines",
    "Mixture",
    "Packed",
    "Part",
    "TextFiles",
    "TokenFile",
    "from_iterable",
    "tokenize",
]
