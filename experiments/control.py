"""A run of `experiments.reproduce` by PyTorch, on the same data and from the same weights: `python -m experiments.control`.

Network, optimizer, schedule and augmentation are torchvision's, torch's and written anew here, so that a figure which
rotjax and its control share comes from the data or the recipe, not from the port. Needs torch and torchvision.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rotjax
from experiments import command, tables
from experiments.flags import DataDir, ResultsDir
from experiments.outcomes import RESULTS, accuracy
from experiments.peers import accelerator, augmented, networks, stemmed
from experiments.report import say, typed
from experiments.rows import Run, every
from rotjax.data import sources
from rotjax.data.augmentation import GREY
from rotjax.errors import DataError, UsageError
from rotjax.files import write_json
from rotjax.recipe import Classification, Rotation
from rotjax.recipe_json import to_json
from rotjax.torchvision import export_weights
from rotjax.workdirs import read_summary


def main() -> int:
    """Parses the flags and runs the control; returns the exit code."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the memory of a GPU is for torch
    return command.cli(control, "control", resumes=False)


def control(
    run: str,
    workdirs: Path = Path("runs/reproduce"),
    results: ResultsDir = RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Train a run of `experiments.reproduce` by PyTorch, with torch and torchvision. It does not resume.

    Args:
        run: As `experiments.reproduce` lists it, of either preset; one that starts from another needs that one's workdir.
        workdirs: Folder of the workdirs of `experiments.reproduce`.
        results: Folder of the results, where a row per epoch and the final figure are left in `controls`.
        data_dir: Folder of data sets prepared for TFDS.
    """
    trained = named(run)
    command.check_folder("workdirs", workdirs)
    tables.check(results)
    command.check_folder("data_dir", data_dir)
    try:
        networks()
    except ImportError as error:
        raise DataError(f"{error}; the control needs torch and torchvision: pip install torch torchvision") from error
    if (begun := trained.after) and not (workdirs / begun.name / "summary.json").exists():
        flags = {"only": begun.name, "preset": begun.recipe.preset, "seeds": begun.recipe.seed + 1, "workdirs": workdirs}
        first = typed("reproduce", {name: value for name, value in flags.items() if value not in ("report", 1)})
        raise UsageError(f"{run} starts from {begun.name}, which is not complete there; run {first} first")
    folder = command.made(results / "controls")
    recipe = trained.recipe.resolved()
    data = sources.load(recipe.dataset, image_size=recipe.image_size, data_dir=data_dir, progress=command.decoding)
    pretext = {"pretext": accuracy(read_summary(workdirs / trained.after.name))} if trained.after else {}
    rows, began = [], time.perf_counter()
    for row in train(trained, data, workdirs):
        rows.append(row)
        say(json.dumps(row))
    summary = {"accuracy": rows[-1]["test_accuracy"], "wall_seconds": round(time.perf_counter() - began, 1)}
    result = {"row": trained.row, "variant": trained.variant, "recipe": to_json(recipe), "summary": summary, "epochs": rows}
    write_json(folder / f"{trained.name}.json", result | pretext)
    tables.write(results)
    say(f"\n{folder / trained.name}.json")


def named(name: str) -> Run:
    """The run `name`; UsageError where there is none, or `train` would train another."""
    run = next((run for run in every(3) if run.name == name), None)
    if run is None:
        raise UsageError(f"--run={name} is none; see python -m experiments.reproduce --list --seeds=3, with --preset=strong")
    recipe = run.recipe
    if recipe.validation or (isinstance(recipe, Classification) and (recipe.subset or recipe.held)):
        raise UsageError(
            f"--run={name}: the control knows no subsets, no validation and no statistics held; name another run"
        )
    return run


def train(run: Run, data: rotjax.Dataset, workdirs: Path) -> Iterator[dict[str, Any]]:
    """Yields a row per epoch; at the end of rotations' `test_accuracy` is on all four turns."""
    import torch

    recipe: Any = run.recipe.resolved()
    turning, count = isinstance(recipe, Rotation), len(data.train["label"])
    device = accelerator()
    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.benchmark = True
    rng = np.random.default_rng(recipe.seed)
    model = _model(run, 4 if turning else len(data.classes), workdirs).to(device, memory_format=torch.channels_last)
    loss = torch.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer, schedule = _optimizer(recipe, model.parameters(), count // recipe.batch_size)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (recipe.mean, recipe.std))

    def logits(images: np.ndarray) -> Any:
        planes = torch.from_numpy(np.array(images, order="C")).to(device).permute(0, 3, 1, 2)  # channels_last, as they are
        with torch.autocast(device, getattr(torch, recipe.dtype), enabled=recipe.dtype != "float32"):
            return model((planes - mean) / std).float()

    def test(turns: Sequence[int]) -> float:
        model.eval()
        right = 0
        with torch.no_grad():
            for at in range(0, len(data.test["label"]), 500):
                images, labels = (data.test[key][at : at + 500] for key in ("image", "label"))
                for turn in turns:
                    predicted = logits(np.rot90(images, turn, (1, 2))).argmax(1).cpu().numpy()
                    right += (predicted == (turn if turning else labels)).sum()
        return right / len(data.test["label"]) / len(turns)

    for epoch in range(1, recipe.epochs + 1):
        model.train()
        order = rng.permutation(count)[: count // recipe.batch_size * recipe.batch_size]
        correct, views = torch.zeros((), device=device), 0
        for index in order.reshape(-1, recipe.batch_size):
            images = np.stack([_augmented(data.train["image"][i], rng, recipe) for i in index])
            labels = data.train["label"][index].astype(np.int64)
            if turning:
                images, labels = _turned(images, rng, recipe)
            optimizer.zero_grad()
            target = torch.from_numpy(labels).to(device)  # before the network: on a GPU the copy would wait for it
            scores = logits(images)
            loss(scores, target).backward()
            optimizer.step()
            schedule.step()
            correct, views = correct + (scores.argmax(1) == target).sum(), views + len(labels)
        turns = range(4) if turning else (0,)
        yield {"epoch": epoch, "train_accuracy": correct.item() / views, "test_accuracy": test(turns)}


def _optimizer(recipe: Any, parameters: Iterable, steps: int) -> tuple[Any, Any]:
    """torch's optimizer of the `recipe`, and its learning rate's schedule by steps, of which an epoch has so many."""
    from torch import optim
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR, StepLR

    if recipe.optimizer == "sgd":
        optimizer: Any = optim.SGD(
            parameters, recipe.learning_rate, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True
        )
    else:
        optimizer = optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    if recipe.schedule == "steps":
        return optimizer, StepLR(optimizer, recipe.decay_epochs * steps, 0.1)
    warmup = recipe.warmup_epochs * steps
    rise = LinearLR(optimizer, 1e-9, total_iters=warmup)  # which begins anywhere but at 0
    fall = CosineAnnealingLR(optimizer, recipe.epochs * steps - warmup)
    return optimizer, SequentialLR(optimizer, [rise, fall], [warmup])


def _augmented(image: np.ndarray, rng: np.random.Generator, recipe: Any) -> np.ndarray:
    """`augmented`, and with a grey square if the recipe has one."""
    size, crop = len(image), augmented(image, rng)
    if side := round(recipe.cutout * size):
        row, column = rng.integers(0, size, 2) - side // 2
        crop[max(row, 0) : row + side, max(column, 0) : column + side] = GREY
    return crop


def _turned(images: np.ndarray, rng: np.random.Generator, recipe: Any) -> tuple[np.ndarray, np.ndarray]:
    """The images, each in all its four turns or in a random one, and the turns."""
    if recipe.rotations == "all":
        turned = np.concatenate([np.rot90(images, turn, (1, 2)) for turn in range(4)])
        return turned, np.repeat(np.arange(4), len(images))
    turns = rng.integers(0, 4, len(images))
    return np.stack([np.rot90(image, turn) for image, turn in zip(images, turns, strict=True)]), turns


def _model(run: Run, num_classes: int, workdirs: Path) -> Any:
    """torchvision's network with the weights that `run` starts from, what is frozen without gradients."""
    import torch

    recipe, weights = run.recipe.resolved(), {}
    if run.after:
        _, variables, recipe = rotjax.load(workdirs / run.after.name)
        weights = export_weights(recipe.backbone, variables)
    model = stemmed(getattr(networks(), recipe.backbone)(num_classes=num_classes), recipe.stem)
    if weights:
        kept = {key: torch.from_numpy(weights[key]) for key in weights if not key.startswith(("fc.", "classifier."))}
        model.load_state_dict(model.state_dict() | kept)
    if isinstance(run.recipe, Classification) and run.recipe.trainable != "all":
        for key, parameter in model.named_parameters():
            parameter.requires_grad = key.startswith(("layer4.", "fc."))
    return model


if __name__ == "__main__":
    sys.exit(main())
