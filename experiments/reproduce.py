"""Reproduces the report that rotjax implements: `python -m experiments.reproduce`."""

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

from experiments import command, tables
from experiments.flags import DataDir, Execution, ResultsDir, default
from experiments.outcomes import RESULTS, accuracy, commit, read_result
from experiments.report import say
from experiments.rows import Run, runs, shortened
from rotjax import manifests
from rotjax.errors import CheckpointError, UsageError, reason
from rotjax.files import read_rows, write, write_json
from rotjax.locks import taken
from rotjax.presets import Preset
from rotjax.recipe_json import to_json
from rotjax.workdirs import read_recipe, read_summary

EPOCH_IMAGES = {"cifar10": 50_000, "imagenette": 9_469}  # what an estimate counts with
PICTURED = {  # what is kept of a run's figures among the results, and as what
    "1-rotation-seed0": {name: name for name in ("predictions.png", "mistakes.png", "filters.png")},
    "3a-classification-seed0": {"predictions.png": "class-predictions.png"},
}
COST = {"resnet18": 1.0, "resnet50": 3.2, "resnet101": 5.4, "densenet121": 3.5}  # time per image, of ResNet18's


@dataclass(frozen=True)
class Settings:
    """Which rows, and where everything goes."""

    preset: Preset = "report"
    """The report's rows, or strong: its tasks by today's recipe, S1 to S3b, and what chose it, S0, on a GPU."""
    only: Annotated[str, default("all")] = ""
    """Rows, or runs as --list names them, separated by commas; what they start from is added."""
    seeds: int = 1
    """Number of seeds, for rows 1 to 3b and S1 to S3b only."""
    list: bool = False
    """Show what is done, under way and left, and run nothing."""
    max_steps: Annotated[int | None, default("as many as the recipe says")] = None
    """Stop every run after so many steps: a trial, which the tables keep apart."""
    workdirs: Path = Path("runs/reproduce")
    """Folder of the workdirs: complete runs are skipped, interrupted ones resume."""
    results: ResultsDir = RESULTS
    """Folder of the results: a JSON and a metrics file for every run, the tables and figures made from them."""
    data_dir: DataDir = None
    """Folder of data sets prepared for TFDS."""
    data_note: Annotated[str, default("none")] = ""
    """Stored with every result and said in the tables, such as that the images are a copy."""


def main() -> int:
    """Parses the flags and reproduces; returns the exit code."""
    return command.cli(run, "reproduce")


def run(settings: Settings) -> None:
    """Run every row of the report, or those asked for, and write the comparison. Run it again to go on."""
    for name in ("seeds", "max_steps"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise UsageError(f"--{name}={value} is too small; it is at least 1")
    command.check_folder("workdirs", settings.workdirs)
    tables.check(settings.results)
    every = runs(settings.seeds, settings.preset)
    if settings.max_steps:
        every = [shortened(run, settings.max_steps) for run in every]
    asked = chosen(every, settings.only)
    if settings.list:
        say(overview(asked, settings))
        return
    left = [this for this in asked if not done(this, settings)]
    check_prepared(left, settings.data_dir)
    for this in left:
        say(f"\n{overview(asked, settings, this)}\n")
        carry_out(this, settings)
    if tables.old(settings.results):  # of a run that was stopped at its very end
        tables.write(settings.results)
    say(f"\n{overview(asked, settings)}")
    say(f"\n{settings.results / 'README.md'}")


def chosen(every: Sequence[Run], only: str) -> list[Run]:
    """Those of `every` whose row or name is in the comma-separated `only`, and what they start from, in order."""
    words = [word.strip() for word in only.split(",")] if only else []
    rows = ", ".join(dict.fromkeys(run.row for run in every))
    for word in words:
        if not _called(word, every):
            more = ((preset, seeds) for seeds in (1, 3) for preset in get_args(Preset))
            flags = [f"--preset={preset} --seeds={seeds}" for preset, seeds in more if _called(word, runs(seeds, preset))]
            shown = f"give {flags[0].removesuffix(' --seeds=1')}" if flags else "name one, or a run that --list shows"
            raise UsageError(f"--only: there is no row {word!r} among {rows}; {shown}")
    asked = [run for run in every if not words or run.row in words or run.name in words]
    needed = [run.after for run in asked if run.after]
    return [run for run in every if run in asked or run in needed]


def _called(word: str, every: Sequence[Run]) -> bool:
    """Whether a row or a run of `every` is called so."""
    return any(word in (run.row, run.name) for run in every)


def check_prepared(left: Sequence[Run], data_dir: Path | None) -> None:
    """Raises DataError where a run of those `left` lacks its data set, before hours go into the others."""
    from rotjax.data import catalogue

    for run in left:
        recipe = run.recipe.resolved()
        if recipe.dataset != "digits":
            catalogue.newest(catalogue.qualified(recipe.dataset, recipe.image_size), catalogue.home(data_dir))


def carry_out(run: Run, settings: Settings) -> None:
    """Trains or resumes `run`, or finds it complete; writes its result, and the tables anew."""
    recipe, workdir = run.recipe, settings.workdirs / run.name
    if run.after:
        recipe = dataclasses.replace(recipe, pretrained=str(settings.workdirs / run.after.name))
    folder = command.made(settings.results / "runs")
    # Before it trains: later the clone may be at another. What an earlier call completed may be of any.
    code = "" if (workdir / "summary.json").exists() else commit()
    command.train(recipe, Execution(workdir=workdir, data_dir=settings.data_dir))
    result = {
        "row": run.row,
        "variant": run.variant,
        "task": run.recipe.job,
        "seed": run.recipe.seed,
        "commit": code,
        "data_note": settings.data_note,
        "recipe": to_json(read_recipe(workdir)),
        "summary": read_summary(workdir),
    }
    if run.after:
        result["pretext"] = accuracy(read_summary(settings.workdirs / run.after.name))
    pictures = PICTURED.get(run.name, {})
    try:
        metrics, *drawn = ((workdir / name).read_bytes() for name in ("metrics.jsonl", *pictures))
    except OSError as error:
        lost = f"{error.filename} cannot be read ({reason(error)})"
        raise CheckpointError(f"{lost}; bring it back, or remove {workdir}: the same command trains it anew") from error
    with tables.claimed(settings.results):
        (folder / f"{run.name}.json").unlink(missing_ok=True)  # or a kill would leave it beside metrics of another training
        write(folder / f"{run.name}.jsonl", metrics)
        for kept, picture in zip(pictures.values(), drawn, strict=True):
            write(settings.results / kept, picture)
        write_json(folder / f"{run.name}.json", result)  # last: with it the run is done, see `done`
    tables.write(settings.results)


def done(run: Run, settings: Settings) -> bool:
    """Whether `run`, by the recipe that it has now, is complete and its result among the others."""
    workdir, result = settings.workdirs / run.name, settings.results / "runs" / f"{run.name}.json"
    if not ((workdir / "summary.json").exists() and result.exists()):
        return False
    if read_result(result)["summary"] != read_summary(workdir):  # of another training, such as a clone comes with
        return False
    asked, trained = run.recipe.resolved(), read_recipe(workdir)
    return all(getattr(asked, name) == getattr(trained, name) for name in run.given)


def overview(asked: Sequence[Run], settings: Settings, running: Run | None = None) -> str:
    """A line for each run, done with its accuracy, running, interrupted or left; and about how long the rest takes."""
    lines, speeds, left, finished = [], [], 0.0, {run.name for run in asked if done(run, settings)}
    for run in asked:
        if run.name in finished:
            summary = read_summary(settings.workdirs / run.name)
            state = f"{accuracy(summary):.2f}%"
            speeds += [summary["images_per_second"] * cost(run)] if summary["images_per_second"] else []
        elif (settings.workdirs / run.name / "summary.json").exists():
            state = f"complete, but not among {settings.results}"
        else:
            steps, total = progress(run, settings.workdirs)
            under_way = run is running or taken(settings.workdirs / run.name / ".lock")
            state = "running" if under_way else f"interrupted at step {steps}" if steps else "left"
            left += (total - steps) * run.recipe.resolved().views * cost(run)
        other = run.published or run.goal
        lines.append(f"{run.row:4}{run.name:40}{f'{other:.2f}%' if other else '-':>10}   {state}")
    header = f"{'row':4}{'run':40}{'goal' if settings.preset == 'strong' else 'report':>10}   here"
    speed = statistics.median_high(speeds) if speeds else None
    hours = f"about {left / speed / 3600:.1f} hours" if speed else "how long is known once a run is done"
    return "\n".join([header, *lines, f"{len(finished)} of {len(asked)} done; left: {hours}"])


def progress(run: Run, workdirs: Path) -> tuple[int, int]:
    """The step that `run` has got to, as its metrics or its checkpoints say, and about how many it has."""
    recipe = run.recipe.resolved()
    total = min(recipe.epochs * (EPOCH_IMAGES[recipe.dataset] // recipe.batch_size), recipe.max_steps or sys.maxsize)
    metrics = workdirs / run.name / "metrics.jsonl"
    rows = read_rows(metrics) if metrics.exists() else []
    steps = [0, *(row["step"] for row in rows)]
    with suppress(OSError):  # of what the run itself will tell
        steps += manifests.steps(workdirs / run.name / "checkpoints")
    return max(steps), total


def cost(run: Run) -> float:
    """Time that an image takes, of a full step of ResNet18 at 32 px; frozen stages need no backward pass."""
    network = (run.after or run).recipe.resolved()
    size = run.recipe.resolved().image_size / 32 * (4 if network.stem == "cifar" else 1)  # of maps after the stem
    frozen = 0.5 if run.recipe.frozen else 1.0
    return COST[network.backbone] * size**2 * frozen


if __name__ == "__main__":
    sys.exit(main())
