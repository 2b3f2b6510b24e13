"""The forms that layers take on a platform compute what XLA's and Flax's own do, and so do their gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from rotjax.models import spatial
from rotjax.models.batch_norm import BatchNorm


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


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_relu(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    maps = jnp.array([-jnp.inf, -1, 0, 1e-30, 2, jnp.inf, jnp.nan])
    for given in (maps, maps.astype(jnp.bfloat16)):
        (ours, back), (theirs, other) = (jax.vjp(function, given) for function in (spatial.relu, nn.relu))
        for one, wanted in ((ours, theirs), (back(given)[0], other(given)[0])):
            assert one.dtype == wanted.dtype
            np.testing.assert_array_equal(np.float32(one), np.float32(wanted))


@pytest.fixture(params=["cpu", "gpu"])
def norms(request, monkeypatch):
    """`(train, dtype=f32) -> ours, Flax's`, each `(images, scale, bias) -> maps, statistics`, as on this platform; and these
    arrays: maps whose mean is three times their deviation."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    rng = np.random.default_rng(0)
    images = rng.normal(3, 1, (8, 5, 5, 6)).astype(np.float32)
    scale, bias, mean, variance = (rng.uniform(0.5, 2, 6).astype(np.float32) for _ in range(4))

    def applied(norm):
        def apply(images, scale, bias):
            variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": variance}}
            return norm.apply(variables, images, mutable=["batch_stats"])

        return apply

    def both(train, dtype=jnp.float32):
        theirs = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, dtype=dtype)
        return applied(BatchNorm(train, dtype)), applied(theirs)

    return both, images, scale, bias


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm(norms, train):
    both, *arrays = norms
    ours, theirs = both(train)
    agree(lambda *given: ours(*given)[0], lambda *given: theirs(*given)[0], *arrays)
    for one, other in zip(*(jax.tree.leaves(norm(*arrays)[1]) for norm in (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_batch_statistics_are_taken_in_one_pass_but_on_cpus(norms):
    """In one pass a variance far below the mean's square loses its digits."""
    both, images, scale, bias = norms
    ours, theirs = (norm(images + 1e4, scale, bias)[1]["batch_stats"]["var"] for norm in both(True))
    assert np.allclose(ours, theirs, rtol=1e-3) == (jax.default_backend() == "cpu")


def test_batch_norm_twice_differentiated(norms):
    """The moments are functions of the maps in the gradient, too."""
    both, *arrays = norms

    def second(norm):
        def steepness(*given):
            slope = jax.grad(lambda *given: jnp.sin(norm(*given)[0]).sum(), argnums=(0, 1, 2))(*given)
            return optax.tree.norm(slope, squared=True)

        return jax.jit(jax.grad(steepness, argnums=(0, 1, 2)))

    for one, other in zip(*(second(norm)(*arrays) for norm in both(True)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


def test_batch_norm_in_bfloat16_and_its_dtypes(norms):
    both, images, scale, bias = norms
    found, wanted = (
        jax.vjp(lambda *given, norm=norm: norm(*given)[0], images.astype(jnp.bfloat16), scale, bias)
        for norm in both(True, jnp.bfloat16)
    )
    cotangent = np.random.default_rng(1).normal(size=images.shape).astype(jnp.bfloat16)
    for one, other in zip([found[0], *found[1](cotangent)], [wanted[0], *wanted[1](cotangent)], strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.float32(one), np.float32(other), atol=0.01 * np.abs(np.float32(other)).max())


@pytest.mark.parametrize("x64", [False, True])
def test_batch_norm_begins_as_flax_does(x64):
    with jax.enable_x64(x64):
        ours, theirs = (
            norm.init(jax.random.key(0), np.zeros((1, 2, 2, 6))) for norm in (BatchNorm(True), nn.BatchNorm(False))
        )
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other, strict=True), ours, theirs)
