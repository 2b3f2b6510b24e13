"""What is asked of a batch: its labels, or how it was turned. A task maps `(images, labels, draw)` to images and labels."""

from collections.abc import Callable

import numpy as np

from rotjax import rotation

Draw = Callable[[int], np.ndarray]  # stream -> uint32 [B]
Task = Callable[[np.ndarray, np.ndarray, Draw], tuple[np.ndarray, np.ndarray]]

STREAMS = 6  # of `augmentation.draw`
TURNS, FLIPS, ROWS, COLUMNS, CUT_ROWS, CUT_COLUMNS = range(STREAMS)


def classify(images, labels, draw):
    """The labels themselves."""
    return images, labels


def random_turn(images, labels, draw):
    """One of four turns for each image `[B,H,H,C]`: turned images, turns i32 `[B]`."""
    turns = (draw(TURNS) >> 30).astype(np.int32)
    return rotation.rotate(images, turns), turns


def all_turns(images, labels, draw):
    """All four turns of each image `[B,H,H,C]`: `[4B,H,H,C]`, turns i32 `[4B]`."""
    return rotation.all_turns(images)
