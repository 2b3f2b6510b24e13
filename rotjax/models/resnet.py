"""ResNets (He et al., 2015, arXiv 1512.03385) as torchvision builds them: the stride sits in a bottleneck's 3x3."""

from collections.abc import Collection
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from rotjax.models.batch_norm import BatchNorm
from rotjax.models.spatial import Stem, conv, relu

he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    features: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train):
        convolve = partial(conv, kernel_init=he_normal_fan_out, dtype=self.dtype)
        normalise = partial(BatchNorm, train, dtype=self.dtype)
        y = convolve(self.features, 3, self.stride, name="conv1")(x)
        y = relu(normalise(name="norm1")(y))
        y = convolve(self.features, 3, name="conv2")(y)
        y = normalise(name="norm2")(y)
        return relu(y + shortcut(x, y, self.stride, convolve, normalise))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, `4 * features` wide at the end."""

    features: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train):
        convolve = partial(conv, kernel_init=he_normal_fan_out, dtype=self.dtype)
        normalise = partial(BatchNorm, train, dtype=self.dtype)
        y = convolve(self.features, 1, name="conv1")(x)
        y = relu(normalise(name="norm1")(y))
        y = convolve(self.features, 3, self.stride, name="conv2")(y)
        y = relu(normalise(name="norm2")(y))
        y = convolve(4 * self.features, 1, name="conv3")(y)
        y = normalise(name="norm3")(y)
        return relu(y + shortcut(x, y, self.stride, convolve, normalise))


def shortcut(x, y, stride, convolve, normalise):
    """`x` as it is where it has the shape of `y`, else projected to it by a 1x1 convolution."""
    if x.shape == y.shape:
        return x
    return normalise(name="shortcut_norm")(convolve(y.shape[-1], 1, stride, name="shortcut_conv")(x))


class Stage(nn.Module):
    """A stack of blocks at one resolution."""

    block: type[nn.Module]
    blocks: int
    features: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train):
        for index in range(self.blocks):
            stride = self.stride if index == 0 else 1
            x = self.block(self.features, stride, self.dtype, name=f"block{index + 1}")(x, train)
        return x


class ResNet(nn.Module):
    """A ResNet without its head: `[B,H,W,3]` to a map per endpoint, `stem` and `stage1` to `stage4`."""

    block: type[nn.Module]
    stage_sizes: tuple[int, ...]
    stem: str = "imagenet"
    width: int = 64
    dtype: jnp.dtype = jnp.float32
    head_bias_scale = 1.0

    @nn.compact
    def __call__(self, x, *, train: bool, held: Collection[str] = ()):
        """`held` names the endpoints whose batch norms use their running statistics, unchanged, even if `train`."""
        x = Stem(self.stem, self.width, he_normal_fan_out, self.dtype, name="stem")(x, train and "stem" not in held)
        endpoints = {"stem": x}
        for index, blocks in enumerate(self.stage_sizes):
            name = f"stage{index + 1}"
            stage = Stage(self.block, blocks, self.width * 2**index, 1 if index == 0 else 2, self.dtype, name=name)
            endpoints[name] = x = stage(x, train and name not in held)
        return endpoints
