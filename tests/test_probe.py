"""What is read out of a network's stages, and what is learnt from it."""

import json
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import rotjax
from experiments import outcomes, probe
from experiments.outcomes import PROBES
from rotjax.errors import CheckpointError, DataError, UsageError


def shades(count, classes):
    """Images of one shade each, a class a shade."""
    label = np.arange(count, dtype=np.int32) % classes
    image = np.broadcast_to((label * (255 // classes)).astype(np.uint8)[:, None, None, None], (count, 16, 16, 3))
    return {"image": image.copy(), "label": label}


@pytest.fixture
def network():
    model = rotjax.create("resnet18", 3, "cifar", width=4)
    return model, rotjax.init_variables(model, 0, 16)


def test_features_are_the_mean_of_every_map_whatever_the_batch(network, images):
    model, variables = network
    found = rotjax.features(model, variables, images["image"], batch_size=20)
    endpoints = model.apply(variables, images["image"], method="endpoints")
    assert list(found) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    for name, values in found.items():
        assert values.dtype == np.float32 and len(values) == len(images["image"])
        np.testing.assert_allclose(values, jnp.mean(endpoints[name], (1, 2)), atol=1e-5)


def test_features_of_pixels_that_are_not_uint8_are_refused(network, images):
    with pytest.raises(TypeError, match=r"images are float64\[48, 8, 8, 3\]; give an array of uint8 pixels"):
        rotjax.features(*network, images["image"] / 255)


def test_probes_learn_what_is_there_to_be_learnt(network):
    model, variables = network
    data = rotjax.Dataset("shades", ("a", "b", "c"), shades(30, 3), shades(9, 3))
    for stage in probe.probed(model, {"random": variables, "trained": variables}, data, neighbors=5):
        assert stage["linear"] == stage["neighbors"] == {"random": 1.0, "trained": 1.0}
    rng = np.random.default_rng(0)
    unlearnable = {**data.train, "label": rng.permutation(data.train["label"])}
    data = rotjax.Dataset("shades", data.classes, unlearnable, {**data.test, "label": rng.permutation(data.test["label"])})
    assert all(stage["linear"]["trained"] < 0.8 for stage in probe.probed(model, {"trained": variables}, data, neighbors=5))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = rotjax.Rotation(dataset="digits", stem="cifar", image_size=8, width=4, batch_size=64, max_steps=3)
    list(rotjax.train(rotjax.plan(recipe), folder))
    return folder


def test_the_command_leaves_its_scores_in_the_workdir_and_among_results(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["probe", f"--pretrained={workdir}", f"--results={tmp_path}"])
    assert probe.main() == 0
    out = capsys.readouterr().out
    result = json.loads((workdir / "probe-digits.json").read_text())
    assert (result["run"], result["train_images"], result["test_images"]) == (workdir.name, 1438, 359)
    assert [stage["stage"] for stage in result["stages"]] == ["stem", "stage1", "stage2", "stage3", "stage4"]
    for stage in result["stages"]:
        for kind in PROBES:
            assert stage[kind].keys() == {"random", "trained"}
            assert f"{100 * stage[kind]['trained']:.2f}" in out
    assert max(stage["linear"]["trained"] for stage in result["stages"]) > 0.5 and str(workdir / "probe-digits.json") in out
    assert outcomes.probes(tmp_path) == [result] and f"Features of {workdir.name}" in (tmp_path / "README.md").read_text()


def test_scores_on_other_folders_of_the_same_name_and_other_sizes_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("cats", "dogs"):
        (tmp_path / folder / "images").mkdir(parents=True)
    data = rotjax.Dataset("images", ("a", "b", "c"), shades(3, 3), shades(3, 3))
    same = ("dogs/images", "./dogs/images/", str(tmp_path / "dogs/images"))
    names = [probe._named(name, data, 16) for name in ("cats/images", *same)]
    assert names[0] != names[1] == names[2] == names[3] and {name.partition("-")[0] for name in names} == {"images"}
    assert probe._named("imagenette", data, 16) == "images" and probe._named("imagenette", data, 8) == "images-16px"


def test_without_a_data_set_it_is_the_one_that_was_trained_on_and_no_other(tmp_path, monkeypatch):
    from PIL import Image

    for place, classes, shade in (("here", "ab", 0), ("there", "cd", 0), ("alike", "ab", 9)):
        for number, kind in enumerate(classes * 10):
            path = tmp_path / place / "photos" / kind / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (100 * (number % 2), number, shade)).save(path)
    monkeypatch.chdir(tmp_path / "here")
    recipe = rotjax.Rotation(dataset="photos", stem="cifar", image_size=8, width=4, batch_size=8, max_steps=1)
    list(rotjax.train(rotjax.plan(recipe), tmp_path / "run"))
    probe.run(tmp_path / "run", neighbors=2)
    for place, odd in (("there", "classes, sample"), ("alike", "sample")):
        monkeypatch.chdir(tmp_path / place)
        line = rf"^photos is not what .*run was trained on \(other {odd}\); name what .*--dataset$"
        with pytest.raises(DataError, match=line):
            probe.run(tmp_path / "run", neighbors=2)
    probe.run(tmp_path / "run", "photos", neighbors=2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="run was trained on photos, which is not here; name what to classify, --dataset$"):
        probe.run(tmp_path / "run", neighbors=2)


def test_what_cannot_be_probed_is_refused(workdir, tmp_path):
    from PIL import Image

    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    with pytest.raises(
        DataError, match="has no classes; put its images into one folder per class, or name another data set"
    ):
        probe.run(workdir, str(tmp_path), None, None, 5)
    unfinished = shutil.copytree(workdir, tmp_path / "unfinished")
    for odd in ("", "[]", '{"accuracy": ', "{}", '{"confusion": []}'):
        (unfinished / "summary.json").write_text(odd)
        with pytest.raises(CheckpointError, match=r"summary.json cannot be read .*; remove it"):
            probe.run(unfinished, None, None, None, 5)
    (unfinished / "summary.json").unlink()
    with pytest.raises(CheckpointError, match="is not finished"):
        probe.run(unfinished, None, None, None, 5)
    (tmp_path / "results/probes").mkdir(parents=True)
    (tmp_path / "results/probes/mine.json").write_text('{"run": "of my own"}')
    with pytest.raises(
        CheckpointError, match="mine.json is no such result, without accuracy, .*, stages; move it elsewhere"
    ):
        probe.run(workdir, results=tmp_path / "results")
    with pytest.raises(UsageError, match="--neighbors=2000 is more than the 1438 training images"):
        probe.run(workdir, None, None, None, 2000)
