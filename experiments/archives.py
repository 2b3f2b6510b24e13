"""Archives of data sets: where TFDS's catalogue says they are, fetched in as many pieces as it takes, and checked."""

import http.client
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums
from tqdm import tqdm

from rotjax import files
from rotjax.errors import DataError, UsageError, in_bytes, reason

log = logging.getLogger(__name__)

TIMEOUT = 20.0  # seconds without a byte
PATIENCE = (1, 2, 4, 8)  # seconds to wait before trying again, once something has come


@dataclass(frozen=True)
class Archive:
    """A file at `url` of `size` bytes, with the SHA-256 `checksum` in hexadecimal."""

    url: str
    size: int
    checksum: str

    @property
    def filename(self) -> str:
        """Last part of the URL."""
        return self.url.rsplit("/", 1)[-1]


def catalogued(name: str, filename: str) -> Archive:
    """The archive `filename` of the set `name`, as the installed TFDS has it in its list of downloads."""
    places = (f"datasets/{name}/checksums.tsv", f"url_checksums/{name}.txt")
    path = next(path for path in map(tfds.core.tfds_path, places) if path.exists())
    archives = [Archive(url, int(info.size), info.checksum) for url, info in checksums.load_url_infos(path).items()]
    return next(archive for archive in archives if archive.filename == filename)


def verify(archive: Archive, path: Path) -> None:
    """Raises UsageError where `path` is no file, DataError where it is not `archive`, byte for byte."""
    if not os.path.isfile(path):  # unlike Path.is_file it takes names that no file can have
        raise UsageError(f"no file {path}; give the archive from {archive.url}")
    if (size := path.stat().st_size) != archive.size:
        raise DataError(f"{path} has {size} bytes, not the {archive.size} of {archive.url}; fetch it again")
    try:
        checksum = files.digest(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason(error)}); give another copy of {archive.url}") from error
    if checksum != archive.checksum:
        raise DataError(f"{path} has the SHA-256 {checksum}, expected {archive.checksum}; fetch {archive.url} again")


def fetch(archive: Archive, path: Path) -> None:
    """Sees to it that `path` is `archive`: downloads it where it is not, resuming from `<path>.partial` if there is one.

    Shows a bar on stderr where that is a terminal. Raises DataError where the server is out of reach or falls silent, and
    keeps the part that has come; where what has come is not `archive`, nothing is kept.
    """
    if path.exists():
        with suppress(DataError):
            return verify(archive, path)
        path.unlink()
    partial = _partial(path)
    if _size(partial) > archive.size:
        partial.unlink()
    have = _size(partial)
    log.info(f"downloading {archive.url}, {_share(have, archive) if have else in_bytes(archive.size)}")
    _download(archive, partial)
    try:
        verify(archive, partial)
    except DataError:
        partial.unlink()
        raise
    partial.replace(path)


def _download(archive: Archive, partial: Path) -> None:
    most, waits = _size(partial), iter(())
    with tqdm(total=archive.size, initial=most, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        while _size(partial) < archive.size:
            try:
                for size in _pieces(archive, partial):
                    bar.update(size - bar.n)
                problem = "the server closed the connection"
            except urllib.error.HTTPError as error:
                problem = str(error)
                error.close()
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            if (have := _size(partial)) > most:
                most, waits = have, iter(PATIENCE)
            elif (wait := next(waits, None)) is not None:
                time.sleep(wait)
            else:
                again = f"the same command resumes, {_share(have, archive)}" if have else "try again"
                other = "or fetch that file by other means and add --archive=FILE"
                raise DataError(f"{archive.url} cannot be downloaded ({problem}); {again}, {other}")


def _pieces(archive: Archive, partial: Path) -> Iterator[int]:
    """Appends to `partial` what it lacks, yielding its size after each piece; begins anew where the server does."""
    have = _size(partial)
    headers = {"User-Agent": "rotjax", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(archive.url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        at, total = _place(response)
        if total != archive.size or at not in (0, have):
            raise OSError(f"the server sends byte {at} of {total}, not byte {have} of {archive.size}")
        with open(partial, "ab") as file:
            file.truncate(at)
            while piece := response.read1(min(1 << 16, archive.size - at)):
                file.write(piece)
                at += len(piece)
                yield at


def _place(response: http.client.HTTPResponse) -> tuple[int, int]:
    """Where in the file the response begins, and how long the file is; -1 where it does not say."""
    if response.status == 200:
        return 0, int(response.headers.get("Content-Length", -1))
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def lacking(archive: Archive, path: Path) -> int:
    """Bytes that `fetch` would download."""
    return max(archive.size - max(map(_size, (path, _partial(path)))), 0)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _share(count: int, archive: Archive) -> str:
    return f"{in_bytes(count)} of {in_bytes(archive.size)} are there"
