"""A run on disk: a plan, carried out in a workdir or gone on with, row by row."""

import dataclasses
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import jax
import optax

from rotjax import checkpoints, optim, training, workdirs
from rotjax.data import batches, sources, tasks
from rotjax.data.dataset import Dataset
from rotjax.errors import DataError, Stopped, UsageError
from rotjax.models import Classifier
from rotjax.parallel import check_batch, data_mesh, replicated, split
from rotjax.recipe import NETWORK, Classification, Recipe, Rotation, check
from rotjax.transfer import graft, part

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run that nothing speaks against: its resolved recipe, its data, the backbone it starts from, its steps."""

    recipe: Recipe
    data: Dataset
    backbone: dict | None
    epoch_steps: int
    steps: int

    @property
    def boundaries(self) -> range:
        """The steps from which on the learning rate is a tenth of what it was."""
        period = self.recipe.decay_epochs * self.epoch_steps
        return range(period, self.steps, period)


def plan(
    recipe: Recipe,
    *,
    data: Dataset | None = None,
    data_dir: str | Path | None = None,
    progress: Callable = iter,
) -> Plan:
    """Refuses here whatever can be refused; reads the pretrained backbone and the data, writes no workdir.

    `data`, the caller's own, stands in for the data set that the recipe names. Raises UsageError, DataError or
    CheckpointError.
    """
    check(recipe)
    donor, step = None, 0
    if isinstance(recipe, Classification) and recipe.pretrained is not None:
        donor = Path(recipe.pretrained)
        recipe, step = _inherit(recipe, donor)
    if data:
        recipe = dataclasses.replace(recipe, dataset=data.name, image_size=data.image_size)
    recipe = recipe.resolved(**sources.defaults(recipe.dataset))
    check(recipe)
    check_batch(recipe.batch_size, data_mesh())
    backbone = _load_part(recipe, donor, step, "backbone") if donor else None
    if data is None:
        data = sources.load(recipe.dataset, image_size=recipe.image_size, data_dir=data_dir, progress=progress)
    epoch_steps = len(data.train["label"]) // recipe.batch_size
    if isinstance(recipe, Classification):
        recipe, data = _classes(recipe, data)
    count = len(data.train["label"])
    if recipe.batch_size > count:
        raise UsageError(f"--batch_size={recipe.batch_size} is larger than the training set of {count} images; lower it")
    steps = recipe.epochs * epoch_steps
    return Plan(recipe, data, backbone, epoch_steps, min(steps, recipe.max_steps or steps))


def train(plan: Plan, workdir: str | Path, *, log_steps: int = 50, checkpoint_seconds: float = 60.0) -> Iterator[dict]:
    """Carries `plan` out in `workdir`, or goes on where it stopped, yielding each row that `metrics.jsonl` gets.

    Leaves `recipe.json`, `checkpoints/`, `metrics.jsonl` and, at the end, `summary.json`. Raises Stopped once SIGTERM or
    SIGINT came and the state is saved, UsageError for a workdir of another recipe, InUseError where another process is
    at work, NonFiniteError, CheckpointError.
    """
    began, workdir, recipe, mesh = time.perf_counter(), Path(workdir), plan.recipe, data_mesh()
    with ExitStack() as stack:
        stack.enter_context(workdirs.claimed(workdir, recipe))
        stopping = stack.enter_context(workdirs.signals())
        saved = stack.enter_context(checkpoints.open_checkpoints(workdir / "checkpoints"))
        if saved.latest and saved.latest.step == plan.steps and (workdir / "summary.json").exists():
            log.info(f"already complete at step {plan.steps}")
            return
        model, optimizer, state = _build(plan, saved)
        first = int(state.step)
        if first:
            log.info(f"going on from step {first} of {plan.steps}")
        write = stack.enter_context(workdirs.metrics(workdir, first))
        score, testing = _scorer(plan, model), 0.0
        question, test_question = _tasks(recipe)

        def test(variables: dict, epoch: int) -> dict:
            nonlocal testing
            begun = time.perf_counter()
            result = score(variables, test_question, epoch)
            testing += time.perf_counter() - begun
            return {"test_loss": result["loss"], "test_accuracy": result["accuracy"]}

        stream = batches.train_batches(
            plan.data.train, question, recipe.batch_size, plan.steps, seed=recipe.seed, flip=recipe.flip
        )
        step = training.train_step(model, optimizer, mesh)
        if first < plan.steps:
            log.info("compiling the train step")
            step = step.lower(state, jax.device_put(stream[first], split(mesh))).compile()
        threads = 0 if jax.default_backend() == "cpu" else 1  # a reading thread would take its time from a CPU's steps
        reader = stack.enter_context(closing(batches.read(stream, start=first, threads=threads)))
        placed = training.place((batch for batch in reader if not stopping.is_set()), mesh)
        started = last_save = time.perf_counter()
        trained = training.fit(
            step, state, placed, start=first, steps=plan.steps, epoch_steps=plan.epoch_steps, log_steps=log_steps, test=test
        )
        for state, rows in trained:
            for row in rows:
                write(row)
                yield row
            if time.perf_counter() - last_save >= checkpoint_seconds:
                checkpoints.save(saved, state)
                last_save = time.perf_counter()
        seconds = time.perf_counter() - started - testing
        last = int(state.step)
        if last:
            checkpoints.save(saved, state)
        if last < plan.steps:
            saved.wait()
            raise Stopped(f"stopped at step {last} of {plan.steps}, saved in {workdir}; the same command goes on")
        log.info("scoring the test set")
        views = (last - first) * recipe.batch_size * (4 if question is tasks.all_turns else 1)
        summary = _final_scores(plan, score, state.variables) | {
            "images_per_second": round(views / seconds, 1) if views else None,
            "epochs": recipe.epochs,
            "steps": plan.steps,
            "dataset": recipe.dataset,
            "train_images": len(plan.data.train["label"]),
            "test_images": len(plan.data.test["label"]),
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
    step = checkpoints.latest_step(workdir / "checkpoints")
    variables: dict = {}
    for name in ("backbone", "head"):
        for collection, tree in _load_part(recipe, workdir, step, name).items():
            variables.setdefault(collection, {})[name] = tree
    return recipe.model(), variables, recipe


def _inherit(recipe: Classification, donor: Path) -> tuple[Classification, int]:
    """The recipe with the network of the run in `donor`, which it names by run and step, and that step."""
    source = workdirs.read_recipe(donor)
    step = checkpoints.latest_step(donor / "checkpoints")
    inherited = {name: getattr(source, name) for name in NETWORK}
    for name, value in inherited.items():
        if getattr(recipe, name) not in (None, value):
            raise UsageError(f"--{name}={getattr(recipe, name)} contradicts {donor}, which has {value}; leave --{name} out")
    return dataclasses.replace(recipe, **inherited, pretrained=f"{source.name}@{step}"), step


def _classes(recipe: Classification, data: Dataset) -> tuple[Classification, Dataset]:
    """The recipe with the classes of `data`, and of `data` the subset that the recipe asks for."""
    if not data.classes:
        raise DataError(f"{recipe.dataset} has no classes; put its images into one folder per class, or predict rotations")
    if recipe.subset:
        rows = sources.subset(data.train["label"], recipe.subset, recipe.seed)
        data = dataclasses.replace(data, train={key: value[rows] for key, value in data.train.items()})
    return dataclasses.replace(recipe, classes=data.classes), data


def _load_part(recipe: Recipe, workdir: Path, step: int, name: str) -> dict:
    """The part `name` of the network of `recipe` from a checkpoint in `workdir`."""
    model = (recipe if recipe.classes else dataclasses.replace(recipe, classes=("",))).model()
    abstract = part(training.abstract_variables(model, recipe.image_size), name)
    sharding = replicated(data_mesh())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)
    return checkpoints.load_parts(workdir / "checkpoints", step, {name: abstract})[name]


def _build(plan: Plan, saved) -> tuple[Classifier, optax.GradientTransformation, training.TrainState]:
    """The network, its optimizer, and the newest saved state or step 0: initialise, graft, then the optimizer's state."""
    recipe = plan.recipe
    model = recipe.model()
    variables = training.init_variables(model, recipe.seed, recipe.image_size)
    if isinstance(recipe, Classification) and plan.backbone is not None:
        variables = graft(variables, "backbone", plan.backbone)
        log.info(
            f"taken from {recipe.pretrained}: the backbone, {len(jax.tree.leaves(plan.backbone))} arrays; new: the head"
        )
    optimizer = optim.adamw(optim.piecewise(recipe.learning_rate, plan.boundaries), recipe.weight_decay, recipe.frozen)
    labels = jax.tree.leaves(optim.labels(variables["params"], recipe.frozen))
    sizes = [leaf.size for leaf in jax.tree.leaves(variables["params"])]
    trainable = sum(size for size, label in zip(sizes, labels, strict=True) if label == "trainable")
    statistics = "held" if recipe.held else "moving"
    frozen = f"; frozen: {', '.join(recipe.frozen)}, their statistics {statistics}" if recipe.frozen else ""
    log.info(f"{recipe.backbone}, {recipe.stem} stem: {trainable:,} of {sum(sizes):,} parameters train{frozen}")
    return model, optimizer, checkpoints.restore(saved, training.init_state(optimizer, variables))


def _tasks(recipe: Recipe) -> tuple[tasks.Task, tasks.Task]:
    """What training asks, and what the test after every epoch does: one turn per image, as the report did."""
    if isinstance(recipe, Rotation):
        return (tasks.all_turns if recipe.rotations == "all" else tasks.random_turn), tasks.random_turn
    return tasks.classify, tasks.classify


def _scorer(plan: Plan, model: Classifier) -> Callable[[dict, tasks.Task, int], dict]:
    """`(variables, task, epoch) -> loss, accuracy, confusion` on every test image."""
    recipe, step = plan.recipe, training.eval_step(model)

    def score(variables: dict, task: tasks.Task, epoch: int) -> dict:
        views = batches.test_batches(plan.data.test, task, recipe.batch_size, seed=recipe.seed, epoch=epoch)
        with closing(batches.read(views)) as reader:
            return training.evaluate(step, variables, training.place(reader))

    return score


def _final_scores(plan: Plan, score: Callable, variables: dict) -> dict:
    """Rotations on all four turns of every image, and as after every epoch on one random turn each; or classes."""
    epoch = -(-plan.steps // plan.epoch_steps)
    if isinstance(plan.recipe, Rotation):
        every, one = score(variables, tasks.all_turns, epoch), score(variables, tasks.random_turn, epoch)
        accuracies = {"rotation_accuracy": every["accuracy"], "rotation_accuracy_random": one["accuracy"]}
        return accuracies | {"confusion": every["confusion"].tolist()}
    result = score(variables, tasks.classify, epoch)
    return {"accuracy": result["accuracy"], "confusion": result["confusion"].tolist()}
