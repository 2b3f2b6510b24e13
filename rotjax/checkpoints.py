"""Checkpoints of a run, the only code that knows Orbax: a directory a step, in parts `backbone`, `head`, `optimizer`.

Orbax restores a flipped bit without a word, and takes any directory named like a step for one. So a step counts once
`<step>.json` lists the SHA-256 of each of its files, and for as long as these are its files. While a step is written or
removed it is `<step>.unfinished` that lies there instead, by which the next run knows what it may clear away.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from rotjax import parallel
from rotjax.errors import CheckpointError
from rotjax.training import TrainState
from rotjax.transfer import part

log = logging.getLogger(__name__)
logging.getLogger("absl").addFilter(lambda record: record.levelno >= logging.CRITICAL)  # Orbax and TFDS narrate

STEP = re.compile(r"(0|[1-9]\d{0,9})\.json")
KEEP = 2  # so that a sound one is there while the newest is written
LARGEST = 2**26  # bytes of a JSON file that is believed


@dataclass
class Checkpoints:
    """Those in `directory`, and the save that is `pending`."""

    directory: Path
    pool: ThreadPoolExecutor
    pending: Future | None = None


@contextmanager
def open_checkpoints(directory: Path) -> Iterator[Checkpoints]:
    """The checkpoints in `directory`, cleared of unfinished ones; waits on leaving for a save under way.

    Raises CheckpointError where nothing can be written, or where the last save failed.
    """
    try:
        if parallel.primary():
            directory.mkdir(parents=True, exist_ok=True)
            for marker in directory.glob("*.unfinished"):
                _discard(directory, marker.stem)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written ({error.strerror}); name another workdir") from error
    pool = ThreadPoolExecutor(1)
    checkpoints = Checkpoints(directory, pool)
    try:
        yield checkpoints
        wait(checkpoints)
    finally:
        pool.shutdown(wait=parallel.alone() or sys.exception() is None)  # fellows that are gone would be waited for


def save(checkpoints: Checkpoints, state: TrainState) -> None:
    """Starts to save `state` unless its step is saved already; its arrays may be donated as soon as this returns.

    Raises CheckpointError where this save cannot start or the one before it failed.
    """
    step, directory = int(state.step), checkpoints.directory
    with parallel.together():
        wait(checkpoints)
    if parallel.of_primary(step == next(iter(_steps(directory)), None)):
        return
    try:
        with parallel.together():
            if parallel.primary():
                _begin(directory, step, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        response = ocp.save_checkpointables_async(_absolute(directory / str(step)), _parts(state), overwrite=True)
    except (OSError, ValueError) as error:
        raise _unsaved(directory, step, error) from error
    checkpoints.pending = checkpoints.pool.submit(_finish, directory, step, response)


def check(checkpoints: Checkpoints) -> None:
    """Raises CheckpointError where a save has failed meanwhile."""
    if checkpoints.pending and checkpoints.pending.done():
        wait(checkpoints)


def wait(checkpoints: Checkpoints) -> None:
    """Waits for the save under way; raises CheckpointError where it failed."""
    pending, checkpoints.pending = checkpoints.pending, None
    if pending:
        pending.result()


def restore(directory: Path, step: int, state: TrainState) -> TrainState:
    """The checkpoint of `step`, in the shapes and shardings of `state`."""
    parts = load_parts(directory, step, _parts(state))
    collections = {c: {} for c in state.variables}
    for name in ("backbone", "head"):
        for collection, tree in parts[name].items():
            collections[collection][name] = tree
    return TrainState(variables=collections, **parts["optimizer"])


def newest(directory: Path) -> int | None:
    """Step of the newest sound checkpoint, None where there never was one; damaged ones are named in a warning.

    Raises CheckpointError where every one is damaged.
    """
    names = {path.name for path in directory.glob("*")}
    strays = [name for name in sorted(names) if name.isdigit() and not names & {f"{name}.json", f"{name}.unfinished"}]
    if strays:
        log.warning(f"no checkpoints for want of a list of their files, left alone: {', '.join(strays[:5])} in {directory}")
    damage = ""
    for step in _steps(directory):
        if damage:
            log.warning(f"{damage}; trying step {step}")
        if not (damage := _damage(directory, step)):
            return step
    if damage:
        raise CheckpointError(f"{damage}, and no older one is left; remove {directory} to begin anew")
    return None


def latest_step(directory: Path) -> int:
    """Step of the newest sound checkpoint in `directory`; CheckpointError where there is none."""
    try:
        step = newest(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read ({error.strerror}); name another workdir") from error
    if step is None:
        raise CheckpointError(f"{directory} has no checkpoint; let the run reach its first one, or name another workdir")
    return step


def load_parts(directory: Path, step: int, abstract: dict) -> dict:
    """The parts named in `abstract`, in its shapes and on its devices; CheckpointError for any mismatch, NaN or infinity."""
    try:
        parts = ocp.load_checkpointables(_absolute(directory / str(step)), jax.tree.map(_abstract, abstract))
    except Exception as error:  # of Orbax, TensorStore, json: whatever odd content leads to
        cause: BaseException | None = error
        while cause := cause.__cause__ or cause.__context__:
            if isinstance(cause, KeyboardInterrupt):  # which Orbax takes for a fault of what it reads
                raise KeyboardInterrupt from None
        raise CheckpointError(f"step {step} in {directory} cannot be loaded: {_first_line(error)}") from error
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(parts)):
        raise CheckpointError(f"step {step} in {directory} holds values that are not finite; begin anew in another workdir")
    return parts


def _first_line(error: BaseException) -> str:
    """What `error` says, up to 100 characters of its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def _begin(directory: Path, step: int, size: int) -> None:
    """Marks `step` unfinished; raises CheckpointError where there is no room for its `size` in bytes."""
    if (free := shutil.disk_usage(directory).free) < 1.1 * size:
        sizes = f"{1.1 * size / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB free"
        raise CheckpointError(f"no room to save step {step} in {directory}: {sizes}; make room, the same command goes on")
    (directory / f"{step}.json").unlink(missing_ok=True)
    (directory / f"{step}.unfinished").touch()


def _finish(directory: Path, step: int, response: ocp.AsyncResponse) -> None:
    """Once `step` is written by all processes, makes it count, and removes what is older than the newest `KEEP`."""
    try:
        response.result()
        if not parallel.primary():
            return
        manifest = directory / f"{step}.unfinished"
        with open(manifest, "w") as file:
            json.dump(
                {path: _digest(directory / str(step) / path, keep=True) for path in _files(directory / str(step))},
                file,
                indent=1,
            )
            file.flush()
            os.fsync(file.fileno())
        manifest.rename(directory / f"{step}.json")
        for old in _steps(directory)[KEEP:]:
            (directory / f"{old}.json").rename(directory / f"{old}.unfinished")
            _discard(directory, str(old))
    except Exception as error:  # of Orbax and TensorStore too
        with suppress(OSError):  # Orbax may still be writing other parts: then the next run clears away
            if parallel.primary():
                _discard(directory, str(step))
        raise _unsaved(directory, step, error) from error


def _unsaved(directory: Path, step: int, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"step {step} was not saved in {directory}: {_first_line(error)}; earlier ones are left as they were"
    )


def _discard(directory: Path, step: str) -> None:
    """Removes what there is of `step`, the marker last."""
    for path in (directory / step, *directory.glob(f"{step}.orbax-checkpoint-tmp*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    (directory / f"{step}.json").unlink(missing_ok=True)
    (directory / f"{step}.unfinished").unlink(missing_ok=True)


def _steps(directory: Path) -> list[int]:
    """Those that have a list of their files, the newest first."""
    return sorted((int(found[1]) for path in directory.glob("*.json") if (found := STEP.fullmatch(path.name))), reverse=True)


def _damage(directory: Path, step: int) -> str:
    """What is wrong with the files of `step`, in words; empty where they are those that were saved."""
    folder, manifest = directory / str(step), directory / f"{step}.json"
    try:
        if manifest.stat().st_size > LARGEST:
            raise ValueError("it is too large")
        listed, files = json.loads(manifest.read_text()), _files(folder)
        if odd := sorted(set(listed) ^ set(files)):
            return (
                f"checkpoint {step} in {directory} is damaged ({odd[0]} is {'missing' if odd[0] in listed else 'a stray'})"
            )
        for path in files:
            if _digest(folder / path) != listed[path]:
                return f"checkpoint {step} in {directory} is damaged ({path} is not what was saved)"
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"checkpoint {step} in {directory} is damaged ({_first_line(error)})"
    return ""


def _files(folder: Path) -> list[str]:
    """Paths of all files below `folder`; ValueError for a link or anything else that is no plain file."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    if odd := next(
        (path for path in (folder, *paths) if path.is_symlink() or (path != folder and not path.is_file())), None
    ):
        raise ValueError(f"{odd.name} is no plain file")
    if not paths:
        raise ValueError("it is empty")
    return [path.relative_to(folder).as_posix() for path in paths]


def _digest(path: Path, keep: bool = False) -> str:
    """SHA-256 of a file; with `keep`, once it is on the disk for good."""
    with open(path, "rb") as file:
        if keep:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _absolute(path: Path) -> str:
    return str(path.resolve())  # Orbax starts to save below a relative path, and then refuses it


def _parts(state: TrainState) -> dict[str, dict]:
    return {
        "backbone": part(state.variables, "backbone"),
        "head": part(state.variables, "head"),
        "optimizer": {"step": state.step, "opt_state": state.opt_state, "sums": state.sums},
    }


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
