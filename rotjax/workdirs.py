"""The folder of a run: its owner and lock, and its files."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import numpy as np

from rotjax.data import sources
from rotjax.data.augmentation import VERSION
from rotjax.data.dataset import Dataset
from rotjax.errors import CheckpointError, DataError, UsageError, reason
from rotjax.files import read_json, read_rows, write, write_json, writing
from rotjax.locks import leads_to, locked
from rotjax.recipe import Recipe
from rotjax.recipe_json import differences, from_json, to_json

TOLD = {  # by the summary of any run
    "confusion", "dataset", "train_images", "test_images", "backbone", "stem", "seed", "epochs", "steps", "device",
    "images_per_second", "wall_seconds", "resumed_from",
}  # fmt: skip
LOGS = (".out", ".err", ".log")  # which a cluster, or `> runs/name/run.log`, begins before the run


def read_recipe(workdir: Path) -> Recipe:
    """The recipe of the run in `workdir`; raises CheckpointError where there is none."""
    path = workdir / "recipe.json"
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{workdir} holds no run (no recipe.json); name the workdir of a finished run") from None
    except NotADirectoryError:
        raise CheckpointError(f"{workdir} is a file, or below one; name the workdir of a finished run") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); bring it back, or name another workdir") from error
    return from_json(values, str(path))


def read_summary(workdir: Path) -> dict:
    """The summary of the finished run in `workdir`; raises CheckpointError if it is unfinished or the file is damaged."""
    path = workdir / "summary.json"
    try:
        if missing := TOLD - (summary := read_json(path)).keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if not {"accuracy", "rotation_accuracy"} & summary.keys():
            raise ValueError("it lacks an accuracy")
    except FileNotFoundError:
        raise CheckpointError(f"{workdir} is not finished; let it train to its end") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); remove it, the same command rewrites it") from error
    return summary


def check_vacant(workdir: Path, recipe: Recipe) -> None:
    """Raises UsageError for a folder of another recipe or of something else, CheckpointError for one that cannot be read.

    A folder of images may have moved, as to a node's own disk, if it has its name still. Classes, where `recipe` does not
    know them yet, are not compared.
    """
    try:
        os.path.realpath(workdir).encode()  # as Orbax is given it, which fails on another only once it saves
        names = os.listdir(workdir)
    except FileNotFoundError:
        for path in (workdir, *workdir.parents):
            if path.is_symlink() and not path.exists():
                raise UsageError(f"{path} is a link to what is not there; name another workdir") from None
        return
    except NotADirectoryError:
        raise UsageError(f"{workdir} is a file, or below one; name another workdir") from None
    except PermissionError as error:
        raise CheckpointError(f"{workdir} cannot be read ({reason(error)}); name another workdir") from error
    except (OSError, ValueError) as error:  # of a name that no folder can have
        raise UsageError(f"workdir={workdir} cannot be one ({reason(error)}); name another workdir") from error
    if "recipe.json" in names:
        saved = read_recipe(workdir)
        moved = _is_moved(saved.dataset, recipe.dataset)  # whether its images are the same, `data.json` tells
        dataset = saved.dataset if moved else recipe.dataset
        asked = dataclasses.replace(recipe, classes=recipe.classes or saved.classes, dataset=dataset)
        if odd := differences(saved, asked):
            raise UsageError(f"{workdir} holds another run ({odd}); name another workdir")
    elif any(name not in (".lock", "recipe.json.partial") and not name.endswith(LOGS) for name in names):
        raise UsageError(f"{workdir} is not empty and holds no run; name another workdir")


def _is_moved(before: str, now: str) -> bool:
    """Whether the data set `now` may be the folder of images `before` in another place."""
    return sources.is_path(now) and before not in sources.OURS and Path(before).name == Path(now).name


@contextmanager
def claimed(workdir: Path, recipe: Recipe, data: Dataset, backbone: dict | None) -> Iterator[Callable[[], None]]:
    """Makes `workdir` the run's, or finds that it is, and keeps other processes out meanwhile.

    Yields what raises CheckpointError once `workdir` was moved away or replaced: to be asked before anything is written.
    Raises UsageError for a folder of another recipe, of one started from another `backbone`, or of something else,
    DataError where the run was started on other data, CheckpointError where it cannot be written, InUseError where a
    process is at work.
    """
    check_vacant(workdir, recipe)
    path = workdir / "recipe.json"
    with ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            ours = stack.enter_context(locked(workdir / ".lock", str(workdir)))
        except OSError as error:
            raise CheckpointError(f"{workdir} cannot be written ({reason(error)}); name another workdir") from error
        check_vacant(workdir, recipe)  # again: another run may have come and gone since
        if not path.exists():
            write_json(path, to_json(recipe))
        _same_start(workdir / "data.json", data, backbone)

        def check() -> None:
            if not ours():
                raise CheckpointError(f"{workdir} was moved away or replaced; bring it back, then the same command resumes")

        yield check


@contextmanager
def metrics(workdir: Path, step: int) -> Iterator[tuple[list[dict], Callable[[dict], None]]]:
    """The rows of `metrics.jsonl` up to `step`, and a function that appends one.

    Later and truncated rows are dropped, and the summary of a run that was complete until its last checkpoint was lost.
    """
    path = workdir / "metrics.jsonl"
    rows = [row for row in (read_rows(path) if path.exists() else []) if row["step"] <= step]
    write(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    with writing(workdir):
        (workdir / "summary.json").unlink(missing_ok=True)
        file = open(path, "a")  # noqa: SIM115

    def append(row: dict) -> None:
        if not leads_to(path, file.fileno()):  # the open file would go on taking rows that nobody finds
            raise CheckpointError(f"{path} is gone; bring {workdir} back, then the same command resumes")
        with writing(workdir):
            print(json.dumps(row), file=file, flush=True)

    try:
        yield rows, append
    finally:
        with writing(workdir):  # once more what a full disk did not take
            file.close()


def _same_start(path: Path, data: Dataset, backbone: dict | None) -> None:
    """Leaves at `path` what tells `data`, its stream and `backbone` from others, or compares it with what is there."""
    facts = data.facts() | {"stream": VERSION, "backbone": backbone and _digest(backbone)}
    if not path.exists():
        write_json(path, facts)
        return
    try:
        before = {"stream": 1, "backbone": facts["backbone"]} | read_json(path)  # older runs do not know it
        odd = [key for key in facts if facts[key] != before[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); bring it back, or name another workdir") from error
    if "stream" in odd:
        streams = f"stream {before['stream']}, here {VERSION}"
        raise DataError(f"{path.parent} was started by a rotjax that draws other crops ({streams}); finish it with that one")
    if "backbone" in odd:  # the name of a run, its recipe's, is that of every training of it
        other = f"{path.parent} was started from another training of the pretrained run"
        raise UsageError(f"{other}; bring that back, or name another workdir")
    if odd:
        changes = ", ".join(f"{key} {before[key]} -> {facts[key]}" for key in odd if key != "sample") or "other images"
        remedy = "bring that back, or name another workdir, with pretrained= this one to go on from it"
        raise DataError(f"{path.parent} was started on other data ({changes}); {remedy}")


def _digest(tree: dict) -> str:
    """A hash of the arrays of `tree`."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
