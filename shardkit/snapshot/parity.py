"""The arithmetic of redundancy: blocks of bytes, and blocks that make up for them.

Owns encoding and decoding of byte strings: copies where a codeword has one data block,
XOR where it has one parity block, Reed–Solomon otherwise. Invariant: any `num_data`
blocks of a codeword give back all the others, bit for bit. It keeps nothing but what
it is given: any number of bytes goes through in chunks.

A parity block is a sum over GF(2⁸), so data blocks may be added one after another, in
any order, as they arrive. `zfec` needs all of them at once; but multiplying by one of
its coefficients is a table of 256 bytes, and zfec itself spells that table out.

References:
    Rizzo: Effective Erasure Codes for Reliable Computer Communication Protocols (ACM
    SIGCOMM CCR 1997), which zfec implements.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from shardkit.errors import ConfigError
from shardkit.snapshot.head import Buffer, as_bytes

__all__ = ["ParitySum", "coefficient_tables", "decode"]

_CHUNK_BYTES = 1 << 18
"""What is multiplied at once: what fits into a cache."""
_EVERY_BYTE = bytes(range(256))

_Tables = tuple[bytes | None, ...]
"""For every block what each byte is multiplied to; None for the byte itself."""


class ParitySum:
    r"""One parity block, to which data blocks are added as they come.

    Args:
        memory: Where the block is made; what was there does not matter.
        num_data: The data blocks of the codeword.
        num_parity: Its parity blocks.
        index: Which of these it is.

    Example:
        >>> memory = bytearray(3)
        >>> block = ParitySum(memory, num_data=2, num_parity=1, index=0)
        >>> block.add(0, 0, bytes([1, 2, 3]))
        >>> block.add(1, 0, bytes([1, 1]))
        >>> memory
        bytearray(b'\x00\x03\x03')
    """

    def __init__(
        self, memory: Buffer, num_data: int, num_parity: int, index: int
    ) -> None:
        self._target = np.frombuffer(memory, np.uint8)
        self._tables = coefficient_tables(num_data, num_parity)[index]
        self._added = [0] * num_data
        self._end = 0

    def add(self, data_index: int, offset: int, chunk: Buffer) -> None:
        """Adds the next bytes of one data block.

        Args:
            data_index: Which of the codeword's data blocks.
            offset: Where in the block the chunk begins: where the last one ended.
            chunk: The bytes.

        Raises:
            ValueError: If the chunk is not the next one, or does not fit. Adding bytes
                twice would take them out again.
        """
        data = np.frombuffer(as_bytes(chunk), np.uint8)
        if offset != self._added[data_index] or offset + data.size > self._target.size:
            raise ValueError(
                f"block {data_index}: expected bytes from {self._added[data_index]} to "
                f"at most {self._target.size}, found {data.size} from {offset}"
            )
        table = self._tables[data_index]
        for start in range(0, data.size, _CHUNK_BYTES):
            part = data[start : start + _CHUNK_BYTES]
            self._add(offset + start, _times(part, table))
        self._added[data_index] += data.size

    def is_complete(self, data_index: int, num_bytes: int) -> bool:
        """Whether so many bytes of a data block are in."""
        return self._added[data_index] == num_bytes

    def _add(self, start: int, part: np.ndarray) -> None:
        # What no block has reached yet holds something old.
        middle = min(max(self._end - start, 0), part.size)
        both = self._target[start : start + middle]
        np.bitwise_xor(both, part[:middle], out=both)
        self._target[start + middle : start + part.size] = part[middle:]
        self._end = max(self._end, start + part.size)


def decode(
    num_data: int, num_parity: int, blocks: Mapping[int, Buffer], index: int
) -> memoryview:
    """Finds a data block, or the same range of one, from others of its codeword.

    Args:
        num_data: The data blocks of the codeword.
        num_parity: Its parity blocks.
        blocks: `num_data` blocks of the same length, by their index; those of parity
            follow those of data.
        index: Which data block to find.

    Returns:
        Its bytes.

    Raises:
        ValueError: If the blocks are too few, or of different lengths.
        ConfigError: If zfec is needed and is not there.

    Example:
        >>> bytes(decode(2, 1, {1: b"ab", 2: bytes([1, 1])}, index=0))
        b'`c'
    """
    views = {i: as_bytes(block) for i, block in sorted(blocks.items())}
    if len(views) != num_data or len({len(view) for view in views.values()}) > 1:
        raise ValueError(
            f"expected {num_data} blocks of one length, found "
            f"{ {i: len(view) for i, view in views.items()} }"
        )
    if index in views:
        return views[index]
    if num_data == 1:
        return next(iter(views.values()))
    tables = _decoding_tables(num_data, num_parity, tuple(views), index)
    found = bytearray(len(next(iter(views.values()))))
    _add_blocks(np.frombuffer(found, np.uint8), list(views.values()), tables)
    return memoryview(found)


def _add_blocks(
    target: np.ndarray, blocks: Sequence[memoryview], tables: _Tables
) -> None:
    for start in range(0, target.size, _CHUNK_BYTES):
        part = target[start : start + _CHUNK_BYTES]
        for block, table in zip(blocks, tables, strict=True):
            data = np.frombuffer(block[start : start + part.size], np.uint8)
            np.bitwise_xor(part, _times(data, table), out=part)


def _times(data: np.ndarray, table: bytes | None) -> np.ndarray:
    """Multiplies every byte."""
    if table is None:
        return data
    return np.frombuffer(data.tobytes().translate(table), np.uint8)


@functools.lru_cache(maxsize=32)
def coefficient_tables(num_data: int, num_parity: int) -> tuple[_Tables, ...]:
    """What each data block is multiplied by in each parity block.

    Returns:
        For every parity block and every data block, every byte's multiple; None for
        the byte itself.

    Raises:
        ConfigError: If zfec is needed and is not there.
    """
    if num_data == 1 or num_parity == 1:
        return ((None,) * num_data,) * num_parity
    encoder = _zfec().Encoder(num_data, num_data + num_parity)
    wanted = tuple(range(num_data, num_data + num_parity))
    columns = [encoder.encode(blocks, wanted) for blocks in _units(num_data)]
    return tuple(_as_tables(row) for row in zip(*columns, strict=True))


@functools.lru_cache(maxsize=256)
def _decoding_tables(
    num_data: int, num_parity: int, have: tuple[int, ...], index: int
) -> _Tables:
    """What each of the blocks that are there is multiplied by to find one that is not.

    Finding just that one takes a fraction of what zfec takes to find all that are not.
    """
    if num_parity == 1:
        return (None,) * num_data
    decoder = _zfec().Decoder(num_data, num_data + num_parity)
    return _as_tables(
        decoder.decode(blocks, have)[index] for blocks in _units(num_data)
    )


def _units(num_data: int) -> Iterator[tuple[bytes, ...]]:
    """Yields blocks of which one has every byte once, and the others zeros."""
    for j in range(num_data):
        yield tuple(_EVERY_BYTE if i == j else bytes(256) for i in range(num_data))


def _as_tables(blocks: Iterable[bytes]) -> _Tables:
    return tuple(None if block == _EVERY_BYTE else bytes(block) for block in blocks)


def _zfec():
    try:
        import zfec
    except ImportError:
        raise ConfigError(
            "redundancy parity:M with M of 2 or more needs zfec, which is not there; "
            "pip install 'shardkit[parity]', or choose parity or mirror."
        ) from None
    return zfec
