"""A row of the report by PyTorch, on the same data and from the same weights: `python -m experiments.control --run=...`.

Network, optimizer, schedule and augmentation are torchvision's, torch's and written anew here, so that a figure which
rotjax and its control share comes from the data or the recipe, not from the port. Needs torch and torchvision.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import rotjax
from experiments import command, tables
from experiments.outcomes import RESULTS, accuracy
from experiments.peers import accelerator, augmented, networks
from experiments.report import say
from experiments.rows import Run, runs
from rotjax.data import sources
from rotjax.errors import DataError, UsageError
from rotjax.files import write_json
from rotjax.recipe import Classification, Rotation
from rotjax.torchvision import export_weights
from rotjax.workdirs import read_summary


def main() -> int:
    """Parses the flags and runs the control; returns the exit code."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the memory of a GPU is for torch
    return command.cli(control, "control", resumes=False)


def control(
    run: str,
    workdirs: Path = Path("runs/reproduce"),
    results: command.ResultsDir = RESULTS,
    data_dir: command.DataDir = None,
) -> None:
    """Train a run of the report by PyTorch, with torch and torchvision. It does not resume.

    Args:
        run: As `experiments.reproduce --list` names it; one that starts from another needs that one's workdir.
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
        seeds = f" --seeds={begun.recipe.seed + 1}" * bool(begun.recipe.seed)
        first = f"run python -m experiments.reproduce --only={begun.name}{seeds} --workdirs={workdirs} first"
        raise UsageError(f"{run} starts from {begun.name}, which is not complete there; {first}")
    folder = command.made(results / "controls")
    recipe = trained.recipe.resolved()
    data = sources.load(recipe.dataset, image_size=recipe.image_size, data_dir=data_dir, progress=command.decoding)
    pretext = {"pretext": accuracy(read_summary(workdirs / trained.after.name))} if trained.after else {}
    rows, began = [], time.perf_counter()
    for row in train(trained, data, workdirs):
        rows.append(row)
        say(json.dumps(row))
    summary = {"accuracy": rows[-1]["test_accuracy"], "wall_seconds": round(time.perf_counter() - began, 1)}
    result = {"row": trained.row, "variant": trained.variant, "summary": summary, "epochs": rows}
    write_json(folder / f"{trained.name}.json", result | pretext)
    tables.write(results)
    say(f"\n{folder / trained.name}.json")


def named(name: str) -> Run:
    """The run `name`; UsageError where there is none, or `train` would train another."""
    run = next((run for run in runs(seeds=3) if run.name == name), None)
    if run is None:
        raise UsageError(f"--run={name} is none; see python -m experiments.reproduce --list --seeds=3")
    if isinstance(run.recipe, Classification) and (run.recipe.subset or run.recipe.held):
        raise UsageError(f"--run={name}: the control knows neither subsets nor held statistics; name another run")
    return run


def train(run: Run, data: rotjax.Dataset, workdirs: Path):
    """Yields a row per epoch; at the end of rotations' `test_accuracy` is on all four turns."""
    import torch

    recipe: Any = run.recipe.resolved()
    turning, count = isinstance(recipe, Rotation), len(data.train["label"])
    device = accelerator()
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    model = _model(run, 4 if turning else len(data.classes), workdirs).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, recipe.decay_epochs, 0.1)
    mean, std = (255 * np.array(values, np.float32) for values in (recipe.mean, recipe.std))

    def tensor(images: np.ndarray) -> Any:
        planes = np.ascontiguousarray(((images - mean) / std).transpose(0, 3, 1, 2))
        return torch.from_numpy(planes).to(device, memory_format=torch.channels_last)

    def test(turns: tuple[int, ...]) -> float:
        model.eval()
        right = 0
        with torch.no_grad():
            for at in range(0, len(data.test["label"]), 500):
                images, labels = (data.test[key][at : at + 500] for key in ("image", "label"))
                for turn in turns:
                    predicted = model(tensor(np.rot90(images, turn, (1, 2)))).argmax(1).cpu().numpy()
                    right += (predicted == (turn if turning else labels)).sum()
        return right / len(data.test["label"]) / len(turns)

    for epoch in range(1, recipe.epochs + 1):
        model.train()
        order, correct = rng.permutation(count)[: count // recipe.batch_size * recipe.batch_size], 0
        for index in order.reshape(-1, recipe.batch_size):
            images = np.stack([augmented(data.train["image"][i], rng) for i in index])
            labels = data.train["label"][index].astype(np.int64)
            if turning:
                labels = rng.integers(0, 4, len(index))
                images = np.stack([np.rot90(image, turn) for image, turn in zip(images, labels, strict=True)])
            optimizer.zero_grad()
            logits, target = model(tensor(images)), torch.from_numpy(labels).to(device)
            torch.nn.functional.cross_entropy(logits, target).backward()
            optimizer.step()
            correct += (logits.argmax(1) == target).sum().item()
        schedule.step()
        turns = tuple(range(4)) if turning else (0,)
        yield {"epoch": epoch, "train_accuracy": correct / len(order), "test_accuracy": test(turns)}


def _model(run: Run, num_classes: int, workdirs: Path) -> Any:
    """torchvision's network with the weights that `run` starts from, what is frozen without gradients."""
    import torch

    source = run.after or run
    model = getattr(networks(), source.recipe.resolved().backbone)(num_classes=num_classes)
    if run.after:
        _, variables, _ = rotjax.load(workdirs / run.after.name)
        weights = export_weights(source.recipe.resolved().backbone, variables)
        kept = {key: torch.from_numpy(weights[key]) for key in weights if not key.startswith(("fc.", "classifier."))}
        model.load_state_dict(model.state_dict() | kept)
    if isinstance(run.recipe, Classification) and run.recipe.trainable != "all":
        for key, parameter in model.named_parameters():
            parameter.requires_grad = key.startswith(("layer4.", "fc."))
    return model


if __name__ == "__main__":
    sys.exit(main())
