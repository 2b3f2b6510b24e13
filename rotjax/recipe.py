"""Recipes: everything that decides the weights of a run, as frozen dataclasses; the defaults are the report's."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args, get_type_hints

import jax.numpy as jnp

from rotjax import optim
from rotjax.errors import CheckpointError, UsageError
from rotjax.models import CIFAR10_MEAN, CIFAR10_STD, Backbone, Classifier, StemName, create
from rotjax.rotation import ANGLES

SCHEMA = 1  # of recipe.json

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Recipe:
    """What both jobs share. A field that is None takes the job's, the data set's or the pretrained network's own value."""

    backbone: Backbone | None = None
    """Network; resnet18 unless said, in classification the pretrained one."""
    dataset: str = "cifar10"
    """cifar10, imagenette, digits (needs no download), another TFDS image set, or a folder of images."""
    stem: StemName | None = None
    """First layers: imagenet (7x7/2 and max-pool; the report's, unless said) or cifar (3x3, for small images)."""
    image_size: int | None = None
    """Side of the square images in pixels; 32 for cifar10 and digits, else 64 unless said."""
    epochs: int | None = None
    """Passes, each of len(train) // batch_size steps; rotation 45, classification 20, digits 8."""
    max_steps: int | None = None
    """Stop after this many steps, whatever the epochs."""
    batch_size: int | None = None
    """Images drawn per step over all devices; 128, digits 32."""
    learning_rate: float | None = None
    """Initial rate of AdamW; 0.01, digits 0.001."""
    decay_epochs: int | None = None
    """The rate falls to a tenth every so many epochs; rotation 15, classification 10, digits 3."""
    weight_decay: float = 0.01
    """Decoupled decay, on every parameter that trains."""
    seed: int = 0
    """Decides initial weights, order, crops, flips and turns."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the backbone's computation; parameters, statistics and logits are float32 in any case."""
    width: int | None = None
    """Maps of the stem; 64 in the published networks."""
    mean: RGB | None = None
    """Of the pixels (0 to 1), subtracted in the network; CIFAR-10's unless said."""
    std: RGB | None = None
    """Of the pixels (0 to 1), divided by in the network; CIFAR-10's unless said."""
    classes: tuple[str, ...] = ()
    """Names of what the head tells apart, known once the data is."""

    job: ClassVar[str]
    defaults: ClassVar[dict[str, Any]] = dict(
        backbone="resnet18", stem="imagenet", batch_size=128, learning_rate=0.01, width=64, mean=CIFAR10_MEAN, std=CIFAR10_STD
    )
    frozen: ClassVar[tuple[str, ...]] = ()
    held: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """`<job>-<dataset>-<backbone>-<hash of the recipe>`."""
        words = json.dumps(to_json(self), sort_keys=True)
        digest = hashlib.sha256(words.encode()).hexdigest()[:8]
        dataset = "".join(c if c.isalnum() or c in "-_" else "-" for c in self.dataset.rstrip("/").split("/")[-1])
        return f"{self.job}-{dataset}-{self.backbone}-{digest}"

    def model(self) -> Classifier:
        """The network of a resolved recipe."""
        dtype = jnp.dtype(self.dtype)
        options = dict(mean=self.mean, std=self.std, frozen=self.held, width=self.width, dtype=dtype)
        return create(self.backbone, len(self.classes), self.stem, **options)

    def resolved(self, *defaults: dict[str, Any]) -> Self:
        """Fields that are None take their value from the first of `defaults`, then the job's, that has one."""
        values: dict[str, Any] = {}
        for source in (*defaults, self.defaults):
            values = source | values
        missing = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) is None}
        return dataclasses.replace(self, **{k: v for k, v in values.items() if k in missing})


@dataclass(frozen=True)
class Rotation(Recipe):
    """Pretrain a network by predicting by how many quarter turns each image was rotated (report, row 1)."""

    rotations: Literal["random", "all"] = "random"
    """random: one turn per image, the report's; all: every image in its four turns, four times the views per step."""
    classes: tuple[str, ...] = ANGLES

    job: ClassVar[str] = "rotation"
    defaults: ClassVar[dict[str, Any]] = Recipe.defaults | dict(epochs=45, decay_epochs=15)


@dataclass(frozen=True)
class Classification(Recipe):
    """Learn an image set's classes, from a pretrained backbone or from scratch (report, rows 2 to 6)."""

    pretrained: str | None = None
    """Workdir of a finished run whose backbone is taken; from scratch unless said."""
    trainable: optim.Trainable = "all"
    """What trains: all, last_block (stage 4 and the head) or head."""
    frozen_statistics: Literal["held", "moving"] = "held"
    """Batch statistics of frozen stages: held as they were, or moving as in the report's rows 2a and 2b."""
    subset: int | None = None
    """Training images per class, drawn by the seed; all unless said. An epoch keeps its number of steps."""

    job: ClassVar[str] = "classification"
    defaults: ClassVar[dict[str, Any]] = Recipe.defaults | dict(epochs=20, decay_epochs=10)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Path prefixes of the parameters that stay."""
        return optim.FROZEN[self.trainable]

    @property
    def held(self) -> tuple[str, ...]:
        """Path prefixes of the stages whose batch statistics stay."""
        return self.frozen if self.frozen_statistics == "held" else ()


JOBS: dict[str, type[Recipe]] = {"rotation": Rotation, "classification": Classification}


def check(recipe: Recipe) -> None:
    """Raises UsageError for the first value out of range, naming its flag."""
    if bool(recipe.mean) != bool(recipe.std):
        raise UsageError("--mean and --std go together; give both or neither")
    least = {"epochs": 1, "max_steps": 1, "batch_size": 1, "decay_epochs": 1, "subset": 1, "image_size": 8, "width": 2}
    for name, bound in least.items():
        value = getattr(recipe, name, None)
        if value is not None and value < bound:
            raise UsageError(f"--{name}={value} is too small; it is at least {bound}")
    for name, low in {"learning_rate": "above", "weight_decay": "at least"}.items():
        value = getattr(recipe, name)
        if value is not None and not (math.isfinite(value) and (value > 0 or (value == 0 and low == "at least"))):
            raise UsageError(f"--{name}={value} is out of range; it is a finite number {low} 0")
    if not 0 <= recipe.seed < 2**32:
        raise UsageError(f"--seed={recipe.seed} is out of range; it is a whole number from 0 to 4294967295")
    for value in recipe.std or ():
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"--std has {value}; a standard deviation is a finite number above 0")
    if recipe.image_size is not None and recipe.image_size < 32 and recipe.stem != "cifar":
        raise UsageError(f"--image_size={recipe.image_size} is too small for the imagenet stem; use 32 or --stem=cifar")


def to_json(recipe: Recipe) -> dict[str, Any]:
    """A dict of JSON's types with the job and the schema."""
    return {"schema": SCHEMA, "job": recipe.job} | json.loads(json.dumps(dataclasses.asdict(recipe)))


def from_json(values: dict[str, Any], where: str) -> Recipe:
    """The recipe stored `where`; raises CheckpointError for what this version did not write."""
    values = dict(values)
    schema, job = values.pop("schema", None), values.pop("job", None)
    if isinstance(schema, int) and schema > SCHEMA:
        raise CheckpointError(f"{where} was written by a newer rotjax (schema {schema}, not {SCHEMA}); upgrade rotjax")
    kind = JOBS.get(job)
    if schema != SCHEMA or kind is None or set(values) != {f.name for f in dataclasses.fields(kind)}:
        raise CheckpointError(f"{where} is not a recipe of this rotjax; point at a workdir that it wrote")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def differences(saved: Recipe, asked: Recipe) -> str:
    """`field saved -> asked` for each field that differs, in one line."""
    old, new = to_json(saved), to_json(asked)
    return ", ".join(f"{k} {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k))
