"""Arrays as a data set."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

import rotjax
from rotjax.errors import DataError
from tests.runs import SMALL


def test_arrays_of_jax_and_of_other_bytes_are_the_same_data(data):
    plain = {"image": data.test["image"], "label": data.test["label"]}
    for label in (jnp.asarray(plain["label"]), plain["label"].astype(">i4"), plain["label"].astype(np.int64)):
        other = {"image": jnp.asarray(plain["image"]), "label": label}
        one, two = (rotjax.Dataset("noise", data.classes, arrays, arrays) for arrays in (plain, other))
        assert one.facts() == two.facts() and two.train["label"].dtype == np.dtype("=i4") and one != two


@pytest.mark.parametrize("files", [("one",), "ab"])
def test_D5_files_of_another_number_than_the_test_images_are_refused(data, files):
    with pytest.raises(DataError, match=f"noise has 11 test images and {len(files)} files; name each, or none"):
        dataclasses.replace(data, files=files)


def test_images_without_classes_are_enough_for_rotation_only(data):
    bare = {"image": data.train["image"]}
    unlabelled = rotjax.Dataset("noise", (), bare, bare)
    assert unlabelled.test["label"].tolist() == [-1] * 48
    with pytest.raises(DataError, match="the train images of noise have no labels; give one each, or no classes"):
        rotjax.Dataset("noise", ("a", "b"), bare, bare)
    assert rotjax.plan(rotjax.Rotation(**SMALL), data=unlabelled).steps == 12
    with pytest.raises(DataError, match="the train images of noise have labels, but the classes have no names"):
        rotjax.Dataset("noise", (), data.train, data.test)
    for odd in (None, "ab", b"ab", {"a"}, np.array("a")):
        with pytest.raises(DataError, match=f"the classes of noise are {re.escape(repr(odd))}; give a tuple of their names"):
            rotjax.Dataset("noise", odd, data.train, data.test)
    with pytest.raises(DataError, match="the train images of noise: images are NoneType; give an array of uint8"):
        rotjax.Dataset("noise", ("a", "b"), {"label": data.train["label"]}, data.test)
    with pytest.raises(DataError, match="has no classes"):
        rotjax.plan(rotjax.Classification(**SMALL), data=unlabelled)


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), np.zeros(4, int), "uint8"),
        (np.zeros((4, 8, 9, 3), np.uint8), np.zeros(4, int), "square"),
        (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, int), "RGB"),
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, int), "are 0"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3, int), "one label each"),
        (np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 1, 0], "labels list; give one label each"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4), r"labels float64\[4\]; give one label each"),
        ([np.zeros((8, 8, 3), np.uint8)] * 4, np.zeros(4, int), "the train images of mine: images are list; give an array"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 2, 1]), "label 2 of image 2"),
    ],
)
def test_D5_arrays_that_no_network_can_use_are_refused(image, label, message):
    arrays = {"image": image, "label": label}
    with pytest.raises(DataError, match=message):
        rotjax.Dataset("mine", ("a", "b"), arrays, arrays)
