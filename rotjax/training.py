"""The train step, the evaluation step and the training loop, the same for pretraining and fine-tuning."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rotjax.parallel import data_mesh, over, replicated, shared, whole
from rotjax.state import TrainState, check_finite, no_sums

Row = dict[str, Any]
Make = Callable[[Any, dict], dict]  # (what lies on the devices, what is sent to them) -> batch
Step = Callable[[TrainState, dict], tuple[TrainState, dict[str, jax.Array]]]
Loss = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [B,C], labels [B]) -> [B]


def sent(data: Any, batch: dict) -> dict:
    """The `make` of batches that arrive complete from the host: the identity."""
    return batch


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """The loss `[B]` of logits `[B,C]`, with a share `smoothing` of each label spread evenly over the C classes.

    That of a label below 0 or from C on, in 32 bits, is NaN. Raises TypeError for labels that are no integers, or not `[B]`.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels are {labels.dtype}; give integers, the numbers of the classes")
    if labels.shape != logits.shape[:-1]:
        raise TypeError(f"labels are {list(labels.shape)} for logits {list(logits.shape)}; give one for each image, [B]")
    labels = labels.astype(jnp.int32)  # of 8 bits it could not be made C, of 32 without a sign not be below 0
    labels = jnp.where(labels < 0, logits.shape[-1], labels)  # optax would count those below 0 from the last class
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (1 - smoothing) * loss - smoothing * jax.nn.log_softmax(logits).mean(-1) if smoothing else loss


def train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh | None = None, *, loss: Loss = cross_entropy
) -> jax.stages.Wrapped:
    """A jitted `(state, batch) -> (state, metrics)`; the input state is donated.

    `batch` is `{'image': u8[B,H,W,3], 'label': i32[B]}`, with labels from 0 on, below the number of logits (the loss of
    others is NaN); `metrics` are the `loss` and `accuracy` of this batch. A `model` is called with `train`, which by
    default is False; it may draw by the name `dropout`, anew in each step from the step's number, and change the collection
    `batch_stats`, no others. An `optimizer` may ask for the `value` of the loss. `mesh` is that of
    `init_state` and `place`, by default all devices. Under one of several devices batch statistics are the whole batch's,
    and each device computes its share; UsageError for a batch that they cannot share equally. One process may leave a batch
    unplaced; with several, pass what `place` yields: an array that nobody placed would be taken for the whole batch, alike
    in all.
    """
    mesh = mesh or data_mesh()
    step = _step(model, optimizer, loss, mesh)

    def one(state: TrainState, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = step(whole(state, mesh), batch)
        return _marked_by_variables(state), metrics

    return jax.jit(over(mesh, one), donate_argnums=0, out_shardings=replicated(mesh))


def train_steps(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
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
        return _marked_by_variables(state), metrics

    return jax.jit(over(mesh, steps), donate_argnums=0, out_shardings=replicated(mesh))


def _step(model: nn.Module, optimizer: optax.GradientTransformation, loss: Loss, mesh: Mesh) -> Step:
    apply: Callable[..., Any] = model.apply
    asks = inspect.signature(optimizer.update).parameters.values()
    asked = any(one.name == "value" or one.kind is one.VAR_KEYWORD for one in asks)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = shared(batch, mesh, equally=True)
        drawn = {"dropout": jax.random.fold_in(jax.random.key(0), state.step)}

        def objective(params):
            variables = state.variables | {"params": params}
            logits, updated = apply(variables, batch["image"], train=True, mutable=["batch_stats"], rngs=drawn)
            losses = loss(logits, batch["label"])
            losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))  # of 16 bits the sum would overflow
            return losses.mean(), (updated, (logits.argmax(-1) == batch["label"]).sum(dtype=jnp.int32))

        params = state.variables["params"]
        (value, (updated, correct)), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        extra = {"value": value} if asked else {}
        updates, opt_state = optimizer.update(gradients, state.opt_state, params, **extra)
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


def _marked_by_variables(state: TrainState) -> TrainState:
    """`state`, marked as `_marked` does where its variables are not finite.

    Once a dispatch: in every step it would be a fifth of the kernels that a GPU starts. Parameters that are not finite spoil
    the next loss anyway.
    """
    return _marked(state, jnp.isfinite(optax.tree.norm(state.variables)))


def _marked(state: TrainState, finite: jax.Array) -> TrainState:
    """`state` with its step as the bad one, unless it is `finite` or an earlier one was."""
    before = state.sums["bad_step"]
    return dataclasses.replace(state, sums=state.sums | {"bad_step": jnp.where(finite | (before > 0), before, state.step)})


def eval_step(model: nn.Module, mesh: Mesh | None = None, *, make: Make = sent) -> jax.stages.Wrapped:
    """A jitted `(variables, batch, data=None) -> sums` over the images of `make(data, batch)`, by default `batch`.

    A batch is that of `train_step` with `weight` f32 `[B]`, as `eval_batches` gives it. `sums` are the weighted `loss`, f32
    `[]`, and `confusion`, f32 `[C,C]` indexed `[true, predicted]`. Devices share a batch where they can share it equally.
    """
    apply: Callable[..., Any] = model.apply
    mesh = mesh or data_mesh()

    def step(variables: dict, batch: dict, data: Any = None) -> dict[str, jax.Array]:
        batch = shared(make(data, batch), mesh)
        logits = apply(whole(variables, mesh), batch["image"], train=False)
        losses = cross_entropy(logits, batch["label"])
        counts = jnp.zeros((logits.shape[-1],) * 2).at[batch["label"], logits.argmax(-1)]
        confusion = counts.add(batch["weight"], wrap_negative_indices=False)
        weighted = jnp.where(batch["weight"] > 0, losses * batch["weight"], 0)  # the loss of padding may be NaN
        return {"loss": weighted.sum(), "confusion": confusion}

    return jax.jit(over(mesh, step), out_shardings=replicated(mesh))


def evaluate(step: Callable[[dict, dict], dict[str, jax.Array]], variables: dict, batches: Iterable[dict]) -> Row:
    """`loss` and `accuracy` over all images by their weights, and the `confusion` matrix i64 `[true, predicted]`, rounded.

    Raises ValueError without a batch, or an image of weight whose label is one of the logits'; others with weight make the
    loss NaN.
    """
    add, results = partial(jax.tree.map, _add), (step(variables, batch) for batch in batches)
    if (first := next(results, None)) is None:
        raise ValueError("there is no batch to evaluate on; give one, of an iterator that is not used up")
    sums = reduce(add, results, first)
    confusion = np.asarray(sums["confusion"], np.float64)
    if not (count := float(confusion.sum())):
        raise ValueError("no image has a label from 0 on, below the number of logits; give the classes that the network has")
    return {
        "loss": float(sums["loss"]) / count,
        "accuracy": float(np.trace(confusion)) / count,
        "confusion": np.rint(confusion).astype(np.int64),
    }


def _add(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x + y` also where the caller has set another mesh than theirs."""
    with jax.sharding.use_abstract_mesh(jax.typeof(x).sharding.mesh):
        return x + y


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
    that batch's metrics, and one at the end of each epoch (every `epoch_steps` steps, and at `steps`), see `epoch_row`. Of
    the calls only the last may be under way still. A yielded state is donated when the next is requested. Raises
    NonFiniteError at the first row after a loss or variables that are not finite, ValueError for stacked batches that
    straddle epochs or go beyond `steps`, for batches that end before, and numbers below 1.
    """
    if log_steps < 1 or epoch_steps < 1:
        raise ValueError(f"log_steps={log_steps} and epoch_steps={epoch_steps} have to be at least 1")
    number, batches = start, iter(batches)
    batch, metrics = next(batches, None) if number < steps else None, {}
    while batch is not None:
        if number % epoch_steps == 0:
            zeros = jax.jit(no_sums, out_shardings=getattr(state.step, "sharding", None))()  # none: arrays of NumPy
            state = dataclasses.replace(state, sums=zeros)
        earlier, (state, metrics) = metrics, step(state, batch)
        before, number = number, number + metrics["loss"].size
        batch = next(batches, None) if number < steps else None  # now, while the devices work, before they are waited for
        jax.block_until_ready(earlier)  # one call ahead keeps the devices at work; with more a signal would wait
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
