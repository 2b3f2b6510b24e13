"""What a person sees of a run: progress, summary, figures."""

import csv
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import rotjax
from experiments import command, figures, plots, report
from rotjax.errors import CheckpointError

SUMMARY = {
    "rotation_accuracy": 0.787712,
    "rotation_accuracy_random": 0.7841,
    "confusion": [[7900, 700, 700, 700]] * 4,
    "test_images": 10000,
    "images_per_second": 1234.5,
    "epochs": 45,
    "steps": 17550,
    "dataset": "cifar10",
    "train_images": 50000,
    "backbone": "resnet18",
    "stem": "imagenet",
    "width": 64,
    "seed": 3,
    "device": "1 x cpu",
    "wall_seconds": 4500.0,
    "resumed_from": None,
}


def arrays(count, classes, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % classes if classes else np.full(count, -1, np.int32)
    images = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    images[:, :4] //= 4  # up is darker, which a rotation can be told by
    return {"image": images, "label": labels}


def plan(recipe, classes=("$cat$", "\u732b\udc80", "a class with a very long name"), **options):
    options |= dict(stem="cifar", width=8, image_size=16, batch_size=8, epochs=2, decay_epochs=1, dataset="pets")
    data = rotjax.Dataset("pets", classes, arrays(16, len(classes), 0), arrays(13, len(classes), 1))
    return rotjax.plan(recipe(**options), data=data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A rotation and a classification on random images: workdir, plan and rows of each."""
    folder = tmp_path_factory.mktemp("runs")
    plans = plan(rotjax.Rotation), plan(rotjax.Classification, trainable="head")  # compiles in half the time
    found = {}
    for this in plans:
        workdir = folder / this.recipe.job
        found[this.recipe.job] = workdir, this, list(rotjax.train(this, workdir, log_steps=1))
        figures.draw(workdir, this)
    return found


@pytest.mark.parametrize("job", ["rotation", "classification"])
def test_figures_of_a_run(runs, job, tmp_path):
    workdir, this, _ = runs[job]
    with open(workdir / "predictions.csv", newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((workdir / "summary.json").read_text())
    right = [row["label"] == row["prediction"] for row in rows]
    assert [row["image"] for row in rows] == [str(number) for number in range(len(this.data.test["label"]))]
    assert np.mean(right) == pytest.approx(summary["rotation_accuracy_random" if job == "rotation" else "accuracy"])
    for name in (name for name in figures.FIGURES if name.endswith(".png")):
        path = workdir / name
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert 400 <= image.width <= 1000 and 150 <= image.height <= 1000
            assert np.asarray(image.convert("L"), float).std() > 5
        assert path.stat().st_size < 300_000
    before = {path: path.read_bytes() for path in workdir.glob("*.*")}
    (workdir / "curves.png").unlink()
    times = {path: path.stat().st_mtime_ns for path in workdir.glob("*.*")}
    figures.draw(workdir, this)
    assert {path: path.read_bytes() for path in workdir.glob("*.*")} == before, "drawn again, to the same bytes"
    assert all(path.stat().st_mtime_ns == then for path, then in times.items()), "what was there was left alone"
    (workdir / "curves.png").write_bytes(b"of a summary before this one")
    os.utime(workdir / "curves.png", ns=(0, 0))
    figures.draw(workdir, this)
    assert {path: path.read_bytes() for path in workdir.glob("*.*")} == before, "older than the summary: drawn anew"
    for name in ("metrics.jsonl", "curves.png"):
        (workdir / name).rename(tmp_path / name)
    for lose in (lambda path: None, Path.touch):
        lose(workdir / "metrics.jsonl")
        figures.draw(workdir, this)
        assert not (workdir / "curves.png").exists(), "what it shows is lost, which is no reason to end"
    for name in ("metrics.jsonl", "curves.png"):
        (tmp_path / name).rename(workdir / name)


def test_where_no_terminal_shows_a_bar_lines_say_how_far_decoding_is(monkeypatch, caplog):
    caplog.set_level("INFO", "experiments.command")
    assert [*command.decoding(["a", "b"])] == ["a", "b"] and not caplog.messages
    monkeypatch.setattr(command, "QUIET", -1)
    assert [*command.decoding(iter("abc"), total=3)] == ["a", "b", "c"]
    assert caplog.messages == [f"decoded {number} of 3 images" for number in range(3)]


@pytest.mark.parametrize(("first", "scale"), [(3.0, "linear"), (87728.8, "log")])
def test_a_loss_that_begins_far_off_does_not_flatten_the_curve(first, scale):
    rows = [{"step": 2 * epoch, "train_loss": 1 / epoch, "test_loss": 2 / epoch} for epoch in range(1, 9)]
    rows = [row | {"train_accuracy": 0.5, "test_accuracy": 0.5} for row in rows]
    rows[0]["test_loss"] = first
    with plots.styled():
        figure = plots.curves(rows, 2, [], "title")
        loss, accuracy = figure.axes
        figure.draw_without_rendering()
    assert (loss.get_yscale(), accuracy.get_yscale()) == (scale, "linear")
    labels = [label.get_text() for label in loss.get_yticklabels(which="both")]
    if scale == "log":
        assert {"1", "100", "10000"} <= set(labels) and not any("$" in label for label in labels), "no raw mathematics"
    assert loss.get_legend_handles_labels()[1] == ["train, 0.12 at the end", "test, 0.25 at the end"]
    for axes in (loss, accuracy):
        assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0, "it covers no curve"


def test_a_figure_of_noise_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (32, 128, 128, 3), dtype=np.uint8), rng.integers(0, 4, 32)
    plots.save(
        plots.predictions(images, labels, labels[::-1], rng.random(32), "abcd", "title", "caption"), tmp_path / "noise.png"
    )
    assert 100_000 < (tmp_path / "noise.png").stat().st_size < 300_000


@pytest.mark.parametrize("count", [2, 10, 37, 60])
def test_confusion_shows_names_and_counts_where_there_is_room(count):
    matrix = np.full((count, count), 3) + 1000 * np.eye(count, dtype=int)
    matrix[0] = 0  # a class without a test image
    axes = plots.confusion(matrix, [f"class {k}" for k in range(count)], "title", "caption").axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert any("1,003" in text for text in texts) == (count <= 20)
    assert any("%" in text for text in texts) == (count == 2)
    assert (axes.get_yticklabels()[1].get_text() == "class 1") == (count <= 50)


def test_curves_show_the_rows():
    keys = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    values = [(2, 3, 0.1, 0.125), (1, 1.5, 0.2, 0.25), (0.5, 1, 0.3, 0.375)]
    rows = [{"step": 10 * epoch} | dict(zip(keys, row, strict=True)) for epoch, row in enumerate(values, 1)]
    panels = plots.curves(rows, 10, [2], "title").axes
    loss, accuracy = ([np.transpose(line.get_xydata()) for line in axes.lines] for axes in panels)
    np.testing.assert_allclose(loss[:2], [[[1, 2, 3], [2, 1, 0.5]], [[1, 2, 3], [3, 1.5, 1]]])
    np.testing.assert_allclose(accuracy[:2], [[[1, 2, 3], [10, 20, 30]], [[1, 2, 3], [12.5, 25, 37.5]]])
    assert loss[2][0].tolist() == [2, 2], "where the learning rate falls"


def test_predictions_mark_the_wrong_ones():
    images = np.zeros((3, 8, 8, 3), np.uint8)
    true, predicted, sure = np.array([0, 1, 1]), np.array([0, 1, 0]), np.array([0.9, 1, 0.614])
    figure = plots.predictions(images, true, predicted, sure, ("cat", "dog"), "title", "caption")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_xlabel() for axes in shown] == ["cat\n90%", "dog\n100%", "cat \N{BALLOT X}\nis dog\n61%"]
    assert [axes.spines["left"].get_visible() for axes in shown] == [False, False, True]


def test_what_is_said_below_a_picture_leaves_its_neighbour_alone():
    count, names = 16, ("English springer", "parachute", "French horn", "270\N{DEGREE SIGN}")
    images, true = np.zeros((count, 8, 8, 3), np.uint8), np.arange(count) % 4
    with plots.styled():
        figure = plots.predictions(images, true, (true + 1) % 4, np.ones(count), names, "title", "caption")
        figure.draw_without_rendering()
        spans = [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(spans) if one.x0 < other.x0)
    assert min(span.x0 for span in spans) >= 0 and max(span.x1 for span in spans) <= 800


def test_a_figure_that_cannot_be_written_is_a_line(tmp_path):
    figure = plots.confusion(np.eye(2, dtype=int), "ab", "title", "caption")
    with pytest.raises(CheckpointError, match="cannot write in"):
        plots.save(figure, tmp_path / "missing" / "confusion.png")


def test_progress_is_a_table_without_a_bar_off_a_terminal(runs, capsys):
    _, this, rows = runs["rotation"]
    with report.Progress(this) as progress:
        for row in rows:
            progress.show(row)
    out, err = capsys.readouterr()
    _, header, *table = out.splitlines()
    assert header == report.HEADER
    assert {len(line) for line in table} == {len(header)}
    epochs = [row for row in rows if "test_loss" in row]
    for line, row in zip(table, epochs, strict=True):
        numbers = [f"{row['epoch']}", f"{row['train_loss']:.4f}", f"{row['train_accuracy']:.2%}"]
        numbers += [f"{row['test_loss']:.4f}", f"{row['test_accuracy']:.2%}"]
        assert line.split()[:-1] == numbers
    assert not any(mark in out for mark in "|\r\x1b") and err == ""


def clock(monkeypatch, seconds):
    seconds = iter(seconds)
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))


def test_rows_of_one_dispatch_do_not_pass_for_fast(runs, monkeypatch):
    """They come at once after it; three dispatches of 40 steps, 10 s each, of 128 images a step."""
    _, this, _ = runs["rotation"]
    recipe = dataclasses.replace(this.recipe, rotations="random", batch_size=128)
    this = dataclasses.replace(this, recipe=recipe, epoch_steps=1000, steps=1000)
    clock(monkeypatch, [0.0, *(10.0 * (number // 4 + 1) + 1e-4 * (number % 4) for number in range(12))])
    speeds = set()
    with report.Progress(this) as progress:
        for step in range(10, 130, 10):
            progress.show({"step": step, "epoch": 1, "loss": 1.0})
            speeds.add(progress.speed)
    assert speeds == {"", ", 512 images/s"}


def test_progress_is_a_bar_on_a_terminal(runs, capsys, monkeypatch):
    _, this, rows = runs["rotation"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    clock(monkeypatch, range(100))
    with report.Progress(this) as progress:
        progress.move(1)
        assert "step 1/4" in capsys.readouterr().out, "before there is a row"
        for row in rows:
            progress.show(row)
    out = capsys.readouterr().out
    assert "step 4/4" in out and "epoch 2/2" in out and "images/s" in out
    *_, last, end = out.split("\r")
    assert last.isspace() and end == "", "the bar is gone in the end"


@pytest.mark.parametrize(("right", "count", "luck"), [(0.3, 20, True), (0.3, 2000, False), (0.1, 2000, True)])
def test_a_network_that_only_guesses_is_told(right, count, luck):
    (_, line), *_ = report.facts(SUMMARY | {"rotation_accuracy": right, "test_images": count})
    assert line.endswith(": no better than chance, 25%") == luck


def test_facts_are_those_of_the_summary():
    facts = report.facts(SUMMARY)
    text = "\n".join(value for _, value in facts)
    for part in (
        "78.77%",
        "10,000 test",
        "78.41%",
        "50,000",
        "resnet18, imagenet",
        "45 epochs, 17,550 steps",
        "1,234",
        "75.0 min",
    ):
        assert part in text
    assert "resumed" not in text
    older = {name: value for name, value in SUMMARY.items() if name != "width"}
    assert report.facts(older) == facts
    assert "since step 8,000" in dict(report.facts(SUMMARY | {"resumed_from": 8000}))["time"]
    resumed_at_the_end = dict(report.facts(SUMMARY | {"images_per_second": None}))
    assert resumed_at_the_end["device"] == "1 x cpu"
    assert "speed" not in resumed_at_the_end
    assert dict(report.facts(SUMMARY | {"steps": 60, "epochs": 0.15}))["trained for"].startswith("0.15 epochs, 60 steps")


@pytest.mark.parametrize("job", ["rotation", "classification"])
def test_summary_of_a_run(runs, job, capsys):
    workdir, this, _ = runs[job]
    report.summarise(workdir, this, Path("/data of mine"))
    out = capsys.readouterr().out
    summary = json.loads((workdir / "summary.json").read_text())
    key = "rotation_accuracy" if job == "rotation" else "accuracy"
    assert f"{summary[key]:.2%} on" in out and "13 test images" in out and str(workdir) in out
    assert all(name in out for name in report.FILES)
    flags = f"--pretrained={workdir} --dataset=pets --image_size=16 --batch_size=8 --data_dir='/data of mine'"
    command = f"python -m experiments.classification {flags}"
    assert (command if job == "rotation" else f'rotjax.load("{workdir}")') in out


def test_next_step_without_classes(tmp_path):
    assert "--dataset=FOLDER" in report.next_step(tmp_path, plan(rotjax.Rotation, classes=()))


def test_the_next_command_mirrors_as_the_run_did(tmp_path):
    for flip, said in [(False, " --no_flip "), (True, "")]:
        step = report.next_step(tmp_path, plan(rotjax.Rotation, flip=flip))
        assert said in step and step.count("flip") == len(said.split())


def test_a_run_with_validation_images_does_not_speak_of_test_images(tmp_path, capsys):
    this = plan(rotjax.Rotation, preset="strong", validation=0.25, max_steps=1)
    with report.Progress(this) as progress:
        row = {f"{part}_{name}": 0.5 for part in ("train", "test") for name in ("loss", "accuracy")}
        progress.show(row | {"step": 1, "epoch": 1})
    assert "val. accuracy" in (out := capsys.readouterr().out) and "test" not in out
    assert " --preset=strong --batch_size=8 --validation=0.25" in report.next_step(tmp_path, this)
    usual = dataclasses.replace(this, recipe=dataclasses.replace(this.recipe, batch_size=128))
    assert "--batch_size" not in report.next_step(tmp_path, usual)
    (_, line), *_ = report.facts(SUMMARY | {"tested_on": this.recipe.tested_on})
    assert line == "78.77% on all four turns of 10,000 validation images"


def test_F4_say_survives_its_reader_and_its_encoding():
    program = (
        "import sys; from experiments.report import say; [say('90\\u00b0' + 99 * '-') for _ in range(999)]; sys.exit(7)"
    )
    command, environment = [sys.executable, "-c", program], os.environ | {"PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline().startswith(b"90?-")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 7
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], env=environment, stderr=subprocess.PIPE)
    assert (closed.returncode, closed.stderr) == (7, b"")


@pytest.mark.parametrize("line", ["x" * 5000, f"/{'a' * 400}/{'b' * 400} is none; name /{'c' * 400}", "short", "no " * 90])
def test_a_line_is_shortened_where_its_words_are_long(line):
    short = report.shortened(line)
    assert len(short) <= 290 and (short == line if len(line) <= 290 else "..." in short)
    assert " is none; name /ccc" in short or "none" not in line


def test_what_to_do_is_shortened_last():
    remedy = f"run: prepare --data_dir=/{'c' * 150}"
    short = report.shortened(f"/{'a' * 200} is not there; {remedy}")
    assert short.endswith(f"aaa is not there; {remedy}") and len(short) in (289, 290)


@pytest.mark.parametrize(("count", "shape"), [(4, (8, 32)), (8, (8, 64)), (12, (16, 64)), (20, (24, 64))])
def test_every_filter_is_drawn(count, shape):
    kernels = np.zeros((7, 7, 3, count))
    kernels[3, 3] = 1.0
    figure = plots.filters(kernels, kernels, "filters")
    for axes in figure.axes:
        drawn = axes.images[0].get_array()
        assert drawn.shape == (*shape, 3) and (drawn[:, :, 0] == 0).sum() == 48 * count


def test_long_names_lose_their_middle():
    names = [plots.short(f"Northern_cardinal_{kind}", 12) for kind in ("male", "female")]
    assert names == ["Northe…_male", "Northe…emale"] and plots.short("cat", 12) == "cat"
