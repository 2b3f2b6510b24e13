"""What a run costs beside its steps, for `experiments.benchmark`: whole epochs, checkpoints, starts."""

import dataclasses
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import rotjax
from experiments import speed
from rotjax.workdirs import read_summary


def epoch_and_steps() -> speed.Sides:
    """Images/s of an epoch of 195 steps by the command's own loop, with checkpoints as it saves them, and of bare steps."""
    train, test = (
        {"image": speed.images(count)["image"], "label": np.full(count, -1)} for count in (195 * speed.BATCH, speed.BATCH)
    )
    data = rotjax.Dataset("noise", (), train, test)
    plan = rotjax.plan(rotjax.Rotation(stem="imagenet", epochs=1 if jax.default_backend() == "cpu" else 20), data=data)

    def epoch() -> float:
        with tempfile.TemporaryDirectory() as folder:
            list(rotjax.train(plan, folder))
            return read_summary(Path(folder))["images_per_second"]

    return epoch, speed.train_rate("resnet18", "imagenet")


def saves() -> speed.Sides:
    """Seconds until training may go on after it has asked for a checkpoint, and until one is written and verified."""
    model, optimizer = rotjax.create("resnet18", 4), rotjax.adamw(1e-3)
    state = rotjax.init_state(optimizer, rotjax.init_variables(model, 0, 32))
    folder, numbers = tempfile.TemporaryDirectory(), itertools.count(1)

    def save(wait: bool) -> float:
        this = jax.block_until_ready(dataclasses.replace(state, step=jnp.int32(next(numbers))))
        with rotjax.checkpoints.open_checkpoints(Path(folder.name)) as checkpoints:
            began = time.perf_counter()
            rotjax.checkpoints.save(checkpoints, this)
            if wait:
                rotjax.checkpoints.wait(checkpoints)
            return time.perf_counter() - began

    save(True)  # the first one finds the memory for its copy
    return lambda: save(False), lambda: save(True)


def starts() -> speed.Sides:
    """Seconds from the shell to the first row of metrics of DenseNet121: where it was compiled before, and where not."""
    cache, fonts = tempfile.TemporaryDirectory(), tempfile.TemporaryDirectory()

    def start(home: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--backbone=densenet121", "--dataset=digits", "--batch_size=128", "--log_steps=1", "--max_steps=1"]
            words = [sys.executable, "-m", "experiments.rotation", *flags, f"--workdir={folder}/run"]
            began, rows = time.perf_counter(), Path(folder) / "run" / "metrics.jsonl"
            other = {"JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"}  # modules are compiled once too, as usual
            env = {key: value for key, value in os.environ.items() if key not in other}
            env |= {"XDG_CACHE_HOME": home, "MPLCONFIGDIR": fonts.name}  # whose list is made by the first start of all
            with subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL) as process:
                while process.poll() is None and not (rows.exists() and rows.read_text()):
                    time.sleep(0.02)
                seconds = time.perf_counter() - began
                process.kill()
            if not (rows.exists() and rows.read_text()):
                raise RuntimeError(f"`{' '.join(words[1:])}` ended before its first step")
            return seconds

    def first() -> float:
        with tempfile.TemporaryDirectory() as home:
            return start(home)

    start(cache.name)
    return lambda: start(cache.name), first


def whole_run() -> speed.Sides:
    """Seconds of row 1 of the report, from the shell to the summary, with empty caches; and 1."""

    def whole() -> float:
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "experiments.rotation", f"--workdir={folder}/run"]
            began = time.perf_counter()
            env = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled", "XDG_CACHE_HOME": f"{folder}/cache"}
            subprocess.run(words, env=os.environ | env, check=True)
            return time.perf_counter() - began

    return whole, lambda: 1.0
