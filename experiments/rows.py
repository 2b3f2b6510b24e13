"""The rows of the report that rotjax implements, and more, as data: what is trained, from what, the figure to reach."""

import dataclasses
from dataclasses import dataclass
from itertools import chain
from typing import Any, get_args

from rotjax.presets import Preset
from rotjax.recipe import NETWORK, Classification, Recipe, Rotation

ROWS = ("1", "2a", "2b", "3a", "3b", "4", "5a", "5b", "6a", "6b")
STRONG = ("S1", "S2a", "S3a", "S3b", "S0")  # the tasks of 1 to 3b by today's recipe, and how it was chosen

SUBSETS = {20: 3, 100: 3, 400: 3, 1000: 1}  # images per class, and draws; 5000 are all: rows 2a, 3a and 3b
WHOLE = 5000

BATCH = 512  # images of a step of the strong classifiers, as many as row S1 has views: a GPU trains on 128 at half the speed

MOVING: dict[str, Any] = dict(trainable="last_block", frozen_statistics="moving")  # as the report's frozen rows
HELD: dict[str, Any] = dict(trainable="last_block", frozen_statistics="held")


@dataclass(frozen=True)
class Run:
    """One training of `row`, from the backbone of the run `after`; the figures are test accuracies in %."""

    row: str
    what: str
    recipe: Recipe
    after: "Run | None" = None
    variant: str = ""
    published: float | None = None
    band: tuple[float, float] | None = None
    goal: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What runs that differ in their seeds alone have in common, as `Outcome.key`."""
        return self.row, self.variant, self.recipe.job

    @property
    def given(self) -> set[str]:
        """The fields of the recipe that neither the data nor the run `after` decides."""
        decided = {"classes", "pretrained", *(NETWORK if self.after else ())}
        return {field.name for field in dataclasses.fields(self.recipe)} - decided

    @property
    def name(self) -> str:
        """Tells it from every other run."""
        return named(*self.key, self.recipe.max_steps, self.recipe.seed)


def named(row: str, variant: str, task: str, max_steps: int | None, seed: int) -> str:
    """`<row>-<variant>-<task>-seed<seed>`, of a run that was stopped early with that step."""
    return "-".join(filter(None, (row, variant, task, f"first{max_steps}" if max_steps else "", f"seed{seed}")))


def every(seeds: int = 1) -> list[Run]:
    """The `runs` of each preset."""
    return [run for preset in get_args(Preset) for run in runs(seeds, preset)]


def shortened(run: Run, steps: int) -> Run:
    """`run`, and what it starts from, stopped after `steps`: for a trial, never for the report's column."""
    after = run.after and shortened(run.after, steps)
    return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, max_steps=steps), after=after)


def runs(seeds: int = 1, preset: Preset = "report") -> list[Run]:
    """Every run of the report or of today's recipe, after the one that it starts from; rows 1 to 3b for each of `seeds`."""
    if preset == "strong":
        return [*chain(*map(_strong, range(seeds))), *_tuning()]
    first, *others = [_resnet18(seed) for seed in range(seeds)]
    return [*first, *_imagenette(), *_subsets(first[0]), *_densenet(), *_deeper(), *chain(*others)]


def _resnet18(seed: int) -> list[Run]:
    rotations = Run("1", "predict the rotation of CIFAR-10", Rotation(seed=seed), published=78.99, band=(78.0, 80.0))
    moving, held = Classification(seed=seed, **MOVING), Classification(seed=seed, **HELD)
    full, last = Classification(seed=seed), "classify, last block and head train,"
    return [
        rotations,
        Run("2a", f"{last} rest from row 1", moving, rotations, published=62.09, band=(57.0, 65.0)),
        Run("2a", f"{last} rest from row 1, statistics held", held, rotations, "held"),
        Run("2b", f"{last} rest random", moving, published=45.31, band=(43.5, 47.5)),
        Run("2b", f"{last} rest random, statistics held", held, None, "held"),
        Run("3a", "classify, all trains, from row 1", full, rotations, published=84.11, band=(83.1, 85.1)),
        Run("3b", "classify, all trains, from random weights", full, published=82.33, band=(81.3, 83.3)),
    ]


def _imagenette() -> list[Run]:
    def at(size: int, **recipe) -> Rotation:  # a size that the report does not say
        return Rotation(dataset="imagenette", image_size=size, **recipe)

    what, from_it = "predict the rotation of ImageNette", "classify CIFAR-10, all trains, from row 6a"
    rotations = Run("6a", f"{what}, 64 px", at(64), published=59.72, band=(58.0, 66.0))
    larger, longer = Run("6a", f"{what}, 160 px", at(160), variant="160px"), at(32, epochs=180)
    return [
        rotations,
        Run("6b", from_it, Classification(), rotations, published=81.97, band=(80.8, 83.2)),
        larger,
        Run("6b", f"{from_it} at 160 px", Classification(), larger, "160px"),
        Run("6a", f"{what}, 32 px", at(32), variant="32px"),
        Run("6a", f"{what}, 32 px, four times the epochs", longer, variant="32px-180epochs"),
    ]


def _subsets(rotations: Run) -> list[Run]:
    kinds = [("frozen", MOVING, rotations), ("full", {}, rotations), ("scratch", {}, None)]
    return [
        Run(
            "4",
            f"{kind}, {count} images per class",
            Classification(subset=count, seed=draw, **how),
            after,
            f"{kind}-{count}",
        )
        for count, draws in SUBSETS.items()
        for draw in range(draws)
        for kind, how, after in kinds
    ]


def _densenet() -> list[Run]:
    rotations = Run("5a", "as row 1", Rotation(backbone="densenet121"), published=78.78, band=(77.6, 80.0))
    return [rotations, Run("5a", "as row 3a", Classification(), rotations, published=84.85, band=(83.6, 86.1))]


def _deeper() -> list[Run]:
    below = "in the report below ResNet18"
    rotations = [
        Run("5b", f"as row 1; {below}", Rotation(backbone=name), variant=name) for name in ("resnet50", "resnet101")
    ]
    return list(chain(*((run, Run("5b", f"as row 3a; {below}", Classification(), run, run.variant)) for run in rotations)))


def _strong(seed: int) -> list[Run]:
    rotations = Run("S1", "predict the rotation of CIFAR-10", Rotation(preset="strong", seed=seed), goal=94.5)
    full = Classification(preset="strong", batch_size=BATCH, seed=seed)
    last = dataclasses.replace(full, **HELD)
    return [
        rotations,
        Run("S2a", "classify, last block and head train, rest from row S1", last, rotations, goal=90.0),
        Run("S3a", "classify, all trains, from row S1", full, rotations, goal=95.5),
        Run("S3b", "classify, all trains, from random weights", full, goal=95.5),
    ]


def _tuning() -> list[Run]:
    """What chose the strong preset's regularisation, on images held out of the training set."""
    preset = Classification(preset="strong").resolved()
    kinds = {
        "cutout-smoothing": (preset.cutout, preset.label_smoothing),
        "cutout": (preset.cutout, 0.0),
        "smoothing": (0.0, preset.label_smoothing),
        "neither": (0.0, 0.0),
    }
    short = Classification(preset="strong", batch_size=BATCH, epochs=30, validation=0.1)
    return [
        Run(
            "S0",
            f"classify held-out training images, 30 epochs from random weights: {kind.replace('-', ' and ')}",
            dataclasses.replace(short, cutout=cutout, label_smoothing=smoothing),
            variant=kind,
        )
        for kind, (cutout, smoothing) in kinds.items()
    ]
