"""A run on disk: a plan carried out in a workdir, or gone on with, row by row."""

import dataclasses
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import jax
import optax

from rotjax import checkpoints, optim, training, workdirs
from rotjax.data import batches, sources, tasks
from rotjax.errors import DataError, Stopped, UsageError
from rotjax.models import Classifier
from rotjax.parallel import check_batch, data_mesh, replicated, split
from rotjax.recipe import Classification, Recipe, Rotation, check
from rotjax.transfer import graft, part


@dataclass(frozen=True)
class Plan:
    """A run that nothing speaks against: a resolved recipe, its data, the backbone it starts from, its length in steps."""

    recipe: Recipe
    data: sources.Dataset
    backbone: dict | None
    epoch_steps: int
    steps: int


def plan(
    recipe: Recipe, *, data_dir: str | Path | None = None, data: sources.Dataset | None = None, progress=iter
) -> Plan:
    """Everything that can be refused is refused here: reads the pretrained backbone and the data, writes nothing.

    `data` stands in for the data set that the recipe names. Raises UsageError, DataError or CheckpointError.
    """
    check(recipe)
    donor = Path(recipe.pretrained) if isinstance(recipe, Classification) and recipe.pretrained else None
    recipe, step = _inherit(recipe, donor) if donor else (recipe, 0)
    recipe = recipe.resolved(sources.defaults(recipe.dataset))
    check(recipe)
    check_batch(recipe.batch_size, data_mesh())
    if data is None:
        data = sources.load(recipe.dataset, image_size=recipe.image_size, data_dir=data_dir, progress=progress)
    epoch_steps = len(data.train["label"]) // recipe.batch_size
    if isinstance(recipe, Classification):
        recipe, data = _classes(recipe, data)
    count = len(data.train["label"])
    if recipe.batch_size > count:
        raise UsageError(f"--batch_size={recipe.batch_size} is larger than the training set of {count} images; lower it")
    backbone = _load_part(recipe.model(), recipe, donor, step, "backbone") if donor else None
    steps = recipe.epochs * epoch_steps
    return Plan(recipe, data, backbone, epoch_steps, min(steps, recipe.max_steps or steps))


def run(
    plan: Plan,
    workdir: str | Path,
    *,
    log_steps: int = 50,
    checkpoint_seconds: float = 60.0,
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[dict]:
    """Trains `plan` in `workdir`, or goes on where it stopped, yielding each row that `metrics.jsonl` gets.

    Leaves `recipe.json`, `checkpoints/`, `metrics.jsonl` and, at the end, `summary.json`; `note` is told in lines what is
    done. Raises Stopped once SIGTERM or SIGINT came and the state is saved, UsageError for a workdir of another recipe,
    InUseError where another process is at work.
    """
    began, workdir, recipe, mesh = time.perf_counter(), Path(workdir), plan.recipe, data_mesh()
    task = _task(recipe)
    with ExitStack() as stack:
        stack.enter_context(workdirs.claimed(workdir, recipe))
        stopping = stack.enter_context(workdirs.signals())
        saved = stack.enter_context(checkpoints.open_checkpoints(workdir / "checkpoints"))
        model, optimizer, state = _build(plan, saved, mesh, note)
        first = int(state.step)
        if first == plan.steps and (workdir / "summary.json").exists():
            note(f"already complete at step {first}")
            return
        if first:
            note(f"going on from step {first} of {plan.steps}")
        metrics = stack.enter_context(workdirs.metrics(workdir, first))

        evaluation, testing = training.eval_step(model, mesh), 0.0

        def score(variables, task=task, epoch=0):
            views = batches.test_batches(plan.data.test, task, recipe.batch_size, seed=recipe.seed, epoch=epoch)
            with closing(batches.read(views)) as reader:
                return training.evaluate(evaluation, variables, training.place(reader, mesh))

        def test(variables, epoch):
            nonlocal testing
            started = time.perf_counter()
            result = score(variables, epoch=epoch)
            testing += time.perf_counter() - started
            return {"test_loss": result["loss"], "test_accuracy": result["accuracy"]}

        stream = batches.train_batches(plan.data.train, task, recipe.batch_size, plan.steps, seed=recipe.seed)
        step = training.train_step(model, optimizer, mesh)
        if first < plan.steps:
            note("compiling the train step")
            step = step.lower(state, jax.device_put(stream[first], split(mesh))).compile()
        threads = 0 if jax.default_backend() == "cpu" else 1  # on a CPU a reader would take its time from the steps
        reader = stack.enter_context(closing(batches.read(stream, start=first, threads=threads)))
        placed = training.place((batch for batch in reader if not stopping.is_set()), mesh)
        started = last_save = time.perf_counter()
        for state, rows in training.fit(
            step, state, placed, start=first, steps=plan.steps, epoch_steps=plan.epoch_steps, log_steps=log_steps, test=test
        ):
            for row in rows:
                metrics(row)
                yield row
            if stopping.is_set():
                break
            if time.perf_counter() - last_save >= checkpoint_seconds:
                checkpoints.save(saved, state)
                last_save = time.perf_counter()
        seconds = time.perf_counter() - started - testing
        step_now = int(state.step)
        if step_now:
            checkpoints.save(saved, state)
        if step_now < plan.steps:
            saved.wait()
            raise Stopped(f"stopped at step {step_now} of {plan.steps}, saved in {workdir}; the same command goes on")
        note("scoring the test set")
        views = (step_now - first) * len(stream[0]["label"]) if first < plan.steps else 0
        summary = _scores(recipe, score, state.variables, -(-plan.steps // plan.epoch_steps)) | {
            "images_per_second": round(views / seconds, 1) if views else None,
            "epochs": recipe.epochs,
            "steps": plan.steps,
            "dataset": recipe.dataset,
            "train_images": len(plan.data.train["label"]),
            "backbone": recipe.backbone,
            "stem": recipe.stem,
            "seed": recipe.seed,
            "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
            "versions": {name: importlib.metadata.version(name) for name in ("rotjax", "jax", "flax", "optax")},
            "wall_seconds": round(time.perf_counter() - began, 1),
            "resumed_from": first or None,
        }
        saved.wait()
        workdirs.write_json(workdir / "summary.json", summary)


def load(workdir: str | Path) -> tuple[Classifier, dict, Recipe]:
    """The network, the variables and the recipe of the newest checkpoint in `workdir`; raises CheckpointError."""
    workdir = Path(workdir)
    recipe = workdirs.read_recipe(workdir)
    model = recipe.model()
    step = checkpoints.latest_step(workdir / "checkpoints")
    parts = {name: _load_part(model, recipe, workdir, step, name) for name in ("backbone", "head")}
    collections = {collection for tree in parts.values() for collection in tree}
    variables = {c: {name: tree[c] for name, tree in parts.items() if c in tree} for c in sorted(collections)}
    return model, variables, recipe


def _inherit(recipe: Classification, donor: Path) -> tuple[Classification, int]:
    """The recipe with its network as in the workdir `donor`, which it names by run and step, and that step."""
    source = workdirs.read_recipe(donor)
    step = checkpoints.latest_step(donor / "checkpoints")
    inherited = {name: getattr(source, name) for name in ("backbone", "stem", "width", "mean", "std")}
    for name, value in inherited.items():
        if getattr(recipe, name) not in (None, value):
            raise UsageError(f"--{name}={getattr(recipe, name)} contradicts {donor}, which has {value}; leave --{name} out")
    return dataclasses.replace(recipe, **inherited, pretrained=f"{source.name}@{step}"), step


def _classes(recipe: Classification, data: sources.Dataset) -> tuple[Classification, sources.Dataset]:
    if not data.classes:
        raise DataError(f"{recipe.dataset} has no classes; put its images into one folder per class, or predict rotations")
    if recipe.subset:
        rows = sources.subset(data.train["label"], recipe.subset, recipe.seed)
        data = dataclasses.replace(data, train={key: value[rows] for key, value in data.train.items()})
    return dataclasses.replace(recipe, classes=data.classes), data


def _load_part(model: Classifier, recipe: Recipe, workdir: Path, step: int, name: str) -> dict:
    abstract = part(training.abstract_variables(model, recipe.image_size), name)
    sharding = replicated(data_mesh())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)
    return checkpoints.load_parts(workdir / "checkpoints", step, {name: abstract})[name]


def _build(plan: Plan, saved, mesh, note) -> tuple[Classifier, optax.GradientTransformation, training.TrainState]:
    recipe = plan.recipe
    model = recipe.model()
    variables = training.init_variables(model, recipe.seed, recipe.image_size)
    if plan.backbone is not None:
        variables = graft(variables, "backbone", plan.backbone)
        count = len(jax.tree.leaves(plan.backbone))
        note(f"taken from {recipe.pretrained}: backbone, {count} arrays; new: head")
    boundaries = range(recipe.decay_epochs * plan.epoch_steps, plan.steps, recipe.decay_epochs * plan.epoch_steps)
    optimizer = optim.adamw(optim.piecewise(recipe.learning_rate, boundaries), recipe.weight_decay, recipe.frozen)
    kinds = optim.labels(variables["params"], recipe.frozen)
    sizes = jax.tree.map(lambda x: x.size, variables["params"])
    trains = sum(n for n, kind in zip(jax.tree.leaves(sizes), jax.tree.leaves(kinds), strict=True) if kind == "trainable")
    total = sum(jax.tree.leaves(sizes))
    frozen = f"; frozen: {', '.join(recipe.frozen)}" if recipe.frozen else ""
    note(f"{recipe.backbone}, {recipe.stem} stem: {trains:,} of {total:,} parameters train{frozen}")
    return model, optimizer, checkpoints.restore(saved, training.init_state(optimizer, variables, mesh))


def _task(recipe: Recipe) -> tasks.Task:
    if isinstance(recipe, Rotation):
        return tasks.all_turns if recipe.rotations == "all" else tasks.random_turn
    return tasks.classify


def _scores(recipe: Recipe, score, variables: dict, epoch: int) -> dict:
    """The final figures: rotation on all four turns of every image, and on one random turn each as after every epoch."""
    if isinstance(recipe, Rotation):
        every = score(variables, tasks.all_turns)
        one = score(variables, tasks.random_turn, epoch)
        accuracies = {"rotation_accuracy": every["accuracy"], "rotation_accuracy_random": one["accuracy"]}
        return accuracies | {"confusion": every["confusion"].tolist()}
    result = score(variables)
    return {"accuracy": result["accuracy"], "confusion": result["confusion"].tolist()}
