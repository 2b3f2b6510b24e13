"""The comparison with the report, Markdown and figures made from committed results: `python -m experiments.tables`."""

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import figures
from experiments.report import say
from experiments.rows import ROWS, SUBSETS, WHOLE, Run, runs

RESULTS = Path(__file__).parent / "results"
CURVES = {  # of Figure 1: the runs on all images, label, colour
    "frozen": ("2a", "frozen to the last block, from row 1", figures.BLUE),
    "full": ("3a", "everything trains, from row 1", figures.VERMILLION),
    "scratch": ("3b", "everything trains, from random weights", figures.GREY),
}

Result = dict  # what experiments.reproduce leaves of a run


def main() -> int:
    """Writes the tables and figures of experiments/results anew; returns the exit code."""
    write(RESULTS)
    say(str(RESULTS / "README.md"))
    return 0


def write(folder: Path) -> None:
    """Writes `README.md` and the figures in `folder` from the results in `folder/runs`."""
    results = load(folder)
    for name, make in FIGURES.items():
        _draw(folder / name, make, results)
    (folder / "README.md").write_text(readme(results, sorted(path.name for path in folder.glob("*.png")), controls(folder)))


def load(folder: Path) -> list[Result]:
    """Every result in `folder/runs`, in the order of the rows, with its rows of metrics as `epochs`."""
    results = []
    for path in (folder / "runs").glob("*.json"):
        rows = map(json.loads, path.with_suffix(".jsonl").read_text().splitlines())
        results.append(json.loads(path.read_text()) | {"epochs": [row for row in rows if "test_accuracy" in row]})
    return sorted(results, key=lambda result: (*_group(result), result["seed"]))


def controls(folder: Path) -> dict[str, float]:
    """Test accuracy in % of each run that PyTorch has trained too, by name."""
    paths = sorted((folder / "controls").glob("*.json"))
    return {path.stem: 100 * json.loads(path.read_text())["summary"]["accuracy"] for path in paths}


def accuracy(summary: dict) -> float:
    """The final test accuracy in %, of rotations on all four turns."""
    return 100 * (summary["rotation_accuracy"] if "rotation_accuracy" in summary else summary["accuracy"])


def readme(
    results: Sequence[Result], pictures: Sequence[str] = (), torch: Mapping[str, float] = MappingProxyType({})
) -> str:
    """The page about `results`, with those `pictures`, and what `controls` by PyTorch say."""
    whole = [result for result in results if result["recipe"]["max_steps"] is None]
    trials = [result for result in results if result["recipe"]["max_steps"] is not None]
    known = {(run.row, run.variant, run.recipe.job): run for run in runs()}
    main = [result for result in whole if result["row"] != "4"]
    missing = dict.fromkeys(run.row for key, run in known.items() if key not in {_key(result) for result in whole})
    parts = [
        "# Results\n\nMade by `python -m experiments.reproduce`; again from `runs/` by `python -m experiments.tables`.\n"
        "Test accuracy in % after the last epoch, the mean over seeds and, from two on, their standard deviation.\n"
        "Rotations are scored on all four turns of every test image. The report's are single runs.",
        _table(
            ("row", "what", "network", "report", "rotjax", "seeds", "difference", "band", "device", "minutes", "command"),
            (_line(list(group), known) for _, group in groupby(main, _group)),
        ),
        *_data_notes(whole),
        *_controls(whole, torch),
        "## The first epoch\n\nTest accuracy in % after one epoch of fine-tuning; the report has 64.69 and 40.66.",
        _table(
            ("row", "from", "report", "rotjax"),
            (
                (
                    row,
                    start,
                    published,
                    _mean([100 * r["epochs"][0]["test_accuracy"] for r in main if _key(r)[:2] == (row, "")]),
                )
                for row, start, published in (("3a", "row 1", "64.69"), ("3b", "random weights", "40.66"))
                if any(_key(r)[:2] == (row, "") for r in main)
            ),
        ),
    ]
    if subsets := _subsets(whole):
        parts += [
            "## Few labels (row 4)\n\nTest accuracy in %, by training images per class; the mean over draws.",
            _table(("images per class", *CURVES), subsets),
        ]
    parts += [f"![{caption}]({name})" for name, caption in CAPTIONS.items() if name in pictures]
    if trials:
        parts += [
            "## Trials\n\nStopped early, to see that a row runs; not to be compared with the report.",
            _table(("run", "steps", "accuracy"), ((_name(r), r["summary"]["steps"], _mean([_score(r)])) for r in trials)),
        ]
    parts.append(f"Rows of which runs are missing: {', '.join(sorted(missing))}." if missing else "Every row has been run.")
    return "\n\n".join(parts) + "\n"


def subset_curves(results: Sequence[Result]) -> Figure | None:
    """Test accuracy over the number of training images, the mean and the range over draws."""
    figure = figures.titled((7, 4), "Few labels: what pretraining by rotation is worth (row 4)")
    axes = figure.subplots()
    for kind, (_, label, colour) in CURVES.items():
        points = {count: _scores(results, kind, count) for count in (*SUBSETS, WHOLE)}
        points = {10 * count: scores for count, scores in points.items() if scores}
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


def first_epochs(results: Sequence[Result]) -> Figure | None:
    """Accuracy over epochs of fine-tuning, from the rotation network (row 3a) and from random weights (row 3b)."""
    figure = figures.titled((7, 4), "Fine-tuning, pretrained and not (rows 3a and 3b)")
    axes = figure.subplots()
    for row, label, colour in (("3a", "from row 1", figures.VERMILLION), ("3b", "from random weights", figures.GREY)):
        for number, result in enumerate(r for r in results if _key(r)[:2] == (row, "")):
            epochs = [epoch["epoch"] for epoch in result["epochs"]]
            for split, line in (("test", "-"), ("train", "--")):
                values = [100 * epoch[f"{split}_accuracy"] for epoch in result["epochs"]]
                name = f"{label}, {split}" if number == 0 else None
                axes.plot(epochs, values, line, color=colour, marker="o", markersize=3, label=name)
    if not axes.lines:
        return None
    axes.set(xlabel="epoch", ylabel="accuracy in %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def rotation_confusion(results: Sequence[Result]) -> Figure | None:
    """Which rotations are taken for which (row 1)."""
    return _confusion(results, "1", "rotation")


def class_confusion(results: Sequence[Result]) -> Figure | None:
    """Which classes are taken for which (row 3a)."""
    return _confusion(results, "3a", "class")


FIGURES: dict[str, Callable[[Sequence[Result]], Figure | None]] = {
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


def _draw(path: Path, make: Callable[[Sequence[Result]], Figure | None], results: Sequence[Result]) -> None:
    whole = [result for result in results if result["recipe"]["max_steps"] is None]
    with matplotlib.style.context(["default", figures.STYLE]):
        figure = make(whole)
        if figure:
            figures.save(figure, path)


def _confusion(results: Sequence[Result], row: str, what: str) -> Figure | None:
    summed = [result for result in results if _key(result)[:2] == (row, "")]
    if not summed:
        return None
    matrix = np.sum([result["summary"]["confusion"] for result in summed], axis=0)
    title = f"Predicted {what} (row {row}): {np.trace(matrix) / matrix.sum():.2%} right"
    return figures.confusion(matrix, summed[0]["recipe"]["classes"], title, f"{len(summed)} seeds: views of test images")


def _line(group: Sequence[Result], known: dict[tuple, Run]) -> tuple:
    one = group[0]
    run, scores = known.get(_key(one)), [_score(result) for result in group]
    published, band = (run.published, run.band) if run else (None, None)
    mean = statistics.mean(scores)
    inside = "" if not band else f"{band[0]:.1f} to {band[1]:.1f}" + ("" if band[0] <= mean <= band[1] else ", **outside**")
    return (
        one["row"],
        run.what if run else one["variant"],
        one["recipe"]["backbone"],
        f"{published:.2f}" if published else "",
        f"**{_mean(scores)}**",
        len(scores),
        f"{mean - published:+.2f}" if published else "",
        inside,
        one["summary"]["device"],
        f"{statistics.mean(result['summary']['wall_seconds'] for result in group) / 60:.1f}",
        f"`--only={one['row']}`",
    )


def _subsets(results: Sequence[Result]) -> list[tuple]:
    lines = []
    for count in (*SUBSETS, WHOLE):
        scores = [_scores(results, kind, count) for kind in CURVES]
        if any(scores):
            lines.append((count, *(_mean(s) if s else "" for s in scores)))
    return lines if any(result["row"] == "4" for result in results) else []


def _scores(results: Sequence[Result], kind: str, count: int) -> list[float]:
    """Accuracies of Figure 1's curve `kind` at `count` images per class."""
    key = (CURVES[kind][0], "") if count == WHOLE else ("4", f"{kind}-{count}")
    return [_score(result) for result in results if _key(result)[:2] == key]


def _data_notes(results: Iterable[Result]) -> list[str]:
    notes = sorted({result["data_note"] for result in results if result.get("data_note")})
    return [f"Data: {'; '.join(notes)}."] if notes else []


def _controls(results: Sequence[Result], torch: Mapping[str, float]) -> list[str]:
    """PyTorch's accuracy beside ours of the same row and seed: what both share is not the port's doing."""
    ours = {f"{_name(result)}-seed{result['seed']}": _score(result) for result in results}
    lines = [(name, f"{ours[name]:.2f}", f"{score:.2f}") for name, score in torch.items() if name in ours]
    title = (
        "## Controls\n\nThe same row by PyTorch (`python -m experiments.control`), with torchvision's network, on the same "
        "data and from the same weights: a difference from the report that both share is not the port's."
    )
    return [title, _table(("run", "rotjax", "PyTorch"), lines)] if lines else []


def _table(header: Sequence[str], lines: Iterable[Sequence]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _mean(scores: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{spread}"


def _score(result: Result) -> float:
    return accuracy(result["summary"])


def _key(result: Result) -> tuple[str, str, str]:
    return result["row"], result["variant"], result["task"]


def _group(result: Result) -> tuple:
    """Sorts by row, by variant, the pretext before what starts from it."""
    return ROWS.index(result["row"]), result["variant"], result["task"] != "rotation"


def _name(result: Result) -> str:
    return "-".join(filter(None, (result["row"], result["variant"], result["task"])))


if __name__ == "__main__":
    sys.exit(main())
