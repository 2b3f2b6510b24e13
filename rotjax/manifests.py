"""Manifests of checkpoints: a step is valid if it has one, `<step>.json`, with the SHA-256 of each of its files.

While a step is written or removed it has the marker `<step>.unfinished` instead, so that the next run may remove it.
"""

import json
import os
import re
import shutil
from pathlib import Path

from rotjax.errors import reason
from rotjax.files import digest, read_json

STEP = re.compile(r"(0|[1-9][0-9]{0,9})\.(json|unfinished)")


def steps(directory: Path) -> list[int]:
    """The steps that have a manifest, newest first."""
    return _marked(directory, "json")


def unfinished(directory: Path) -> list[int]:
    """The steps that are marked unfinished."""
    return _marked(directory, "unfinished")


def foreign(directory: Path, step: int) -> bool:
    """Whether the place of `step` is taken by something that was not saved here: it has neither manifest nor marker."""
    return os.path.lexists(directory / str(step)) and step not in steps(directory) + unfinished(directory)


def damage(directory: Path, step: int) -> str:
    """What is wrong with the files of `step`, in words; empty if they match the manifest."""
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
    """Marks `step` unfinished, hence invalid."""
    (directory / f"{step}.unfinished").touch()  # first: without either file the step would be nobody's
    (directory / f"{step}.json").unlink(missing_ok=True)


def finish(directory: Path, step: int) -> None:
    """Writes the manifest of the complete `step`, which makes it valid, after syncing all files to disk."""
    folder, unfinished = directory / str(step), directory / f"{step}.unfinished"
    with open(unfinished, "w") as file:
        json.dump({path: digest(folder / path, sync=True) for path in files(folder)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(directory / f"{step}.json")


def remove(directory: Path, step: int) -> None:
    """Removes `step`, invalidating it first."""
    (directory / f"{step}.json").rename(directory / f"{step}.unfinished")
    discard(directory, step)


def discard(directory: Path, step: int) -> None:
    """Removes all that is left of the unfinished `step`, the marker last."""
    clear(directory, step)
    (directory / f"{step}.json").unlink(missing_ok=True)
    (directory / f"{step}.unfinished").unlink(missing_ok=True)


def clear(directory: Path, step: int) -> None:
    """Removes the files of the unfinished `step`, but not its marker."""
    for path in (directory / str(step), *directory.glob(f"{step}.orbax-checkpoint-tmp*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def files(folder: Path) -> list[str]:
    """Paths of all files below `folder`; ValueError for a link or anything else that is no plain file."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    for path in (folder, *paths):
        if path.is_symlink() or (path != folder and not path.is_file()):
            raise ValueError(f"{path.name} is no plain file")
    if not paths:
        raise ValueError("it is empty")
    return [path.relative_to(folder).as_posix() for path in paths]


def names(directory: Path) -> list[str]:
    """What lies in `directory`, nothing where it does not exist; raises OSError, which `Path.glob` takes for nothing too."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _marked(directory: Path, kind: str) -> list[int]:
    """The steps that have a file of this `kind`; any other name, such as `...unfinished`, is nobody's."""
    found = (STEP.fullmatch(name) for name in names(directory))
    return sorted((int(match[1]) for match in found if match and match[2] == kind), reverse=True)
