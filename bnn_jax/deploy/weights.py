"""Weights of a layer as they are stored: look-ups packed into bits, with levels or patterns and scales."""

import dataclasses
import functools
import math

import numpy as np

Array = np.ndarray
Shape = tuple[int, ...]

POSITIONS = 9


@dataclasses.dataclass(frozen=True)
class FloatWeights:
    """Real-valued weights, (kh, kw, I, O) or (I, O), float32."""

    kernel: Array

    @property
    def shape(self) -> Shape:
        """Shape of the kernel."""
        return self.kernel.shape

    @property
    def integers(self) -> None:
        """They are no multiples of a scale."""
        return None


@dataclasses.dataclass(frozen=True)
class LevelWeights:
    """Weights that are levels times a scale.

    Attributes:
      indices: unsigned integers of the kernel's shape.
      levels: (L,) float32, increasing.
      scale: () or (O,), float32.
      bits: bits of one packed index; 0: as few as L levels need, several indices to a word.
    """

    indices: Array
    levels: Array
    scale: Array
    bits: int

    @property
    def shape(self) -> Shape:
        """Shape of the kernel."""
        return self.indices.shape

    @functools.cached_property
    def kernel(self) -> Array:
        """The weights, float32."""
        return self.levels[self.indices] * self.scale

    @functools.cached_property
    def integers(self) -> tuple[Array, Array] | None:
        """Integers of the kernel's shape and the scale, () or (O,), whose product they are; None if too large."""
        unit = common_unit(self.levels)
        if unit is None:
            return None
        return np.rint(self.levels / unit).astype(np.int16)[self.indices], np.float32(unit) * self.scale


@dataclasses.dataclass(frozen=True)
class PatternWeights:
    """3x3 kernels that are one of a few patterns of -1 and +1, times a scale.

    Attributes:
      indices: (I, O), unsigned integers.
      levels: (n, 9) float32, the patterns.
      scale: () or (O,), float32.
      all_patterns: whether the index is the pattern: its bit 8 - q is the sign of position q.
    """

    indices: Array
    levels: Array
    scale: Array
    all_patterns: bool

    @property
    def shape(self) -> Shape:
        """Shape of the kernel."""
        return (3, 3, *self.indices.shape)

    @property
    def bits(self) -> int:
        """Bits of one packed index."""
        return max(1, math.ceil(math.log2(len(self.levels))))

    @functools.cached_property
    def signs(self) -> Array:
        """-1 and +1, (3, 3, I, O), float32."""
        num_in, num_out = self.indices.shape
        return np.moveaxis(self.levels[self.indices].reshape(num_in, num_out, 3, 3), (0, 1), (2, 3))

    @property
    def kernel(self) -> Array:
        """The weights, float32."""
        return self.signs * self.scale

    @property
    def integers(self) -> tuple[Array, Array]:
        """Signs and scale."""
        return self.signs.astype(np.int16), self.scale


Weights = FloatWeights | LevelWeights | PatternWeights


def common_unit(levels: Array) -> float | None:
    """The largest number whose integer multiples, at most 2**14 in magnitude, are the levels; None if there is none."""
    magnitudes = np.abs(np.asarray(levels, np.float64))
    gaps = np.diff(np.unique(np.append(magnitudes, 0.0)))
    if not len(gaps):
        return 1.0
    for divisor in range(1, 17):
        unit = float(gaps.min()) / divisor
        multiples = magnitudes / unit
        if multiples.max() > 2**14:
            return None
        if np.all(np.abs(multiples - np.rint(multiples)) < 1e-6 * np.maximum(multiples, 1)):
            return unit
    return None


def pack_bits(values: Array, bits: int) -> bytes:
    """Unsigned integers as a stream of ``bits`` each, the lowest bit first; zeros fill the last byte."""
    columns = (values.reshape(-1, 1) >> np.arange(bits, dtype=np.uint16)) & 1
    return np.packbits(columns.astype(np.uint8), bitorder="little").tobytes()


def unpack_bits(data: bytes | Array, bits: int, count: int) -> Array:
    """The inverse of ``pack_bits``: (count,) uint16."""
    stream = np.unpackbits(np.frombuffer(data, np.uint8), count=bits * count, bitorder="little")
    columns = stream.reshape(count, bits).astype(np.uint16) << np.arange(bits, dtype=np.uint16)
    return np.bitwise_or.reduce(columns, axis=1) if bits else np.zeros(count, np.uint16)


def digits_per_word(base: int) -> int:
    """Digits to a base that fit 64 bits."""
    return math.floor(64 / math.log2(base) + 1e-12) if base > 1 else 64


def pack_digits(values: Array, base: int) -> bytes:
    """Digits to a base that is no power of two: as many to each word of 64 bits as fit, the first one lowest."""
    per_word = digits_per_word(base)
    words = np.zeros(-(-values.size // per_word), np.uint64)
    padded = np.pad(values.ravel().astype(np.uint64), (0, len(words) * per_word - values.size))
    for digit in padded.reshape(-1, per_word).T[::-1]:
        words = words * np.uint64(base) + digit
    return words.astype("<u8").tobytes()


def unpack_digits(data: bytes | Array, base: int, count: int) -> Array:
    """The inverse of ``pack_digits``: (count,) uint16."""
    words = np.frombuffer(data, "<u8").copy()
    columns = np.empty((len(words), digits_per_word(base)), np.uint16)
    for column in range(columns.shape[1]):
        words, columns[:, column] = np.divmod(words, np.uint64(base))
    return columns.ravel()[:count]


def packed_bytes(count: int, bits: int, base: int) -> int:
    """Bytes of ``count`` packed indices: of ``bits`` each, or where that is 0 of digits to the base."""
    if bits:
        return -(-count * bits // 8)
    return 8 * -(-count // digits_per_word(base))
