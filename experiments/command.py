"""What the training commands share: flags, one line for an error, progress, and where everything was left."""

import logging
import os
import shutil
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from tqdm import tqdm

import rotjax
from experiments import report
from rotjax.errors import RotjaxError, UsageError


@dataclass(frozen=True)
class Execution:
    """How a run is carried out, which changes nothing in its weights."""

    workdir: Path | None = None
    """Folder of the run; runs/<job>-<dataset>-<backbone>-<hash of the recipe> unless said."""
    data_dir: Path | None = None
    """TFDS's folder of prepared data sets; $TFDS_DATA_DIR or ~/tensorflow_datasets unless said."""
    log_steps: int = 50
    """Steps between rows of metrics.jsonl."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints; the last step is saved in any case."""


def main(kind: type[rotjax.Recipe]) -> int:
    """Parses the flags of `kind` and carries the run out; returns the exit code."""
    prog = f"python -m experiments.{kind.job}"

    def command(recipe: kind, execution: Execution) -> tuple[rotjax.Recipe, Execution]:
        return recipe, execution

    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagConversionOff)
    recipe, execution = tyro.cli(command, prog=prog, description=kind.__doc__, config=config)
    return guarded(lambda: train(recipe, execution))


def guarded(job) -> int:
    """Runs `job`; an error of ours becomes one line and its exit code."""
    try:
        job()
    except RotjaxError as error:
        print(f"rotjax: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0


def train(recipe: rotjax.Recipe, execution: Execution) -> None:
    """Plans and runs `recipe`, showing progress, and leaves figures beside the run's files."""
    if execution.log_steps < 1 or not execution.checkpoint_seconds >= 0:
        raise UsageError("--log_steps is at least 1 and --checkpoint_seconds at least 0")
    cache_compilations()
    warn_of_idle_gpu()
    plan = rotjax.plan(recipe, data_dir=execution.data_dir, progress=decoding)
    workdir = execution.workdir or Path("runs") / plan.recipe.name
    with report.Progress(plan) as progress:
        rows = rotjax.run(
            plan,
            workdir,
            log_steps=execution.log_steps,
            checkpoint_seconds=execution.checkpoint_seconds,
            note=progress.note,
        )
        for row in rows:
            progress.show(row)
    report.figures(workdir, plan)
    report.summarise(workdir)


def decoding(records):
    """A bar while images are decoded."""
    return tqdm(records, desc="decoding", unit=" images", leave=False, disable=None)


def cache_compilations() -> None:
    """Keeps compiled programs between runs, in a folder that only this user can write (they are run as code)."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rotjax" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(f"{folder} can be written by others")
    except OSError as error:
        print(f"rotjax: no compilation cache: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def warn_of_idle_gpu() -> None:
    """Says which extra to install where an NVIDIA GPU is there and JAX runs on the CPU."""
    if shutil.which("nvidia-smi") and jax.default_backend() == "cpu":
        print("rotjax: an NVIDIA GPU is here but JAX runs on the CPU; install rotjax[cuda12]", file=sys.stderr)


logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
