"""What trains: the variables of a network, drawn from a seed, and the state of a run, all of it arrays."""

from typing import Any

import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh

from rotjax.errors import NonFiniteError
from rotjax.parallel import data_mesh, over, replicated


@flax.struct.dataclass
class TrainState:
    """Arrays only, so that saving it is saving the run.

    `variables` are what `model.apply` takes; `sums` are `loss`, `correct` and `count` since the epoch began, and `bad_step`,
    the first of its steps whose loss was not finite, or which ended a dispatch with variables that were not; 0: none.
    """

    step: jax.Array
    variables: dict
    opt_state: Any
    sums: dict[str, jax.Array]


def init_variables(model: nn.Module, seed: int, image_size: int) -> dict:
    """`{'params', 'batch_stats'}` drawn from `seed` (modulo 2**32 unless x64 is on), by one program for all arrays: on
    the host, where JAX has a CPU beside other devices, whose kernels round otherwise.

    The fields of `model` have to be hashable: tuples, not lists.
    """
    key = jax.random.key(seed)
    if isinstance(key, Tracer):
        return _drawn(model, key, image_size)
    alone, cpu = jax.sharding.get_abstract_mesh().empty, jax.default_backend() == "cpu"  # whether the caller has set no mesh
    if alone and cpu:
        return _drawn_quickly(model, key, image_size)
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return _drawn(model, key, image_size)
    with jax.default_device(host) if alone else jax.set_mesh(data_mesh([host])):
        drawn = jax.device_get(_drawn_quickly(model, jax.random.key(seed), image_size))
    return jax.device_put(drawn)


def abstract_variables(model: nn.Module, image_size: int) -> dict:
    """Shapes and dtypes of `init_variables`, without computing any."""
    return _drawn.eval_shape(model, jax.random.key(0), image_size)


def _draw(model: nn.Module, key: jax.Array, image_size: int) -> dict:
    return dict(model.init(key, jnp.zeros((1, image_size, image_size, 3), jnp.uint8)))


# At the top level, so that a network is traced once for all of its variables.
_drawn = jax.jit(_draw, static_argnums=(0, 2))
# A program that runs once, in less time than optimizing it takes: of DenseNet121, half a minute with jax 0.12.
_drawn_quickly = jax.jit(_draw, static_argnums=(0, 2), compiler_options={"xla_backend_optimization_level": 1})


def init_state(optimizer: optax.GradientTransformation, variables: dict, mesh: Mesh | None = None) -> TrainState:
    """Step 0 from `variables`, alike in all processes, replicated over `mesh`, by default over all devices."""

    def state(variables):
        return TrainState(jnp.zeros((), jnp.int32), variables, optimizer.init(variables["params"]), no_sums())

    mesh = mesh or data_mesh()
    variables = jax.tree.map(lambda x: x if isinstance(x, Tracer) else np.asarray(x), flax.core.unfreeze(variables))
    return jax.jit(over(mesh, state), out_shardings=replicated(mesh))(variables)


def no_sums() -> dict[str, jax.Array]:
    return {"loss": jnp.zeros(())} | {name: jnp.zeros((), jnp.int32) for name in ("correct", "count", "bad_step")}


def check_finite(state: TrainState) -> None:
    """Raises NonFiniteError naming `bad_step`, the step of this epoch by which the loss or the variables were not finite."""
    if bad := int(state.sums["bad_step"]):
        raise NonFiniteError(f"the loss or the network is not finite at step {bad}; lower the learning rate")
