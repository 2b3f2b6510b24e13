"""Tasks: functions `(images, labels, words) -> (images, labels)` that decide what is predicted, a class or a rotation.

`words` are what chance decides of each image, uint32 `[STREAMS,B]` of `augmentation.draw`. A task may give several views of
each image, as many of all, those of an image beside each other.
"""

from collections.abc import Callable

import numpy as np

from rotjax import rotation

Task = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

STREAMS = 6
TURNS, FLIPS, ROWS, COLUMNS, CUT_ROWS, CUT_COLUMNS = range(STREAMS)


def classify(images, labels, words):
    """Predict the class: images and labels as they are."""
    return images, labels


def random_turn(images, labels, words):
    """Predict the rotation: each image `[B,H,H,C]` in one random turn, labels its turns i32 `[B]`."""
    turns = (words[TURNS] >> 30).astype(np.int32)
    return rotation.rotate(images, turns), turns


def all_turns(images, labels, words):
    """Predict the rotation: each image `[B,H,H,C]` in all four turns, `[4B,H,H,C]`, labels its turns i32 `[4B]`."""
    return rotation.all_turns(images)
