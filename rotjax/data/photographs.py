"""A folder of the user's own images, with one subfolder per class or without classes, as a data set."""

import errno
import logging
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from rotjax.data.dataset import Arrays, Dataset, check_classes, check_fits
from rotjax.data.decoded import before, decoded, fingerprint, listing
from rotjax.data.folders import UNOPENED, Photograph, everything, formats, found, shown, unclassed
from rotjax.data.pixels import ahead, square
from rotjax.data.storage import Record
from rotjax.errors import MOST, DataError, ReadError, few, reason

log = logging.getLogger(__name__)

# What a file stays like until it changes; None: Pillow's own errors. Others pass (EIO, ESTALE, ENOENT of a disk that is gone
# for a while), and the cache would not.
LASTING = (None, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.EINVAL)


def load(folder: Path, image_size: int, progress: Callable = iter, batch_size: int = 1, labelled: bool = False) -> Dataset:
    """The middle squares of the images in `folder`, as `[N,image_size,image_size,3]`.

    Each subfolder is a class, with the images anywhere below it; images without subfolders have no classes. Where folders
    `train` (or `training`) and `test` (or `testing`, `validation`, `valid`, `val`) hold such folders or images, they are
    the split; else a tenth of each class is held out, chosen by file name alone, so that no two runs disagree on it. The
    folders of runs, which hold figures, are left out.
    `progress` wraps the names of the files while they are decoded, once: see `decoded`. The split and everything left out
    are logged, and so is a set that has no classes after all: one of them has no image, training and test set differ in
    them, or images lie beside them. These are left out where the others are to be `labelled`, unless they are most.
    Raises DataError where the training or the test set has no image, or a set that is to be `labelled` no classes;
    ReadError for a file that cannot be read at present, UsageError where there are fewer files to train on than a batch has
    images.
    """
    with _listing(folder):
        photographs, border, classes, held_out = found(folder, labelled)
    _check_both(folder, border, len(photographs) - border)
    check_fits(batch_size, border)
    if labelled:
        check_classes(shown(folder), classes)
    facts = [(photograph.name, *_state(folder / photograph.name)) for photograph in photographs]
    mixed = ["mixed"] * (not classes and len({photograph.label < 0 for photograph in photographs}) > 1)
    # Where the listing depends on `labelled`, a source for each: they would take each other's place.
    key = f"{fingerprint(str(folder.resolve()), image_size, *mixed)}-{fingerprint(facts, [p.label for p in photographs])}"

    def records(start: int) -> Iterator[Record]:
        earlier = before(key, image_size, facts[start:])
        known = {one.name: earlier[fact] for one, fact in zip(photographs, facts, strict=True) if fact in earlier}
        return _records(folder, image_size, photographs[start:], known, progress)

    with _decoding():
        arrays, dropped = decoded(key, len(photographs), image_size, records, facts)
    unreadable = sorted(dropped.values())
    if len(unreadable) == len(photographs):
        raise DataError(f"none of the {len(photographs):,} images in {shown(folder)} can be read: {few(unreadable)}")
    if unreadable:
        log.warning(
            f"{len(unreadable):,} of {len(photographs):,} images cannot be read and are left out: {few(unreadable)}"
            + (f"; all are named in {path}" if len(unreadable) > MOST and (path := listing(key)) else "")
        )
    border -= sum(number < border for number in dropped)
    names = [photograph.name for number, photograph in enumerate(photographs) if number not in dropped]
    train, test = ({key: value[rows] for key, value in arrays.items()} for rows in (slice(border), slice(border, None)))
    classes = _checked(folder, classes, train, test, held_out, labelled)
    if not classes:
        train, test = ({"image": part["image"]} for part in (train, test))
    return Dataset(folder.resolve().name, classes, train, test, tuple(names[border:]), tuple(names[:border]))


def listed(folder: Path) -> list[str]:
    """Paths of all images anywhere in `folder`, in order; DataError where there are none, or it cannot be read."""
    with _listing(folder):
        return everything(folder)


def squares(folder: Path, names: Sequence[str], image_size: int) -> list[np.ndarray | str]:
    """Of each of `names` in `folder` its middle square u8 `[image_size,image_size,3]`, or why it cannot be read.

    Raises ReadError for a file that cannot be read at present.
    """
    with _decoding():
        return list(ahead(partial(_pixels, folder, image_size), names))


@contextmanager
def _listing(folder: Path) -> Iterator[None]:
    """Turns what the system says of a block that lists `folder` into DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be read ({shown(error)}); check its permissions") from error


@contextmanager
def _decoding() -> Iterator[None]:
    """Silences Pillow's warnings of files that it reads anyway, odd or half as large as what it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _checked(
    folder: Path, classes: tuple[str, ...], train: Arrays, test: Arrays, held_out: bool, labelled: bool
) -> tuple[str, ...]:
    """The classes, none where one lacks images; tells the sizes of a set to train on, raises DataError for one too small."""
    counts = [len(part["label"]) for part in (train, test)]
    _check_both(folder, *counts)
    for part, job in ((train, "train"), (test, "test")):
        present = set(np.unique(part["label"]).tolist())
        if missing := [name for label, name in enumerate(classes) if label not in present]:
            line = f"no readable image to {job} on of class {few(missing)}"
            if part is train or not held_out:
                classes = unclassed(f"{shown(folder)} has {line}", "add some, or remove its folder", labelled)
                break
            log.warning(line)
    kinds = f"{len(classes)} class{'es' * (len(classes) != 1)} ({few(classes)})" if classes else "no classes"
    tenth = f"a tenth{' of each class, but at least one,' if classes else ''} held out by file name whatever the seed"
    split = f", {tenth}" if held_out else ""
    log.info(f"{counts[0]:,} images to train on, {counts[1]:,} to test on{split}; {kinds}")
    return classes


def _check_both(folder: Path, train: int, test: int) -> None:
    """Raises DataError where there are no images to train on, or none to test on."""
    if not (train and test):
        counts = f"{train:,} to train on and {test:,} to test on"
        raise DataError(f"{shown(folder)} has too few readable images, {counts}; add some, two for every class")


def _state(path: Path) -> tuple[int, int, int, bool]:
    """What changes where the pixels of a file may: its size, times of change in ns, and whether it may be read.

    Both times: a program may set that of the content back, as to keep the date of a photograph that it turns upright.
    """
    try:
        status = path.stat()
    except OSError as error:
        _check_lasting(path, error)
        return -1, -1, -1, False
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, os.access(path, os.R_OK)


def _check_lasting(path: Path, error: OSError | MemoryError) -> None:
    """Raises ReadError unless `error` will be met again until the file changes."""
    if isinstance(error, FileNotFoundError):
        lasts = os.path.lexists(path)  # a link that leads nowhere
    else:
        lasts = isinstance(error, OSError) and error.errno in LASTING and "out of memory" not in str(error)  # Pillow's words
    if not lasts:
        remedy = "run the same command again; if it is this file each time, remove it"
        raise ReadError(f"{shown(path)} cannot be read at present ({shown(reason(error))}); {remedy}") from error


def _records(
    folder: Path, image_size: int, photographs: Sequence[Photograph], known: Mapping[str, np.ndarray], progress: Callable
) -> Iterator[Record]:
    """The records of `photographs`, decoded but for those whose pixels are `known` by their names."""
    if known:
        log.info(f"{len(known):,} of them are as they were when they were decoded before")

    def read(name: str) -> np.ndarray | str:
        if name in known:
            return known[name]
        pixels = _pixels(folder, image_size, name)
        return f"{shown(name)} ({shown(pixels)})" if isinstance(pixels, str) else pixels

    names = progress([photograph.name for photograph in photographs])
    for pixels, photograph in zip(ahead(read, names), photographs, strict=True):
        yield pixels, photograph.label


def _pixels(folder: Path, image_size: int, name: str) -> np.ndarray | str:
    path = folder / name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would keep us waiting
            return "not a file"
        if not status.st_size:
            return "empty"
        with Image.open(path, formats=formats()) as image:
            return square(image, image_size)
    except UnidentifiedImageError:
        return "not an image that Pillow opens" + ": convert it to JPEG" * (path.suffix.lower() in UNOPENED)
    except Image.DecompressionBombError:
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels: scale it down"
    except (OSError, MemoryError) as error:
        _check_lasting(path, error)
        return "not a file" if isinstance(error, FileNotFoundError) else reason(error)
    except Exception as error:  # on a damaged file Pillow raises nearly anything
        return f"{type(error).__name__}: {error}"
