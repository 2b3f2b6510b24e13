"""The folder of a run: whose it is, who holds it, where it lies, and what is loaded from it."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import rotjax
from experiments import command
from rotjax import locks
from rotjax.errors import CheckpointError, DataError, InUseError, UsageError
from tests.runs import SMALL, arrays, carry_out, noise, thin, work


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
    with thin(), closing(rotjax.train(noise(), tmp_path / "run", log_steps=3)) as running:
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


def unwritten(workdir):
    """Waits until no save is under way: Orbax writes to the path that it was given, and makes its folders."""
    while list(workdir.glob("checkpoints/*.unfinished")):
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of TensorStore's threads, see `quiet`
@pytest.mark.parametrize("replaced", [False, True])
def test_F3_a_workdir_that_is_moved_away_during_the_run_ends_it_in_a_line(data, tmp_path, replaced):
    with pytest.raises(CheckpointError) as caught:
        for row in rotjax.train(rotjax.plan(rotjax.Rotation(**SMALL), data=data), tmp_path / "run", checkpoint_seconds=0.0):
            if row["step"] == 6:
                unwritten(tmp_path / "run")
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
                    unwritten(workdir)
                    workdir.rename(tmp_path / "elsewhere")
                    other = rotjax.plan(rotjax.Rotation(**(SMALL | {"seed": 2})), data=data)
                    stack.enter_context(rotjax.workdirs.claimed(workdir, other.recipe, other.data, None))
                    stack.enter_context(rotjax.workdirs.metrics(workdir, 0))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
        assert sorted(path.name for path in workdir.rglob("*")) == [".lock", "data.json", "metrics.jsonl", "recipe.json"]
        assert (workdir / "metrics.jsonl").read_text() == ""
        with pytest.raises(InUseError):
            list(rotjax.train(other, workdir))


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
