"""Tasks: functions `(images, labels, draw) -> (images, labels)` that decide what is predicted, a class or a rotation."""

from collections.abc import Callable

import numpy as np

from rotjax import rotation

Draw = Callable[[int], np.ndarray]  # stream -> uint32 [B]
Task = Callable[[np.ndarray, np.ndarray, Draw], tuple[np.ndarray, np.ndarray]]

STREAMS = 6  # of `augmentation.draw`
TURNS, FLIPS, ROWS, COLUMNS, CUT_ROWS, CUT_COLUMNS = range(STREAMS)


def classify(images, labels, draw):
    """Predict the class: images and labels as they are."""
    return images, labels


def random_turn(images, labels, draw):
    """Predict the rotation: each image `[B,H,H,C]` in one random turn, labels its turns i32 `[B]`."""
    turns = (draw(TURNS) >> 30).astype(np.int32)
    return rotation.rotate(images, turns), turns


def all_turns(images, labels, draw):
    """Predict the rotation: each image `[B,H,H,C]` in all four turns, `[4B,H,H,C]`, labels its turns i32 `[4B]`."""
    return rotation.all_turns(images)
