"""What the commands share: flags are parsed, an error is one line; a run is trained with its progress, summary, figures."""

import dataclasses
import hashlib
import logging
import math
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import cache
from pathlib import Path

import jax
import tyro
from tqdm import tqdm

import rotjax
from experiments import figures, flags, report
from rotjax import checkpoints, feed, files, processes
from rotjax.errors import DesertedError, RotjaxError, Stopped, UsageError, reason
from rotjax.run import check_cadence
from rotjax.signals import heeded, second_signal

log = logging.getLogger(__name__)

SMALLER = "free the device of other programs, or use one with more memory"
FEW = 200  # steps of a run
SMALL = 8  # images of a batch, by whose mean and variance a network can be trained
QUIET = 30  # seconds
THIN = 32  # images of a batch for each device


def main(kind: type[rotjax.Recipe]) -> int:
    """Parses the flags of `kind` and carries the run out; returns the exit code."""

    def command(recipe, execution: flags.Execution) -> None:
        run(kind(**dataclasses.asdict(recipe)), execution)

    command.__annotations__["recipe"] = flags.of(kind)
    return cli(command, kind.job, kind.__doc__, smaller="lower --batch_size, or say --augment=host")


def cli(command, name: str, description: str | None = None, resumes: bool = True, smaller: str = SMALLER) -> int:
    """Calls `command`, guarded, with the flags of `python -m experiments.<name>`, its parameters; returns the exit code.

    `resumes`: whether the same command goes on where a signal stopped it, or begins anew; it says so. `smaller`: what to do
    where a device's memory is too small.
    """
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    prog, args = f"python -m experiments.{name}", [_at_home(word) for word in sys.argv[1:]]
    if flag := _without_value(args):
        return _failed(UsageError(f"{flag} is given an empty value; give another, or leave it out"))
    return guarded(
        lambda: tyro.cli(command, args=args, prog=prog, description=description, config=config, use_underscores=True),
        resumes,
        smaller,
    )


def _at_home(word: str) -> str:
    """`--flag=~/folder` as the shell hands on `--flag ~/folder`."""
    flag, equals, value = word.partition("=")
    return f"{flag}={os.path.expanduser(value)}" if equals and flag.startswith("--") else word


def _without_value(args: Sequence[str]) -> str:
    """The first flag with an empty value: as a path it would be the current folder, which is hardly meant."""
    for before, word in zip(("", *args), args, strict=False):
        flag, equals, value = word.partition("=")
        if not word or (word.startswith("--") and equals and not value):
            return flag or before or "a word"
    return ""


def check_folder(flag: str, path: Path | None, there: bool = False) -> None:
    """Raises UsageError where `path`, the value of `flag`, can be no folder, or is none although it has to be `there`."""
    try:
        problem = "" if path is None or path.is_dir() else "it is a file" if path.exists() else "it does not exist" * there
    except (OSError, ValueError) as error:
        problem = reason(error)
    if problem:
        raise UsageError(f"--{flag}={path} is no folder ({problem}); name another")


def mark(path: Path) -> str:
    """Eight digits that tell the folder `path` from others of its name."""
    return hashlib.sha256(os.fsencode(path.expanduser().resolve())).hexdigest()[:8]


def made(folder: Path, remedy: str = "fix it, or name another folder") -> Path:
    """`folder`, made unless it is there; raises CheckpointError, with the `remedy`, where nothing can be written in it."""
    with files.writing(folder, remedy):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def guarded(job, resumes: bool = True, smaller: str = SMALLER) -> int:
    """Runs `job`; an error of ours, or a signal where nothing is to be saved yet, becomes one line and its exit code."""
    checkpoints.quiet()
    for kind in heeded():
        signal.signal(kind, _interrupt)
    try:
        with report.listening(), processes.deserted():
            job()
    except KeyboardInterrupt:
        return _failed(Stopped(f"stopped; the same command {'resumes' if resumes else 'begins anew'}"))
    except RotjaxError as error:
        return _failed(error)
    except BrokenPipeError:
        if not {"-h", "--help"} & set(sys.argv):  # `--help | head`; what else is printed is no error, see `report.say`
            raise
        report.mute(sys.stdout)
        return 128 + signal.SIGPIPE
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _failed(UsageError(f"out of memory ({' '.join(str(error).split())[:120]}); {smaller}"))
    return 0


def _failed(error: RotjaxError) -> int:
    """Says `error`; returns its exit code."""
    report.complain(report.shortened(flags.as_flags(" ".join(str(error).split()))))
    if isinstance(error, DesertedError):
        os._exit(error.exit_code)  # an orderly exit waits for the process that is gone
    return error.exit_code


class _Interrupted(KeyboardInterrupt):
    """Where a KeyboardInterrupt itself leaves an `exec`, as of a dataclass being made, Python ends by it, though caught."""


def _interrupt(number, frame):
    """Ends what is under way; at a second signal, not an echo of the first, the process."""
    again = second_signal()
    for kind in heeded():
        signal.signal(kind, again)
    raise _Interrupted


def run(recipe: rotjax.Recipe, execution: flags.Execution) -> None:
    """Trains `recipe` and says what came of it."""
    workdir, plan = train(recipe, execution)
    with processes.together():
        if processes.primary():
            report.summarise(workdir, plan, execution.data_dir)


def train(recipe: rotjax.Recipe, execution: flags.Execution) -> tuple[Path, rotjax.Plan]:
    """The workdir of `recipe`, trained under a progress bar, with figures beside the run's files; and its plan."""
    check_cadence(execution.log_steps, execution.checkpoint_seconds)
    (processes.join if execution.distributed else processes.check_devices)()
    feed.check(execution.steps_per_dispatch, execution.threads)
    if not processes.primary():
        sys.stdout = None
    warn_of_idle_gpu()
    with processes.together():
        plan = rotjax.plan(recipe, data_dir=execution.data_dir, workdir=execution.workdir, progress=decoding)
    warn_of_thin_batches(plan.recipe.views)
    warn_of_few_steps(plan)
    cache_compilations()
    workdir = execution.workdir or Path("runs") / plan.recipe.name
    with report.Progress(plan) as progress:
        how = {name: getattr(execution, name) for name in flags.HOW}
        for row in rotjax.train(plan, workdir, **how, progress=progress.move):
            progress.show(row)
    figures.draw(workdir, plan)
    return workdir, plan


def decoding(records: Iterable, total: int | None = None) -> Iterable:
    """`records`, with a bar while they are decoded; where no terminal shows it, with a line every `QUIET` seconds."""
    if sys.stderr and sys.stderr.isatty():
        return tqdm(records, desc="decoding", total=total, unit=" images", leave=False)
    return _told(records, len(records) if isinstance(records, Sized) else total or 0)


def _told(records: Iterable, total: int) -> Iterator:
    last = time.monotonic()
    for number, record in enumerate(records):
        if time.monotonic() - last > QUIET:
            log.info(f"decoded {number:,} of {total:,} images")
            last = time.monotonic()
        yield record


def cache_compilations() -> None:
    """Keeps compiled programs between runs, in a folder that only this user can write (they are run as code)."""
    asked = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if asked and "://" in asked:  # a bucket, which has permissions of its own
        return
    try:
        folder = Path(asked) if asked else files.cache("compiled")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(f"{folder} can be written by others")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        log.warning(f"no compilation cache: {error}")
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # 1, which leaves out most of a small network's
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    _say_once()


@cache  # `reproduce` comes here before each of its runs
def _say_once() -> None:
    """JAX's warnings of its cache, of which a run may get hundreds, become one line of each kind."""
    lines = {
        "Error reading persistent compilation cache": "is damaged; remove it",
        "Error writing persistent compilation cache": "cannot be written; make room",
    }
    show = warnings.showwarning

    def shown(message, *rest, **options):
        words = next((words for words in lines if str(message).startswith(words)), None)
        if words is None:
            show(message, *rest, **options)
        elif line := lines[words]:
            lines[words] = ""
            log.warning(f"{jax.config.values['jax_compilation_cache_dir']} {line}, or every run compiles again")

    warnings.showwarning = shown


def warn_of_thin_batches(views: int) -> None:
    """Says so where GPUs or TPUs get so few images each that one alone may be as fast."""
    if jax.default_backend() != "cpu" and (count := jax.device_count()) > 1 and (each := views // count) < THIN:
        one = "CUDA_VISIBLE_DEVICES=0 takes one of them" if jax.default_backend() == "gpu" else "or use fewer of them"
        log.warning(f"each of {count} devices gets {each} images of a batch; raise --batch_size to use them, {one}")


def warn_of_few_steps(plan: rotjax.Plan) -> None:
    """Says so where a small set gives so few steps that hardly anything can be learnt."""
    if plan.recipe.max_steps is None and plan.steps < FEW:
        each = f"{plan.epochs} epoch{'s' * (plan.epochs != 1)} of {plan.epoch_steps}"
        enough = 2 ** int(math.log2(max(1, plan.recipe.batch_size * plan.steps / FEW)))  # images of a batch
        then = plan.epochs * (plan.epoch_steps * plan.recipe.batch_size // enough)
        remedy = f"lower --batch_size to {enough}" if enough >= SMALL and then >= FEW else "raise --epochs"
        log.warning(f"only {plan.steps} steps in all ({each}), which may be too few; {remedy}")


def warn_of_idle_gpu() -> None:
    """Says which extra to install where an NVIDIA GPU is there and JAX runs on the CPU."""
    if shutil.which("nvidia-smi") and jax.default_backend() == "cpu":
        log.warning("an NVIDIA GPU is here but JAX runs on the CPU; install jax[cuda12] (uv run --extra cuda12)")


logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)  # of a GPU without its JAX `warn_of_idle_gpu` tells more
