"""What a network makes of images: a feature vector from each stage, the probability of each class."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotjax.data.dataset import check_fits, check_pixels
from rotjax.models.classifier import STAGES, Classifier
from rotjax.parallel import data_mesh, replicated, split


def features(model: Classifier, variables: dict, images: np.ndarray, *, batch_size: int = 256) -> dict[str, np.ndarray]:
    """Spatial means of the feature maps of `images` u8 `[N,H,W,3]`: `stem`, `stage1` to `stage4`, each f32 `[N,D]`.

    For nearest neighbours, clustering, linear probes. Uses this process's devices only; each process returns all N. Raises
    TypeError for pixels that are not uint8, or a model without `endpoints`, ValueError without any pixels, UsageError for a
    `batch_size` below 1.
    """
    if not hasattr(type(model), "endpoints"):
        raise TypeError(f"{type(model).__name__} has no method `endpoints`, the maps of its stages; give a Classifier")
    means = _applied(_means, model, variables, images, batch_size)
    return {name: means[name] for name in STAGES}  # which jax has in the order of the alphabet


def probabilities(model: Classifier, variables: dict, images: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
    """The softmax f32 `[N,C]` of the logits of `images` u8 `[N,H,W,3]` by any model; devices, errors as with `features`.

    Of a run from `load`, C counts the `classes` of its recipe, in their order: those of the data, or the four turns that an
    image may be in, counter-clockwise.
    """
    return _applied(_softmax, model, variables, images, batch_size)


def _applied(function: Callable, model: Classifier, variables: dict, images: np.ndarray, batch_size: int) -> Any:
    """The arrays of `function(model, variables, images)` for all `images`, a batch at a time."""
    check_pixels(images)
    if not images.size:
        raise ValueError("there are no images, or none with pixels; give at least one")
    check_fits(batch_size)
    images = np.asarray(images)  # of jax its devices may not be those of `mesh`
    mesh = data_mesh(jax.local_devices())
    variables = jax.device_put(jax.tree.map(np.asarray, variables), replicated(mesh))
    size = -(-min(batch_size, len(images)) // mesh.size) * mesh.size
    batches = np.arange(-(-len(images) // size) * size).clip(max=len(images) - 1).reshape(-1, size)  # the last one filled up
    with jax.set_mesh(mesh):  # also where the caller has set another
        placed = (jax.device_put(images[rows], split(mesh)) for rows in batches)
        parts = [jax.device_get(function(model, variables, batch)) for batch in placed]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(images)], *parts)


@partial(jax.jit, static_argnums=0)
def _means(model: Classifier, variables: dict, images: jax.Array) -> dict[str, jax.Array]:
    apply: Callable[..., Any] = model.apply
    endpoints = apply(variables, images, method="endpoints")
    return {name: jnp.mean(endpoints[name], (1, 2), dtype=jnp.float32) for name in STAGES}


@partial(jax.jit, static_argnums=0)
def _softmax(model: Classifier, variables: dict, images: jax.Array) -> jax.Array:
    apply: Callable[..., Any] = model.apply
    return jax.nn.softmax(apply(variables, images)).astype(jnp.float32)
