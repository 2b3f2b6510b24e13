"""Two processes that talk over loopback do what one does; where one of them stops or dies, no work is lost."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import rotjax
from experiments import command
from rotjax import checkpoints, parallel, processes
from rotjax.data.augmentation import train_view
from rotjax.data.batches import train_picks
from rotjax.errors import DesertedError, UsageError
from rotjax.feed import Feed

RECIPE = rotjax.Rotation(stem="cifar", width=4, batch_size=8, epochs=2)


def arrays(count):
    rng = np.random.default_rng(count)
    return {"image": rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), "label": np.arange(count, dtype=np.int32)}


def plan():
    names = tuple(str(number) for number in range(64))
    return rotjax.plan(RECIPE, data=rotjax.Dataset("noise", names, arrays(64), arrays(11)))


def first_step(folder):
    """Leaves what this process read, and what the step made of all that was read."""
    data, mesh, model = arrays(64), parallel.data_mesh(), rotjax.create("resnet18", 4, "cifar", width=4)
    batch = rotjax.train_batches(data, rotjax.random_turn, 32, 2, seed=0)[1]
    seen = rotjax.train_batches(data, rotjax.classify, 32, 2, seed=0)
    optimizer = optax.sgd(1.0)  # what a step takes off the parameters is their gradient
    state = rotjax.init_state(optimizer, rotjax.init_variables(model, 0, 8))
    before = jax.tree.map(np.array, state.variables["params"])
    state, metrics = rotjax.train_step(model, optimizer)(state, *rotjax.place([batch]))
    gradients = jax.tree.map(lambda a, b: a - np.asarray(b), before, state.variables["params"])
    tests = rotjax.eval_batches(data, rotjax.all_turns, 24)
    scores = rotjax.evaluate(rotjax.eval_step(model), state.variables, rotjax.place(rotjax.read(tests)))
    feed, view = Feed("device", 1, 0), partial(train_view, task=rotjax.random_turn, flip=True)
    stream = feed.stream(train_picks(64, 32, 2, seed=0), view, feed.put(data, mesh))
    made = jax.jit(stream.make)(stream.data, *rotjax.place([stream.elements[1]]))["image"].addressable_data(0)
    found = {"loss": metrics["loss"], "gradient": gradients, "statistic": state.variables["batch_stats"]}
    found |= {"label": np.concatenate([seen[t]["label"] for t in range(2)]), "pixels": batch["image"], "made": made}
    found["score"] = scores
    if not processes.alone():
        with pytest.raises(UsageError, match="^batch_size=33 cannot be shared among 2 devices; use 32"):
            rotjax.train_batches(data, rotjax.random_turn, 33, 2, seed=0)
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
    np.savez(folder / f"{jax.process_index()}.npz", **flat)


def run(connection, workdir, pause=0):
    """A whole run; or one that saves at every row, and whose second process waits after that of step `pause`."""
    seconds = 0.0 if pause else 1e9
    for row in rotjax.train(
        plan(), workdir, log_steps=2, checkpoint_seconds=seconds, augment="device", steps_per_dispatch=2
    ):
        if row["step"] == pause and not processes.primary():
            connection.send(pause)
            connection.recv()


def differ(connection, workdir, name):
    """A run for which each process has a seed of its own, or the first alone is told where to make batches."""
    seed, told = (jax.process_index(), None) if name == "recipe" else (0, ("device", None)[jax.process_index()])
    own = dataclasses.replace(plan(), recipe=dataclasses.replace(plan().recipe, seed=seed))
    list(rotjax.train(own, workdir, augment=told))


def step_and_run(connection, folder):
    """Both, since to start a process takes longer than either; one is late, as where the other finds its images decoded."""
    time.sleep(0 if processes.primary() else 35)
    first_step(folder)
    run(connection, folder / "run")


def join(connection, address, number, function, *arguments):
    """Does `function` as process `number` of two, which leave as at the end of a command; returns its exit code."""
    named = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)}
    os.environ.update(named)
    code = command.guarded(lambda: (processes.join(), function(connection, *arguments)))
    jax.distributed.shutdown()  # for JAX does it at the exit of a process, of which a fork knows nothing
    return code


@pytest.fixture(scope="module")
def pair(start, tmp_path_factory):
    """`pair(function, *arguments)`: two processes that do it, a connection to the second, and what tells how they ended."""

    def pair(function, *arguments):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        logs = [tmp_path_factory.mktemp("log") / "log" for _ in range(2)]
        started = [start(log, join, address, number, function, *arguments) for number, log in enumerate(logs)]

        def ends():
            for process, _ in started:
                process.join(timeout=300)  # of which 35 s are waited for on purpose; a busy machine compiles for minutes
            lines = [log.read_text().splitlines()[-1:] for log in logs]
            return [(process.exitcode, *line) for (process, _), line in zip(started, lines, strict=True)]

        return [process for process, _ in started], started[1][1], ends

    return pair


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """What two processes that nobody disturbs leave: of the first step, and in `run` of a run."""
    folder = tmp_path_factory.mktemp("whole")
    _, _, ends = pair(step_and_run, folder)
    assert [code for code, _ in ends()] == [0, 0], ends()
    return folder


@pytest.fixture(scope="module")
def stopped(pair, tmp_path_factory):
    """A run of which one process got SIGTERM after step 4, and how both ended."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    (_, second), connection, ends = pair(run, workdir, 4)
    assert connection.recv() == 4
    second.terminate()
    connection.send("go on")
    return workdir, ends()


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def state(workdir):
    state = rotjax.run._build(plan())[2]()
    return checkpoints.restore(workdir / "checkpoints", checkpoints.newest(workdir / "checkpoints"), state)


def test_P2_two_processes_agree_with_one_and_share_each_batch(whole, tmp_path):
    first_step(tmp_path)
    one, *two = (dict(np.load(path)) for path in (tmp_path / "0.npz", whole / "0.npz", whole / "1.npz"))
    np.testing.assert_array_equal(np.concatenate([part["['pixels']"] for part in two]), one["['pixels']"])
    for part in (one, *two):
        np.testing.assert_array_equal(part["['made']"], part["['pixels']"])
    assert sorted(np.concatenate([part["['label']"] for part in two])) == list(range(64))
    np.testing.assert_array_equal(two[0]["['score']['confusion']"].sum(1), [64] * 4)
    for name in one.keys() - {"['pixels']", "['made']", "['label']"}:
        np.testing.assert_array_equal(two[0][name], two[1][name])
        scale = max(abs(one[name]).max(), 1e-6)
        assert abs(one[name] - two[0][name]).max() / scale < (1e-4 if "gradient" in name else 1e-5), name


@pytest.mark.parametrize("name", ["recipe", "augment"])
def test_P2_processes_that_were_started_on_different_flags_are_refused(pair, tmp_path, name):
    _, _, ends = pair(differ, tmp_path / "run", name)
    said = f"rotjax: the processes of this run differ in their {name}; start all with the same flags and data"
    assert ends() == [(2, said)] * 2 and not (tmp_path / "run").exists()


def test_P5_a_signal_to_one_of_two_processes_stops_both_at_one_step(stopped):
    workdir, ends = stopped
    assert ends == [(75, f"rotjax: stopped at step 4 of 16, saved in {workdir}; the same command resumes")] * 2
    assert checkpoints.newest(workdir / "checkpoints") == 4 and rows(workdir)[-1]["step"] == 4


@pytest.mark.parametrize("victim", [0, 1])
def test_P3_one_of_two_processes_is_killed_and_both_restarted(pair, stopped, whole, tmp_path, victim):
    workdir = shutil.copytree(stopped[0], tmp_path / "run")
    processes, connection, ends = pair(run, workdir, 10)
    assert connection.recv() == 10
    processes[victim].kill()
    if victim == 0:
        connection.send("go on")
    killed = time.monotonic()
    code, line = ends()[1 - victim]
    assert time.monotonic() - killed < rotjax.processes.PATIENCE + 120  # within a minute, where nothing else is computed
    assert code == 75 and "another process of this run is gone" in line and "start all again" in line and len(line) < 300
    _, _, ends = pair(run, workdir)
    assert [code for code, _ in ends()] == [0, 0], ends()
    assert json.loads((workdir / "summary.json").read_text())["resumed_from"] > 4
    assert rows(workdir) == rows(whole / "run")
    jax.tree.map(np.testing.assert_array_equal, state(workdir), state(whole / "run"))


def test_P4_a_checkpoint_of_two_processes_goes_on_in_one(stopped, whole, tmp_path):
    workdir = shutil.copytree(stopped[0], tmp_path / "run")
    assert optax.tree.norm([x for x in jax.tree.leaves(state(workdir).opt_state) if x.ndim]) > 0  # the moments came along
    with closing(rotjax.train(plan(), workdir, log_steps=2)) as running:
        row = next(running)
    (same,) = (row for row in rows(whole / "run") if row["step"] == 6)
    assert row["step"] == 6 and row["loss"] == pytest.approx(same["loss"], rel=0.02)


def test_processes_that_nobody_names_are_asked_for():
    line = [sys.executable, "-c", "from experiments.command import *; from rotjax import processes; guarded(processes.join)"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "OMPI", "KUBERNETES"))}
    done = subprocess.run(line, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False)
    assert "no other processes are found" in done.stderr and "JAX_COORDINATOR_ADDRESS" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and len(done.stderr) < 300


SLURM = {"SLURM_LOCALID": "3", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("environment", "own"),
    [
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),  # four processes on each node: JAX gives the fourth number 3
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, [0]),  # the one that it is shown is its first
        (SLURM | {"CUDA_VISIBLE_DEVICES": "6,7", "SLURM_GPUS_PER_TASK": "h100:2"}, [0, 1]),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_NTASKS": "2"}, [0, 1, 2, 3]),  # one process on each node
        (SLURM | {"CUDA_VISIBLE_DEVICES": "", "SLURM_NTASKS": "2"}, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3", "JAX_LOCAL_DEVICE_IDS": "1"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, [0, 1]),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),
    ],
)
def test_a_process_has_the_gpus_that_its_launcher_means_for_it(environment, own):
    assert processes.own_gpus(environment) == own


@pytest.mark.parametrize("said", ["INTERNAL: ptxas exited with non-zero error code 2", "INVALID_ARGUMENT: connection"])
def test_a_fault_of_its_own_is_not_taken_for_that_of_another_process(said, monkeypatch):
    monkeypatch.setattr(processes, "alone", lambda: False)
    with pytest.raises(jax.errors.JaxRuntimeError, match=said), processes.deserted():
        raise jax.errors.JaxRuntimeError(said)
    for lost in (
        "UNAVAILABLE: gone",
        "INTERNAL: [external/gloo] Connection closed by peer",
        "UNKNOWN: NCCL operation failed",
    ):
        with pytest.raises(DesertedError), processes.deserted():
            raise jax.errors.JaxRuntimeError(lost)
