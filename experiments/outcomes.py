"""What trained runs came to, as `experiments.reproduce` and `experiments.control` leave it among the results."""

import re
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.rows import ROWS, STRONG, WHOLE, named
from rotjax.errors import CheckpointError, reason
from rotjax.files import read_json, read_rows
from rotjax.workdirs import TOLD

PROBED = ("run", "accuracy", "dataset", "image_size", "train_images", "tested_on", "neighbors", "stages")
PROBES = ("linear", "neighbors")  # what `experiments.probe` puts on top of features
WEIGHTS = ("random", "trained")  # whose features these are
DRAWN = {"backbone", "dataset", "image_size", "classes", "max_steps"}  # fields of a recipe that tables and figures show
CLONE = Path(__file__).parent / "results"
RESULTS = CLONE if CLONE.is_dir() else Path("results")  # which an installed package comes without


@dataclass(frozen=True)
class Outcome:
    """A run's result: its `Run.name`, the fields of its JSON, and as `epochs` its rows of metrics with a test accuracy."""

    name: str
    row: str
    variant: str
    task: str
    seed: int
    commit: str
    data_note: str
    recipe: dict[str, Any]
    summary: dict[str, Any]
    pretext: float | None = None  # test accuracy in % of the network that it started from; older results do not say it
    epochs: Sequence[dict[str, Any]] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        """What runs that differ in their seeds alone have in common."""
        return self.row, self.variant, self.task

    @property
    def whole(self) -> bool:
        """Whether it may stand beside the report's: it was not stopped early."""
        return self.recipe["max_steps"] is None

    @property
    def score(self) -> float:
        """The final test accuracy in %."""
        return accuracy(self.summary)


def load(folder: Path) -> list[Outcome]:
    """Every outcome in `folder/runs`: in the order of rows, by variant, the pretext before what starts from it, by seed."""
    return sorted(map(_outcome, (folder / "runs").glob("*.json")), key=_place)


def _outcome(path: Path) -> Outcome:
    """What a run left at `path`, and beside it; raises CheckpointError where it would not leave that."""
    try:
        rows = read_rows(path.with_suffix(".jsonl"))
    except CheckpointError:
        rows = []
    with checked(path):
        one = Outcome(path.stem, **read_result(path), epochs=[row for row in rows if "test_accuracy" in row])
        if (name := named(*one.key, one.recipe["max_steps"], one.seed)) != path.stem:
            raise ValueError(f"but of {name}")
        if missing := (TOLD - one.summary.keys()) | (DRAWN - one.recipe.keys()):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if one.row not in (*ROWS, *STRONG):
            raise ValueError(f"there is no row {one.row}")
        if not 0 <= one.score <= 100:
            raise ValueError(f"accuracy {one.score:.2f}%")
        check_numbers(one.summary["wall_seconds"], *(epoch["train_accuracy"] for epoch in one.epochs))
        numbered = [row["epoch"] for row in one.epochs] == [*range(1, len(one.epochs) + 1)]
        complete = numbered and bool(one.epochs) and one.epochs[-1]["step"] == one.summary["steps"]
    if not complete:
        raise CheckpointError(f"{path}l is missing or damaged; remove it and {path.name}, and run again what wrote them")
    return one


@contextmanager
def checked(path: Path) -> Iterator[None]:
    """Turns what a field that is missing, or that is none, raises in a block that reads `path` into CheckpointError."""
    try:
        yield
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no result of a run ({reason(error)}); move it elsewhere") from error


def check_numbers(*values: Any) -> None:
    """Raises TypeError for what is no number."""
    for value in values:
        if not isinstance(value, (int, float)):
            raise TypeError(f"{value!r} is no number")


def _place(one: Outcome) -> tuple:
    """By numbers where a variant has some: resnet50 before resnet101."""
    variant = [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", one.variant)]
    return (*ROWS, *STRONG).index(one.row), variant, one.task != "rotation", one.seed


def controls(folder: Path) -> dict[str, dict[str, Any]]:
    """What `experiments.control` left of each run that PyTorch has trained too, by name."""
    return {path.stem: _control(path) for path in sorted((folder / "controls").glob("*.json"))}


def _control(path: Path) -> dict[str, Any]:
    result = read_result(path, "summary")
    with checked(path):
        check_numbers(accuracy(result["summary"]))
        result.get("recipe", {}).keys()
    return result


def probes(folder: Path) -> list[dict[str, Any]]:
    """What `experiments.probe` left of each run and data set, by name."""
    return [_probe(path) for path in sorted((folder / "probes").glob("*.json"))]


def _probe(path: Path) -> dict[str, Any]:
    result = read_result(path, *PROBED)
    with checked(path):
        check_numbers(result["accuracy"], result["train_images"])
        for stage in result["stages"]:
            check_numbers(*(stage[kind][weights] for kind in PROBES for weights in WEIGHTS))
    return result


def read_result(path: Path, *fields: str) -> dict[str, Any]:
    """The content of a result's JSON, an object; raises CheckpointError, also where it lacks one of `fields`."""
    try:
        result = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); remove it, and run again what wrote it") from error
    if missing := [name for name in fields if name not in result]:
        raise CheckpointError(f"{path} is no such result, without {', '.join(missing)}; move it elsewhere")
    return result


def accuracy(summary: dict) -> float:
    """The final test accuracy in %, of rotations on all four turns."""
    return 100 * (summary["rotation_accuracy"] if "rotation_accuracy" in summary else summary["accuracy"])


def mean_and_spread(scores: Sequence[float]) -> str:
    """Their mean and, from two on, ± their standard deviation, in two digits."""
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{spread}"


def subset_scores(outcomes: Sequence[Outcome], kind: str, whole: str, count: int) -> list[float]:
    """Accuracies of row 4's `kind` at `count` images per class; at all of them, those of the row `whole`."""
    key = (whole, "") if count == WHOLE else ("4", f"{kind}-{count}")
    return [one.score for one in outcomes if one.key[:2] == key]


def commit() -> str:
    """The commit of the code that runs, with `+` where its files, other than results, differ; empty outside a clone."""

    def git(*words: str) -> str:
        made = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(made, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else another project's clone is around this package
        changed = git("status", "--porcelain", "--", ":/*.py", ":/pyproject.toml")
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return ""
