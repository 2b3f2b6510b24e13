"""What a folder of photographs holds: which files, in which classes, to train or to test on."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from rotjax.errors import DataError, few

TRAINS, TESTS = ("train", "training"), ("test", "testing", "validation", "valid", "val")  # of several the first counts
UNDRAWN = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow opens but leaves to other programs to draw
UNOPENED = {".heic", ".heif"}  # photographs all the same: better counted as unreadable than passed over
RUN = {"recipe.json", "data.json"}  # files that a run's folder has from its beginning
STRANGE = "no images by their suffix"

log = logging.getLogger(__name__)


class Photograph(NamedTuple):
    name: str  # path within the data set's folder, with "/"
    label: int  # -1 of an image in no class folder


def found(folder: Path, labelled: bool) -> tuple[list[Photograph], int, tuple[str, ...], bool]:
    """Photographs, those to train on first; how many these are; the classes; whether the others are held out of them.

    Raises DataError where there are none, or no classes although they are to be `labelled`.
    """
    train_root, test_root = _divided(folder)
    classes, train = _classes(folder, train_root, labelled)
    if test_root is None:
        train, test = _hold_out(train)
        return train + test, len(train), classes, True
    test_classes, test = _classes(folder, test_root, labelled)
    if classes and (odd := sorted(set(classes) ^ set(test_classes))):
        names = f"{shown(train_root.name)} and {shown(test_root.name)}"
        classes = unclassed(f"in {shown(folder)} {names} do not both have the classes {few(odd)}", "fill both", labelled)
    return train + test, len(train), classes, False


def everything(folder: Path) -> list[str]:
    """Paths, with "/", of all images anywhere below `folder` but hidden ones and those of runs, in order.

    Raises DataError where there are none.
    """
    folder = folder.resolve()  # whose parent is another folder, as that of `.` is not
    files, runs = _contents(folder)
    _tell(folder, "runs", _below(folder, runs))
    strange = _strange(files)
    if not (files := _images(files)):
        raise DataError(f"{shown(folder)} holds no images ({strange or 'no files'}); name a folder of images")
    _tell(folder, STRANGE, strange)
    return sorted(_within(folder, file) for file in files)


def _divided(folder: Path) -> tuple[Path, Path | None]:
    """The folders to train and to test on; `folder` and None where nothing is divided."""
    subfolders = {path.name.lower(): path for path in _subfolders(folder)}
    trains, tests = ([name for name in names if name in subfolders] for names in (TRAINS, TESTS))
    beside = [path for name, path in subfolders.items() if name not in (*trains[:1], *tests)]
    if not trains and tests and all(map(_of_runs, beside)):
        raise DataError(f"{shown(folder)} has {few(tests)} but no folder {TRAINS[0]}; add one, or name the folder inside")
    if not trains or (not tests and not all(map(_of_runs, beside))):  # beside others train is a class of that name
        return folder, None
    train_root, test_root = subfolders[trains[0]], subfolders[tests[0]] if tests else None
    others = sorted(path.name for path in folder.iterdir() if path not in (train_root, test_root))
    if others := [shown(name) for name in others if not name.startswith(".")]:
        testing = f", testing on {test_root.name}" if test_root else ""
        log.info(f"training on {train_root.name}{testing}; left alone beside: {few(others)}")
    return train_root, test_root


def _classes(folder: Path, root: Path, labelled: bool) -> tuple[tuple[str, ...], list[Photograph]]:
    """The classes below `root`, or none, and their photographs in the order of their names."""
    beside = sorted(path for path in root.iterdir() if not path.name.startswith(".") and not path.is_dir())
    contents = {top: _contents(top) for top in _subfolders(root)}
    _tell(root, "runs", _below(root, chain(*(runs for _, runs in contents.values()))))
    below = {top: files for top, (files, runs) in contents.items() if not runs or _images(files)}
    strange = _strange(chain(beside, *below.values()))
    beside, *images = map(_images, (beside, *below.values()))
    within = sum(map(len, images))
    if 0 < within < len(beside):
        move = "to tell the folders apart move the others elsewhere"
        most = f"{shown(root)} has {len(beside):,} images beside its folders and {within:,} in them ({move})"
        unclassed(most, "or put each into its class", labelled)
        beside, images = sorted(chain(beside, *images)), []
    classes = tuple(shown(top.name) for top in below) if any(images) else ()
    if not classes and not beside:
        raise DataError(f"{shown(root)} holds no images ({strange or 'no files'}); name a folder of images")
    if classes and beside:
        some = f"{len(beside):,} images beside the class folders of {shown(root)}"
        names = few(shown(file.name) for file in beside)
        if labelled:
            log.warning(f"{some} are left out: {names}")
            beside = []
        else:
            log.warning(f"{some} are of no class ({names}; to have classes move them elsewhere): all are taken without")
            classes = ()
    _tell(root, STRANGE, strange)
    parts = [(-1, beside), *enumerate(images)]
    return classes, sorted(Photograph(_within(folder, file), label) for label, files in parts for file in files)


def _within(folder: Path, file: Path) -> str:
    """The path of `file` from `folder` on, with "/"; `relative_to` takes ten times as long."""
    return "/".join(file.parts[len(folder.parts) :])


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _of_runs(folder: Path) -> bool:
    """Whether there are runs below `folder` and no image outside them."""
    files, runs = _contents(folder)
    return bool(runs) and not _images(files)


def _tell(root: Path, what: str, names: str) -> None:
    if names:
        log.info(f"left out of {shown(root)}, {what}: {names}")


def _below(root: Path, folders: Iterable[Path]) -> str:
    return few(shown(folder.relative_to(root)) for folder in folders)


def _contents(top: Path) -> tuple[list[Path], list[Path]]:
    """Files that are not hidden anywhere below `top`, and folders of runs, whose files, figures among them, are not listed.

    Each folder is entered once, as links may lead back.
    """

    def refuse(error: OSError):
        raise error

    found, runs, entered = [], [], {_identity(top.parent)}
    for where, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        if (here := _identity(where)) in entered:
            folders.clear()
            continue
        entered.add(here)
        if RUN.issubset(names):
            runs.append(Path(where))
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(where, name) for name in names if not name.startswith(".")]
    return found, runs


def _images(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if _suffix(file) in _suffixes()]


def _strange(files: Iterable[Path]) -> str:
    """How many of `files` have each suffix that no image has."""
    counts = Counter(_suffix(file) for file in files if _suffix(file) not in _suffixes())
    return few(f"{count:,} {shown(suffix) or 'without'}" for suffix, count in counts.most_common())


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


def unclassed(reason: str, remedy: str, labelled: bool) -> tuple[str, ...]:
    """No classes, and a line that says why: to predict rotations the images are enough; DataError if they are `labelled`."""
    if labelled:
        raise DataError(f"{reason}; {remedy}")
    log.warning(f"{reason}: its images are taken without classes")
    return ()


@cache
def _suffixes() -> frozenset[str]:
    opened = {"MPO", *formats()}  # Pillow opens MPO, of two pictures, as a JPEG
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in opened) | UNOPENED


@cache
def formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in UNDRAWN)


def shown(words: object) -> str:
    """`words` in one line that any output takes: file names may hold line breaks and bytes that are no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(words))
