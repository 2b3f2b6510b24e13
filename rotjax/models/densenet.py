"""DenseNets (Huang et al., 2016, arXiv 1608.06993) as torchvision builds them, bottleneck layers and halving transitions."""

from collections.abc import Collection
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from rotjax.models.batch_norm import BatchNorm
from rotjax.models.spatial import Stem, conv

he_normal_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution whose `growth` new maps are appended to the input's."""

    growth: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train):
        convolve = partial(conv, kernel_init=he_normal_fan_in, dtype=self.dtype)
        normalise = partial(BatchNorm, train, dtype=self.dtype)
        y = nn.relu(normalise(name="norm1")(x))
        y = convolve(4 * self.growth, 1, name="conv1")(y)
        y = nn.relu(normalise(name="norm2")(y))
        y = convolve(self.growth, 3, name="conv2")(y)
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """Halves the channels and the resolution."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train):
        y = nn.relu(BatchNorm(train, dtype=self.dtype, name="norm")(x))
        y = conv(x.shape[-1] // 2, 1, kernel_init=he_normal_fan_in, dtype=self.dtype, name="conv")(y)
        return nn.avg_pool(y, (2, 2), (2, 2))


class Stage(nn.Module):
    """The transition into a dense block, the block, and after the last block the network's final norm."""

    layers: int
    growth: int
    first: bool
    last: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train):
        if not self.first:
            x = Transition(self.dtype, name="transition")(x, train)
        for index in range(self.layers):
            x = DenseLayer(self.growth, self.dtype, name=f"layer{index + 1}")(x, train)
        if self.last:
            x = nn.relu(BatchNorm(train, dtype=self.dtype, name="norm")(x))
        return x


class DenseNet(nn.Module):
    """A DenseNet without its head: `[B,H,W,3]` to a map per endpoint, `stem` and `stage1` to `stage4`."""

    stage_sizes: tuple[int, ...]
    stem: str = "imagenet"
    width: int = 64  # of the stem; every layer adds width / 2 maps
    dtype: jnp.dtype = jnp.float32
    head_bias_scale = 0.0

    @nn.compact
    def __call__(self, x, *, train: bool, held: Collection[str] = ()):
        """`held` names the endpoints whose batch norms use their running statistics, unchanged, even if `train`."""
        x = Stem(self.stem, self.width, he_normal_fan_in, self.dtype, name="stem")(x, train and "stem" not in held)
        endpoints = {"stem": x}
        for index, layers in enumerate(self.stage_sizes):
            name = f"stage{index + 1}"
            first, last = index == 0, index == len(self.stage_sizes) - 1
            stage = Stage(layers, self.width // 2, first, last, self.dtype, name=name)
            endpoints[name] = x = stage(x, train and name not in held)
        return endpoints
