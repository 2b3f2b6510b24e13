"""Arrays to batches, the only code that uses Grain: each element of a dataset is a whole batch, a function of its index."""

import operator
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import grain
import numpy as np

from rotjax import parallel
from rotjax.data import tasks
from rotjax.data.augmentation import eval_view, train_view
from rotjax.data.dataset import Arrays, check_arrays, check_fits, native, unlabelled
from rotjax.errors import UsageError

Batches = grain.MapDataset[Arrays]


def train_batches(
    data: Arrays,
    task: tasks.Task,
    batch_size: int,
    steps: int,
    *,
    seed: int,
    flip: bool = True,
    cutout: float = 0.0,
    share: slice | None = None,
) -> Batches:
    """A Grain dataset of `steps` training batches: the `train_view` of each of `train_picks`.

    `flip` mirrors half of the images; `cutout` is the side of a grey square in each, as a share of the image's. Rotations
    need no labels. Raises TypeError as `check_arrays` does and where labels are missing, UsageError where some are negative,
    to classify by, or beyond 32 bits, and for a `cutout` out of range; see `train_picks`.
    """
    if not 0 <= cutout <= 1:
        raise UsageError(f"cutout={cutout} is out of range; it is a share of the image's side, at least 0 and at most 1")
    data = _checked(data, task)
    picks = train_picks(len(data["image"]), batch_size, steps, seed=seed, share=share)
    return viewed(data, picks, partial(train_view, task=task, flip=flip, cutout=cutout))


def train_picks(count: int, batch_size: int, steps: int, *, seed: int, share: slice | None = None) -> Batches:
    """The picks for `train_view`: which of `count` images are in batch `t` of `steps`.

    The images are reshuffled on every pass (epoch) over the data; batches may straddle passes. `share` is the slice of each
    global batch to return, by default the one that this process passes to `place`. Raises UsageError where a batch is
    larger than the data, or for a seed that is not of 32 bits.
    """
    check_fits(batch_size, count)
    seed = _seed(seed)
    share = _own(batch_size) if share is None else share

    def pick(step: int) -> Arrays:
        epoch, place = np.divmod(np.int64(step) * batch_size + np.arange(batch_size)[share], count)
        index = np.concatenate([_order(seed, count, e)[place[epoch == e]] for e in np.unique(epoch).tolist()])
        return _pick(seed, epoch, index)

    return grain.MapDataset.range(steps).map(pick)


def eval_batches(
    data: Arrays, task: tasks.Task, batch_size: int, *, seed: int = 0, epoch: int = 0, share: slice | None = None
) -> Batches:
    """A Grain dataset of evaluation batches: every image once, in order, unaugmented; the last is padded with weight 0.

    `seed` and `epoch` decide random turns alone. Rotations need no labels. Raises TypeError and UsageError as
    `train_batches`, but a batch may be larger than the data.
    """
    data = _checked(data, task)
    picks = eval_picks(len(data["image"]), batch_size, seed=seed, epoch=epoch, share=share)
    return viewed(data, picks, partial(eval_view, task=task))


def eval_picks(count: int, batch_size: int, *, seed: int, epoch: int, share: slice | None = None) -> Batches:
    """The picks for `eval_view`: each of `count` images once, in order; the last batch is padded with `weight` 0.

    Raises UsageError for a batch size or a seed out of range.
    """
    check_fits(batch_size)
    seed = _seed(seed)
    share = _own(batch_size) if share is None else share

    def pick(number: int) -> Arrays:
        index = np.arange(number * batch_size, (number + 1) * batch_size)[share]
        weight = (index < count).astype(np.float32)
        return _pick(seed, np.full_like(index, epoch), np.minimum(index, count - 1)) | {"weight": weight}

    return grain.MapDataset.range(-(-count // batch_size)).map(pick)


def _seed(seed: Any) -> int:
    """`seed`, an integer of any kind; UsageError for others."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**32:
        raise UsageError(f"seed={seed!r} is out of range; it is an integer, at least 0 and below {2**32:,}")
    return number


def viewed(data: Arrays, picks: Batches, view: Callable[[Arrays, Arrays], Arrays]) -> Batches:
    """The batches `view(data, pick)`."""
    return picks.map(partial(view, data))


def _checked(data: Arrays, task: tasks.Task) -> Arrays:
    """`data`, with placeholder labels if it has none and `task` needs none."""
    check_arrays(data)
    if "label" in data:
        if task is tasks.classify and np.min(data["label"], initial=0) < 0:
            raise UsageError("there are labels below 0, of images without a class; leave these out, or give another task")
        if int(np.max(data["label"], initial=0)) >= 2**31:
            raise UsageError("there are labels from 2,147,483,648 on, more than 32 bits hold; give the numbers of classes")
        return {**data, "label": native(data["label"])}
    if task is tasks.classify:
        raise TypeError("images have no 'label', i32 [N], to be classified by; give it, or another task")
    return {**data, "label": unlabelled(len(data["image"]))}


def read(batches: Batches, *, start: int = 0, threads: int = 0, ahead: int = 2) -> grain.DatasetIterator[Arrays]:
    """An iterator from batch `start`, to be closed; `threads` prefetch `ahead` batches, at least one each (0: none, best on
    a CPU)."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads) if threads else 0)
    return iter(batches[start:].to_iter_dataset(options))


def _own(batch_size: int) -> slice:
    return parallel.share(batch_size, parallel.data_mesh())


def _pick(seed: int, epoch: np.ndarray, index: np.ndarray) -> Arrays:
    seeds = np.full(index.shape, seed, np.uint32)  # data, not part of the program: another seed compiles nothing anew
    return {"seed": seeds, "epoch": epoch.astype(np.int32), "index": index.astype(np.int32)}


@lru_cache(maxsize=4)  # not within `train_picks`, of which Grain's workers get a pickle
def _order(seed: int, count: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
