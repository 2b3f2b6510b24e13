"""A folder of decoded images, rows of a file that runs memory-map: written, gone on with, and read without trust."""

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from rotjax.data.dataset import Arrays
from rotjax.errors import ReadError
from rotjax.files import digest

log = logging.getLogger(__name__)

Record = tuple[np.ndarray | str, int]  # pixels u8 [H,H,3], or why there are none; label
Records = Callable[[int], Iterable[Record]]  # those from a number on
Row = int | str  # of a record its label, or why it has no pixels
Fact = tuple[str | int, ...]  # what decides the pixels of a record

ABOUT, IMAGES, LABELS, FACTS = "metadata.json", "image.raw", "label.npy", "facts.json"
ROWS = "rows.json"  # of what is not finished
SAVE_SECONDS = 10  # of decoding that are lost where the process is killed


def read(folder: Path, image_size: int) -> tuple[Arrays, dict[int, str]] | None:
    """What is stored, or None where there is nothing, or not all of it."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        shape = (about["count"], image_size, image_size, 3)
        dropped = {int(number): str(reason) for number, reason in about["dropped"].items()}
        path = folder / IMAGES
        if folder.stat().st_uid != os.getuid() or path.stat().st_size != math.prod(shape) or not _same(folder, about):
            return None
        labels = np.load(folder / LABELS, allow_pickle=False)
        if labels.shape != shape[:1] or labels.dtype != np.int32:
            return None
        images = _mapped(path, len(labels), image_size)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return _arrays(images, labels), dropped


def _same(folder: Path, about: dict) -> bool:
    """Whether the files that `about` lists are what they were, byte for byte.

    Read whole on every run: a time of change alone would not tell what a disk has lost, and the pages that it reads are
    those that training asks for next.
    """
    listed = about["sha256"]
    return {IMAGES, LABELS} <= listed.keys() and all(digest(folder / name) == listed[name] for name in listed)


def known(folder: Path, image_size: int, wanted: Set[Fact]) -> dict[Fact, np.ndarray]:
    """The pixels in `folder`, finished or not, of the records whose facts are `wanted`; none where it is damaged."""
    try:
        facts = [tuple(fact) for fact in json.loads((folder / FACTS).read_text())]
        if stored := read(folder, image_size):
            arrays, dropped = stored
            images, there = arrays["image"], [number for number in range(len(facts)) if number not in dropped]
        else:
            images, rows, _ = _unfinished(folder, image_size)
            there = [number for number, row in enumerate(rows) if not isinstance(row, str)]
        return {facts[number]: pixels for number, pixels in zip(there, images, strict=True) if facts[number] in wanted}
    except (OSError, ValueError, TypeError, IndexError, RecursionError):
        return {}


def write(folder: Path, image_size: int, records: Records, facts: Sequence[Fact]) -> tuple[Arrays, dict[int, str]]:
    """Writes all of `folder` and returns what `read` would.

    Until all is there an error leaves nothing, a ReadError, a signal or a kill what the next call goes on with.
    """
    begun = partial(folder)
    try:
        begun.mkdir(mode=0o700, exist_ok=True)
        if facts:
            (begun / FACTS).write_text(json.dumps(facts))
        rows, content = _append(begun, image_size, records)
        np.save(begun / LABELS, labels := _labels(rows), allow_pickle=False)
        digests = {IMAGES: content} | {name: digest(begun / name) for name in (LABELS, *([FACTS] if facts else []))}
        about = {"count": len(labels), "dropped": _dropped(rows), "sha256": digests}
        (begun / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        os.replace(begun, folder)
        (folder / ROWS).unlink()
        return _arrays(_mapped(folder / IMAGES, len(labels), image_size), labels), _dropped(rows)
    except ReadError:
        raise
    except Exception:
        shutil.rmtree(begun, ignore_errors=True)
        raise


def partial(folder: Path) -> Path:
    """Where `folder` is while it is written."""
    return folder.with_name(f"{folder.name}.partial")


def _append(begun: Path, image_size: int, records: Records) -> tuple[list[Row], str]:
    """The rows of all records, whose pixels are in `begun`, where those are appended that it lacks; the SHA-256 of these."""
    there, rows, content = _unfinished(begun, image_size)
    done = len(rows), content
    if rows:
        log.info(f"{len(rows):,} of them are there already")
    with open(begun / IMAGES, "ab") as images:
        images.truncate(there.nbytes)

        def save() -> None:
            count, content = done
            images.flush()
            os.fsync(images.fileno())  # the pixels first: after a power failure no row may be without
            (begun / f"{ROWS}.new").write_text(json.dumps({"rows": rows[:count], "sha256": content.hexdigest()}))
            os.replace(begun / f"{ROWS}.new", begun / ROWS)

        saved = time.monotonic()
        try:
            for pixels, row in _rows(records, image_size, len(rows)):
                images.write(pixels)
                rows.append(row)
                hashed = done[1].copy()
                hashed.update(pixels)
                done = len(rows), hashed  # at once: a signal between the two would leave a hash of other rows
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        finally:
            save()
    return rows, done[1].hexdigest()


def _unfinished(begun: Path, image_size: int) -> tuple[np.ndarray, list[Row], Any]:
    """The images that a process which was stopped left in `begun`, the rows, and the hash to go on with; none where they may
    be others.
    """
    try:
        about = json.loads((begun / ROWS).read_text())
        images, rows = _mapped(begun / IMAGES, len(_labels(about["rows"])), image_size), about["rows"]
        content = hashlib.sha256(images.data)
        whole = all(type(row) in (int, str) for row in rows) and content.hexdigest() == about["sha256"]
        if whole and begun.stat().st_uid == os.getuid():
            return images, rows, content
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    return np.empty((0, image_size, image_size, 3), np.uint8), [], hashlib.sha256()


def _mapped(path: Path, count: int, image_size: int) -> np.ndarray:
    """The first `count` images in the file at `path`; ValueError where there are fewer."""
    shape = (count, image_size, image_size, 3)
    return np.asarray(np.memmap(path, np.uint8, "r", shape=shape)) if count else np.empty(shape, np.uint8)


def in_memory(image_size: int, records: Records) -> tuple[Arrays, dict[int, str]]:
    buffer, rows = bytearray(), list[Row]()
    for pixels, row in _rows(records, image_size):
        buffer.extend(pixels)
        rows.append(row)
    return _arrays(np.frombuffer(buffer, np.uint8).reshape(-1, image_size, image_size, 3), _labels(rows)), _dropped(rows)


def _rows(records: Records, image_size: int, start: int = 0) -> Iterator[tuple[bytes, Row]]:
    """The pixels of each record from number `start` on, and its row."""
    for number, (pixels, label) in enumerate(records(start), start):
        if isinstance(pixels, str):
            yield b"", pixels
            continue
        if pixels.shape != (image_size, image_size, 3) or pixels.dtype != np.uint8:
            raise ValueError(f"record {number} is {pixels.dtype} {pixels.shape}, not uint8 {(image_size, image_size, 3)}")
        yield pixels.tobytes(), int(label)


def _labels(rows: list[Row]) -> np.ndarray:
    return np.array([row for row in rows if not isinstance(row, str)], np.int32)


def _dropped(rows: list[Row]) -> dict[int, str]:
    return {number: row for number, row in enumerate(rows) if isinstance(row, str)}


def _arrays(images: np.ndarray, labels: np.ndarray) -> Arrays:
    arrays = {"image": images, "label": labels}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays
