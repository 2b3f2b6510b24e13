"""Sets that TFDS has written as array_record, here into a temporary folder, become arrays or an error in one line."""

import os
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rotjax.data import catalogue, prepared, sources
from rotjax.errors import DataError, UsageError
from rotjax.files import cache

IMAGE, CLASSES = tfds.features.Image(shape=(None, None, 3)), ("cat", "dog")


def write(data_dir, splits, image=IMAGE, label=CLASSES, name="tiny", version="1.0.0", config=None, shards=None):
    """Prepares a set of `{split: [(image, label)]}`, without the features that are None; a tuple is names of classes."""
    label = tfds.features.ClassLabel(names=label) if isinstance(label, tuple) else label
    features = {key: feature for key, feature in {"image": image, "label": label}.items() if feature is not None}
    set_name = name

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []
        url_infos = None

        def _info(self):
            # Keys in their order, so that tests know which record is which.
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            for index, example in enumerate(examples):
                yield index, dict(zip(features, example, strict=False))

    tfds.disable_progress_bar()
    builder = Tiny(data_dir=data_dir, config=config, file_format="array_record")
    sharding = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=shards)
    builder.download_and_prepare(download_config=sharding)
    return builder.data_path


def pictures(count, size=(9, 7), mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return [(Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)), index % 2) for index in range(count)]


@pytest.fixture
def tiny(tmp_path):
    """Folder of a set with 12 training and 4 test images of 8x8."""
    return Path(write(tmp_path, {"train": pictures(12, (8, 8)), "test": pictures(4, (8, 8), seed=1)}))


@pytest.fixture(params=[4096, 0], ids=["by one thread", "by threads"])
def small(monkeypatch, request):
    """Records that one thread decodes: all that are written here, or none."""
    monkeypatch.setattr(prepared, "SMALL", request.param)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_what_tfds_reads(tmp_path, tiny, small):
    dataset = prepared.load("tiny", 8, tmp_path)
    assert (dataset.name, dataset.classes) == ("tiny", CLASSES)
    builder: Any = tfds.builder_from_directory(tiny)
    for split, arrays in (("train", dataset.train), ("test", dataset.test)):
        records = list(builder.as_data_source(split))
        np.testing.assert_array_equal(arrays["image"], [record["image"] for record in records])
        np.testing.assert_array_equal(arrays["label"], [record["label"] for record in records])
        assert (arrays["image"].dtype, arrays["label"].dtype) == (np.uint8, np.int32)
    assert "tensorflow" not in sys.modules


def test_by_way_of_sources(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(prepared, "CHUNK", 5)  # that neither 12 nor 4 are multiples of
    seen = []

    def progress(items):
        seen.append(len(items))
        return iter(items)

    dataset = sources.load("tiny", image_size=16, progress=progress)
    assert dataset.train["image"].shape == (12, 16, 16, 3)
    assert dataset.train["label"].tolist() == [index % 2 for index in range(12)]
    assert len(np.unique(dataset.train["image"], axis=0)) == 12
    assert seen == [12, 4]


@pytest.mark.parametrize("splits", [{"train": 12, "test": 4}, {"train": 16}])
@pytest.mark.parametrize("at", [11, 14])
def test_R3_stopped_while_decoding_it_goes_on_to_the_same_arrays(tmp_path, monkeypatch, small, splits, at):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)  # threads are up to 9 ahead
    write(tmp_path, {split: pictures(count, (8, 8), seed=count) for split, count in splits.items()})
    whole, shown = prepared.load("tiny", 8, tmp_path), []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))

    def stopping(items):
        for item in items:
            if len(shown) == at:
                raise KeyboardInterrupt
            shown.append(item)
            yield item

    with pytest.raises(KeyboardInterrupt):
        prepared.load("tiny", 8, tmp_path, stopping)
    shown.clear()
    again = prepared.load("tiny", 8, tmp_path, lambda items: shown.extend(items) or items)
    assert 0 < len(shown) < 16
    for one, other in ((whole.train, again.train), (whole.test, again.test)):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_grey_and_of_odd_sizes(tmp_path):
    images = [Image.new("L", (width, height), 200) for width, height in ((1, 1), (5, 40), (40, 5), (33, 32))]
    splits = {"train": [(image, 0) for image in images], "test": [(images[0], 1)]}
    write(tmp_path, splits, tfds.features.Image(shape=(None, None, 1)))
    dataset = prepared.load("tiny", 16, tmp_path)
    assert dataset.train["image"].shape == (4, 16, 16, 3)
    assert (dataset.train["image"] == 200).all()


def test_jpegs_as_pillow_decodes_them(tmp_path):
    """OpenCV, if TFDS found it, would give other pixels."""
    path = tmp_path / "a.jpg"
    pictures(1, (32, 32))[0][0].save(path)
    image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
    write(tmp_path, {"train": [(str(path), 0)], "test": [(str(path), 1)]}, image)
    np.testing.assert_array_equal(prepared.load("tiny", 32, tmp_path).train["image"][0], np.asarray(Image.open(path)))


@pytest.mark.parametrize(
    ("splits", "tested"), [(("train", "validation", "test"), "test"), (("train", "validation"), "validation")]
)
def test_which_split_is_tested_on(tmp_path, splits, tested, notes):
    write(tmp_path, {split: pictures(len(split)) for split in splits})
    dataset = prepared.load("tiny", 8, tmp_path)
    assert [len(part["label"]) for part in (dataset.train, dataset.test)] == [len("train"), len(tested)]
    assert [note.split()[0] for note in notes] == ["decoding"]


def test_held_out(tmp_path, notes):
    examples = [(image, int(number >= 40)) for number, (image, _) in enumerate(pictures(45, (8, 8)))]
    write(tmp_path, {"train": examples})
    first, second = (prepared.load("tiny", 8, tmp_path) for _ in range(2))
    assert (
        notes[1]
        == notes[2]
        == "tiny has no test split: 5 of 45 images, a tenth of each class but at least one, are held out"
    )
    assert np.bincount(first.train["label"]).tolist() == [36, 4]
    assert np.bincount(first.test["label"]).tolist() == [4, 1]
    parts = [first.train["image"], first.test["image"]]
    assert sorted(image.tobytes() for part in parts for image in part) == sorted(image.tobytes() for image, _ in examples)
    np.testing.assert_array_equal(first.test["image"], second.test["image"])
    assert all(part.base is not None and isinstance(part.base.base, np.memmap) for part in parts), "in place, not copied"
    order = [[image.tobytes() for image, _ in examples].index(image.tobytes()) for image in first.train["image"]]
    assert order == sorted(order)


def test_without_labels(tmp_path):
    write(tmp_path, {"train": pictures(20)}, label=None)
    dataset = prepared.load("tiny", 8, tmp_path)
    assert dataset.classes == ()
    assert dataset.train["label"].tolist() == [-1] * 18
    assert dataset.test["label"].tolist() == [-1] * 2


def test_newest_version(tmp_path):
    for version, count in (("1.0.9", 2), ("1.0.10", 3), ("incomplete.ABCDEF_2.0.0", 0)):
        if count:
            write(tmp_path, {"train": pictures(count), "test": pictures(1)}, version=version)
        else:  # what a preparation that was killed at the last moment leaves
            shutil.copytree(tmp_path / "tiny" / "1.0.9", tmp_path / "tiny" / version)
    assert len(prepared.load("tiny", 8, tmp_path).train["label"]) == 3


def test_another_state_of_a_set_takes_the_place_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path, {"train": pictures(2), "test": pictures(1)})
    there = []
    for moment in (1, 2):
        os.utime(tmp_path / "tiny" / "1.0.0" / "features.json", (moment, moment))
        prepared.load("tiny", 8, tmp_path)
        there.append({path for path in cache("decoded").iterdir() if path.is_dir()})
    assert len(there[0]) == len(there[1]) == 1 and there[0] != there[1]


@pytest.mark.parametrize(
    ("image_size", "config"),
    [(8, "160px-v2"), (160, "160px-v2"), (161, "320px-v2"), (320, "320px-v2"), (321, "full-size-v2"), (900, "full-size-v2")],
)
def test_configs_of_imagenette(tmp_path, image_size, config):
    assert catalogue.qualified("imagenette", image_size) == f"imagenette/{config}"
    with pytest.raises(DataError, match=f"^imagenette/{config} is not prepared"):
        prepared.load("imagenette", image_size, tmp_path)
    write(tmp_path, {"train": pictures(2), "validation": pictures(1)}, name="imagenette", config=config)
    assert prepared.load("imagenette", image_size, tmp_path).train["image"].shape == (2, image_size, image_size, 3)
    assert len(prepared.load(f"imagenette/{config}", 8, tmp_path).train["label"]) == 2


def test_a_config_of_a_set_whose_configs_cannot_be_looked_up(tmp_path, monkeypatch):
    def missing(_):
        raise ImportError("no module named pandas")

    monkeypatch.setattr(catalogue.tfds, "builder_cls", missing)
    with pytest.raises(DataError, match="^mnist/small is not prepared"):
        prepared.load("mnist/small", 8, tmp_path)


def test_default_config(tmp_path):
    write(tmp_path, {"train": pictures(2), "test": pictures(1)}, name="emnist", config="byclass")
    assert prepared.load("emnist", 8, tmp_path).name == "emnist"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "cifra10",
            "'cifra10' is neither a folder nor a data set that TFDS knows; nearest: cifar10, cifar100, cifar10_n; name",
        ),
        ("CIFAR10", "nearest: cifar10, "),
        ("digit", "nearest: digits"),
        ("qqqq", "'qqqq' is neither a folder nor a data set that TFDS knows; name one, or an existing folder"),
        ("", "'' is neither"),
        ("a b", "'a b' is neither"),
        ("cifar10/..", "'cifar10/..' is neither"),
        ("some/folder/deep", "'some/folder/deep' is neither"),
        ("imagenette/160", "'160' is no config of imagenette; nearest: 160px"),
        ("mnist/small", "'small' is no config of mnist, it has none"),
    ],
)
def test_unknown_names(tmp_path, no_network, name, expected):
    with pytest.raises(UsageError) as caught:
        prepared.load(name, 32, tmp_path)
    assert expected in str(caught.value)


def test_not_prepared(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    free = "(dataset=digits needs nothing)"

    def line(name, image_size=32, data_dir=None):
        with pytest.raises(DataError) as caught:
            prepared.load(name, image_size, data_dir)
        return str(caught.value)

    here = f"is not prepared in {tmp_path}; run:"
    assert line("cifar10") == f"cifar10 {here} python -m experiments.prepare cifar10 (downloads 170 MB; {free[1:]}"
    assert (
        line("imagenette")
        == f"imagenette/160px-v2 {here} python -m experiments.prepare imagenette (downloads 99 MB; {free[1:]}"
    )
    ours = "python -m experiments.prepare imagenette --image_size=320"
    assert line("imagenette", 224) == f"imagenette/320px-v2 {here} {ours} (downloads 342 MB; {free[1:]}"
    theirs = "uv run --no-project -p3.12 --with=tensorflow-datasets,tensorflow,importlib-resources"
    script = "import tensorflow_datasets as t;t.builder('mnist',file_format='array_record').download_and_prepare()"
    assert line("mnist") == f'mnist {here} {theirs} python -c "{script}"'
    other = tmp_path / "it's elsewhere"
    quoted = f"{tmp_path}/it'\"'\"'s elsewhere"
    there = f"is not prepared in {other}, which does not exist; run:"
    ours = f"python -m experiments.prepare cifar10 --data_dir='{quoted}'"
    assert line("cifar10", data_dir=other) == f"cifar10 {there} {ours} (downloads 170 MB; {free[1:]}"
    assert line("mnist", data_dir=other).startswith(f"mnist is not prepared; run: TFDS_DATA_DIR='{quoted}' {theirs}")
    write(tmp_path, {"train": pictures(1)}, name="imagenette", config="full-size-v2")
    assert f"prepared in {tmp_path} (imagenette/full-size-v2 is); run:" in line("imagenette")


def test_a_set_that_only_preparing_imports(tmp_path, no_network):
    """TFDS's class of qm9 takes pandas."""
    with pytest.raises(DataError, match="^qm9 is not prepared"):
        prepared.load("qm9", 32, tmp_path)


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


SHARD = "tiny-train.array_record-00000-of-00001"
DAMAGE = {
    "missing shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
    "a folder as shard": (lambda folder: ((folder / SHARD).unlink(), (folder / SHARD).mkdir()), f"{SHARD} is missing"),
    "shard cut": (lambda folder: os.truncate(folder / SHARD, 70_000), f"{SHARD} is damaged at record 0 of train"),
    "empty shard": (lambda folder: os.truncate(folder / SHARD, 0), f"{SHARD} is damaged at record 0 of train"),
    "flipped byte": (lambda folder: flip(folder / SHARD, 200), f"{SHARD} is damaged at record"),
    "fewer records": (
        lambda folder: rewrite(folder / "dataset_info.json", '"12"', '"13"'),
        f"{SHARD} is damaged at record 12",
    ),
    "description cut": (lambda folder: os.truncate(folder / "dataset_info.json", 100), "no readable dataset_info.json"),
    "empty description": (lambda folder: os.truncate(folder / "dataset_info.json", 0), "no readable dataset_info.json"),
    "no description": (lambda folder: (folder / "dataset_info.json").unlink(), "no readable dataset_info.json"),
    "no features": (lambda folder: (folder / "features.json").unlink(), "no readable dataset_info.json and features.json"),
    "features of nothing": (
        lambda folder: (folder / "features.json").write_text("{}"),
        "no readable dataset_info.json and feat",
    ),
    "too few names": (
        lambda folder: (folder / "label.labels.txt").write_text("cat\n"),
        "label.labels.txt has 1 names for 2 classes",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_D3_damage(tmp_path, tiny, kind):
    damage, expected = DAMAGE[kind]
    damage(tiny)
    with pytest.raises(DataError) as caught:
        prepared.load("tiny", 8, tmp_path)
    assert expected in str(caught.value)
    assert f"remove {tiny} and prepare it again" in str(caught.value)


def test_D2_a_set_of_tfrecords_is_refused(tmp_path, tiny):
    rewrite(tiny / "dataset_info.json", "array_record", "tfrecord")
    remedy = f"is prepared as tfrecord, which takes TensorFlow to read; remove {tiny} and prepare it again as array_record"
    with pytest.raises(DataError, match=re.escape(remedy)):
        prepared.load("tiny", 8, tmp_path)


def test_D3_damage_is_found_in_its_shard(tmp_path):
    folder = Path(write(tmp_path, {"train": pictures(9), "test": pictures(3)}, shards=3))
    shard = folder / "tiny-train.array_record-00001-of-00003"
    os.truncate(shard, 0)
    with pytest.raises(DataError, match=f"^{shard} is damaged at record 3 of train"):
        prepared.load("tiny", 8, tmp_path)


def test_image_that_is_none(tmp_path, small):
    folder = write(tmp_path, {"train": [*pictures(1), (b"no image", 0)], "test": pictures(1)})
    with pytest.raises(DataError, match=f"^{folder}/{SHARD} is damaged at record 1 of train"):
        prepared.load("tiny", 8, tmp_path)


@pytest.mark.parametrize("label", [2, -1])
def test_D5_label_out_of_range(tmp_path, label):
    examples = pictures(3)
    examples[2] = (examples[2][0], label)
    folder = Path(write(tmp_path, {"train": pictures(2), "test": examples}, label=("cat", "dog", "cow")))
    if label == 2:
        rewrite(folder / "features.json", '"3"', '"2"')
        rewrite(folder / "label.labels.txt", "cow\n", "")
    expected = f"record 2 of test in {folder} has label {label}, which is none of {2 if label == 2 else 3} classes"
    with pytest.raises(DataError, match=f"^{expected}"):
        prepared.load("tiny", 8, tmp_path)


@pytest.mark.parametrize(
    ("image", "label", "example", "expected"),
    [
        (
            tfds.features.Text(),
            CLASSES,
            ("words", 0),
            "has no feature image of images, only image (Text), label (ClassLabel)",
        ),
        (None, CLASSES, (0,), "has no feature image of images, only label (ClassLabel)"),
        (IMAGE, tfds.features.Text(), (pictures(1)[0][0], "cat"), "is no class (image (Image), label (Text))"),
        (tfds.features.Image(dtype=np.uint16), CLASSES, (pictures(1)[0][0], 0), "are uint16, not uint8"),
    ],
)
def test_sets_of_something_else(tmp_path, image, label, example, expected):
    write(tmp_path, {"train": [example], "test": [example]}, image, label)
    with pytest.raises(DataError) as caught:
        prepared.load("tiny", 8, tmp_path)
    assert expected in str(caught.value)


def test_no_split_to_train_on(tmp_path):
    write(tmp_path, {"test": pictures(1)})
    with pytest.raises(DataError, match="has no split train, only test"):
        prepared.load("tiny", 8, tmp_path)


@pytest.mark.skipif(not os.environ.get("TFDS_DATA_DIR"), reason="TFDS_DATA_DIR names no folder with CIFAR-10")
def test_real_cifar10():
    dataset = prepared.load("cifar10", 32)
    assert dataset.classes[:2] == ("airplane", "automobile")
    for arrays, count in ((dataset.train, 50_000), (dataset.test, 10_000)):
        assert arrays["image"].shape == (count, 32, 32, 3)
        assert np.bincount(arrays["label"]).tolist() == [count // 10] * 10
        assert 0.4 < arrays["image"].mean() / 255 < 0.5
