"""How batches reach the devices, with the same bytes either way: made on the host, or on the devices from images
resident there; one or several per dispatch."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from rotjax.data.batches import Batches, viewed
from rotjax.data.dataset import Arrays
from rotjax.errors import UsageError, check_integer
from rotjax.parallel import replicated
from rotjax.planning import Plan
from rotjax.processes import highest
from rotjax.training import Make, sent

log = logging.getLogger(__name__)

Where = Literal["host", "device"]

STEPS = 32  # a dispatch: enough to hide what one costs the host
SENT = 2**25  # bytes with one dispatch
MOST, COPIES = 1024, 8  # steps of a dispatch, or threads, that may be asked for; on a CPU each step is compiled by itself
ROOM = 4  # the images may take one part in so many of a device's memory


@dataclass(frozen=True)
class Stream:
    """`elements`, one per batch; on the devices each becomes the batch `make(data, element)`."""

    elements: Batches
    make: Make
    data: Any


@dataclass(frozen=True)
class Feed:
    """Where batches are made, how many steps `per_dispatch`, and how many `threads` read ahead (0: the caller's)."""

    augment: Where
    per_dispatch: int
    threads: int

    def put(self, data: Arrays, mesh: Mesh) -> Any:
        """`data` on the host or on the devices, where batches are made."""
        if self.augment == "host":
            return data
        return jax.make_array_from_process_local_data(replicated(mesh), data)

    def stream(self, picks: Batches, view: Make, data: Any) -> Stream:
        """The batches `view(data, pick)`, for `data` from `put`."""
        if self.augment == "host":
            return Stream(viewed(data, picks, view), sent, None)
        return Stream(picks, view, data)


def check(per_dispatch: int | None, threads: int | None) -> None:
    """Raises UsageError for a number out of range."""
    together = COPIES if jax.default_backend() == "cpu" else MOST
    for name, value, least, most in (("steps_per_dispatch", per_dispatch, 1, together), ("threads", threads, 0, MOST)):
        if value is None:
            continue
        check_integer(name, value)
        if not least <= value <= most:
            raise UsageError(f"{name}={value} is out of range; it is at least {least} and here at most {most}")


def choose(plan: Plan, augment: Where | None, per_dispatch: int | None, threads: int | None) -> Feed:
    """The feed of a run, the same in all processes, with None replaced by what suits the devices; raises as `check` does.

    A CPU makes batches as it trains, one step a dispatch: a loop of steps would be slow there, see `train_steps`.
    """
    if augment not in (None, *get_args(Where)):
        raise UsageError(f"augment={augment} is none of {', '.join(get_args(Where))}; give one of them")
    check(per_dispatch, threads)
    cpu, epoch = jax.default_backend() == "cpu", min(plan.epoch_steps, plan.steps)
    hosted = highest(augment is None and (cpu or not _fit(plan)))  # asked by all: one may have been told, another not
    if hosted and augment is None and not cpu:
        log.info("the host makes the batches: the devices do not say that they have four times the memory of the images")
    augment = augment or ("host" if hosted else "device")
    if per_dispatch is None:
        on_host, picked = plan.recipe.views * plan.data.train["image"][0].nbytes, plan.recipe.batch_size * 12
        size = on_host if augment == "host" else picked
        most = 1 if cpu else max(1, min(STEPS, epoch, SENT // size))
        numbers = range(1, most + 1)  # that divide an epoch with the fewest dispatches, and then with one program for all
        per_dispatch = min(numbers, key=lambda number: (sum(divmod(epoch, number)), epoch % number > 0))
    return Feed(augment, min(per_dispatch, epoch), (0 if cpu else 1) if threads is None else threads)


def _fit(plan: Plan) -> bool:
    """Whether the images leave enough of a device's memory for training."""
    images = plan.data.train["image"].nbytes + plan.data.test["image"].nbytes
    return ROOM * images <= (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def sizes(start: int, steps: int, epoch_steps: int, per_dispatch: int) -> Iterator[int]:
    """Yields the number of steps of each dispatch from step `start` to `steps`: `per_dispatch`, or one.

    Every epoch is divided alike, from its first step on, whichever step a run resumes from: the same step is computed by
    the same program, on a CPU to the same bits.
    """
    while start < steps:
        place = start % epoch_steps
        whole = place % per_dispatch == 0 and per_dispatch <= min(epoch_steps - place, steps - start)
        yield (size := per_dispatch if whole else 1)
        start += size


def programs(start: int, steps: int, epoch_steps: int, per_dispatch: int) -> set[int]:
    """The values that `sizes` yields."""
    found = set()
    for size in sizes(start, steps, epoch_steps, per_dispatch):
        found.add(size)
        if found == {1, per_dispatch}:
            break
    return found


def stacked(elements: Iterable[Arrays], sizes: Iterable[int]) -> Iterator[Arrays]:
    """Yields groups of `elements`, as many as each of `sizes`, stacked along a new leading axis."""
    elements = iter(elements)
    for size in sizes:
        yield jax.tree.map(lambda *arrays: np.stack(arrays), *islice(elements, size))
