"""What a recipe says, where it comes from, and what is refused while it is planned."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import rotjax
from rotjax.errors import CheckpointError, UsageError
from tests.runs import SMALL, carry_out, summary


def test_what_is_no_recipe_no_data_or_no_place_is_refused(data, tmp_path):
    recipe = rotjax.Rotation(**SMALL)
    with pytest.raises(UsageError, match="^the recipe is of type type; give a Rotation or a Classification$"):
        rotjax.plan(rotjax.Rotation, data=data)
    with pytest.raises(UsageError, match="^data is of type dict; give a rotjax.Dataset$"):
        rotjax.plan(recipe, data=data.train)
    with pytest.raises(UsageError, match=r"^classes=\('a', 'b'\) are not the four turns"):
        rotjax.plan(dataclasses.replace(recipe, classes=("a", "b")), data=data)
    with pytest.raises(UsageError, match="^augment=gpu is none of host, device; give one of them$"):
        list(rotjax.train(rotjax.plan(recipe, data=data), tmp_path / "run", augment="gpu"))
    with pytest.raises(UsageError, match="^batch_size=5000 is larger than the training set of 1,438 images"):
        rotjax.data.load("digits", image_size=8, batch_size=5000)


def test_an_epoch_of_a_subset_has_as_many_steps_as_of_the_whole(data, tmp_path):
    plan = rotjax.plan(rotjax.Classification(subset=3, **SMALL), data=data)
    assert len(plan.data.train["label"]) == 9 and plan.steps == 12
    carry_out(rotjax.Classification(subset=3, max_steps=1, **SMALL), data, tmp_path / "run")
    assert summary(tmp_path / "run")["train_images"] == 9


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(backbone="densenet121"), UsageError, "^backbone=densenet121 contradicts .* resnet18; leave it out"),
        (dict(stem="imagenet"), UsageError, "^stem=imagenet contradicts .* cifar"),
        (dict(batch_size=49), UsageError, "^batch_size=49 is larger than the training set of 48"),
        (dict(subset=99), UsageError, "^subset=99 is more than the 16 images of class a; use"),
        (dict(subset=2), UsageError, "^batch_size=8 is larger than the training set of 6"),
        (dict(learning_rate=float("nan")), UsageError, "^learning_rate=nan"),
        (dict(learning_rate=10**400), UsageError, "^learning_rate=10{400} is out of range; it is a finite number"),
        (dict(image_size=16), UsageError, "^image_size=16 contradicts data of 8 px; leave it out"),
    ],
)
def test_C8_a_contradiction_is_refused_while_planning(pretrained, data, options, error, message):
    with pytest.raises(error, match=message):
        rotjax.plan(rotjax.Classification(pretrained=str(pretrained), **(dict(batch_size=8) | options)), data=data)


def test_a_pretrained_run_that_is_not_there_is_refused(data, tmp_path):
    def plan(workdir):
        return rotjax.plan(rotjax.Classification(pretrained=str(workdir), batch_size=8), data=data)

    with pytest.raises(CheckpointError, match="no recipe.json"):
        plan(tmp_path / "missing")
    for name in ("rotation-x@15", f"{'x' * 300}@15"):  # the last is longer than any file's
        with pytest.raises(UsageError, match=f"^pretrained={name} is the name of a run and a step; give the workdir of"):
            plan(name)
    (tmp_path / "recipe.json").write_text("[]")
    with pytest.raises(CheckpointError, match="recipe.json is a file, or below one; name the workdir of a finished run"):
        plan(tmp_path / "recipe.json")
    for content, problem in (("[]", "it is no JSON object.; bring it back, or name"), ("{}", "not a recipe")):
        (tmp_path / "recipe.json").write_text(content)
        with pytest.raises(CheckpointError, match=problem):
            plan(tmp_path)
    recipe = rotjax.plan(rotjax.Rotation(**SMALL), data=data).recipe
    (tmp_path / "recipe.json").write_text(json.dumps(rotjax.recipe_json.to_json(recipe)))
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        plan(tmp_path)


def test_C10_a_recipe_of_a_later_rotjax_is_refused(data):
    values = rotjax.recipe_json.to_json(rotjax.plan(rotjax.Rotation(**SMALL), data=data).recipe)
    for later in ({"schema": 99}, {"colour": "blue"}):
        with pytest.raises(CheckpointError, match="here was written by a newer rotjax"):
            rotjax.recipe_json.from_json(values | later, "here")


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "[" * 100_000, '{"schema": 1}', "\xff", "1" * 5000,
        *({key: value} for key, value in {
            "job": [], "schema": "1", "width": "x", "stem": "foo", "seed": None, "classes": [1], "mean": [0, 0], "flip": 1,
            "dataset": 7, "backbone": ["x" * 1000], "image_size": 10**9, "std": [float("nan")] * 3, "epochs": {},
        }.items()),
        {"seed": -1},
    ],
)  # fmt: skip
def test_U2_a_forged_recipe_is_refused_in_a_line(data, tmp_path, content):
    values = rotjax.recipe_json.to_json(rotjax.plan(rotjax.Classification(**SMALL), data=data).recipe)
    text = json.dumps(values | content) if isinstance(content, dict) else content
    (tmp_path / "recipe.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="recipe.json (is not a recipe|cannot be read)") as caught:
        rotjax.load(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_C9_a_recipe_survives_its_json_and_an_older_one_is_completed(data):
    recipe = rotjax.plan(rotjax.Classification(subset=3, **SMALL), data=data).recipe
    values = json.loads(json.dumps(rotjax.recipe_json.to_json(recipe)))
    assert rotjax.recipe_json.from_json(values, "here") == recipe
    strong = rotjax.recipe_json.from_json(
        {key: value for key, value in values.items() if key != "cutout"} | {"preset": "strong"}, "here"
    )
    assert strong == dataclasses.replace(recipe, preset="strong"), "what was not known was not done, whatever the preset"
    for name in ("flip", "preset", "optimizer", "schedule", "warmup_epochs", "cutout", "label_smoothing", "validation"):
        del values[name]
    assert rotjax.recipe_json.from_json(values, "here") == recipe


def test_what_is_given_comes_before_the_strong_preset_before_the_data_set_before_the_report():
    strong = rotjax.Rotation(preset="strong", epochs=7, dataset="digits").resolved()
    assert (strong.epochs, strong.batch_size, strong.width, strong.backbone) == (7, 16, 32, "resnet18")
    assert (strong.warmup_epochs, rotjax.Rotation(preset="strong").resolved().warmup_epochs) == (3, 5)
    rates = [(rotjax.Rotation(preset=p, optimizer=o).resolved()) for p in ("strong", "report") for o in ("adamw", "sgd")]
    assert [(one.learning_rate, one.weight_decay) for one in rates] == [(0.01, 0.01), (0.1, 5e-4)] * 2
    classes = [rotjax.Classification(preset="strong", batch_size=size).resolved() for size in (None, 512)]
    rates = [strong.learning_rate, *(one.learning_rate for one in classes)]
    assert rates == [0.0125, 0.1, 0.4], "in proportion to the batch"
    assert rotjax.Classification(preset="strong", optimizer="adamw").resolved().learning_rate == 0.01
    assert (strong.stem, strong.optimizer, strong.schedule, strong.views) == ("cifar", "sgd", "cosine", 64)
    report = rotjax.Rotation(dataset="digits").resolved()
    assert (report.epochs, report.learning_rate, report.optimizer, report.schedule) == (8, 1e-3, "adamw", "steps")
    assert rotjax.Rotation().resolved().name == "rotation-cifar10-resnet18-54d5f115"


@pytest.mark.parametrize(("job", "usual"), [(rotjax.Rotation, (45, 15)), (rotjax.Classification, (20, 10))])
def test_the_rate_falls_after_the_same_share_of_any_number_of_epochs(job, usual):
    epochs, decay = usual
    assert job().resolved().decay_epochs == decay
    assert job(epochs=4 * epochs).resolved().decay_epochs == 4 * decay
    assert job(epochs=1).resolved().decay_epochs == 1
    for few in range(1, 200):  # 45 epochs have two drops, 20 have one
        assert (few - 1) // job(epochs=few).resolved().decay_epochs <= (epochs - 1) // decay
    assert job(epochs=4 * epochs, decay_epochs=7).resolved().decay_epochs == 7
    assert job(epochs=16, dataset="digits").resolved().decay_epochs == 12
    assert job(epochs=4 * epochs, preset="strong", schedule="steps").resolved().decay_epochs == 4 * decay


@pytest.mark.parametrize(("name", "value"), [("preset", "Strong"), ("schedule", "linear"), ("optimizer", "SGD")])
def test_a_recipe_in_python_with_a_name_that_is_none_is_refused(data, name, value):
    with pytest.raises(UsageError, match=f"^{name}={value} is none of .*; give one of them"):
        rotjax.plan(rotjax.Rotation(**(SMALL | {name: value})), data=data)


@pytest.mark.parametrize(
    ("name", "value", "kinds"),
    [
        ("epochs", 2.5, "float; give int"),
        ("max_steps", 2.5, "float; give int | None"),
        ("batch_size", 8.0, "float; give int"),
        ("seed", np.int64(3), "int64; give int"),
        ("seed", None, "NoneType; give int"),
        ("seed", True, "bool; give int"),
        ("width", "4", "str; give int"),
        ("flip", "no", "str; give bool"),
        ("learning_rate", "0.1", "str; give float"),
        ("mean", (0.5, 0.5), "tuple; give tuple[float, float, float]"),
        ("dataset", b"photos", "bytes; give str"),
    ],
)
def test_C9_a_recipe_in_python_that_could_not_be_read_back_is_refused(name, value, kinds):
    with pytest.raises(UsageError) as caught:
        rotjax.plan(rotjax.Rotation(**(SMALL | {"std": (0.2,) * 3 if name == "mean" else None, name: value})))
    assert str(caught.value) == f"{name}={value} is of type {kinds}"


def test_a_path_is_a_folder_and_not_the_set_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no folder ./digits; name a folder of images"):
        rotjax.plan(rotjax.Rotation(dataset=Path("digits")))


def test_a_backbone_of_a_run_that_is_not_finished_is_told(pretrained, data, notes, tmp_path):
    shutil.copytree(pretrained, tmp_path / "run")
    rotjax.plan(rotjax.Classification(pretrained=str(tmp_path / "run"), batch_size=8), data=data)
    assert not any("not finished" in note for note in notes)
    (tmp_path / "run" / "summary.json").unlink()
    rotjax.plan(rotjax.Classification(pretrained=str(tmp_path / "run"), batch_size=8), data=data)
    taken = f"{tmp_path / 'run'} is not finished: what is taken from it is of step 12"
    assert f"{taken}, and this run, if it is stopped, resumes only while that is the newest" in notes


def test_a_backbone_that_has_seen_the_validation_images_is_told(pretrained, data, notes):
    given = dict(pretrained=str(pretrained), batch_size=8)
    rotjax.plan(rotjax.Classification(**given), data=data)
    rotjax.plan(rotjax.Classification(validation=0.25, **given), data=dataclasses.replace(data, name="others"))
    assert not any("validation" in note for note in notes)
    for name in ("noise", "./noise", os.path.abspath("noise")):
        notes.clear()
        rotjax.plan(rotjax.Classification(validation=0.25, **given), data=dataclasses.replace(data, name=name))
        assert any("pretrained on the validation images too" in note for note in notes)


def test_what_defaults_make_of_the_images_other_than_in_the_pretrained_run_is_told(pretrained, data, notes):
    recipe = rotjax.Classification(pretrained=str(pretrained), batch_size=8)
    rotjax.plan(recipe, data=data)
    assert not any("by default" in note for note in notes)
    images, labels = np.zeros((8, 32, 32, 3), np.uint8), np.arange(8, dtype=np.int32) % 2
    digits = rotjax.Dataset("digits", ("a", "b"), {"image": images, "label": labels}, {"image": images, "label": labels})
    rotjax.plan(recipe, data=digits)
    assert "images have flip False by default, in the pretrained run they have flip True" in notes
    rotjax.plan(dataclasses.replace(recipe, flip=False), data=digits)
    assert len([note for note in notes if "by default" in note]) == 1


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b/../..", ".", "..", "-rf", "a\0b", "x" * 300, "\u202e", "~/x/"])
def test_U3_no_name_leads_out_of_the_folder_of_runs(name):
    stem = rotjax.Rotation(dataset=name).resolved().name
    assert Path("runs", stem).parent == Path("runs") and stem.startswith("rotation-") and len(stem) < 120
    assert stem.isprintable() and "\0" not in stem
