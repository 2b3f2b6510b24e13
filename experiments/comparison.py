"""The figures over several runs, from their outcomes; PNGs beside the tables."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import plots
from experiments.outcomes import Outcome, subset_scores
from experiments.rows import ROWS, SUBSETS, WHOLE

Key = tuple[str, str, str]  # of an outcome: row, variant, task

CURVES = {  # of Figure 1: the row of all images, label, colour
    "frozen": ("2a", "frozen to the last block, from row 1", plots.BLUE),
    "full": ("3a", "everything trains, from row 1", plots.VERMILLION),
    "scratch": ("3b", "everything trains, from random weights", plots.GREY),
}


def draw(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Draws in `folder` those of FIGURES that `outcomes` have what is needed for, and removes the others."""
    with plots.styled():
        for name, make in FIGURES.items():
            if figure := make(outcomes):
                plots.save(figure, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)


def subset_curves(outcomes: Sequence[Outcome]) -> Figure | None:
    """Test accuracy over the number of training images: each draw, their mean, and their range where there are several."""
    figure = plots.titled((7, 4), "Few labels: what pretraining by rotation is worth (row 4)")
    axes = figure.subplots()
    for kind, (row, label, colour) in CURVES.items():
        points = {10 * count: subset_scores(outcomes, kind, row, count) for count in (*SUBSETS, WHOLE)}
        points = {count: scores for count, scores in points.items() if scores}
        if len(points) < 2:
            continue
        counts, scores = list(points), list(points.values())
        low, high, several = [min(s) for s in scores], [max(s) for s in scores], [len(s) > 1 for s in scores]
        axes.fill_between(counts, low, high, where=several, color=colour, alpha=0.2, linewidth=0)
        axes.plot(counts, [statistics.mean(s) for s in scores], color=colour, label=label)
        draws = [(count, score) for count, s in points.items() for score in s]
        axes.plot(*zip(*draws, strict=True), "o", color=colour, markersize=3)
    if not axes.lines:
        return None
    axes.set(xscale="log", xlabel="training images", ylabel="test accuracy in %")
    sizes = [10 * count for count in (*SUBSETS, WHOLE)]
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])  # matplotlib's own are powers, in the notation of mathematics
    axes.minorticks_off()
    axes.legend()
    return figure


def pretraining(outcomes: Sequence[Outcome]) -> Figure | None:
    """Accuracy over epochs of predicting rotations, at test of one turn of each image."""
    drawn = [one for one in outcomes if one.task == "rotation" and one.row in ROWS and (one.row != "6a" or not one.variant)]
    keys = sorted({one.key for one in drawn}, key=lambda key: (ROWS.index(key[0]), key))
    colours = dict(zip(keys, (plots.BLUE, plots.VERMILLION, plots.GREEN, plots.GREY, plots.INK, plots.FAINT), strict=False))
    what = "row {}, {backbone} on {dataset}, {image_size} px"
    labels = {one.key: what.format(one.row, **one.recipe) for one in drawn}
    return _over_epochs("Predicting rotations", drawn, labels, colours)


def fine_tuning(outcomes: Sequence[Outcome]) -> Figure | None:
    """Accuracy over epochs of fine-tuning, from the rotation network (row 3a) and from random weights (row 3b)."""
    three, random = ("3a", "", "classification"), ("3b", "", "classification")
    labels = {three: "from row 1", random: "from random weights"}
    drawn, colours = [one for one in outcomes if one.key in labels], {three: plots.VERMILLION, random: plots.GREY}
    return _over_epochs("Fine-tuning, pretrained and not (rows 3a and 3b)", drawn, labels, colours)


def rotation_confusion(outcomes: Sequence[Outcome]) -> Figure | None:
    """Which rotations are taken for which (row 1)."""
    return _confusion(outcomes, "1", "rotation")


def class_confusion(outcomes: Sequence[Outcome]) -> Figure | None:
    """Which classes are taken for which (row 3a)."""
    return _confusion(outcomes, "3a", "class")


FIGURES: dict[str, Callable[[Sequence[Outcome]], Figure | None]] = {
    "subsets.png": subset_curves,
    "pretraining.png": pretraining,
    "fine-tuning.png": fine_tuning,
    "rotations.png": rotation_confusion,
    "classes.png": class_confusion,
}
CAPTIONS = {name: (make.__doc__ or "").partition(".")[0] for name, make in FIGURES.items()} | {
    "class-predictions.png": "Test images with the class that the network of row 3a predicts",
    "predictions.png": "Test images, turned, with the rotation that the network of row 1 predicts",
    "mistakes.png": "The rotations that the network of row 1 is most surely mistaken about",
    "filters.png": "First-layer filters before and after learning rotations (row 1)",
}


def _over_epochs(
    title: str, drawn: Sequence[Outcome], labels: Mapping[Key, str], colours: Mapping[Key, str]
) -> Figure | None:
    """The accuracies in training and at test of each run `drawn`; those that differ in their seeds alone look alike."""
    figure, named = plots.titled((7, 4), title), set()
    axes = figure.subplots()
    for one in drawn:
        for split, line in (("test", "-"), ("train", "--")):
            name = None if split == "train" or one.key in named else labels[one.key]
            named.add(one.key)
            values = [100 * epoch[f"{split}_accuracy"] for epoch in one.epochs]
            epochs = [epoch["epoch"] for epoch in one.epochs]
            axes.plot(epochs, values, line, color=colours[one.key], marker="o", markersize=3, label=name)
    if not axes.lines:
        return None
    axes.set(xlabel="epoch", ylabel="accuracy in %, dashed: in training")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def _confusion(outcomes: Sequence[Outcome], row: str, what: str) -> Figure | None:
    summed = [one for one in outcomes if one.key[:2] == (row, "") and one.summary["confusion"]]
    if not summed:
        return None
    matrix = np.sum([one.summary["confusion"] for one in summed], axis=0)
    title = f"Predicted {what} (row {row}): {np.trace(matrix) / matrix.sum():.2%} right"
    turned, seeds = "turned " * (what == "rotation"), f"{len(summed)} seed{'s' * (len(summed) != 1)}"
    return plots.confusion(matrix, summed[0].recipe["classes"], title, f"{matrix.sum():,} {turned}test images, of {seeds}")
