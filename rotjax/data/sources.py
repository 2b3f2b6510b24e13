"""Where images come from: data sets by name, each decoded once to uint8 arrays."""

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rotjax.data import photographs
from rotjax.data.dataset import Dataset, check_fits, held_out
from rotjax.data.decoded import IN_MEMORY
from rotjax.data.folders import shown
from rotjax.data.pixels import square
from rotjax.errors import UsageError, in_bytes

log = logging.getLogger(__name__)


OURS = ("digits", "cifar10", "imagenette")


def canonical(name: str | Path) -> str:
    """The data set `name`; for every way to write the path of a folder of photographs the same: `photos` for `./photos/`."""
    name = f"{name}/" if isinstance(name, Path) else name  # the folder `Path("digits")` is not the set of that name
    if not is_path(name):
        return name
    path = str(Path(name))
    return path if is_path(path) else f"./{path}"


def load(
    name: str | Path,
    *,
    image_size: int,
    batch_size: int = 1,
    labelled: bool = False,
    data_dir: str | Path | None = None,
    progress: Callable = iter,
) -> Dataset:
    """The data set `name`: `cifar10`, `imagenette`, `digits`, any TFDS image-classification set prepared as array_record,
    or a folder of photographs, which if named like one of these three is written as a path, `./digits`.

    `data_dir` is TFDS's, by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`. `progress` wraps the records as they
    are decoded. Raises UsageError for a name that does not exist, an `image_size` below 1 or fewer training images than
    `batch_size`, DataError for data that is not there or unreadable, or if it is to be `labelled` has no classes: before
    anything is decoded.
    """
    if image_size < 1:
        raise UsageError(f"image_size={image_size} is too small; it is at least 1")
    name = canonical(name) if isinstance(name, Path) else name  # an error says a string as it was given
    if is_path(name):
        return _photographs(name, image_size, progress, batch_size, labelled)
    if name == "digits":
        return _digits(image_size, batch_size)
    from rotjax.data import prepared

    return prepared.load(name, image_size, data_dir, progress, batch_size, labelled)


def subset(labels: np.ndarray, per_class: int, seed: int, classes: Sequence[str] = ()) -> np.ndarray:
    """Indices of `per_class` images of each class of `labels`, drawn by `seed`, ascending; smaller draws lie in larger ones.

    Raises UsageError where a class has fewer, by its name if `classes` are given.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    kinds = np.arange(len(classes)) if classes else np.unique(labels)
    counts = np.array([(labels == kind).sum() for kind in kinds])
    if counts.min() < per_class:
        least = int(kinds[counts.argmin()])
        few = f"the {counts.min()} images of class {shown(classes[least]) if classes else least}"
        remedy = "use at most that" if counts.min() else "leave it out"
        raise UsageError(f"subset={per_class} is more than {few}; {remedy}")
    return np.sort(np.concatenate([order[labels[order] == kind][:per_class] for kind in kinds]))


def validated(data: Dataset, fraction: float) -> Dataset:
    """`data` with a `fraction` of each class of its training images, the same in every run, in the place of its test images.

    Raises UsageError where there is nothing to take, or the images are too many to be copied.
    """
    if (size := data.train["image"].nbytes) > IN_MEMORY:
        copies = f"validation={fraction} copies {in_bytes(size)} of images into memory"
        raise UsageError(f"{copies}; put some into a folder val instead")
    mask = held_out(data.train["label"], fraction)
    if not mask.any():
        raise UsageError(f"validation={fraction}: no class has two images to train on; leave it out")
    train, test = ({key: value[rows] for key, value in data.train.items()} for rows in (~mask, mask))
    log.info(f"{mask.sum():,} of {len(mask):,} training images stand in for the test images")
    kept, files = (tuple(compress(data.train_files, rows)) for rows in (~mask, mask))
    return dataclasses.replace(data, train=train, test=test, files=files, train_files=kept)


def is_path(name: str) -> bool:
    """Whether `name` is taken for the path of a folder of photographs, there or not."""
    path = name.startswith(("/", "./", "../", "~")) or name.endswith("/")
    return path or (name not in ("", *OURS) and _is_folder(name))


def _is_folder(name: str) -> bool:
    return os.path.isdir(os.path.expanduser(name))  # unlike Path.is_dir it takes names that no folder can have


def _photographs(name: str, size: int, progress: Callable, batch_size: int, labelled: bool) -> Dataset:
    if not _is_folder(name):
        raise UsageError(f"no folder {name}; name a folder of images, or a data set such as digits")
    return photographs.load(Path(os.path.expanduser(name)), size, progress, batch_size, labelled)


def _digits(size: int, batch_size: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8, magnified; every fifth is a test image."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    test = np.arange(len(bunch.images)) % 5 == 4
    check_fits(batch_size, (~test).sum())
    images = np.stack([square(Image.fromarray((i * 15.9375).astype(np.uint8)), size) for i in bunch.images])
    data = {"image": images, "label": bunch.target.astype(np.int32)}
    train, test = ({key: value[rows] for key, value in data.items()} for rows in (~test, test))
    return Dataset("digits", tuple(str(name) for name in bunch.target_names), train, test)
