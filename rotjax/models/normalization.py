"""Batch normalisation (Ioffe and Szegedy, 2015, arXiv 1502.03167) whose gradient takes two sums over the maps.

Of Flax's, autodiff makes up to four: XLA does not know that the others are nought, or multiples of these.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

_PIXELS = (0, 1, 2)  # the axes of `[B,H,W,C]` that a channel's statistics are over


class BatchNorm(nn.Module):
    """torch's batch normalisation of `[B,H,W,C]`, but for the variance that is stored: biased, torch's is n/(n-1) times it.

    By the statistics of the batch with `train`, and then its derivative is reverse-mode; else by the running ones.
    """

    train: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        variance = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        if not self.train:
            return _normalised(x, mean.value, variance.value, scale, bias).astype(self.dtype)
        of_batch = _moments(lax.stop_gradient(x))
        if not self.is_initializing():
            mean.value, variance.value = (
                0.9 * running.value + 0.1 * new for running, new in zip((mean, variance), of_batch, strict=True)
            )
        return _normalised_by_batch(x, *of_batch, scale, bias).astype(self.dtype)


def _moments(x):
    """Mean and variance of each channel, in one pass over the maps, but on CPUs, which are a tenth faster in two.

    A GPU's step starts fewer kernels, and several devices exchange their sums once. One pass loses digits of a variance
    below the mean's square: all of them where the mean is thousands of deviations.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = x.mean(_PIXELS)
    if jax.default_backend() == "cpu":
        return mean, jnp.square(x - mean).mean(_PIXELS)
    return mean, jnp.maximum(jnp.square(x).mean(_PIXELS) - jnp.square(mean), 0)


def _normalised(x, mean, variance, scale, bias):
    return (x - mean) * (lax.rsqrt(variance + 1e-5) * scale) + bias


@jax.custom_vjp
def _normalised_by_batch(x, mean, variance, scale, bias):
    """`_normalised` by the moments of `x` itself, through which the gradient of `x` goes too."""
    return _normalised(x, mean, variance, scale, bias)


def _forward(x, mean, variance, scale, bias):
    return _normalised(x, mean, variance, scale, bias), (x, mean, variance, scale)


def _backward(saved, cotangent):
    x, mean, variance, scale = saved
    count, inverse, centred = x.size // x.shape[-1], lax.rsqrt(variance + 1e-5), x - mean
    bias, product = cotangent.sum(_PIXELS), (cotangent * centred).sum(_PIXELS)
    maps = (cotangent - bias / count - centred * (product * inverse**2 / count)) * (inverse * scale)
    return maps.astype(x.dtype), None, None, product * inverse, bias


_normalised_by_batch.defvjp(_forward, _backward)
