"""Runs on disk: a plan trained, or resumed, in a workdir, row by row."""

import atexit
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from threading import Event
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from rotjax import checkpoints, files, optim, processes, scoring, signals, training, workdirs
from rotjax import feed as feeds
from rotjax.data import batches
from rotjax.data.augmentation import train_view
from rotjax.errors import RotjaxError, Stopped, UsageError, check_integer
from rotjax.feed import Feed, Stream, Where
from rotjax.models import Classifier
from rotjax.parallel import abstract, data_mesh, over, place, split
from rotjax.planning import Plan
from rotjax.recipe_json import to_json
from rotjax.state import TrainState, init_state, init_variables
from rotjax.transfer import graft

log = logging.getLogger(__name__)

_SAVE, _STOP = 1, 2  # what a process may wish for, by rank


def train(
    plan: Plan,
    workdir: str | Path,
    *,
    log_steps: int = 50,
    checkpoint_seconds: float = 60.0,
    augment: Where | None = None,
    steps_per_dispatch: int | None = None,
    threads: int | None = None,
    progress: Callable[[int], object] = lambda step: None,
) -> Iterator[dict]:
    """Runs `plan` in `workdir`, resuming from its newest checkpoint if any, and yields each row written to `metrics.jsonl`.

    There is a row every `log_steps` steps and after each epoch, none where the run is complete, and a checkpoint once
    `checkpoint_seconds` have passed since the last. `augment` says where batches are made, `steps_per_dispatch` how many
    steps are one program, `threads` how many read ahead (0: the caller's); None is what suits the devices. `progress` is
    told the step that a dispatch leads to, at first that which the run begins with. All processes must call this; one
    writes, and they agree on stopping and saving every `log_steps` batches. Writes `recipe.json`, `data.json`,
    `checkpoints/`, `metrics.jsonl` and, at the end, `summary.json`. To leave the generator early saves nothing more. Raises
    Stopped after SIGTERM or SIGINT, once the state is saved (a second signal ends the process at once, or is the caller's
    while that has a row), UsageError for a value out of range, a workdir of another recipe or processes that differ,
    DataError for a workdir of other data, InUseError where another process uses it, NonFiniteError, CheckpointError,
    FellowError where another process of this run failed.
    """
    began, workdir, recipe, mesh = time.perf_counter(), files.folder(workdir), plan.recipe, data_mesh()
    check_cadence(log_steps, checkpoint_seconds)
    feed = feeds.choose(plan, augment, steps_per_dispatch, threads)
    _check_alike(plan, feed, log_steps)
    with ExitStack() as stack:
        with processes.together():
            ours = workdirs.claimed(workdir, recipe, plan.data, plan.backbone)
            claim = stack.enter_context(ours) if processes.primary() else _ignore
            stopping = stack.enter_context(signals.stopping())
            stack.callback(atexit.unregister, atexit.register(partial(_close, stack, stopping)))
            saved = stack.enter_context(checkpoints.open_checkpoints(workdir / "checkpoints", claim))
            newest = checkpoints.newest(saved.directory) if processes.primary() else None
        first = processes.of_primary(newest or 0)
        if processes.of_primary(first == plan.steps and (workdir / "summary.json").exists()):
            log.info(f"already complete at step {first}")
            return
        model, optimizer, begin = _build(plan)
        if first:
            state = checkpoints.restore(saved.directory, first, abstract(jax.eval_shape(over(mesh, begin)), mesh))
        else:
            state = begin()
        for line in _beginning(plan, first, state.variables["params"]):
            log.info(line)
        with processes.together():
            logged, write = stack.enter_context(workdirs.metrics(workdir, first)) if processes.primary() else ([], _ignore)
        score, elsewhere = scoring.scorer(plan, model, feed, partial(_until, stopping, log_steps)), 0.0
        last: dict | None = None  # the score after an epoch
        stream = train_stream(plan, feed, mesh)
        step = _compiled(plan, feed, mesh, model, optimizer, state, stream)
        placed = stack.enter_context(closing(_placed(plan, feed, mesh, stream, first)))
        trained = training.fit(
            step, state, placed, start=first, steps=plan.steps, epoch_steps=plan.epoch_steps, log_steps=log_steps
        )
        started = last_save = time.perf_counter()
        try:
            reached = accumulate(feeds.sizes(first, plan.steps, plan.epoch_steps, feed.per_dispatch), initial=first)
            begun = (state, _untested(plan, state, logged))
            for number, (state, rows) in zip(reached, chain([begun], trained), strict=True):
                progress(number)
                for row in rows:
                    if "train_loss" in row:
                        elsewhere -= time.perf_counter()
                        last = score(state.variables, recipe.eval_task, row["epoch"])
                        elsewhere += time.perf_counter()
                        row |= {"test_loss": last["loss"], "test_accuracy": last["accuracy"]}
                    with processes.together():
                        write(row)
                    elsewhere -= time.perf_counter()
                    with stopping.hold():
                        yield row
                    elsewhere += time.perf_counter()
                if not rows and not processes.alone():
                    continue  # processes agree only where they wait for the device anyway
                with processes.together():
                    checkpoints.check(saved)
                due = processes.primary() and time.perf_counter() - last_save >= checkpoint_seconds
                wish = processes.highest(_STOP if stopping.is_set() else _SAVE if due else 0)
                if wish == _STOP:
                    raise _Signalled
                if wish == _SAVE:
                    _save(saved, state)
                    last_save = time.perf_counter()
            seconds = time.perf_counter() - started - elsewhere
            _save(saved, state)
            scores = scoring.final_scores(plan, score, state.variables, last)
        except _Signalled:
            _save(saved, state)
            with processes.together():
                checkpoints.wait(saved)
            saving = f"saved in {workdir}" if int(state.step) else "nothing to save yet"
            where = f"stopped at step {int(state.step)} of {plan.steps}, {saving}"
            raise Stopped(f"{where}; the same command resumes") from None
        views = (plan.steps - first) * recipe.views
        summary = scores | {
            "images_per_second": round(views / seconds, 1) if views else None,
            "wall_seconds": round(time.perf_counter() - began, 1),
            "resumed_from": first or None,
        }
        with processes.together():
            checkpoints.wait(saved)
            if processes.primary():
                claim()
                files.write_json(workdir / "summary.json", summary | _facts(plan, mesh))


def _close(stack: ExitStack, stopping: signals.Stopping) -> None:
    """Closes a run that is held as Python ends: later, its modules are gone, and the thread that watches signals halted."""
    try:
        if stopping.held:
            stack.close()
    except RotjaxError as error:  # of a save that was under way
        log.warning(str(error))


def check_cadence(log_steps: int, checkpoint_seconds: float) -> None:
    """Raises UsageError for a number out of range."""
    check_integer("log_steps", log_steps)
    for name, value, least in (("log_steps", log_steps, 1), ("checkpoint_seconds", checkpoint_seconds, 0)):
        if not value >= least:  # nan is not either
            raise UsageError(f"{name}={value} is too small; it is at least {least}")


def _facts(plan: Plan, mesh: Mesh) -> dict:
    """What a summary says of the run besides its scores and times."""
    recipe = plan.recipe
    return {
        "epochs": plan.epochs,
        "steps": plan.steps,
        "tested_on": recipe.tested_on,
        "dataset": recipe.dataset,
        "train_images": len(plan.data.train["label"]),
        "test_images": len(plan.data.test["label"]),
        "backbone": recipe.backbone,
        "stem": recipe.stem,
        "width": recipe.width,
        "seed": recipe.seed,
        "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "versions": versions("rotjax", "jax", "flax", "optax"),
    }


def versions(*names: str) -> dict[str, str]:
    """The version of each distribution of `names` that is installed."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _build(plan: Plan) -> tuple[Classifier, optax.GradientTransformation, Callable[[], TrainState]]:
    """The network, its optimizer, and a function that draws the state at step 0."""
    recipe = plan.recipe
    model = recipe.model()
    optimizer = optim.OPTIMIZERS[recipe.optimizer](plan.schedule, recipe.weight_decay, recipe.frozen)

    def begin() -> TrainState:
        variables = init_variables(model, recipe.seed, recipe.image_size)
        if plan.backbone is not None:
            variables = graft(variables, "backbone", plan.backbone)
        return init_state(optimizer, variables)

    return model, optimizer, begin


def _beginning(plan: Plan, first: int, params: dict[str, Any]) -> Iterator[str]:
    """Yields lines of what a run from step `first` on begins with, and of how much of it trains."""
    recipe = plan.recipe
    if first:
        yield f"resuming from step {first} of {plan.steps}"
    elif plan.backbone is not None:
        yield f"taken from {recipe.pretrained}: the backbone, {len(jax.tree.leaves(plan.backbone))} arrays; new: the head"
    labels, sizes = jax.tree.leaves(optim.labels(params, recipe.frozen)), [leaf.size for leaf in jax.tree.leaves(params)]
    trainable = sum(size for size, label in zip(sizes, labels, strict=True) if label == "trainable")
    statistics = "held" if recipe.held else "moving"
    frozen = f"; frozen: {', '.join(recipe.frozen)}, their statistics {statistics}" if recipe.frozen else ""
    yield f"{recipe.backbone}, {recipe.stem} stem: {trainable:,} of {sum(sizes):,} parameters train{frozen}"


def _check_alike(plan: Plan, feed: Feed, log_steps: int) -> None:
    """Raises UsageError in every process where they were not all started on the same."""
    if processes.alone():
        return
    given = {"recipe": to_json(plan.recipe), "data": plan.data.facts(), "log_steps": log_steps}
    for name, value in (given | {"augment": feed.augment, "steps_per_dispatch": feed.per_dispatch}).items():
        if not processes.alike(json.dumps(value, sort_keys=True)):
            raise UsageError(f"the processes of this run differ in their {name}; start all with the same flags and data")


class _Signalled(Exception):
    """It is time to save and to stop."""


def _until(stopping: Event, every: int, items: Iterable) -> Iterator:
    """`items`, until a signal has come; to any of several processes, which ask each other before each `every`th item."""
    for number, item in enumerate(items):
        if (processes.alone() or number % every == 0) and processes.highest(stopping.is_set()):
            raise _Signalled
        yield item


def _ignore(*_) -> None:
    """What processes that are not the first write, and ask before they do."""


def _untested(plan: Plan, state: TrainState, logged: Sequence[dict]) -> list[dict]:
    """The row of the epoch that ended with `state` where a signal broke its test off: it is not among those `logged`."""
    step = int(state.step)
    if not step or (step % plan.epoch_steps and step != plan.steps):
        return []
    if processes.of_primary(any(row["step"] == step and "test_loss" in row for row in logged)):
        return []
    return [training.epoch_row(state, -(-step // plan.epoch_steps))]


def _save(saved: checkpoints.Checkpoints, state: TrainState) -> None:
    """Saves `state` unless it is that of step 0."""
    if int(state.step):
        checkpoints.save(saved, state)


def train_stream(plan: Plan, feed: Feed, mesh: Mesh) -> Stream:
    """The batches that `plan` trains on."""
    recipe, data = plan.recipe, plan.data.train
    picks = batches.train_picks(len(data["label"]), recipe.batch_size, plan.steps, seed=recipe.seed)
    view = partial(train_view, task=recipe.train_task, flip=recipe.flip, cutout=recipe.cutout)
    return feed.stream(picks, view, feed.put(data, mesh))


def _compiled(
    plan: Plan,
    feed: Feed,
    mesh: Mesh,
    model: Classifier,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    stream: Stream,
) -> training.Step:
    """The train steps of one dispatch, compiled for each number of steps that dispatches from `state` on take."""
    loss = partial(training.cross_entropy, smoothing=plan.recipe.label_smoothing)
    step = training.train_steps(model, optimizer, mesh, make=stream.make, loss=loss)
    if sizes := feeds.programs(int(state.step), plan.steps, plan.epoch_steps, feed.per_dispatch):
        log.info("compiling the train step")
    first: Any = stream.elements[0]
    (one,) = place([first], mesh)

    def program(size: int) -> jax.stages.Compiled:
        def several(x):
            return jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=split(mesh, axis=1))

        return step.lower(state, jax.tree.map(several, one), stream.data).compile()

    programs = {size: program(size) for size in sizes}
    return lambda state, given: programs[len(jax.tree.leaves(given)[0])](state, given, stream.data)


def _placed(plan: Plan, feed: Feed, mesh: Mesh, stream: Stream, first: int) -> Generator[dict, None, None]:
    """Yields the placed input of each dispatch from step `first` on."""
    with closing(batches.read(stream.elements, start=first, threads=feed.threads, ahead=2 * feed.per_dispatch)) as reader:
        groups = feeds.stacked(reader, feeds.sizes(first, plan.steps, plan.epoch_steps, feed.per_dispatch))
        yield from place(groups, mesh, axis=1)
