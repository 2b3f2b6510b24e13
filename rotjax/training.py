"""The train step, the evaluation step and the training loop, the same for pretraining and fine-tuning."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh

from rotjax.errors import NonFiniteError
from rotjax.parallel import data_mesh, over, replicated, shared, split, whole

Row = dict[str, Any]
Make = Callable[[Any, dict], dict]  # (what lies on the devices, what is sent to them) -> batch
Step = Callable[["TrainState", dict], tuple["TrainState", dict[str, jax.Array]]]
Loss = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [B,C], labels [B]) -> [B]


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
    """`{'params', 'batch_stats'}` drawn from `seed`, on the host for every kind of device, by one program for all arrays.

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
        return TrainState(jnp.zeros((), jnp.int32), variables, optimizer.init(variables["params"]), _no_sums())

    mesh = mesh or data_mesh()
    return jax.jit(over(mesh, state), out_shardings=replicated(mesh))(jax.tree.map(np.asarray, variables))


def sent(data: Any, batch: dict) -> dict:
    """The `make` of batches that arrive complete from the host: the identity."""
    return batch


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """The loss `[B]` of logits `[B,C]`, with a share `smoothing` of each label spread evenly over the C classes."""
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing))


def train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh | None = None, loss: Loss = cross_entropy
) -> jax.stages.Wrapped:
    """A jitted `(state, batch) -> (state, metrics)`; the input state is donated.

    `batch` is `{'image': u8[B,H,W,3], 'label': i32[B]}`, with labels from 0 on, below the number of logits (the loss of
    larger ones is NaN); `metrics` are the `loss` and `accuracy` of this batch. Under a mesh of several devices batch
    statistics are the whole batch's, and each device computes its share, of arrays that nobody placed too; UsageError for a
    batch that they cannot share equally.
    """
    mesh = mesh or data_mesh()
    step = _step(model, optimizer, loss, mesh)

    def checked(state: TrainState, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = step(whole(state, mesh), batch)
        return _checked(state), metrics

    return jax.jit(over(mesh, checked), donate_argnums=0, out_shardings=replicated(mesh))


def train_steps(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    make: Make = sent,
    loss: Loss = cross_entropy,
) -> jax.stages.Wrapped:
    """A jitted `(state, batches, data=None) -> (state, metrics)`: `train_step` scanned over K `batches`, stacked on axis 0.

    Each step trains on `make(data, batch)`; the metrics are f32 `[K]`. The input state is donated; UsageError as there.
    """
    mesh = mesh or data_mesh()
    step = _step(model, optimizer, loss, mesh)
    unroll = 0 if jax.default_backend() == "cpu" else 1  # 0: no loop, in which a CPU's convolutions are eight times slower

    def steps(state: TrainState, batches: dict, data: Any = None) -> tuple[TrainState, dict[str, jax.Array]]:
        def one(state, batch):
            return step(state, make(data, batch))

        state, metrics = jax.lax.scan(one, whole(state, mesh), batches, unroll=unroll)
        return _checked(state), metrics

    return jax.jit(over(mesh, steps), donate_argnums=0, out_shardings=replicated(mesh))


def _step(model: nn.Module, optimizer: optax.GradientTransformation, loss: Loss, mesh: Mesh) -> Step:
    apply: Callable[..., Any] = model.apply

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = shared(batch, mesh, equally=True)

        def objective(params):
            variables = state.variables | {"params": params}
            logits, updated = apply(variables, batch["image"], train=True, mutable=["batch_stats"])
            losses = loss(logits, batch["label"])
            return losses.mean(), (updated, (logits.argmax(-1) == batch["label"]).sum(dtype=jnp.int32))

        params = state.variables["params"]
        (value, (updated, correct)), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, params)
        variables = state.variables | updated | {"params": optax.apply_updates(params, updates)}
        count = len(batch["label"])
        sums = state.sums | {
            "loss": state.sums["loss"] + value * count,
            "correct": state.sums["correct"] + correct,
            "count": state.sums["count"] + count,
        }
        state = TrainState(state.step + 1, variables, opt_state, sums)
        return _marked(state, jnp.isfinite(value)), {"loss": value, "accuracy": correct / count}

    return step


def _checked(state: TrainState) -> TrainState:
    """`state`, marked if its variables are not finite.

    Once a dispatch: in every step it would be a fifth of the kernels that a GPU starts. Parameters that are not finite spoil
    the next loss anyway.
    """
    return _marked(state, jnp.isfinite(optax.tree.norm(state.variables)))


def _marked(state: TrainState, finite: jax.Array) -> TrainState:
    """`state` with its step as the bad one, unless it is `finite` or an earlier one was."""
    before = state.sums["bad_step"]
    return dataclasses.replace(state, sums=state.sums | {"bad_step": jnp.where(finite | (before > 0), before, state.step)})


def eval_step(model: nn.Module, mesh: Mesh | None = None, make: Make = sent) -> jax.stages.Wrapped:
    """A jitted `(variables, batch, data=None) -> sums` over the images of `make(data, batch)`, by default `batch`.

    `sums` are the `weight`ed `loss`, f32 `[]`, and `confusion`, f32 `[C,C]` indexed `[true, predicted]`. Devices share a
    batch where they can share it equally, as one of `eval_batches`.
    """
    apply: Callable[..., Any] = model.apply
    mesh = mesh or data_mesh()

    def step(variables: dict, batch: dict, data: Any = None) -> dict[str, jax.Array]:
        batch = shared(make(data, batch), mesh)
        logits = apply(whole(variables, mesh), batch["image"], train=False)
        losses = cross_entropy(logits, batch["label"])
        confusion = jnp.zeros((logits.shape[-1],) * 2).at[batch["label"], logits.argmax(-1)].add(batch["weight"])
        return {"loss": (losses * batch["weight"]).sum(), "confusion": confusion}

    return jax.jit(over(mesh, step), out_shardings=replicated(mesh))


def place(batches: Iterable[dict], mesh: Mesh | None = None, *, axis: int = 0) -> Iterator[dict[str, jax.Array]]:
    """Yields `batches` as global arrays, sharded along `axis` over the devices of `mesh`, by default all devices.

    With several processes, each passes only its own devices' slice, as `train_batches` yields it, not the global batch.
    """
    put = partial(jax.make_array_from_process_local_data, split(mesh or data_mesh(), axis))
    for batch in batches:
        yield put(batch)


def evaluate(step: Callable[[dict, dict], dict[str, jax.Array]], variables: dict, batches: Iterable[dict]) -> Row:
    """`loss` and `accuracy` over all images, and the `confusion` matrix i64 `[true, predicted]`; ValueError without any."""
    add, results = partial(jax.tree.map, operator.add), (step(variables, batch) for batch in batches)
    if (first := next(results, None)) is None:
        raise ValueError("there is no batch to evaluate on; give one, of an iterator that is not used up")
    sums = reduce(add, results, first)
    confusion = np.asarray(sums["confusion"]).astype(np.int64)
    count = confusion.sum()
    return {
        "loss": float(sums["loss"]) / int(count),
        "accuracy": int(np.trace(confusion)) / int(count),
        "confusion": confusion,
    }


def fit(
    step: Step,
    state: TrainState,
    batches: Iterable[dict],
    *,
    start: int = 0,
    steps: int,
    epoch_steps: int,
    log_steps: int = 50,
) -> Iterator[tuple[TrainState, list[Row]]]:
    """Trains on placed `batches` from step `start`, that of `state`, to `steps`; yields `(state, rows)` per call of `step`.

    `step` is a `train_step`, or a `train_steps` on several stacked batches. `rows` has one row every `log_steps` steps, with
    that batch's metrics, and one at the end of each epoch (every `epoch_steps` steps, and at `steps`), see `epoch_row`. A
    yielded state is donated when the next is requested. Raises NonFiniteError at the first row after a loss or variables
    that are not finite, ValueError for stacked batches that straddle epochs or go beyond `steps`, and for batches that end
    before.
    """
    number, batches = start, iter(batches)
    batch = next(batches, None) if number < steps else None
    while batch is not None:
        if number % epoch_steps == 0:
            state = dataclasses.replace(state, sums=jax.jit(_no_sums, out_shardings=state.step.sharding)())
        state, metrics = step(state, batch)
        before, number = number, number + metrics["loss"].size
        batch = next(batches, None) if number < steps else None  # now, while the devices work, before they are waited for
        epoch, rows = (number - 1) // epoch_steps + 1, []
        if before // epoch_steps != epoch - 1 or number > steps:
            raise ValueError(f"{number - before} batches after step {before} go beyond its epoch, or step {steps}")
        if logged := range(before + log_steps - before % log_steps, number + 1, log_steps):
            bad, figures = jax.device_get((state.sums["bad_step"], metrics))  # at once: each read alone waits for the device
            for one in (one for one in logged if not bad or one < bad):
                now = {name: float(np.atleast_1d(values)[one - before - 1]) for name, values in figures.items()}
                rows.append({"step": one, "epoch": epoch} | now)
            if bad and rows:
                yield state, rows  # what was still finite, before the error
            check_finite(state)
        if number % epoch_steps == 0 or number == steps:
            rows.append(epoch_row(state, epoch))
        yield state, rows
    if number < steps:
        raise ValueError(f"the batches end at step {number} of {steps}; give one for each step")


def epoch_row(state: TrainState, epoch: int) -> Row:
    """The mean training loss and accuracy since the start of `epoch`; raises NonFiniteError."""
    check_finite(state)
    step, sums = jax.device_get((state.step, state.sums))
    count = int(sums["count"])
    row = {"step": int(step), "epoch": epoch, "train_loss": float(sums["loss"]) / count}
    return row | {"train_accuracy": int(sums["correct"]) / count}


def check_finite(state: TrainState) -> None:
    """Raises NonFiniteError naming `bad_step`, the step of this epoch by which the loss or the variables were not finite."""
    if bad := int(state.sums["bad_step"]):
        raise NonFiniteError(f"the loss or the network is not finite at step {bad}; lower the learning rate")


def _no_sums() -> dict[str, jax.Array]:
    return {"loss": jnp.zeros(())} | {name: jnp.zeros((), jnp.int32) for name in ("correct", "count", "bad_step")}
