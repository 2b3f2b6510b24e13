"""`python -m experiments.prepare --help`"""

import contextlib
import fcntl
import io
import shlex
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
import tyro
from PIL import Image
from tensorflow_datasets.core import shuffle

from experiments.archives import Archive, catalogued, fetch, verify
from experiments.command import guarded
from experiments.report import say
from rotjax.data import prepared
from rotjax.errors import DataError, InUseError, Stopped, UsageError

Examples = Iterator[tuple[int | str, dict[str, Any]]]  # keys, which decide the order, and features


def main() -> int:
    """Parses the flags and prepares the data set; returns the exit code."""

    def command(
        dataset: tyro.conf.Positional[Literal["cifar10", "imagenette"]],
        archive: Path | None = None,
        data_dir: Path | None = None,
        image_size: int | None = None,
    ) -> int:
        """Prepare a data set for TFDS's reader, without TensorFlow: download, check, convert. Run it again to go on.

        Args:
            dataset: Which.
            archive: The data set's archive if it is on disk already; downloaded if not given.
            data_dir: TFDS's folder of prepared data sets; $TFDS_DATA_DIR or ~/tensorflow_datasets if not given.
            image_size: Imagenette for images of so many pixels, 160 if not given: of its three sizes the least that has them.
        """
        return guarded(lambda: run(dataset, archive, data_dir, image_size))

    config = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    return tyro.cli(command, prog="python -m experiments.prepare", config=config, use_underscores=True)


def run(dataset: str, archive: Path | None, data_dir: Path | None, image_size: int | None) -> None:
    """Prepares `dataset` and says where it is and what to do with it."""
    if image_size is not None and (dataset == "cifar10" or image_size < 1):
        raise UsageError(f"--image_size={image_size}: it is for imagenette, and at least 1; leave it out")
    name = prepared.qualified(dataset, image_size or 160)
    try:
        folder = prepare(name, prepared.home(data_dir), archive, note=say)
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command goes on") from None
    flags = f"--dataset={dataset}" + (f" --image_size={image_size or 160}" if dataset == "imagenette" else "")
    flags += f" --data_dir={shlex.quote(str(data_dir))}" if data_dir else ""
    say(f"{name} is prepared in {folder}; use it: python -m experiments.rotation {flags}")


def prepare(
    name: str,
    data_dir: Path,
    file: Path | None = None,
    *,
    archive: Archive | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Path:
    """The folder in `data_dir` where the set `name`, `cifar10` or `imagenette/config`, is prepared, all of it or nothing.

    Where it is not it is made of `file`, or of a download, which must be `archive`, by default the one in TFDS's
    catalogue. Raises UsageError for a `file` that is not there, DataError for one that is not the archive, a server out of
    reach or a disk that is full, InUseError where another process prepares the set.
    """
    kind, _, config = name.partition("/")
    catalogue = tfds.builder_cls(kind)
    folder = data_dir / name / str(catalogue.VERSION)
    if folder.exists():
        prepared.opened(folder)
        return folder
    builder, filename = BUILDERS[kind](catalogue, config)
    archive = archive or catalogued(kind, filename)
    if file:
        verify(archive, file)
    try:
        _check_space(data_dir, archive.size * (1 if file else 2))
        with _claimed(data_dir / "downloads", archive.filename) as downloads:
            if not file:
                file = downloads / archive.filename
                fetch(archive, file, note)
                note(f"{file} is complete; once the set is prepared it may be removed")
            for leftover in folder.parent.glob(f"incomplete.*_{folder.name}"):  # of a run that was killed
                shutil.rmtree(leftover)
            note(f"preparing {name}")
            _build(builder, file, config, data_dir)
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise DataError(f"{file} cannot be unpacked ({error}); fetch {archive.url} again") from error
    except OSError as error:
        raise DataError(f"{name} cannot be prepared in {data_dir} ({error}); name another --data_dir") from error
    prepared.opened(folder)
    return folder
