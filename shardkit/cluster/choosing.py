"""Which snapshot a generation goes on from, as far as the cluster needs to know.

Owns what a choice comes to: where the images are, and what people are told. Which step
is chosen, and what is rebuilt for it, is `snapshot.recovery`'s decision.
"""

import dataclasses
import re
from collections.abc import Sequence

from shardkit.cluster.records import Resume

__all__ = ["Choice", "spell_words"]

_MOST_WORDS = 12


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        resume: The snapshot; None if none is whole.
        said: What was lost and what was rebuilt, in words; empty if nothing.
        rebuilt_bytes: How much was rebuilt.
    """

    resume: Resume | None
    said: str = ""
    rebuilt_bytes: int = 0


def spell_words(words: Sequence[str], step: int | None, whole_step: int) -> str:
    """Says in a line what a plan says in words.

    Args:
        words: The plan's.
        step: The step that was chosen; None if none was.
        whole_step: The newest that was known to be whole. What was being taken after
            it was not expected to be.

    Example:
        >>> words = ["step 9 is not whole: …", "step 8: an image is lost"]
        >>> spell_words(words, 8, 8)
        'step 8: an image is lost'
    """
    if step is not None:
        newest = max(step, whole_step)
        words = [word for word in words if _step_of(word) <= newest]
    more = len(words) - _MOST_WORDS
    found = [*words[:_MOST_WORDS], *([f"and {more} more"] if more > 0 else [])]
    return "; ".join(found)


def _step_of(word: str) -> int:
    match = re.match(r"step (\d+)", word)
    return int(match[1]) if match else -1
