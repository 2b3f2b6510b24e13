"""What a person sees of a run, in plain ASCII: its progress, a row per epoch, a summary on stdout, warnings on stderr."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from experiments import figures, plots
from rotjax import presets
from rotjax.errors import launcher
from rotjax.planning import Plan
from rotjax.recipe import Classification, Recipe
from rotjax.workdirs import read_summary

HEADER = "epoch   train loss   train accuracy   test loss   test accuracy   elapsed"
MOST, LEAST = 290, 40  # characters of a line of an error, and of a word that is not cut
CHANCE = 1 / 4  # of four turns
FILES = ("recipe.json", "metrics.jsonl", "summary.json", "checkpoints/", *figures.FIGURES)


def say(line: str) -> None:
    """Prints `line` above any bar."""
    _write(line, sys.stdout)


def complain(line: str) -> None:
    """Prints `line` on stderr."""
    _write(f"rotjax: {line}", sys.stderr)


def _write(line: str, stream: TextIO | None) -> None:
    """Characters that `stream` does not know become '?'; a reader that has gone, or a full disk, is no error."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        tqdm.write(line.encode(encoding, "replace").decode(encoding) + "\n", file=stream, end="")
        stream.flush()
    except OSError:  # as under `| head`, or `| tee` at Ctrl-C: no reason to lose hours of training
        mute(stream)


def mute(stream: TextIO) -> None:
    """Sends what `stream` still gets nowhere, whose reader has gone."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def shortened(line: str) -> str:
    """`line` of at most MOST characters: its longest words, paths, lose their middle, last those of what to do."""
    what, semicolon, remedy = line.partition("; ")
    what = _cut(what, MOST - len(semicolon + remedy))
    return _cut(what + semicolon + remedy, MOST)


def _cut(line: str, most: int) -> str:
    """`line` of at most so many characters, or with no word longer than LEAST, at the price of the middle of words."""
    words = line.split(" ")
    while (over := len(" ".join(words)) - most) > 0 and len(longest := max(words, key=len)) > LEAST:
        half = (max(len(longest) - over, LEAST) - 3) // 2
        words[words.index(longest)] = f"{longest[:half]}...{longest[-half:]}"
    return " ".join(words)


class Lines(logging.Handler):
    """Says what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        (say if record.levelno < logging.WARNING else complain)(record.getMessage())


@contextmanager
def listening() -> Iterator[None]:
    """Says what rotjax and its commands log meanwhile."""
    handler, loggers = Lines(), [logging.getLogger(name) for name in ("rotjax", "experiments")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False  # absl gives the root logger a handler of its own
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


class Progress:
    """A bar over the steps where stdout is a terminal; notes and a row per epoch anywhere."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.epochs = plan.last_epoch
        self.headed = False
        self.bar: tqdm | None = None  # only a run that begins knows the step that it goes on from
        self.last: tuple[int, float] | None = None  # step and time of the last row
        self.speed = ""

    def __enter__(self) -> "Progress":
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.close()

    def move(self, step: int) -> None:
        """Moves the bar to `step`."""
        self.bar = self.bar or self._bar(step)
        self.bar.update(max(step - self.bar.n, 0))

    def show(self, row: dict) -> None:
        """Says beside the bar what `row`, a row of metrics.jsonl, has; a row of an epoch becomes one of the table."""
        step, now = row["step"], time.perf_counter()
        if self.last is None:
            self.last = step, now
        elif now - self.last[1] > 0.05:  # else the row is of the same dispatch
            before, then = self.last
            if step % self.plan.epoch_steps and step != self.plan.steps:  # else the time of testing is in it
                self.speed = f", {(step - before) * self.plan.recipe.views / (now - then):,.0f} images/s"
            self.last = step, now
        loss = row.get("loss", row.get("train_loss"))
        self.move(step)
        if self.bar:
            self.bar.set_postfix_str(f"epoch {row['epoch']}/{self.epochs}, loss {loss:.3f}{self.speed}")
        if "test_accuracy" in row:
            self._tabulate(row, now - self.began)

    def _tabulate(self, row: dict, seconds: float) -> None:
        if not self.headed:
            say("\n" + (HEADER if not self.plan.recipe.validation else HEADER.replace("test", "val.")))
            self.headed = True
        (train_loss, train), (test_loss, test) = (
            (plots.rounded(row[f"{split}_loss"], 4), f"{100 * row[f'{split}_accuracy']:.2f}%") for split in ("train", "test")
        )
        elapsed = tqdm.format_interval(seconds)
        say(f"{row['epoch']:5d}   {train_loss:>10}   {train:>14}   {test_loss:>9}   {test:>13}   {elapsed:>7}")

    def _bar(self, step: int) -> tqdm:
        return tqdm(
            total=self.plan.steps,
            initial=step,
            file=sys.stdout,
            disable=not (sys.stdout and sys.stdout.isatty()),
            leave=False,
            smoothing=0,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| step {n}/{total}, {remaining} left{postfix}",
        )


def summarise(workdir: Path, plan: Plan, data_dir: Path | None = None) -> None:
    """Prints the final figures of the run in `workdir`, where everything is, and what to do next."""
    block = facts(read_summary(workdir))
    width = max(len(name) for name, _ in block) + 3
    say("")
    for name, value in block:
        say(f"{name:{width}}{value}")
    say(f"\n{workdir}")
    say("  " + "  ".join(name for name in FILES if (workdir / name).exists()))
    say(f"\n{next_step(workdir, plan, data_dir)}")


def facts(summary: dict) -> list[tuple[str, str]]:
    """Name and value of each line of the printed block."""
    count, seed = summary["test_images"], summary["seed"]
    images = summary.get("tested_on", "test images")
    if "rotation_accuracy" in summary:
        right = summary["rotation_accuracy"]
        guessed = right < CHANCE + 2 * (CHANCE * (1 - CHANCE) / count) ** 0.5  # within two standard errors
        luck = f": no better than chance, {CHANCE:.0%}" * guessed
        lines = [
            ("rotation accuracy", f"{right:.2%} on all four turns of {count:,} {images}{luck}"),
            ("", f"{summary['rotation_accuracy_random']:.2%} on one random turn of each, as the published report scored"),
        ]
    else:
        lines = [("accuracy", f"{summary['accuracy']:.2%} on {count:,} {images}")]
    lines.append(("data set", f"{summary['dataset']}, {summary['train_images']:,} training images"))
    usual = presets.REPORT["rotation"]["width"]
    width = f", width {given}" if (given := summary.get("width", usual)) != usual else ""  # older ones do not say it
    lines.append(("network", f"{summary['backbone']}, {summary['stem']} stem{width}"))
    epochs = summary["epochs"]
    lines.append(("trained for", f"{epochs:g} epoch{'s' * (epochs != 1)}, {summary['steps']:,} steps, seed {seed}"))
    speed, minutes = summary["images_per_second"], summary["wall_seconds"] / 60
    lines.append(("speed", f"{speed:,.0f} images/s on {summary['device']}") if speed else ("device", summary["device"]))
    since = f" since step {summary['resumed_from']:,}, where it was resumed" if summary["resumed_from"] else ""
    lines.append(("time", f"{minutes:.1f} minutes{since}"))
    return lines


def next_step(workdir: Path, plan: Plan, data_dir: Path | None = None) -> str:
    """The commands or the line of Python that make use of the run in `workdir`."""
    if plan.recipe.job == "classification":
        predict = typed("predict", {"pretrained": workdir, "images": "FOLDER"})
        loaded = f'model, variables, recipe = rotjax.load("{workdir}")'
        return f"next, classify other images:\n  {predict}\nor use it in Python:\n  {loaded}"
    dataset = plan.recipe.dataset if len(plan.data.classes) > 1 else "FOLDER_WITH_A_FOLDER_PER_CLASS"
    recipe, flags = plan.recipe, dict[str, Any](pretrained=workdir, dataset=dataset)
    usual = Classification(dataset=recipe.dataset, preset=recipe.preset).resolved()
    flags |= {name: value for name in ("image_size", "flip") if (value := getattr(recipe, name)) != getattr(usual, name)}
    if recipe.preset != Recipe.preset:
        flags["preset"] = recipe.preset
    if recipe.batch_size != usual.batch_size:
        flags["batch_size"] = recipe.batch_size
    if recipe.validation:
        flags["validation"] = recipe.validation
    if data_dir:
        flags["data_dir"] = data_dir
    probe = {name: value for name, value in flags.items() if name in ("pretrained", "dataset", "data_dir")}
    return (
        f"next, learn classes from it:\n  {typed('classification', flags)}\n"
        f"or see what its features are worth as they are:\n  {typed('probe', probe)}"
    )


def typed(job: str, flags: Mapping[str, Any]) -> str:
    """What to type to run the command `job` with these flags."""

    def word(name: str, value: Any) -> str:
        return ("--" if value else "--no_") + name if isinstance(value, bool) else f"--{name}={shlex.quote(str(value))}"

    words = " ".join(word(name, value) for name, value in flags.items())
    return f"{launcher()}python -m experiments.{job} {words}"
