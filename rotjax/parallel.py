"""Meshes and shardings over the devices of one or many processes: state replicated, batches split.

One device is the smallest mesh.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rotjax.errors import UsageError


def data_mesh(devices: Sequence | None = None) -> Mesh:
    """A mesh with one axis, `data`, over `devices`, by default all, those of a process beside each other."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id)) if devices is None else devices
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(_automatic(mesh), PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Array axis `axis` sharded over all devices, across all axes of `mesh`."""
    return NamedSharding(_automatic(mesh), PartitionSpec(*[None] * axis, mesh.axis_names))


def _automatic(mesh: Mesh) -> Mesh:
    """`mesh` with automatic axes: those of `jax.make_mesh` are explicit."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def over(mesh: Mesh, function: Callable) -> Callable:
    """`function`, traced over `mesh` also where the caller has set one of the same devices whose axes are explicit.

    Raises UsageError for arrays on a mesh of other axes, where these are explicit. Within `jax.shard_map` each device has a
    call of its own, and there is nothing to distribute.
    """

    @wraps(function)
    def traced(*args, **kwargs):
        if _in_shard_map():
            return function(*args, **kwargs)
        for axes in {jax.typeof(x).sharding.mesh.axis_names for x in jax.tree.leaves(args) if _is_explicit(x)}:
            if axes != mesh.axis_names:
                meshes = f"arrays lie on a mesh of axes {', '.join(axes)}, this is for one of {', '.join(mesh.axis_names)}"
                raise UsageError(f"{meshes}; pass the one `mesh=` to init_state, place and the step")
        with jax.sharding.use_abstract_mesh(_automatic(mesh).abstract_mesh):
            return function(*args, **kwargs)

    return traced


def whole(tree: Any, mesh: Mesh) -> Any:
    """`tree` as a function traced `over` a mesh has it, without the explicit axes of arrays that were made under some."""

    def taken(x):
        return jax.lax.with_sharding_constraint(x, replicated(mesh)) if _is_explicit(x) else x

    return jax.tree.map(taken, tree)


def _is_explicit(x: Any) -> bool:
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def shared(batch: dict, mesh: Mesh, equally: bool = False) -> dict:
    """`batch` as a function traced `over` a mesh has it, split wherever its arrays lie.

    What the devices cannot share `equally` stays whole, or if it has to be, raises as `check_batch` does.
    """

    def part(x):
        equal = jnp.ndim(x) and len(x) % mesh.size == 0
        return jax.lax.with_sharding_constraint(x, split(mesh)) if equal else x

    if _in_shard_map():
        return batch
    if equally:
        check_batch(len(batch["image"]), mesh.size)
    return jax.tree.map(part, batch)


def _in_shard_map() -> bool:
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def check_batch(batch_size: int, devices: int) -> None:
    """Raises UsageError where so many `devices` cannot share a batch equally, or it is empty."""
    if batch_size < 1 or batch_size % devices:
        nearest = max(1, round(batch_size / devices)) * devices
        raise UsageError(f"batch_size={batch_size} cannot be shared among {devices} devices; use {nearest}")


def abstract(tree: Any, mesh: Mesh) -> Any:
    """The shapes and dtypes of `tree`, replicated over `mesh`: what a checkpoint is loaded as."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree)


def share(batch_size: int, mesh: Mesh) -> slice:
    """The slice of a global batch for this process's devices; ValueError if they are not contiguous in `mesh`.

    UsageError for a batch that the devices of several processes cannot share equally.
    """
    own = [number for number, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    if own != list(range(own[0], own[-1] + 1)):
        raise ValueError("the devices of a process are not beside each other in this mesh; order them as data_mesh does")
    if len(own) < mesh.size:
        check_batch(batch_size, mesh.size)
    return slice(own[0] * batch_size // mesh.size, (own[-1] + 1) * batch_size // mesh.size)


def place(batches: Iterable[dict], mesh: Mesh | None = None, *, axis: int = 0) -> Iterator[dict[str, jax.Array]]:
    """Yields `batches` as global arrays, sharded along `axis` over the devices of `mesh`, by default all devices.

    On a CPU their arrays may be shared, not copied. With several processes, each passes only its own devices' slice, as
    `train_batches` yields it, not the global batch. UsageError for a batch that the devices cannot share equally, or whose
    arrays are of several lengths or none.
    """
    mesh = mesh or data_mesh()
    put = partial(jax.make_array_from_process_local_data, split(mesh, axis))
    for batch in batches:
        own = _length(batch, axis)
        check_batch(own * mesh.size // max(len(mesh.local_devices), 1), mesh.size)
        yield put(batch)


def _length(batch: dict, axis: int) -> int:
    """The number of images of `batch`; UsageError where its arrays have others, or none."""
    lengths = {name: np.shape(values)[axis] if np.ndim(values) > axis else None for name, values in batch.items()}
    length, *others = set(lengths.values()) or {None}
    if others or length is None:
        odd = ", ".join(f"{'no' if one is None else one} {name}" for name, one in lengths.items())
        raise UsageError(f"a batch has {odd or 'no arrays'}; give it one entry of each for every image")
    return length
