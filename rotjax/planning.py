"""Plans of runs: recipe, data and pretrained backbone, validated before anything is trained."""

import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import optax

from rotjax import checkpoints, optim, workdirs
from rotjax.data import sources
from rotjax.data.dataset import Dataset, check_classes, check_fits
from rotjax.errors import UsageError
from rotjax.files import folder
from rotjax.models import Classifier
from rotjax.parallel import abstract, check_batch, data_mesh
from rotjax.recipe import JOBS, NETWORK, Classification, Recipe, check
from rotjax.state import abstract_variables
from rotjax.transfer import joined, part

log = logging.getLogger(__name__)

IMAGES = ("image_size", "flip")  # fields that a run decides for itself, although it starts from another


@dataclass(frozen=True, eq=False)
class Plan:
    """A validated run: resolved recipe, data, pretrained backbone (None: from scratch), steps per epoch and in total."""

    recipe: Recipe
    data: Dataset
    backbone: dict | None = field(repr=False)
    epoch_steps: int
    steps: int

    @property
    def epochs(self) -> int | float:
        """The number of epochs; fractional if `max_steps` cuts the last one short."""
        whole, rest = divmod(self.steps, self.epoch_steps)
        return whole if not rest else round(self.steps / self.epoch_steps, 2)

    @property
    def last_epoch(self) -> int:
        """The number of the last epoch, from 1, also of one that `max_steps` cuts short."""
        return -(-self.steps // self.epoch_steps)

    @property
    def boundaries(self) -> range:
        """The steps at which the learning rate is divided by 10."""
        period = self.recipe.decay_epochs * self.epoch_steps
        return range(period, self.steps, period) if self.recipe.schedule == "steps" else range(0)

    @property
    def schedule(self) -> optax.Schedule:
        """The learning-rate schedule; `max_steps` does not change it."""
        recipe = self.recipe
        rise, total = recipe.warmup_epochs * self.epoch_steps, recipe.epochs * self.epoch_steps
        if recipe.schedule == "cosine":
            fall = optax.cosine_decay_schedule(recipe.learning_rate, max(total - rise, 1))
        else:
            fall = optim.piecewise(recipe.learning_rate, [step - rise for step in self.boundaries])
        return optax.join_schedules([optax.linear_schedule(0.0, recipe.learning_rate, rise), fall], [rise]) if rise else fall


def plan(
    recipe: Recipe,
    *,
    data: Dataset | None = None,
    data_dir: str | Path | None = None,
    workdir: str | Path | None = None,
    progress: Callable = iter,
) -> Plan:
    """Validates `recipe`, as far as possible before decoding data, and loads the pretrained backbone and the data.

    `data` replaces the data set that the recipe names. `workdir` is only checked: it must not hold another run, and
    nothing is written. All processes must call this. Raises UsageError, DataError or CheckpointError.
    """
    if not isinstance(recipe, tuple(JOBS.values())):
        raise UsageError(f"the recipe is of type {type(recipe).__name__}; give a Rotation or a Classification")
    if not isinstance(data, Dataset | None):
        raise UsageError(f"data is of type {type(data).__name__}; give a rotjax.Dataset")
    for name, said in {"dataset": sources.canonical, "pretrained": str}.items():
        if isinstance(path := getattr(recipe, name), Path):
            recipe = dataclasses.replace(recipe, **{name: said(path)})
    recipe = dataclasses.replace(recipe, **{name: tuple(one) for name, one in vars(recipe).items() if isinstance(one, list)})
    check(recipe, resolved=False)
    if data is None:
        recipe = dataclasses.replace(recipe, dataset=sources.canonical(recipe.dataset))
    else:
        if recipe.image_size not in (None, data.image_size):
            raise UsageError(f"image_size={recipe.image_size} contradicts data of {data.image_size} px; leave it out")
        recipe = dataclasses.replace(recipe, dataset=data.name, image_size=data.image_size)
    donor = source = None
    step = 0
    if recipe.pretrained is not None:
        donor = folder(recipe.pretrained)
        if "@" in donor.name and not os.path.exists(donor):  # what a plan, and `load`, have in its place
            raise UsageError(f"pretrained={donor} is the name of a run and a step; give the workdir of that run")
        source = workdirs.read_recipe(donor)
        recipe, step = _inherit(recipe, source, donor)
    given, recipe = recipe, recipe.resolved()
    check(recipe)
    # Not in `check`, by which runs are read: of an older rotjax there may be such ones.
    if recipe.schedule == "steps" and recipe.decay_epochs <= recipe.warmup_epochs and recipe.decay_epochs < recipe.epochs:
        warmup = f"warmup_epochs={recipe.warmup_epochs} reaches the first drop of the rate"
        raise UsageError(f"{warmup}, decay_epochs={recipe.decay_epochs}; give fewer")
    if source:
        _tell_apart(given, recipe, source)
    check_batch(recipe.batch_size, data_mesh().size)
    if workdir is not None:
        workdirs.check_vacant(folder(workdir), recipe)
    backbone = _load_parts(recipe, donor, step, "backbone")["backbone"] if donor else None
    if data is None:
        data = sources.load(
            recipe.dataset,
            image_size=recipe.image_size,
            batch_size=recipe.batch_size,
            labelled=isinstance(recipe, Classification),
            data_dir=data_dir,
            progress=progress,
        )
    if recipe.validation:
        data = sources.validated(data, recipe.validation)
    epoch_steps = len(data.train["label"]) // recipe.batch_size
    if isinstance(recipe, Classification):
        recipe, data = _classes(recipe, data)
    check_fits(recipe.batch_size, len(data.train["label"]))
    if (steps := recipe.epochs * epoch_steps) >= 2**31:
        raise UsageError(f"epochs={recipe.epochs} of {epoch_steps:,} steps are more than 2,147,483,647; use fewer")
    return Plan(recipe, data, backbone, epoch_steps, min(steps, recipe.max_steps or steps))


def load(workdir: str | Path) -> tuple[Classifier, dict, Recipe]:
    """The network, the variables and the recipe of the newest checkpoint in `workdir`; raises CheckpointError.

    All processes must call this.
    """
    workdir = folder(workdir)
    recipe = workdirs.read_recipe(workdir)
    step = _newest(workdir)
    return recipe.model(), joined(_load_parts(recipe, workdir, step, "backbone", "head")), recipe


def _newest(workdir: Path, then: str = "") -> int:
    """The step of the newest checkpoint; says so, and what comes of it, where the run is not finished."""
    step = checkpoints.latest_step(workdir / "checkpoints")
    if not (workdir / "summary.json").exists():
        log.warning(f"{workdir} is not finished: what is taken from it is of step {step}{then}")
    return step


def _inherit(recipe: Recipe, source: Recipe, donor: Path) -> tuple[Recipe, int]:
    """The recipe with the network of the run `source` in `donor`, which it names by run and step, and that step."""
    step = _newest(donor, then=", and this run, if it is stopped, resumes only while that is the newest")
    inherited = {name: getattr(source, name) for name in NETWORK}
    for name, value in inherited.items():
        if getattr(recipe, name) not in (None, value):
            raise UsageError(f"{name}={getattr(recipe, name)} contradicts {donor}, which has {value}; leave it out")
    here, there = (os.path.abspath(os.path.expanduser(one.dataset)) for one in (recipe, source))
    if here == there and recipe.validation > source.validation:
        log.warning(f"the backbone of {donor} was pretrained on the validation images too, without their labels")
    return dataclasses.replace(recipe, **inherited, pretrained=f"{source.name}@{step}"), step


def _tell_apart(given: Recipe, recipe: Recipe, source: Recipe) -> None:
    """Says where defaults, not what was `given`, make the images of `recipe` others than those of its `source`."""
    names = [name for name in IMAGES if getattr(given, name) is None and getattr(recipe, name) != getattr(source, name)]
    if names:
        here, there = (", ".join(f"{name} {getattr(one, name)}" for name in names) for one in (recipe, source))
        log.info(f"images have {here} by default, in the pretrained run they have {there}")


def _classes(recipe: Classification, data: Dataset) -> tuple[Classification, Dataset]:
    """The recipe with the classes of `data`, and of `data` the subset that the recipe asks for."""
    check_classes(recipe.dataset, data.classes)
    if recipe.subset:
        rows = sources.subset(data.train["label"], recipe.subset, recipe.seed, data.classes)
        data = dataclasses.replace(data, train={key: value[rows] for key, value in data.train.items()})
    return dataclasses.replace(recipe, classes=data.classes), data


def _load_parts(recipe: Recipe, workdir: Path, step: int, *names: str) -> dict[str, dict]:
    """The parts `names` of the network of `recipe` from a checkpoint in `workdir`."""
    model = (recipe if recipe.classes else dataclasses.replace(recipe, classes=("",))).model()
    variables = abstract(abstract_variables(model, recipe.image_size), data_mesh())
    return checkpoints.load_parts(workdir / "checkpoints", step, {name: part(variables, name) for name in names})
