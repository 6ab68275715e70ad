"""Batches from what can only be iterated.

Owns the way back: an iterator knows no step but the next, so it is begun anew, and
what it yields is compared with what it yielded before.

Invariant: `batches(step)` is the `step`-th batch of the iterator, or an error. What is
lost against a source read by index: going to a step costs all batches before it.
"""

import operator
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

import numpy as np
import xxhash

from shardkit.batch import check_named
from shardkit.errors import DataError

__all__ = ["IterableBatches", "from_iterable"]


def from_iterable(
    batches: Callable[[], Iterator[Any]] | Iterable[Any], *, keep: int = 8
) -> "IterableBatches":
    """Makes batches by step of anything that yields batches one after the other.

    A later step is reached by skipping what comes before it, also when a run is
    resumed. An earlier one is still in memory if it is among the last few; otherwise
    the iterator is begun anew, which needs a function that makes it, or an object that
    can be iterated again. A plain iterator or generator can only go forwards.

    Every process of a run iterates over whole global batches, and has to get the same
    ones. Each batch is compared, by a hash, with what the same step gave before, and
    `digest` is of the first one, so that a resumed run whose iterator begins otherwise
    is refused.

    Args:
        batches: A function that makes an iterator of global batches, always the same
            ones in the same order; or an iterable of them.
        keep: How many of the last batches stay in memory, at least 1. A run goes back
            by a few steps when devices change or are lost.

    Raises:
        DataError: If it is neither, or `keep` is below 1.

    Example:
        >>> batches = from_iterable(lambda: ({"x": np.full(2, i)} for i in range(20)))
        >>> [batches(step)["x"].tolist() for step in (15, 2)]
        [[15, 15], [2, 2]]
    """
    if keep < 1:
        raise DataError(f"from_iterable: expected keep of at least 1, found {keep}.")
    if isinstance(batches, Iterator):
        return IterableBatches(None, batches, keep=keep)
    if isinstance(batches, Iterable):
        return IterableBatches(lambda: iter(batches), None, keep=keep)
    if callable(batches):
        return IterableBatches(lambda: iter(batches()), None, keep=keep)
    raise DataError(
        "from_iterable: expected a function that makes an iterator, or an iterable, "
        f"found a {type(batches).__name__}."
    )


class IterableBatches:
    """What `from_iterable` returns: a function of the step."""

    def __init__(
        self,
        make: Callable[[], Iterator[Any]] | None,
        iterator: Iterator[Any] | None,
        *,
        keep: int,
    ):
        self._make, self._iterator, self._keep = make, iterator, keep
        self._next = 0
        self._recent: dict[int, Any] = {}
        self._hashes = array("Q")
        # Training and evaluation may share one, each in a thread of its own.
        self._lock = threading.Lock()

    @property
    def digest(self) -> str:
        """Hash of the first batch, in hex."""
        if not self._hashes:
            self(0)
        return f"{self._hashes[0]:016x}"

    def __call__(self, step: SupportsIndex) -> Any:
        """Returns the batch of a step.

        Raises:
            DataError: If the iterator has ended before, cannot go back, or gives
                another batch than it did.
        """
        if (number := operator.index(step)) < 0:
            raise DataError(f"Batches are numbered from step 0, found step {number}.")
        with self._lock:
            if number in self._recent:
                return self._recent[number]
            if number < self._next:
                self._begin_anew(number)
            while self._next <= number:
                self._advance(number)
            return self._recent[number]

    def _begin_anew(self, step: int):
        if self._make is None:
            kept = f"{min(self._recent)} to {max(self._recent)}"
            raise DataError(
                f"from_iterable: step {step} was asked for, but the iterator has gone "
                f"on to step {self._next} and cannot go back; only steps {kept} are "
                "kept. Give a function that makes the iterator anew, as in "
                "sk.from_iterable(lambda: make_batches()), or a larger keep."
            )
        self._iterator, self._next = None, 0
        self._recent.clear()

    def _advance(self, wanted: int):
        """Takes one batch and checks that it is the one it has always been."""
        step = self._next
        if self._iterator is None:
            assert self._make is not None
            self._iterator = self._make()
        try:
            batch = next(self._iterator)
            check_named(batch, where=f"from_iterable: batch {step}")
            batch = _copy(batch)
        except StopIteration:
            self._give_up()
            raise DataError(
                f"from_iterable: the iterator has ended after {step} batches, and step "
                f"{wanted} was asked for. Train for fewer steps, or let it begin again "
                "by itself: itertools.chain.from_iterable(make_epoch(n) for n in "
                "itertools.count())."
            ) from None
        except Exception:
            self._give_up()
            raise
        found = _hash(batch)
        if step == len(self._hashes):
            self._hashes.append(found)
        elif found != self._hashes[step]:
            self._give_up()
            raise DataError(
                f"from_iterable: begun anew, the iterator gave another batch for step "
                f"{step}: expected hash {self._hashes[step]:016x}, found {found:016x}. "
                "Make it from a fixed seed, with one worker or in a fixed order."
            )
        self._next = step + 1
        self._recent[step] = batch
        self._recent.pop(step - self._keep, None)

    def _give_up(self):
        """Forgets an iterator that has failed, where another one can be made."""
        if self._make is not None:
            self._iterator, self._next = None, 0


def _copy(node: Any) -> Any:
    """Copies a batch to arrays of its own: some iterators fill the same ones again."""
    if isinstance(node, Mapping):
        return {name: _copy(child) for name, child in node.items()}
    return np.array(node)


def _hash(batch: Any) -> int:
    state = xxhash.xxh3_64()

    def add(node: Any, path: str):
        if isinstance(node, Mapping):
            for name in sorted(node):
                add(node[name], f"{path}/{name}")
        else:
            state.update(f"{path} {node.dtype} {node.shape}\n".encode())
            state.update(node.tobytes())

    add(batch, "")
    return state.intdigest()
