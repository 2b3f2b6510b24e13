"""Plots of arrays, in one style; no display is needed."""

import io
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from PIL import Image

from rotjax import files

BLUE, VERMILLION, GREEN = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito's
INK, GREY, FAINT = "#222222", "#666666", "#bbbbbb"
STYLE = {
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.edgecolor": "none",
    "legend.framealpha": 1,
}
styled = partial(matplotlib.style.context, ["default", STYLE])  # whatever the user's own defaults are


def curves(
    rows: Sequence[dict], epoch_steps: int, falls: Sequence[int], title: str, caption: str = "", tested: str = "test"
) -> Figure:
    """Loss and accuracy over epochs of the epochs' `rows` of metrics.jsonl; the learning rate falls after epochs `falls`.

    The line of what was `tested` on is called so.
    """
    epochs = np.array([row["step"] for row in rows]) / epoch_steps
    marker = "o" if len(rows) <= 25 else ""
    figure = titled((8, 4 if caption else 3.8), title, caption)
    panels = zip(figure.subplots(1, 2), ("loss", "accuracy"), ("Loss", "Accuracy in %"), (1, 100), strict=True)
    for axes, key, name, unit in panels:
        for split, colour, line in (("train", BLUE, "--"), ("test", VERMILLION, "-")):
            values = unit * np.array([row[f"{split}_{key}"] for row in rows])
            last = f"{tested if split == 'test' else split}, {rounded(values[-1], 2)} at the end"
            axes.plot(epochs, values, line, color=colour, marker=marker, markersize=3.5, label=last)
        for number, fall in enumerate(falls):
            label = "learning rate / 10" if number == 0 and key == "loss" else None
            axes.axvline(fall, color=FAINT, linestyle=":", zorder=0, label=label)
        losses = [value for row in rows for value in (row["train_loss"], row["test_loss"])]
        if key == "loss" and max(losses) > 20 * float(np.median(losses)) > 0:  # of networks whose statistics are young
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # without mathematics, see STYLE
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator("auto" if epochs[-1] > 1 else 3, integer=True, min_n_ticks=1))
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}  # where it covers no curve
        axes.legend(**below, ncols=2, fontsize=8.5, handlelength=1.6, columnspacing=1)
    return figure


def predictions(
    images: Sequence[np.ndarray],
    true: Sequence[int],
    predicted: Sequence[int],
    sure: Sequence[float],
    classes: Sequence[str],
    title: str,
    caption: str,
) -> Figure:
    """N `images` u8 `[H,H,3]`, eight to a row, each with what was predicted and how surely; the wrong ones framed, with
    what is true.
    """
    lines = max(-(-len(images) // 8), 1)
    figure = titled((8, 1.4 * lines + 0.6), title, caption, dpi=100)  # photographs do not compress: below 300 kB as it is
    grid = figure.subplots(lines, 8, squeeze=False).flat
    for axes in grid[len(images) :]:
        axes.set_visible(False)
    for axes, image, truth, guess, share in zip(grid, images, true, predicted, sure, strict=False):
        wrong = bool(truth != guess)
        axes.imshow(image)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=wrong, color=VERMILLION, linewidth=3)
        said, so = (short(classes[int(kind)], 12) for kind in (guess, truth))
        text = f"{said} \N{BALLOT X}\nis {so}\n{share:.0%}" if wrong else f"{said}\n{share:.0%}"
        axes.set_xlabel(text, fontsize=8, color=VERMILLION if wrong else INK)
    return figure


def confusion(matrix: np.ndarray, classes: Sequence[str], title: str, caption: str) -> Figure:
    """Counts `[true, predicted]`, shaded by their share of what is truly that class."""
    count, names = len(classes), [short(name) for name in classes]
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure = titled((4.4, 4.6) if count <= 5 else (6.6, 6.6) if count <= 20 else (7.4, 6.6), title, caption)
    axes = figure.subplots()
    shades = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(xlabel="predicted", ylabel="true")
    if count <= 20:
        for row, column in np.argwhere(matrix):
            share = f"{shares[row, column]:.1%}\n" if count <= 5 else ""
            colour = "white" if shares[row, column] > 0.55 else INK
            text = f"{share}{matrix[row, column]:,}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9.5 if count <= 12 else 7)
    else:
        figure.colorbar(shades, label="share of the true class", shrink=0.7)
    if count <= 50:
        size = 9.5 if count <= 20 else 6
        axes.set_xticks(range(count), names, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
        if count * max(map(len, names)) > 50:
            for label in axes.get_xticklabels():
                label.set(rotation=45, horizontalalignment="right", rotation_mode="anchor")
    return figure


def filters(before: np.ndarray, after: np.ndarray, title: str) -> Figure:
    """Kernels `[h,w,3,N]` as images, each stretched from black to white."""
    figure = titled((8, 0.8 + 0.45 * -(-before.shape[-1] // 8)), title)
    for axes, kernels, name in zip(figure.subplots(1, 2), (before, after), ("before", "after"), strict=True):
        low, high = kernels.min((0, 1, 2)), kernels.max((0, 1, 2))
        columns = min(8, kernels.shape[-1])
        gaps = ((0, 1), (0, 1), (0, 0), (0, -kernels.shape[-1] % columns))
        tiles = np.pad((kernels - low) / np.maximum(high - low, 1e-12), gaps, constant_values=1)
        height, width, *_ = tiles.shape
        grid = tiles.reshape(height, width, 3, -1, columns).transpose(3, 0, 4, 1, 2)
        axes.imshow(grid.reshape(-1, columns * width, 3))
        axes.set(title=name, xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes `figure` as a PNG of at most 256 colours, all of it or nothing; raises CheckpointError where it cannot."""
    drawn, reduced = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a class's name, which becomes a box
        figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(256).save(reduced, format="png", optimize=True)
    files.write(path, reduced.getvalue())


def titled(size: tuple[float, float], title: str, caption: str = "", dpi: int = 120) -> Figure:
    figure = Figure(figsize=size, dpi=dpi)
    figure.suptitle(title, x=0.01, ha="left")
    if caption:
        figure.supxlabel(caption, x=0.01, ha="left", color=GREY, fontsize=8.5)
    return figure


def rounded(value: float, digits: int) -> str:
    """`value` to so many `digits` after the point, where it is not one of the huge losses of young statistics."""
    return f"{value:.{digits}f}" if value < 10**4 else f"{value:.2e}"


def short(name: str, limit: int = 16) -> str:
    name = name.encode(errors="replace").decode()  # folders may have names that are not text
    head = limit // 2  # names of a kind often begin alike
    return name if len(name) <= limit else name[:head] + "\N{HORIZONTAL ELLIPSIS}" + name[head + 1 - limit :]
