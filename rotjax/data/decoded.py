"""The cache of decoded images: each set is decoded once, and of a set that has changed what is new."""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from rotjax.data import storage
from rotjax.data.dataset import Arrays
from rotjax.data.storage import Fact, Records
from rotjax.errors import DataError, InUseError, in_bytes
from rotjax.files import cache
from rotjax.locks import locked

log = logging.getLogger(__name__)

DECODER = 3  # to be raised with every change of the pixels that a file gives, or of the files that give some
KEY = 32  # hexadecimal digits of a fingerprint
IN_MEMORY = 10**9  # bytes up to which a set that cannot be stored is held in memory


def decoded(
    key: str, count: int, image_size: int, records: Records, facts: Sequence[Fact] = ()
) -> tuple[Arrays, dict[int, str]]:
    """`{'image': u8[N,H,H,3], 'label': i32[N]}`, read-only, of the decodable records; and the reasons for the others.

    The rows lie in `$XDG_CACHE_HOME/rotjax/decoded/<key>` (`~/.cache` unless set), in the order of the records, at most
    `count`. `records(start)` gives those from number `start` on, and is only called where not all are stored under `key`: a
    process that was stopped, or whose `records` raised ReadError, leaves what it has decoded to the next. Under a key
    `<source>-<state>` they replace those of earlier states of the source, whose pixels `before` gives by the `facts` of
    each record. The reasons go by the number of the record.
    Raises DataError where the disk is too small, or cannot be written and the set is too large for memory.
    """
    what, needed = f"{count:,} images at {image_size} px", count * image_size**2 * 3
    with ExitStack() as stack:
        try:
            folder = cache("decoded") / key
            if (stored := storage.read(folder, image_size)) is not None:
                return stored
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(locked(folder.with_name(f"{key}.lock"), f"the cache of {what}", wait=True))
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
            if needed >= IN_MEMORY:
                raise DataError(
                    f"no cache for {what} ({error}); set XDG_CACHE_HOME to a folder with {in_bytes(needed)}"
                ) from None
            log.warning(f"no cache ({error}); decoding {what} into {in_bytes(needed)} of memory, on every run")
            return storage.in_memory(image_size, records)
        if (stored := storage.read(folder, image_size)) is not None:  # by the process that was waited for
            return stored
        try:
            _make_room(folder, what, needed)
            log.info(f"decoding {what} into a {in_bytes(needed)} cache in {folder}")
            earlier = _others(folder)  # a later one may be there by the time that this one is
            stored = storage.write(folder, image_size, records, facts)
            for other in earlier:
                _remove(other)
        except OSError as error:
            remedy = "run the same command again, or set XDG_CACHE_HOME to another folder"
            raise DataError(f"cannot decode into {folder} ({error}); {remedy}") from error
        return stored


def fingerprint(*facts: Any) -> str:
    """A key for what `facts`, values of JSON's types, decide together with this version of the decoder."""
    return hashlib.sha256(json.dumps([DECODER, *facts], sort_keys=True).encode()).hexdigest()[:KEY]


def before(key: str, image_size: int, facts: Sequence[Fact]) -> dict[Fact, np.ndarray]:
    """Of those of `facts` that other states of the source of `key` have pixels for, these, u8 `[H,H,3]`."""
    found, wanted = dict[Fact, np.ndarray](), set(facts)
    with suppress(OSError, RuntimeError):
        for folder in _others(cache("decoded") / key) if wanted else ():
            found |= storage.known(folder, image_size, wanted)
    return found


def listing(key: str) -> Path | None:
    """The file that lists the records without pixels and the reasons, None where nothing is stored under `key`."""
    with suppress(OSError, RuntimeError):
        if (path := cache("decoded") / key / storage.ABOUT).is_file():
            return path
    return None


def _make_room(folder: Path, what: str, needed: int) -> None:
    """Removes what is damaged and, where room is short, what other states of the source gave, then what others decoded who
    died or were stopped. Raises DataError.
    """
    if folder.exists():
        log.warning(f"{folder} is damaged, or not of this user; decoding again")
        shutil.rmtree(folder)
    own = storage.partial(folder)
    needed -= sum(path.stat().st_size for path in own.glob(storage.IMAGES))
    for other in dict.fromkeys((*_others(folder), *folder.parent.glob("*.partial"))):
        if other != own and needed > shutil.disk_usage(folder.parent).free:
            log.info(f"short of room: what was decoded into {other} goes")
            _remove(other)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DataError(
            f"decoding {what} needs {in_bytes(needed)} in {folder.parent}, where {in_bytes(free)} are free; "
            "remove what you no longer need there, lower the image size, or set XDG_CACHE_HOME to a folder on another disk"
        )


def _others(folder: Path) -> list[Path]:
    """What other states of the source of `folder` gave, finished or not."""
    alike = folder.parent.glob(f"{folder.name.partition('-')[0]}-*")
    return [path for path in alike if path not in (folder, storage.partial(folder)) and path.suffix in ("", ".partial")]


def _remove(folder: Path) -> None:
    """Removes what nobody is decoding into: its lock is free. Runs that map it keep it."""
    with suppress(OSError, InUseError), locked(folder.with_suffix(".lock"), "this cache"):
        shutil.rmtree(folder, ignore_errors=True)
