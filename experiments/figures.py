"""The figures of a run, as PNG in its workdir, and the table of its predictions."""

import heapq
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import rotjax
from experiments import plots
from rotjax import processes
from rotjax.files import read_rows, write_csv
from rotjax.planning import Plan
from rotjax.workdirs import read_summary

log = logging.getLogger(__name__)

SHOWN = 32  # images of predictions.png and of mistakes.png


def draw(workdir: Path, plan: Plan) -> None:
    """Draws those of `FIGURES` that the workdir of a finished run lacks, or has of an earlier end of it.

    Raises CheckpointError where it cannot write.
    """
    run, finished = _Run(workdir, plan), workdir / "summary.json"
    with processes.together():
        stale = [name for name in FIGURES if processes.primary() and not _newer(workdir / name, finished)]
    missing = [name for name in FIGURES if processes.of_primary(name in stale)]
    if missing:
        log.info("drawing the figures")
    with plots.styled():
        for name in missing:
            with processes.together():
                made = FIGURES[name](run)
                if made and processes.primary():
                    if isinstance(made, Figure):
                        plots.save(made, workdir / name)
                    else:
                        write_csv(workdir / name, made)


def _newer(path: Path, other: Path) -> bool:
    return path.exists() and path.stat().st_mtime >= other.stat().st_mtime


@dataclass(frozen=True)
class _Run:
    """What the figures are drawn from, its network loaded once and only if one of them shows it."""

    workdir: Path
    plan: Plan

    @cached_property
    def variables(self) -> dict:
        return rotjax.load(self.workdir)[1]

    @cached_property
    def tested(self) -> tuple[list[tuple[int, int, float]], dict[int, np.ndarray], dict[int, np.ndarray]]:
        """`(label, prediction, probability)` of each test image; by their numbers, of some evenly spaced and of those most
        surely mistaken, the images, which may not all fit in memory.
        """
        spread, rows, spaced = evenly(len(self.plan.data.test["label"])), [], {}

        def wrong() -> Iterator[tuple[float, int, np.ndarray]]:
            for number, (image, true, given) in enumerate(self.views()):
                predicted, sure = int(given.argmax()), float(given.max())
                rows.append((int(true), predicted, sure))
                if number in spread:
                    spaced[number] = image.copy()
                if predicted != true:
                    yield sure, number, image.copy()

        worst = {number: image for _, number, image in heapq.nlargest(SHOWN, wrong())}
        return rows, spaced, worst

    def views(self) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """Each test image, for rotations on the turn of the last test, its label, and the network's probabilities."""
        recipe, model, data = self.plan.recipe, self.plan.recipe.model(), self.plan.data.test
        everything, epoch = slice(None), self.plan.last_epoch  # in each of several processes, which draw the same
        several = min(8 * recipe.batch_size, len(data["label"]))  # the variables are placed anew for each
        batches = rotjax.eval_batches(data, recipe.eval_task, several, seed=recipe.seed, epoch=epoch, share=everything)
        with closing(rotjax.read(batches)) as reader:
            for batch in reader:
                given = rotjax.probabilities(model, self.variables, batch["image"], batch_size=recipe.batch_size)
                there = batch["weight"] > 0
                yield from zip(batch["image"][there], batch["label"][there], given[there], strict=True)


def _curves(run: _Run) -> Figure | None:
    recipe, epoch_steps, path = run.plan.recipe, run.plan.epoch_steps, run.workdir / "metrics.jsonl"
    if not path.exists():  # it was lost since, which is no reason to go without the other figures
        return None
    if not (rows := [row for row in read_rows(path) if "test_loss" in row]):
        return None
    falls = [step // epoch_steps for step in run.plan.boundaries]
    title = f"{_data(recipe)}: {recipe.backbone} learns to predict {what(recipe)}"
    tested = recipe.tested_on.partition(" ")[0]
    caption = f"Tested on one random turn of each of the {recipe.tested_on}" if recipe.job == "rotation" else ""
    return plots.curves(rows, epoch_steps, falls, title, caption, tested)


def _predictions(run: _Run) -> Figure:
    recipe, (rows, spaced, _) = run.plan.recipe, run.tested
    right = sum(rows[number][0] == rows[number][1] for number in spaced)
    title = f"Predicted {what(recipe)}: {right} of {len(spaced)} right"
    turned = ", each turned counter-clockwise at random" if recipe.job == "rotation" else ""
    caption = f"{_data(recipe)}: {shown_of(len(spaced), len(rows), recipe.tested_on)}{turned}"
    return _pictures(run, spaced, title, caption)


def _confusion(run: _Run) -> Figure | None:
    recipe, images = run.plan.recipe, len(run.plan.data.test["label"])
    if (counts := read_summary(run.workdir)["confusion"]) is None:  # of too many classes
        return None
    matrix = np.array(counts)
    views = f"all four turns of {images:,}" if recipe.job == "rotation" else f"{images:,}"
    title = f"Predicted {what(recipe)}: {np.trace(matrix) / matrix.sum():.2%} right"
    return plots.confusion(matrix, recipe.classes, title, f"{_data(recipe)}: {views} {recipe.tested_on}")


def _mistakes(run: _Run) -> Figure:
    recipe, (rows, _, worst) = run.plan.recipe, run.tested
    count = sum(true != predicted for true, predicted, _ in rows)
    surest = f"the surest {len(worst)} of {count:,}" if len(worst) < count else f"all {count}" if count else "none"
    turned = ", each on one random turn" if recipe.job == "rotation" else ""
    caption = f"{_data(recipe)}: of the {len(rows):,} {recipe.tested_on}{turned}, the surest first"
    return _pictures(run, worst, f"Mistaken {what(recipe)}: {surest}", caption)


def _pictures(run: _Run, images: dict[int, np.ndarray], title: str, caption: str) -> Figure:
    rows = [run.tested[0][number] for number in images]
    true, predicted, sure = zip(*rows, strict=True) if rows else ((), (), ())
    return plots.predictions([*images.values()], true, predicted, sure, run.plan.recipe.classes, title, caption)


def _table(run: _Run) -> list[Sequence]:
    """Each test image by its file or number; what it is, what the network takes it for, and how probable it says that is."""
    classes, names, (rows, _, _) = run.plan.recipe.classes, run.plan.data.files, run.tested
    lines = [
        (name, classes[true], classes[predicted], f"{sure:.6f}")
        for name, (true, predicted, sure) in zip(names or itertools.count(), rows, strict=bool(names))
    ]
    return [("file" if names else "image", "label", "prediction", "probability"), *lines]


def _filters(run: _Run) -> Figure:
    recipe, before = run.plan.recipe, run.plan.backbone
    if before is None:
        before = rotjax.part(rotjax.init_variables(recipe.model(), recipe.seed, recipe.image_size), "backbone")
    first, last = (b["params"]["stem"]["conv"]["kernel"] for b in (before, rotjax.part(run.variables, "backbone")))
    title = f"First layer of {recipe.backbone} before and after training on {_data(recipe)}"
    return plots.filters(np.asarray(first), np.asarray(last), title)


def _data(recipe: rotjax.Recipe) -> str:
    return plots.short(Path(recipe.dataset).resolve().name, 40)


def evenly(count: int) -> set[int]:
    """The numbers of up to SHOWN of `count` images, evenly spaced: the first of a folder would be of one class."""
    return set(np.linspace(0, count - 1, SHOWN).astype(int).tolist())


def shown_of(shown: int, count: int, what: str) -> str:
    """Which of `count` images are shown, in words: all, or some evenly spaced."""
    return f"all {count:,} {what}" if shown == count else f"{shown} of the {count:,} {what}, evenly spaced"


def what(recipe: rotjax.Recipe) -> str:
    """What is predicted, in the plural."""
    return "rotations" if recipe.job == "rotation" else "classes"


FIGURES: dict[str, Callable[[_Run], Figure | list[Sequence] | None]] = {
    "curves.png": _curves,
    "predictions.png": _predictions,
    "predictions.csv": _table,
    "mistakes.png": _mistakes,
    "confusion.png": _confusion,
    "filters.png": _filters,
}
