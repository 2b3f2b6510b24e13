"""`python -m experiments.prepare --help`"""

import contextlib
import io
import logging
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tensorflow_datasets as tfds
import tyro
from PIL import Image
from tensorflow_datasets.core import shuffle

from experiments import command
from experiments.archives import Archive, catalogued, fetch, lacking, verify
from experiments.flags import DataDir, default
from experiments.report import say, typed
from rotjax.data import catalogue, prepared
from rotjax.errors import DataError, UsageError, in_bytes
from rotjax.locks import locked

log = logging.getLogger("experiments.prepare")  # __name__ is "__main__" where it is run

ARCHIVES = {
    "cifar10": "cifar-10-binary.tar.gz",
    "imagenette/160px-v2": "imagenette2-160.tgz",
    "imagenette/320px-v2": "imagenette2-320.tgz",
    "imagenette/full-size-v2": "imagenette2.tgz",
}

Examples = Iterator[tuple[int | str, dict[str, Any]]]  # keys, which decide the order, and features


def main() -> int:
    """Parses the flags and prepares the data set; returns the exit code."""
    return command.cli(run, "prepare")


def run(
    dataset: tyro.conf.Positional[Literal["cifar10", "imagenette"]],
    archive: Annotated[Path | None, default("downloaded")] = None,
    data_dir: DataDir = None,
    image_size: Annotated[int | None, default("160")] = None,
) -> None:
    """Prepare a data set for TFDS's reader, without TensorFlow: download, check, convert. Run it again to go on.

    Args:
        dataset: Which.
        archive: The data set's archive if it is on disk already.
        data_dir: TFDS's folder of prepared data sets.
        image_size: Imagenette only: the smallest of its three versions with at least this side.
    """
    if image_size is not None and (dataset == "cifar10" or image_size < 1):
        raise UsageError(f"--image_size={image_size}: it is for imagenette, and at least 1; leave it out")
    command.check_folder("data_dir", data_dir)
    name = catalogue.qualified(dataset, image_size or 160)
    folder = prepare(name, catalogue.home(data_dir), archive)
    flags: dict[str, Any] = {"dataset": dataset}
    if dataset == "imagenette":
        flags["image_size"] = image_size or 160
    if data_dir:
        flags["data_dir"] = data_dir
    say(f"{name} is prepared in {folder}; use it: {typed('rotation', flags)}")


def prepare(
    name: str,
    data_dir: Path,
    file: Path | None = None,
    *,
    archive: Archive | None = None,
) -> Path:
    """The folder in `data_dir` where the set `name`, a key of ARCHIVES, is prepared: all of it or nothing.

    What is not there yet is made of `file`, or of a download, which has to be `archive`, unless given the one of TFDS's
    catalogue. Raises UsageError for a `file` that does not exist, DataError for one that is not the archive, a server out
    of reach or a disk too small, InUseError where another process is at it.
    """
    kind = name.partition("/")[0]
    published = tfds.builder_cls(kind)
    folder = data_dir / name / str(published.VERSION)
    if folder.exists():
        prepared.opened(folder)
        if file:
            log.info(f"{name} is there already: {file} is not read")
        return folder
    archive = archive or catalogued(kind, ARCHIVES[name])
    if file:
        verify(archive, file)
    download = data_dir / "downloads" / archive.filename
    try:
        _check_space(data_dir, archive.size + (0 if file else lacking(archive, download)))
        download.parent.mkdir(parents=True, exist_ok=True)
        with locked(download.with_name(f"{archive.filename}.lock"), archive.filename):
            if not file:
                fetch(archive, file := download)
                log.info(f"{file} is there; once {name} is prepared it may be removed")
            for leftover in folder.parent.glob(f"incomplete.*_{folder.name}"):  # of a run that was killed
                shutil.rmtree(leftover)
            log.info(f"preparing {name} from {file}")
            _build(published, name, file, data_dir)
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise DataError(f"{file} cannot be unpacked ({error}); fetch {archive.url} again") from error
    except (OSError, RuntimeError) as error:  # RuntimeError is array_record's
        raise DataError(f"{name} cannot be prepared in {data_dir} ({error}); name another --data_dir") from error
    return folder


def _check_space(data_dir: Path, needed: int) -> None:
    free = shutil.disk_usage(next(path for path in (data_dir, *data_dir.absolute().parents) if path.exists())).free
    if free < needed:
        sizes = f"{in_bytes(free)} are free and {in_bytes(needed)} needed"
        raise DataError(f"in {data_dir} {sizes}; make room or name another --data_dir")


def _build(published: Any, name: str, file: Path, data_dir: Path) -> None:
    """Writes what TFDS's own class for the set, `published`, would: version, features and configs are that one's."""
    kind, _, config = name.partition("/")

    class Builder(published, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        name = kind
        __module__ = published.__module__  # which dataset_info.json names
        url_infos = None  # nothing is downloaded by TFDS, and to look takes importlib_resources, which it does not require

        def _split_generators(self, dl_manager) -> dict[str, Examples]:
            return SPLITS[kind](file, self.info.features)

    shuffle.MAX_MEM_BUFFER_SIZE = sys.maxsize  # what is more goes through files that only TensorFlow writes
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # on which TFDS calls every size unknown
        builder = Builder(data_dir=data_dir, config=config or None, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def _cifar10(file: Path, features: Any) -> dict[str, Examples]:
    """Batches of rows of 3073 bytes, a label and 32x32 pixels plane by plane, and the names of the labels."""
    files = {Path(path).name: data for path, data in _members(file, lambda path: path.endswith((".bin", ".meta.txt")))}
    features["label"].names = files["batches.meta.txt"].decode().split()

    def examples(split: str, batches: str) -> Examples:
        rows = np.frombuffer(b"".join(files[name] for name in sorted(files) if name.startswith(batches)), np.uint8)
        for index, row in enumerate(rows.reshape(-1, 3073)):
            image = Image.fromarray(row[1:].reshape(3, 32, 32).transpose(1, 2, 0))
            yield index, {"id": f"{split}_{index:05d}", "image": image, "label": int(row[0])}

    return {"train": examples("train", "data_batch"), "test": examples("test", "test_batch")}


def _imagenette(file: Path, features: Any) -> dict[str, Examples]:
    """Photographs as `.../train/<class>/<name>.JPEG` and `.../val/...`, which stay the JPEGs that they are."""

    def examples(part: str) -> Examples:
        for path, data in _members(file, lambda path: path.endswith(".JPEG") and path.split("/")[1] == part):
            _, _, label, name = path.split("/")
            yield name, {"image": data, "label": label}

    return {"train": examples("train"), "validation": examples("val")}


def _members(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of each `wanted` file in a tar archive, of which nothing is written to the disk."""
    with tarfile.open(file, "r|*") as archive:
        for member in archive:
            if member.isfile() and wanted(member.name) and (data := archive.extractfile(member)):
                yield member.name, data.read()


SPLITS: dict[str, Callable[[Path, Any], dict[str, Examples]]] = {
    "cifar10": _cifar10,
    "imagenette": _imagenette,
}


if __name__ == "__main__":
    sys.exit(main())
