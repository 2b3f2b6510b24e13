"""Feature vectors of images, stage by stage: for nearest neighbours, clustering, linear probes."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotjax.data.batches import eval_batches, read, unlabelled
from rotjax.data.tasks import classify
from rotjax.models.classifier import STAGES, Classifier
from rotjax.parallel import data_mesh, replicated
from rotjax.training import place


def features(model: Classifier, variables: dict, images: np.ndarray, *, batch_size: int = 256) -> dict[str, np.ndarray]:
    """Spatial means of the feature maps of `images` u8 `[N,H,W,3]`: `stem`, `stage1` to `stage4`, each f32 `[N,D]`.

    Uses this process's devices only; each process returns all N. Raises TypeError for pixels that are not uint8.
    """
    mesh = data_mesh(jax.local_devices())
    variables = jax.device_put(jax.tree.map(np.asarray, variables), replicated(mesh))
    data, size = {"image": images, "label": unlabelled(len(images))}, -(-batch_size // mesh.size) * mesh.size
    with closing(read(eval_batches(data, classify, size, share=slice(None)))) as reader:
        parts = [jax.device_get(_means(model, variables, batch["image"])) for batch in place(reader, mesh)]
    return {name: np.concatenate([part[name] for part in parts])[: len(images)] for name in STAGES}


@partial(jax.jit, static_argnums=0)
def _means(model: Classifier, variables: dict, images: jax.Array) -> dict[str, jax.Array]:
    apply: Callable[..., Any] = model.apply
    endpoints = apply(variables, images, method="endpoints")
    return {name: jnp.mean(endpoints[name], (1, 2), dtype=jnp.float32) for name in STAGES}
