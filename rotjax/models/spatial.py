"""How convolutions and max-pooling are computed on this platform; no backbone knows.

XLA computes them well on accelerators, but on a GPU maps of 2x2 and smaller: ResNet18's step at 32 px is a quarter shorter
where they come out of products of matrices. On CPUs its convolution collapses where the output map is so small (256 to 256
channels on 2x2 maps take 86 ms at batch 128, as a product 1.4 ms), where the window is 1x1, and in the gradient of a kernel,
for which it turns both maps around. `python -m experiments.benchmark` measures what is left.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from rotjax.models.batch_norm import BatchNorm

SMALL = {"cpu": 2, "gpu": 2}  # pixels of a side up to which maps come out of products of matrices; on others: none


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: tuple[int, int],
    padding: Sequence[tuple[int, int]],
    **options,
) -> jax.Array:
    """`lax.conv_general_dilated` of `[B,H,W,C]` with an HWIO kernel, for `nn.Conv(conv_general_dilated=...)`.

    On CPUs and for small maps its derivatives are reverse-mode, and the padding is that of `conv`: as many pixels around
    as makes a map of stride 1 keep its size.
    """
    small = _is_small([-(-size // stride) for size, stride in zip(images.shape[1:3], window_strides, strict=True)])
    if jax.default_backend() != "cpu" and not small:
        return lax.conv_general_dilated(images, kernel, window_strides, padding, **options)
    if images.dtype.itemsize < 4:  # two of such convolutions that XLA fuses with a mean over maps come to NaN (jax 0.12)
        images = lax.optimization_barrier(images)
    kernel, strides = _within_reach(kernel, images.shape[1:3]), tuple(window_strides)
    *window, channels, features = kernel.shape
    if window == [1, 1]:
        return _same(images[:, :: strides[0], :: strides[1]], kernel)
    if strides == (1, 1) and features <= channels:
        return _same(images, kernel)
    if small:
        return _product(images, kernel, strides)
    if strides != (1, 1) and max(window) <= 3:
        return _strided(images, kernel, strides)
    return _by_xla(images, kernel, strides)  # a stem, into which three maps come


def _is_small(size):
    return max(size) <= SMALL.get(jax.default_backend(), 0)


def _within_reach(kernel, size):
    """Of `kernel` the taps that meet pixels of maps of this `size`, and not their padding alone."""
    rows, columns = (
        slice(max(width // 2 - side + 1, 0), width // 2 + side) for width, side in zip(kernel.shape[:2], size, strict=True)
    )
    return kernel[rows, columns]


def _by_xla(images, kernel, strides=(1, 1)):
    padding = [(width // 2, width // 2) for width in kernel.shape[:2]]
    return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _product(images, kernel, strides=(1, 1)):
    """A convolution as one product of matrices: faster than XLA's where maps are small, or the window is 1x1."""
    return _patches(images, kernel.shape[:2], strides) @ kernel.reshape(-1, kernel.shape[3])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _strided(images, kernel, strides):
    """A convolution by XLA with the gradients of `_product`.

    In a step XLA's are slower: it computes the maps again to transpose them, and puts zeros between the pixels of the
    cotangent.
    """
    return _by_xla(images, kernel, strides)


def _strided_forward(images, kernel, strides):
    return _by_xla(images, kernel, strides), (images, kernel)


def _strided_backward(strides, saved, cotangent):
    return jax.vjp(partial(_product, strides=strides), *saved)[1](cotangent)


_strided.defvjp(_strided_forward, _strided_backward)


@jax.custom_vjp
def _same(images, kernel):
    """A convolution of stride 1 to maps of the same size; see `_same_backward` for its gradients."""
    return (_product if _is_product(images, kernel) else _by_xla)(images, kernel)


def _is_product(images, kernel):
    return _is_small(images.shape[1:3]) or kernel.shape[:2] == (1, 1)


def _same_forward(images, kernel):
    return _same(images, kernel), (images, kernel)


def _same_backward(saved, cotangent):
    """As products with the same patches of the cotangent, where the forward is a product or the cotangent has fewer maps.

    Else the maps' by XLA, and the kernel's from maps shifted along columns, with the cotangent shifted along rows.
    """
    images, kernel = saved
    height, width, channels, features = kernel.shape
    turned, pixels = kernel[::-1, ::-1].swapaxes(2, 3), ((0, 1, 2), (0, 1, 2))
    if _is_product(images, kernel) or features < channels:
        if features < channels and (height, width) != (1, 1):  # of as many maps the product would cost what it saves
            cotangent = _once(cotangent)
        patches = _patches(cotangent, (height, width))
        products = jnp.tensordot(images, patches, pixels).reshape(channels, height, width, features)
        return patches @ turned.reshape(-1, channels), products.transpose(1, 2, 0, 3)[::-1, ::-1]
    shifted = _patches(images, (1, width))
    rows = [jnp.tensordot(shifted, row, pixels) for row in _windows(_padded(cotangent, (height, 1)), (height, 1), (1, 1))]
    return _by_xla(cotangent, turned), jnp.stack(rows[::-1]).reshape(kernel.shape)


_same.defvjp(_same_forward, _same_backward)


def _once(maps):
    """`maps`, on CPUs as a product with the identity, so that they are computed once.

    XLA fuses what they are computed from into each of the windows that read them: in a dense block the gradients of all
    later layers, half the program. Into a product it fuses nothing; a barrier it removes on CPUs before it fuses.
    """
    return maps @ jnp.eye(maps.shape[-1], dtype=maps.dtype) if jax.default_backend() == "cpu" else maps


def _patches(images, window, strides=(1, 1)):
    """`[B,P,Q,k*k*C]`: what a `window` around each pixel, or each `strides`th, shows of the zero-padded `images`."""
    if tuple(window) == (1, 1):
        return images[:, :: strides[0], :: strides[1]]
    return jnp.concatenate(_windows(_padded(images, window), window, strides), axis=-1)


def _padded(images, window):
    return jnp.pad(images, ((0, 0), *((width // 2, width // 2) for width in window), (0, 0)))


def _windows(padded, window, strides):
    """The `window[0] * window[1]` strided slices of padded `[B,H,W,C]`, in row-major order of the window."""
    rows, columns = (
        [slice(at, size - width + at + 1, stride) for at in range(width)]
        for width, stride, size in zip(window, strides, padded.shape[1:3], strict=True)
    )
    return [padded[:, row, column] for row in rows for column in columns]


@jax.custom_vjp
def max_pool(images: jax.Array) -> jax.Array:
    """3x3 maximum with stride 2 and padding 1 of `[B,H,W,C]`, as in torchvision's stems; its derivative is reverse-mode.

    The gradient of `nn.max_pool`, select-and-scatter, is slow on CPUs and has no deterministic GPU form. Among equal
    values the gradient goes to the first in row-major order, as in torch.
    """
    return _highest(images)[0]


def _highest(images):
    """The maximum of each window, and which of its nine places has it first."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    best, *windows = _windows(padded, (3, 3), (2, 2))
    place = jnp.zeros(best.shape, jnp.int8)
    for number, window in enumerate(windows, 1):
        place = jnp.where(window > best, jnp.int8(number), place)
        best = jnp.maximum(best, window)
    return best, place


def _max_pool_forward(images):
    best, place = _highest(images)
    return best, (place, images[:0])


def _max_pool_backward(saved, cotangent):
    """Gathers for each pixel from the windows that it lies in: by whether its row and its column are even or odd."""
    place, like = saved
    (_, height, width, channels), (batch, rows, columns, _) = like.shape, place.shape
    after = ((0, 0), (0, 1), (0, 1), (0, 0))
    cotangent, place = jnp.pad(cotangent, after), jnp.pad(place, after, constant_values=-1)

    def share(down, right, row, column):  # of what lies at (row, column) of the window that is so far down and right
        window = slice(None), slice(down, down + rows), slice(right, right + columns)
        return jnp.where(place[window] == 3 * row + column, cotangent[window], 0)

    # An even pixel is in the middle of a window; an odd one ends one, and begins the next: (window, place in it).
    inside = (((0, 1),), ((0, 2), (1, 0)))
    parts = [
        jnp.stack([sum(share(down, right, i, j) for down, i in row for right, j in column) for column in inside], axis=3)
        for row in inside
    ]
    return (jnp.stack(parts, axis=2).reshape(batch, 2 * rows, 2 * columns, channels)[:, :height, :width],)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def relu(maps: jax.Array) -> jax.Array:
    """`max(maps, 0)`; on a GPU its derivative is reverse-mode, and reads what came out, as the next convolution does.

    XLA would compute that again from what went into the batch norm before, in a kernel of its own. Where nothing else stores
    it, as in dense blocks, it would be more to move: those take `nn.relu`.
    """
    return _stored_relu(maps) if jax.default_backend() == "gpu" else nn.relu(maps)


@jax.custom_vjp
def _stored_relu(maps):
    return nn.relu(maps)


def _relu_forward(maps):
    out = lax.optimization_barrier(nn.relu(maps))
    return out, out


def _relu_backward(out, cotangent):
    return (jnp.where(out > 0, cotangent, 0),)


_stored_relu.defvjp(_relu_forward, _relu_backward)


def conv(features: int, size: int, stride: int = 1, **options) -> nn.Conv:
    """A square convolution without bias, padded by `size // 2` on every side as in torch (`SAME` differs at stride 2)."""
    return nn.Conv(
        features, (size, size), (stride, stride), size // 2, use_bias=False, conv_general_dilated=convolve, **options
    )


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
        x = relu(BatchNorm(train, dtype=self.dtype, name="norm")(x))
        return max_pool(x) if self.kind == "imagenet" else x
