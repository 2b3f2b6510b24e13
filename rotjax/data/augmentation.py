"""Augmentation with a counter-based random generator: a function of (seed, epoch, image index) alone.

Byte-identical for NumPy and JAX arrays: batches may be made on the host or, from images resident there, on the device.
"""

from typing import Any

import jax
import numpy as np

from rotjax.data.tasks import COLUMNS, CUT_COLUMNS, CUT_ROWS, FLIPS, ROWS, STREAMS, Task
from rotjax.rotation import contiguous

GREY = np.uint8(120)  # as bright as the mean of photographs
VERSION = 2  # to be raised with every change of the batches that a seed gives: a run does not go on with others
Array = Any  # np.ndarray or jax.Array


def train_view(data: dict, pick: dict, *, task: Task, flip: bool, cutout: float = 0.0) -> dict:
    """A training batch: the task's view of the images of `data` that `pick` selects, cropped, mirrored, cut out at random.

    A pick is `{'seed': u32[B], 'epoch': i32[B], 'index': i32[B]}`. Crops pad by an eighth of the side (4 pixels of 32);
    `cutout` is the side of the grey square as a fraction of the image's.
    """
    words = _words(pick)
    images = data["image"][pick["index"]]
    padding = images.shape[1] // 8
    rows, columns = (below(2 * padding + 1, words[stream]) for stream in (ROWS, COLUMNS))
    flips = words[FLIPS] >> 31 if flip else None
    images = crop_and_flip(images, rows, columns, flips, padding)
    if side := round(cutout * images.shape[1]):
        rows, columns = (below(images.shape[1], words[stream]) for stream in (CUT_ROWS, CUT_COLUMNS))
        images = cut_out(images, rows, columns, side)
    images, labels = task(images, data["label"][pick["index"]], words)
    return {"image": images, "label": labels}


def eval_view(data: dict, pick: dict, *, task: Task) -> dict:
    """An evaluation batch: the task's view of the images of `data` that `pick` selects, unaugmented, with their `weight`."""
    images, labels = task(data["image"][pick["index"]], data["label"][pick["index"]], _words(pick))
    weight = pick["weight"].repeat(len(labels) // len(pick["index"]))
    return {"image": images, "label": labels, "weight": weight}


def _words(pick: dict) -> Array:
    return draw(np.arange(STREAMS)[:, None], pick["seed"], pick["epoch"], pick["index"])


def draw(stream: Array, seed: Array, epoch: Array, index: Array) -> Array:
    """Uniform uint32 `[B]`, a hash of the image `index` `[B]` and of stream, seed and epoch (`[B]` or numbers).

    For an array of streams `[S,1]` it is `[S,B]`.
    """
    xp = index.__array_namespace__()
    word = _mix(xp.broadcast_to(xp.asarray(seed, dtype=xp.uint32), index.shape))
    word = _mix(word ^ xp.asarray(stream, dtype=xp.uint32))
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


def crop_and_flip(images: Array, rows: Array, columns: Array, flips: Array | None, padding: int) -> Array:
    """uint8 `[B,H,H,C]`, zero-padded, cropped at `rows` and `columns` `[B]`, mirrored where `flips`."""
    if isinstance(images, jax.Array):
        return _crop_and_flip(images, rows, columns, flips, padding)
    count, size, _, channels = images.shape
    padded = np.zeros((count, size + 2 * padding, size + 2 * padding, channels), np.uint8)
    padded[:, padding : padding + size, padding : padding + size] = images
    rowwise = padded.reshape(count, size + 2 * padding, -1)
    windows = np.lib.stride_tricks.sliding_window_view(rowwise, (size, size * channels), axis=(1, 2))
    cropped = windows[np.arange(count), rows, columns * channels].reshape(images.shape)
    if flips is not None:
        mirrored = np.flatnonzero(flips)
        cropped[mirrored] = contiguous(cropped[mirrored][:, :, ::-1])
    return cropped


def _crop_and_flip(
    images: jax.Array, rows: jax.Array, columns: jax.Array, flips: jax.Array | None, padding: int
) -> jax.Array:
    edges = (padding, padding)
    padded = jax.numpy.pad(images, ((0, 0), edges, edges, (0, 0)))
    cut = jax.vmap(lambda image, row, column: jax.lax.dynamic_slice(image, (row, column, 0 * row), images.shape[1:]))
    cropped = cut(padded, rows, columns)
    return cropped if flips is None else jax.numpy.where(flips[:, None, None, None] == 1, cropped[:, :, ::-1], cropped)


def cut_out(images: Array, rows: Array, columns: Array, side: int) -> Array:
    """uint8 `[B,H,H,C]` with a grey square of `side` pixels around `rows` and `columns` `[B]`, cut off at the edges.

    "Improved regularization of convolutional neural networks with Cutout" (DeVries and Taylor, 2017).
    """
    xp = images.__array_namespace__()
    places = xp.arange(images.shape[1]) + side // 2

    def covered(centre: Array) -> Array:
        return (places >= centre[:, None]) & (places < centre[:, None] + side)

    hole = covered(rows)[:, :, None] & covered(columns)[:, None, :]
    return xp.where(hole[..., None], GREY, images)
