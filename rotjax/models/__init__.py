"""The networks: `create` puts a backbone and a head together by name."""

from functools import partial
from typing import Literal, get_args

import jax.numpy as jnp

from rotjax.errors import UsageError
from rotjax.models.classifier import CIFAR10_MEAN, CIFAR10_STD, Classifier, held_endpoints
from rotjax.models.densenet import DenseNet
from rotjax.models.resnet import BasicBlock, Bottleneck, ResNet

Backbone = Literal["resnet18", "resnet50", "resnet101", "densenet121"]
StemName = Literal["imagenet", "cifar"]

BACKBONES = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "densenet121": partial(DenseNet, (6, 12, 24, 16)),
}


def create(
    name: str,
    num_classes: int,
    stem: str = "imagenet",
    *,
    mean: tuple[float, float, float] = CIFAR10_MEAN,
    std: tuple[float, float, float] = CIFAR10_STD,
    held: tuple[str, ...] = (),
    width: int = 64,
    dtype=jnp.float32,
) -> Classifier:
    """The classifier `name` of `BACKBONES`; `width` is the stem's, 64 as published; for the rest see `Classifier`.

    Its derivatives are reverse-mode: for the product of a Hessian and a vector, the gradient of a gradient.
    Raises UsageError for a name, a stem or a prefix in `held` that does not exist.
    """
    if name not in BACKBONES:
        raise UsageError(f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}")
    if stem not in get_args(StemName):
        raise UsageError(f"unknown stem {stem!r}; there are {', '.join(get_args(StemName))}")
    held_endpoints(held)
    backbone = BACKBONES[name](stem=stem, width=width, dtype=dtype)
    return Classifier(backbone, num_classes, tuple(mean), tuple(std), tuple(held), dtype)
