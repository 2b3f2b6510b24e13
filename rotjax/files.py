"""Files that are written whole or not at all, and read without trust."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rotjax.errors import CheckpointError, UsageError, reason

LARGEST = 2**26  # bytes of a JSON file that is believed


def folder(name: str | Path) -> Path:
    """The folder `name`, `~` and `~user` in it replaced; raises UsageError for a user without a home folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{name} is in no folder ({reason(error)}); name another, without ~") from error


def cache(name: str) -> Path:
    """The folder `name` of what may be lost; raises RuntimeError where the user has no home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rotjax" / name


def write(path: Path, content: str | bytes) -> None:
    """Writes all of `content` or nothing; raises CheckpointError where it cannot."""
    partial = path.with_name(path.name + ".partial")
    with writing(path.parent):
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or after a power failure it may be the empty one that has the name
        partial.replace(path)


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    """Writes all of `rows` or nothing; names that are not text keep their bytes. Raises CheckpointError where it cannot."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write(path, text.getvalue().encode(errors="surrogateescape"))


def write_json(path: Path, values: dict) -> None:
    """Writes all of `values` or nothing; raises CheckpointError where it cannot."""
    write(path, json.dumps(values, indent=1) + "\n")


@contextmanager
def writing(folder: Path, remedy: str = "fix it, the same command resumes") -> Iterator[None]:
    """Turns what the system says of a block that writes in `folder` into CheckpointError, which ends with the `remedy`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write in {folder} ({reason(error)}); {remedy}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in an untrusted JSON file; raises OSError, or ValueError for other content."""
    if path.stat().st_size > LARGEST:
        raise ValueError("it is too large")
    try:
        values = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def read_rows(path: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`, but for one that a full disk has cut off; raises CheckpointError for another file."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise ValueError("it has lines that are no rows")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); remove it, the same command resumes") from error
    return rows


def digest(path: Path, sync: bool = False) -> str:
    """SHA-256 of a file; with `sync`, once it is on the disk."""
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
