"""The rows of the benchmark: ratios of rotjax to a peer or a floor, and what each is to be."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import grain

from experiments import overheads, speed
from rotjax.feed import Where

BOTH, GPU = ("cpu", "gpu"), ("gpu",)


@dataclass(frozen=True)
class Row:
    """`ours / theirs`, which is to be at least or at most `goal`; `sides` prepares what measures each once."""

    name: str
    ratio: str
    goal: float
    at_least: bool
    sides: Callable[[], speed.Sides]
    unit: str = "images/s"
    kinds: tuple[str, ...] = ("cpu",)  # of devices that it is for; without a GPU nothing is measured that is for one alone

    def met(self, ratio: float) -> bool:
        return ratio >= self.goal if self.at_least else ratio <= self.goal


def _torch(name: str, network: str, stem: str, goal: float) -> Row:
    what = f"train step, {network}, {stem} stem at 32 px: rotjax / PyTorch, eager and channels_last"
    return Row(name, what, goal, True, partial(speed.train_and_torch, network, stem))


def _compiled(network: str, batch_size: int) -> Row:
    what = f"train step, {network}, cifar stem, bfloat16, batch {batch_size}: rotjax / torch.compile"
    sides = partial(speed.train_and_torch, network, "cifar", batch_size, "bfloat16", compiled=True)
    return Row(f"l-{network}-{batch_size}", what, 1.0, True, sides, kinds=GPU)


def _floor(network: str, goal: float) -> Row:
    what = f"train step, {network}, cifar stem, bfloat16, batch 512 / its arithmetic plus its traffic, unfused, at the peaks"
    return Row(f"k-{network}", what, goal, False, partial(speed.step_and_floor, network), "s", GPU)


def _pipeline(name: str, how: str, options: grain.ReadOptions | None) -> Row:
    what = f"crop, flip and turn on one core / an image at a time by Grain, {how}"
    return Row(name, what, 25.0, True, partial(speed.pipelines, options))


def _hosted(augment: Where) -> Row:
    what = f"the host's part, on one core, of batches made on the {augment} / train step"
    return Row(f"f-{augment}", what, 2.0, True, partial(speed.pipeline_and_step, augment), kinds=GPU)


def _small(side: int) -> Row:
    what = f"train steps, resnet18, imagenet stem: maps of up to {side} px by products of matrices / by cuDNN's convolutions"
    sides = partial(speed.products_and_convolutions_of_small_maps, side)
    return Row(f"l-products-{side}", what, 1.0, True, sides, kinds=GPU)


NETWORKS = {"resnet18": 2.0, "resnet50": 1.8, "resnet101": 1.8, "densenet121": 2.2}  # and the goal over the floor
ROWS = (
    _torch("a", "resnet18", "imagenet", 1.0),
    _torch("b", "densenet121", "imagenet", 0.9),
    _torch("c", "resnet18", "cifar", 0.8),
    Row(
        "c-products",
        "matrix products as large as row c's 3x3 convolutions, by XLA / PyTorch's convolutions",
        0.8,
        True,
        speed.products_and_convolutions,
        "GFLOP/s",
    ),
    Row(
        "d",
        "epoch by the command's loop / bare steps on a resident batch",
        0.95,
        True,
        overheads.epoch_and_steps,
        kinds=BOTH,
    ),
    _pipeline("e", "as it reads by default, on any core", None),
    _pipeline("e-unthreaded", "without threads, on one core", grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
    _hosted("host"),
    _hosted("device"),
    Row(
        "g-time",
        "time of a step that trains the last block / of one that trains all",
        0.6,
        False,
        speed.frozen_and_full,
        "s an image",
        BOTH,
    ),
    Row(
        "g-flops",
        "operations of a step that trains the last block / of all",
        0.6,
        False,
        speed.frozen_and_full_flops,
        "FLOPs",
        BOTH,
    ),
    Row("h", "evaluation / training", 2.5, True, speed.evaluation_and_training, kinds=BOTH),
    Row("i", "blocked by a checkpoint / synchronous save", 0.3, False, overheads.saves, "s", BOTH),
    Row("j", "second / first start to the first step, densenet121", 0.4, False, overheads.starts, "s", BOTH),
    *(_floor(network, goal) for network, goal in NETWORKS.items()),
    *(_compiled(network, batch_size) for network in NETWORKS for batch_size in (128, 512)),
    Row(
        "l-graphs",
        "train steps, resnet18, imagenet stem: whole dispatches as CUDA graphs / graphs as XLA makes them by default",
        1.0,
        True,
        speed.graphs_and_default,
        kinds=GPU,
    ),
    *(_small(side) for side in (1, 2, 4)),
    Row(
        "m",
        "row 1 of the report, 45 epochs, from the shell to its summary / one second",
        40.0,
        False,
        overheads.whole_run,
        "s",
        GPU,
    ),
)
