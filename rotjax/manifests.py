"""Which steps in a folder of checkpoints count: those with a manifest, `<step>.json`, the SHA-256 of each of their files.

While a step is written or removed it is `<step>.unfinished` that lies there instead, by which the next run knows what it
may clear away.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from rotjax.errors import reason

STEP = re.compile(r"(0|[1-9][0-9]{0,9})\.(json|unfinished)")
LARGEST = 2**26  # bytes of a JSON file that is believed


def steps(directory: Path) -> list[int]:
    """Those that have a manifest, the newest first."""
    return _marked(directory, "json")


def unfinished(directory: Path) -> list[int]:
    """Those that are marked so."""
    return _marked(directory, "unfinished")


def foreign(directory: Path, step: int) -> bool:
    """Whether something lies in the place of `step` that was not saved here: it has neither manifest nor marker."""
    return os.path.lexists(directory / str(step)) and step not in steps(directory) + unfinished(directory)


def damage(directory: Path, step: int) -> str:
    """What is wrong with the files of `step`, in words; empty where they are those that were saved."""
    folder, manifest = directory / str(step), directory / f"{step}.json"
    try:
        listed, paths = read_json(manifest), files(folder)
        if odd := sorted(set(listed) ^ set(paths)):
            found = f"{odd[0]} is {'missing' if odd[0] in listed else 'a stray'}"
        else:
            changed = next((path for path in paths if digest(folder / path) != listed[path]), None)
            found = changed and f"{changed} is not what was saved"
    except (OSError, ValueError, TypeError) as error:
        found = reason(error)
    return f"checkpoint {step} in {directory} is damaged ({found})" if found else ""


def begin(directory: Path, step: int) -> None:
    """Marks `step` unfinished: whatever there is of it no longer counts."""
    (directory / f"{step}.json").unlink(missing_ok=True)
    (directory / f"{step}.unfinished").touch()


def finish(directory: Path, step: int) -> None:
    """Makes `step`, of which all files are there, count, once they and their manifest are on the disk for good."""
    folder, unfinished = directory / str(step), directory / f"{step}.unfinished"
    with open(unfinished, "w") as file:
        json.dump({path: digest(folder / path, keep=True) for path in files(folder)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(directory / f"{step}.json")


def remove(directory: Path, step: int) -> None:
    """Removes `step`, which from the first moment on does not count."""
    (directory / f"{step}.json").rename(directory / f"{step}.unfinished")
    discard(directory, step)


def discard(directory: Path, step: int) -> None:
    """Removes what there is of the unfinished `step`, the marker last."""
    for path in (directory / str(step), *directory.glob(f"{step}.orbax-checkpoint-tmp*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    (directory / f"{step}.json").unlink(missing_ok=True)
    (directory / f"{step}.unfinished").unlink(missing_ok=True)


def files(folder: Path) -> list[str]:
    """Paths of all files below `folder`; ValueError for a link or anything else that is no plain file."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    for path in (folder, *paths):
        if path.is_symlink() or (path != folder and not path.is_file()):
            raise ValueError(f"{path.name} is no plain file")
    if not paths:
        raise ValueError("it is empty")
    return [path.relative_to(folder).as_posix() for path in paths]


def digest(path: Path, keep: bool = False) -> str:
    """SHA-256 of a file; with `keep`, once it is on the disk for good."""
    with open(path, "rb") as file:
        if keep:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """What a JSON file holds that anybody may have written; raises OSError, or ValueError for any odd content."""
    if path.stat().st_size > LARGEST:
        raise ValueError("it is too large")
    try:
        return json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _marked(directory: Path, kind: str) -> list[int]:
    """The steps that have a file of this `kind`; any other name, such as `...unfinished`, is nobody's."""
    found = (STEP.fullmatch(path.name) for path in directory.glob(f"*.{kind}"))
    return sorted((int(match[1]) for match in found if match), reverse=True)
