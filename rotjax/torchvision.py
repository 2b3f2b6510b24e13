"""Conversion of weights from and to torchvision's state dicts, as NumPy arrays; torch is not needed."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rotjax.errors import UsageError
from rotjax.models import create
from rotjax.state import abstract_variables

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}  # by rank: a vector, a dense kernel, a convolution's HWIO to OIHW
FROM_TORCH = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}


def import_weights(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The variables `{'params', 'batch_stats'}` of our `name` from torchvision's state dict, as NumPy copies of its dtypes.

    Stem, width and number of classes follow from the shapes; `num_batches_tracked` is passed over, as nothing here
    counts batches. The pixels' `mean` and `std` are not in a state dict: say to `create` what the weights were trained
    on. Raises UsageError for an unknown name and for arrays that are missing, unknown or of another shape.
    """
    given = {key: np.asarray(array) for key, array in arrays.items() if not key.endswith(".num_batches_tracked")}
    expected = _expected(name, given)
    return jax.tree.map_with_path(lambda path, _: _transposed(given[_key(name, path)], FROM_TORCH), expected)


def export_weights(name: str, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """torchvision's state dict of our `name`, as writable NumPy arrays of the dtypes in `variables`.

    `load_state_dict(..., strict=True)` takes it, each array through `torch.from_numpy`: where a plain dict has no
    `num_batches_tracked`, which torch reads only in a norm without momentum, the network keeps its own. Torch's networks
    take `(pixels / 255 - mean) / std`, NCHW, with the `mean` and `std` of our classifier, which does that itself; they have
    the imagenet stem and a width of 64. To one that is to take the cifar stem, give a 3x3 convolution of stride 1 as `conv1`
    and `Identity` as `maxpool` (DenseNet: `features.conv0`, `features.pool0`). Raises UsageError as `import_weights` does.
    """
    leaves = jax.tree.leaves_with_path(variables)
    arrays = {_key(name, path): _transposed(np.asarray(leaf), TO_TORCH) for path, leaf in leaves}
    _expected(name, arrays)
    return arrays


def _module(name: str, path: str) -> str:
    """torchvision's name of our module `path`; a path that is none of ours stays as it is."""
    match [name.rstrip("0123456789"), *re.findall(r"\d+|[^\d/]+", path)]:
        case ["resnet", "backbone", "stem", "conv"]:
            return "conv1"
        case ["resnet", "backbone", "stem", "norm"]:
            return "bn1"
        case ["resnet", "backbone", "stage", stage, "block", block, "conv", index]:
            return f"layer{stage}.{int(block) - 1}.conv{index}"
        case ["resnet", "backbone", "stage", stage, "block", block, "norm", index]:
            return f"layer{stage}.{int(block) - 1}.bn{index}"
        case ["resnet", "backbone", "stage", stage, "block", block, "shortcut_conv"]:
            return f"layer{stage}.{int(block) - 1}.downsample.0"
        case ["resnet", "backbone", "stage", stage, "block", block, "shortcut_norm"]:
            return f"layer{stage}.{int(block) - 1}.downsample.1"
        case ["resnet", "head"]:
            return "fc"
        case ["densenet", "backbone", "stem", kind]:
            return f"features.{kind}0"
        case ["densenet", "backbone", "stage", stage, "layer", layer, kind, index]:
            return f"features.denseblock{stage}.denselayer{layer}.{kind}{index}"
        case ["densenet", "backbone", "stage", stage, "transition", kind]:
            return f"features.transition{int(stage) - 1}.{kind}"
        case ["densenet", "backbone", "stage", "4", "norm"]:
            return "features.norm5"
        case ["densenet", "head"]:
            return "classifier"
    return path


def _key(name: str, path: tuple) -> str:
    """torchvision's key of the leaf at `path` of our variables."""
    _, _, path_in_collection = jax.tree_util.keystr(path, simple=True, separator="/").partition("/")
    module, _, leaf = path_in_collection.rpartition("/")
    return f"{_module(name, module)}.{LEAVES.get(leaf, leaf)}"


def _transposed(array: np.ndarray, axes: dict[int, tuple[int, ...]]) -> np.ndarray:
    """A contiguous copy: a torch state dict shares memory with its network, and torch asks for writable arrays."""
    return np.array(array.transpose(axes.get(array.ndim, range(array.ndim))), order="C")


def _expected(name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The abstract variables of the `name` that `arrays`, under torchvision's keys, are; UsageError if they are none."""
    stem, head = (np.shape(arrays.get(f"{_module(name, path)}.weight", ())) for path in ("backbone/stem/conv", "head"))
    width, _, _, size = stem if len(stem) == 4 and stem[0] > 1 else (64, 3, 7, 7)  # a DenseNet of width 1 cannot grow
    num_classes, _ = head if len(head) == 2 else (1000, None)
    kind = "cifar" if size == 3 else "imagenet"
    variables = abstract_variables(create(name, num_classes, kind, width=width), 32)
    expected = {
        _key(name, path): tuple(leaf.shape[axis] for axis in TO_TORCH[leaf.ndim])
        for path, leaf in jax.tree.leaves_with_path(variables)
    }
    given = {key: array.shape for key, array in arrays.items()}
    if odd := [key for key in expected | given if expected.get(key) != given.get(key)]:
        first = "; ".join(f"{key} is {_say(given.get(key))}, should be {_say(expected.get(key))}" for key in odd[:2])
        network = f"{name} ({kind} stem, {num_classes} classes)"
        raise UsageError(f"the arrays are not those of {network}: {len(odd)} at fault, first {first}")
    return variables


def _say(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
