"""The group of quarter turns: `turns` counts them counter-clockwise, 0 to 3, as `np.rot90` does.

Exact on every pixel, without interpolation, and the same for NumPy and JAX arrays.
"""

from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # np.ndarray or jax.Array; both come back as they went in
ANGLES = ("0°", "90°", "180°", "270°")


def rotate(images: Array, turns: Array) -> Array:
    """Each of `images` `[B,H,H,C]` turned by its own entry of `turns` `[B]`; ValueError unless square."""
    xp = _namespace(images)
    turns = xp.asarray(turns) % 4
    if isinstance(images, np.ndarray):
        turned = np.empty(images.shape, images.dtype)
        views = [np.rot90(whole_pixels(images), k, (1, 2)) for k in range(4)]
        for index, (target, turn) in enumerate(zip(whole_pixels(turned), turns.tolist(), strict=True)):
            target[:] = views[turn][index]
        return turned
    turns = turns[:, None, None, None]
    images = xp.where(turns % 2 == 1, xp.swapaxes(images, 1, 2), images)
    images = xp.where((turns == 1) | (turns == 2), xp.flip(images, axis=1), images)
    return xp.where(turns >= 2, xp.flip(images, axis=2), images)


def all_turns(images: Array) -> tuple[Array, Array]:
    """`images` `[B,H,H,C]` in each of the four turns, image by image: `[4B,H,H,C]` and the turns i32 `[4B]`."""
    xp = _namespace(images)
    batch = images.shape[0]
    views = xp.stack([xp.rot90(images, k, (1, 2)) for k in range(4)], axis=1)
    return views.reshape(4 * batch, *images.shape[1:]), xp.tile(xp.arange(4, dtype=xp.int32), batch)


def whole_pixels(images: np.ndarray) -> np.ndarray:
    """`[B,H,W,C]` as `[B,H,W]` of one element a pixel, which NumPy copies at once and not channel by channel."""
    images = np.ascontiguousarray(images)
    return images.view(f"V{images.itemsize * images.shape[-1]}")[..., 0]


def _namespace(images: Array) -> ModuleType:
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"only square images turn onto themselves, not {images.shape[1]}x{images.shape[2]}")
    return images.__array_namespace__()
