"""Tests run on one CPU device, and share a cache of compiled programs with the commands that they start."""

import logging
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest

CACHE = Path(__file__).parents[1] / ".cache" / "compiled"
CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Half the time to compile, at the price of slow programs, of which tests run a few steps.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["experiments.command"])  # as fork of a process that has imported all, one starts at once


@pytest.fixture(scope="session")
def start():
    """`start(log, function, *arguments) -> process, connection`: a process of its own that calls
    `function(connection, *arguments)`, writes to `log` and leaves with what is returned as its exit code."""
    started = []

    def start(log, function, *arguments):
        here, there = FORKS.Pipe()
        process = FORKS.Process(target=_child, args=(log, function, there, *arguments))
        process.start()
        there.close()
        started.append(process)
        return process, here

    yield start
    for process in started:
        process.kill()
        process.join()


def _child(log, function, *arguments):
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os._exit(function(*arguments) or 0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes the user's cache of decoded images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.delenv("UV", raising=False)  # by which commands say what to type
        yield


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Every error of ours is one line of less than 300 characters, once words that are longer than 40 are cut."""
    from rotjax.errors import RotjaxError

    raised = []

    def init(self, *arguments):
        Exception.__init__(self, *arguments)
        raised.append(str(self))

    monkeypatch.setattr(RotjaxError, "__init__", init)
    yield
    assert not [line for line in raised if len(" ".join(word[:40] for word in line.split(" "))) > 290]


@pytest.fixture
def notes():
    """The lines that rotjax and its commands log."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("rotjax", "experiments")]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def images():
    """48 random images of 8x8 in 3 classes."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (48, 8, 8, 3), dtype=np.uint8),
        "label": np.arange(48, dtype=np.int32) % 3,
    }


@pytest.fixture(scope="module")
def data(images):
    """The `images` to train on, and 11 to test on."""
    import rotjax

    rng = np.random.default_rng(1)
    test = {"image": rng.integers(0, 256, (11, 8, 8, 3), dtype=np.uint8), "label": np.arange(11, dtype=np.int32) % 3}
    return rotjax.Dataset("noise", ("a", "b", "c"), images, test)


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """The workdir of a small rotation run on `data`, of 12 steps."""
    import rotjax
    from tests.runs import SMALL, carry_out

    workdir = tmp_path_factory.mktemp("runs") / "rotation"
    carry_out(rotjax.Rotation(**SMALL), data, workdir)
    return workdir
