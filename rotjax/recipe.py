"""Recipes: everything that decides the weights of a run, as frozen dataclasses; the defaults are the report's."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from types import UnionType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

import jax.numpy as jnp

from rotjax import optim, presets
from rotjax.data import tasks
from rotjax.errors import UsageError
from rotjax.models import Backbone, Classifier, StemName, create
from rotjax.rotation import ANGLES

NETWORK = ("backbone", "stem", "width", "mean", "std")  # the fields that a pretrained backbone brings along

BOUNDS = {
    "epochs": (1, 10**6), "max_steps": (1, 2**31 - 1), "batch_size": (1, 2**20), "decay_epochs": (1, 10**6),
    "warmup_epochs": (0, 10**6), "subset": (1, 2**31 - 1), "image_size": (8, 2048), "width": (2, 2048),
    "seed": (0, 2**32 - 1), "cutout": (0, 1), "label_smoothing": (0, 0.99), "validation": (0, 0.99),
}  # fmt: skip

DEFERRED: Any = None  # until `resolved`: the preset, the data set or the pretrained network decides

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Recipe:
    """What `Rotation` and `Classification` share; a field that is left `DEFERRED` gets its value with `resolved`."""

    preset: presets.Preset = "report"
    """Defaults for values that are not given: report, or strong (current practice, for ~32 px images, on a GPU)."""
    backbone: Backbone = DEFERRED
    """Network."""
    dataset: str = "cifar10"
    """cifar10, imagenette, digits (needs no download), another TFDS image set, or a folder of images."""
    pretrained: str | None = None
    """Workdir of the run to start from, which provides backbone (with its stem and width), mean and std; the head is new."""
    stem: StemName = DEFERRED
    """First layers: imagenet (7x7 stride 2 and max-pool, the report's) or cifar (3x3, for small images)."""
    image_size: int = DEFERRED
    """Side of the square images in pixels; not taken over from the pretrained run."""
    epochs: int = DEFERRED
    """Each is len(train) // batch_size steps."""
    max_steps: int | None = None
    """Stop after this many steps, whatever the epochs."""
    batch_size: int = DEFERRED
    """Images drawn per step, over all devices."""
    optimizer: optim.Optimizer = DEFERRED
    """adamw, or sgd with Nesterov's momentum of 0.9."""
    learning_rate: float = DEFERRED
    """Highest rate of the schedule; by default sgd's is in proportion to the batch."""
    schedule: Literal["steps", "cosine"] = DEFERRED
    """steps: the learning rate is divided by 10 every decay_epochs; cosine: cosine decay to 0."""
    decay_epochs: int = DEFERRED
    """Epochs between the drops of the schedule in steps; by default in proportion to all epochs."""
    warmup_epochs: int = DEFERRED
    """Epochs of linear warmup from 0 to learning_rate."""
    weight_decay: float = DEFERRED
    """Weight decay on all trainable parameters, biases and norms included: decoupled (adamw) or L2 (sgd)."""
    seed: int = 0
    """Random seed of initial weights, image order, augmentation, rotations and any subset."""
    flip: bool = DEFERRED
    """Mirror images at random in training; not for what has no mirror image, such as digits."""
    cutout: float = DEFERRED
    """Side of a grey square put at random into each training image, as a share of the image's; 0: none."""
    label_smoothing: float = DEFERRED
    """Share of each label that is spread evenly over all classes in training, whose loss is larger for it."""
    validation: float = 0.0
    """Fraction of each class's training images held out and scored in place of the test images, for tuning; 0: off."""
    dtype: Literal["float32", "bfloat16"] = DEFERRED
    """Compute dtype of the backbone (convolutions in float32 are TF32 on a GPU, as torch's); all else is float32."""
    width: int = DEFERRED
    """Output channels of the stem; all other layers scale with it."""
    mean: RGB = DEFERRED
    """Per-channel mean of the pixels (scaled to 0..1), subtracted in the network."""
    std: RGB = DEFERRED
    """Per-channel standard deviation of the pixels (scaled to 0..1), divided by in the network."""
    classes: tuple[str, ...] = ()
    """Names of what the head tells apart, known once the data is."""

    job: ClassVar[str]

    @property
    def views(self) -> int:
        """Images (views) that a step trains on."""
        return self.batch_size

    @property
    def train_task(self) -> tasks.Task:
        """What training batches ask."""
        return tasks.classify

    @property
    def eval_task(self) -> tasks.Task:
        """What the evaluation after every epoch asks: classes; or, as in the report, one random turn per image."""
        return tasks.classify

    @property
    def tested_on(self) -> str:
        """What the run is scored on: test or validation images."""
        return "validation images" if self.validation else "test images"

    @property
    def frozen(self) -> tuple[str, ...]:
        """Path prefixes of the frozen parameters."""
        return ()

    @property
    def held(self) -> tuple[str, ...]:
        """Path prefixes of the stages whose batch norms use their running statistics in training."""
        return ()

    @property
    def name(self) -> str:
        """`<job>-<dataset>-<backbone>-<hash of the fields that are not the report's>`: fields added later change no name."""
        usual = dataclasses.asdict(type(self)()) | presets.REPORT[self.job]
        own = {key: value for key, value in dataclasses.asdict(self).items() if value != usual[key]}
        words = json.dumps(own, sort_keys=True)
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
            held=self.held,
            width=self.width,
            dtype=jnp.dtype(self.dtype),
        )

    def resolved(self) -> Self:
        """Fills None fields from the strong preset if chosen, else from the data set's defaults, else the report preset.

        With SGD its weight decay and its learning rate, in proportion to the batch (Goyal et al., 2017), come first. Among
        other epochs than the default, drops of the rate come after the same share of them, rounded up: they are no more; a
        default warmup is at most half of them, and ends before the first drop.
        """
        values = presets.REPORT[self.job] | presets.of_dataset(self.dataset)
        drop, usual = values["decay_epochs"], values["epochs"]
        if self.preset == "strong":
            values |= presets.STRONG[self.job]
        if (self.optimizer or values["optimizer"]) == "sgd":
            values |= presets.SGD
            values["learning_rate"] *= (self.batch_size or values["batch_size"]) / presets.SGD_BATCH
        epochs = self.epochs or values["epochs"]
        values["decay_epochs"] = -(-drop * epochs // usual)
        warmups = [values["warmup_epochs"], epochs // 2]
        if (self.schedule or values["schedule"]) == "steps":
            warmups.append((self.decay_epochs or values["decay_epochs"]) - 1)
        values["warmup_epochs"] = min(warmups)
        missing = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is None and f.name in values]
        return dataclasses.replace(self, **{name: values[name] for name in missing})


@dataclass(frozen=True)
class Rotation(Recipe):
    """Pretrain a network by predicting each image's rotation, one of four quarter turns (report, row 1)."""

    rotations: Literal["random", "all"] = DEFERRED
    """random: one turn per image, the report's; all: every image in its four turns, four times the views per step."""
    classes: tuple[str, ...] = ANGLES

    job: ClassVar[str] = "rotation"

    @property
    def views(self) -> int:
        return self.batch_size * (4 if self.rotations == "all" else 1)

    @property
    def train_task(self) -> tasks.Task:
        return tasks.all_turns if self.rotations == "all" else tasks.random_turn

    @property
    def eval_task(self) -> tasks.Task:
        return tasks.random_turn


@dataclass(frozen=True)
class Classification(Recipe):
    """Train a classifier, from a pretrained backbone or from scratch (report, rows 2 to 6)."""

    trainable: optim.Trainable = "all"
    """What trains: all, last_block (stage 4 and the head) or head."""
    frozen_statistics: Literal["held", "moving"] = "held"
    """Batch norm of frozen stages: held (running statistics, fixed) or moving (as in training; the report's 2a and 2b)."""
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


def check(recipe: Recipe, resolved: bool = True) -> None:
    """Raises UsageError for the first value of another type or out of range, naming its field.

    A recipe that is not `resolved` yet may have values that are None.
    """
    for field in dataclasses.fields(recipe):
        value, hint = getattr(recipe, field.name), field.type
        if not _fits(value, hint) and (resolved or value is not None):
            given, one = f"{field.name}={str(value)[:40]}", hint.__name__ if isinstance(hint, type) else hint
            if get_origin(hint) is Literal:
                raise UsageError(f"{given} is none of {', '.join(get_args(hint))}; give one of them")
            raise UsageError(f"{given} is of type {type(value).__name__}; give {one}")
    if isinstance(recipe, Rotation) and recipe.classes != ANGLES:
        raise UsageError(f"classes={recipe.classes} are not the four turns that a rotation has; leave them out")
    if bool(recipe.mean) != bool(recipe.std):
        raise UsageError(f"mean={recipe.mean} and std={recipe.std} go together; give both or neither")
    for name, (least, most) in BOUNDS.items():
        value = getattr(recipe, name, None)
        if value is not None and not value >= least:  # nan is not either
            raise UsageError(f"{name}={value} is too small; it is at least {least}")
        if value is not None and value > most:
            raise UsageError(f"{name}={value} is too large; it is at most {most}")
    for name, low in {"learning_rate": "above", "weight_decay": "at least"}.items():
        value = getattr(recipe, name)
        if value is not None and not (_finite(value) and (value > 0 or (value == 0 and low == "at least"))):
            raise UsageError(f"{name}={value} is out of range; it is a finite number {low} 0")
    if not all(_finite(value) for value in recipe.mean or ()):
        raise UsageError(f"mean={recipe.mean} is no mean; means are finite numbers")
    if not all(_finite(value) and value > 0 for value in recipe.std or ()):
        raise UsageError(f"std={recipe.std} is no deviation; standard deviations are finite numbers above 0")
    if None not in (recipe.warmup_epochs, recipe.epochs) and recipe.warmup_epochs > recipe.epochs:
        raise UsageError(f"warmup_epochs={recipe.warmup_epochs} is more than epochs={recipe.epochs}; give fewer")
    if recipe.image_size is not None and recipe.image_size < 32 and recipe.stem == "imagenet":
        raise UsageError(f"image_size={recipe.image_size} is too small for the imagenet stem; use 32 or stem=cifar")


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type that a field of a recipe is declared with."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in parts
    if kind is UnionType:
        return any(_fits(value, part) for part in parts)
    if kind is tuple:
        several = isinstance(value, tuple) and (Ellipsis in parts or len(value) == len(parts))
        return several and all(_fits(one, parts[0]) for one in value)
    return isinstance(value, (int, float) if hint is float else hint) and (hint is bool or not isinstance(value, bool))


def _finite(value: float) -> bool:
    """Whether f32 can hold `value`."""
    return abs(value) <= float(jnp.finfo(jnp.float32).max)
