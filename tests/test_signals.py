"""SIGTERM and Ctrl-C in each phase of a command: it saves what there is, says in one line how to go on, leaves with 75."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

import rotjax
from experiments import command, plots
from rotjax import signals
from rotjax.signals import ECHO, stopping

FLAGS = ["--dataset=digits", "--stem=cifar", "--image_size=8", "--width=4", "--max_steps=6", "--log_steps=2"]
PHASES = {
    "data": (rotjax.data.sources, "load"),
    "compile": (jax.stages.Lowered, "compile"),
    "train": (rotjax.training, "check_finite"),
    "save": (rotjax.checkpoints, "_begin"),
    "evaluate": (rotjax.training, "evaluate"),
    "figures": (plots, "save"),
}


def run(connection, workdir, phase=None, kinds=(), pause=0.0):
    """The command; at the beginning of `phase` signals of `kinds` come, one after another or at once."""
    if pause:
        signals.ECHO = 0.1  # a busy machine may be late to hear of the first one
    if phase:
        owner, name = PHASES[phase]
        function = getattr(owner, name)

        def interrupted(*arguments, **options):
            setattr(owner, name, function)
            signal.pthread_sigmask(signal.SIG_BLOCK, kinds)
            for kind in kinds:
                os.kill(os.getpid(), kind)
                if pause:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, kinds)
                    time.sleep(pause)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, kinds)
            return function(*arguments, **options)

        setattr(owner, name, interrupted)
    sys.argv = ["rotation", *FLAGS, f"--workdir={workdir}", "--checkpoint_seconds=0"]
    return command.main(rotjax.Rotation)


@pytest.fixture
def call(start, tmp_path):
    """Runs the command in a process of its own: its exit code, and what it said."""

    def call(*arguments):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        process, _ = start(log, run, *arguments)
        process.join(timeout=600)
        return process.exitcode, log.read_text()

    return call


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """What the command leaves that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process, _ = start(folder / "log", run, folder / "run")
    process.join(timeout=600)
    assert process.exitcode == 0, (folder / "log").read_text()
    return folder / "run"


def deaf(connection, *arguments):
    """As `run` where nobody reads stdout and stderr any more: under `2>&1 | tee`, which Ctrl-C ends too."""
    reader, writer = os.pipe()
    os.close(reader)
    for number in (1, 2):
        os.dup2(writer, number)
    return run(connection, *arguments)


def test_F4_ctrl_c_where_the_reader_of_both_streams_is_gone(start, tmp_path):
    process, _ = start(tmp_path / "log", deaf, tmp_path / "run", "train", [signal.SIGINT])
    process.join(timeout=600)
    assert process.exitcode == 75 and rotjax.checkpoints.newest(tmp_path / "run/checkpoints") in (1, 2)


def test_R3_in_each_phase_of_a_command_a_signal_loses_nothing(call, undisturbed, tmp_path, record_property):
    """Where a second one comes it stops at once, with nothing corrupt: the same run goes on. An echo is none."""
    workdir = tmp_path / "run"
    record_property("trials", 3 + len(PHASES))
    for number, phase in enumerate(PHASES):
        if phase in ("compile", "save", "evaluate"):
            assert call(workdir, phase, [signal.SIGTERM, signal.SIGINT], 1.2 * ECHO)[0] == 128 + signal.SIGINT
        kinds = [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGINT)][number % 3]
        code, said = call(workdir, phase, kinds)
        assert code == 75 and "Traceback" not in said, (phase, said)
        last = said.splitlines()[-1]
        assert last.startswith("rotjax: stopped") and last.endswith("; the same command resumes") and len(last) < 300
    assert call(workdir)[0] == 0
    assert not list(workdir.glob("**/*.partial")) and not list(workdir.glob("**/*.unfinished"))
    assert (workdir / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()
    one, other = (rotjax.load(folder)[1] for folder in (workdir, undisturbed))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_signal_that_a_scripts_background_job_ignores_does_not_stop_training():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping() as event:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN and not event.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_was_ignored_stays_so_after_the_first_of_a_command():
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert command.guarded(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 75
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def test_runs_that_overlap_all_hear_a_signal_and_the_last_leaves_things_as_they_were():
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    one, other = stopping(), stopping()
    first, second = one.__enter__(), other.__enter__()
    one.__exit__(None, None, None)
    os.kill(os.getpid(), signal.SIGTERM)
    assert second.wait(5) and not first.is_set()
    other.__exit__(None, None, None)
    assert {kind: signal.getsignal(kind) for kind in before} == before


def test_a_run_that_ends_in_another_thread_leaves_signals_as_they_were_at_the_next():
    before, heard = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}, []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    threads = threading.active_count()
    try:
        for _ in range(2):
            run = stopping()
            run.__enter__()
            other = threading.Thread(target=run.__exit__, args=(None, None, None))
            other.start()
            other.join()
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
        assert threading.active_count() == threads
        with stopping() as event:
            os.kill(os.getpid(), signal.SIGTERM)
            assert event.wait(5)
        assert heard == [signal.SIGTERM]
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@pytest.mark.parametrize("call", [1, 2])
def test_a_signal_while_handlers_are_set_or_taken_away_is_not_lost_in_a_loop(monkeypatch, call):
    """At the first call of `set_wakeup_fd` they are not there yet, at the second they still are."""
    before, heard, calls = signal.getsignal(signal.SIGTERM), [], []
    signal.signal(signal.SIGTERM, mine := lambda number, _: heard.append(number))
    set_wakeup_fd = signal.set_wakeup_fd

    def signalled(descriptor):
        calls.append(descriptor)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return set_wakeup_fd(descriptor)

    monkeypatch.setattr(signal, "set_wakeup_fd", signalled)
    try:
        with stopping() as event:
            assert heard == [signal.SIGTERM] * (call == 1) and not event.is_set()
        assert signal.getsignal(signal.SIGTERM) is mine and len(calls) == 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] * (1 + (call == 1))
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def heard():
    """The signals that reach whoever had their handlers before the runs."""
    found, before = [], {kind: signal.getsignal(kind) for kind in signals.ENDING}
    for kind in before:
        signal.signal(kind, lambda number, _: found.append(number))
    yield found
    for kind, handler in before.items():
        signal.signal(kind, handler)


def test_a_second_signal_while_a_run_is_held_is_for_its_caller(monkeypatch, heard):
    monkeypatch.setattr(signals, "ECHO", 0.1)
    with stopping() as event, event.hold():
        os.kill(os.getpid(), signal.SIGINT)
        assert event.wait(5) and heard == []
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        assert heard == [signal.SIGINT]
        with stopping() as other:  # as in a next cell
            os.kill(os.getpid(), signal.SIGTERM)
            assert other.wait(5)
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGINT, signal.SIGTERM]


def test_the_first_signal_of_a_run_is_none_that_ends_the_process_where_another_run_is_held(monkeypatch, heard):
    monkeypatch.setattr(signals, "ECHO", 0.1)
    with stopping() as event, event.hold():
        os.kill(os.getpid(), signal.SIGINT)
        assert event.wait(5)
        time.sleep(0.2)
        with stopping() as other:
            os.kill(os.getpid(), signal.SIGINT)
            assert other.wait(5)
            time.sleep(0.2)
    assert heard == []


def test_a_handler_of_a_run_that_is_put_back_after_it_ends_the_process():
    """As by who sets a handler during the run, and what was there before once the run is over."""
    program = """
import os, signal
from rotjax.signals import stopping
with stopping():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGTERM, before)
os.kill(os.getpid(), signal.SIGTERM)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], timeout=600, env=environment, check=False)
    assert done.returncode == -signal.SIGTERM


def test_a_handler_that_is_set_during_a_run_stays():
    before, heard = signal.getsignal(signal.SIGTERM), []
    try:
        with stopping():
            signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_process_that_is_forked_during_a_run_ends_by_a_signal(tmp_path):
    """In a process of its own, without the threads by which JAX forbids to fork."""
    program = """
import os, signal, time
from rotjax.signals import stopping
signal.signal(signal.SIGTERM, signal.SIG_DFL)
ready, told = os.pipe()
with stopping() as event:
    if not (child := os.fork()):
        os.write(told, b".")
        time.sleep(9)
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM and not event.is_set()
"""
    words = [sys.executable, "-W", "ignore", "-c", program]
    subprocess.run(words, check=True, timeout=600, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})


def test_C1_the_command_says_on_stderr_that_it_passes_over_a_damaged_checkpoint(call, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    data = max((tmp_path / "run/checkpoints/6").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    code, said = call(tmp_path / "run")
    (line,) = (line for line in said.splitlines() if "damaged" in line)
    assert code == 0 and line.startswith("rotjax: checkpoint 6 in ") and line.endswith("trying step 5")
    assert "resuming from step 5 of 6" in said


@pytest.mark.parametrize(("resumes", "then"), [(True, "resumes"), (False, "begins anew")])
def test_a_command_that_is_stopped_says_whether_it_resumes(capsys, resumes, then):
    def interrupted():
        raise KeyboardInterrupt

    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert command.guarded(interrupted, resumes) == 75
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    assert capsys.readouterr().err == f"rotjax: stopped; the same command {then}\n"


def test_R3_a_signal_while_a_class_is_made_ends_a_command_by_its_exit_code(tmp_path):
    """Which dataclasses and Flax do by an `exec`: `python -m` would end by SIGINT where a KeyboardInterrupt leaves one."""
    made = "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)"
    lines = ("import sys", "from experiments import command", f"sys.exit(command.guarded(lambda: exec({made!r})))")
    (tmp_path / "job.py").write_text("\n".join(lines))
    words, paths = [sys.executable, "-m", "job"], f"{Path(__file__).parents[1]}:{tmp_path}"
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 75 and done.stderr == "rotjax: stopped; the same command resumes\n"


def test_R3_a_signal_that_comes_with_its_handlers_is_heeded(monkeypatch):
    handled = signals._handled

    @contextmanager
    def signalled():
        with handled():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # until all that heed it have
            yield

    monkeypatch.setattr(signals, "_handled", signalled)
    with stopping() as event:
        assert event.wait(9)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_R3_a_signal_while_a_command_imports(tmp_path, kind):
    line = [sys.executable, "-X", "importtime", "-m", "experiments.rotation", *FLAGS, f"--workdir={tmp_path / 'run'}"]
    root, pipe = Path(__file__).parents[1], subprocess.PIPE
    if signal.getsignal(kind) == signal.SIG_IGN:
        pytest.skip("these tests were started to ignore the signal, as a script's background is, and so are their processes")
    with subprocess.Popen(line, cwd=root, stderr=pipe, stdout=pipe, text=True) as process:
        while not process.stderr.readline().endswith(" numpy\n"):
            pass
        process.send_signal(kind)
        said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode == 75 and said == ["rotjax: stopped before anything was done; run it again\n"]
    assert not (tmp_path / "run").exists()
