"""The user's own photographs: a folder of images, in one folder per class or without classes, as a data set."""

import hashlib
import logging
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from rotjax.data.batches import Arrays, check_fits
from rotjax.data.dataset import Dataset
from rotjax.data.decoded import Record, decoded, fingerprint, listing
from rotjax.data.pixels import square
from rotjax.errors import DataError

TRAIN, TESTS = "train", ("test", "validation", "val")  # of several the first is tested on
MOST = 5  # names in a line
UNDRAWN = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow opens but leaves to other programs to draw
UNOPENED = {".heic", ".heif"}  # photographs all the same: better counted as unreadable than passed over

log = logging.getLogger(__name__)


class Photograph(NamedTuple):
    name: str  # path within the data set's folder, with "/"
    label: int  # -1 where there are no classes


def load(folder: Path, image_size: int, progress: Callable = iter, batch_size: int = 1) -> Dataset:
    """The middle squares of the images in `folder`, as `[N,image_size,image_size,3]`.

    Each subfolder is a class, with the images anywhere below it; images without subfolders have no classes. Where folders
    `train` and `test` (or `validation`, `val`) hold such folders or images, they are the split; else a tenth of each class
    is held out, chosen by file name and by nothing else, so that no two runs disagree on it. `progress` wraps the names
    of the files while they are decoded, once: see `decoded`. The split and everything left out are logged, and so is a set
    that has no classes after all: one of them has no image, or training and test set differ in them.
    Raises DataError where the training or the test set has no image, UsageError where there are fewer files to train on
    than a batch has images.
    """
    try:
        photographs, border, classes, held_out = _found(folder)
    except OSError as error:
        raise DataError(f"{_shown(folder)} cannot be read ({_shown(error)}); check its permissions") from error
    check_fits(batch_size, border)
    facts = [(*photograph, *_state(folder / photograph.name)) for photograph in photographs]
    key = fingerprint(str(folder.resolve()), image_size, facts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's, of oddities in files that it reads nevertheless
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        records = _records(folder, image_size, photographs, progress)
        arrays, dropped = decoded(key, len(photographs), image_size, records)
    unreadable = sorted(dropped.values())
    if len(unreadable) == len(photographs):
        raise DataError(f"none of the {len(photographs):,} images in {_shown(folder)} can be read: {_few(unreadable)}")
    if unreadable:
        log.warning(
            f"{len(unreadable):,} of {len(photographs):,} images cannot be read and are left out: {_few(unreadable)}"
            + (f"; all are named in {path}" if len(unreadable) > MOST and (path := listing(key)) else "")
        )
    border -= sum(number < border for number in dropped)
    train, test = ({key: value[rows] for key, value in arrays.items()} for rows in (slice(border), slice(border, None)))
    classes = _checked(folder, classes, train, test, held_out)
    if not classes:
        train, test = ({**part, "label": np.full_like(part["label"], -1)} for part in (train, test))
    return Dataset(folder.resolve().name, classes, train, test)


def _checked(folder: Path, classes: tuple[str, ...], train: Arrays, test: Arrays, held_out: bool) -> tuple[str, ...]:
    """The classes, none where one lacks images; tells the sizes of a set to train on, raises DataError for one too small."""
    counts = [len(part["label"]) for part in (train, test)]
    if not all(counts):
        raise DataError(
            f"{_shown(folder)} has too few readable images, {counts[0]} to train on and {counts[1]} to test on; "
            "add some, two for every class"
        )
    for part, job in ((train, "train"), (test, "test")):
        present = set(np.unique(part["label"]).tolist())
        if missing := [name for label, name in enumerate(classes) if label not in present]:
            line = f"no readable image to {job} on of class {_few(missing)}"
            if part is train or not held_out:
                classes = _unclassed(f"{_shown(folder)} has {line}")
                break
            log.warning(line)
    kinds = f"{len(classes)} class{'es' * (len(classes) != 1)} ({_few(classes)})" if classes else "no classes"
    split = f", a tenth{' of each class' if classes else ''} held out by file name whatever the seed" if held_out else ""
    log.info(f"{counts[0]:,} images to train on, {counts[1]:,} to test on{split}; {kinds}")
    return classes


def _unclassed(reason: str) -> tuple[str, ...]:
    """No classes, and a line that says why: to predict rotations the images are enough."""
    log.warning(f"{reason}: its images are taken without classes")
    return ()


def _found(folder: Path) -> tuple[list[Photograph], int, tuple[str, ...], bool]:
    """Photographs, those to train on first; how many these are; the classes; whether the others are held out of them."""
    train_root, test_root = _divided(folder)
    classes, train = _classes(folder, train_root)
    if test_root is None:
        train, test = _hold_out(train)
        return train + test, len(train), classes, True
    test_classes, test = _classes(folder, test_root)
    if odd := sorted(set(classes) ^ set(test_classes)):
        names = f"{_shown(train_root.name)} and {_shown(test_root.name)}"
        classes = _unclassed(f"in {_shown(folder)} {names} do not both have the classes {_few(odd)}")
    return train + test, len(train), classes, False


def _divided(folder: Path) -> tuple[Path, Path | None]:
    """The folders to train and to test on; `folder` and None where nothing is divided."""
    subfolders = {path.name.lower(): path for path in _subfolders(folder)}
    tests = [name for name in TESTS if name in subfolders]
    if TRAIN not in subfolders and tests and len(tests) == len(subfolders):
        raise DataError(f"{_shown(folder)} has {_few(tests)} but no folder {TRAIN}; add one, or name the folder inside")
    if TRAIN not in subfolders or (len(subfolders) > 1 and not tests):  # beside others train is a class of that name
        return folder, None
    train_root, test_root = subfolders[TRAIN], subfolders[tests[0]] if tests else None
    others = sorted(path.name for path in folder.iterdir() if path not in (train_root, test_root))
    if others := [_shown(name) for name in others if not name.startswith(".")]:
        testing = f", testing on {test_root.name}" if test_root else ""
        log.info(f"training on {train_root.name}{testing}; left alone beside: {_few(others)}")
    return train_root, test_root


def _classes(folder: Path, root: Path) -> tuple[tuple[str, ...], list[Photograph]]:
    """The classes below `root`, or none, and their photographs in the order of their names."""
    beside = sorted(path for path in root.iterdir() if not path.name.startswith(".") and not path.is_dir())
    below = {top: _files(top) for top in _subfolders(root)}
    others = Counter(_suffix(file) for file in chain(beside, *below.values()) if _suffix(file) not in _suffixes())
    strange = _few(f"{count:,} {_shown(suffix) or 'without'}" for suffix, count in others.most_common())
    beside, *images = ([file for file in files if _suffix(file) in _suffixes()] for files in (beside, *below.values()))
    tops = list(below) if any(images) else []
    if not tops and not beside:
        raise DataError(f"{_shown(root)} holds no images ({strange or 'no files'}); name a folder of images")
    if tops and beside:
        names = _few(_shown(file.name) for file in beside)
        log.info(f"{len(beside):,} images beside the class folders of {_shown(root)} are left out: {names}")
    if strange:
        log.info(f"left out of {_shown(root)}, no images by their suffix: {strange}")
    labelled = enumerate(images) if tops else [(-1, beside)]
    photographs = [Photograph(file.relative_to(folder).as_posix(), label) for label, files in labelled for file in files]
    return tuple(_shown(top.name) for top in tops), sorted(photographs)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(top: Path) -> list[Path]:
    """Files that are not hidden anywhere below `top`; each folder is entered once, as links may lead back."""

    def refuse(error: OSError):
        raise error

    found, entered = [], {_identity(top.parent)}
    for where, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        if _identity(where) in entered:
            folders.clear()
            continue
        entered.add(_identity(where))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(where, name) for name in names if not name.startswith(".")]
    return found


def _suffix(file: Path) -> str:
    return file.suffix.lower()


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _hold_out(photographs: list[Photograph]) -> tuple[list[Photograph], list[Photograph]]:
    """The photographs less a tenth of each class, of two or more at least one, and that tenth."""
    test: set[Photograph] = set()
    for _, group in groupby(sorted(photographs, key=lambda p: p.label), key=lambda p: p.label):
        ranked = sorted(group, key=lambda p: hashlib.sha256(os.fsencode(p.name)).digest())
        test.update(ranked[: max((len(ranked) + 5) // 10, 1) if len(ranked) > 1 else 0])
    return [p for p in photographs if p not in test], [p for p in photographs if p in test]


def _state(path: Path) -> tuple[int, int, bool]:
    """What changes where the pixels of a file may: its size, time of change in ns, and whether it may be read."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1, False
    return status.st_size, status.st_mtime_ns, os.access(path, os.R_OK)


def _records(folder: Path, image_size: int, photographs: list[Photograph], progress: Callable) -> Iterator[Record]:
    names = progress([photograph.name for photograph in photographs])
    for pixels, photograph in zip(_ahead(partial(_pixels, folder, image_size), names), photographs, strict=True):
        lacking = isinstance(pixels, str)
        yield f"{_shown(photograph.name)} ({_shown(pixels)})" if lacking else pixels, photograph.label


def _pixels(folder: Path, image_size: int, name: str) -> np.ndarray | str:
    path = folder / name
    try:
        if not path.is_file():  # a pipe would keep us waiting
            return "not a file"
        if not path.stat().st_size:
            return "empty"
        with Image.open(path, formats=_formats()) as image:
            return square(image, image_size)
    except UnidentifiedImageError:
        return "not an image that Pillow opens"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return "too many pixels"
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # on a damaged file Pillow raises nearly anything
        return f"{type(error).__name__}: {error}"


def _ahead(function: Callable, items: Iterable) -> Iterator:
    """`function` of each item, in order, computed by as many threads as there are cores and never far ahead."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@cache
def _suffixes() -> frozenset[str]:
    opened = {"MPO", *_formats()}  # Pillow opens MPO, of two pictures, as a JPEG
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in opened) | UNOPENED


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in UNDRAWN)


def _few(words: Iterable[str]) -> str:
    words = list(words)
    more = f" and {len(words) - MOST:,} more" if len(words) > MOST else ""
    return ", ".join(words[:MOST]) + more


def _shown(words: object) -> str:
    """`words` in one line that any output takes: file names may hold line breaks and bytes that are no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(words))
