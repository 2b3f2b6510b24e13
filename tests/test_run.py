"""A run on disk: its rows and its summary, and transfer between workdirs."""

import dataclasses
import json
import math
import time
from contextlib import closing
from functools import partial

import jax
import numpy as np
import pytest

import rotjax
from rotjax.errors import UsageError
from tests.runs import SMALL, arrays, carry_out, summary


def test_a_matrix_of_too_many_classes_is_not_in_the_summary(data, tmp_path, monkeypatch):
    monkeypatch.setattr("rotjax.scoring.MOST", 2)
    carry_out(rotjax.Classification(**SMALL), data, tmp_path / "run")
    assert summary(tmp_path / "run")["confusion"] is None


def test_the_speed_of_a_run_counts_neither_tests_nor_the_time_of_who_iterates_over_it(data, tmp_path):
    plan, moments, slept = rotjax.plan(rotjax.Rotation(**SMALL), data=data), [], 0.0
    for _ in rotjax.train(plan, tmp_path, log_steps=2, progress=lambda _: moments.append(time.perf_counter())):
        time.sleep(0.3)
        slept += 0.3
    assert 12 * 8 / summary(tmp_path)["images_per_second"] < time.perf_counter() - moments[0] - slept + 0.1


def test_a_run_leaves_its_recipe_metrics_and_summary(pretrained, data):
    rows = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 6, 8, 10, 12, 12]
    final = summary(pretrained)
    confusion = np.array(final["confusion"])
    assert confusion.sum(1).tolist() == [11, 11, 11, 11]
    assert final["rotation_accuracy"] == pytest.approx(np.trace(confusion) / 44)
    assert final["rotation_accuracy_random"] == rows[-1]["test_accuracy"]
    assert (final["epochs"], final["steps"], final["resumed_from"]) == (2, 12, None)
    assert final["images_per_second"] > 0 and final["wall_seconds"] > 0
    model, variables, recipe = rotjax.load(pretrained)
    assert recipe.job == "rotation" and recipe.backbone == "resnet18" and recipe.dataset == "noise"
    views, turns = rotjax.rotation.all_turns(data.test["image"])
    predicted = np.asarray(model.apply(variables, views)).argmax(-1)
    assert (predicted == turns).mean() == pytest.approx(final["rotation_accuracy"])


def test_a_cadence_that_is_none_is_refused_before_anything_is_written(data, tmp_path):
    plan = rotjax.plan(rotjax.Rotation(**SMALL), data=data)
    for name, value, least in (("log_steps", 0, 1), ("checkpoint_seconds", -1.0, 0), ("checkpoint_seconds", math.nan, 0)):
        with pytest.raises(UsageError, match=f"^{name}={value} is too small; it is at least {least}$"):
            list(rotjax.train(plan, tmp_path / "run", **{name: value}))
    for name in ("log_steps", "steps_per_dispatch", "threads"):
        with pytest.raises(UsageError, match=f"^{name}=1.5 is no integer; give one$"):
            list(rotjax.train(plan, tmp_path / "run", **{name: 1.5}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("trainable", ["head", "last_block"])
def test_R14_what_is_frozen_stays_as_the_pretrained_run_left_it(pretrained, data, tmp_path, trainable, notes):
    recipe = rotjax.Classification(pretrained=str(pretrained), trainable=trainable, batch_size=8, epochs=1)
    rows = carry_out(recipe, data, tmp_path / "run")
    assert any("taken from rotation-noise-resnet18" in note and "new: the head" in note for note in notes)
    assert any("frozen: backbone" in note for note in notes)
    model, variables, saved = rotjax.load(tmp_path / "run")
    donor = rotjax.load(pretrained)[1]
    stages = {"head": 5, "last_block": 4}[trainable]
    for collection in ("params", "batch_stats"):
        for stage in ("stem", "stage1", "stage2", "stage3", "stage4")[:stages]:
            mine, theirs = (v[collection]["backbone"][stage] for v in (variables, donor))
            jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    assert saved.stem == "cifar" and saved.width == 4 and saved.classes == ("a", "b", "c")
    logits = model.apply(variables, data.test["image"])
    assert summary(tmp_path / "run")["accuracy"] == pytest.approx((logits.argmax(-1) == data.test["label"]).mean())
    assert rows[-1]["test_accuracy"] == summary(tmp_path / "run")["accuracy"]


def test_a_transfer_that_goes_on_does_not_say_that_it_takes_the_backbone_again(pretrained, data, tmp_path, notes):
    plan = rotjax.plan(rotjax.Classification(pretrained=str(pretrained), batch_size=8, epochs=1), data=data)
    with closing(rotjax.train(plan, tmp_path / "run", log_steps=2, checkpoint_seconds=0.0)) as rows:
        next(rows)
    assert any(note.startswith("taken from") for note in notes)
    notes.clear()
    list(rotjax.train(plan, tmp_path / "run", log_steps=2))
    assert any(note.startswith("resuming from step ") and note.endswith(" of 6") for note in notes)
    assert (
        not any(note.startswith("taken from") for note in notes) and sum("parameters train" in note for note in notes) == 1
    )


def test_R14_a_transfer_begins_with_the_pretrained_backbone_and_a_fresh_head(pretrained, data):
    plan = rotjax.plan(rotjax.Classification(pretrained=str(pretrained), batch_size=8, seed=5), data=data)
    assert rotjax.plan(rotjax.Classification(pretrained=pretrained, batch_size=8, seed=5), data=data).recipe == plan.recipe
    state = rotjax.run._build(plan)[2]()
    fresh, donor = rotjax.init_variables(plan.recipe.model(), 5, 8), rotjax.load(pretrained)[1]
    for name, source in {"head": fresh, "backbone": donor}.items():
        jax.tree.map(np.testing.assert_array_equal, rotjax.part(state.variables, name), rotjax.part(source, name))


def test_pretraining_goes_on_from_an_earlier_run_on_other_images(pretrained, data, tmp_path):
    others = dataclasses.replace(data, train={key: value[::-1] for key, value in data.train.items()})
    recipe = rotjax.Rotation(pretrained=str(pretrained), batch_size=8, max_steps=1)
    plan = rotjax.plan(recipe, data=others)
    _, variables, source = rotjax.load(pretrained)
    assert plan.recipe.pretrained == f"{source.name}@12" and plan.recipe.stem == "cifar"
    begun = rotjax.run._build(plan)[2]().variables
    jax.tree.map(np.testing.assert_array_equal, rotjax.part(begun, "backbone"), rotjax.part(variables, "backbone"))
    kernels = (rotjax.part(one, "head")["params"]["kernel"] for one in (begun, variables))
    assert (np.asarray(next(kernels)) != np.asarray(next(kernels))).any()
    assert carry_out(recipe, others, tmp_path / "on")[-1]["step"] == 1
    assert carry_out(recipe, others, tmp_path / "on") == []
    with pytest.raises(UsageError, match="^width=8 contradicts .*, which has 4; leave it out"):
        rotjax.plan(dataclasses.replace(recipe, width=8), data=others)


def test_the_mean_and_std_of_the_pixels_travel_with_the_backbone(data, tmp_path):
    own = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    carry_out(rotjax.Rotation(max_steps=1, **own, **SMALL), data, tmp_path / "run")
    plan = rotjax.plan(rotjax.Classification(pretrained=str(tmp_path / "run"), batch_size=8), data=data)
    assert plan.recipe.model().mean == own["mean"] and plan.recipe.model().std == own["std"]


def test_a_run_takes_the_step_of_its_recipe(data, tmp_path):
    """Optimizer, rate, decay, smoothing and cutout; in one step, after which rounding is all that may differ."""
    given = dict(optimizer="sgd", schedule="cosine", label_smoothing=0.3, cutout=0.5, weight_decay=0.1, max_steps=1)
    plan = rotjax.plan(rotjax.Classification(**SMALL, **given), data=data)
    list(rotjax.train(plan, tmp_path / "run"))
    model, optimizer = plan.recipe.model(), rotjax.sgd(0.1 * 8 / 128, weight_decay=0.1)
    state = rotjax.init_state(optimizer, rotjax.init_variables(model, 1, 8))
    batch = rotjax.train_batches(data.train, rotjax.classify, 8, 1, seed=1, cutout=0.5)[0]
    step = rotjax.train_step(model, optimizer, loss=partial(rotjax.cross_entropy, smoothing=0.3))
    expected = step(state, batch)[0].variables
    for one, other in zip(jax.tree.leaves(expected), arrays(tmp_path / "run"), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_C9_classes_that_are_numbers_become_names(data, tmp_path):
    numbered = rotjax.Dataset("noise", tuple(np.arange(3)), data.train, data.test)
    recipe = rotjax.Classification(**SMALL, max_steps=1, learning_rate=np.float64(0.1))
    carry_out(recipe, numbered, tmp_path)
    assert rotjax.load(tmp_path)[2].classes == ("0", "1", "2")
