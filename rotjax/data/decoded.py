"""The cache of decoded images: a uint8 file that runs memory-map, so that a set may be larger than memory."""

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from rotjax.data.dataset import Arrays
from rotjax.errors import DataError, InUseError, ReadError, in_bytes
from rotjax.files import cache, digest
from rotjax.locks import locked

log = logging.getLogger(__name__)

Record = tuple[np.ndarray | str, int]  # pixels u8 [H,H,3], or why there are none; label
Records = Callable[[int], Iterable[Record]]  # those from a number on
Row = int | str  # of a record its label, or why it has no pixels

IMAGES, LABELS = "image.raw", "label.npy"
ROWS = "rows.json"  # of what is not finished
SAVE_SECONDS = 30  # of decoding that are lost where the process is killed
DECODER = 3  # to be raised with every change of the pixels that a file gives, or of the files that give some
KEY = 32  # hexadecimal digits of a fingerprint
IN_MEMORY = 10**9  # bytes up to which a set that cannot be stored is held in memory


def decoded(key: str, count: int, image_size: int, records: Records) -> tuple[Arrays, dict[int, str]]:
    """`{'image': u8[N,H,H,3], 'label': i32[N]}`, read-only, of the decodable records; and the reasons for the others.

    The rows lie in `$XDG_CACHE_HOME/rotjax/decoded/<key>` (`~/.cache` unless set), in the order of the records, at most
    `count`. `records(start)` gives those from number `start` on, and is only called where not all are stored under `key`: a
    process that was stopped, or whose `records` raised ReadError, leaves what it has decoded to the next. Under a key
    `<source>-<state>` they replace those of other states of the source. The reasons go by the number of the record.
    Raises DataError where the disk is too small, or cannot be written and the set is too large for memory.
    """
    what, needed = f"{count:,} images at {image_size} px", count * image_size**2 * 3
    with ExitStack() as stack:
        try:
            folder = cache("decoded") / key
            if (stored := _read(folder, image_size)) is not None:
                return stored
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(locked(folder.with_name(f"{key}.lock"), f"the cache of {what}", wait=True))
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
            if needed >= IN_MEMORY:
                raise DataError(
                    f"no cache for {what} ({error}); set XDG_CACHE_HOME to a folder with {in_bytes(needed)}"
                ) from None
            log.warning(f"no cache ({error}); decoding {what} into {in_bytes(needed)} of memory, on every run")
            return _in_memory(image_size, records)
        if (stored := _read(folder, image_size)) is not None:  # by the process that was waited for
            return stored
        try:
            _make_room(folder, what, needed)
            log.info(f"decoding {what} into a {in_bytes(needed)} cache in {folder}")
            _write(folder, image_size, records)
        except OSError as error:
            raise DataError(f"cannot decode into {folder} ({error}); set XDG_CACHE_HOME to another folder") from error
        if (stored := _read(folder, image_size)) is None:
            raise DataError(f"{folder} cannot be read back; set XDG_CACHE_HOME to another folder")
        return stored


def fingerprint(*facts: Any) -> str:
    """A key for what `facts`, values of JSON's types, decide together with this version of the decoder."""
    return hashlib.sha256(json.dumps([DECODER, *facts], sort_keys=True).encode()).hexdigest()[:KEY]


def ahead(function: Callable, items: Iterable) -> Iterator:
    """`function` of each item, in order, computed by as many threads as there are cores and never far ahead."""
    scheduled = getattr(os, "sched_getaffinity", None)  # of a cluster's node a job may have a few cores only
    threads = len(scheduled(0)) if scheduled else os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def listing(key: str) -> Path | None:
    """The file that lists the records without pixels and the reasons, None where nothing is stored under `key`."""
    with suppress(OSError, RuntimeError):
        if (path := cache("decoded") / key / "metadata.json").is_file():
            return path
    return None


def _read(folder: Path, image_size: int) -> tuple[Arrays, dict[int, str]] | None:
    """What is stored, or None where there is nothing, or not all of it."""
    try:
        about = json.loads((folder / "metadata.json").read_text())
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
    return all(digest(folder / name) == about["sha256"][name] for name in (IMAGES, LABELS))


def _make_room(folder: Path, what: str, needed: int) -> None:
    """Removes what is damaged, and what other states of the source gave (runs that map it keep it); where room is short,
    also what others decoded who died or were stopped: their locks are free. Raises DataError.
    """
    if folder.exists():
        log.warning(f"{folder} is damaged, or not of this user; decoding again")
        shutil.rmtree(folder)
    source, own = folder.name.partition("-")[0], _partial(folder)
    for old in folder.parent.glob(f"{source}-" + "[0-9a-f]" * KEY):
        shutil.rmtree(old, ignore_errors=True)
    needed -= sum(path.stat().st_size for path in own.glob(IMAGES))
    for other in folder.parent.glob("*.partial"):
        short = needed > shutil.disk_usage(folder.parent).free
        if other != own and (short or other.name.startswith(f"{source}-")):
            with suppress(OSError, InUseError), locked(other.with_suffix(".lock"), "this cache"):
                shutil.rmtree(other, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DataError(
            f"decoding {what} needs {in_bytes(needed)} in {folder.parent}, where {in_bytes(free)} are free; "
            "remove what you no longer need there, lower the image size, or set XDG_CACHE_HOME to a folder on another disk"
        )


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _write(folder: Path, image_size: int, records: Records) -> None:
    """Writes all of `folder`; an error leaves nothing, a ReadError, a signal or a kill what the next call goes on with."""
    partial = _partial(folder)
    try:
        partial.mkdir(mode=0o700, exist_ok=True)
        rows = _append(partial, image_size, records)
        np.save(partial / LABELS, labels := _labels(rows), allow_pickle=False)
        digests = {name: digest(partial / name) for name in (IMAGES, LABELS)}
        about = {"count": len(labels), "dropped": _dropped(rows), "sha256": digests}
        (partial / "metadata.json").write_text(json.dumps(about, indent=1) + "\n")
        os.replace(partial, folder)
        (folder / ROWS).unlink()
    except ReadError:
        raise
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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


def _in_memory(image_size: int, records: Records) -> tuple[Arrays, dict[int, str]]:
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
