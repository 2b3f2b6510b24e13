"""An image as Pillow opens it to square RGB pixels."""

import numpy as np
from PIL import Image, ImageOps


def square(image: Image.Image, size: int) -> np.ndarray:
    """The middle square of `image`, upright as its EXIF says, as RGB u8 `[size,size,3]`; what is transparent is white."""
    image.draft(None, (2 * size, 2 * size))  # has a JPEG decoded at a half, quarter or eighth where more is not needed
    image = _rgb(ImageOps.exif_transpose(image))
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by the upper 8, of floats from the least to the greatest; Pillow's own conversion would clip both."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        image = Image.fromarray(((values - values.min()) * (255 / (np.ptp(values) or 1))).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
