"""Checkpoints that are damaged, unfinished, strange or do not fit are never taken for sound ones."""

import dataclasses
import errno
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore

from rotjax import checkpoints, manifests
from rotjax.errors import CheckpointError, DesertedError, NonFiniteError, UsageError
from rotjax.files import digest
from rotjax.state import TrainState, init_state, no_sums


def state(step, value=0.0):
    """A state small enough to be saved a hundred times."""
    numbers = jnp.arange(300.0) + value
    variables = {"params": {"backbone": {"kernel": numbers}, "head": {"kernel": numbers[:7]}}}
    sums = {"loss": jnp.zeros(()), "bad_step": jnp.zeros((), jnp.int32)}
    return TrainState(jnp.array(step, jnp.int32), variables, {"mu": numbers * 2}, sums)


def saved(directory, *steps):
    with checkpoints.open_checkpoints(directory) as opened:
        for step in steps:
            checkpoints.save(opened, state(step, step))
    return directory


def restored(directory):
    step = checkpoints.newest(directory)
    return checkpoints.restore(directory, step, state(0))


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_folder_may_be_a_string(tmp_path):
    folder = str(tmp_path / "checkpoints")
    equal(restored(saved(folder, 3)), state(3, 3))
    assert checkpoints.latest_step(folder) == 3


def test_C12_the_newest_two_are_kept_and_the_newest_restored(tmp_path, notes):
    saved(tmp_path, 1, 2, 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "2.json", "30", "30.json"]
    equal(restored(tmp_path), state(30, 30))
    assert notes == []


def test_C6_a_step_that_is_saved_is_not_saved_again(tmp_path):
    saved(tmp_path, 5)
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    saved(tmp_path, 5)
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path)} == before


def test_C1_a_flipped_bit_anywhere_is_noticed(tmp_path, notes, record_property):
    record_property("trials", 60)
    saved(tmp_path, 1, 2)
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    rng = np.random.default_rng(seed)
    everything = files(tmp_path / "2")
    for number in range(60):
        path = everything[number % len(everything)]
        content = bytearray(path.read_bytes())
        if not content:
            continue
        sound = bytes(content)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        notes.clear()
        equal(restored(tmp_path), state(1, 1))
        (line,) = notes
        assert f"checkpoint 2 in {tmp_path} is damaged ({path.relative_to(tmp_path / '2')}" in line
        assert line.endswith("trying step 1") and len(line) < 300
        path.write_bytes(sound)
    equal(restored(tmp_path), state(2, 2))


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), os.unlink, lambda path: os.truncate(path, 1)])
def test_C2_files_that_are_cut_or_gone_are_noticed(tmp_path, damage):
    saved(tmp_path / "sound", 1, 2)
    for path in files(tmp_path / "sound" / "2"):
        if path.stat().st_size < 2:
            continue
        copy = shutil.copytree(tmp_path / "sound", tmp_path / "copy", dirs_exist_ok=True)
        damage(copy / path.relative_to(tmp_path / "sound"))
        assert checkpoints.newest(copy) == 1
        shutil.rmtree(copy)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', "null", "[" * 10_000, '{"../../etc/passwd": ""}'])
def test_C2_a_list_of_files_that_is_none_is_noticed(tmp_path, content):
    saved(tmp_path, 1, 2)
    (tmp_path / "2.json").write_text(content)
    assert checkpoints.newest(tmp_path) == 1


def test_C2_stray_files_and_links_are_noticed(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "2" / "stray").write_text("x")
    assert checkpoints.newest(tmp_path) == 1
    (tmp_path / "2" / "stray").unlink()
    target = files(tmp_path / "2")[0]
    moved = target.rename(tmp_path / "elsewhere")
    target.symlink_to(moved)
    assert checkpoints.newest(tmp_path) == 1


def test_C1_none_left_is_an_error_and_nothing_is_removed(tmp_path):
    saved(tmp_path, 1)
    (files(tmp_path / "1")[0]).write_bytes(b"x")
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match="checkpoint 1 in .* is damaged .* no older one is left; remove") as caught:
        checkpoints.newest(tmp_path)
    assert len(str(caught.value)) < 300 and files(tmp_path) == before


@pytest.mark.parametrize("then", [(3,), (2, 3), (2, 4)])
def test_C1_a_damaged_step_is_saved_anew_and_does_not_outlive_a_newer_one(tmp_path, then):
    """Whichever steps the run saves that goes on from the last sound one."""
    saved(tmp_path, 1, 3)
    files(tmp_path / "3")[0].write_bytes(b"x")
    saved(tmp_path, *then)
    equal(restored(tmp_path), state(then[-1], then[-1]))
    assert all(not manifests.damage(tmp_path, step) for step in manifests.steps(tmp_path))


def test_a_sound_checkpoint_that_is_newer_is_kept_and_the_older_state_refused(tmp_path):
    saved(tmp_path, 3, 4)
    with pytest.raises(CheckpointError, match="holds step 4, so step 2 is not saved there; name another workdir"):
        saved(tmp_path, 2)
    assert manifests.steps(tmp_path) == [4, 3] and not manifests.unfinished(tmp_path)


def test_C3_what_is_only_named_like_a_step_is_left_alone(tmp_path, notes):
    saved(tmp_path, 3)
    for name in ("7", "007", "99999999999999999999", "-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "8").write_text("a file")
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "-2.json").write_text("{}")
    (tmp_path / "99999999999999999999.json").write_text("{}")
    equal(restored(tmp_path), state(3, 3))
    (line,) = notes
    assert "no checkpoints for want of a list of their files, left alone: 007, 7, 8" in line
    saved(tmp_path, 4, 5)
    assert {"7", "007", "8", "-1"} <= {path.name for path in tmp_path.iterdir()}
    equal(restored(tmp_path), state(5, 5))


@pytest.mark.parametrize("make", [os.mkdir, lambda path: path.write_text("mine"), lambda path: path.symlink_to("3")])
def test_C3_nothing_is_saved_over_what_was_not_saved_here(tmp_path, make):
    saved(tmp_path, 3)
    make(tmp_path / "7")
    with pytest.raises(CheckpointError, match="7 is in the place of step 7, and was not saved here; move it away"):
        saved(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "3.json", "7"]
    (tmp_path / "7").rename(tmp_path / "mine")
    saved(tmp_path, 7)
    equal(restored(tmp_path), state(7, 7))


@pytest.mark.parametrize("left", ["5.orbax-checkpoint-tmp", "5"])
def test_R2_what_an_unfinished_save_left_is_cleared_away(tmp_path, left):
    saved(tmp_path, 3)
    (tmp_path / left).mkdir()
    (tmp_path / left / "data").write_text("half")
    (tmp_path / "5.unfinished").touch()
    assert checkpoints.newest(tmp_path) == 3
    with checkpoints.open_checkpoints(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "3.json"]
    saved(tmp_path, 5)
    equal(restored(tmp_path), state(5, 5))


KILLED = """
import os, sys
from pathlib import Path
from rotjax import checkpoints, manifests
sys.path.insert(0, sys.argv[3])
from test_checkpoints import saved, state
die = lambda *_, **__: os.kill(os.getpid(), 9)
def after(function):
    return lambda *a, **k: (function(*a, **k), die())
place = sys.argv[2]
if place == "before the write": checkpoints.ocp.save_checkpointables_async = die
elif place == "in the write": checkpoints._finish = die
elif place == "before the list": manifests.files = die
elif place == "before it counts": Path.rename = die
elif place == "once it counts": Path.rename = after(Path.rename)
elif place == "in a removal": manifests.shutil.rmtree = die
else: raise SystemExit(3)
saved(Path(sys.argv[1]), 3)
"""


@pytest.mark.parametrize(
    ("place", "left"),
    [
        ("before the write", 2),
        ("in the write", 2),
        ("before the list", 2),
        ("before it counts", 2),
        ("once it counts", 3),
        ("in a removal", 3),
    ],
)
def test_R2_killed_at_each_point_of_a_save(tmp_path, place, left):
    killed(tmp_path, place)
    assert checkpoints.newest(tmp_path) == left
    equal(restored(tmp_path), state(left, left))
    saved(tmp_path, 3, 4)
    equal(restored(tmp_path), state(4, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "3.json", "4", "4.json"]


def test_R2_killed_where_a_damaged_step_is_to_be_saved_again(tmp_path, monkeypatch):
    saved(tmp_path, 3)
    next(path for path in (tmp_path / "3").rglob("*") if path.is_file()).write_bytes(b"")
    unlink = Path.unlink

    def dies(path, **options):
        unlink(path, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", dies)
        manifests.begin(tmp_path, 3)
    saved(tmp_path, 3)
    equal(restored(tmp_path), state(3, 3))


def test_C12_killed_while_an_old_one_is_removed_two_sound_ones_are_left(tmp_path):
    killed(tmp_path, "in a removal")
    assert manifests.steps(tmp_path) == [3, 2] and not any(manifests.damage(tmp_path, step) for step in (3, 2))


def killed(tmp_path, place):
    """Steps 1 and 2, and of 3 what a process leaves that is killed at a place of its save."""
    saved(tmp_path, 1, 2)
    words = [sys.executable, "-c", KILLED, str(tmp_path), place, os.path.dirname(__file__)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr


def test_C4_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match=r"no room to save step 2 in .*: 2\.7 kB are needed, 0\.0 kB free; make"):
        saved(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "1.json"]


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoints import saved
from experiments import command
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
raise SystemExit(command.guarded(lambda: saved(Path(sys.argv[1]), 2)))
"""


def test_C4_a_disk_that_fills_during_a_save_leaves_the_earlier_ones(tmp_path):
    saved(tmp_path, 1)
    words = [sys.executable, "-c", LIMITED, str(tmp_path), os.path.dirname(__file__)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert line.startswith("rotjax: step 2 was not saved in ") and "kB are needed" in line and len(line) < 300
    assert done.returncode == 4
    with checkpoints.open_checkpoints(tmp_path):  # clears away what was still being written
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "1.json"]
    equal(restored(tmp_path), state(1, 1))


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE])
def test_C17_checkpoints_that_cannot_be_listed_are_not_taken_for_none(tmp_path, monkeypatch, number):
    saved(tmp_path, 1)

    def fails(*arguments):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", fails)
        for look in (checkpoints.newest, checkpoints.latest_step):
            with pytest.raises(CheckpointError, match=f"cannot be read .{os.strerror(number)}.; name another workdir$"):
                look(tmp_path)
        with pytest.raises(CheckpointError, match="cannot be written"), checkpoints.open_checkpoints(tmp_path):
            pass
    with checkpoints.open_checkpoints(tmp_path) as opened, monkeypatch.context() as patched:
        patched.setattr(os, "listdir", fails)
        with pytest.raises(CheckpointError, match=f"step 2 was not saved .*{os.strerror(number)}; fix it, the same command"):
            checkpoints.save(opened, state(2))
    equal(restored(tmp_path), state(1, 1))


def test_C12_a_damaged_step_takes_the_place_of_no_sound_one(tmp_path, notes):
    saved(tmp_path, 1, 2)
    files(tmp_path / "2")[0].write_text("damaged")
    saved(tmp_path, 3)
    files(tmp_path / "3")[0].write_text("damaged")
    equal(restored(tmp_path), state(1, 1))
    assert notes[-1].endswith("trying step 1")
    saved(tmp_path, 4, 5)
    assert manifests.steps(tmp_path) == [5, 4]


def test_C12_a_step_that_cannot_be_read_at_present_is_not_removed(tmp_path, monkeypatch):
    saved(tmp_path, 1)

    def fails(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    with checkpoints.open_checkpoints(tmp_path) as opened, monkeypatch.context() as patched:
        patched.setattr(manifests, "read_json", fails)
        checkpoints.save(opened, state(2))
        checkpoints.wait(opened)
    assert manifests.steps(tmp_path) == [2, 1]


def test_C4_what_is_still_written_of_a_save_that_failed_is_cleared_away_later(tmp_path, monkeypatch):
    """One part failed, while Orbax goes on with the others."""
    saved(tmp_path, 1)
    clear = manifests.clear

    def cleared(directory, step):
        clear(directory, step)
        (directory / f"{step}.orbax-checkpoint-tmp" / "head").mkdir(parents=True)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match=r"step 2 was not saved .*: No space left"):
        patched.setattr(manifests, "clear", cleared)
        patched.setattr(manifests, "finish", full)
        saved(tmp_path, 2)
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists() and checkpoints.newest(tmp_path) == 1
    with checkpoints.open_checkpoints(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "1.json"]


def test_a_step_is_saved_also_where_an_older_one_cannot_be_removed(tmp_path, monkeypatch, notes):
    saved(tmp_path, 1, 2)

    def fails(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(manifests, "remove", fails)
        saved(tmp_path, 3)
    assert notes == [f"step 3 is saved in {tmp_path}, but an older one cannot be removed (Input/output error)"]
    equal(restored(tmp_path), state(3, 3))


@pytest.mark.parametrize("place", ["together", "save_checkpointables_async"])
def test_P3_a_process_that_is_lost_in_a_save_is_not_taken_for_a_fault_of_the_disk(tmp_path, monkeypatch, place):
    owner = {"together": checkpoints.processes, "save_checkpointables_async": checkpoints.ocp}[place]

    def broken(*arguments, **options):
        raise ValueError("UNAVAILABLE: Gloo connection closed by peer")

    monkeypatch.setattr(checkpoints.processes, "alone", lambda: False)
    monkeypatch.setattr(checkpoints.processes, "highest", int)
    with (
        pytest.raises(DesertedError, match="another process of this run is gone"),
        checkpoints.processes.deserted(),
        checkpoints.open_checkpoints(tmp_path) as opened,
    ):
        monkeypatch.setattr(owner, place, broken)
        checkpoints.save(opened, state(1))


def test_C13_values_that_are_not_finite_are_refused(tmp_path):
    saved(tmp_path, 1)
    with checkpoints.open_checkpoints(tmp_path) as opened:
        checkpoints.save(opened, state(2, np.nan))
    with pytest.raises(CheckpointError, match="step 2 in .* holds values that are not finite"):
        restored(tmp_path)


def test_C13_a_state_that_training_spoilt_takes_the_place_of_no_other(tmp_path):
    saved(tmp_path, 1, 2)
    bad = dataclasses.replace(state(3), sums=state(3).sums | {"bad_step": jnp.int32(3)})
    with checkpoints.open_checkpoints(tmp_path) as opened, pytest.raises(NonFiniteError, match="not finite at step 3"):
        checkpoints.save(opened, bad)
    assert sorted(manifests.steps(tmp_path)) == [1, 2]


@pytest.mark.parametrize("abstract", [jax.device_get, lambda given: jax.eval_shape(lambda: given), lambda given: given])
def test_C18_any_network_and_optimizer_are_restored_as_they_were_saved(tmp_path, abstract):
    """Parts of other names, an infinity to begin with, a key of JAX's; into arrays or shapes, on the host or on devices."""
    params = {name: {"kernel": jnp.arange(3.0) + number} for number, name in enumerate(("trunk", "projector", "out"))}
    others = {"batch_stats": {"trunk": {"mean": jnp.zeros(3)}}, "losses": {}, "keys": {"trunk": jax.random.key(7)}}
    optimizer = optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.adam(1e-3), optax.contrib.reduce_on_plateau())
    state = TrainState(jnp.int32(0), {"params": params} | others, optimizer.init(params), no_sums())
    assert any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state))
    assert np.isinf(jax.tree.leaves(state.opt_state[2])).any()
    with checkpoints.open_checkpoints(tmp_path) as opened:
        checkpoints.save(opened, state)
    again = checkpoints.restore(tmp_path, 0, abstract(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for one, other in zip(*map(jax.tree.leaves, (again, state)), strict=True):
        assert one.dtype == other.dtype and bool((one == other).all())


@pytest.mark.parametrize("name", ["optimizer", "metrics"])
def test_a_part_of_the_network_called_as_one_of_checkpoints_is_refused(tmp_path, name):
    optimizer = optax.sgd(1.0)
    with checkpoints.open_checkpoints(tmp_path) as opened, pytest.raises(UsageError, match=f"{name}, .*another name$"):
        checkpoints.save(opened, init_state(optimizer, {"params": {name: jnp.zeros(1)}}))
    assert not [*tmp_path.iterdir()]


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # Orbax's, of the other parts
@pytest.mark.parametrize("optimizer", [optax.sgd(1.0), optax.adam(1.0)])
def test_C7_another_optimizer_is_refused_in_a_line(tmp_path, optimizer):
    variables = {"params": {"head": jnp.zeros(3)}}
    with checkpoints.open_checkpoints(tmp_path) as opened:
        checkpoints.save(opened, init_state(optax.lion(1.0), variables))
    with pytest.raises(CheckpointError, match="structures do not match.* the optimizer that it was saved with$") as caught:
        checkpoints.restore(tmp_path, 0, init_state(optimizer, variables))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    del caught
    gc.collect()


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # Orbax's, of the other parts
def test_C7_other_shapes_and_names_are_refused_in_a_line(tmp_path):
    saved(tmp_path, 1)
    other = state(0)
    other.variables["params"]["backbone"] = {"kernel": jnp.zeros((2, 2))}
    with pytest.raises(CheckpointError, match="step 1 in .* cannot be loaded") as caught:
        checkpoints.restore(tmp_path, 1, other)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    del caught
    gc.collect()


def test_C7_another_dtype_is_refused_rather_than_converted(tmp_path):
    halved = state(1)
    halved.variables["params"]["head"]["kernel"] = halved.variables["params"]["head"]["kernel"].astype(jnp.bfloat16)
    with checkpoints.open_checkpoints(tmp_path) as opened:
        checkpoints.save(opened, halved)
    with pytest.raises(CheckpointError, match="step 1 in .* holds bfloat16, not float32"):
        restored(tmp_path)


def relist(directory, step):
    """Lists the files of a step as they are: a forger would."""
    folder = directory / str(step)
    listed = {path: digest(folder / path) for path in manifests.files(folder)}
    (directory / f"{step}.json").write_text(json.dumps(listed))


def forge(tmp_path, lie):
    """A checkpoint of step 1 that `lie`s, with a list of files that covers it."""
    saved(tmp_path, 1)
    metadata, canary = tmp_path / "1" / "backbone" / "_METADATA", tmp_path / "canary"
    known = json.loads(metadata.read_text())
    tree = known["tree_metadata"]
    if lie == "shape":
        store = {"driver": "ocdbt", "base": f"file://{tmp_path}/1/backbone/", "path": "params.kernel/"}
        spec = {"driver": "zarr", "kvstore": store, "metadata": {"chunks": [300], "dtype": "<f4", "shape": [2**60]}}
        tensorstore.open(spec, create=True, delete_existing=True).result()
    elif lie == "description":
        for path in (metadata, *metadata.parent.glob("array_metadatas/*")):
            assert "300" in path.read_text(), path
            path.write_text(path.read_text().replace("300", str(2**60)))
    elif lie == "names":
        known["tree_metadata"] = {key.replace("kernel", "../../../kernel"): value for key, value in tree.items()}
        metadata.write_text(json.dumps(known))
    elif lie == "keys":
        value = next(iter(tree.values()))
        tree.update({f"('params', '{number}')": value for number in range(100_000)})
        metadata.write_text(json.dumps(known))
    else:
        forged = b"cposix\nsystem\n(S'touch " + bytes(canary) + b"'\ntR."
        for path in files(tmp_path / "1"):
            path.write_bytes(forged)
    relist(tmp_path, 1)


def open_forged(connection, directory):
    """Restores step 1 with a gigabyte of memory left; sends what comes of it."""
    like = state(0)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
    try:
        equal(checkpoints.restore(directory, 1, like), state(1, 1))
        connection.send("as it was saved")
    except CheckpointError as error:
        connection.send(str(error))


REFUSED = "step 1 in {} cannot be loaded ("


@pytest.mark.parametrize(
    ("lie", "outcome"),
    [("shape", REFUSED), ("pickle", REFUSED), *((lie, "as it was saved") for lie in ("description", "names", "keys"))],
)
def test_C14_content_that_lies_neither_allocates_nor_runs(start, tmp_path, lie, outcome):
    """It is refused; but what only describes the arrays is not looked at."""
    forge(tmp_path / "checkpoints", lie)
    process, connection = start(tmp_path / "log", open_forged, tmp_path / "checkpoints")
    said = connection.recv()
    process.join()
    assert said.startswith(outcome.format(tmp_path / "checkpoints")) and len(said) < 300, said
    assert process.exitcode == 0 and {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "1.json"}


@pytest.mark.parametrize("name", ["..", ".", "notes", "-1", "07", "\u0663", ""])
def test_C14_a_marker_that_names_no_step_clears_nothing_away(tmp_path, name):
    directory = tmp_path / "run" / "checkpoints"
    saved(directory, 3)
    for path in (tmp_path / "run" / "recipe.json", directory / "notes" / "mine", directory / f"{name}.unfinished"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with checkpoints.open_checkpoints(directory):
        assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_C16_a_copy_elsewhere_restores(tmp_path):
    saved(tmp_path / "here", 1, 2)
    there = shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    equal(restored(there), state(2, 2))


def test_the_list_holds_every_file(tmp_path):
    saved(tmp_path, 1)
    listed = json.loads((tmp_path / "1.json").read_text())
    assert {tmp_path / "1" / path for path in listed} == set(files(tmp_path / "1"))
