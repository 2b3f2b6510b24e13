"""Recipes: everything that decides the weights of a run, as frozen dataclasses; the defaults are the report's."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import jax.numpy as jnp

from rotjax import optim, presets
from rotjax.errors import CheckpointError, UsageError
from rotjax.models import Backbone, Classifier, StemName, create
from rotjax.rotation import ANGLES

SCHEMA = 1  # of recipe.json

NETWORK = ("backbone", "stem", "width", "mean", "std")  # the fields that a pretrained backbone brings along

BOUNDS = {
    "epochs": (1, 10**6), "max_steps": (1, 2**31 - 1), "batch_size": (1, 2**20), "decay_epochs": (1, 10**6),
    "warmup_epochs": (0, 10**6), "subset": (1, 2**31 - 1), "image_size": (8, 2048), "width": (2, 2048),
    "seed": (0, 2**32 - 1), "cutout": (0, 1), "label_smoothing": (0, 0.99), "validation": (1e-6, 0.99),
}  # fmt: skip

DEFERRED: Any = None  # until `resolved`: the preset, the data set or the pretrained network decides

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Recipe:
    """What both jobs share; a field that is left `DEFERRED` gets its value with `resolved`."""

    preset: presets.Preset = "report"
    """What is not given is the report's, or strong: today's practice, for images of about 32 pixels, on a GPU."""
    backbone: Backbone = DEFERRED
    """Network."""
    dataset: str = "cifar10"
    """cifar10, imagenette, digits (needs no download), another TFDS image set, or a folder of images."""
    stem: StemName = DEFERRED
    """First layers: imagenet (7x7 stride 2 and max-pool, the report's) or cifar (3x3, for small images)."""
    image_size: int = DEFERRED
    """Side of the square images in pixels."""
    epochs: int = DEFERRED
    """Each is len(train) // batch_size steps."""
    max_steps: int | None = None
    """Stop after this many steps, whatever the epochs."""
    batch_size: int = DEFERRED
    """Images drawn per step, over all devices."""
    optimizer: optim.Optimizer = DEFERRED
    """adamw, or sgd with Nesterov's momentum of 0.9."""
    learning_rate: float = DEFERRED
    """Highest rate of the schedule."""
    schedule: Literal["steps", "cosine"] = DEFERRED
    """steps: the rate falls to a tenth every decay_epochs; cosine: it falls to 0 along half a cosine."""
    decay_epochs: int = DEFERRED
    """Epochs between the falls of --schedule=steps."""
    warmup_epochs: int = DEFERRED
    """The rate rises from 0 to that of the schedule in so many epochs."""
    weight_decay: float = DEFERRED
    """Of every parameter that trains: decoupled (adamw) or added to the gradient (sgd)."""
    seed: int = 0
    """Decides initial weights, order, crops, flips and turns."""
    flip: bool = DEFERRED
    """Mirror images at random in training; not for what has no mirror image, such as digits."""
    cutout: float = DEFERRED
    """Side of a black square put at random into each training image, as a share of the image's; 0: none."""
    label_smoothing: float = DEFERRED
    """Share of each label that is spread evenly over all classes in training."""
    validation: float | None = None
    """Share of the training images that stands in for the test set: to choose a recipe without it."""
    dtype: Literal["float32", "bfloat16"] = DEFERRED
    """Of the backbone's computation; parameters, statistics and logits are float32 in any case."""
    width: int = DEFERRED
    """Maps of the stem; every other layer follows."""
    mean: RGB = DEFERRED
    """Of the pixels (0 to 1), subtracted in the network."""
    std: RGB = DEFERRED
    """Of the pixels (0 to 1), divided by in the network."""
    classes: tuple[str, ...] = ()
    """Names of what the head tells apart, known once the data is."""

    job: ClassVar[str]

    @property
    def views(self) -> int:
        """Images that a step trains on."""
        return self.batch_size

    @property
    def tested_on(self) -> str:
        """What it is scored on, in words."""
        return "validation images" if self.validation else "test images"

    @property
    def frozen(self) -> tuple[str, ...]:
        """Path prefixes of the parameters that stay."""
        return ()

    @property
    def held(self) -> tuple[str, ...]:
        """Path prefixes of the stages whose batch statistics stay."""
        return ()

    @property
    def name(self) -> str:
        """`<job>-<dataset>-<backbone>-<hash>`, of what is not as usual: a field that a later rotjax adds changes no name."""
        usual = to_json(type(self)().resolved())
        words = json.dumps({key: value for key, value in to_json(self).items() if value != usual[key]}, sort_keys=True)
        digest = hashlib.sha256(words.encode()).hexdigest()[:8]
        last = self.dataset.rstrip("/").split("/")[-1][:60]
        dataset = "".join(c if c.isalnum() or c in "-_" else "-" for c in last)
        return f"{self.job}-{dataset}-{self.backbone}-{digest}"

    def model(self) -> Classifier:
        """The network of a resolved recipe."""
        return create(
            self.backbone,
            len(self.classes),
            self.stem,
            mean=self.mean,
            std=self.std,
            frozen=self.held,
            width=self.width,
            dtype=jnp.dtype(self.dtype),
        )

    def resolved(self, **defaults: Any) -> Self:
        """What is None is what the strong preset has, if asked for, else `defaults`, the data set's, else the report."""
        strong = presets.STRONG[self.job] if self.preset == "strong" else {}
        values = presets.REPORT[self.job] | defaults | strong
        missing = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is None and f.name in values]
        return dataclasses.replace(self, **{name: values[name] for name in missing})


@dataclass(frozen=True)
class Rotation(Recipe):
    """Pretrain a network by predicting by how many quarter turns each image was rotated (report, row 1)."""

    rotations: Literal["random", "all"] = DEFERRED
    """random: one turn per image, the report's; all: every image in its four turns, four times the views per step."""
    classes: tuple[str, ...] = ANGLES

    job: ClassVar[str] = "rotation"

    @property
    def views(self) -> int:
        return self.batch_size * (4 if self.rotations == "all" else 1)


@dataclass(frozen=True)
class Classification(Recipe):
    """Learn an image set's classes, from a pretrained backbone or from scratch (report, rows 2 to 6)."""

    pretrained: str | None = None
    """Workdir of a run whose backbone is taken, with its stem and normalisation; from scratch unless said."""
    trainable: optim.Trainable = "all"
    """What trains: all, last_block (stage 4 and the head) or head."""
    frozen_statistics: Literal["held", "moving"] = "held"
    """Batch statistics of frozen stages: held as they were, or moving as in the report's rows 2a and 2b."""
    subset: int | None = None
    """Training images per class, drawn by the seed. An epoch keeps its number of steps."""

    job: ClassVar[str] = "classification"

    @property
    def frozen(self) -> tuple[str, ...]:
        return optim.FROZEN[self.trainable]

    @property
    def held(self) -> tuple[str, ...]:
        return self.frozen if self.frozen_statistics == "held" else ()


JOBS: dict[str, type[Recipe]] = {"rotation": Rotation, "classification": Classification}


def check(recipe: Recipe) -> None:
    """Raises UsageError for the first value out of range, naming its flag."""
    if bool(recipe.mean) != bool(recipe.std):
        raise UsageError("--mean and --std go together; give both or neither")
    for name, (least, most) in BOUNDS.items():
        value = getattr(recipe, name, None)
        if value is not None and not value >= least:  # nan is not either
            raise UsageError(f"--{name}={value} is too small; it is at least {least}")
        if value is not None and value > most:
            raise UsageError(f"--{name}={value} is too large; it is at most {most}")
    for name, low in {"learning_rate": "above", "weight_decay": "at least"}.items():
        value = getattr(recipe, name)
        if value is not None and not (math.isfinite(value) and (value > 0 or (value == 0 and low == "at least"))):
            raise UsageError(f"--{name}={value} is out of range; it is a finite number {low} 0")
    if not all(math.isfinite(value) for value in recipe.mean or ()):
        raise UsageError(f"--mean is {recipe.mean}; means are finite numbers")
    if not all(math.isfinite(value) and value > 0 for value in recipe.std or ()):
        raise UsageError(f"--std is {recipe.std}; standard deviations are finite numbers above 0")
    if None not in (recipe.warmup_epochs, recipe.epochs) and recipe.warmup_epochs > recipe.epochs:
        raise UsageError(f"--warmup_epochs={recipe.warmup_epochs} is more than --epochs={recipe.epochs}; give fewer")
    if recipe.image_size is not None and recipe.image_size < 32 and recipe.stem == "imagenet":
        raise UsageError(f"--image_size={recipe.image_size} is too small for the imagenet stem; use 32 or --stem=cifar")


def to_json(recipe: Recipe) -> dict[str, Any]:
    """A dict of JSON's types with the job and the schema."""
    return {"schema": SCHEMA, "job": recipe.job} | json.loads(json.dumps(dataclasses.asdict(recipe)))


def from_json(values: dict[str, Any], where: str) -> Recipe:
    """The recipe stored `where`; fields that an older rotjax did not know have the values that it worked with.

    Raises CheckpointError for what is not a recipe, one of a newer schema, or one with values that no recipe can have.
    """
    if not isinstance(values, dict) or not isinstance(values.get("schema"), int) or values.get("job") not in list(JOBS):
        raise CheckpointError(f"{where} is not a recipe; point at a workdir that rotjax wrote")
    values = dict(values)
    schema, kind = values.pop("schema"), JOBS[values.pop("job")]
    unknown = set(values) - {f.name for f in dataclasses.fields(kind)}
    if schema > SCHEMA or unknown:
        raise CheckpointError(f"{where} was written by a newer rotjax (schema {schema}, here {SCHEMA}); upgrade rotjax")
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    recipe = kind(**fields).resolved()
    for name, hint in get_type_hints(kind).items():
        if get_origin(hint) is not ClassVar and not _fits(value := getattr(recipe, name), hint):
            raise CheckpointError(f"{where} is not a recipe: its {name} is {str(value)[:40]!r}; name another workdir")
    try:
        check(recipe)
    except UsageError as error:
        raise CheckpointError(f"{where} is not a recipe: {error}") from error
    return recipe


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type that a field of a recipe is declared with."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in parts
    if kind is UnionType:
        return any(_fits(value, part) for part in parts)
    if kind is tuple:
        ends = len(parts) if Ellipsis not in parts else len(value) if isinstance(value, tuple) else 0
        return isinstance(value, tuple) and len(value) == ends and all(_fits(one, parts[0]) for one in value)
    return type(value) in ((int, float) if hint is float else (hint,)) or (value is None and hint is NoneType)


def differences(saved: Recipe, asked: Recipe) -> str:
    """`field saved -> asked` for each field that differs, in one line."""
    old, new = to_json(saved), to_json(asked)
    return ", ".join(f"{k} {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k))
