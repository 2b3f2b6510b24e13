"""Batch normalisation (Ioffe and Szegedy, 2015, arXiv 1502.03167) with its gradient in closed form.

It takes two sums over the maps. Autodiff makes up to four of Flax's; the others are zero or multiples of these, which XLA
cannot know.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

_EPSILON, _MOMENTUM = 1e-5, 0.1  # torch's
_PIXELS = (0, 1, 2)  # the axes of `[B,H,W,C]` that a channel's statistics are over


class BatchNorm(nn.Module):
    """torch's batch normalisation of `[B,H,W,C]`, but for the variance that is stored: biased, torch's is n/(n-1) times it.

    With `train` by the statistics of the batch, and then its derivative is reverse-mode; else by the running ones.
    """

    train: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        if not self.train:
            return _normalised(x, mean.value, variance.value, scale, bias).astype(self.dtype)
        y, *moments = _normalised_by_batch(x, scale, bias)
        if not self.is_initializing():
            for running, batch in zip((mean, variance), lax.stop_gradient(moments), strict=True):
                running.value = ((1 - _MOMENTUM) * running.value + _MOMENTUM * batch).astype(running.value.dtype)
        return y.astype(self.dtype)


def _normalised(x, mean, variance, scale, bias):
    return (x - mean) * (lax.rsqrt(variance + _EPSILON) * scale) + bias


def _moments(x):
    """Mean and variance of each channel, in one pass over the maps; on CPUs in two, which take no longer there.

    One pass starts fewer kernels on a GPU, and several devices exchange its sums once. It loses digits of a variance below
    the mean's square: all of them where the mean is thousands of deviations.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if jax.default_backend() == "cpu":
        mean = x.mean(_PIXELS)
        return mean, jnp.square(x - mean).mean(_PIXELS)
    mean, square = (total / _count(x) for total in _sums(x, jnp.square(x)))
    return mean, jnp.maximum(square - jnp.square(mean), 0)


def _sums(*maps):
    """The sum of each of `maps` over the pixels: on a GPU in one reduction, as XLA ends each with a kernel of its own."""
    if jax.default_backend() != "gpu":
        return [one.sum(_PIXELS) for one in maps]
    zeros = tuple(jnp.zeros((), one.dtype) for one in maps)
    return lax.reduce(maps, zeros, lambda *both: jax.tree.map(jnp.add, *both), _PIXELS)


def _count(x):
    return x.size // x.shape[-1]


@jax.custom_vjp
def _normalised_by_batch(x, scale, bias):
    """`x` normalised by its own moments, and these, whose cotangents are taken for zero."""
    return _forward(x, scale, bias)[0]


def _forward(x, scale, bias):
    mean, variance = _moments(x)
    return (_normalised(x, mean, variance, scale, bias), mean, variance), (x, mean, variance, scale, bias)


def _backward(saved, cotangents):
    x, mean, variance, scale, bias = saved
    cotangent, centred, inverse, count = cotangents[0], x - mean, lax.rsqrt(variance + _EPSILON), _count(x)
    if jax.default_backend() == "cpu":
        of_bias, product = _sums(cotangent, cotangent * centred)
    else:  # as many digits as `_moments` has, and a kernel less on a GPU
        of_bias, product = _sums(cotangent, cotangent * x)
        product -= mean * of_bias
    of_scale = product * inverse
    of_x = (cotangent - of_bias / count - centred * (of_scale * inverse / count)) * (inverse * scale)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


_normalised_by_batch.defvjp(_forward, _backward)
