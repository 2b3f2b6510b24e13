"""The figures of a run, as PNG in its workdir; no display is needed."""

import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

import rotjax
from rotjax import parallel
from rotjax.data import tasks
from rotjax.errors import CheckpointError
from rotjax.planning import Plan

log = logging.getLogger(__name__)

NAMES: tuple[str, ...] = ("curves.png", "predictions.png", "mistakes.png", "confusion.png", "filters.png")
SHOWN = 32  # images of predictions.png and of mistakes.png

BLUE, VERMILLION, INK, GREY, FAINT = "#0072b2", "#d55e00", "#222222", "#666666", "#bbbbbb"  # Okabe and Ito's, and greys
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


def draw(workdir: Path, plan: Plan) -> None:
    """Draws those of `NAMES` that the workdir of a finished run lacks; raises CheckpointError where it cannot write."""
    makers = dict(zip(NAMES, (_curves, _predictions, _mistakes, _confusion, _filters), strict=True))
    missing = [name for name in NAMES if parallel.of_primary(not (workdir / name).exists())]
    if missing:
        log.info("drawing the figures")
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a class's name, which becomes a box
        for name in missing:
            figure = makers[name](workdir, plan)
            if parallel.primary():
                save(figure, workdir / name)


def curves(rows: Sequence[dict], epoch_steps: int, falls: Sequence[int], title: str, tested: str = "test") -> Figure:
    """Loss and accuracy over epochs of the epochs' `rows` of metrics.jsonl; the learning rate falls after epochs `falls`.

    The line of what was `tested` on is called so.
    """
    epochs = np.array([row["step"] for row in rows]) / epoch_steps
    marker = "o" if len(rows) <= 25 else ""
    figure = titled((8, 3.2), title)
    panels = zip(figure.subplots(1, 2), ("loss", "accuracy"), ("Loss", "Accuracy in %"), (1, 100), strict=True)
    for axes, key, name, unit in panels:
        for split, colour, line in (("train", BLUE, "--"), ("test", VERMILLION, "-")):
            values = unit * np.array([row[f"{split}_{key}"] for row in rows])
            last = f"{tested if split == 'test' else split}, {values[-1]:.2f} at the end"
            axes.plot(epochs, values, line, color=colour, marker=marker, markersize=3.5, label=last)
        for number, fall in enumerate(falls):
            label = "learning rate / 10" if number == 0 and key == "loss" else None
            axes.axvline(fall, color=FAINT, linestyle=":", zorder=0, label=label)
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend()
    return figure


def predictions(
    images: np.ndarray, true: np.ndarray, predicted: np.ndarray, classes: Sequence[str], title: str, caption: str
) -> Figure:
    """`images` u8 `[N,H,H,3]`, eight to a row, each with what was predicted; the wrong ones framed, with what is true."""
    lines = max(-(-len(images) // 8), 1)
    figure = titled((8, 1.32 * lines + 0.6), title, caption, dpi=100)  # photographs do not compress: below 300 kB as it is
    grid = figure.subplots(lines, 8, squeeze=False).flat
    for axes in grid[len(images) :]:
        axes.set_visible(False)
    for axes, image, truth, guess in zip(grid, images, true, predicted, strict=False):
        wrong = bool(truth != guess)
        axes.imshow(image)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=wrong, color=VERMILLION, linewidth=3)
        said, so = _short(classes[int(guess)]), _short(classes[int(truth)])
        text = f"{said} \N{BALLOT X}\nis {so}" if wrong else said
        axes.set_xlabel(text, fontsize=8, color=VERMILLION if wrong else INK)
    return figure


def confusion(matrix: np.ndarray, classes: Sequence[str], title: str, caption: str) -> Figure:
    """Counts `[true, predicted]`, shaded by their share of what is truly that class."""
    count, names = len(classes), [_short(name) for name in classes]
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
    figure = titled((8, 4.4), title)
    for axes, kernels, name in zip(figure.subplots(1, 2), (before, after), ("before", "after"), strict=True):
        low, high = kernels.min((0, 1, 2)), kernels.max((0, 1, 2))
        tiles = np.pad((kernels - low) / np.maximum(high - low, 1e-12), ((0, 1), (0, 1), (0, 0), (0, 0)), constant_values=1)
        tiles = np.moveaxis(tiles, -1, 0)
        rows = [np.concatenate(list(tiles[at : at + 8]), axis=1) for at in range(0, len(tiles) - len(tiles) % 8, 8)]
        axes.imshow(np.concatenate(rows or [np.concatenate(list(tiles), axis=1)]))
        axes.set(title=name, xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes `figure` as a PNG of at most 256 colours, all of it or nothing; raises CheckpointError where it cannot."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    partial = path.with_name(path.name + ".partial")
    try:
        Image.open(drawn).convert("RGB").quantize(256).save(partial, format="png", optimize=True)
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror}); the same command draws it again") from error


def _curves(workdir: Path, plan: Plan) -> Figure:
    recipe = plan.recipe
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    falls = [step // plan.epoch_steps for step in plan.boundaries]
    title = f"{_data(recipe)}: {recipe.backbone} learns to predict {_what(recipe)}"
    tested = recipe.tested_on.partition(" ")[0]
    return curves([row for row in rows if "test_loss" in row], plan.epoch_steps, falls, title, tested)


def _predictions(workdir: Path, plan: Plan) -> Figure:
    model, variables, recipe = rotjax.load(workdir)
    test, task = plan.data.test, tasks.random_turn if recipe.job == "rotation" else tasks.classify
    spread = np.unique(np.linspace(0, len(test["label"]) - 1, SHOWN).astype(int))  # folders are in the order of classes
    chosen = {key: value[spread] for key, value in test.items()}
    (batch,) = rotjax.test_batches(chosen, task, len(spread), seed=recipe.seed)
    logits = jax.jit(lambda variables, images: model.apply(variables, images, train=False))(variables, batch["image"])
    predicted = np.argmax(logits, -1)
    title = f"Predicted {_what(recipe)}: {(predicted == batch['label']).sum()} of {len(spread)} right"
    turned = ", each turned counter-clockwise at random" if recipe.job == "rotation" else ""
    caption = f"{_data(recipe)}: {len(spread)} of the {len(test['label']):,} {recipe.tested_on}, evenly spaced{turned}"
    return predictions(batch["image"], batch["label"], predicted, recipe.classes, title, caption)


def _confusion(workdir: Path, plan: Plan) -> Figure:
    matrix = np.array(json.loads((workdir / "summary.json").read_text())["confusion"])
    images = len(plan.data.test["label"])
    views = f"all four turns of {images:,}" if plan.recipe.job == "rotation" else f"{images:,}"
    title = f"Predicted {_what(plan.recipe)}: {np.trace(matrix) / matrix.sum():.2%} right"
    return confusion(matrix, plan.recipe.classes, title, f"{_data(plan.recipe)}: {views} {plan.recipe.tested_on}")


def _mistakes(workdir: Path, plan: Plan) -> Figure:
    model, variables, recipe = rotjax.load(workdir)
    task = tasks.random_turn if recipe.job == "rotation" else tasks.classify
    apply: Callable[..., Any] = model.apply
    probabilities = jax.jit(lambda variables, images: jax.nn.softmax(apply(variables, images, train=False)))
    wrong = []  # probability of what was predicted, number of the image, and what to show of it
    epoch = -(-plan.steps // plan.epoch_steps)  # the turns of the final score
    views = rotjax.test_batches(plan.data.test, task, recipe.batch_size, seed=recipe.seed, epoch=epoch)
    with closing(rotjax.read(views)) as reader:
        for batch in reader:
            given = np.asarray(probabilities(variables, batch["image"]))
            predicted = given.argmax(-1)
            for at in np.flatnonzero((predicted != batch["label"]) & (batch["weight"] > 0)):
                wrong.append((given[at].max(), len(wrong), batch["image"][at], batch["label"][at], predicted[at]))
    count, worst = len(wrong), sorted(wrong, reverse=True)[:SHOWN]
    _, _, images, true, predicted = zip(*worst, strict=True) if worst else ((),) * 5
    title = f"Most surely mistaken {_what(recipe)}: {len(worst)} of {count:,}"
    turned = ", each on one random turn" if recipe.job == "rotation" else ""
    caption = f"{_data(recipe)}: of the {len(plan.data.test['label']):,} {recipe.tested_on}{turned}, the surest first"
    return predictions(np.array(images), np.array(true), np.array(predicted), recipe.classes, title, caption)


def _filters(workdir: Path, plan: Plan) -> Figure:
    _, variables, recipe = rotjax.load(workdir)
    before = plan.backbone
    if before is None:
        before = rotjax.part(rotjax.init_variables(recipe.model(), recipe.seed, recipe.image_size), "backbone")
    first, last = (b["params"]["stem"]["conv"]["kernel"] for b in (before, rotjax.part(variables, "backbone")))
    title = f"First layer of {recipe.backbone} before and after training on {_data(recipe)}"
    return filters(np.asarray(first), np.asarray(last), title)


def titled(size: tuple[float, float], title: str, caption: str = "", dpi: int = 120) -> Figure:
    figure = Figure(figsize=size, dpi=dpi)
    figure.suptitle(title, x=0.01, ha="left")
    if caption:
        figure.supxlabel(caption, x=0.01, ha="left", color=GREY, fontsize=8.5)
    return figure


def _data(recipe: rotjax.Recipe) -> str:
    return _short(Path(recipe.dataset).resolve().name, 40)


def _what(recipe: rotjax.Recipe) -> str:
    return "rotations" if recipe.job == "rotation" else "classes"


def _short(name: str, limit: int = 16) -> str:
    name = name.encode(errors="replace").decode()  # folders may have names that are not text
    return name if len(name) <= limit else name[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"
