"""The comparison with the report, made from the results alone: `python -m experiments.tables --help`."""

import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from experiments import command, comparison
from experiments.flags import ResultsDir
from experiments.outcomes import (
    PROBES,
    RESULTS,
    WEIGHTS,
    Outcome,
    accuracy,
    controls,
    load,
    mean_and_spread,
    probes,
    subset_scores,
)
from experiments.report import say
from experiments.rows import ROWS, STRONG, SUBSETS, WHOLE, Run, every, runs
from rotjax import files
from rotjax.errors import UsageError
from rotjax.locks import locked

TITLE = "# Results\n\nMade by `python -m experiments.reproduce`"
BEGINNINGS = {"3a": ("row 1", "64.69"), "3b": ("random weights", "40.66")}  # and the report's first epoch


def main() -> int:
    """Parses the flags and writes the tables and figures; returns the exit code."""
    return command.cli(run, "tables", resumes=False)


def run(results: ResultsDir = RESULTS) -> None:
    """Write the page that compares with the report, and its figures, anew from `runs/`, `controls/` and `probes/`.

    Args:
        results: Folder of the results.
    """
    check(results, there=True)
    if not any((results / name).is_dir() for name in ("runs", "controls", "probes")):
        raise UsageError(f"--results={results} holds no results; name the folder of experiments.reproduce --results")
    write(results)
    say(str(results / "README.md"))


def check(folder: Path, there: bool = False) -> None:
    """Raises UsageError where `folder` can hold no results, or has a page that was not made of some, CheckpointError for
    a result that is none.
    """
    command.check_folder("results", folder, there)
    page = folder / "README.md"
    if page.is_file() and not page.read_bytes().startswith(TITLE.encode()):
        raise UsageError(f"--results={folder} holds a README.md that is not of results; name another folder")
    for read in (load, controls, probes):  # as `write` will: now, before there is anything to lose
        read(folder)


def old(folder: Path) -> bool:
    """Whether the page is not there, or older than a result of a run."""
    page, results = folder / "README.md", (folder / "runs").glob("*.json")
    return not page.exists() or any(path.stat().st_mtime_ns > page.stat().st_mtime_ns for path in results)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lets one process after the other write in the `folder` of results; raises CheckpointError where it cannot."""
    with files.writing(folder), locked(folder / ".lock", f"the page of {folder}", wait=True):
        yield


def write(folder: Path) -> None:
    """Writes `README.md` and the figures in `folder` from the results in `folder/runs`, one process after the other."""
    with claimed(folder):
        outcomes = load(folder)
        comparison.draw(folder, [one for one in outcomes if one.whole])
        pictures = [path.name for path in folder.glob("*.png")]
        files.write(folder / "README.md", readme(outcomes, pictures, controls(folder), probes(folder)))


def readme(outcomes: Sequence[Outcome], pictures: Sequence[str], torch: Mapping[str, dict], probed: Sequence[dict]) -> str:
    """The page about `outcomes`, with those `pictures`, and what `controls` by PyTorch and `probes` say."""
    whole = [one for one in outcomes if one.whole]
    parts = [
        f"{TITLE}; again from `runs/` by `python -m experiments.tables`.\n"
        "Test accuracy in % after the last epoch, the mean over seeds and, from two on, their standard deviation.\n"
        "Rotations are scored on all four turns of every test image. The report's are single runs. A band is where\n"
        "the mean was expected before the first run. Minutes count waiting, too, where runs shared a machine.",
        *_rows([one for one in whole if one.row in ROWS]),
        *_strong([one for one in whole if one.row in STRONG]),
        *_data_notes(whole),
        *_other_beginnings(whole),
        *_controls(whole, torch),
        *_first_epochs(whole),
        *_subsets(whole),
        *_probes(probed, {one.name: one.score for one in whole}),
        *(f"![{caption}]({name})" for name, caption in comparison.CAPTIONS.items() if name in pictures),
        *_trials([one for one in outcomes if not one.whole]),
        _missing({one.name for one in whole}),
    ]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], lines: Iterable[Sequence]) -> str:
    """A table in Markdown."""
    rows = [header, ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rows(outcomes: Sequence[Outcome]) -> list[str]:
    known = {run.key: run for run in runs()}
    header = ("row", "what", "network", "report", "rotjax", "seeds", "difference", "band", "device", "minutes", "command")
    groups = groupby((one for one in outcomes if one.row != "4"), lambda one: one.key)
    lines = [_line(list(group), known.get(key)) for key, group in groups]
    return [table(header, lines)] if lines else []


def _line(group: Sequence[Outcome], run: Run | None) -> tuple:
    one, scores = group[0], [outcome.score for outcome in group]
    published, band = (run.published, run.band) if run else (None, None)
    score = statistics.mean(scores)
    inside = "" if not band else f"{band[0]:.1f} to {band[1]:.1f}" + ("" if band[0] <= score <= band[1] else ", **outside**")
    return (
        one.row,
        run.what if run else one.variant,
        one.recipe["backbone"],
        f"{published:.2f}" if published else "",
        f"**{mean_and_spread(scores)}**",
        len(scores),
        f"{score - published:+.2f}" if published else "",
        inside,
        *_where(group),
        f"`--only={one.row}" + f" --seeds={len(scores)}" * (len(scores) > 1) + "`",
    )


def _where(group: Sequence[Outcome]) -> tuple[str, str]:
    """The devices of the runs of `group`, with how many ran on each if there are several; the minutes on each."""
    by_device = {
        device: [one for one in group if one.summary["device"] == device]
        for device in dict.fromkeys(one.summary["device"] for one in group)
    }
    several = len(by_device) > 1
    devices = (f"{device} ({len(ran)})" if several else device for device, ran in by_device.items())
    return "; ".join(devices), "; ".join(map(_minutes, by_device.values()))


def _minutes(group: Sequence[Outcome]) -> str:
    minutes = statistics.mean(one.summary["wall_seconds"] for one in group) / 60
    return f"{minutes:.1f}" + " after it was resumed" * any(one.summary["resumed_from"] for one in group)


def _strong(outcomes: Sequence[Outcome]) -> list[str]:
    known = {run.key: run for run in runs(preset="strong")}
    lines = []
    for key, group in groupby(outcomes, lambda one: one.key):
        same, run = list(group), known.get(key)
        goal = f"{run.goal:.1f}" if run and run.goal else ""
        what, score = run.what if run else key[1], mean_and_spread([one.score for one in same])
        lines.append((key[0], what, goal, f"**{score}**", len(same), *_where(same)))
    title = (
        "## Today's recipe\n\nThe tasks of rows 1 to 3b by `python -m experiments.reproduce --preset=strong`: ResNet18\n"
        "with the 3x3 stem, SGD along a cosine, rotations in all four turns of 128 images a step, classes of 512; the\n"
        "goals are rotjax's own, for the original pixels. Row S0, scored on a tenth of the training images that it holds\n"
        "out, chose the classifiers' cutout and label smoothing."
    )
    return [title, table(("row", "what", "goal", "rotjax", "seeds", "device", "minutes"), lines)] if lines else []


def _data_notes(outcomes: Sequence[Outcome]) -> list[str]:
    """What is known of the data; where it is not the same of all runs on a set, of which."""
    notes: dict[str, dict[str, list[str]]] = {}
    for one in outcomes:
        notes.setdefault(one.recipe["dataset"], {}).setdefault(one.data_note, []).append(one.name)
    parts = [
        (note or f"nothing is said of {dataset}") + f" ({', '.join(names)})" * (len(same) > 1)
        for dataset, same in notes.items()
        for note, names in same.items()
        if note or len(same) > 1
    ]
    return [f"Data: {'; '.join(parts)}."] if parts else []


def _other_beginnings(outcomes: Sequence[Outcome]) -> list[str]:
    """Which runs start from a training of an earlier row that is not, or no longer, the one in the table."""
    scores = {one.name: one.score for one in outcomes}
    after = {name: run.after.name for name, run in _known(outcomes).items() if run.after}
    other: dict[tuple[str, float], list[str]] = {}
    for one in outcomes:
        begun = after.get(one.name)
        if one.pretext and begun in scores and not math.isclose(one.pretext, scores[begun]):
            other.setdefault((begun, one.pretext), []).append(one.name)
    few = {one.name for one in outcomes if one.row == "4" and one.pretext}
    for names in other.values():
        if 2 * len(few & {*names}) > len(few):
            rest = ", ".join(sorted(few - {*names}))
            names[:] = [*(name for name in names if name not in few), "row 4" + f" but for {rest}" * bool(rest)]
    parts = [f"{', '.join(names)} from {begun} with {score:.2f}" for (begun, score), names in other.items()]
    return [f"From another training than the one in the table: {'; '.join(parts)}."] if parts else []


def _known(outcomes: Sequence[Outcome]) -> dict[str, Run]:
    """Every run of as many seeds as there are, by name."""
    return {run.name: run for run in every(1 + max((one.seed for one in outcomes), default=0))}


def _controls(outcomes: Sequence[Outcome], torch: Mapping[str, dict]) -> list[str]:
    """PyTorch's accuracy beside ours of the same row and seed: what both share is not the port's doing."""
    lines, known = [], _known(outcomes)
    for one in outcomes:
        if control := torch.get(one.name):
            began = {f"{start:.2f}" for start in (one.pretext, control.get("pretext")) if start}
            other = f", from networks of {' and '.join(sorted(began))}" * (len(began) > 1)
            recipe = control.get("recipe", {})  # older ones do not say it
            same = known[one.name].given & recipe.keys() if one.name in known else set()
            other += ", by another recipe" * any(one.recipe.get(name, recipe[name]) != recipe[name] for name in same)
            lines.append((one.name, f"{one.score:.2f}", f"{accuracy(control['summary']):.2f}{other}"))
    title = (
        "## Controls\n\nThe same row by PyTorch (`python -m experiments.control`), with torchvision's network, on the same "
        "data and from the same pretrained weights, if any: a difference from the report, or a goal, that both share is not "
        "the port's."
    )
    return [title, table(("run", "rotjax", "PyTorch"), lines)] if lines else []


def _first_epochs(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for row, beginning in BEGINNINGS.items():
        epochs = [epoch for one in outcomes if one.key[:2] == (row, "") for epoch in one.epochs]
        if first := [100 * epoch["test_accuracy"] for epoch in epochs if epoch["epoch"] == 1]:
            lines.append((row, *beginning, mean_and_spread(first)))
    title = "## The first epoch\n\nTest accuracy in % after one epoch of fine-tuning."
    return [title, table(("row", "from", "report", "rotjax"), lines)] if lines else []


def _subsets(outcomes: Sequence[Outcome]) -> list[str]:
    if not any(one.row == "4" for one in outcomes):
        return []
    lines = []
    for count in (*SUBSETS, WHOLE):
        scores = [subset_scores(outcomes, kind, row, count) for kind, (row, *_) in comparison.CURVES.items()]
        if any(scores):
            lines.append((count, *(f"{mean_and_spread(s)} ({len(s)})" if s else "" for s in scores)))
    title = (
        "## Few labels (row 4)\n\nTest accuracy in %, by training images per class; the mean over draws, and how many.\n"
        "5000 are all: rows 2a, 3a and 3b."
    )
    return [title, table(("images per class", *comparison.CURVES), lines)]


def _probes(probed: Sequence[dict], scores: Mapping[str, float]) -> list[str]:
    """Of each run its probes; `scores` are of the runs in the table: another training may have been probed."""
    parts = []
    for one in probed:
        other = " (another training than the one above)" * (scores.get(one["run"], one["accuracy"]) != one["accuracy"])
        data = f"{one['dataset']}, {one['image_size']} px{other}"
        title = (
            f"## Features of {one['run']} on {data}\n\nAccuracy in % on {one['tested_on']}, from the mean "
            f"over each stage's map, by `python -m experiments.probe`:\nlogistic regression, and the "
            f"{one['neighbors']} nearest of {one['train_images']:,} images. random: random weights; trained: those of a run "
            f"with {one['accuracy']:.2f} % at its own task."
        )
        header = ["stage", "values", *(f"{kind}, {weights}" for kind in PROBES for weights in WEIGHTS)]
        lines = [
            (
                stage["stage"],
                stage["values"],
                *(f"{100 * stage[kind][weights]:.2f}" for kind in PROBES for weights in WEIGHTS),
            )
            for stage in one["stages"]
        ]
        parts += [title, table(header, lines)]
    return parts


def _trials(outcomes: Sequence[Outcome]) -> list[str]:
    lines = [(one.name, one.summary["steps"], mean_and_spread([one.score])) for one in outcomes]
    title = "## Trials\n\nStopped early, to see that a row runs; not to be compared with the report."
    return [title, table(("run", "steps", "accuracy"), lines)] if lines else []


def _missing(there: set[str]) -> str:
    missing = Counter(run.row for run in runs() if run.name not in there)
    rows = (f"{count} of row {row}" for row, count in sorted(missing.items()))
    return f"Runs that are missing: {', '.join(rows)}." if missing else "Every row of the report has been run."


if __name__ == "__main__":
    sys.exit(main())
