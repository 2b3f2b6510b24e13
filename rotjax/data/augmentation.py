"""Crop and flip, drawn by a counter: what happens to an image is a function of (seed, epoch, image) and nothing else."""

from typing import Any

import numpy as np

from rotjax.rotation import whole_pixels

STREAM = 2  # to be raised with every change of the batches that a seed gives: a run does not go on with others
Array = Any  # np.ndarray or jax.Array


def draw(stream: int, seed: int, epoch: Array, index: Array) -> Array:
    """Uniform uint32 `[B]` for each image `index` `[B]` in `epoch` (`[B]` or a number), other ones for other streams."""
    xp = index.__array_namespace__()
    word = _mix(xp.full(index.shape, seed & 0xFFFFFFFF, dtype=xp.uint32))
    word = _mix(word ^ xp.uint32(stream))
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
    count, size, _, channels = images.shape
    padded = np.zeros((count, size + 2 * padding, size + 2 * padding, channels), np.uint8)
    padded[:, padding : padding + size, padding : padding + size] = images
    cropped = np.empty(images.shape, np.uint8)
    pixels = zip(whole_pixels(cropped), whole_pixels(padded), strict=True)
    places = zip(rows.tolist(), columns.tolist(), flips.tolist(), strict=True)
    for (target, source), (row, column, flip) in zip(pixels, places, strict=True):
        window = source[row : row + size, column : column + size]
        target[:] = window[:, ::-1] if flip else window
    return cropped
