"""How convolutions and max-pooling are computed on this platform; no backbone knows.

XLA's CPU convolution collapses where the output map is 2x2 or smaller: 256 -> 256 channels on 2x2 maps takes 86 ms
forward at batch 128 and 2 ms as one matrix product. A 1x1 convolution is a matrix product on any map, twice as fast
forward and six times as fast in its weights' gradient. Elsewhere, and on every accelerator, XLA's own form wins.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    **options,
) -> jax.Array:
    """`lax.conv_general_dilated` of `[B,H,W,C]` with an HWIO kernel, for `nn.Conv(conv_general_dilated=...)`."""
    output = [
        (size + sum(pad) - width) // stride + 1
        for size, pad, width, stride in zip(images.shape[1:3], padding, kernel.shape[:2], window_strides, strict=True)
    ]
    if jax.default_backend() == "cpu" and kernel.shape[:2] == (1, 1):
        return images[:, :: window_strides[0], :: window_strides[1]] @ kernel[0, 0]
    if jax.default_backend() != "cpu" or max(output) > 2:
        return lax.conv_general_dilated(images, kernel, window_strides, padding, **options)
    if images.shape[1] * images.shape[2] <= kernel.shape[0] * kernel.shape[1]:
        return _whole_map_product(images, kernel, window_strides, padding, output)
    return _patch_product(images, kernel, window_strides, padding, output)


def _whole_map_product(images, kernel, strides, padding, output):
    """One product of flattened maps `[B, H*W*C]` with the block-Toeplitz matrix of the kernel."""
    batch, height, width = images.shape[:3]
    zero = jnp.zeros(kernel.shape[2:], kernel.dtype)

    def block(row, column, out_row, out_column):
        y = row - strides[0] * out_row + padding[0][0]
        x = column - strides[1] * out_column + padding[1][0]
        return kernel[y, x] if 0 <= y < kernel.shape[0] and 0 <= x < kernel.shape[1] else zero

    matrix = jnp.block(
        [
            [block(row, column, p, q) for p in range(output[0]) for q in range(output[1])]
            for row in range(height)
            for column in range(width)
        ]
    )
    return (images.reshape(batch, -1) @ matrix).reshape(batch, *output, kernel.shape[3])


def _patch_product(images, kernel, strides, padding, output):
    """One product of patches `[B*P*Q, k*k*C]`, made of k*k strided slices, with the kernel."""
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    patches = jnp.concatenate(_windows(padded, kernel.shape[:2], strides, output), axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[3])


def _windows(padded, window, strides, output):
    """The `window[0] * window[1]` strided slices of `[B,H,W,C]`, in row-major order of the window."""
    rows, columns = (
        [slice(at, at + stride * (count - 1) + 1, stride) for at in range(width)]
        for width, stride, count in zip(window, strides, output, strict=True)
    )
    return [padded[:, row, column] for row in rows for column in columns]


def max_pool(images: jax.Array) -> jax.Array:
    """3x3 maximum with stride 2 and padding 1 of `[B,H,W,C]`, as in torchvision's stems.

    Written as nine comparisons: the gradient of `nn.max_pool`, select-and-scatter, is slow on CPUs and has no
    deterministic GPU form. Among equal values the gradient goes to the first in row-major order, as in torch.
    """
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    output = [(size - 1) // 2 + 1 for size in images.shape[1:3]]
    first, *rest = _windows(padded, (3, 3), (2, 2), output)
    for window in rest:
        first = jnp.where(window > first, window, first)
    return first


def conv(features: int, size: int, stride: int = 1, **options) -> nn.Conv:
    """A square convolution without bias, padded by `size // 2` on every side as in torch (`SAME` differs at stride 2)."""
    return nn.Conv(
        features, (size, size), (stride, stride), size // 2, use_bias=False, conv_general_dilated=convolve, **options
    )


def batch_norm(train: bool, **options) -> nn.BatchNorm:
    """torch's batch normalisation, but for the biased variance that Flax stores (torch's is n/(n-1) times it)."""
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, **options)


class Stem(nn.Module):
    """`'imagenet'`: 7x7 stride 2 and a 3x3 stride 2 maximum, `[B,H,W,3]` to `[B,H/4,W/4,width]`; `'cifar'`: 3x3, no pool."""

    kind: str
    width: int
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train):
        size, stride = {"imagenet": (7, 2), "cifar": (3, 1)}[self.kind]
        x = conv(self.width, size, stride, kernel_init=self.kernel_init, dtype=self.dtype, name="conv")(x)
        x = nn.relu(batch_norm(train, dtype=self.dtype, name="norm")(x))
        return max_pool(x) if self.kind == "imagenet" else x
