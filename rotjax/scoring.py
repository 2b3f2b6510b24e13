"""Evaluation of a run on its test images, after every epoch and at the end."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import cache, partial

import jax

from rotjax import training
from rotjax.data import batches, tasks
from rotjax.data.augmentation import eval_view
from rotjax.feed import Feed
from rotjax.models import Classifier
from rotjax.parallel import data_mesh, place
from rotjax.planning import Plan
from rotjax.recipe import Rotation

log = logging.getLogger(__name__)

TOGETHER = 4  # batches of a GPU or TPU that are scored at once, where training keeps one for its gradients: they fit

MOST = 1000  # classes whose confusion matrix goes into a summary: of 8,000 it would take 400 MB

Score = Callable[[dict, tasks.Task, int], dict]


def scorer(plan: Plan, model: Classifier, feed: Feed, until: Callable[[Iterable], Iterator]) -> Score:
    """`(variables, task, epoch) -> loss, accuracy, confusion` on every test image."""
    recipe, mesh = plan.recipe, data_mesh()
    data = feed.put(plan.data.test, mesh)
    step = cache(lambda make: training.eval_step(model, mesh, make=make))  # the same each epoch, or jit compiles again
    view = cache(lambda task: partial(eval_view, task=task))

    def score(variables: dict, task: tasks.Task, epoch: int) -> dict:
        count = len(plan.data.test["label"])
        alone = task is tasks.all_turns or recipe.frozen or jax.default_backend() == "cpu"
        size = recipe.batch_size * (1 if alone else min(TOGETHER, -(-count // recipe.batch_size)))
        picks = batches.eval_picks(count, size, seed=recipe.seed, epoch=epoch)
        stream = feed.stream(picks, view(task), data)
        with closing(batches.read(stream.elements, threads=feed.threads)) as reader:
            placed = place(until(reader), mesh)
            return training.evaluate(partial(step(stream.make), data=stream.data), variables, placed)

    return score


def final_scores(plan: Plan, score: Score, variables: dict, last: dict | None) -> dict:
    """Rotations on all four turns of every image, and as after every epoch on one random turn each; or classes.

    `last` is the score after the last epoch, None where an earlier process took it. Of more than `MOST` classes there is
    no `confusion`.
    """
    if last is None or isinstance(plan.recipe, Rotation):
        log.info(f"scoring the {plan.recipe.tested_on}")
    one = score(variables, plan.recipe.eval_task, plan.last_epoch) if last is None else last
    if isinstance(plan.recipe, Rotation):
        every = score(variables, tasks.all_turns, plan.last_epoch)
        accuracies = {"rotation_accuracy": every["accuracy"], "rotation_accuracy_random": one["accuracy"]}
        return accuracies | {"confusion": every["confusion"].tolist()}
    matrix = one["confusion"]
    return {"accuracy": one["accuracy"], "confusion": matrix.tolist() if len(matrix) <= MOST else None}
