"""A folder of decoded images, rows of a file that runs memory-map: written, gone on with, and read without trust."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

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
        images = np.memmap(path, np.uint8, "r", shape=shape) if len(labels) else np.empty(shape, np.uint8)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return _arrays(images, labels), dropped


def _same(folder: Path, about: dict) -> bool:
    """Whether the files that `about` lists are what they were, byte for byte.

    Read whole on every run: a time of change alone would not tell what a disk has lost, and the pages that it reads are
    those that training asks for next.
    """
    listed = about["sha256"]
    return {IMAGES, LABELS} <= listed.keys() and all(digest(folder / name) == listed[name] for name in listed)


def by_fact(folder: Path, image_size: int) -> dict[Fact, np.ndarray | str]:
    """By its facts the pixels of each record in `folder`, finished or not, or why it has none; none where it is damaged."""
    try:
        facts = [tuple(fact) for fact in json.loads((folder / FACTS).read_text())]
        if stored := read(folder, image_size):
            arrays, dropped = stored
            images, rows = arrays["image"], [dropped.get(number, 0) for number in range(len(facts))]
        else:
            rows = _unfinished(folder, image_size)
            shape = (len(rows) - len(_dropped(rows)), image_size, image_size, 3)
            images = np.asarray(np.memmap(folder / IMAGES, np.uint8, "r", shape=shape))
    except (OSError, ValueError, TypeError):
        return {}
    pixels = iter(images)
    return {fact: row if isinstance(row, str) else next(pixels) for fact, row in zip(facts, rows, strict=False)}


def write(folder: Path, image_size: int, records: Records, facts: Sequence[Fact]) -> None:
    """Writes all of `folder`; an error leaves nothing, a ReadError, a signal or a kill what the next call goes on with."""
    begun = partial(folder)
    try:
        begun.mkdir(mode=0o700, exist_ok=True)
        if facts:
            (begun / FACTS).write_text(json.dumps(facts))
        rows = _append(begun, image_size, records)
        np.save(begun / LABELS, labels := _labels(rows), allow_pickle=False)
        digests = {name: digest(begun / name) for name in (IMAGES, LABELS, *([FACTS] if facts else []))}
        about = {"count": len(labels), "dropped": _dropped(rows), "sha256": digests}
        (begun / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        os.replace(begun, folder)
        (folder / ROWS).unlink()
    except ReadError:
        raise
    except Exception:
        shutil.rmtree(begun, ignore_errors=True)
        raise


def partial(folder: Path) -> Path:
    """Where `folder` is while it is written."""
    return folder.with_name(f"{folder.name}.partial")


def _append(partial: Path, image_size: int, records: Records) -> list[Row]:
    """The rows of all records; their pixels are in `partial`, where those are appended that it lacks."""
    rows = _unfinished(partial, image_size)
    if rows:
        log.info(f"{len(rows):,} of them are there already")
    with open(partial / IMAGES, "ab") as images:
        images.truncate(_bytes(rows, image_size))

        def save() -> None:
            images.flush()
            os.fsync(images.fileno())  # the pixels first: after a power failure no row may be without
            (partial / f"{ROWS}.new").write_text(json.dumps(rows))
            os.replace(partial / f"{ROWS}.new", partial / ROWS)

        saved = time.monotonic()
        try:
            for pixels, row in _rows(records, image_size, len(rows)):
                images.write(pixels)
                rows.append(row)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        finally:
            save()
    return rows


def _unfinished(partial: Path, image_size: int) -> list[Row]:
    """The rows whose pixels are in `partial`, left by a process that was stopped; none where they may be others."""
    try:
        rows = json.loads((partial / ROWS).read_text())
        whole = (partial / IMAGES).stat().st_size >= _bytes(rows, image_size)
        known = all(type(row) in (int, str) for row in rows) and partial.stat().st_uid == os.getuid()
    except (OSError, ValueError, TypeError):
        return []
    return rows if whole and known else []


def _bytes(rows: list[Row], image_size: int) -> int:
    return sum(not isinstance(row, str) for row in rows) * image_size**2 * 3


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
    arrays = {"image": np.asarray(images), "label": labels}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays
