"""The forms that layers take on a platform compute what XLA's and Flax's own do, and so do their gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rotjax.models import spatial
from rotjax.models.normalization import BatchNorm


def agree(ours, theirs, *arrays):
    """Values and gradients of both, from the same cotangent."""
    shape = jax.eval_shape(theirs, *arrays)
    cotangent = np.random.default_rng(1).normal(size=shape.shape).astype(np.float32)

    @jax.jit
    def both(*arrays):
        (found, backward), (wanted, reference) = jax.vjp(ours, *arrays), jax.vjp(theirs, *arrays)
        return [found, *backward(cotangent)], [wanted, *reference(cotangent)]

    for one, other in zip(*both(*arrays), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


WINDOWS = pytest.mark.parametrize(("window", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (4, 4), (7, 7), (1, 8), (8, 1), (2, 5)])
@WINDOWS
def test_convolution(size, window, stride):
    convolutions_agree(size, window, stride)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (7, 7), (2, 5)])
@WINDOWS
def test_convolution_where_only_small_maps_are_products(size, window, stride, monkeypatch):
    """Of up to 4 pixels a side, as row l-products-4 of the benchmark takes them on a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setitem(spatial.SMALL, "gpu", 4)
    convolutions_agree(size, window, stride)


def convolutions_agree(size, window, stride):
    rng = np.random.default_rng(0)
    for channels, features in ((6, 4), (4, 6), (5, 5)):
        images = rng.normal(size=(2, *size, channels)).astype(np.float32)
        kernel = rng.normal(size=(window, window, channels, features)).astype(np.float32)
        ours = spatial.conv(features, window, stride)
        padding = [(window // 2, window // 2)] * 2

        def theirs(images, kernel, stride=stride, padding=padding):
            numbers = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(images, kernel, (stride, stride), padding, dimension_numbers=numbers)

        agree(lambda x, k, ours=ours: ours.apply({"params": {"kernel": k}}, x), theirs, images, kernel)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_max_pool_and_its_ties(size):
    images = np.random.default_rng(size).normal(size=(3, size, size, 4)).round().clip(0).astype(np.float32)
    agree(spatial.max_pool, lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))), images)


def test_max_pool_of_what_is_no_number_is_none():
    images = jnp.ones((1, 4, 4, 1)).at[0, 1, 1].set(jnp.nan)
    np.testing.assert_array_equal(spatial.max_pool(images)[0, :, :, 0], jnp.nan)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_batch_norm(backend, train, monkeypatch):
    """Of maps whose mean is three times their deviation; the statistics that are stored, too."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    images = rng.normal(3, 1, (8, 5, 5, 6)).astype(np.float32)
    scale, bias, mean, variance = (rng.uniform(0.5, 2, 6).astype(np.float32) for _ in range(4))
    ours, theirs = BatchNorm(train), nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False)

    def applied(norm, images, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": variance}}
        return norm.apply(variables, images, mutable=["batch_stats"])

    agree(lambda *given: applied(ours, *given)[0], lambda *given: applied(theirs, *given)[0], images, scale, bias)
    for one, other in zip(*(jax.tree.leaves(applied(norm, images, scale, bias)[1]) for norm in (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    start = [jax.tree.map(np.asarray, norm.init(jax.random.key(0), images)) for norm in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *start)
