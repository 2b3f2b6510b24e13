import hashlib
import itertools
import re
from functools import partial

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotjax.data import augmentation, batches, sources, tasks
from rotjax.data.dataset import Dataset, held_out
from rotjax.errors import UsageError


def numbered(count, size=8):
    """Images whose every pixel is their own index."""
    image = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, size, size, 3))
    return {"image": image.copy(), "label": np.arange(count, dtype=np.int32)}


def centres(batch):
    return batch["image"][:, 4, 4, 0]


def test_R7_each_pass_has_every_image_once_in_a_new_order_and_batches_straddle_passes():
    stream = batches.train_batches(numbered(50), tasks.classify, 8, 25, seed=3)
    seen = np.concatenate([stream[t]["label"] for t in range(25)])
    passes = seen.reshape(4, 50)
    for one in passes:
        np.testing.assert_array_equal(np.sort(one), np.arange(50))
    assert all((a != b).any() for a, b in itertools.combinations(passes, 2))
    np.testing.assert_array_equal(seen, np.concatenate([centres(stream[t]) for t in range(25)]))


@pytest.mark.parametrize("task", [tasks.classify, tasks.random_turn, tasks.all_turns])
def test_R7_a_batch_is_a_function_of_seed_and_step(images, task):
    def stream(seed):
        return batches.train_batches(images, task, 8, 40, seed=seed)

    reader = batches.read(stream(1), start=17, threads=2)
    for t in (17, 18, 19):
        later, again = stream(1)[t], next(reader)
        for key in later:
            np.testing.assert_array_equal(later[key], again[key])
    reader.close()
    assert (stream(1)[17]["image"] != stream(2)[17]["image"]).any()


def test_C9_the_batches_of_a_seed_are_those_of_the_stream_that_is_written_down():
    """Where they are not, raise `augmentation.VERSION`: runs that are under way must not go on with others."""
    data, digest = numbered(50), hashlib.sha256()
    for task in (tasks.classify, tasks.random_turn, tasks.all_turns):
        stream = batches.train_batches(data | {"image": data["image"] * 5}, task, 8, 20, seed=3)
        for number in (0, 7, 19):
            digest.update(stream[number]["image"].tobytes() + stream[number]["label"].astype(np.int32).tobytes())
    assert (augmentation.VERSION, digest.hexdigest()[:16]) == (2, "acfcb3a8bbb2ef97")


def test_draws_of_different_seeds_epochs_and_streams_are_different():
    index = np.arange(500)
    keys = itertools.product(range(4), range(8), range(6))
    words = [augmentation.draw(stream, seed, epoch, index) for stream, seed, epoch in keys]
    assert len(np.unique(words)) > 0.999 * np.size(words)


@pytest.mark.parametrize("task", [tasks.random_turn, tasks.all_turns])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_R7_the_shares_of_several_processes_are_the_batch(images, task, processes):
    def joined(split):
        parts = [split(share=slice(8 * k // processes, 8 * (k + 1) // processes)) for k in range(processes)]
        return [{key: np.concatenate([part[t][key] for part in parts]) for key in parts[0][t]} for t in range(len(parts[0]))]

    for split in (
        partial(batches.train_batches, images, task, 8, 9, seed=1),
        partial(batches.eval_batches, {key: value[:45] for key, value in images.items()}, task, 8),
    ):
        for whole, parts in zip(split(), joined(split), strict=True):
            for key in whole:
                np.testing.assert_array_equal(parts[key], whole[key])


def test_R8_what_happens_to_an_image_does_not_depend_on_the_batch_size(images):
    small = batches.train_batches(images, tasks.random_turn, 6, 80, seed=5)
    large = batches.train_batches(images, tasks.random_turn, 24, 20, seed=5)
    for key in ("image", "label"):
        joined = np.concatenate([small[t][key] for t in range(80)])
        np.testing.assert_array_equal(joined, np.concatenate([large[t][key] for t in range(20)]))


def test_crops_are_windows_of_the_padded_image_mirrored_half_of_the_time(images):
    stream = batches.train_batches(images, tasks.classify, 48, 40, seed=0)
    padded = np.pad(images["image"], ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = {
        padded[i, y : y + 8, x : x + 8][:, ::step].tobytes(): (y, x, step)
        for i, y, x, step in itertools.product(range(48), range(3), range(3), (1, -1))
    }
    found = [windows[image.tobytes()] for t in range(40) for image in stream[t]["image"]]
    counts = np.unique(np.array(found), axis=0, return_counts=True)[1]
    assert len(counts) == 18
    assert abs(counts - len(found) / 18).max() < 5 * (len(found) / 18) ** 0.5
    plain = batches.train_batches(images, tasks.classify, 48, 4, seed=0, flip=False)
    assert {windows[image.tobytes()][2] for t in range(4) for image in plain[t]["image"]} == {1}


@pytest.mark.parametrize(("cutout", "side"), [(0.375, 3), (0.5, 4), (1.0, 8), (0.01, 0)])
def test_a_square_of_the_asked_size_is_cut_out_around_any_pixel(images, cutout, side):
    bright = images | {"image": images["image"] | 128}
    whole = batches.train_batches(bright, tasks.classify, 48, 20, seed=0)
    holed = batches.train_batches(bright, tasks.classify, 48, 20, seed=0, cutout=cutout)
    begin, place = np.arange(8)[:, None] - side // 2, np.arange(8)
    spans = (place >= begin) & (place < begin + side)
    holes = {np.outer(spans[row], spans[column]).tobytes() for row in range(8) for column in range(8)}
    seen = set()
    for before, after in zip(whole, holed, strict=True):
        changed = (before["image"] != after["image"]).any(-1)
        for hole, old, new in zip(changed, before["image"], after["image"], strict=True):
            assert (new[hole] == augmentation.GREY).all() and (new[~hole] == old[~hole]).all()
            seen.add(hole.tobytes())
    assert seen == holes


@pytest.mark.parametrize(("share", "taken"), [(0.25, [10, 2, 1, 0]), (0.01, [1, 1, 1, 0]), (0.99, [39, 7, 1, 0])])
def test_validation_images_are_a_share_of_each_class_the_same_in_every_run_and_not_trained_on(share, taken, notes):
    counts, test = [40, 8, 2, 1], numbered(7) | {"label": np.zeros(7, np.int32)}
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts)).astype(np.int32)
    data = Dataset("numbers", tuple("abcd"), numbered(51) | {"label": labels}, test)
    cut, again = (sources.validated(data, share) for _ in range(2))
    assert np.bincount(cut.test["label"], minlength=4).tolist() == taken
    trained, tested = centres(cut.train).tolist(), centres(cut.test).tolist()
    assert sorted(trained + tested) == list(range(51)) and tested == centres(again.test).tolist()
    np.testing.assert_array_equal(cut.train["label"], labels[trained])
    assert notes[0] == f"{sum(taken)} of 51 training images stand in for the test images"
    assert held_out(np.zeros(100, int), 0.29).sum() == 29, "which times 100 is a little less as a float"


def test_validation_is_refused_where_there_is_nothing_to_take_or_too_much_to_copy(monkeypatch):
    single = Dataset("numbers", tuple("0123"), numbered(4), numbered(4))
    with pytest.raises(UsageError, match="^validation=0.5: no class has two images"):
        sources.validated(single, 0.5)
    unlabelled = Dataset("photographs", (), *(numbered(9) | {"label": np.full(9, -1)} for _ in range(2)))
    assert len(sources.validated(unlabelled, 0.4).test["label"]) == 3
    monkeypatch.setattr(sources, "IN_MEMORY", 9 * 8 * 8 * 3 - 1)
    with pytest.raises(UsageError, match="^validation=0.4 copies .* of images into memory; put some into a folder val"):
        sources.validated(unlabelled, 0.4)


def test_R7_turns_are_right_and_equally_likely(images):
    upright = batches.train_batches(images, tasks.classify, 48, 50, seed=0)
    turned = batches.train_batches(images, tasks.random_turn, 48, 50, seed=0)
    for t in range(50):
        for before, after, k in zip(upright[t]["image"], turned[t]["image"], turned[t]["label"], strict=True):
            np.testing.assert_array_equal(after, np.rot90(before, k))
    turns = np.concatenate([turned[t]["label"] for t in range(50)])
    assert abs(np.bincount(turns, minlength=4) - 600).max() < 5 * 600**0.5
    repeated = turns.reshape(50, 48)
    assert all((a != b).any() for a, b in itertools.pairwise(repeated))


def test_draws_are_the_same_in_jax_and_independent_between_streams():
    index = np.arange(4096)
    words = [augmentation.draw(stream, 7, 3, index) for stream in range(4)]
    for stream, word in enumerate(words):
        np.testing.assert_array_equal(word, augmentation.draw(stream, 7, jnp.asarray(3), jnp.asarray(index)))
        assert 0.48 < np.mean(word >> 31) < 0.52
    signs = np.array([(word >> 31).astype(float) - 0.5 for word in words])
    assert abs(np.corrcoef(signs) - np.eye(4)).max() < 0.08
    assert set(augmentation.below(9, words[0]).tolist()) == set(range(9))


@pytest.mark.parametrize(("task", "views"), [(tasks.classify, 1), (tasks.random_turn, 1), (tasks.all_turns, 4)])
def test_evaluation_pads_the_last_batch_with_weight_zero(task, views):
    data = numbered(21)
    stream = batches.eval_batches(data, task, 8)
    assert len(stream) == 3
    assert {stream[t]["image"].shape for t in range(3)} == {(8 * views, 8, 8, 3)}
    kept = np.concatenate([centres(b)[b["weight"] > 0] for b in (stream[t] for t in range(3))])
    np.testing.assert_array_equal(kept, np.repeat(np.arange(21), views))


def test_a_test_image_is_turned_anew_every_epoch_and_alike_for_every_batch_size():
    data = numbered(64)
    first, second = (batches.eval_batches(data, tasks.random_turn, 64, seed=1, epoch=e)[0]["label"] for e in (1, 2))
    assert (first != second).any()
    small = batches.eval_batches(data, tasks.random_turn, 16, seed=1, epoch=1)
    np.testing.assert_array_equal(first, np.concatenate([small[t]["label"] for t in range(4)]))


@pytest.mark.parametrize(("size", "fault"), [(0, "too small"), (-1, "too small"), (49, "larger than")])
def test_a_batch_that_does_not_fit_is_refused(images, size, fault):
    with pytest.raises(UsageError, match=f"^batch_size={size} is {fault}"):
        batches.train_batches(images, tasks.classify, size, 1, seed=0)


@pytest.mark.parametrize("make", [partial(batches.train_batches, steps=1, seed=0), batches.eval_batches])
def test_pixels_that_are_not_uint8_are_refused(images, make):
    with pytest.raises(TypeError, match=r"images are float32\[48, 8, 8, 3\]; give an array of uint8 pixels"):
        make(images | {"image": images["image"] / np.float32(255)}, tasks.random_turn, 8)
    with pytest.raises(TypeError, match=r"arrays are uint8\[48, 8, 8, 3\]; give a dict"):
        make(images["image"], tasks.random_turn, 8)


@pytest.mark.parametrize("make", [partial(batches.train_batches, steps=1, seed=0), batches.eval_batches])
@pytest.mark.parametrize("shape", [(48, 8, 6, 3), (48, 3, 8, 8), (48, 8, 8), (48, 8, 8, 4), (48,)])
def test_images_that_are_no_squares_are_refused(make, shape):
    with pytest.raises(TypeError, match=re.escape(f"images are uint8{list(shape)}; give squares in RGB, [N,H,H,3]")):
        make({"image": np.zeros(shape, np.uint8)}, tasks.random_turn, 8)


@pytest.mark.parametrize("make", [partial(batches.train_batches, steps=1, seed=0), batches.eval_batches])
def test_rotations_need_no_labels(images, make):
    known, found = (make(data, tasks.random_turn, 8)[0] for data in (images, {"image": images["image"]}))
    assert known.keys() == found.keys()
    for name, values in known.items():
        np.testing.assert_array_equal(values, found[name])


def test_classes_need_labels(images):
    with pytest.raises(TypeError, match="images have no 'label'"):
        batches.train_batches({"image": images["image"], "labels": images["label"]}, tasks.classify, 8, 1, seed=0)
    with pytest.raises(UsageError, match="labels below 0, of images without a class"):
        batches.train_batches(images | {"label": images["label"] - 1}, tasks.classify, 8, 1, seed=0)
    for labels in (images["label"] + np.int64(2**32), images["label"].astype(np.uint64) + np.uint64(2**31)):
        with pytest.raises(UsageError, match="labels from 2,147,483,648 on, more than 32 bits hold"):
            batches.train_batches(images | {"label": labels}, tasks.classify, 8, 1, seed=0)


@pytest.mark.parametrize("make", [partial(batches.train_batches, steps=1, seed=0), batches.eval_batches])
@pytest.mark.parametrize("count", [40, 60])
def test_each_image_needs_a_label_of_its_own(images, make, count):
    labels = np.arange(count, dtype=np.int32) % 3
    with pytest.raises(TypeError, match=rf"48 images have labels int32\[{count}\]; give one label each, an integer"):
        make(images | {"label": labels}, tasks.classify, 8)


def test_seeds_and_sizes_out_of_range_are_refused_before_a_batch_is_made(images):
    for seed in (-1, 2**32, 1.5):
        with pytest.raises(UsageError, match=f"^seed={seed} is out of range"):
            batches.train_batches(images, tasks.classify, 8, 1, seed=seed)
        with pytest.raises(UsageError, match=f"^seed={seed} is out of range"):
            batches.eval_batches(images, tasks.classify, 8, seed=seed)
    same = [batches.train_picks(48, 8, 1, seed=seed)[0]["index"] for seed in (3, np.array(3), jnp.int32(3))]
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(same[0], same[2])
    for labels in (images["label"].astype(">i4"), images["label"].astype(np.int64), jnp.asarray(images["label"])):
        batch = batches.train_batches(images | {"label": labels}, tasks.classify, 8, 1, seed=3)[0]
        assert batch["label"].dtype == np.dtype("=i4")
    with pytest.raises(UsageError, match="^batch_size=0 is too small"):
        batches.eval_batches(images, tasks.classify, 0)


def test_cutouts_out_of_range_are_refused_before_a_batch_is_made(images):
    for cutout in (-0.1, 1.5, np.nan):
        with pytest.raises(UsageError, match=f"^cutout={cutout} is out of range"):
            batches.train_batches(images, tasks.classify, 8, 1, seed=0, cutout=cutout)


def test_batches_can_be_sent_to_the_workers_of_grain(images):
    made = batches.train_batches(images, tasks.random_turn, 8, 8, seed=0), batches.eval_batches(images, tasks.all_turns, 8)
    for known in made:
        sent = cloudpickle.loads(cloudpickle.dumps(known))
        for one, other in zip(known, sent, strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)


def test_subsets_are_stratified_seeded_and_nested(images):
    five, ten = (sources.subset(images["label"], k, seed=1) for k in (5, 10))
    np.testing.assert_array_equal(np.bincount(images["label"][ten]), [10, 10, 10])
    assert set(five) < set(ten)
    assert set(five) != set(sources.subset(images["label"], 5, seed=2))
    with pytest.raises(UsageError, match="^subset=17 is more than the 16 images"):
        sources.subset(images["label"], 17, seed=1)
    with pytest.raises(UsageError, match="16 images of class cats; use at most that"):
        sources.subset(images["label"], 17, seed=1, classes=("cats", "dogs", "apes"))
    with pytest.raises(UsageError, match="0 images of class owls; leave it out"):
        sources.subset(images["label"], 1, seed=1, classes=("cats", "dogs", "apes", "owls"))
    assert sources.subset(np.array([0, 2, 2, 0]), 2, seed=1).tolist() == [0, 1, 2, 3]
