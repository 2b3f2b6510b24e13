"""Learning-rate schedules, and optimizers that leave frozen parameters alone."""

from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import jax
import optax

from rotjax.errors import UsageError

Trainable = Literal["all", "last_block", "head"]
Optimizer = Literal["adamw", "sgd"]

FROZEN: dict[str, tuple[str, ...]] = {
    "all": (),
    "last_block": ("backbone/stem", "backbone/stage1", "backbone/stage2", "backbone/stage3"),
    "head": ("backbone",),
}


def piecewise(learning_rate: float, boundaries: Sequence[int], factor: float = 0.1) -> optax.Schedule:
    """`learning_rate`, multiplied by `factor` from each of `boundaries` (steps) on."""
    return optax.piecewise_constant_schedule(learning_rate, {step: factor for step in boundaries})


def labels(params, frozen: tuple[str, ...] = ()):
    """`'frozen'` under the path prefixes `frozen`, `'trainable'` elsewhere, in the structure of `params`.

    Raises UsageError for a string in place of a tuple, and for a prefix under which there is nothing: a typing error would
    train everything.
    """
    if isinstance(frozen, str):
        raise UsageError(f"frozen={frozen!r} is one string; give a tuple of them, ({frozen!r},)")
    used = set()

    def label(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        hits = [prefix for prefix in frozen if name == prefix or name.startswith(prefix + "/")]
        used.update(hits)
        return "frozen" if hits else "trainable"

    tree = jax.tree.map_with_path(label, params)
    if missing := set(frozen) - used:
        raise UsageError(f"no parameters under {', '.join(sorted(missing))}; there are {', '.join(params)}")
    return tree


def adamw(
    schedule: optax.ScalarOrSchedule, weight_decay: float = 0.01, frozen: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """AdamW with weight decay on all parameters, as torch's; those under prefixes `frozen` get no update, decay or state.

    Give those of them that are the backbone or its stages to `create(held=...)` too, or their batch norms go on moving
    their statistics.
    """
    return _for_trainable(optax.adamw(schedule, weight_decay=weight_decay), frozen)


def sgd(
    schedule: optax.ScalarOrSchedule, weight_decay: float = 5e-4, frozen: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum 0.9 and L2 weight decay on all parameters, as torch's; `frozen` as in `adamw`."""
    momentum = optax.sgd(schedule, momentum=0.9, nesterov=True)
    return _for_trainable(optax.chain(optax.add_decayed_weights(weight_decay), momentum), frozen)


OPTIMIZERS: dict[Optimizer, Callable[..., optax.GradientTransformation]] = {"adamw": adamw, "sgd": sgd}


def _for_trainable(optimizer: optax.GradientTransformation, frozen: tuple[str, ...]) -> optax.GradientTransformation:
    transforms: dict[Hashable, optax.GradientTransformation] = {"trainable": optimizer, "frozen": optax.set_to_zero()}
    return optax.multi_transform(transforms, lambda params: labels(params, frozen))
