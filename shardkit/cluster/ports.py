"""A port that is free, and stays so until it is needed.

Owns that socket. Invariant: two numbers that are given one after the other are not the
same.
"""

import socket

__all__ = ["FreshPort"]


class FreshPort:
    """Holds a port without listening at it.

    Args:
        ip: On which address.
    """

    def __init__(self, ip: str) -> None:
        self._ip, self._socket = ip, None

    @property
    def number(self) -> int | None:
        """The port that is held; None if none is."""
        return None if self._socket is None else self._socket.getsockname()[1]

    def hold(self) -> None:
        """Sees that one is held."""
        if self._socket is None:
            self._socket = socket.socket()
            self._socket.bind((self._ip, 0))

    def give(self) -> None:
        """Leaves it to whoever was told of it, and holds another."""
        held, self._socket = self._socket, None
        # Before that one is free, lest it be the same.
        self.hold()
        if held is not None:
            held.close()
