"""Folders of photographs: layouts, held-out shares, every kind of file, and what is told of those left out."""

import dataclasses
import errno
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rotjax
from rotjax.data import photographs, pixels, sources, tasks
from rotjax.data.batches import train_batches
from rotjax.data.photographs import load
from rotjax.errors import DataError, ReadError, UsageError

SIZE = 8


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "photos"
    path.mkdir()
    return path


def paint(path, color=0, **options):
    """An image of one colour, a shade of grey unless three are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIZE, SIZE), color if isinstance(color, tuple) else (color,) * 3).save(path, **options)


def paint_classes(folder, count=10, classes=("cats", "dogs")):
    for label, name in enumerate(classes):
        for number in range(count):
            paint(folder / name / f"{number:02d}.png", 100 * label + number)


def shades(part):
    return part["image"][:, 0, 0, 0].tolist()


def refused(folder, message):
    with pytest.raises(DataError, match=message) as caught:
        load(folder, SIZE)
    assert "\n" not in str(caught.value)


# Layouts


def test_a_folder_per_class(folder, notes):
    paint_classes(folder, 20)
    paint(folder / "cats" / "deeper" / "still" / "Z.JPG", 99)
    data = load(folder, SIZE)
    assert data.name == "photos" and data.classes == ("cats", "dogs")
    assert data.train["label"].tolist() == [0] * 19 + [1] * 18 and data.test["label"].tolist() == [0, 0, 1, 1]
    assert sorted(shades(data.train) + shades(data.test)) == [*range(20), 99, *range(100, 120)]
    assert shades(data.train) == sorted(shades(data.train)) and shades(data.test) == sorted(shades(data.test))
    assert notes[-1] == (
        "37 images to train on, 4 to test on, a tenth of each class, but at least one, held out by file name whatever the "
        "seed; 2 classes (cats, dogs)"
    )
    batch = train_batches(data.train, tasks.random_turn, 16, 3, seed=0)[2]
    assert batch and batch["image"].shape == (16, SIZE, SIZE, 3)


def test_a_folder_by_its_path_and_sizes_out_of_range(folder):
    paint_classes(folder, 3)
    one, other = (sources.load(name, image_size=SIZE) for name in (folder, str(folder)))
    assert one.facts() == other.facts()
    for name in ("digits", folder):
        with pytest.raises(UsageError, match="^image_size=0 is too small; it is at least 1$"):
            sources.load(name, image_size=0)


def test_images_are_known_by_their_files(folder):
    paint_classes(folder, 20)
    for name in ("cats/00.png", "dogs/19.png", "dogs/07.png"):
        (folder / name).write_text("damaged")
    data = load(folder, SIZE)
    for part in (data, sources.validated(data, 0.5)):
        assert len(part.files) == len(part.test["label"]) >= 2
        for names, arrays in ((part.files, part.test), (part.train_files, part.train)):
            for name, image in zip(names, arrays["image"], strict=True):
                np.testing.assert_array_equal(image, np.asarray(Image.open(folder / name)))
    fewer = dataclasses.replace(data, train={name: array[:5] for name, array in data.train.items()})
    assert not fewer.train_files and fewer.files == data.files


def test_the_held_out_share_never_changes(folder):
    """Pinned: another choice would let images that older runs trained on into the test set."""
    paint_classes(folder, 30, ("cats",))
    test = shades(load(folder, SIZE).test)
    assert test == [16, 18, 19]
    assert shades(load(folder, 2 * SIZE).test) == test
    paint(folder / "dogs" / "a.png", 200)
    paint(folder / "dogs" / "b.png", 201)
    assert shades(load(folder, SIZE).test)[:3] == test


@pytest.mark.parametrize("count, held", [(2, 1), (3, 1), (14, 1), (15, 2), (25, 3)])
def test_a_tenth_of_each_class_but_one_at_least(folder, count, held):
    paint_classes(folder, count)
    data = load(folder, SIZE)
    assert np.bincount(data.test["label"]).tolist() == [held] * 2
    assert np.bincount(data.train["label"]).tolist() == [count - held] * 2


def test_a_class_of_one_image_is_trained_on(folder, notes):
    paint_classes(folder)
    paint(folder / "rare" / "one.png", 250)
    data = load(folder, SIZE)
    assert 250 in shades(data.train) and 2 not in data.test["label"]
    assert "no readable image to test on of class rare" in notes


@pytest.mark.parametrize("where", ["run", "runs/first", "runs/a/b", "cats/run"])
@pytest.mark.parametrize("layout", [("",), ("cats", "dogs"), ("train/cats", "train/dogs")])
def test_the_figures_of_runs_are_no_photographs(folder, where, layout, notes):
    paint_classes(folder, 10, layout)
    before = load(folder, SIZE)
    run = folder / where
    (run / "checkpoints" / "4").mkdir(parents=True)
    paint(run / "predictions.png", 255)
    for name in ("recipe.json", "data.json"):
        (run / name).write_text("{}")
    if run.parent != folder:
        (run.parent / "begun").mkdir()
        (run.parent / "run.log").touch()
    after = load(folder, SIZE, pytest.fail)
    assert after.classes == before.classes and after.facts() == before.facts()
    assert photographs.listed(folder) == sorted(f"{part}/{n:02d}.png".lstrip("/") for part in layout for n in range(10))
    told = "left alone beside: " if "train" in layout[0] else "runs: "
    assert any(told in note and where.split("/")[0] in note for note in notes)


def test_a_class_whose_images_lie_beside_a_recipe_is_no_run(folder):
    paint_classes(folder)
    (folder / "cats" / "recipe.json").write_text("{}")
    assert load(folder, SIZE).classes == ("cats", "dogs")


def test_images_without_classes(folder, notes):
    for number in range(20):
        paint(folder / f"{number:02d}.png", number)
    (folder / "albums").mkdir()
    data = load(folder, SIZE)
    assert data.classes == () and len(shades(data.test)) == 2
    assert set(data.train["label"]) == set(data.test["label"]) == {-1}
    assert notes[-1] == "18 images to train on, 2 to test on, a tenth held out by file name whatever the seed; no classes"


def test_images_without_classes_that_are_to_have_some_are_refused_before_they_are_decoded(folder):
    for number in range(20):
        paint(folder / f"{number:02d}.png", number)
    with pytest.raises(DataError, match="photos has no classes; put its images into one folder per class"):
        load(folder, SIZE, pytest.fail, labelled=True)


@pytest.mark.parametrize(
    "train, test",
    [("train", name) for name in ("test", "val", "validation", "valid")] + [("Train", "TEST"), ("training", "testing")],
)
@pytest.mark.parametrize("classes", [("cats", "dogs"), ("",)])
def test_folders_of_the_split(folder, train, test, classes, notes):
    paint_classes(folder / train, 3, classes)
    paint_classes(folder / test, 1, classes)
    data = load(folder, SIZE)
    assert data.classes == (classes if all(classes) else ())
    assert (len(shades(data.train)), len(shades(data.test))) == (3 * len(classes), len(classes))
    assert "held out" not in notes[-1]


def test_test_goes_before_validation_before_val(folder, notes):
    for shade, name in enumerate(("train", "val", "validation", "test")):
        paint(folder / name / "a.png", shade)
    assert shades(load(folder, SIZE).test) == [3]
    assert notes[0] == "training on train, testing on test; left alone beside: val, validation"
    for name, shade in (("test", 2), ("validation", 1)):
        (folder / name / "a.png").rename(folder / f"{name}.png")
        (folder / name).rmdir()
        assert shades(load(folder, SIZE).test) == [shade]


def test_train_alone_is_split_and_train_among_others_is_a_class(folder, notes):
    paint_classes(folder / "train")
    paint(folder / "loose.png")
    assert load(folder, SIZE).classes == ("cats", "dogs")
    assert notes[0] == "training on train; left alone beside: loose.png" and "held out" in notes[-1]
    paint(folder / "bus" / "a.png")
    assert load(folder, SIZE, labelled=True).classes == ("bus", "train")


def test_images_beside_class_folders(folder, notes):
    paint_classes(folder)
    for number in range(7):
        paint(folder / f"loose{number}.png", 255)
    data = load(folder, SIZE, labelled=True)
    assert 255 not in shades(data.train) + shades(data.test) and data.classes == ("cats", "dogs")
    assert f"7 images beside the class folders of {folder} are left out: loose0.png, loose1.png" in notes[0]
    assert notes[0].endswith("loose4.png and 2 more")
    every = load(folder, SIZE)
    assert [shades(part).count(255) for part in (every.train, every.test)] == [6, 1] and every.classes == ()
    for labelled in (True, False):  # neither has replaced the other's decoded images
        load(folder, SIZE, pytest.fail, labelled=labelled)
    assert set(shades(every.test)) == {*shades(data.test), 255}, "what is held out of the classes is that for both"


def test_images_beside_fewer_in_class_folders_are_taken_without_classes(folder, notes):
    paint_classes(folder, 2)
    for number in range(20):
        paint(folder / f"loose{number}.png", 255)
    data = load(folder, SIZE)
    assert data.classes == () and len(data.train["label"]) + len(data.test["label"]) == 24
    said = f"{folder} has 20 images beside its folders and 4 in them (to tell the folders apart move the others elsewhere)"
    assert notes[0] == f"{said}: its images are taken without classes"


def test_links(folder, tmp_path):
    paint_classes(tmp_path / "elsewhere")
    (folder / "cats").symlink_to(tmp_path / "elsewhere" / "cats")
    paint(folder / "dogs" / "a.png", 100)
    (folder / "dogs" / "link.png").symlink_to(tmp_path / "elsewhere" / "dogs" / "05.png")
    (folder / "dogs" / "itself").symlink_to(folder / "dogs")
    (folder / "dogs" / "up").symlink_to(folder)
    data = load(folder, SIZE)
    assert sorted(shades(data.train) + shades(data.test)) == [*range(10), 100, 105]


def test_names_that_are_no_text(folder, notes):
    strange = os.fsdecode(b"caf\xe9\n")
    try:
        paint_classes(folder, 3, ("plain", strange))
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    (folder / strange / f"{strange}.png").write_bytes(b"")
    data = load(folder, SIZE)
    assert data.classes == ("caf\\udce9\\n", "plain")
    assert len(shades(data.train) + shades(data.test)) == 6
    assert not any("\n" in note for note in notes) and json.dumps([notes, data.classes], ensure_ascii=False).encode()


# What is refused


def test_refused(folder, tmp_path):
    refused(folder, "photos holds no images")
    (folder / "notes.txt").write_text("x")
    refused(folder, r"photos holds no images \(1 \.txt\)")
    paint(folder / "a.png")
    too_few = "too few readable images, 1 to train on and 0 to test on"
    refused(folder, too_few)
    with pytest.raises(DataError, match=too_few):
        load(folder, SIZE, batch_size=64)
    refused(tmp_path / "absent", "cannot be read")
    (folder / "a.png").write_bytes(b"")
    (folder / "b.jpg").write_text("x")
    refused(folder, r"none of the 2 images in .* can be read: a\.png \(empty\), b\.jpg \(not an image that Pillow opens\)")
    (folder / "a.png").rename(folder / "a.heic")
    (folder / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    refused(folder, r"a\.heic \(not an image that Pillow opens: convert it to JPEG\)")


def test_a_split_without_train_is_refused(folder):
    paint_classes(folder / "test", 1)
    refused(folder, "has test but no folder train")


# What has no classes after all is enough for rotation, and the log says why


EMPTY = "add some, or remove its folder"


def unclassed(folder, notes, message, remedy):
    """Loads without classes as many images as with them; classification refuses them, and says what to do."""
    notes.clear()
    data = load(folder, SIZE)
    assert data.classes == () and {*data.train["label"], *data.test["label"]} == {-1}
    assert f"{message}: its images are taken without classes" in "\n".join(notes)
    recipe = rotjax.Classification(dataset=str(folder), stem="cifar", image_size=SIZE, batch_size=2)
    with pytest.raises(DataError, match=f"{message}; {remedy}$"):
        rotjax.plan(recipe)
    return data


def test_a_class_without_images(folder, notes):
    paint_classes(folder)
    before = shades(load(folder, SIZE).test)
    (folder / "birds").mkdir()
    data = unclassed(folder, notes, "photos has no readable image to train on of class birds", EMPTY)
    assert shades(data.test) == before, "what is held out stays so once the folder is put right"
    (folder / "birds" / "a.png").write_bytes(b"")
    unclassed(folder, notes, "photos has no readable image to train on of class birds", EMPTY)


def test_other_classes_in_test_or_none(folder, notes):
    paint_classes(folder / "train")
    paint_classes(folder / "test", 1, ("cats", "cows"))
    unclassed(folder, notes, "train and test do not both have the classes cows, dogs", "fill both")
    shutil.rmtree(folder / "test")
    paint(folder / "test" / "a.png")
    data = unclassed(folder, notes, "train and test do not both have the classes cats, dogs", "fill both")
    assert len(data.test["label"]) == 1


def test_a_class_unreadable_in_test(folder, notes):
    paint_classes(folder / "train")
    paint_classes(folder / "test", 1)
    (folder / "test" / "dogs" / "00.png").write_bytes(b"")
    unclassed(folder, notes, "photos has no readable image to test on of class dogs", EMPTY)


# Files


def png(width, height):
    """The head of a PNG of any size, and no pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""))
    parts = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_unreadable_files_are_counted_and_named(folder, notes):
    paint_classes(folder)
    cats = folder / "cats"
    (cats / "a.png").write_bytes(b"")
    (cats / "b.jpg").write_text("no image")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)).save(cats / "c.png")
    os.truncate(cats / "c.png", 20_000)
    (cats / "d.jpg").symlink_to(cats / "nowhere.jpg")
    os.mkfifo(cats / "e.jpg")
    (cats / "f.png").write_bytes(png(20_000, 9_000))
    (cats / "g.png").write_bytes(png(30_000, 30_000))
    (cats / "h.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (cats / "i.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    names = []
    for _ in range(2):  # the second time from the cache
        notes.clear()
        data = load(folder, SIZE, progress=lambda files: names.append(files) or files)
        assert sorted(shades(data.train) + shades(data.test)) == [*range(10), *range(100, 110)]
        (line,) = (note for note in notes if "cannot be read" in note)
        reasons = "cats/a.png (empty), cats/b.jpg (not an image that Pillow opens), cats/c.png ("
        assert line.startswith(f"9 of 29 images cannot be read and are left out: {reasons}")
        few, _, path = line.partition(" and 4 more; all are named in ")
        assert few.endswith("cats/d.jpg (not a file), cats/e.jpg (not a file)")
        named = json.loads(Path(path).read_text())["dropped"].values()
        assert sorted(name.split(" ")[0] for name in named) == [
            f"cats/{file}" for file in sorted(p.name for p in cats.glob("[a-z]*"))
        ]
    assert len(names) == 1
    for name in "abcde":
        (cats / next(cats.glob(f"{name}.*"))).unlink()
    notes.clear()
    load(folder, SIZE)
    assert "20 of them are as they were" in notes[1]
    assert "4 of 24" in notes[2] and "cats/f.png (more than 179 megapixels: scale it down), cats/g.png" in notes[2]


def test_files_without_permission(folder, notes):
    paint_classes(folder)
    (folder / "cats" / "00.png").chmod(0)
    if os.access(folder / "cats" / "00.png", os.R_OK):
        pytest.skip("this user may read everything")
    load(folder, SIZE)
    assert "cats/00.png (Permission denied)" in notes[1]
    (folder / "cats" / "00.png").chmod(0o600)
    assert 0 in shades(load(folder, SIZE).train) + shades(load(folder, SIZE).test)
    (folder / "cats").chmod(0)
    refused(folder, "cannot be read")
    (folder / "cats").chmod(0o700)


def test_other_files_are_passed_over(folder, notes):
    paint_classes(folder)
    for name in (".DS_Store", "._00.png", "notes.txt", "clip.mov", "clip2.mov", "LICENSE"):
        (folder / "cats" / name).write_text("x")
    paint(folder / ".trash" / "a.png")
    data = load(folder, SIZE)
    assert len(shades(data.train) + shades(data.test)) == 20 and data.classes == ("cats", "dogs")
    assert notes[0].startswith(f"left out of {folder}, no images by their suffix: 2 .mov, ")
    assert "1 .txt" in notes[0] and "1 without" in notes[0]


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are decoded."""
    names, decode = [], photographs._pixels
    monkeypatch.setattr(photographs, "_pixels", lambda folder, size, name: names.append(name) or decode(folder, size, name))
    return names


def test_decoded_again_only_where_a_file_changed(folder, read):
    paint_classes(folder)

    def again():
        read.clear()
        data = load(folder, SIZE)
        labels = [data.classes[label] for part in (data.train, data.test) for label in part["label"]]
        return dict(zip(shades(data.train) + shades(data.test), labels, strict=True)), sorted(read)

    first, decoded = again()
    assert first == {**dict.fromkeys(range(10), "cats"), **dict.fromkeys(range(100, 110), "dogs")} and len(decoded) == 20
    assert again() == (first, [])
    paint(folder / "cats" / "03.png", 77)
    del first[3]
    assert again() == (first | {77: "cats"}, ["cats/03.png"])
    (folder / "cats" / "03.png").rename(folder / "dogs" / "03b.png")
    assert again() == (first | {77: "dogs"}, ["dogs/03b.png"])
    (folder / "ants").mkdir()  # a class before the others, whose labels are others now
    for shade in (200, 201):
        paint(folder / "ants" / f"{shade}.png", shade)
    assert again() == (first | {77: "dogs", 200: "ants", 201: "ants"}, ["ants/200.png", "ants/201.png"])
    assert again()[1] == []


def test_a_file_that_changes_and_keeps_its_size_and_its_date_is_decoded_again(folder, read):
    """As a photograph that a program turns by its EXIF alone."""
    paint_classes(folder)
    load(folder, SIZE)
    read.clear()
    path = folder / "cats" / "03.png"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    load(folder, SIZE)
    assert read == ["cats/03.png"]


def test_R3_stopped_while_decoding_it_goes_on_to_the_same_arrays(folder, tmp_path, monkeypatch, read):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)  # threads are up to 9 ahead
    paint_classes(folder, 20)
    (folder / "cats/03.png").write_bytes(b"broken")
    whole, asked = load(folder, SIZE), []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))

    def stopping(names):
        for number, name in enumerate(names):
            if number == 30:
                raise KeyboardInterrupt
            yield name

    with pytest.raises(KeyboardInterrupt):
        load(folder, SIZE, progress=stopping)
    again = load(folder, SIZE, progress=lambda names: asked.extend(names) or names)
    assert 10 <= len(asked) < 40
    assert len(read) == 40 + 30 + len(asked)
    for one, other in ((whole.train, again.train), (whole.test, again.test)):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_R3_stopped_while_decoding_it_goes_on_where_the_folder_has_grown_since(folder, monkeypatch, read):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    paint_classes(folder, 20)

    def stopping(names):
        yield from names[:30]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(folder, SIZE, progress=stopping)
    paint(folder / "cats" / "new.png", 77)
    read.clear()
    data = load(folder, SIZE)
    assert len(data.train["label"]) + len(data.test["label"]) == 41 and 11 <= len(read) <= 20 and "cats/new.png" in read


PASSING = [OSError(errno.EIO, "Input/output error"), MemoryError(), OSError("out of memory when reading image file")]


@pytest.mark.parametrize("error", PASSING)
def test_a_file_that_cannot_be_read_at_present_is_not_left_out_and_the_others_are_not_read_again(folder, monkeypatch, error):
    paint_classes(folder, 20)
    square, asked = photographs.square, []

    def failing(image, size):
        if image.filename.endswith("dogs/18.png"):
            raise error
        return square(image, size)

    monkeypatch.setattr(photographs, "square", failing)
    with pytest.raises(ReadError, match=r"dogs/18.png cannot be read at present .*run the same command again"):
        load(folder, SIZE)
    monkeypatch.setattr(photographs, "square", square)
    data = load(folder, SIZE, progress=lambda names: asked.extend(names) or names)
    assert len(shades(data.train) + shades(data.test)) == 40 and len(asked) < 40


def test_a_folder_that_goes_away_while_it_is_decoded_is_read_when_it_is_back(folder, tmp_path):
    """As a disk that is not mounted for a while: none of its images may be remembered as missing."""
    paint_classes(folder)

    def gone(names):
        (folder / "dogs").rename(tmp_path / "elsewhere")
        yield from names

    with pytest.raises(ReadError, match=r"dogs/\d\d.png cannot be read at present \(No such file"):
        load(folder, SIZE, progress=gone)
    (tmp_path / "elsewhere").rename(folder / "dogs")
    assert load(folder, SIZE).classes == ("cats", "dogs")


def test_files_in_a_folder_that_may_be_listed_and_not_searched_are_named_with_the_reason(folder, monkeypatch, notes):
    paint_classes(folder)
    known = Path.stat

    def refusing(path, **options):
        if path.name == "03.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        return known(path, **options)

    monkeypatch.setattr(Path, "stat", refusing)
    load(folder, SIZE)
    assert "2 of 20 images cannot be read and are left out: cats/03.png (Permission denied)" in notes[1]


def test_a_file_whose_state_is_not_known_at_present_does_not_cost_the_cache(folder, monkeypatch):
    paint_classes(folder)
    load(folder, SIZE)
    known = Path.stat

    def stale(path, **options):
        if path.name == "03.png":
            raise OSError(errno.ESTALE, "Stale file handle")
        return known(path, **options)

    with monkeypatch.context() as patched, pytest.raises(ReadError, match=r"03.png cannot be read at present \(Stale"):
        patched.setattr(Path, "stat", stale)
        load(folder, SIZE)
    load(folder, SIZE, progress=lambda names: pytest.fail("decoded again"))


def test_what_a_folder_gave_before_it_changed_does_not_stay_in_the_cache(folder, tmp_path):
    paint_classes(folder)
    before = load(folder, SIZE)
    load(folder, 2 * SIZE)
    paint(folder / "cats" / "10.png", 77)
    after = load(folder, SIZE)
    assert sorted(shades(before.train) + shades(before.test)) == [*range(10), *range(100, 110)], "a run that maps it goes on"
    assert len(after.train["label"]) + len(after.test["label"]) == 21
    assert len(list((tmp_path / "cache/rotjax/decoded").iterdir())) == 2, "that of the other size is of the same photographs"


def test_the_number_of_threads_changes_nothing(folder, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for number in range(40):
        image = Image.fromarray(rng.integers(0, 256, (rng.integers(9, 40), rng.integers(9, 40), 3), np.uint8))
        image.save(folder / f"{number}.jpg")
    images = []
    for threads in (1, 7):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(threads)))
        data = load(folder, SIZE)
        images.append(np.concatenate([data.train["image"], data.test["image"]]))
    np.testing.assert_array_equal(*images)


# Pixels


def only(folder, size=SIZE):
    """The single training image that is left of two copies."""
    (file,) = folder.iterdir()
    (folder / f"copy{file.suffix}").write_bytes(file.read_bytes())
    return load(folder, size).train["image"][0]


def half_transparent(mode, color):
    """`color`, but with its left half transparent."""
    image = Image.new("RGBA", (SIZE, SIZE), color)
    image.paste((0, 0, 0, 0), (0, 0, SIZE // 2, SIZE))
    return image.convert(mode)


@pytest.mark.parametrize(
    "image, suffix, left, right",
    [
        (Image.new("1", (SIZE, SIZE), 1), ".png", (255,) * 3, (255,) * 3),
        (Image.new("L", (SIZE, SIZE), 90), ".png", (90,) * 3, (90,) * 3),
        (Image.new("RGB", (SIZE, SIZE), (1, 2, 3)), ".webp", (1, 2, 3), (1, 2, 3)),
        (Image.new("RGB", (SIZE, SIZE), (1, 2, 3)).convert("P"), ".bmp", (0, 0, 0), (0, 0, 0)),
        (Image.new("RGB", (SIZE, SIZE), (255, 0, 0)).quantize(2), ".gif", (255, 0, 0), (255, 0, 0)),
        (Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), ".tif", (255, 0, 0), (255, 0, 0)),
        (Image.new("YCbCr", (SIZE, SIZE), (90, 128, 128)), ".tiff", (90,) * 3, (90,) * 3),
        (half_transparent("RGBA", (1, 2, 3, 255)), ".png", (255,) * 3, (1, 2, 3)),
        (half_transparent("RGBA", (0, 0, 0, 51)), ".png", (255,) * 3, (204,) * 3),
        (half_transparent("LA", (90, 90, 90, 255)), ".png", (255,) * 3, (90,) * 3),
        (half_transparent("RGBA", (255, 0, 0, 255)).quantize(4), ".png", (255,) * 3, (255, 0, 0)),
        (Image.fromarray(np.full((SIZE, SIZE), 0x5AFF, np.uint16)), ".png", (0x5A,) * 3, (0x5A,) * 3),
        (Image.fromarray(np.full((SIZE, SIZE), 0x5AFF, np.uint16)), ".tif", (0x5A,) * 3, (0x5A,) * 3),
        (Image.fromarray(np.full((SIZE, SIZE), 0x5AFF, np.int32)), ".pgm", (0x5A,) * 3, (0x5A,) * 3),
        (Image.fromarray(np.full((SIZE, SIZE), 99_999, np.int32)), ".tif", (255,) * 3, (255,) * 3),
        (
            Image.fromarray(np.array([-1, 3], np.float32).repeat(SIZE // 2)[None].repeat(SIZE, 0)),
            ".tif",
            (0,) * 3,
            (255,) * 3,
        ),
        (Image.fromarray(np.full((SIZE, SIZE), np.nan, np.float32)), ".tif", (0,) * 3, (0,) * 3),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value).replace(" ", ""),
)
def test_every_kind_of_pixel(folder, image, suffix, left, right):
    image.save(folder / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    with Image.open(folder / f"a{suffix}") as stored:
        try:
            stored.load()
        except OSError:
            pytest.skip("this Pillow cannot read what it wrote: 12 does not read YCbCr TIFF")
        assert stored.mode != "RGB" or image.mode in ("RGB", "P")
    pixels = only(folder)
    assert pixels[0, 0].tolist() == list(left) and pixels[0, -1].tolist() == list(right)


UPRIGHT = {  # what a viewer does with the stored pixels, by EXIF's orientation
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_upright_as_exif_says(folder, orientation, suffix):
    stored = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    stored = stored if suffix != ".jpg" else np.asarray(Image.fromarray(stored[:3, :3]).resize((SIZE, SIZE)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(stored).save(folder / f"a{suffix}", exif=exif, **options)
    difference = only(folder).astype(int) - UPRIGHT[orientation](stored)
    assert np.abs(difference).max() <= (3 if suffix == ".jpg" else 0)


def test_upright_whatever_else_exif_says(folder):
    stored = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    fields = struct.pack("<HHLl", 0x0100, 9, 1, -1) + struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0)  # a width below 0
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + fields + bytes(4)
    Image.fromarray(stored).save(folder / "a.png", exif=exif)
    np.testing.assert_array_equal(only(folder), np.rot90(stored, -1))


def test_broken_exif_is_none(folder):
    stored = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    Image.fromarray(stored).save(folder / "a.png", exif=b"Exif\0\0neither II nor MM")
    np.testing.assert_array_equal(only(folder), stored)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_the_color_that_a_grey_png_names_transparent_is_white(folder, depth):
    stored = np.array([10, 90, 200], depth)[:, None].repeat(3, 1) << (8 if depth is np.uint16 else 0)
    Image.fromarray(stored).save(folder / "a.png", transparency=int(stored[1, 0]))
    assert only(folder, 3)[:, 0, 0].tolist() == [10, 255, 200]


def test_a_jpeg_of_a_hundred_megapixels(folder):
    Image.new("L", (10_400, 10_000), 77).save(folder / "a.jpg")
    assert (only(folder) == 77).all()


def test_a_jpeg_that_was_loaded_small_does_not_pass_for_a_large_one(tmp_path):
    stored = np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(stored).resize((800, 800)).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        twice = [pixels.square(image, 64) for _ in range(2)]
        np.testing.assert_array_equal(*twice)
        with pytest.raises(ValueError, match="loaded at 1/4 of its size, too small for 224 px; open it anew"):
            pixels.square(image, 224)


@pytest.mark.parametrize("most, dark", [(4095, True), (65535, False)])
def test_grey_of_12_bits_in_16_is_told(folder, notes, most, dark):
    pixels._warn_of_dark_images.cache_clear()
    values = np.linspace(0, most, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    for name in "ab":
        Image.fromarray(values).save(folder / f"{name}.png")
    load(folder, SIZE)
    assert ["become nearly black; scale them" in note for note in notes].count(True) == dark


@pytest.mark.parametrize("shape", [(SIZE, 3 * SIZE), (3 * SIZE, SIZE), (4 * SIZE, 12 * SIZE), (900, 300)])
def test_the_middle_square_of_any_shape(folder, shape):
    image = np.zeros((*shape, 3), np.uint8)
    short = min(shape)
    top, left = (side // 2 - short // 2 for side in shape)
    image[top : top + short, left : left + short] = 200
    Image.fromarray(image).save(folder / "a.png")
    pixels = only(folder).astype(int)
    assert pixels.min() > 150  # the filter that makes it smaller looks a little over the edge
    assert np.abs(pixels[1:-1, 1:-1] - 200).max() <= 4


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_small_and_thin_images(folder, shape):
    Image.fromarray(np.full((*shape, 3), 77, np.uint8)).save(folder / "a.png")
    assert (only(folder) == 77).all()


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
def test_a_truncated_jpeg_is_unreadable(folder, cut, notes):
    paint_classes(folder)
    path = folder / "cats" / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(path)
    os.truncate(path, int(path.stat().st_size * cut))
    assert len(shades(load(folder, SIZE).train)) == 18
    assert "1 of 21 images cannot be read and are left out: cats/a.jpg (image file is truncated" in notes[1]


def test_a_large_jpeg_looks_like_the_same_png(folder, tmp_path):
    across, down = np.meshgrid(np.linspace(0, 255, 800), np.linspace(0, 255, 600))
    image = Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))
    for suffix in ("jpg", "png"):
        (tmp_path / suffix).mkdir()
        image.save(tmp_path / suffix / f"a.{suffix}")
    difference = only(tmp_path / "jpg", 64).astype(int) - only(tmp_path / "png", 64)
    assert np.abs(difference).max() <= 6


# By name


def test_a_data_set_by_its_folder(folder, monkeypatch):
    paint_classes(folder / "holiday")
    paint_classes(folder / "digits", 2, ("ones", "twos"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    for name in ("holiday", "./holiday", "holiday/", "~/holiday", str(folder / "holiday"), "../photos/holiday"):
        assert sources.load(name, image_size=SIZE).classes == ("cats", "dogs")
        assert sources.load(sources.canonical(name), image_size=SIZE).classes == ("cats", "dogs")
    assert {sources.canonical(name) for name in ("holiday", "./holiday", "holiday/", ".//holiday//")} == {"holiday"}
    assert [sources.canonical(name) for name in ("digits", "digits/", "absent/", "~/a/", "/")] == [
        "digits", "./digits", "./absent", "~/a", "/"
    ]  # fmt: skip
    assert sources.load("./digits", image_size=SIZE).classes == ("ones", "twos")
    assert len(sources.load("digits", image_size=SIZE).classes) == 10
    assert sources.load(".", image_size=SIZE).classes == ("digits", "holiday")
    for name in ("./absent", "/absent/folder", "../absent", "~/absent", "absent/", "./digits/ones/00.png"):
        with pytest.raises(UsageError, match=f"no folder {name}; name a folder of images"):
            sources.load(name, image_size=SIZE)


def test_what_is_done_is_logged(folder, notes):
    paint_classes(folder)
    sources.load(str(folder), image_size=SIZE)
    assert notes[0].startswith("decoding 20 images at 8 px into a 3.8 kB cache in ") and notes[1].startswith("18 images")
