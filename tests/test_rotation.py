import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotjax import rotation


def pictures(size, count=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@given(size=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=50, deadline=None)
def test_R9_every_image_is_turned_as_rot90_turns_it(size, seed, data):
    images = pictures(size, seed=seed)
    turns = np.array(data.draw(st.lists(st.integers(0, 3), min_size=4, max_size=4)))
    expected = [np.rot90(image, k) for image, k in zip(images, turns, strict=True)]
    np.testing.assert_array_equal(rotation.rotate(images, turns), expected)
    np.testing.assert_array_equal(rotation.rotate(jnp.asarray(images), jnp.asarray(turns)), expected)


@pytest.mark.parametrize("xp", [np, jnp])
def test_there_is_a_turn_for_each_image(xp):
    images = xp.asarray(pictures(5))
    for count in (2, 5):
        with pytest.raises(ValueError, match="broadcast"):
            rotation.rotate(images, xp.ones(count, int))


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (3, 4, 4, 1), (3, 1, 1, 5)])
def test_images_of_any_number_of_channels_turn_whatever_their_dtype_and_order_in_memory(shape):
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    turns = np.arange(shape[0])
    expected = np.array([np.rot90(image, k) for image, k in zip(images, turns, strict=True)]).reshape(shape)
    for laid in (images, np.asfortranarray(images), images[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(rotation.rotate(laid, turns), expected)
        np.testing.assert_array_equal(rotation.all_turns(laid)[0], rotation.all_turns(jnp.asarray(images))[0])


@given(a=st.integers(-4, 8), b=st.integers(-4, 8))
@settings(max_examples=40, deadline=None)
def test_turns_add_up_modulo_four(a, b):
    images = pictures(5)
    twice = rotation.rotate(rotation.rotate(images, np.full(4, a)), np.full(4, b))
    np.testing.assert_array_equal(twice, rotation.rotate(images, np.full(4, a + b)))


def test_a_flip_after_the_turn_would_exchange_90_and_270():
    images = pictures(6)
    flipped = images[:, :, ::-1]
    after = rotation.rotate(images, np.full(4, 1))[:, :, ::-1]
    np.testing.assert_array_equal(after, rotation.rotate(flipped, np.full(4, 3)))


@pytest.mark.parametrize("xp", [np, jnp])
def test_all_turns_lists_the_four_views_image_by_image(xp):
    images = pictures(5)
    views, turns = rotation.all_turns(xp.asarray(images))
    np.testing.assert_array_equal(turns, np.tile(np.arange(4), 4))
    np.testing.assert_array_equal(views, [np.rot90(image, k) for image in images for k in range(4)])
    assert views.dtype == np.uint8 and turns.dtype == np.int32


@pytest.mark.parametrize("turn", [lambda x: rotation.rotate(x, np.zeros(1, int)), rotation.all_turns])
def test_images_that_are_not_square_are_refused(turn):
    with pytest.raises(ValueError, match="square images.*4x5"):
        turn(np.zeros((1, 4, 5, 3), np.uint8))


@pytest.mark.parametrize("namespace", [np, jnp])
def test_what_cannot_be_turned_is_refused(namespace):
    images = namespace.zeros((2, 4, 4, 3), namespace.uint8)
    for turns in ([0.0, 1.5], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="^turns are float.*; give integers"):
            rotation.rotate(images, namespace.asarray(turns))
    with pytest.raises(ValueError, match=r"^images are \[2, 4, 4\]; give \[B,H,H,C\]"):
        rotation.rotate(images[..., 0], namespace.asarray([0, 1]))
