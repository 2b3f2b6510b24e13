"""Crop and flip, drawn by a counter: what happens to an image is a function of (seed, epoch, image) and nothing else."""

from typing import Any

import numpy as np

Array = Any  # np.ndarray or jax.Array


def draw(stream: int, seed: int, epoch: Array, index: Array) -> Array:
    """Uniform uint32 `[B]` for each image `index` `[B]` in `epoch` (`[B]` or a number), independent between streams."""
    xp = index.__array_namespace__()
    word = _mix(xp.full(index.shape, seed & 0xFFFFFFFF, dtype=xp.uint32) + xp.uint32(stream))
    word = _mix(word ^ xp.asarray(epoch).astype(xp.uint32))
    return _mix(word ^ index.astype(xp.uint32))


def below(bound: int, word: Array) -> Array:
    """uint32 words to int32 in `[0, bound)`, for bounds up to 65536."""
    xp = word.__array_namespace__()
    return (((word >> 16) * xp.uint32(bound)) >> 16).astype(xp.int32)


def _mix(x: Array) -> Array:
    """Wellons' lowbias32, a bijection of uint32 in which every bit of the input moves half of the output's."""
    xp = x.__array_namespace__()
    x = (x ^ (x >> 16)) * xp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * xp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def crop_and_flip(images: np.ndarray, rows: np.ndarray, columns: np.ndarray, flips: np.ndarray, padding: int) -> np.ndarray:
    """uint8 `[B,H,H,C]`, padded with black, cut out again at `rows` and `columns` `[B]`, mirrored where `flips`."""
    size = images.shape[1]
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    cropped = np.empty_like(images)
    for target, source, row, column, flip in zip(cropped, padded, rows, columns, flips, strict=True):
        window = source[row : row + size, column : column + size]
        target[:] = window[:, ::-1] if flip else window
    return cropped
