"""What the features of a backbone are worth as they are: `python -m experiments.probe --help`."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

import rotjax
from experiments import command
from experiments.outcomes import PROBES, accuracy
from experiments.report import say
from rotjax.data import sources
from rotjax.errors import DataError, UsageError
from rotjax.recipe import check
from rotjax.workdirs import read_recipe, write_json


def main() -> int:
    """Parses the flags and probes; returns the exit code."""

    def probe(
        pretrained: Path,
        dataset: str | None = None,
        image_size: int | None = None,
        data_dir: command.DataDir = None,
        neighbors: int = 20,
    ) -> int:
        """Score the features of each stage of a trained network, without training it further.

        A linear classifier (logistic regression) and the nearest neighbours learn the classes of the training images from
        the mean over each stage's map, and are scored on the test images; beside them the same of the network's initial
        weights.

        Args:
            pretrained: Workdir of the network.
            dataset: What is classified, by default what the network was trained on.
            image_size: Side of the square images in pixels, by default as in training.
            data_dir: Folder of data sets prepared for TFDS.
            neighbors: How many vote.
        """
        return command.guarded(lambda: run(pretrained, dataset, image_size, data_dir, neighbors))

    return command.cli(probe, "probe")


def run(pretrained: Path, dataset: str | None, image_size: int | None, data_dir: Path | None, neighbors: int) -> None:
    """Probes the network in `pretrained` and leaves the scores there, in `probe-<dataset>.json`."""
    if neighbors < 1:
        raise UsageError(f"--neighbors={neighbors} is too small; it is at least 1")
    command.check_folder("data_dir", data_dir)
    recipe = read_recipe(pretrained)
    size, name = recipe.image_size if image_size is None else image_size, dataset or recipe.dataset
    check(dataclasses.replace(recipe, dataset=name, image_size=size))
    data = sources.load(name, image_size=size, data_dir=data_dir, progress=command.decoding)
    validation = recipe.validation if name == recipe.dataset else 0.0
    if validation:
        data = sources.validated(data, validation)
    train, test = (len(part["label"]) for part in (data.train, data.test))
    if not data.classes:
        raise DataError(f"{data.name} has no classes to tell apart; name a set that has, --dataset")
    if neighbors > train:
        raise UsageError(f"--neighbors={neighbors} is more than the {train} training images; lower it")
    command.cache_compilations()
    model, trained, _ = rotjax.load(pretrained)
    networks = {"initial": rotjax.init_variables(model, recipe.seed, recipe.image_size), "trained": trained}
    say(f"test accuracy in % on {test:,} images, by what {train:,} teach\n")
    say(f"{'':8}{'':>8}{'linear':>19}{f'{neighbors} neighbors':>21}")
    say(f"{'stage':8}{'values':>8}{'initial':>11}{'trained':>8}{'initial':>13}{'trained':>8}")
    stages = []
    for stage in probed(model, networks, data, neighbors):
        stages.append(stage)
        linear, near = ([100 * stage[kind][network] for network in networks] for kind in PROBES)
        say("{stage:8}{values:8}{:11.2f}{:8.2f}{:13.2f}{:8.2f}".format(*linear, *near, **stage))
    summary, path = pretrained / "summary.json", pretrained / f"probe-{Path(data.name).name}.json"
    result = {
        "run": pretrained.resolve().name,
        "accuracy": accuracy(json.loads(summary.read_text())) if summary.exists() else None,  # at its own task, in %
        "dataset": data.name,
        "image_size": size,
        "train_images": train,
        "test_images": test,
        "validation": validation,
        "neighbors": neighbors,
        "stages": stages,
    }
    write_json(path, result)
    say(f"\n{path}")


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


def _probe(kind: str, neighbors: int) -> Pipeline:
    if kind == "linear":
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return make_pipeline(Normalizer(), KNeighborsClassifier(neighbors))  # by their angles


if __name__ == "__main__":
    sys.exit(main())
