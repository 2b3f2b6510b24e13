"""The flags of the commands, as `--help` shows them: of training the recipe's and how it is executed."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

import rotjax
from rotjax import presets
from rotjax.feed import Where
from rotjax.recipe import NETWORK


def default(words: str):
    """A default that `--help` says in words."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {words})" if words else "")


DataDir = Annotated[Path | None, default("$TFDS_DATA_DIR, else ~/tensorflow_datasets")]
ResultsDir = Annotated[Path, default("experiments/results of the clone, else ./results")]

HOW = ("log_steps", "checkpoint_seconds", "augment", "steps_per_dispatch", "threads")  # of `rotjax.train`


@dataclass(frozen=True)
class Execution:
    """How a run is executed; not part of the recipe: it can change floating-point rounding only."""

    workdir: Annotated[Path | None, default("runs/<job>-<dataset>-<backbone>-<hash of the recipe>")] = None
    """Folder of the run; the same command resumes from its last checkpoint."""
    data_dir: DataDir = None
    """Folder of data sets prepared for TFDS."""
    log_steps: int = 50
    """Steps between rows of metrics.jsonl. Several processes heed signals and save only there."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints; the last step is saved in any case."""
    augment: Annotated[Where | None, default("device on a GPU or TPU with memory for the images, else host")] = None
    """Where images are cropped, mirrored and turned: the same, to the byte."""
    steps_per_dispatch: Annotated[int | None, default("1 on a CPU, else up to 32")] = None
    """Train steps per device dispatch; signals and checkpoints are handled between dispatches."""
    threads: Annotated[int | None, default("0 on a CPU, else 1")] = None
    """Threads that read batches ahead; 0: none is read ahead."""
    distributed: bool = False
    """Run as one of several processes, found from SLURM, Open MPI, Kubernetes or a TPU pod, else JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID (of several on one machine, each with its own CUDA_VISIBLE_DEVICES). All must see
    the same workdir."""


def of(kind: type[rotjax.Recipe]) -> type[rotjax.Recipe]:
    """`kind` as tyro is to show it: a default that depends on the job and the data set is said in words."""
    annotations = {}
    for name, hint in get_type_hints(kind).items():
        if name == "classes":
            annotations[name] = Annotated[hint, tyro.conf.Suppress]
        elif getattr(kind, name, 0) is None:
            report, strong = presets.REPORT[kind.job], presets.STRONG[kind.job]
            rate = f"{presets.SGD['learning_rate']} for a batch of {presets.SGD_BATCH}"
            others = presets.DATASETS | {"strong": strong, "sgd": presets.SGD | {"learning_rate": rate}}
            words = [str(report[name])] if name in report else []
            words += [f"{other} {own[name]}" for other, own in others.items() if name in own]
            words += ["the pretrained network's"] if name in NETWORK else []
            annotations[name] = Annotated[hint | None, default("; ".join(words))]
    body: dict[str, Any] = {name: getattr(kind, name) for name in annotations}
    body |= {"__annotations__": annotations, "__doc__": "What is trained: the same recipe gives the same weights."}
    shown: Any = type(kind.__name__, (kind,), body)
    return dataclass(frozen=True)(shown)


def as_flags(line: str) -> str:
    """`line` with each `name=value` of a recipe or its execution, as the library says it, written as a flag."""
    kinds = (rotjax.Rotation, rotjax.Classification, Execution)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    return re.sub(rf"(?<!\S)({'|'.join(names)})=(?!\S*/)", r"--\1=", line)  # a path may have such a word in it
