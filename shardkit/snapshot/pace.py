"""Whether snapshots keep up with the steps."""

import math

__all__ = ["Pace"]

# The first snapshots touch memory for the first time.
_MANY = 6
_SHARE, _LEAST_S = 0.1, 0.02


class Pace:
    """Tells, once, that steps wait for snapshots.

    Args:
        every: Steps between two snapshots.

    Example:
        >>> pace = Pace(every=1)
        >>> said = [pace.note(at_s, stall_s=0.7, copy_s=0.9) for at_s in range(9)]
        >>> print(*filter(None, said))
        steps wait for snapshots: 0.7 s of every 1 s; copying one takes 0.9 s. With \
snapshot.every=3 they would not, and up to 3 steps could be lost.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._before_s = math.nan
        self._num_late = 0
        self._is_told = False

    def note(self, at_s: float, *, stall_s: float, copy_s: float) -> str:
        """Takes in a snapshot that was taken.

        Args:
            at_s: When, by any clock.
            stall_s: How long the step after it waited.
            copy_s: How long it took to copy.

        Returns:
            What is to be told, or nothing.
        """
        between_s, self._before_s = at_s - self._before_s, at_s
        if self._is_told or not stall_s > max(_SHARE * between_s, _LEAST_S):
            self._num_late = 0
            return ""
        self._num_late += 1
        if self._num_late < _MANY:
            return ""
        self._is_told = True
        step_s = max(between_s - stall_s, 1e-6) / self._every
        enough = max(math.ceil(copy_s / step_s), self._every + 1)
        return (
            f"steps wait for snapshots: {stall_s:.2g} s of every {between_s:.2g} s; "
            f"copying one takes {copy_s:.2g} s. With snapshot.every={enough} they "
            f"would not, and up to {enough} steps could be lost."
        )
