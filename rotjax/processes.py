"""The processes of a run: how they find each other, agree, and tell that one of them is gone.

One process agrees with itself. They run the same program; whatever only one of them knows (the files, the clock, a signal,
an error) they make known to all at the same point, or they would part.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import glob

import jax
import numpy as np
from jax.experimental import multihost_utils

from rotjax.errors import DesertedError, FellowError, Stopped, UsageError, reason

LOST = {"UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED"}  # what a broken link is to JAX, or one of
VAGUE = {"UNKNOWN", "INTERNAL"}  # which faults of a GPU are too, where these words are not in it
LINKS = re.compile("gloo|nccl|connection|socket|coordination", re.IGNORECASE)
PATIENCE = 30  # seconds that a process may be silent before the others take it for dead


def join() -> None:
    """Joins the processes that a cluster, or the environment, names; to be called before anything else asks for devices.

    JAX finds SLURM, Open MPI, Kubernetes and TPU pods by itself; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say it. Raises UsageError where nothing does, or JAX has no device.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM from us, and knows no SIGINT
    try:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            local_device_ids=own_gpus(os.environ),
            heartbeat_timeout_seconds=PATIENCE,
            shutdown_timeout_seconds=PATIENCE,
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"no other processes are found ({reason(error)}); start it by srun or mpirun, or set"
            " JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    check_devices()
    highest(0)  # the first collective waits 30 s for the others, later ones for as long as one of them decodes images


def own_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that this process sees are its own; None leaves it to JAX.

    Under SLURM and Open MPI JAX gives each process the one GPU of its place on the node. But the only process of a node has
    all of them, and where the launcher shows each process its own alone (`--gpus-per-task`) these are numbered from 0.
    """
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    count = len(glob("/dev/nvidia[0-9]*") if shown is None else [one for one in shown.split(",") if one])
    tasks, nodes = (environment.get(name) for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES"))
    only = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or ("SLURM_LOCALID" in environment and tasks == nodes)
    bound = count == 1 or environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == str(count)
    return list(range(count)) if count and (only or bound) and "JAX_LOCAL_DEVICE_IDS" not in environment else None


def check_devices() -> None:
    """Raises UsageError where JAX has no device of those that it is asked for."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # the first, without a word, where there is no GPU
        said = " ".join(str(error).split())[:100] or "it sees none"
        asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        raise UsageError(
            f"JAX finds no device for {asked} ({said}); install jax[cuda12] or jax[tpu] (uv run --extra cuda12), or unset it"
        ) from error


def alone() -> bool:
    return jax.process_count() == 1


def primary() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def highest(value: int) -> int:
    """The maximum of `value` over all processes; a collective."""
    return value if alone() else int(multihost_utils.process_allgather(np.int32(value)).max())


def of_primary(value: int) -> int:
    """The non-negative `value` of the process that writes files; a collective."""
    return highest(value if primary() else -1)


def alike(words: str) -> bool:
    """Whether `words` are the same in all processes; a collective."""
    digest = np.frombuffer(hashlib.sha256(words.encode()).digest(), np.uint32)
    return alone() or bool((multihost_utils.process_allgather(digest) == digest).all())


@contextmanager
def together() -> Iterator[None]:
    """A block that processes leave together; if one of them fails in it, the others raise FellowError; a collective."""
    try:
        yield
    except BaseException as error:
        highest(Stopped.exit_code if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1))
        raise
    if code := highest(0):
        raise FellowError(code)


def lost(error: Exception) -> bool:
    """Whether `error` is what JAX raises here when another process has died."""
    if not isinstance(error, (jax.errors.JaxRuntimeError, ValueError)):  # as the step was under way or to start
        return False
    code = str(error).partition(":")[0]
    return (code in LOST or (code in VAGUE and bool(LINKS.search(str(error))))) and not alone()  # it asks for devices: last


@contextmanager
def deserted() -> Iterator[None]:
    """Turns what JAX raises here when another process has died into DesertedError."""
    try:
        yield
    except Exception as error:
        if not lost(error):
            raise
        raise DesertedError(
            f"another process of this run is gone ({reason(error)}); start all again, they resume from the last checkpoint"
        ) from error


def _number(name: str) -> int | None:
    return int(os.environ[name]) if name in os.environ else None
