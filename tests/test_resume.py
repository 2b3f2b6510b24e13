"""Runs that are stopped, killed or broken off end with the bits of those that nobody disturbs."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import time
from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotjax
from experiments import command
from rotjax.errors import CheckpointError, DataError, Stopped, UsageError
from tests.runs import SMALL, arrays, carry_out, noise, summary, thin, work


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


def undisturbed(start, workdir, *options):
    """Waits for a run of 96 steps."""
    process, connection = start(os.devnull, work, workdir, *options)
    with suppress(EOFError):
        while connection.recv():
            pass
    process.join()
    assert process.exitcode == 0


@thin()
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


@thin()
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


@thin()
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


def test_C9_a_run_does_not_go_on_with_another_stream_of_batches(pretrained, data, monkeypatch):
    monkeypatch.setattr(rotjax.workdirs, "VERSION", 3)
    with pytest.raises(DataError, match=r"a rotjax that draws other crops \(stream 2, here 3\); finish it with that one"):
        carry_out(rotjax.Rotation(**SMALL), data, pretrained)
