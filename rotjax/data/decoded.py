"""The cache of decoded images: a uint8 file that runs memory-map, so that a set may be larger than memory."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from rotjax.data.batches import Arrays
from rotjax.errors import DataError, InUseError, in_bytes
from rotjax.files import digest
from rotjax.locks import locked

log = logging.getLogger(__name__)

Record = tuple[np.ndarray | str, int]  # pixels u8 [H,H,3], or why there are none; label

FILES = ("image.raw", "label.npy")
DECODER = 1  # to be raised with every change of the pixels that a file gives
KEY = 32  # hexadecimal digits of a fingerprint
IN_MEMORY = 10**9  # bytes up to which a set that cannot be stored is held in memory


def decoded(key: str, count: int, image_size: int, records: Iterable[Record]) -> tuple[Arrays, dict[int, str]]:
    """`{'image': u8[N,H,H,3], 'label': i32[N]}`, read-only, of the decodable records; and the reasons for the others.

    The rows lie in `$XDG_CACHE_HOME/rotjax/decoded/<key>` (`~/.cache` unless set), in the order of `records`, which are
    only asked for where nothing is stored under `key`; at most `count` are. Under a key `<source>-<state>` they replace
    those of other states of the source. The reasons go by the number of the record.
    Raises DataError where the disk is too small, or cannot be written and the set is too large for memory.
    """
    what, needed = f"{count:,} images at {image_size} px", count * image_size**2 * 3
    with ExitStack() as stack:
        try:
            folder = _home() / key
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
        if (path := _home() / key / "metadata.json").is_file():
            return path
    return None


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rotjax" / "decoded"


def _read(folder: Path, image_size: int) -> tuple[Arrays, dict[int, str]] | None:
    """What is stored, or None where there is nothing, or not all of it."""
    try:
        about = json.loads((folder / "metadata.json").read_text())
        shape = (about["count"], image_size, image_size, 3)
        dropped = {int(number): str(reason) for number, reason in about["dropped"].items()}
        path = folder / "image.raw"
        if folder.stat().st_uid != os.getuid() or path.stat().st_size != math.prod(shape) or not _same(folder, about):
            return None
        labels = np.load(folder / "label.npy", allow_pickle=False)
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
    return all(digest(folder / name) == about["sha256"][name] for name in FILES)


def _make_room(folder: Path, what: str, needed: int) -> None:
    """Removes what is damaged, what other states of the source gave (runs that map it keep it), and what runs that died
    while decoding left: their locks are free. Raises DataError.
    """
    if folder.exists():
        log.warning(f"{folder} is damaged, or not of this user; decoding again")
        shutil.rmtree(folder)
    source = folder.name.partition("-")[0]
    for old in [folder.with_name(f"{folder.name}.partial"), *folder.parent.glob(f"{source}-" + "[0-9a-f]" * KEY)]:
        shutil.rmtree(old, ignore_errors=True)
    for lock in folder.parent.glob("*.lock"):
        with suppress(OSError, InUseError), locked(lock, "this cache"):
            shutil.rmtree(lock.with_suffix(".partial"), ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DataError(
            f"decoding {what} needs {in_bytes(needed)} in {folder.parent}, where {in_bytes(free)} are free; "
            "remove what you no longer need there, lower the image size, or set XDG_CACHE_HOME to a folder on another disk"
        )


def _write(folder: Path, image_size: int, records: Iterable[Record]) -> None:
    """Writes all of `folder` or nothing."""
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        partial.mkdir(mode=0o700)
        with open(partial / "image.raw", "wb") as file:
            labels, dropped = _append(records, image_size, file.write)
            file.flush()
            os.fsync(file.fileno())
        np.save(partial / "label.npy", labels, allow_pickle=False)
        digests = {name: digest(partial / name) for name in FILES}
        about = {"count": len(labels), "dropped": dropped, "sha256": digests}
        (partial / "metadata.json").write_text(json.dumps(about, indent=1) + "\n")
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _in_memory(image_size: int, records: Iterable[Record]) -> tuple[Arrays, dict[int, str]]:
    buffer = bytearray()
    labels, dropped = _append(records, image_size, buffer.extend)
    return _arrays(np.frombuffer(buffer, np.uint8).reshape(-1, image_size, image_size, 3), labels), dropped


def _append(records: Iterable[Record], image_size: int, write: Callable[[bytes], Any]) -> tuple[np.ndarray, dict[int, str]]:
    """Gives the pixels of each record to `write`; the labels of those that have some, and why the others have none."""
    labels, dropped = [], {}
    for number, (pixels, label) in enumerate(records):
        if isinstance(pixels, str):
            dropped[number] = pixels
            continue
        if pixels.shape != (image_size, image_size, 3) or pixels.dtype != np.uint8:
            raise ValueError(f"record {number} is {pixels.dtype} {pixels.shape}, not uint8 {(image_size, image_size, 3)}")
        write(pixels.tobytes())
        labels.append(label)
    return np.array(labels, np.int32), dropped


def _arrays(images: np.ndarray, labels: np.ndarray) -> Arrays:
    arrays = {"image": np.asarray(images), "label": labels}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays
