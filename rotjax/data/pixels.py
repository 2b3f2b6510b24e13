"""An image as Pillow opens it to square RGB pixels, and many of them by threads."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.Image import Transpose

log = logging.getLogger(__name__)

UPRIGHT = {  # by EXIF's orientation; `ImageOps.exif_transpose` writes EXIF anew too, and fails where any field is odd
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def square(image: Image.Image, size: int) -> np.ndarray:
    """The middle square of `image`, upright as its EXIF says, as RGB u8 `[size,size,3]`; what is transparent is white.

    A JPEG is loaded at a half, a quarter or an eighth where more is not needed, and stays so: ValueError where a later call
    needs more.
    """
    reduced = getattr(image, "decoderconfig", ())
    if reduced and reduced[0] > 1 and min(image.size) < 2 * size:
        raise ValueError(f"this JPEG was loaded at 1/{reduced[0]} of its size, too small for {size} px; open it anew")
    image.draft(None, (2 * size, 2 * size))
    image.load()
    turn = _turn(image)
    image = _rgb(image if turn is None else image.transpose(turn))
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def ahead(function: Callable, items: Iterable) -> Iterator:
    """`function` of each item, in order, computed by as many threads as there are cores and never far ahead."""
    scheduled = getattr(os, "sched_getaffinity", None)  # of a cluster's node a job may have a few cores only
    threads = len(scheduled(0)) if scheduled else os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _turn(image: Image.Image) -> Transpose | None:
    """What makes `image` upright; None where it is, or its EXIF cannot be read, which for some formats Pillow raises."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # of Pillow: whatever odd content leads to
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise  # which passes
        return None


def _rgb(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by the upper 8, of floats from the least to the greatest; Pillow's own conversion would clip both."""
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535)
        if 0 < values.max() < 4096:
            _warn_of_dark_images()
        values[values == image.info.get("transparency", -1)] = 65535
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        image = Image.fromarray(((values - values.min()) * (255 / (np.ptp(values) or 1))).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@cache
def _warn_of_dark_images() -> None:
    """Says so once: there may be thousands."""
    log.warning("grey images of 16 bits are here that use 12 or fewer, and become nearly black; scale them to all 16 bits")
