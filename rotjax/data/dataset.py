"""A loaded data set: arrays for training, arrays for testing, class names; and what is asked of such arrays."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from rotjax.errors import DataError, UsageError

Arrays = dict[str, np.ndarray]  # 'image' u8 [N,H,H,3], 'label' i32 [N]; evaluation batches have 'weight' f32 [B] too


@dataclass(frozen=True, eq=False)
class Dataset:
    """`train` and `test` are `{'image': u8[N,H,H,3], 'label': i32[N]}`; without `classes` labels are -1, given or not.

    `files` are the names of the test images, where they have some, `train_files` those of the others, forgotten where these
    are replaced by fewer or more. Raises DataError for missing labels, arrays of other shapes or dtypes, an empty part,
    `classes` that are no names, a label that names none of them, or `files` of another number. Arrays are not copied: leave
    them as they are.
    """

    name: str
    classes: tuple[str, ...]
    train: Arrays = field(repr=False)
    test: Arrays = field(repr=False)
    files: tuple[str, ...] = field(default=(), repr=False)
    train_files: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self):
        odd = isinstance(self.classes, (str, bytes, Set)) or getattr(self.classes, "ndim", 1) != 1
        if odd or not isinstance(self.classes, Iterable):
            raise DataError(f"the classes of {self.name} are {self.classes!r}; give a tuple of their names, or () for none")
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))  # which may be numbers
        for part in ("train", "test"):
            arrays, where = getattr(self, part), f"the {part} images of {self.name}"
            try:
                check_arrays(arrays)
            except TypeError as error:
                raise DataError(f"{where}: {error}") from error
            if "label" not in arrays:
                if self.classes:
                    raise DataError(f"{where} have no labels; give one each, or no classes")
                arrays = {**arrays, "label": unlabelled(len(arrays["image"]))}
            image, label = arrays["image"], arrays["label"]
            if image.shape[1] != self.image_size:
                raise DataError(f"{where} are {image.shape[1]} px, for training {self.image_size}; they must be of one size")
            if not len(image):
                raise DataError(f"{where} are 0; give at least one")
            if not self.classes and (label >= 0).any():
                raise DataError(f"{where} have labels, but the classes have no names; give these, or no labels")
            bad = np.flatnonzero((label < (0 if self.classes else -1)) | (label >= len(self.classes)))
            if len(bad):
                raise DataError(f"{where}: label {label[bad[0]]} of image {bad[0]} is none of {len(self.classes)} classes")
            object.__setattr__(self, part, {"image": np.asarray(image), "label": native(label)})
        for names in ("train_files", "files"):
            object.__setattr__(self, names, tuple(map(str, getattr(self, names))))
        if self.files and len(self.files) != (count := len(self.test["label"])):
            raise DataError(f"{self.name} has {count:,} test images and {len(self.files):,} files; name each, or none")
        if len(self.train_files) != len(self.train["label"]):
            object.__setattr__(self, "train_files", ())

    def facts(self) -> dict:
        """A JSON fingerprint of the data: counts, and a hash of the labels and of up to 2,048 images of each split."""
        sample = hashlib.sha256()
        for arrays in (self.train, self.test):
            sample.update(arrays["label"].astype(np.int64).tobytes())
            for index in np.unique(np.linspace(0, len(arrays["image"]) - 1, 2048).astype(int)):
                sample.update(arrays["image"][index].tobytes())
        counts = {"train_images": len(self.train["label"]), "test_images": len(self.test["label"])}
        return counts | {"image_size": self.image_size, "classes": list(self.classes), "sample": sample.hexdigest()}

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.train["image"].shape[1]


def unlabelled(count: int) -> np.ndarray:
    """Placeholder labels, -1, i32 `[count]`."""
    return np.full(count, -1, np.int32)


def native(labels: Any) -> np.ndarray:
    """`labels`, integers of any kind, of NumPy or of jax, as i32 on the host."""
    return np.asarray(labels).astype(np.int32, copy=False)


def check_arrays(arrays: Arrays) -> None:
    """Raises TypeError unless `arrays` are a dict of images, u8 `[N,H,H,3]`, and labels, if any, that are integers `[N]`."""
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays are {_kind(arrays)}; give a dict, {{'image': u8[N,H,H,3], 'label': i32[N]}}")
    image: Any = arrays.get("image")
    check_pixels(image)
    if image.shape[1:] != (*image.shape[1:2] * 2, 3):
        raise TypeError(f"images are {_kind(image)}; give squares in RGB, [N,H,H,3], as rotjax.data.square makes them")
    if "label" not in arrays:
        return
    label = arrays["label"]
    if getattr(label, "shape", None) != (len(image),) or not np.issubdtype(label.dtype, np.integer):
        raise TypeError(f"{len(image):,} images have labels {_kind(label)}; give one label each, an integer")


def check_pixels(images: np.ndarray) -> None:
    """Raises TypeError for what is no array of uint8 pixels."""
    if getattr(images, "dtype", None) != np.uint8:
        raise TypeError(
            f"images are {_kind(images)}; give an array of uint8 pixels, 0 to 255: the network normalises by itself"
        )


def _kind(values: object) -> str:
    """`float32[8, 32, 32, 3]` of an array, else the type."""
    return f"{values.dtype}{list(values.shape)}" if isinstance(values, (np.ndarray, jax.Array)) else type(values).__name__


def check_fits(batch_size: int, count: float = math.inf) -> None:
    """Raises UsageError for a batch of no images, or of more than the `count` that there are to train on."""
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} is too small; it is at least 1")
    if batch_size > count:
        asked = f"batch_size={batch_size} is larger than the training set of {count:,} images"
        raise UsageError(f"{asked}; lower it to {count} or less, or give more images")


def check_classes(name: str, classes: tuple[str, ...]) -> None:
    """Raises DataError for a data set without classes, where some are to be learnt."""
    if not classes:
        raise DataError(f"{name} has no classes; put its images into one folder per class, or name another data set")


def held_out(labels: np.ndarray, fraction: float) -> np.ndarray:
    """A mask `[N]` of a `fraction` of each class, at least one of two or more images; depends on `labels` alone."""
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(labels))
    mask = np.zeros(len(labels), bool)
    for kind in np.unique(labels):
        rows = order[labels[order] == kind]
        mask[rows[: max(int(len(rows) * fraction + 1e-9), int(len(rows) > 1))]] = True
    return mask
