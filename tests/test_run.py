"""Runs on disk: exact resume, transfer between workdirs, and what is refused."""

import dataclasses
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import pytest

import rotjax
from rotjax.errors import CheckpointError, DataError, InUseError, NonFiniteError, Stopped, UsageError

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


def test_R3_a_stopped_run_goes_on_to_the_same_bits(pretrained, data, tmp_path):
    plan = rotjax.plan(rotjax.Rotation(**SMALL), data=data)
    with pytest.raises(Stopped, match="stopped at step . of 12.*the same command goes on"):
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
    init_state = rotjax.training.init_state

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return init_state(*arguments)

    monkeypatch.setattr(rotjax.training, "init_state", interrupted)
    with pytest.raises(Stopped, match="stopped at step 0 of 12"):
        carry_out(rotjax.Rotation(**SMALL), data, tmp_path / "run")
    monkeypatch.setattr(rotjax.training, "init_state", init_state)
    carry_out(rotjax.Rotation(**SMALL), data, tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_text() == (pretrained / "metrics.jsonl").read_text()


def test_N1_what_is_not_finite_stops_the_run_and_keeps_the_last_sound_checkpoint(data, tmp_path):
    stream = []

    def poisoned(state, *rest):
        stream.append(int(state.step))
        return real(state, *rest)

    real = rotjax.checkpoints.save
    rotjax.checkpoints.save = poisoned
    try:
        with pytest.raises(NonFiniteError, match="not finite at step 1; lower the learning rate"):
            carry_out(rotjax.Rotation(learning_rate=1e30, **SMALL), data, tmp_path / "run", checkpoint_seconds=0.0)
    finally:
        rotjax.checkpoints.save = real
    assert stream == [] and not list((tmp_path / "run" / "checkpoints").iterdir())


def test_D6_a_run_does_not_go_on_with_other_data(pretrained, data):
    label = data.train["label"].copy()
    label[0] = 2
    others = [
        (dataclasses.replace(data, train=data.train | {"label": label}), "other images"),
        (dataclasses.replace(data, test={key: value[:9] for key, value in data.test.items()}), "test_images 11 -> 9"),
        (dataclasses.replace(data, classes=("a", "b", "d")), "classes"),
    ]
    before = {path: path.read_bytes() for path in pretrained.glob("*.json*")}
    for other, message in others:
        with pytest.raises(DataError, match=f"was started on other data .*{message}"):
            carry_out(rotjax.Rotation(**SMALL), other, pretrained)
    assert before == {path: path.read_bytes() for path in pretrained.glob("*.json*")}


def work(connection, workdir, checkpoint_seconds=0.0):
    """A run of 96 steps that tells its rows."""
    rng = np.random.default_rng(0)
    images = [{"image": rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), "label": np.zeros(n, int)} for n in (64, 8)]
    recipe = rotjax.Rotation(stem="cifar", width=4, batch_size=8, epochs=12)
    plan = rotjax.plan(recipe, data=rotjax.Dataset("noise", ("a",), *images))
    for row in rotjax.train(plan, workdir, log_steps=3, checkpoint_seconds=checkpoint_seconds):
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
        _, _, state = rotjax.run._build(plan)
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
    for _ in range(times):
        process, connection = start(os.devnull, work, workdir)
        with suppress(EOFError):  # where it came to its end
            for _ in range(rng.integers(1, 4)):
                connection.recv()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
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
        rows = rotjax.train(plan, tmp_path / "run", **options)
        for row in rows:
            if row["step"] == 4 and options["log_steps"] == 1:
                rows.close()
                break
    for a, b in zip(arrays(tmp_path / "run"), arrays(pretrained), strict=True):
        np.testing.assert_array_equal(a, b)


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


def test_an_epoch_of_a_subset_has_as_many_steps_as_of_the_whole(data, tmp_path):
    plan = rotjax.plan(rotjax.Classification(subset=3, **SMALL), data=data)
    assert len(plan.data.train["label"]) == 9 and plan.steps == 12
    assert summary_of(plan, tmp_path)["train_images"] == 9


def summary_of(plan, workdir):
    list(rotjax.train(plan, workdir / "run"))
    return summary(workdir / "run")


def test_the_mean_and_std_of_the_pixels_travel_with_the_backbone(data, tmp_path):
    own = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    carry_out(rotjax.Rotation(max_steps=1, **own, **SMALL), data, tmp_path / "run")
    plan = rotjax.plan(rotjax.Classification(pretrained=str(tmp_path / "run"), batch_size=8), data=data)
    assert plan.recipe.model().mean == own["mean"] and plan.recipe.model().std == own["std"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(backbone="densenet121"), UsageError, "--backbone=densenet121 contradicts .* resnet18; leave --backbone out"),
        (dict(stem="imagenet"), UsageError, "--stem=imagenet contradicts .* cifar"),
        (dict(batch_size=49), UsageError, "batch_size=49 is larger than the training set of 48"),
        (dict(subset=99), UsageError, "--subset=99 is more than the 16 images"),
        (dict(subset=2), UsageError, "batch_size=8 is larger than the training set of 6"),
        (dict(learning_rate=float("nan")), UsageError, "--learning_rate=nan"),
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
    (tmp_path / "recipe.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a recipe"):
        plan(tmp_path)
    recipe = rotjax.plan(rotjax.Rotation(**SMALL), data=data).recipe
    (tmp_path / "recipe.json").write_text(json.dumps(rotjax.recipe.to_json(recipe)))
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        plan(tmp_path)


def test_C10_a_recipe_of_a_later_rotjax_is_refused(data):
    values = rotjax.recipe.to_json(rotjax.plan(rotjax.Rotation(**SMALL), data=data).recipe)
    for later in ({"schema": 99}, {"colour": "blue"}):
        with pytest.raises(CheckpointError, match="here was written by a newer rotjax"):
            rotjax.recipe.from_json(values | later, "here")


@pytest.mark.parametrize(
    "value", [{"width": "x"}, {"stem": "foo"}, {"seed": None}, {"seed": -1}, {"classes": [1]}, {"mean": [0, 0]}, {"flip": 1}]
)
def test_C9_a_recipe_with_values_that_none_can_have_is_refused(data, value):
    values = rotjax.recipe.to_json(rotjax.plan(rotjax.Classification(**SMALL), data=data).recipe)
    with pytest.raises(CheckpointError, match=f"here is not a recipe: .*{next(iter(value))}"):
        rotjax.recipe.from_json(values | value, "here")


def test_C9_a_recipe_survives_its_json_and_an_older_one_is_completed(data):
    recipe = rotjax.plan(rotjax.Classification(subset=3, **SMALL), data=data).recipe
    values = json.loads(json.dumps(rotjax.recipe.to_json(recipe)))
    assert rotjax.recipe.from_json(values, "here") == recipe
    del values["flip"]
    assert rotjax.recipe.from_json(values, "here") == recipe


def test_C7_a_workdir_of_another_recipe_is_refused(pretrained, data):
    with pytest.raises(UsageError, match=r"holds another run \(seed 1 -> 2\)"):
        carry_out(rotjax.Rotation(**(SMALL | {"seed": 2})), data, pretrained)


def test_F2_a_folder_of_something_else_is_refused(data, tmp_path):
    (tmp_path / "photo.jpg").write_text("precious")
    with pytest.raises(UsageError, match="not empty and holds no run"):
        carry_out(rotjax.Rotation(**SMALL), data, tmp_path)
    with pytest.raises(UsageError, match="is a file; name another workdir"):
        carry_out(rotjax.Rotation(**SMALL), data, tmp_path / "photo.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_F1_a_workdir_in_use_is_refused(pretrained, data):
    plan = rotjax.plan(rotjax.Rotation(**SMALL), data=data)
    with (
        rotjax.workdirs.claimed(pretrained, plan.recipe, plan.data),
        pytest.raises(InUseError, match=f"in use by process {os.getpid()}"),
    ):
        list(rotjax.train(plan, pretrained))


def test_F1_the_lock_of_a_process_that_died_is_taken_over(data, tmp_path):
    carry_out(rotjax.Rotation(max_steps=2, **SMALL), data, tmp_path / "run")
    (tmp_path / "run" / ".lock").write_text("process 1 on elsewhere\n")
    (tmp_path / "run" / "summary.json").unlink()
    carry_out(rotjax.Rotation(max_steps=2, **SMALL), data, tmp_path / "run")
    assert summary(tmp_path / "run")["resumed_from"] == 2


def test_F3_a_workdir_that_cannot_be_made_is_refused_before_anything_compiles(data, tmp_path, notes):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file/run cannot be written"):
        carry_out(rotjax.Rotation(**SMALL), data, tmp_path / "file" / "run")
    assert notes == []


def test_F3_a_workdir_that_is_moved_away_during_the_run_ends_it_in_a_line(data, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        for row in rotjax.train(rotjax.plan(rotjax.Rotation(**SMALL), data=data), tmp_path / "run", checkpoint_seconds=0.0):
            if row["step"] == 6:
                (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b/../..", ".", "..", "-rf", "a\0b", "x" * 300, "\u202e", "~/x/"])
def test_U3_no_name_leads_out_of_the_folder_of_runs(name):
    stem = rotjax.Rotation(dataset=name).resolved().name
    assert Path("runs", stem).parent == Path("runs") and stem.startswith("rotation-") and len(stem) < 120
    assert stem.isprintable() and "\0" not in stem


def test_images_without_classes_are_enough_for_rotation_only(data):
    bare = {"image": data.train["image"], "label": np.full(48, -1, np.int32)}
    unlabelled = rotjax.Dataset("noise", (), bare, bare)
    assert rotjax.plan(rotjax.Rotation(**SMALL), data=unlabelled).steps == 12
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
        (np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 2, 1]), "label 2 of image 2"),
    ],
)
def test_D5_arrays_that_no_network_can_use_are_refused(image, label, message):
    arrays = {"image": image, "label": label}
    with pytest.raises(DataError, match=message):
        rotjax.Dataset("mine", ("a", "b"), arrays, arrays)


def test_C16_loading_needs_only_the_workdir(pretrained, tmp_path):
    moved = tmp_path / "moved"
    Path(pretrained).rename(moved)
    try:
        assert dataclasses.is_dataclass(rotjax.load(moved)[2])
    finally:
        moved.rename(pretrained)
