"""Runs on disk: exact resume, transfer between workdirs, and what is refused."""

import dataclasses
import errno
import fcntl
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import rotjax
from experiments import command
from rotjax import locks
from rotjax.errors import CheckpointError, DataError, InUseError, Stopped, UsageError

SMALL = dict(stem="cifar", width=4, batch_size=8, epochs=2, seed=1)


@pytest.fixture(scope="module")
def data(images):
    rng = np.random.default_rng(1)
    test = {"image": rng.integers(0, 256, (11, 8, 8, 3), dtype=np.uint8), "label": np.arange(11, dtype=np.int32) % 3}
    return rotjax.Dataset("noise", ("a", "b", "c"), images, test)


def carry_out(recipe, data, workdir, **options):
    plan = rotjax.plan(recipe, data=data)
    return list(rotjax.train(plan, workdir, log_steps=2, **options))


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def arrays(workdir):
    return [np.asarray(x) for x in jax.tree.leaves(rotjax.load(workdir)[1])]


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "rotation"
    carry_out(rotjax.Rotation(**SMALL), data, workdir)
    return workdir


@pytest.mark.parametrize("kind", [rotjax.Rotation, rotjax.Classification])
def test_the_test_after_the_last_epoch_is_taken_once_and_again_where_it_was_lost(data, tmp_path, monkeypatch, kind):
    asked, evaluate = [], rotjax.training.evaluate
    monkeypatch.setattr(rotjax.training, "evaluate", lambda *given: asked.append(1) or evaluate(*given))
    rows = carry_out(kind(**SMALL), data, tmp_path / "run")
    turns, last = kind is rotjax.Rotation, [row["test_accuracy"] for row in rows if "test_accuracy" in row][-1]
    assert len(asked) == SMALL["epochs"] + turns
    first = summary(tmp_path / "run")
    assert first["rotation_accuracy_random" if turns else "accuracy"] == last
    (tmp_path / "run/summary.json").unlink()
    carry_out(kind(**SMALL), data, tmp_path / "run")
    assert len(asked) == SMALL["epochs"] + turns + 1 + turns
    again = summary(tmp_path / "run")
    assert all(first[name] == again[name] for name in first if "accuracy" in name or name == "confusion")


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


def test_R5_a_finished_run_says_so_and_changes_nothing(pretrained, data, notes):
    before = {path: path.read_bytes() for path in pretrained.rglob("*") if path.is_file() and path.name != ".lock"}
    rows = carry_out(rotjax.Rotation(**SMALL), data, pretrained)
    assert rows == [] and "already complete at step 12" in notes
    assert before == {path: path.read_bytes() for path in pretrained.rglob("*") if path.is_file() and path.name != ".lock"}


def test_R5_a_finished_run_that_lost_its_newest_checkpoint_is_finished_again(data, tmp_path):
    short = rotjax.Rotation(max_steps=2, **SMALL)
    carry_out(short, data, tmp_path, checkpoint_seconds=0.0)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    rows = rotjax.train(rotjax.plan(short, data=data), tmp_path, log_steps=1)
    assert next(rows)["step"] == 2
    assert not (tmp_path / "summary.json").exists(), "it would say of a run under way that it is complete"
    assert list(rows)[-1]["step"] == 2 and summary(tmp_path)["resumed_from"] == 1


def test_R3_a_stopped_run_goes_on_to_the_same_bits(pretrained, data, tmp_path):
    plan = rotjax.plan(rotjax.Rotation(**SMALL), data=data)
    with pytest.raises(Stopped, match="stopped at step . of 12.*the same command resumes"):
        for row in rotjax.train(plan, tmp_path / "run", log_steps=2):
            if row["step"] == 4:
                os.kill(os.getpid(), signal.SIGTERM)
    rows = carry_out(rotjax.Rotation(**SMALL), data, tmp_path / "run")
    assert rows[0]["step"] > 4 and summary(tmp_path / "run")["resumed_from"] in (4, 5)
    assert (tmp_path / "run/metrics.jsonl").read_text() == (pretrained / "metrics.jsonl").read_text()
    for a, b in zip(arrays(tmp_path / "run"), arrays(pretrained), strict=True):
        np.testing.assert_array_equal(a, b)


def test_R3_a_signal_in_a_test_is_heeded_and_the_test_repeated(pretrained, data, tmp_path, monkeypatch):
    """The state at the end of the epoch is saved; the next run begins with the test that is missing."""
    workdir, evaluate, calls = tmp_path / "run", rotjax.training.evaluate, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) in (1, 3):  # the test of each epoch, the first time
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(rotjax.training, "evaluate", interrupted)
    for tested, step in enumerate((6, 12)):
        with pytest.raises(Stopped, match=f"stopped at step {step} of 12"):
            carry_out(rotjax.Rotation(**SMALL), data, workdir)
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert sum("test_loss" in row for row in rows) == tested and not (workdir / "summary.json").exists()
    rows = carry_out(rotjax.Rotation(**SMALL), data, workdir)
    assert [row["step"] for row in rows] == [12] and summary(workdir)["resumed_from"] == 12
    assert (workdir / "metrics.jsonl").read_text() == (pretrained / "metrics.jsonl").read_text()
    for a, b in zip(arrays(workdir), arrays(pretrained), strict=True):
        np.testing.assert_array_equal(a, b)


def test_R3_a_signal_before_the_first_step_leaves_a_run_that_goes_on(pretrained, data, tmp_path, monkeypatch):
    init_state = rotjax.state.init_state

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return init_state(*arguments)

    monkeypatch.setattr(rotjax.run, "init_state", interrupted)
    with pytest.raises(Stopped, match="stopped at step 0 of 12, nothing to save yet; the same command resumes"):
        carry_out(rotjax.Rotation(**SMALL), data, tmp_path / "run")
    monkeypatch.setattr(rotjax.run, "init_state", init_state)
    carry_out(rotjax.Rotation(**SMALL), data, tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_text() == (pretrained / "metrics.jsonl").read_text()


def spoil(connection, workdir, step):
    """A command whose learning rate is not a number at `step`."""
    rotjax.optim.piecewise = lambda rate, boundaries: lambda count: jnp.where(count + 1 == step, jnp.nan, rate)

    def job():
        for row in rotjax.train(noise(), workdir, log_steps=1, checkpoint_seconds=0.0):
            connection.send(row["step"])

    return command.guarded(job)


def test_N1_what_is_not_finite_stops_the_run_and_keeps_the_last_sound_checkpoint(start, tmp_path):
    process, _ = start(tmp_path / "log", spoil, tmp_path / "run", 11)
    process.join(timeout=600)
    said = (tmp_path / "log").read_text().splitlines()[-1]
    assert (process.exitcode, said) == (
        5,
        "rotjax: the loss or the network is not finite at step 11; lower the learning rate",
    )
    assert rotjax.checkpoints.newest(tmp_path / "run" / "checkpoints") == 10
    rotjax.load(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 10


def test_C5_a_save_that_fails_in_the_background_ends_the_run_at_the_next_step(data, tmp_path, monkeypatch):
    """Not at the next save, which may be a minute away."""

    def fails(path):
        raise OSError(28, "No space left on device")

    def first_save_only(saved, state):
        if int(state.step) and not opened:
            opened.append(saved)
            save(saved, state)

    save, opened, steps = rotjax.run._save, [], []
    monkeypatch.setattr(rotjax.manifests, "files", fails)
    monkeypatch.setattr(rotjax.run, "_save", first_save_only)
    plan = rotjax.plan(rotjax.Rotation(**SMALL), data=data)
    with pytest.raises(CheckpointError, match="step 1 was not saved in .*No space left on device"):
        for row in rotjax.train(plan, tmp_path / "run", log_steps=1, checkpoint_seconds=0.0):
            steps.append(row["step"])
            while row["step"] == 2 and opened[0].pending and not opened[0].pending.done():
                time.sleep(0.01)
    assert steps[-1] <= 2 and [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["1.unfinished"]


def test_D6_a_run_does_not_go_on_with_other_data(pretrained, data):
    label = data.train["label"].copy()
    label[0] = 2
    image = data.train["image"].copy()
    image[17, 3, 4, 1] ^= 1
    others = [
        (dataclasses.replace(data, train=data.train | {"image": image}), "other images"),
        (dataclasses.replace(data, train=data.train | {"label": label}), "other images"),
        (dataclasses.replace(data, test={key: value[:9] for key, value in data.test.items()}), "test_images 11 -> 9"),
        (dataclasses.replace(data, classes=("a", "b", "d")), "classes"),
    ]
    before = {path: path.read_bytes() for path in pretrained.glob("*.json*")}
    for other, message in others:
        with pytest.raises(DataError, match=f"was started on other data .*{message}"):
            carry_out(rotjax.Rotation(**SMALL), other, pretrained)
    assert before == {path: path.read_bytes() for path in pretrained.glob("*.json*")}


def test_D6_a_classifier_does_not_go_on_from_another_training_of_its_pretrained_network(pretrained, data, tmp_path):
    """Its name is that of the recipe, which has not changed."""
    recipe = rotjax.Classification(pretrained=str(pretrained), batch_size=8, epochs=1)
    plan = rotjax.plan(recipe, data=data)
    again = dataclasses.replace(plan, backbone=jax.tree.map(lambda x: x + 1e-3, plan.backbone))
    list(rotjax.train(plan, tmp_path / "run"))
    before = {path: path.read_bytes() for path in tmp_path.glob("run/*.json*")}
    with pytest.raises(UsageError, match="run was started from another training of the pretrained run; bring that back"):
        list(rotjax.train(again, tmp_path / "run"))
    assert before == {path: path.read_bytes() for path in tmp_path.glob("run/*.json*")}
    facts = json.loads((tmp_path / "run" / "data.json").read_text())
    del facts["backbone"]
    (tmp_path / "run" / "data.json").write_text(json.dumps(facts))
    assert not list(rotjax.train(again, tmp_path / "run")), "an older run does not know from which"


def noise():
    """A plan of 96 steps."""
    rng = np.random.default_rng(0)
    images = [{"image": rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), "label": np.zeros(n, int)} for n in (64, 8)]
    recipe = rotjax.Rotation(stem="cifar", width=4, batch_size=8, epochs=12)
    return rotjax.plan(recipe, data=rotjax.Dataset("noise", ("a",), *images))


def work(connection, workdir, checkpoint_seconds=0.0):
    """A run of 96 steps that tells its rows."""
    for row in rotjax.train(noise(), workdir, log_steps=3, checkpoint_seconds=checkpoint_seconds):
        connection.send(row["step"])


def undisturbed(start, workdir, *options):
    """Waits for a run of 96 steps."""
    process, connection = start(os.devnull, work, workdir, *options)
    with suppress(EOFError):
        while connection.recv():
            pass
    process.join()
    assert process.exitcode == 0


def same(one, other):
    """Whether two runs left the same metrics and the same bits, the optimizer's too."""
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    states = []
    for workdir in (one, other):
        plan = rotjax.planning.Plan(rotjax.workdirs.read_recipe(workdir), None, None, 8, 96)
        state = rotjax.run._build(plan)[2]()
        states.append(rotjax.checkpoints.restore(workdir / "checkpoints", 96, state))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that nobody disturbs, which saves only at its end."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    undisturbed(start, workdir, 1e9)
    return workdir


def kill_at_random(start, whole, workdir, times):
    """Kills a run at random points, `times` times, in saves too; it then ends with the bits of `whole`."""
    seed = time.time_ns()
    print("seed", seed)
    rng = np.random.default_rng(seed)
    codes = []
    for _ in range(times):
        process, connection = start(os.devnull, work, workdir)
        seen = rng.integers(0, 3)
        with suppress(EOFError):  # where it came to its end
            for _ in range(seen):
                connection.recv()
        time.sleep(rng.uniform(0, 0.05 if seen else 2))  # before the first row there is more to be done
        process.kill()
        process.join()
        codes.append(process.exitcode)
    print("exit codes", codes)
    assert set(codes) <= {-9, 0} and codes.count(-9) > times // 2  # 0: where it came to its end
    undisturbed(start, workdir)
    same(workdir, whole)


def test_R1_a_run_killed_at_any_point_ends_with_the_same_bits(start, whole, tmp_path, record_property):
    record_property("trials", 20)
    kill_at_random(start, whole, tmp_path / "killed", 20)


@pytest.mark.soak
def test_R1_many_runs_killed_at_any_point_end_with_the_same_bits(start, whole, tmp_path):
    for number in range(25):
        kill_at_random(start, whole, tmp_path / str(number), 20)


def test_R6_two_processes_end_with_the_same_bits(start, whole, tmp_path):
    undisturbed(start, tmp_path / "again", 1e9)
    same(tmp_path / "again", whole)


def test_R11_another_cadence_changes_no_bit(pretrained, data, tmp_path):
    plan = rotjax.plan(rotjax.Rotation(**SMALL), data=data)
    for options in (dict(checkpoint_seconds=0.0, log_steps=1), dict(checkpoint_seconds=1e9, log_steps=5)):
        reached = []
        rows = rotjax.train(plan, tmp_path / "run", **options, progress=reached.append)
        for row in rows:
            if row["step"] == 4 and options["log_steps"] == 1:
                rows.close()
                assert reached == [0, 1, 2, 3, 4]
                break
    assert 1 < reached[0] < 5 and reached == [*range(reached[0], 13)]
    for a, b in zip(arrays(tmp_path / "run"), arrays(pretrained), strict=True):
        np.testing.assert_array_equal(a, b)


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


def test_a_cadence_that_is_none_is_refused_before_anything_is_written(data, tmp_path):
    plan = rotjax.plan(rotjax.Rotation(**SMALL), data=data)
    for name, value, least in (("log_steps", 0, 1), ("checkpoint_seconds", -1.0, 0), ("checkpoint_seconds", math.nan, 0)):
        with pytest.raises(UsageError, match=f"^{name}={value} is too small; it is at least {least}$"):
            list(rotjax.train(plan, tmp_path / "run", **{name: value}))
    for name in ("log_steps", "steps_per_dispatch", "threads"):
        with pytest.raises(UsageError, match=f"^{name}=1.5 is no integer; give one$"):
            list(rotjax.train(plan, tmp_path / "run", **{name: 1.5}))
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_a_user_that_is_not_there_is_refused(data):
    workdir = "~nobody-of-this-name/run"
    recipe, plan = rotjax.Rotation(**SMALL), rotjax.plan(rotjax.Rotation(**SMALL), data=data)
    jobs = [
        partial(rotjax.load, workdir),
        partial(next, rotjax.train(plan, workdir)),
        partial(rotjax.plan, recipe, data=data, workdir=workdir),
        partial(rotjax.plan, rotjax.Classification(pretrained=workdir, batch_size=8), data=data),
    ]
    for job in jobs:
        with pytest.raises(UsageError, match=f"^{workdir} is in no folder .*; name another, without ~$"):
            job()


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


def both(connection, folder, point):
    """A pretraining of 12 steps and a transfer of 12, which go on where they stopped, and wait at `point` to be killed."""

    def reached(*here):
        connection.send(here)
        if here == point:
            connection.recv()

    recipe = dict(batch_size=8, max_steps=12)
    data = noise().data
    pretext = rotjax.Rotation(stem="cifar", width=4, **recipe)
    for row in rotjax.train(rotjax.plan(pretext, data=data), folder / "pretext", log_steps=2, checkpoint_seconds=0.0):
        reached("pretext", row["step"])
    reached("between", 0)
    transfer = rotjax.Classification(pretrained=str(folder / "pretext"), trainable="head", **recipe)
    for row in rotjax.train(rotjax.plan(transfer, data=data), folder / "transfer", log_steps=2, checkpoint_seconds=0.0):
        reached("transfer", row["step"])


def test_R14_killed_before_and_in_the_transfer_it_ends_with_the_same_bits(start, tmp_path):
    for folder, points in {"killed": (("between", 0), ("transfer", 6), None), "whole": (None,)}.items():
        for point in points:
            process, connection = start(os.devnull, both, tmp_path / folder, point)
            with suppress(EOFError):
                while connection.recv() != point:
                    pass
                process.kill()
            process.join()
            assert process.exitcode == (-9 if point else 0)
    for name in ("pretext", "transfer"):
        one, other = tmp_path / "killed" / name, tmp_path / "whole" / name
        assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
        jax.tree.map(np.testing.assert_array_equal, arrays(one), arrays(other))
    assert summary(tmp_path / "killed" / "transfer")["resumed_from"]


def test_R14_a_transfer_begins_with_the_pretrained_backbone_and_a_fresh_head(pretrained, data):
    plan = rotjax.plan(rotjax.Classification(pretrained=str(pretrained), batch_size=8, seed=5), data=data)
    assert rotjax.plan(rotjax.Classification(pretrained=pretrained, batch_size=8, seed=5), data=data).recipe == plan.recipe
    state = rotjax.run._build(plan)[2]()
    fresh, donor = rotjax.init_variables(plan.recipe.model(), 5, 8), rotjax.load(pretrained)[1]
    for name, source in {"head": fresh, "backbone": donor}.items():
        jax.tree.map(np.testing.assert_array_equal, rotjax.part(state.variables, name), rotjax.part(source, name))


def test_an_epoch_of_a_subset_has_as_many_steps_as_of_the_whole(data, tmp_path):
    plan = rotjax.plan(rotjax.Classification(subset=3, **SMALL), data=data)
    assert len(plan.data.train["label"]) == 9 and plan.steps == 12
    assert summary_of(plan, tmp_path)["train_images"] == 9


def summary_of(plan, workdir):
    list(rotjax.train(plan, workdir / "run"))
    return summary(workdir / "run")


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


def test_R3_a_run_by_the_strong_preset_that_is_stopped_goes_on_to_the_same_bits(pretrained, data, tmp_path):
    """SGD has another state than AdamW, and the rate rises and falls within the run."""
    given = dict(preset="strong", batch_size=8, epochs=3, warmup_epochs=1, validation=0.25, trainable="last_block")
    recipe = rotjax.Classification(pretrained=str(pretrained), **given)
    plan = rotjax.plan(recipe, data=data)
    assert (plan.recipe.optimizer, plan.recipe.dtype, plan.recipe.stem, plan.steps) == ("sgd", "bfloat16", "cifar", 12)
    list(rotjax.train(plan, tmp_path / "usual", log_steps=2))
    with pytest.raises(Stopped):
        for row in rotjax.train(plan, tmp_path / "run", log_steps=2):
            if row["step"] == 6:
                os.kill(os.getpid(), signal.SIGTERM)
    list(rotjax.train(plan, tmp_path / "run", log_steps=2))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "usual/metrics.jsonl").read_bytes()
    for one, other in zip(arrays(tmp_path / "run"), arrays(tmp_path / "usual"), strict=True):
        np.testing.assert_array_equal(one, other)
    final = summary(tmp_path / "run")
    assert (final["test_images"], final["train_images"], final["tested_on"]) == (12, 36, "validation images")


def test_R3_a_run_under_a_mesh_of_explicit_axes_goes_on_to_the_same_bits(pretrained, data, tmp_path):
    """A mesh that the caller has set, as `jax.make_mesh` makes them."""
    recipe = rotjax.Classification(pretrained=str(pretrained), batch_size=8, max_steps=8, trainable="last_block")
    plan = rotjax.plan(recipe, data=data)
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        list(rotjax.train(plan, tmp_path / "usual", log_steps=2))
        rows = rotjax.train(plan, tmp_path / "run", log_steps=2, checkpoint_seconds=0)
        assert next(row for row in rows if row["step"] == 6)
        rows.close()
        list(rotjax.train(plan, tmp_path / "run", log_steps=2))
    assert 1 < summary(tmp_path / "run")["resumed_from"] < 6
    for one, other in zip(arrays(tmp_path / "run"), arrays(tmp_path / "usual"), strict=True):
        np.testing.assert_array_equal(one, other)


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


def test_C9_classes_that_are_numbers_become_names(data, tmp_path):
    numbered = rotjax.Dataset("noise", tuple(np.arange(3)), data.train, data.test)
    recipe = rotjax.Classification(**SMALL, max_steps=1, learning_rate=np.float64(0.1))
    carry_out(recipe, numbered, tmp_path)
    assert rotjax.load(tmp_path)[2].classes == ("0", "1", "2")


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


def test_C7_a_workdir_of_another_recipe_is_refused(pretrained, data):
    listed = dict(mean=list(rotjax.models.CIFAR10_MEAN), std=list(rotjax.models.CIFAR10_STD))
    recipe = rotjax.plan(rotjax.Rotation(**SMALL, **listed), data=data).recipe
    assert recipe.name == rotjax.plan(rotjax.Rotation(**SMALL), data=data).recipe.name
    assert rotjax.plan(rotjax.Classification(classes=list(data.classes), **SMALL), data=data).recipe.classes == data.classes
    assert carry_out(rotjax.Rotation(**SMALL, **listed), data, pretrained) == []
    with pytest.raises(UsageError, match=r"holds another run \(seed 1 -> 2\)"):
        carry_out(rotjax.Rotation(**(SMALL | {"seed": 2})), data, pretrained)


def test_F1_a_workdir_that_another_run_took_meanwhile_is_refused(data, tmp_path, monkeypatch):
    """It came and went between the first look at the folder and its lock."""
    plans = [rotjax.plan(rotjax.Rotation(**(SMALL | {"seed": seed})), data=data) for seed in (1, 2)]
    lock = rotjax.workdirs.locked

    def late(*args):
        monkeypatch.setattr(rotjax.workdirs, "locked", lock)
        with rotjax.workdirs.claimed(tmp_path / "run", plans[0].recipe, data, None):
            pass
        return lock(*args)

    monkeypatch.setattr(rotjax.workdirs, "locked", late)
    with pytest.raises(UsageError, match=r"holds another run \(seed 1 -> 2\)"):
        next(rotjax.train(plans[1], tmp_path / "run"))


CHANGES = dict(
    backbone="resnet50", stem="imagenet", width=8, classes=("a", "b"), learning_rate=0.1, weight_decay=0.0, decay_epochs=3,
    epochs=3, batch_size=16, image_size=16, dtype="bfloat16", mean=(0.0, 0.0, 0.0), trainable="head", subset=2, flip=False,
    preset="strong", optimizer="sgd", schedule="cosine", warmup_epochs=1, cutout=0.5, label_smoothing=0.1, validation=0.5,
)  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_C7_each_field_of_another_recipe_is_named(data, tmp_path, field):
    recipe = rotjax.plan(rotjax.Classification(**SMALL), data=data).recipe
    (tmp_path / "recipe.json").write_text(json.dumps(rotjax.recipe_json.to_json(recipe)))
    rotjax.workdirs.check_vacant(tmp_path, recipe)
    asked = dataclasses.replace(recipe, **{field: CHANGES[field]})
    with pytest.raises(UsageError, match=rf"holds another run \({field} [^,]*.* -> [^,]*.*\); name another workdir"):
        rotjax.workdirs.check_vacant(tmp_path, asked)


def test_C7_a_folder_of_images_may_have_moved_and_other_images_are_refused(tmp_path, notes):
    rng = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "one" / "photos" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    for name in ("two/photos", "three/photos", "one/others"):
        shutil.copytree(path.parent, tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "three" / "photos" / "3.png")

    def run(name):
        recipe = rotjax.Rotation(dataset=str(tmp_path / name), image_size=8, max_steps=1, **SMALL)
        return list(rotjax.train(rotjax.plan(recipe, workdir=tmp_path / "run"), tmp_path / "run"))

    assert run("one/photos") != []
    shutil.rmtree(tmp_path / "one" / "photos")
    assert run("two/photos") == [] and "already complete at step 1" in notes
    with pytest.raises(DataError, match=r"was started on other data \(other images\)"):
        run("three/photos")
    with pytest.raises(UsageError, match=r"holds another run \(dataset .*one/photos -> .*one/others\)"):
        run("one/others")


def test_a_run_within_its_own_images_is_found_complete(tmp_path, notes):
    path = tmp_path / "photos"
    path.mkdir()
    for number in range(20):
        Image.new("RGB", (8, 8), (number,) * 3).save(path / f"{number}.png")
    workdir = path / "runs" / "first"

    def run():
        recipe = rotjax.Rotation(dataset=str(path), image_size=8, max_steps=1, **SMALL)
        rows = list(rotjax.train(rotjax.plan(recipe, workdir=workdir), workdir))
        shutil.copy(path / "0.png", workdir / "history.png")  # as the command draws one
        return rows

    assert run() != [] and run() == [] and "already complete at step 1" in notes


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


def test_a_workdir_may_be_below_the_home_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    carry_out(rotjax.Rotation(max_steps=1, **SMALL), data, "~/runs/one")
    assert rotjax.load("~/runs/one")[2].job == "rotation" and not (tmp_path / "~").exists()
    recipe = rotjax.Classification(pretrained="~/runs/one", batch_size=8)
    assert rotjax.plan(recipe, data=data).backbone is not None
    with pytest.raises(UsageError, match=r"one holds another run \(job rotation -> classification and \d more\); name"):
        rotjax.plan(recipe, data=data, workdir="~/runs/one")


def test_F1_a_process_that_ends_while_its_run_is_held_ends_and_leaves_no_lock(tmp_path):
    """A script that looks at the first row, is interrupted twice, and closes nothing."""
    program = f"""
import signal, time
import numpy as np, rotjax
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
part = {{"image": np.zeros((16, 8, 8, 3), np.uint8)}}
recipe = rotjax.Rotation(stem="cifar", width=4, batch_size=8, epochs=2)
rows = rotjax.train(rotjax.plan(recipe, data=rotjax.Dataset("grey", (), part, part)), {str(tmp_path)!r}, log_steps=1)
print(next(rows)["step"])
signal.raise_signal(signal.SIGINT)
time.sleep(1.2 * rotjax.signals.ECHO)
try:
    signal.raise_signal(signal.SIGINT)
    time.sleep(9)
except KeyboardInterrupt:
    print("interrupted")
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stdout) == (0, "1\ninterrupted\n") and len(done.stderr.splitlines()) == 1, done.stderr
    assert (tmp_path / "metrics.jsonl").exists() and not (tmp_path / ".lock").exists()


def test_F1_who_holds_a_lock_is_told(tmp_path):
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        print("process 1 on moon", file=file, flush=True)
        with pytest.raises(InUseError, match="^it is in use by process 1 on moon; wait for it$"):
            locks.locked(tmp_path / "lock", "it").__enter__()


def test_F1_who_only_looks_whether_a_lock_is_taken_is_not_in_its_way(tmp_path):
    path, looks = tmp_path / "lock", []
    path.touch()
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(0.2, lambda: looks.append(fcntl.flock(file, fcntl.LOCK_UN)))
        timer.start()
        assert not locks.taken(path)
        with locks.locked(path, "it"):
            assert looks and locks.taken(path)
        timer.join()
    assert not locks.taken(path)


def test_F1_a_fork_that_ends_leaves_the_lock_of_its_parent(tmp_path):
    program = f"""
import os, sys
from pathlib import Path
from rotjax.locks import locked
path = Path({str(tmp_path / "lock")!r})
with locked(path, "it"):
    if not os.fork():
        sys.exit()
    os.wait()
    assert path.exists()
assert not path.exists()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=environment, check=True, timeout=600)


def test_a_lock_file_of_any_bytes_is_taken_over(tmp_path, notes):
    path = tmp_path / "run.lock"
    path.write_bytes(b"\xff\xfe\0")
    assert not locks.taken(path)
    with locks.locked(path, "the run"):
        assert locks.taken(path)
    assert notes[0].startswith("taking the run over from")


def test_a_disk_without_locks_is_told_and_used(tmp_path, monkeypatch, notes):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "run.lock"
    with locks.locked(path, "the run") as ours:
        assert ours() and f"process {os.getpid()}" in path.read_text()
        with locks.locked(path, "the run"):
            pass
        assert not ours()
    (line, _) = notes
    assert line == f"there are no locks on the disk of {tmp_path}; see to it that nothing else uses the run"


def test_F2_the_log_of_a_cluster_may_lie_in_the_workdir(data, tmp_path):
    for name in ("slurm-7.out", "slurm-7.err", "run.log"):
        (tmp_path / name).write_text("begun")
    assert carry_out(rotjax.Rotation(max_steps=1, **SMALL), data, tmp_path)[-1]["step"] == 1
    assert (tmp_path / "run.log").read_text() == "begun"


def test_F2_a_folder_of_something_else_is_refused(data, tmp_path):
    (tmp_path / "photo.jpg").write_text("precious")
    with pytest.raises(UsageError, match="not empty and holds no run"):
        carry_out(rotjax.Rotation(**SMALL), data, tmp_path)
    with pytest.raises(UsageError, match="is a file, or below one; name another workdir"):
        carry_out(rotjax.Rotation(**SMALL), data, tmp_path / "photo.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_F3_a_name_that_orbax_cannot_be_given_and_a_link_to_nowhere_are_refused_at_once(data, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    problems = {"caf\udce9": "cannot be one .*; name another", "link/run": "link is a link to what is not there; name"}
    for name, problem in problems.items():
        with pytest.raises(UsageError, match=problem):
            carry_out(rotjax.Rotation(**SMALL), data, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_F1_a_workdir_in_use_is_refused(pretrained, data):
    plan = rotjax.plan(rotjax.Rotation(**SMALL), data=data)
    with (
        rotjax.workdirs.claimed(pretrained, plan.recipe, plan.data, plan.backbone),
        pytest.raises(InUseError, match=f"in use by process {os.getpid()} on {socket.gethostname()}; close"),
    ):
        list(rotjax.train(plan, pretrained))


def test_F1_the_lock_of_a_process_that_died_is_taken_over_and_it_is_said(start, tmp_path, notes):
    process, connection = start(os.devnull, work, tmp_path / "run")
    connection.recv()
    process.kill()
    process.join()
    with closing(rotjax.train(noise(), tmp_path / "run", log_steps=3)) as running:
        next(running)
    died = f"process {process.pid} on {socket.gethostname()}"
    assert notes.count(f"taking {tmp_path / 'run'} over from {died}, which died") == 1


def as_nobody(connection, job, *arguments):
    """`job` by a user who may write nothing, where a test is run by one who may write anything."""
    if os.getuid() == 0:
        os.setuid(65534)
    return command.guarded(lambda: connection.send(job(*arguments)))


@pytest.fixture
def open_folder():
    """A folder that others may read, as `tmp_path` may not."""
    needed = Path(sys.prefix), Path(tempfile.gettempdir())
    if os.getuid() == 0 and not all(path.stat().st_mode & 1 for one in needed for path in (one, *one.parents)):
        pytest.skip(f"other users cannot import from {sys.prefix}, or not read in {tempfile.gettempdir()}")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def train_noise(workdir):
    return list(rotjax.train(noise(), workdir))


def test_F3_a_workdir_that_cannot_be_made_is_refused_before_anything_compiles(start, open_folder, tmp_path):
    (open_folder / "file").write_text("x")
    for name, mode in (("read-only", 0o555), ("closed", 0)):
        (open_folder / name).mkdir(mode=mode)
    for name, code in {"file": 2, "read-only": 4, "closed": 4}.items():
        log = tmp_path / name
        process, _ = start(log, as_nobody, train_noise, open_folder / name / "run")
        process.join(timeout=600)
        (line,) = log.read_text().splitlines()
        assert process.exitcode == code and str(open_folder / name / "run") in line and len(line) < 300, line


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of TensorStore's threads, see `quiet`
@pytest.mark.parametrize("replaced", [False, True])
def test_F3_a_workdir_that_is_moved_away_during_the_run_ends_it_in_a_line(data, tmp_path, replaced):
    with pytest.raises(CheckpointError) as caught:
        for row in rotjax.train(rotjax.plan(rotjax.Rotation(**SMALL), data=data), tmp_path / "run", checkpoint_seconds=0.0):
            if row["step"] == 6:
                (tmp_path / "run").rename(tmp_path / "elsewhere")
                if replaced:
                    (tmp_path / "run").write_text("a file")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of TensorStore's threads, see `quiet`
@pytest.mark.parametrize(("step", "seconds"), [(4, 1e9), (6, 0.0), (12, 1e9)])
def test_F1_a_run_whose_workdir_became_another_run_s_leaves_that_one_alone(data, tmp_path, step, seconds):
    """Whether a row, a checkpoint or the summary is what it would write next."""
    workdir = tmp_path / "run"
    with ExitStack() as stack:
        with pytest.raises(CheckpointError) as caught:
            rows = rotjax.train(
                rotjax.plan(rotjax.Rotation(**SMALL), data=data), workdir, checkpoint_seconds=seconds, log_steps=2
            )
            for row in rows:
                if row["step"] == step and workdir.exists() and not (tmp_path / "elsewhere").exists():
                    while list(workdir.glob("checkpoints/*.unfinished")):  # Orbax writes to the path that it was given
                        time.sleep(0.01)
                    workdir.rename(tmp_path / "elsewhere")
                    other = rotjax.plan(rotjax.Rotation(**(SMALL | {"seed": 2})), data=data)
                    stack.enter_context(rotjax.workdirs.claimed(workdir, other.recipe, other.data, None))
                    stack.enter_context(rotjax.workdirs.metrics(workdir, 0))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
        assert sorted(path.name for path in workdir.rglob("*")) == [".lock", "data.json", "metrics.jsonl", "recipe.json"]
        assert (workdir / "metrics.jsonl").read_text() == ""
        with pytest.raises(InUseError):
            list(rotjax.train(other, workdir))


def fill(connection, workdir):
    """A command in which the disk is full after step 9: the soft limit stands for it."""

    def job():
        for row in rotjax.train(noise(), workdir, log_steps=1, checkpoint_seconds=1e9):
            if row["step"] == 9:
                size = (workdir / "metrics.jsonl").stat().st_size + 20
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return command.guarded(job)


def test_C4_a_disk_that_is_full_between_saves_ends_the_run_in_a_line(start, tmp_path):
    process, _ = start(tmp_path / "log", fill, tmp_path / "run")
    process.join(timeout=600)
    *_, compiling, line = (tmp_path / "log").read_text().splitlines()
    assert process.exitcode == 4 and compiling == "compiling the train step"
    assert line.startswith(f"rotjax: cannot write in {tmp_path / 'run'} (File too large); fix it") and len(line) < 300


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b/../..", ".", "..", "-rf", "a\0b", "x" * 300, "\u202e", "~/x/"])
def test_U3_no_name_leads_out_of_the_folder_of_runs(name):
    stem = rotjax.Rotation(dataset=name).resolved().name
    assert Path("runs", stem).parent == Path("runs") and stem.startswith("rotation-") and len(stem) < 120
    assert stem.isprintable() and "\0" not in stem


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


def load(workdir):
    return arrays(workdir), rotjax.load(workdir)[2].dtype


def test_C16_a_read_only_copy_of_a_workdir_is_enough_to_load(start, data, open_folder, tmp_path):
    carry_out(rotjax.Rotation(max_steps=1, dtype="bfloat16", **SMALL), data, tmp_path / "run")
    copy = shutil.copytree(tmp_path / "run", open_folder / "copy")
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    expected, _ = load(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    process, connection = start(tmp_path / "log", as_nobody, load, copy)
    try:
        found, dtype = connection.recv()
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert dtype == "bfloat16"
        process.join()
    finally:
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755)


FIXTURES = Path(__file__).parent / "fixtures"  # workdirs, each as that version left it


@pytest.mark.parametrize("archive", sorted(FIXTURES.iterdir()), ids=lambda path: path.name)
def test_C9_a_workdir_of_each_version_loads(tmp_path, archive):
    safely = {"filter": "data"} if sys.version_info >= (3, 12) else {}  # which not every 3.11 knows
    shutil.unpack_archive(archive, tmp_path, **safely)
    (workdir,) = tmp_path.iterdir()
    model, variables, recipe = rotjax.load(workdir)
    assert (recipe.job, recipe.width, recipe.classes) == ("classification", 2, ("a", "b", "c"))
    logits = model.apply(variables, np.arange(192, dtype=np.uint8).reshape(1, 8, 8, 3))
    np.testing.assert_allclose(logits, json.loads((workdir / "logits.json").read_text()), rtol=1e-4)


def test_C9_a_run_does_not_go_on_with_another_stream_of_batches(pretrained, data, monkeypatch):
    monkeypatch.setattr(rotjax.workdirs, "VERSION", 3)
    with pytest.raises(DataError, match=r"a rotjax that draws other crops \(stream 2, here 3\); finish it with that one"):
        carry_out(rotjax.Rotation(**SMALL), data, pretrained)
