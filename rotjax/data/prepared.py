"""Data sets that TFDS has prepared as array_record, read without TensorFlow. Import it where needed: TFDS takes a while."""

import io
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from rotjax.data import catalogue
from rotjax.data.dataset import Arrays, Dataset, check_classes, check_fits, held_out
from rotjax.data.decoded import decoded, fingerprint
from rotjax.data.pixels import ahead, square
from rotjax.data.storage import Record
from rotjax.errors import DataError

log = logging.getLogger(__name__)

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")  # that an image of TFDS may be encoded in

CHUNK = 64  # records that are read at once
SMALL = 4096  # bytes of a record up to which threads decode no faster: most of the work is the interpreter's

TENTH = 0.1  # of a set without a split to test on
Builder = Any  # tfds.core.DatasetBuilder, whose annotations do not know what kind of features it has


def load(
    name: str,
    image_size: int,
    data_dir: str | Path | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
    batch_size: int = 1,
    labelled: bool = False,
) -> Dataset:
    """The data set `name`, or `name/config`, prepared in `data_dir`, as images `[N,image_size,image_size,3]`.

    The split `train` is trained on, `test` or else `validation` tested on; a set that has neither gets a tenth of each
    class held out, always the same, which is logged. Without a feature `label` there are no classes. Raises UsageError
    for a name that is none or fewer training images than `batch_size`, DataError for a set that is not prepared, is
    damaged, is not of images, or is to be `labelled` and has no classes.
    """
    name = catalogue.qualified(name, image_size)
    folder = catalogue.newest(name, catalogue.home(data_dir))
    builder = opened(folder)
    classes = _classes(builder)
    if labelled:
        check_classes(name, classes)
    splits = builder.info.splits
    if "train" not in splits:
        raise DataError(f"{folder} has no split train, only {', '.join(splits) or 'none'}; name another data set")
    check_fits(batch_size, splits["train"].num_examples)
    tests = [split for split in ("test", "validation") if split in splits][:1]
    parts = _arrays(builder, ["train", *tests], len(classes), image_size, progress)
    if not tests:
        count = len(labels := parts[0]["label"])
        tested = int(held_out(labels, TENTH).sum())  # as many whatever the order of the labels, and they come last
        rows = (slice(count - tested), slice(count - tested, None))  # in place: the images may be more than memory holds
        parts = [{key: value[part] for key, value in parts[0].items()} for part in rows]
        log.info(
            f"{name} has no test split: {tested:,} of {count:,} images, a tenth of each class but at least one, are held out"
        )
    train, test = parts
    return Dataset(name, classes, train, test)


def opened(folder: Path) -> Builder:
    """The reader of the set in `folder`, `.../name/version`; raises DataError where it is damaged or not array_record."""
    remedy = f"remove {folder} and prepare it again"
    try:
        builder = tfds.builder_from_directory(folder)
        formats = {kind.value for kind in builder.info.available_file_formats()}
        shards = [path for split in builder.info.splits.values() for path in split.filepaths]
    except Exception as error:  # of protobuf, of json, of TFDS: whatever a damaged description leads to
        raise DataError(f"{folder} has no readable dataset_info.json and features.json ({error}); {remedy}") from error
    if "array_record" not in formats:
        kinds = ", ".join(sorted(formats)) or "an unknown format"
        raise DataError(f"{folder} is prepared as {kinds}, which takes TensorFlow to read; {remedy} as array_record")
    if missing := next((path for path in shards if not path.is_file()), None):
        raise DataError(f"{missing} is missing; {remedy}")
    return builder


def _classes(builder: Builder) -> tuple[str, ...]:
    """Names of the classes, none where nothing is labelled; raises DataError for a set that is not of images."""
    features, where = builder.info.features, builder.data_path
    names = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in sorted(features.items()))
    if "image" not in features or not isinstance(features["image"], tfds.features.Image):
        raise DataError(f"{where} has no feature image of images, only {names}; name another data set")
    if (dtype := np.dtype(features["image"].np_dtype)) != np.uint8:
        raise DataError(f"the images of {where} are {dtype}, not uint8; name another data set")
    if "label" not in features:
        return ()
    label = features["label"]
    if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        raise DataError(f"the label of {where} is no class ({names}); name another data set")
    if len(label.names) != label.num_classes:
        names = f"{where / 'label.labels.txt'} has {len(label.names)} names for {label.num_classes} classes"
        raise DataError(f"{names}; remove {where} and prepare it again")
    return tuple(label.names)


def _arrays(builder: Builder, splits: list[str], classes: int, image_size: int, progress: Callable) -> list[Arrays]:
    """Each of `splits`, decoded: `{'image': u8[N,H,H,3], 'label': i32[N]}`; decoded again where a file has changed.

    Of a single split the tenth that is `held_out` comes last.
    """
    folder, counts = Path(builder.data_path), [builder.info.splits[split].num_examples for split in splits]
    if not all(counts):
        raise DataError(f"the split {splits[counts.index(0)]} of {folder} has no images; name another data set")
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    begins = [sum(counts[:number]) for number in range(len(counts))]
    tenth_last = len(splits) == 1

    def records(start: int) -> Iterator[Record]:
        for split, begin, count in zip(splits, begins, counts, strict=True):
            if start < begin + count:
                yield from _records(builder, split, classes, image_size, progress, tenth_last, max(start - begin, 0))

    key = f"{fingerprint(str(folder.resolve()), splits, image_size)}-{fingerprint(states)}"
    arrays, _ = decoded(key, sum(counts), image_size, records)
    return [
        {key: value[begin : begin + count] for key, value in arrays.items()}
        for begin, count in zip(begins, counts, strict=True)
    ]


def _records(
    builder: Builder, split: str, classes: int, image_size: int, progress: Callable, tenth_last: bool, start: int
) -> Iterator[Record]:
    """Pixels u8 `[H,H,3]` and label of each record from number `start` on; DataError for the first that is damaged."""
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    source = builder.as_data_source(split, deserialize_method=raw, file_format="array_record")
    order, read = range(len(source)), _in_chunks(builder, split, source)
    keys = ("image", "label") if classes else ("image",)
    features = tfds.features.FeaturesDict({key: builder.info.features[key] for key in keys})
    if tenth_last:
        label = tfds.features.FeaturesDict({"label": features["label"]}) if classes else None
        labels = [_record(builder, split, label, 0, read(index))["label"] if label else -1 for index in order]
        order = np.argsort(held_out(np.array(labels), TENTH), kind="stable").tolist()
    order = order[start:]
    small = builder.info.splits[split].num_bytes <= SMALL * len(source)
    records = (map if small else ahead)(partial(_record, builder, split, features, image_size), map(read, progress(order)))
    for index, record in zip(order, records, strict=True):
        label = record["label"] if classes else -1
        if classes and not 0 <= label < classes:
            where = f"record {index} of {split} in {builder.data_path}"
            raise DataError(f"{where} has label {label}, which is none of {classes} classes; name another data set")
        yield record["image"], label


def _in_chunks(builder: Builder, split: str, source: Any) -> Callable[[int], tuple[int, bytes]]:
    """What gives an index and its record as it is stored, for indices that go up.

    In chunks, since alone a small record takes as long to read as to decode.
    """

    @lru_cache(maxsize=1)
    def chunk(number: int) -> list[bytes]:
        return source.__getitems__(range(number * CHUNK, min((number + 1) * CHUNK, len(source))))

    def read(index: int) -> tuple[int, bytes]:
        try:
            return index, chunk(index // CHUNK)[index % CHUNK]
        except Exception:  # of any record of the chunk: alone, only the damaged one fails
            with _intact(builder, split, index):
                return index, source[index]

    return read


def _record(builder: Builder, split: str, features: Any, image_size: int, read: tuple[int, bytes]) -> dict[str, Any]:
    """The `features` of a record that was `read`, an image as pixels."""
    index, stored = read
    # Decoded by Pillow whatever TFDS finds installed: OpenCV gives other pixels for the same JPEG.
    decoders: Any = {"image": tfds.decode.SkipDecoding()} if "image" in features else None
    with _intact(builder, split, index):
        record: Any = features.deserialize_example_np(stored, decoders=decoders)
        if "image" in features:
            with Image.open(io.BytesIO(record["image"]), formats=FORMATS) as image:
                record["image"] = square(image, image_size)
        return record


@contextmanager
def _intact(builder: Builder, split: str, index: int) -> Iterator[None]:
    """Raises DataError where what is done with record `index` fails: it is damaged."""
    try:
        yield
    except Exception as error:  # of array_record, protobuf or Pillow, which on damaged bytes raise nearly anything
        shard = _shard(builder, split, index)
        reason = f"{shard} is damaged at record {index} of {split} ({str(error)[:80]})"
        raise DataError(f"{reason}; remove {shard.parent} and prepare it again") from error


def _shard(builder: Builder, split: str, index: int) -> Path:
    """The file that holds record `index` of `split`."""
    info = builder.info.splits[split]
    return Path(info.filepaths[np.searchsorted(np.cumsum(info.shard_lengths), index, side="right")])
