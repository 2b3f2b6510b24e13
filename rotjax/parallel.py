"""Arrays on a mesh of devices: state on all of them, batches split among them. One device is the smallest mesh."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rotjax.errors import UsageError


def data_mesh(devices: Sequence | None = None) -> Mesh:
    """A mesh with one axis, `data`, over `devices`, by default all."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis shared out among the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises UsageError where the devices cannot share a batch equally."""
    if batch_size % mesh.size:
        nearest = max(1, round(batch_size / mesh.size)) * mesh.size
        raise UsageError(f"batch_size {batch_size} cannot be shared among {mesh.size} devices; use {nearest}")
