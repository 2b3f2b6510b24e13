"""The figures over several runs, from their outcomes; PNGs beside the tables."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import figures
from experiments.outcomes import Outcome, subset_scores
from experiments.rows import SUBSETS, WHOLE

CURVES = {  # of Figure 1: the row of all images, label, colour
    "frozen": ("2a", "frozen to the last block, from row 1", figures.BLUE),
    "full": ("3a", "everything trains, from row 1", figures.VERMILLION),
    "scratch": ("3b", "everything trains, from random weights", figures.GREY),
}


def draw(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Draws in `folder` those of FIGURES that `outcomes` have what is needed for."""
    with matplotlib.style.context(["default", figures.STYLE]):
        for name, make in FIGURES.items():
            if figure := make(outcomes):
                figures.save(figure, folder / name)


def subset_curves(outcomes: Sequence[Outcome]) -> Figure | None:
    """Test accuracy over the number of training images, the mean and the range over draws."""
    figure = figures.titled((7, 4), "Few labels: what pretraining by rotation is worth (row 4)")
    axes = figure.subplots()
    for kind, (row, label, colour) in CURVES.items():
        points = {10 * count: subset_scores(outcomes, kind, row, count) for count in (*SUBSETS, WHOLE)}
        points = {count: scores for count, scores in points.items() if scores}
        if len(points) < 2:
            continue
        counts, scores = list(points), list(points.values())
        axes.fill_between(counts, [min(s) for s in scores], [max(s) for s in scores], color=colour, alpha=0.2, linewidth=0)
        axes.plot(counts, [statistics.mean(s) for s in scores], color=colour, marker="o", markersize=4, label=label)
    if not axes.lines:
        return None
    axes.set(xscale="log", xlabel="training images", ylabel="test accuracy in %")
    axes.legend()
    return figure


def first_epochs(outcomes: Sequence[Outcome]) -> Figure | None:
    """Accuracy over epochs of fine-tuning, from the rotation network (row 3a) and from random weights (row 3b)."""
    figure = figures.titled((7, 4), "Fine-tuning, pretrained and not (rows 3a and 3b)")
    axes = figure.subplots()
    for row, label, colour in (("3a", "from row 1", figures.VERMILLION), ("3b", "from random weights", figures.GREY)):
        for number, one in enumerate(one for one in outcomes if one.key[:2] == (row, "")):
            epochs = [epoch["epoch"] for epoch in one.epochs]
            for split, line in (("test", "-"), ("train", "--")):
                values = [100 * epoch[f"{split}_accuracy"] for epoch in one.epochs]
                name = f"{label}, {split}" if number == 0 else None
                axes.plot(epochs, values, line, color=colour, marker="o", markersize=3, label=name)
    if not axes.lines:
        return None
    axes.set(xlabel="epoch", ylabel="accuracy in %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def rotation_confusion(outcomes: Sequence[Outcome]) -> Figure | None:
    """Which rotations are taken for which (row 1)."""
    return _confusion(outcomes, "1", "rotation")


def class_confusion(outcomes: Sequence[Outcome]) -> Figure | None:
    """Which classes are taken for which (row 3a)."""
    return _confusion(outcomes, "3a", "class")


FIGURES: dict[str, Callable[[Sequence[Outcome]], Figure | None]] = {
    "subsets.png": subset_curves,
    "fine-tuning.png": first_epochs,
    "rotations.png": rotation_confusion,
    "classes.png": class_confusion,
}
CAPTIONS = {name: (make.__doc__ or "").partition(".")[0] for name, make in FIGURES.items()} | {
    "predictions.png": "Test images, turned, with the rotation that the network of row 1 predicts",
    "mistakes.png": "The rotations that the network of row 1 is most surely mistaken about",
    "filters.png": "First-layer filters before and after learning rotations (row 1)",
}


def _confusion(outcomes: Sequence[Outcome], row: str, what: str) -> Figure | None:
    summed = [one for one in outcomes if one.key[:2] == (row, "")]
    if not summed:
        return None
    matrix = np.sum([one.summary["confusion"] for one in summed], axis=0)
    title = f"Predicted {what} (row {row}): {np.trace(matrix) / matrix.sum():.2%} right"
    return figures.confusion(matrix, summed[0].recipe["classes"], title, f"{len(summed)} seeds: views of test images")
