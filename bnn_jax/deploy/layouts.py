"""Weights in the order in which the compiled kernels read them; see ``kernels/kernels.inc``."""

import numpy as np

Array = np.ndarray

# The most channels whose sums of nine signs fit a signed byte.
CODEBOOK_CHANNELS = 14


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below ``value``."""
    return -(-value // multiple) * multiple


def _padded(array: Array, axis: int, multiple: int) -> Array:
    missing = round_up(array.shape[axis], multiple) - array.shape[axis]
    return np.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)]) if missing else array


def _in_tiles(weights: Array, tile: int) -> Array:
    """(..., O) -> (O / tile, ..., tile), with zeros for the output channels that fill the last tile."""
    weights = _padded(weights, -1 % weights.ndim, tile)
    split = weights.reshape(*weights.shape[:-1], -1, tile)
    return np.ascontiguousarray(np.moveaxis(split, -2, 0))


def float_weights(kernel: Array, tile: int, pixel: int) -> Array:
    """For CONV_FLOAT: (kh, kw, I, O) -> (tiles, kh, kw, pixel, tile), zeros for what lies between two positions."""
    kernel = np.pad(kernel, ((0, 0), (0, 0), (0, pixel - kernel.shape[2]), (0, 0)))
    return _in_tiles(kernel.astype(np.float32), tile)


def depthwise_weights(kernel: Array) -> Array:
    """For CONV_DEPTHWISE: (kh, kw, 1, C) -> (kh, kw, C), C a multiple of 64."""
    return np.ascontiguousarray(_padded(kernel[:, :, 0].astype(np.float32), 2, 64))


def nibble_weights(positive: Array) -> Array:
    """For CONV_BINARY by look-up: bool (kh, kw, I, O) -> the number of every four signs, in blocks of channels.

    16 output channels or fewer are one block; more are blocks of 64, the last one 32 where that suffices.
    """
    positive = _padded(positive.astype(np.uint8), 2, 4)
    height, width, num_in, num_out = positive.shape
    fours = positive.reshape(height, width, num_in // 4, 4, num_out)
    numbers: Array = np.sum(fours << np.arange(4, dtype=np.uint8)[:, None], axis=3, dtype=np.uint8)  # type: ignore[assignment]
    if num_out <= 16:
        return _in_tiles(numbers, 16).ravel()
    blocks = [numbers[..., first : first + 64] for first in range(0, num_out, 64)]
    return np.concatenate([_in_tiles(b, 64 if b.shape[-1] > 32 else 32).ravel() for b in blocks])


def neighbours_in_word(width: int, num_in: int) -> int:
    """Neighbouring positions that share a word of CONV_BINARY; 1 where channels fill words or the kernel is narrow."""
    return max(1, 64 // num_in) if width > 1 else 1


def word_weights(positive: Array, tile: int) -> Array:
    """For CONV_BINARY by counting: bool (kh, kw, I, O) -> (tiles, kh, kw, I / 64, tile) words, bit i for channel i.

    Neighbours that share a word are like channels of one position.
    """
    height, width, num_in, num_out = positive.shape
    neighbours = neighbours_in_word(width, num_in)
    positive = _padded(positive.astype(np.uint64), 1, neighbours).reshape(height, -1, neighbours * num_in, num_out)
    positive = _padded(positive, 2, 64)
    height, width, num_in, num_out = positive.shape
    bits = positive.reshape(height, width, num_in // 64, 64, num_out) << np.arange(64, dtype=np.uint64)[:, None]
    return _in_tiles(np.bitwise_or.reduce(bits, axis=3), tile)


def integer_weights(codes: Array, tile: int, dtype: type) -> Array:
    """For CONV_BYTES and CONV_SHORTS: (kh, kw, I, O) -> (tiles, kh, kw, I / n, tile, n), n = 4 bytes or 2 shorts."""
    group = 4 if dtype == np.int8 else 2
    codes = _padded(codes.astype(dtype), 2, group)
    height, width, num_in, num_out = codes.shape
    tiles = _in_tiles(codes.reshape(height, width, num_in // group, group, num_out), tile)
    return np.ascontiguousarray(np.swapaxes(tiles, -1, -2))


def codebook_chunk(num_in: int) -> int:
    """Input channels of a block, so that all blocks are about as large."""
    blocks = -(-num_in // CODEBOOK_CHANNELS)
    return -(-num_in // blocks)


def codebook_offsets(indices: Array, patterns: int, tile: int) -> Array:
    """For CONV_CODEBOOK: indices (I, O) -> for every block and output channel the places of its sums in the table."""
    num_in = len(indices)
    chunk = codebook_chunk(num_in)
    blocks = []
    for first in range(0, num_in, chunk):
        block = indices[first : first + chunk].astype(np.uint32)
        places = (np.arange(len(block), dtype=np.uint32)[:, None] * patterns + block) * tile
        blocks.append(places.T.astype(np.uint16).ravel())
    return np.concatenate(blocks)


def codebook_rows(levels: Array) -> Array:
    """Patterns (n, 9) -> (n, 3), each row of signs as a number: 4 for the left, 2 for the middle, 1."""
    positive = (levels > 0).reshape(-1, 3, 3)
    return np.ascontiguousarray(np.sum(positive * np.array([4, 2, 1]), axis=2).astype(np.uint8))


def aligned(array: Array) -> Array:
    """The same array at an address that is a multiple of 64, so that no vector lies on two cache lines."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
