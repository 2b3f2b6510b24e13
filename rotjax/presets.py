"""Defaults of a recipe's fields: the report's values, a data set's, those of current practice."""

from typing import Any, Literal

from rotjax.models import CIFAR10_MEAN, CIFAR10_STD

Preset = Literal["report", "strong"]
Defaults = dict[str, Any]

_REPORT: Defaults = dict(
    backbone="resnet18", stem="imagenet", width=64, mean=CIFAR10_MEAN, std=CIFAR10_STD, dtype="float32",
    batch_size=128, optimizer="adamw", learning_rate=0.01, schedule="steps", warmup_epochs=0, weight_decay=0.01,
    flip=True, cutout=0.0, label_smoothing=0.0,
)  # fmt: skip
REPORT: dict[str, Defaults] = {
    "rotation": _REPORT | dict(rotations="random", epochs=45, decay_epochs=15),
    "classification": _REPORT | dict(epochs=20, decay_epochs=10),
}

DATASETS: dict[str, Defaults] = {
    "digits": dict(
        image_size=32, width=32, rotations="all", epochs=8, decay_epochs=6, batch_size=16, learning_rate=1e-3, flip=False
    ),
    "cifar10": dict(image_size=32),
    "other sets": dict(image_size=64),
}

_STRONG: Defaults = dict(stem="cifar", dtype="bfloat16", optimizer="sgd", schedule="cosine", warmup_epochs=5)
STRONG: dict[str, Defaults] = {  # what differs; RotNet's authors: the same SGD, but steps, over 200 epochs
    "rotation": _STRONG | dict(rotations="all", epochs=100),
    "classification": _STRONG | dict(epochs=100, cutout=0.375, label_smoothing=0.1),
}
SGD: Defaults = dict(learning_rate=0.1, weight_decay=5e-4)  # in the place of AdamW's; the rate is that of SGD_BATCH images
SGD_BATCH = 128


def of_dataset(name: str) -> Defaults:
    """The defaults of the data set, or folder of images, `name`."""
    return DATASETS.get(name, DATASETS["other sets"])
