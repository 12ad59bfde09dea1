"""Messages as bytes: what would go over the network, without loss and as short as it easily gets.

Whatever a codec made of an array (halved floats, a few levels, mostly zeros), the shortest of a few
forms is found from the values themselves, so codecs of users' own are written likewise. All arrays
together go through Zstandard. `from_bytes` gives back the same bits.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import zstandard

from jfed.errors import DataError

_MAGIC = b"jfm1"
_CHECK = struct.Struct("<4sI")  # the magic and the CRC-32 of what follows
_MOST_LEVELS = 256
_HALVES: dict[int, Any] = {1: np.dtype(np.float16), 2: np.dtype(ml_dtypes.bfloat16)}
_RAW, _LEVELS, _CHANNELS, _SPARSE = 0, 3, 4, 5


def to_bytes(arrays: Sequence[np.ndarray]) -> bytes:
    """Writes float32 arrays, whose shapes the receiver knows."""
    content = b"".join(_written(np.asarray(array, np.float32)) for array in arrays)
    packed = zstandard.ZstdCompressor(level=3).compress(content)
    return _CHECK.pack(_MAGIC, zlib.crc32(packed)) + packed


def from_bytes(message: bytes, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Reads what `to_bytes` wrote.

    Args:
      message: the bytes.
      shapes: of the arrays.

    Returns:
      The arrays, float32.

    Raises:
      DataError: the bytes are cut off, altered, or of other arrays.
    """
    if len(message) < _CHECK.size or message[:4] != _MAGIC:
        raise DataError(f"a message of {len(message)} bytes is none: it begins {message[:4]!r}.")
    packed = message[_CHECK.size :]
    if zlib.crc32(packed) != _CHECK.unpack_from(message)[1]:
        raise DataError(f"a message of {len(message)} bytes is damaged: its checksum differs.")
    try:
        content = _Reader(zstandard.ZstdDecompressor().decompress(packed))
        found = [_read(content, shape) for shape in shapes]
    except (zstandard.ZstdError, struct.error, ValueError, KeyError) as error:
        raise DataError(f"a message is not of arrays {list(shapes)}: {error}.") from error
    if content.rest:
        raise DataError(f"a message has {content.rest} bytes more than arrays {list(shapes)}.")
    return found


class _Reader:
    """Takes bytes from the front."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    @property
    def rest(self) -> int:
        return len(self._content) - self._at

    def take(self, count: int) -> bytes:
        if count > self.rest:
            raise ValueError(f"{count} bytes more were expected, {self.rest} are left")
        self._at += count
        return self._content[self._at - count : self._at]

    def array(self, dtype: Any, count: int) -> np.ndarray:
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)


def _written(array: np.ndarray) -> bytes:
    """The shortest form of an array."""
    forms = [_dense(array)]
    if array.ndim > 1 and array.shape[-1] > 1 and forms[0][0] == _RAW:
        forms += _by_channel(array)
    flat = array.ravel()
    there = _bits(flat) != 0  # -0.0 is there
    if 2 * there.sum() < array.size:
        forms.append(bytes([_SPARSE]) + np.packbits(there).tobytes() + _dense(flat[there]))
    return min(forms, key=len)


def _read(content: _Reader, shape: tuple[int, ...]) -> np.ndarray:
    count, kind = math.prod(shape), content.take(1)[0]
    if kind == _SPARSE:
        there = np.unpackbits(content.array(np.uint8, -(-count // 8)), count=count).astype(bool)
        flat = np.zeros(count, np.float32)
        flat[there] = _read_dense(content, content.take(1)[0], int(there.sum()))
        return flat.reshape(shape)
    if kind == _CHANNELS:
        channels, found = shape[-1], np.empty(shape, np.float32)
        for channel in range(channels):
            values = _read_dense(content, content.take(1)[0], count // channels)
            found[..., channel] = values.reshape(shape[:-1])
        return found
    return _read_dense(content, kind, count).reshape(shape)


def _dense(array: np.ndarray) -> bytes:
    """An array all of whose entries are written."""
    flat = array.ravel()
    if (levels := _levels(flat)) is not None:
        bits = int(levels.codes.max(initial=0)).bit_length()
        planes = (levels.codes[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
        head = struct.pack("<Bdd", bits, levels.least, levels.step)
        return bytes([_LEVELS]) + head + np.packbits(planes.astype(bool)).tobytes()
    for kind, dtype in _HALVES.items():
        with np.errstate(over="ignore"):
            short = flat.astype(dtype)
        if np.array_equal(_bits(short.astype(np.float32)), _bits(flat)):
            return bytes([kind]) + short.tobytes()
    return bytes([_RAW]) + flat.astype("<f4").tobytes()


def _read_dense(content: _Reader, kind: int, count: int) -> np.ndarray:
    if kind == _RAW:
        return content.array("<f4", count).astype(np.float32)
    if kind == _LEVELS:
        bits, least, step = struct.unpack("<Bdd", content.take(17))
        if bits > 8:
            raise ValueError(f"levels of {bits} bits")
        planes = np.unpackbits(content.array(np.uint8, -(-count * bits // 8)), count=count * bits)
        codes = planes.reshape(count, bits) @ (1 << np.arange(bits))
        return _value(least, step, codes)
    return content.array(_HALVES[kind], count).astype(np.float32)


def _by_channel(array: np.ndarray) -> list[bytes]:
    """The form in which each index of the last axis has levels of its own, if all have some."""
    parts = []
    for channel in range(array.shape[-1]):
        part = _dense(array[..., channel])
        if part[0] != _LEVELS:
            return []
        parts.append(part)
    return [bytes([_CHANNELS]) + b"".join(parts)]


class _Levels(NamedTuple):
    """Values that are `least + code * step`, codes from 0 to 255."""

    least: float
    step: float
    codes: np.ndarray


def _levels(flat: np.ndarray) -> _Levels | None:
    """The levels of an array, if it has no more than `_MOST_LEVELS`, evenly spaced."""
    few = np.unique(flat[: 4 * _MOST_LEVELS])
    if len(few) > _MOST_LEVELS or not np.isfinite(flat).all():
        return None
    values = np.unique(flat)
    if not 0 < len(values) <= _MOST_LEVELS:
        return None
    ratios = [(float(v) - float(values[0])).as_integer_ratio() for v in values]
    whole = max(denominator for _, denominator in ratios)
    multiples = [numerator * (whole // denominator) for numerator, denominator in ratios]
    divisor = math.gcd(*multiples)
    if divisor and multiples[-1] // divisor >= _MOST_LEVELS:
        return None
    least, step = float(values[0]), divisor / whole
    codes = np.zeros(len(flat), np.uint8)
    if divisor:
        each = np.asarray([m // divisor for m in multiples], np.uint8)
        codes = each[np.searchsorted(values, flat)]
    same = np.array_equal(_bits(_value(least, step, codes)), _bits(flat))
    return _Levels(least, step, codes) if same else None


def _value(least: float, step: float, codes: np.ndarray) -> np.ndarray:
    return (least + codes.astype(np.float64) * step).astype(np.float32)


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32)
