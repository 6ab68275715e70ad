"""Programs that wait for a change of devices before anybody asks for one.

Owns the thread that compiles the placements likely to come next, and the guess which
those are. Invariant: nobody waits for it. It holds no state of a run; what it has
compiled it leaves with the placements.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from shardkit.background import Background
from shardkit.errors import ConfigError

__all__ = ["Standby", "check_counts", "likely_counts"]

_NICENESS = 10
# Stands in for a device count: what is needed on whatever devices.
_CERTAIN = 0


class Derivable(Protocol):
    """What can be made ready; `placements.Placements` is one."""

    def preparing(self, num_devices: int) -> Callable[[], int]:
        """Returns what makes a placement ready and returns the bytes of code added.

        Called where settings hold that the work must see; the work runs elsewhere.
        """
        ...


def likely_counts(
    num_devices: int,
    num_pool: int,
    *,
    scripted: Iterable[int] = (),
    configured: Iterable[int] = (),
) -> list[int]:
    """Guesses the device counts of the next change, the likeliest first.

    Args:
        num_devices: How many there are.
        num_pool: How many there can be.
        scripted: What is known to come, in order.
        configured: What somebody expects, in order.

    Returns:
        Counts from 1 to `num_pool`, each once, without the present one: what is
        scripted; what is configured; one and two fewer; the whole pool; one more;
        half.

    Example:
        >>> likely_counts(6, 8, scripted=[3, 8])
        [3, 8, 5, 4, 7]
        >>> likely_counts(16, 16, configured=[12])
        [12, 15, 14, 8]
    """
    guesses = [
        *scripted,
        *configured,
        num_devices - 1,
        num_devices - 2,
        num_pool,
        num_devices + 1,
        num_devices // 2,
    ]
    found = dict.fromkeys(n for n in guesses if 1 <= n <= num_pool)
    return [n for n in found if n != num_devices]


def check_counts(counts: Iterable[int], num_pool: int, *, max_programs: int) -> None:
    """Checks device counts that somebody expects.

    Raises:
        ConfigError: If the pool has no such number of devices, naming all of them; or
            if nothing is to be prepared for them.
    """
    if not isinstance(counts, Iterable):
        raise ConfigError(
            f"standby_counts: expected device counts such as (4, 2), found {counts!r}"
        )
    wrong = [n for n in counts if type(n) is not int or not 1 <= n <= num_pool]
    if wrong:
        raise ConfigError(
            f"standby_counts: expected device counts from 1 to {num_pool} (the pool), "
            f"found {', '.join(map(repr, wrong))}"
        )
    if list(counts) and not max_programs:
        raise ConfigError(
            "Trainer: standby_counts says what to think of first, and standby=0 that "
            "nothing is to be prepared; give standby=1 or more"
        )


class Standby:
    """Makes placements ready in one background thread.

    Args:
        placements: What makes them.
        max_programs: How many it makes ready at most, over the whole run, or over each
            phase of a batch ramp.
        max_bytes: How much code they may add; none is begun beyond.
        configured: Device counts that somebody expects.

    Example:
        >>> class Counted:
        ...     def preparing(self, num_devices):
        ...         return lambda: print("ready:", num_devices) or 1000
        >>> standby = Standby(Counted(), max_programs=2)
        >>> standby.expect([3, 5, 7])
        >>> standby.wait(timeout_s=5)
        ready: 3
        ready: 5
        True
        >>> standby.close()
    """

    def __init__(
        self,
        placements: Derivable,
        *,
        max_programs: int = 8,
        max_bytes: int = 1 << 30,
        configured: Sequence[int] = (),
    ) -> None:
        self._placements, self.configured = placements, tuple(configured)
        self._max_programs = self._programs_left = max_programs
        self._bytes_left = max_bytes
        self._background = Background(
            "shardkit-standby", self._take, niceness=_NICENESS
        )
        self._queue: list[tuple[int, int | None, Callable[[], int]]] = []
        # From where to where everything is made, and for where a program.
        self._ready: set[tuple[int | None, int]] = set()
        self._made: set[int] = set()
        self._is_closed = False

    def begin_anew(self) -> None:
        """Forgets what was made ready, as for other steps other programs are needed.

        Then it may make as many as at first; their code counts as before.
        """
        with self._background.changed:
            self._queue = []
            self._ready.clear()
            self._made.clear()
            self._programs_left = self._max_programs

    def expect(
        self,
        counts: Sequence[int],
        *,
        present: int | None = None,
        certain: Callable[[], int] | None = None,
    ) -> None:
        """Replaces what is to be made ready; what is under way is finished.

        Args:
            counts: Device counts, the likeliest first.
            present: Where the run is. What it has not compiled yet, but a change
                needs, comes after the likeliest count, whose program takes the
                longest, and counts as none of the `max_programs`. Nor does what was
                made ready from elsewhere: only the move is new.
            certain: Makes ready, where the run is, what it needs whether or not its
                devices change. It comes first and counts as no program.
        """
        order = list(counts)
        if present is not None:
            order.insert(1, present)
        with self._background.changed:
            if self._is_closed:
                return
            self._queue = [
                (n, present, self._placements.preparing(n))
                for n in order
                if (present, n) not in self._ready
            ]
            if certain is not None:
                self._queue.insert(0, (_CERTAIN, present, certain))
            if self._queue:
                self._background.begin()

    def look_ahead(
        self,
        hosts: Sequence[int],
        num_pool: int,
        *,
        scripted: Sequence[int] = (),
        certain: Callable[[], int] | None = None,
    ) -> None:
        """Expects what may come next.

        Over several processes that is only what is known: all of them must agree on a
        change, and those that lose one of them begin anew.

        Args:
            hosts: The host of every device that the run is on.
            num_pool: How many devices there are at all.
            scripted: Device counts that are known to come.
            certain: As `expect` takes it.
        """
        present = len(hosts)
        if len(set(hosts)) > 1:
            known = dict.fromkeys([*scripted, *self.configured])
            counts = [n for n in known if n != present]
        else:
            counts = likely_counts(
                present, num_pool, scripted=scripted, configured=self.configured
            )
        if counts or certain:
            self.expect(counts, present=present, certain=certain)

    def wait(self, timeout_s: float) -> bool:
        """Waits until there is nothing left to do; whether that was so in time."""
        return self._background.wait(timeout_s)

    def close(self) -> None:
        """Begins nothing any more; a second call does nothing.

        What is being compiled cannot be stopped, and ends by itself.
        """
        with self._background.changed:
            self._is_closed = True
            self._queue = []

    def _take(self) -> Callable[[], None] | None:
        if self._programs_left < 1 or self._bytes_left < 1:
            self._queue = [x for x in self._queue if self._is_free(*x[:2])]
        if not self._queue:
            return None
        count, present, prepare = self._queue.pop(0)
        # Counted as it is begun: what ends in another phase is none of its programs.
        self._programs_left -= not self._is_free(count, present)
        self._ready.add((present, count))
        self._made.add(count)
        return functools.partial(self._make, prepare)

    def _make(self, prepare: Callable[[], int]) -> None:
        num_bytes = prepare()
        with self._background.changed:
            self._bytes_left -= num_bytes

    def _is_free(self, count: int, present: int | None) -> bool:
        """Whether it counts as no program."""
        return count in (_CERTAIN, present) or count in self._made
