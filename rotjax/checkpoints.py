"""Checkpoints of a run, the only code that uses Orbax: one directory per step, in parts `backbone`, `head`, `optimizer`.

The network of another module has a part for each of its own.

Orbax restores corrupted files silently, and takes any directory named like a step for a checkpoint. So a step is valid
only if it has a manifest (`rotjax.manifests`) and its files match it.
"""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from rotjax import manifests, processes
from rotjax.errors import CheckpointError, UsageError, few, in_bytes, reason
from rotjax.parallel import data_mesh, replicated
from rotjax.state import TrainState, check_finite
from rotjax.transfer import joined, part

log = logging.getLogger(__name__)

KEEP = 2  # so that one is there while the newest is written


@dataclass
class Checkpoints:
    """The checkpoints in `directory`, the save under way, and `claim`, which raises CheckpointError if they are not ours."""

    directory: Path
    claim: Callable[[], None]
    pool: ThreadPoolExecutor
    pending: Future | None = None


@contextmanager
def open_checkpoints(directory: str | Path, claim: Callable[[], None] = lambda: None) -> Iterator[Checkpoints]:
    """Opens the checkpoints in `directory`, removing unfinished ones; on exit waits for a save under way.

    Nothing is saved or removed once `claim` raises, see `workdirs.claimed`. Raises CheckpointError where nothing can be
    written, or where the last save failed.
    """
    directory = Path(directory)
    try:
        if processes.primary():
            directory.mkdir(parents=True, exist_ok=True)
            for step in manifests.unfinished(directory):
                manifests.discard(directory, step)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written ({reason(error)}); name another workdir") from error
    pool = ThreadPoolExecutor(1)
    checkpoints = Checkpoints(directory, claim, pool)
    try:
        yield checkpoints
        wait(checkpoints)
    finally:
        pool.shutdown(wait=processes.alone() or sys.exception() is None)  # fellows that are gone would be waited for


def save(checkpoints: Checkpoints, state: TrainState) -> None:
    """Starts an asynchronous save of `state` unless its step is saved; its arrays may be donated once this returns.

    Raises CheckpointError where this save cannot start, where a newer step is there, or where the save before failed,
    NonFiniteError for a state that `train_step` marked as not finite, which could not be restored, and UsageError for a
    network with a part called `optimizer` or `metrics`.
    """
    check_finite(state)
    parts = _parts(state)
    step, directory, size = int(state.step), checkpoints.directory, sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with processes.together():
        wait(checkpoints)
        checkpoints.claim()
    if processes.of_primary(processes.primary() and _sound(directory, step)):
        return
    try:
        with processes.together():
            if processes.primary():
                _begin(directory, step, size)
        context = ocp.Context()
        context.array.saving.use_replica_parallel = False  # else it compiles a program for every slice
        with context:
            response = ocp.save_checkpointables_async(_absolute(directory / str(step)), parts, overwrite=True)
    except (OSError, ValueError) as error:
        if processes.lost(error):
            raise
        raise _unsaved(directory, step, size, error) from error
    checkpoints.pending = checkpoints.pool.submit(_finish, checkpoints, step, size, response)


def check(checkpoints: Checkpoints) -> None:
    """Raises CheckpointError if the last save has failed; does not wait for it."""
    if checkpoints.pending and checkpoints.pending.done():
        wait(checkpoints)


def wait(checkpoints: Checkpoints) -> None:
    """Waits for the save under way; raises CheckpointError where it failed."""
    pending, checkpoints.pending = checkpoints.pending, None
    if pending:
        pending.result()


def restore(directory: str | Path, step: int, state: TrainState) -> TrainState:
    """The state saved at `step`, with the shapes and shardings of `state`; raises as `load_parts`."""
    parts = load_parts(directory, step, _parts(state))
    rest = parts.pop("optimizer")
    return TrainState(variables={name: {} for name in state.variables} | joined(parts), **rest)  # some are empty


def newest(directory: str | Path) -> int | None:
    """Step of the newest valid checkpoint, None if there never was one; warns of damaged ones.

    Raises CheckpointError where every one is damaged, or the directory cannot be read.
    """
    directory = Path(directory)
    try:
        names, steps = set(manifests.names(directory)), manifests.steps(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read ({reason(error)}); name another workdir") from error
    strays = [name for name in sorted(names) if name.isdigit() and not names & {f"{name}.json", f"{name}.unfinished"}]
    if strays:
        log.warning(f"no checkpoints for want of a list of their files, left alone: {few(strays)} in {directory}")
    damage = ""
    for step in steps:
        if damage:
            log.warning(f"{damage}; trying step {step}")
        if not (damage := manifests.damage(directory, step)):
            return step
    if damage:
        raise CheckpointError(f"{damage}, and no older one is left; remove {directory} to begin anew")
    return None


def latest_step(directory: str | Path) -> int:
    """Step of the newest valid checkpoint in `directory`; CheckpointError if there is none."""
    if (step := newest(directory)) is None:
        raise CheckpointError(f"{directory} has no checkpoint; let the run reach its first one, or name another workdir")
    return step


def load_parts(directory: str | Path, step: int, abstract: dict) -> dict:
    """The parts named in `abstract`, with its shapes and shardings, over all devices where it has none.

    CheckpointError for a mismatch, and for NaN or infinity, but in the `optimizer`, which may begin with one.
    """
    try:
        wanted = jax.tree.map(_wanted, abstract)
        parts = ocp.load_checkpointables(_absolute(Path(directory) / str(step)), wanted)
    except Exception as error:  # of Orbax, TensorStore, json: whatever odd content leads to
        cause: BaseException = error
        while beneath := cause.__cause__ or cause.__context__:
            if isinstance(cause := beneath, KeyboardInterrupt):  # which Orbax takes for a fault of what it reads
                raise cause from None
        why = f"step {step} in {directory} cannot be loaded ({reason(cause)})"
        raise CheckpointError(f"{why}; ask for the network and the optimizer that it was saved with") from error
    for asked, found in zip(*map(jax.tree.leaves, (abstract, parts)), strict=True):
        if asked.dtype != found.dtype:
            raise CheckpointError(f"step {step} in {directory} holds {found.dtype}, not {asked.dtype}; name another workdir")
    network = jax.tree.leaves([tree for name, tree in parts.items() if name != "optimizer"])
    if not all(_is_key(leaf) or np.isfinite(np.asarray(leaf)).all() for leaf in network):
        raise CheckpointError(f"step {step} in {directory} holds values that are not finite; begin anew in another workdir")
    return parts


def _begin(directory: Path, step: int, size: int) -> None:
    """Marks `step` unfinished; raises CheckpointError where it has no place, or no room for its `size` in bytes."""
    if manifests.foreign(directory, step):
        where = f"{directory / str(step)} is in the place of step {step}, and was not saved here"
        raise CheckpointError(f"{where}; move it away, then the same command resumes")
    newer = [other for other in manifests.steps(directory) if other > step]
    if sound := next((other for other in newer if not manifests.damage(directory, other)), None):
        raise CheckpointError(f"{directory} holds step {sound}, so step {step} is not saved there; name another workdir")
    if shutil.disk_usage(directory).free < 1.1 * size:
        room = _room(directory, size)
        raise CheckpointError(f"no room to save step {step} in {directory}: {room}; make room, the same command resumes")
    manifests.begin(directory, step)


def _finish(checkpoints: Checkpoints, step: int, size: int, response: ocp.AsyncResponse) -> None:
    """Once all processes have written `step`, makes it valid and removes what is older than the newest `KEEP` sound ones."""
    directory = checkpoints.directory
    try:
        response.result()
        if not processes.primary():
            return
        checkpoints.claim()
        manifests.finish(directory, step)
    except Exception as error:  # of Orbax and TensorStore too
        with suppress(OSError, CheckpointError):
            if processes.primary():
                checkpoints.claim()
                manifests.clear(directory, step)  # not its marker: what Orbax may still be writing the next run clears away
        if processes.lost(error):
            raise
        raise _unsaved(directory, step, size, error) from error
    try:
        listed = manifests.steps(directory)
        older = (other for other in listed if other < step and not manifests.damage(directory, other))
        kept = [step, *islice(older, KEEP - 1)]
        for other in listed:
            if other > step or (len(kept) == KEEP and other < kept[-1]):  # what is newer is damaged, see `_begin`
                manifests.remove(directory, other)
    except OSError as error:
        log.warning(f"step {step} is saved in {directory}, but an older one cannot be removed ({reason(error)})")


def _sound(directory: Path, step: int) -> bool:
    try:
        return step in manifests.steps(directory) and not manifests.damage(directory, step)
    except OSError:  # which `_begin` will meet too
        return False


def _unsaved(directory: Path, step: int, size: int, error: Exception) -> CheckpointError:
    where = f"step {step} was not saved in {directory} ({_room(directory, size)})"
    return CheckpointError(f"{where}: {reason(error)}; fix it, the same command resumes")


def _room(directory: Path, size: int) -> str:
    with suppress(OSError):
        return f"{in_bytes(1.1 * size)} are needed, {in_bytes(shutil.disk_usage(directory).free)} free"
    return "it is gone"


def quiet() -> None:
    """Silences the logs of Orbax and TFDS in this process, for a program that reports by itself."""
    logging.getLogger("absl").addFilter(_critical)
    if getattr(sys.unraisablehook, "func", None) is not _unraisable:
        sys.unraisablehook = partial(_unraisable, sys.unraisablehook)


def _critical(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.CRITICAL


def _unraisable(say, unraisable) -> None:
    """Leaves out what TensorStore's threads say once Orbax, after a failure that we report, closed the loop they call."""
    trace = unraisable.exc_traceback
    if trace is None or trace.tb_frame.f_code.co_name != "call_soon_threadsafe":
        say(unraisable)


def _absolute(path: Path) -> str:
    return str(path.resolve())  # Orbax starts to save below a relative path, and then refuses it


def _parts(state: TrainState) -> dict[str, dict]:
    names = {name for tree in state.variables.values() for name in tree}
    if taken := names & {"optimizer", "metrics"}:  # the last is Orbax's
        raise UsageError(f"a part of the network is called {taken.pop()}, as one of checkpoints is; give it another name")
    network = {name: part(state.variables, name) for name in sorted(names)}
    return network | {"optimizer": {"step": state.step, "opt_state": state.opt_state, "sums": state.sums}}


@dataclass(frozen=True)
class _Abstract:
    """A leaf to be loaded in the dtype it was saved in, where this has none: asked for another, Orbax converts silently."""

    shape: tuple[int, ...]
    sharding: jax.sharding.Sharding
    dtype: Any = None


def _wanted(leaf: Any) -> _Abstract:
    sharding = getattr(leaf, "sharding", None) or replicated(data_mesh())
    return _Abstract(leaf.shape, sharding, leaf.dtype if _is_key(leaf) else None)


def _is_key(leaf: Any) -> bool:
    """Whether it is a key of JAX's, which Orbax takes for its words unless it is told."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
