"""Speed as ratios, rotjax beside a peer or a floor in the same run: `python -m experiments.benchmark --help`."""

import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax

from experiments import command, peers, speed
from experiments.flags import ResultsDir, default
from experiments.outcomes import RESULTS, check_numbers, checked, commit, read_result
from experiments.ratios import ROWS, Row
from experiments.report import complain, say
from experiments.tables import table
from rotjax import processes
from rotjax.errors import RotjaxError, UsageError, reason
from rotjax.files import write, write_json
from rotjax.run import versions

FIELDS = ("ours", "theirs", "ratio", "ratios", "device", "versions")  # of the result of a row
VERSIONS = ("rotjax", "jax", "jaxlib", "flax", "optax", "grain", "torch")
CUDNN = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")  # whose convolutions are a GPU's
SLOW = {  # of rows that miss their goal, why, by the first word of the kind of device
    "cpu": {
        "b": "120 layers of small products: what XLA does between them (concatenations, norms, their gradients) takes as"
        " long as they do.",
        "e-unthreaded": "the goal was set against Grain's default of 16 reading threads, which is slower: row e.",
        "j": "imports and tracing are not cached.",
    },
    "nvidia": {
        "f-host": "one core makes crops and turns not much faster than they are trained on; a GPU makes them itself by"
        " default (row f-device).",
        "l-resnet18-128": "a step of few images is hundreds of small kernels, one after the other. PyTorch replays the"
        " forward and the backward ones as CUDA graphs; XLA's graphs end at each convolution.",
        "l-resnet18-512": "the same, at a batch where it matters less.",
        "m": "less than half of it are steps of 128 small images, as in row l-resnet18-128; the rest is decoding, once for"
        " each data set, compiling, and figures.",
    },
}


def main() -> int:
    """Parses the flags and measures; returns the exit code."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch and rows that are commands want memory too
    return command.cli(run, "benchmark", resumes=False)


def run(
    only: Annotated[str, default("all that this machine can measure")] = "",
    repeats: int = 5,
    results: ResultsDir = RESULTS,
    profile: Annotated[Path | None, default("none")] = None,
) -> None:
    """Measure rotjax beside its peers and floors, in turns, and write the medians and the page about them.

    Args:
        only: Rows, separated by commas, such as a,g-time.
        repeats: Measurements of each side.
        results: Folder of the results; a row replaces its own of an earlier run as soon as it is measured.
        profile: Folder that gets a trace of train steps, for Perfetto or TensorBoard; nothing is measured then.
    """
    if repeats < 1:
        raise UsageError(f"--repeats={repeats} is too small; it is at least 1")
    asked = chosen(only)
    command.check_folder("results", results)
    command.check_folder("profile", profile)
    processes.check_devices()
    command.cache_compilations()
    if (count := jax.device_count()) > 1:
        raise UsageError(f"the peers use one device and here are {count}; set CUDA_VISIBLE_DEVICES=0 or TPU_VISIBLE_CHIPS=0")
    if profile:
        command.made(profile)
        step = speed.train_rate("resnet18", "imagenet")
        with jax.profiler.trace(str(profile)):
            step()
        say(f"the trace of a second of train steps is in {profile}")
        return
    code = commit()  # before the first result changes the clone
    folder, failed = command.made(results / "benchmark" / _named(jax.devices()[0].device_kind)), []
    page(results / "benchmark")  # now, before there is anything to lose
    here = "cpu" if jax.default_backend() == "cpu" else "gpu"
    for row in asked:
        if here not in row.kinds and (here == "cpu" or not only):
            say(f"{row.name:16} needs a {row.kinds[0].upper()}: {row.ratio}")
            continue
        try:
            result = measure(row, repeats) | {"commit": code}
        except Exception as error:  # of torch's compiler too: the other rows are measured all the same
            failed.append(row.name)
            complain(f"row {row.name} failed: {reason(error)}")
            continue
        finally:
            peers.release()
        path = folder / f"{row.name}.json"
        if result["ratio"] is None and path.exists() and _result(path)["ratio"] is not None:
            say(f"{row.name:10} is left as it was measured: {_line(row, result)[3]}")
            continue
        write_json(path, result)
        write(results / "performance.md", page(results / "benchmark"))
        name, what, goal, ratio, ours, theirs = _line(row, result)
        sides = f"{ours} / {theirs}" if theirs else ours
        say(f"{name:10} {ratio.replace('*', ''):14} (goal {goal}; {sides}): {what}")
    say(f"\n{results / 'performance.md'}")
    if failed:
        raise RotjaxError(f"rows {', '.join(failed)} failed, for the reasons above; the others are written")


def chosen(only: str) -> Sequence[Row]:
    """The rows in the comma-separated `only`, by their name or their letter; all where it is empty."""
    chosen = []
    for word in (word.strip() for word in only.split(",")) if only else ():
        named = [row for row in ROWS if row.name == word] or [row for row in ROWS if row.name[0] == word]
        if not named:
            like = [row.name for row in ROWS if row.name[0] == word[:1]] or sorted({row.name[0] for row in ROWS})
            raise UsageError(f"--only: there is no row {word!r}; rows are {', '.join(like)}")
        chosen += named
    return [row for row in ROWS if row in chosen] if only else ROWS


def measure(row: Row, repeats: int) -> dict:
    """Medians of `repeats` figures of each side, taken in turns, and of their ratios; what they were measured on."""
    ours, theirs = row.sides()
    pairs = [(ours(), theirs() if theirs else math.nan) for _ in range(repeats)]
    return {
        "ours": statistics.median(a for a, _ in pairs),
        "theirs": statistics.median(b for _, b in pairs) if theirs else None,
        "ratio": statistics.median(a / b for a, b in pairs) if theirs else None,
        "ratios": [a / b for a, b in pairs] if theirs else [],
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": versions(*VERSIONS, *(CUDNN if jax.default_backend() == "gpu" else ())),
    }


def page(folder: Path) -> str:
    """The page about the results in `folder/<kind of device>`."""
    parts = [
        "# Performance\n\nMade by `python -m experiments.benchmark`: each ratio is the median over repeats, in which both\n"
        "sides were measured in turns in one process, and their range; where it was measured once, there is none. Batch\n"
        f"{speed.BATCH} and float32 unless said. The figures of the sides are medians too, each of its own."
    ]
    for device in sorted(path for path in folder.iterdir() if path.is_dir()):
        results = {path.stem: _result(path) for path in device.glob("*.json")}
        if not results:
            continue
        facts = sorted({_facts(result) for result in results.values()})
        measured = [(row, results[row.name]) for row in ROWS if row.name in results]
        lines = [(*_line(row, result), result["versions"]["jax"], result.get("commit", "")) for row, result in measured]
        parts += [
            f"## {device.name.upper()}",
            *facts,
            table(("row", "ratio", "goal", "here", "rotjax", "other", "jax", "commit"), lines),
        ]
        missed = [row.name for row, result in measured if result["ratio"] is not None and not row.met(result["ratio"])]
        reasons = SLOW.get(device.name.partition("-")[0], {})
        parts += [f"- {name}: {reasons[name]}" for name in missed if name in reasons]
        kind = "cpu" if device.name == "cpu" else "gpu"
        if missing := [row.name for row in ROWS if row.name not in results and kind in row.kinds]:
            parts.append(f"Not measured yet (`--only=ROW` measures one): {', '.join(missing)}.")
    path = folder / "tried.json"
    with checked(path):
        tried = [
            (one["change"], one["predicted"], one["outcome"], "yes" if one["kept"] else "no")
            for one in (json.loads(path.read_text()) if path.exists() else [])
        ]
    heading = "## What was tried\n\nOn two CPU cores, unless said."
    parts += [heading, table(("change", "predicted", "outcome", "kept"), tried)] if tried else []
    return "\n\n".join(parts) + "\n"


def _result(path: Path) -> dict:
    """What was measured of a row; raises CheckpointError for another file."""
    result = read_result(path, *FIELDS)
    with checked(path):
        sides = [result[name] for name in ("theirs", "ratio") if result[name] is not None]
        check_numbers(result["ours"], *sides, *result["ratios"])
        str(result["versions"]["jax"])
    return result


def _named(device: str) -> str:
    """`device` as the folder of its results is called."""
    return "".join(c if c.isalnum() else "-" for c in device.lower())


def _line(row: Row, result: dict) -> tuple[str, ...]:
    """Name, what, goal, ratio with its range, and both figures."""
    goal = f"{'>=' if row.at_least else '<='} {row.goal}"
    ours, theirs = (result[side] and f"{_figure(result[side])} {row.unit}" for side in ("ours", "theirs"))
    if result["ratio"] is None:
        return row.name, row.ratio, goal, "the other side needs torch", ours, ""
    ratios = result["ratios"]
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" * (len(ratios) > 1)
    verdict = f"{result['ratio']:.2f}{spread}" + ("" if row.met(result["ratio"]) else ", **missed**")
    return row.name, row.ratio, goal, verdict, ours, theirs


def _facts(result: dict) -> str:
    return "; ".join([result["device"], *(f"{name} {version}" for name, version in result["versions"].items())])


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
