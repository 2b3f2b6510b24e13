"""Where images come from: data sets by name, each decoded once to uint8 arrays."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rotjax.data.batches import Arrays
from rotjax.errors import DataError, UsageError

DIGITS_DEFAULTS = dict(image_size=32, epochs=8, decay_epochs=3, batch_size=32, learning_rate=1e-3)


@dataclass(frozen=True)
class Dataset:
    """`train` and `test` are `{'image': u8[N,H,H,3], 'label': i32[N]}`; labels are -1 where there are no `classes`."""

    name: str
    classes: tuple[str, ...]
    train: Arrays
    test: Arrays


def defaults(name: str) -> dict:
    """Fields of a recipe that the data set `name` decides unless the recipe says otherwise."""
    return {"digits": DIGITS_DEFAULTS, "cifar10": {"image_size": 32}}.get(name, {"image_size": 64})


def load(name: str, *, image_size: int | None = None, data_dir: str | Path | None = None, progress=iter) -> Dataset:
    """The data set `name` (`cifar10`, `imagenette`, `digits`, any TFDS image-classification set prepared as array_record).

    `data_dir` is TFDS's, by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`. `progress` wraps the records as they
    are decoded. Raises UsageError for a name that does not exist, DataError for data that is not there or unreadable.
    """
    image_size = image_size or defaults(name)["image_size"]
    if name == "digits":
        return _digits(image_size)
    return _tfds(name, image_size, Path(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser(), progress)


def subset(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Indices of `per_class` images of each class, drawn by `seed`, in ascending order; smaller draws lie in larger ones.

    Raises UsageError where a class has fewer.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    kinds, counts = np.unique(labels, return_counts=True)
    if counts.min() < per_class:
        raise UsageError(f"--subset={per_class} is more than the {counts.min()} images of class {kinds[counts.argmin()]}")
    return np.sort(np.concatenate([order[labels[order] == kind][:per_class] for kind in kinds]))


def square(image: Image.Image, size: int) -> np.ndarray:
    """The middle square of `image`, upright as its EXIF says, as RGB u8 `[size,size,3]`."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _digits(size: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8, magnified; every fifth is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.stack([square(Image.fromarray((i * 15.9375).astype(np.uint8)), size) for i in bunch.images])
    data = {"image": images, "label": bunch.target.astype(np.int32)}
    test = np.arange(len(images)) % 5 == 4
    train, test = ({key: value[rows] for key, value in data.items()} for rows in (~test, test))
    return Dataset("digits", tuple(str(name) for name in bunch.target_names), train, test)


def _tfds(name: str, size: int, data_dir: Path, progress) -> Dataset:
    import tensorflow_datasets as tfds

    config = f"{name}/160px-v2" if name == "imagenette" else name
    folder = data_dir / config
    versions = sorted(p.parent for p in folder.glob("*/dataset_info.json"))
    if not versions:
        raise DataError(f"{name} is not prepared in {data_dir}; run: python -m experiments.prepare {name} (--dataset=digits needs nothing)")
    builder = tfds.builder_from_directory(versions[-1])
    test = next(split for split in ("test", "validation") if split in builder.info.splits)
    arrays = []
    for split in ("train", test):
        source = builder.as_data_source(split)
        images = np.empty((len(source), size, size, 3), np.uint8)
        labels = np.empty(len(source), np.int32)
        for row, record in enumerate(progress(source)):
            images[row] = square(Image.fromarray(record["image"]), size)
            labels[row] = record["label"]
        arrays.append({"image": images, "label": labels})
    return Dataset(name, tuple(builder.info.features["label"].names), *arrays)
