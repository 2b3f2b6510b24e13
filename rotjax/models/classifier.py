"""A backbone and a linear head over uint8 pixels."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rotjax.errors import UsageError

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)
STAGES = ("stem", "stage1", "stage2", "stage3", "stage4")


class Classifier(nn.Module):
    """Pixels to logits: normalisation, backbone, mean over the last map, linear head.

    Parameters are `{'backbone': ..., 'head': ...}`. `dtype` is the backbone's; statistics and logits are float32, or
    float64 where `dtype` is. `held` are path prefixes (`'backbone'`, `'backbone/stage1'`) whose batch norms use
    their running statistics, unchanged, in training; to freeze parameters, pass them to the optimizer (`rotjax.adamw`).
    """

    backbone: nn.Module
    num_classes: int
    mean: tuple[float, ...] = CIFAR10_MEAN
    std: tuple[float, ...] = CIFAR10_STD
    held: tuple[str, ...] = ()
    dtype: jnp.dtype = jnp.float32

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """uint8 `[B,H,W,3]` to logits `[B,num_classes]`; TypeError for anything else."""
        return self.endpoints(images, train=train)["logits"]

    @nn.compact
    def endpoints(self, images: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """The maps `stem`, `stage1` to `stage4`, the `features` `[B,D]` under the head, and the `logits`."""
        if images.dtype != jnp.uint8:
            raise TypeError(f"images are {images.dtype}; give uint8 pixels, 0 to 255: the network normalises them itself")
        if images.ndim != 4 or images.shape[3] != 3:
            raise TypeError(f"images are {list(images.shape)}; give [B,H,W,3], the three colours last")
        wide = jnp.promote_types(self.dtype, jnp.float32)
        x = (images.astype(wide) / 255 - jnp.array(self.mean, wide)) / jnp.array(self.std, wide)
        endpoints = self.backbone(x.astype(self.dtype), train=train, held=held_endpoints(self.held))
        *_, last = endpoints.values()
        features = last.astype(wide).mean((1, 2))
        limit = features.shape[-1] ** -0.5
        head = nn.Dense(
            self.num_classes,
            dtype=wide,
            precision=jax.lax.Precision.HIGHEST,  # or accelerators round its operands
            kernel_init=symmetric_uniform(limit),
            bias_init=symmetric_uniform(limit * self.backbone.head_bias_scale),
            name="head",
        )
        return endpoints | {"features": features, "logits": head(features)}


def symmetric_uniform(limit: float) -> nn.initializers.Initializer:
    """Uniform in `+-limit`; with `1 / sqrt(fan_in)` the initial weights of torch's linear layers."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


def held_endpoints(held: tuple[str, ...]) -> tuple[str, ...]:
    """The endpoints under the path prefixes `held`; UsageError for a prefix of anything but the backbone or its stages."""
    if isinstance(held, str):
        raise UsageError(f"held={held!r} is one string; give a tuple of them, ({held!r},)")
    if odd := set(held) - {"backbone", *(f"backbone/{stage}" for stage in STAGES)}:
        raise UsageError(f"statistics are held by stage, not by {sorted(odd)}; name backbone, or backbone/stem to /stage4")
    return STAGES if "backbone" in held else tuple(prefix.removeprefix("backbone/") for prefix in held)
