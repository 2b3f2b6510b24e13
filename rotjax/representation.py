"""What a network makes of images, stage by stage, as vectors: for neighbours, clusters, probes."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotjax.data.batches import eval_batches, read
from rotjax.data.tasks import classify
from rotjax.models.classifier import STAGES, Classifier
from rotjax.training import place


def features(model: Classifier, variables: dict, images: np.ndarray, *, batch_size: int = 256) -> dict[str, np.ndarray]:
    """The mean over each map that `images` u8 `[N,H,W,3]` lead to: `stem`, `stage1` to `stage4`, each f32 `[N,D]`.

    Computed on all devices of this process, which have to share a batch equally. Raises TypeError for pixels that are not
    uint8.
    """
    means = jax.jit(partial(_means, model))
    with closing(read(eval_batches({"image": images}, classify, batch_size))) as reader:
        parts = [jax.device_get(means(variables, batch["image"])) for batch in place(reader)]
    return {name: np.concatenate([part[name] for part in parts])[: len(images)] for name in STAGES}


def _means(model: Classifier, variables: dict, images: jax.Array) -> dict[str, jax.Array]:
    apply: Callable[..., Any] = model.apply
    endpoints = apply(variables, images, method="endpoints")
    return {name: jnp.mean(endpoints[name], (1, 2), dtype=jnp.float32) for name in STAGES}
