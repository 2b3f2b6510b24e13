"""What a trained network says of new images."""

import csv
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

import rotjax
from experiments import predict
from rotjax.data import photographs
from rotjax.data.pixels import square
from rotjax.errors import CheckpointError, DataError, UsageError


def test_probabilities_are_the_softmax_of_the_logits_whatever_the_batch(images):
    model = rotjax.create("resnet18", 3, "cifar", width=4)
    variables = rotjax.init_variables(model, 0, 8)
    found = rotjax.probabilities(model, variables, images["image"], batch_size=20)
    assert found.dtype == np.float32 and found.shape == (48, 3)
    np.testing.assert_allclose(found, jax.nn.softmax(model.apply(variables, images["image"])), atol=1e-6)
    explicit = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec("x"))
    placed = rotjax.probabilities(model, variables, jax.device_put(images["image"], explicit), batch_size=20)
    np.testing.assert_array_equal(placed, found)
    with pytest.raises(ValueError, match="there are no images, or none with pixels; give at least one"):
        rotjax.probabilities(model, variables, images["image"][:, :0])
    for size in (0, -3):
        with pytest.raises(UsageError, match=f"^batch_size={size} is too small; it is at least 1$"):
            rotjax.probabilities(model, variables, images["image"], batch_size=size)
    with pytest.raises(TypeError, match=r"images are float64\[48, 8, 8, 3\]; give an array of uint8 pixels"):
        rotjax.probabilities(model, variables, images["image"] / 255)
    with pytest.raises(TypeError, match="images are list; give an array of uint8 pixels"):
        rotjax.probabilities(model, variables, list(images["image"]))
    with pytest.raises(TypeError, match="Dense has no method `endpoints`, the maps of its stages; give a Classifier"):
        rotjax.features(nn.Dense(3), {}, images["image"])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = rotjax.Classification(dataset="digits", stem="cifar", image_size=8, width=4, batch_size=64, max_steps=3)
    list(rotjax.train(rotjax.plan(recipe), folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    """Forty images of odd sizes in two folders, one that cannot be read, and what is no image."""
    rng = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "images" / ("one, two" if number % 2 else "three") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9 + number, 12, 3), dtype=np.uint8)).save(path)
    path.rename(path.with_name(os.fsdecode(b"\xff.png")))
    for name in ("damaged.png", "notes.txt", ".hidden.png"):
        (tmp_path / "images" / name).write_text("nothing")
    return tmp_path / "images"


def test_every_image_of_a_folder_gets_its_prediction(workdir, folder, monkeypatch, capsys):
    monkeypatch.setattr(predict, "TOGETHER", 16)
    monkeypatch.setattr(sys, "argv", ["predict", f"--pretrained={workdir}", f"--images={folder}"])
    assert predict.main() == 0
    out, err = capsys.readouterr()
    (table,), (sheet,) = workdir.glob("predictions-images-*.csv"), workdir.glob("predictions-images-*.png")
    assert f"{table}\n{sheet}\n" in out
    with Image.open(sheet) as image:
        assert image.width == 800
    assert f"left out of {folder}, no images by their suffix: 1 .txt\n" in out
    assert (
        err == "rotjax: 1 of 41 images cannot be read and have no prediction: damaged.png (not an image that Pillow opens)\n"
    )

    with open(table, newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.png"))
    assert [row["file"] for row in rows] == ["damaged.png", *names]
    assert set(rows.pop(0).values()) == {"damaged.png", ""}
    model, variables, recipe = rotjax.load(workdir)
    given = rotjax.probabilities(model, variables, np.stack([square(Image.open(folder / name), 8) for name in names]))
    for row, values in zip(rows, given, strict=True):
        assert row["prediction"] == recipe.classes[values.argmax()]
        np.testing.assert_allclose([float(row[name]) for name in recipe.classes], values, atol=1e-5)
        assert row["probability"] == row[row["prediction"]]
    for name, count in Counter(row["prediction"] for row in rows).items():
        assert f"{count:9}  {name}\n" in out


def test_a_workdir_of_others_is_left_as_it_is_where_another_folder_gets_the_table(workdir, folder, tmp_path):
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    predict.run(workdir, folder, output=tmp_path / "a" / "b")
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    sheet, table = sorted((tmp_path / "a" / "b").iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (sheet.suffix, table.suffix) == (".png", ".csv") and len(table.read_bytes().splitlines()) == 42
    with pytest.raises(CheckpointError, match=r"cannot write in .*\.csv/below .*; name another folder, --output"):
        predict.run(workdir, folder, output=table / "below")


def test_its_own_picture_is_not_to_be_among_the_images(workdir, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for images, output in ((folder, folder), (Path("."), Path("three")), (Path("three"), folder / "three" / "new")):
        with pytest.raises(UsageError, match="--output=.* lies in --images=.*; name a folder outside"):
            predict.run(workdir, images, output=output)
    assert not (folder / "three" / "new").exists()
    shutil.copytree(workdir, folder / "run", ignore=shutil.ignore_patterns("predictions-*"))
    for _ in range(2):
        predict.run(Path("run"), folder / "three", output=folder / "run")
        predict.run(Path("run"), folder)
    (table,) = (folder / "run").glob("predictions-images-*.csv")
    assert len(table.read_bytes().splitlines()) == 42


def test_the_current_folder_and_the_one_above_are_folders_too(folder, monkeypatch):
    names = photographs.listed(folder)
    for here, path in ((folder, "."), (folder / "three", "..")):
        monkeypatch.chdir(here)
        assert photographs.listed(Path(path)) == names and len(names) == 41


def test_a_folder_without_an_image_that_can_be_read_is_refused_and_leaves_nothing(workdir, tmp_path):
    with pytest.raises(DataError, match=r"holds no images \(no files\); name a folder of images"):
        predict.run(workdir, tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"holds no images \(1 .txt\); name a folder of images"):
        predict.run(workdir, tmp_path)
    before = sorted(workdir.iterdir())
    (tmp_path / "damaged.png").touch()
    with pytest.raises(DataError, match=r"none of the 1 images in .* can be read: damaged.png \(empty\)"):
        predict.run(workdir, tmp_path)
    assert sorted(workdir.iterdir()) == before
