"""Checkpoints of a run, the only code that knows Orbax: one directory a step, in parts `backbone`, `head`, `optimizer`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from rotjax.errors import CheckpointError
from rotjax.training import TrainState
from rotjax.transfer import part

logging.getLogger("absl").addFilter(lambda record: record.levelno >= logging.ERROR)  # Orbax and TFDS narrate


@contextmanager
def open_checkpoints(directory: Path, keep: int = 2) -> Iterator[ocp.training.Checkpointer]:
    """Checkpoints in `directory`, the newest `keep` of them kept; waits on leaving for a save under way."""
    policy: Any = ocp.training.preservation_policies.LatestN(keep)
    always: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
    with ocp.training.Checkpointer(
        _absolute(directory), preservation_policy=policy, save_decision_policy=always, cleanup_tmp_directories=True
    ) as checkpoints:
        yield checkpoints


def save(checkpoints: ocp.training.Checkpointer, state: TrainState) -> None:
    """Starts to save `state` unless its step is saved already; its arrays may be donated as soon as this returns.

    Raises CheckpointError where this save cannot start or the one before it failed.
    """
    step = int(state.step)
    if checkpoints.latest and checkpoints.latest.step == step:
        return
    try:
        if checkpoints.save_checkpointables_async(step, _parts(state)) is None:
            raise CheckpointError(f"step {step} was not saved in {checkpoints.directory}; remove newer steps there")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot save step {step} in {checkpoints.directory}: {first_line(error)}") from error


def restore(checkpoints: ocp.training.Checkpointer, state: TrainState) -> TrainState:
    """The newest checkpoint in the shapes and shardings of `state`, or `state` itself where there is none."""
    if checkpoints.latest is None:
        return state
    step = checkpoints.latest.step
    abstract = {name: jax.tree.map(_abstract, tree) for name, tree in _parts(state).items()}
    try:
        parts = checkpoints.load_checkpointables(step, abstract)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"step {step} in {checkpoints.directory} cannot be restored: {first_line(error)}") from error
    collections = {c: {} for c in state.variables}
    for name in ("backbone", "head"):
        for collection, tree in parts[name].items():
            collections[collection][name] = tree
    return TrainState(variables=collections, **parts["optimizer"])


def latest_step(directory: Path) -> int:
    """Step of the newest checkpoint in `directory`; CheckpointError where there is none."""
    try:
        with ocp.training.Checkpointer(_absolute(directory)) as checkpoints:
            if checkpoints.latest is not None:
                return checkpoints.latest.step
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} cannot be read: {first_line(error)}") from error
    raise CheckpointError(f"{directory} has no checkpoint; let the run reach its first one, or name another workdir")


def load_parts(directory: Path, step: int, abstract: dict) -> dict:
    """The parts named in `abstract`, in its shapes and on its devices; CheckpointError for any mismatch."""
    try:
        return ocp.load_checkpointables(_absolute(directory / str(step)), jax.tree.map(_abstract, abstract))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"step {step} in {directory} cannot be loaded: {first_line(error)}") from error


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


def first_line(error: BaseException) -> str:
    """What `error` says, up to 160 characters of its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
