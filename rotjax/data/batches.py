"""Arrays to batches, the only code that knows Grain: one element of a dataset is one batch, a function of its number."""

from functools import lru_cache, partial

import grain
import numpy as np

from rotjax.data import tasks
from rotjax.data.augmentation import below, crop_and_flip, draw
from rotjax.errors import UsageError

EVERYTHING = slice(None)
Arrays = dict[str, np.ndarray]  # 'image' u8 [N,H,H,3], 'label' i32 [N]; evaluation batches have 'weight' f32 [B] too


def train_batches(
    data: Arrays,
    task: tasks.Task,
    batch_size: int,
    steps: int,
    *,
    seed: int,
    flip: bool = True,
    share: slice = EVERYTHING,
) -> grain.MapDataset[Arrays]:
    """Batch `t` of `steps`: `batch_size` images, cropped, mirrored or not where `flip`, then given to the task.

    Images come in a new order on every pass (epoch) over the data, and batches straddle passes. The crop's padding is an
    eighth of the image, 4 pixels of 32. `share` is what of each batch is wanted here. Raises UsageError where a batch is
    larger than the data.
    """
    count, size = data["image"].shape[:2]
    check_fits(batch_size, count)
    padding = size // 8
    order = lru_cache(maxsize=2)(partial(_order, seed, count))

    def batch(step: int) -> Arrays:
        epoch, place = np.divmod(np.int64(step) * batch_size + np.arange(batch_size)[share], count)
        index = np.concatenate([order(e)[place[epoch == e]] for e in np.unique(epoch).tolist()])
        words = partial(draw, seed=seed, epoch=epoch, index=index)
        rows, columns = (below(2 * padding + 1, words(stream)) for stream in (tasks.ROWS, tasks.COLUMNS))
        flips = words(tasks.FLIPS) >> 31 if flip else np.zeros_like(index)
        images = crop_and_flip(data["image"][index], rows, columns, flips, padding)
        images, labels = task(images, data["label"][index], words)
        return {"image": images, "label": labels}

    return grain.MapDataset.range(steps).map(batch)


def check_fits(batch_size: int, count: int) -> None:
    """Raises UsageError where a batch has more images than the `count` that there are to train on."""
    if not 0 < batch_size <= count:
        raise UsageError(f"batch_size={batch_size} is larger than the training set of {count:,} images; lower it")


def test_batches(
    data: Arrays, task: tasks.Task, batch_size: int, *, seed: int = 0, epoch: int = 0, share: slice = EVERYTHING
) -> grain.MapDataset[Arrays]:
    """Every image once, in order, as it is, given to the task; the last batch is padded with images of weight 0."""
    count = len(data["label"])

    def batch(number: int) -> Arrays:
        index = np.arange(number * batch_size, (number + 1) * batch_size)[share]
        weight = (index < count).astype(np.float32)
        index = np.minimum(index, count - 1)
        words = partial(draw, seed=seed, epoch=epoch, index=index)
        images, labels = task(data["image"][index], data["label"][index], words)
        return {"image": images, "label": labels, "weight": np.repeat(weight, len(labels) // len(index))}

    return grain.MapDataset.range(-(-count // batch_size)).map(batch)


def read(batches: grain.MapDataset[Arrays], *, start: int = 0, threads: int = 0) -> grain.DatasetIterator[Arrays]:
    """Iterates from batch `start`; `threads` read two batches ahead, 0 where the host computes the steps too. Close it."""
    ahead = 2 if threads else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return iter(batches[start:].to_iter_dataset(options))


def _order(seed: int, count: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
