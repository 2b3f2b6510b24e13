"""Small runs that several tests carry out."""

import json
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import jax
import numpy as np

import rotjax
from rotjax.models import BACKBONES, BasicBlock, ResNet

SMALL = dict(stem="cifar", width=4, batch_size=8, epochs=2, seed=1)


def carry_out(recipe, data, workdir, **options):
    plan = rotjax.plan(recipe, data=data)
    return list(rotjax.train(plan, workdir, log_steps=2, **options))


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def arrays(workdir):
    return [np.asarray(x) for x in jax.tree.leaves(rotjax.load(workdir)[1])]


def noise():
    """A plan of 96 steps."""
    rng = np.random.default_rng(0)
    images = [{"image": rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), "label": np.zeros(n, int)} for n in (64, 8)]
    recipe = rotjax.Rotation(stem="cifar", width=4, batch_size=8, epochs=12)
    return rotjax.plan(recipe, data=rotjax.Dataset("noise", ("a",), *images))


@contextmanager
def thin():
    """Two of ResNet18's blocks, which are traced and compiled sooner, for what begins in many processes."""
    with patch.dict(BACKBONES, resnet18=partial(ResNet, BasicBlock, (1, 1))):
        yield


@thin()
def tiny(stem="cifar", **options):
    """A thin network, for what is the same with every one."""
    return rotjax.create("resnet18", 4, stem, width=4, **options)


@thin()
def work(connection, workdir, checkpoint_seconds=0.0):
    """A run of 96 steps that tells its rows."""
    for row in rotjax.train(noise(), workdir, log_steps=3, checkpoint_seconds=checkpoint_seconds):
        connection.send(row["step"])
