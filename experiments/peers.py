"""What rotjax is compared with: torchvision's networks by PyTorch, and Grain's pipeline as one would first write it."""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from rotjax.data.dataset import Arrays
from rotjax.models.classifier import CIFAR10_MEAN, CIFAR10_STD

LIBRARIES = []  # of torch's operators, whose definitions live as long as they do

MODES = ("default", "reduce-overhead")  # of torch.compile; the second replays CUDA graphs, else each kernel costs a launch

Timed = Callable[[int], float]  # count -> seconds that so many take


def timed(step: Callable[[], Any], wait: Callable[[Any], Any]) -> Timed:
    """The seconds of so many calls of `step`, until `wait` for what the last one returned is over."""

    def seconds(count: int) -> float:
        began, last = time.perf_counter(), None
        for _ in range(count):
            last = step()  # what came before is not kept: some results are large
        wait(last)
        return time.perf_counter() - began

    return seconds


def networks() -> Any:
    """`torchvision.models`, also where torch's build is not the one that torchvision's compiled operators are for."""
    import torch

    try:
        import torchvision
    except RuntimeError:  # it registers properties of operators that nobody has defined
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARIES.append(library)
        import torchvision
    return torchvision.models


def accelerator() -> str:
    """Where PyTorch computes: a GPU if it has one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_step(name: str, stem: str, batch: Arrays, *, dtype: str = "float32", mode: str | None = None) -> Timed:
    """PyTorch's train steps on a resident batch: channels_last, AdamW, autocast to `dtype`, eager or compiled in a `mode`.

    Raises ImportError without torch and torchvision.
    """
    import torch

    device = accelerator()
    torch.backends.cudnn.benchmark = True
    model = stemmed(getattr(networks(), name)(num_classes=4), stem)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=device == "cuda")
    images = torch.from_numpy(batch["image"].transpose(0, 3, 1, 2).copy()).to(device, memory_format=torch.channels_last)
    labels = torch.from_numpy(batch["label"].astype(np.int64)).to(device)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (CIFAR10_MEAN, CIFAR10_STD))

    def loss() -> Any:
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            return torch.nn.functional.cross_entropy(model((images - mean) / std), labels)

    forward: Any = loss
    if mode:
        torch._dynamo.reset()  # it knows functions by their code, and would compile for any batch size from the second on
        inductor: Any = torch._inductor
        inductor.config.force_layout_optimization = True  # or torch 2.13 lets the gradients leave channels_last
        forward = torch.compile(loss, dynamic=False, mode=mode)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward().backward()
        optimizer.step()

    return timed(step, _synchronize)


def torch_convolutions(maps: Sequence[np.ndarray]) -> Timed:
    """PyTorch's 3x3 convolution of each `[B,H,W,C]` to as many channels, channels_last; raises ImportError without torch."""
    import torch

    device = accelerator()
    inputs = [torch.from_numpy(one).to(device).permute(0, 3, 1, 2) for one in maps]
    kernels = [
        torch.ones(channels, channels, 3, 3, device=device).to(memory_format=torch.channels_last)
        for channels in (one.shape[1] for one in inputs)
    ]

    def convolve() -> None:
        for one, kernel in zip(inputs, kernels, strict=True):
            torch.nn.functional.conv2d(one, kernel, padding=1)

    return timed(convolve, _synchronize)


def _synchronize(_: None) -> None:
    """Waits for torch's GPU, if it has one."""
    import torch

    if accelerator() == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    """Gives the memory of a GPU back that torch keeps of steps which are gone."""
    if torch := sys.modules.get("torch"):
        gc.collect()
        torch.cuda.empty_cache()


def stemmed(model: Any, stem: str) -> Any:
    """torchvision's network with a 3x3 convolution of stride 1 in place of its stem where `stem` is cifar."""
    import torch

    if stem == "cifar":
        first, dense = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), hasattr(model, "features")
        mode = "fan_in" if dense else "fan_out"  # torchvision's of all its convolutions
        torch.nn.init.kaiming_normal_(first.weight, mode=mode, nonlinearity="relu")
        if dense:
            model.features.conv0, model.features.pool0 = first, torch.nn.Identity()
        else:
            model.conv1, model.maxpool = first, torch.nn.Identity()
    return model


def naive_batches(data: Arrays, batch_size: int, options: grain.ReadOptions | None) -> grain.DatasetIterator[Arrays]:
    """Crop, flip and random rotation an image at a time, batched by Grain and read as `options` say, or its defaults."""

    def augment(element: dict, rng: np.random.Generator) -> dict:
        image, turn = augmented(element["image"], rng), int(rng.integers(4))
        return {"image": np.rot90(image, turn).copy(), "label": np.int32(turn)}

    elements = [{"image": image} for image in data["image"]]
    dataset = grain.MapDataset.source(elements).seed(0).shuffle().repeat().random_map(augment).batch(batch_size)
    return iter(dataset.to_iter_dataset(options))


def augmented(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A crop of the image padded with black by an eighth, 4 pixels of 32, and a flip."""
    size, padding = len(image), len(image) // 8
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    row, column = rng.integers(0, 2 * padding + 1, 2)
    crop = padded[row : row + size, column : column + size]
    return crop[:, ::-1] if rng.random() < 0.5 else crop
