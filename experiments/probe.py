"""What the features of a backbone are worth as they are: `python -m experiments.probe --help`."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

import rotjax
from experiments import command, tables
from experiments.flags import DataDir, default
from experiments.outcomes import PROBES, accuracy
from experiments.report import say
from rotjax import processes
from rotjax.data import sources
from rotjax.errors import CheckpointError, DataError, UsageError, reason
from rotjax.files import read_json, write_json
from rotjax.recipe import check
from rotjax.run import versions
from rotjax.workdirs import read_recipe, read_summary


def main() -> int:
    """Parses the flags and probes; returns the exit code."""
    return command.cli(run, "probe", resumes=False)


def run(
    pretrained: Path,
    dataset: Annotated[str | None, default("what the network was trained on")] = None,
    image_size: Annotated[int | None, default("as in training")] = None,
    data_dir: DataDir = None,
    neighbors: int = 20,
    results: Annotated[Path | None, default("none")] = None,
) -> None:
    """Measure how well classes can be read from each stage of a trained network, without training it further.

    Features are the spatial mean of each stage's map. Logistic regression and k-nearest neighbours are fitted to those
    of the training images and scored on those of the test images; the same is done for randomly initialised weights.
    The scores are written to probe-<dataset>.json in the workdir; the name includes another size, and a hash of the path
    of a folder.

    Args:
        pretrained: Workdir of the run whose network it is.
        dataset: What is classified.
        image_size: Side of the square images in pixels.
        data_dir: Folder of data sets prepared for TFDS.
        neighbors: Number of nearest training images that vote on the class of a test image.
        results: Folder of results of `experiments.reproduce`; adds the scores to its tables.
    """
    if neighbors < 1:
        raise UsageError(f"--neighbors={neighbors} is too small; it is at least 1")
    command.check_folder("data_dir", data_dir)
    if results:
        tables.check(results, there=True)
    processes.check_devices()
    recipe, summary = read_recipe(pretrained), read_summary(pretrained)
    size, name = recipe.image_size if image_size is None else image_size, sources.canonical(dataset or recipe.dataset)
    check(dataclasses.replace(recipe, dataset=name, image_size=size))
    try:
        data = sources.load(name, image_size=size, labelled=True, data_dir=data_dir, progress=command.decoding)
    except UsageError as error:
        if dataset:
            raise
        raise UsageError(
            f"{pretrained} was trained on {name}, which is not here; name what to classify, --dataset"
        ) from error
    tested_on = "test images"
    if recipe.validation and name == recipe.dataset:
        data, tested_on = sources.validated(data, recipe.validation), recipe.tested_on
    if not dataset:
        _check_trained_on(pretrained, recipe, data)
    train, test = (len(part["label"]) for part in (data.train, data.test))
    if len(data.classes) < 2:
        raise DataError(f"{data.name} has no classes to tell apart; name a set that has, --dataset")
    if neighbors > train:
        raise UsageError(f"--neighbors={neighbors} is more than the {train} training images; lower it")
    named = _named(name, data, recipe.image_size)
    paths = [command.made(pretrained, "make it writable, or copy the run") / f"probe-{named}.json"]
    if results:
        paths.append(command.made(results / "probes") / f"{pretrained.resolve().name}-{named}.json")
    command.cache_compilations()
    model, trained, _ = rotjax.load(pretrained)
    networks = {"random": rotjax.init_variables(model, recipe.seed, recipe.image_size), "trained": trained}
    say(f"computing features of {train + test:,} images")
    say(f"accuracy in % on {test:,} {tested_on}, learnt from {train:,} training images\n")
    say(f"{'':8}{'vector':>8}{'linear':>19}{f'{neighbors} neighbors':>21}")
    say(f"{'stage':8}{'length':>8}{'random':>11}{'trained':>8}{'random':>13}{'trained':>8}")
    stages = []
    for stage in probed(model, networks, data, neighbors):
        stages.append(stage)
        linear, near = ([100 * stage[kind][network] for network in networks] for kind in PROBES)
        say("{stage:8}{values:8}{:11.2f}{:8.2f}{:13.2f}{:8.2f}".format(*linear, *near, **stage))
    result = {
        "run": pretrained.resolve().name,
        "accuracy": accuracy(summary),  # of the run at its own task, in %
        "dataset": data.name,
        "image_size": size,
        "train_images": train,
        "test_images": test,
        "tested_on": tested_on,
        "neighbors": neighbors,
        "device": jax.devices()[0].device_kind,
        "versions": versions("rotjax", "jax", "scikit-learn"),
        "stages": stages,
    }
    for path in paths:
        write_json(path, result)
    say(f"\n{paths[0]}")
    if results:
        tables.write(results)
        say(str(results / "README.md"))


def _check_trained_on(pretrained: Path, recipe: rotjax.Recipe, data: rotjax.Dataset) -> None:
    """Raises DataError where the name, as of a folder, now leads to other data than the run was trained on.

    Pixels of another size, and training images of which the run took a subset, are not compared.
    """
    path, now = pretrained / "data.json", data.facts()
    try:
        before = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); name what to classify, --dataset") from error
    alike = data.image_size == recipe.image_size and not getattr(recipe, "subset", None)
    names = ("classes", "test_images", "sample") if alike else ("classes", "test_images")
    if odd := [name.replace("_", " ") for name in names if before.get(name) != now[name]]:
        line = f"{data.name} is not what {pretrained} was trained on (other {', '.join(odd)})"
        raise DataError(f"{line}; name what to classify, --dataset")


def probed(model: rotjax.Classifier, networks: dict[str, dict], data: rotjax.Dataset, neighbors: int) -> Iterator[dict]:
    """Of each stage its name, how many values it has, and the test accuracy of each kind of probe for each of `networks`."""
    parts = {
        name: [rotjax.features(model, variables, part["image"]) for part in (data.train, data.test)]
        for name, variables in networks.items()
    }
    labels = data.train["label"], data.test["label"]
    for stage, values in parts["trained"][0].items():
        scores: dict = {"stage": stage, "values": values.shape[1]}
        for kind in PROBES:
            scores[kind] = {
                name: float(_probe(kind, neighbors).fit(train[stage], labels[0]).score(test[stage], labels[1]))
                for name, (train, test) in parts.items()
            }
        yield scores


def _named(name: str, data: rotjax.Dataset, usual: int) -> str:
    """What tells `data`, loaded as `name`, from others in the name of a file: for a folder its path, and another size."""
    path = command.mark(Path(name)) if sources.is_path(name) else ""
    size = f"{data.image_size}px" * (data.image_size != usual)
    return "-".join(filter(None, (data.name.replace("/", "-"), size, path)))


def _probe(kind: str, neighbors: int) -> Pipeline:
    if kind == "linear":
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return make_pipeline(Normalizer(), KNeighborsClassifier(neighbors))  # by their angles


if __name__ == "__main__":
    sys.exit(main())
