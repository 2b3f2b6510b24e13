"""Batches are the same bytes wherever they are made; weights are the same to rounding, in however many dispatches."""

import dataclasses
import json
import os
import signal
from functools import partial

import jax
import numpy as np
import pytest

import rotjax
from rotjax import feed as feeds
from rotjax import optim, training
from rotjax.data import tasks
from rotjax.errors import Stopped, UsageError
from rotjax.parallel import data_mesh

SMALL = dict(stem="cifar", width=4, batch_size=8, epochs=2, seed=1)
HOST, DEVICE = (feeds.Feed(where, 1, 0) for where in ("host", "device"))


@pytest.fixture(scope="module")
def plan(images):
    rng = np.random.default_rng(1)
    test = {"image": rng.integers(0, 256, (11, 8, 8, 3), dtype=np.uint8), "label": np.arange(11, dtype=np.int32) % 3}
    data = rotjax.Dataset("noise", ("a", "b", "c"), images, test)
    return rotjax.plan(rotjax.Rotation(**SMALL), data=data)


def made(stream):
    make = jax.jit(stream.make)
    return [jax.tree.map(np.asarray, make(stream.data, element)) for element in stream.elements]


@pytest.mark.parametrize("task", [tasks.classify, tasks.random_turn, tasks.all_turns])
@pytest.mark.parametrize("flip", [True, False])
def test_a_batch_made_on_the_device_is_that_of_the_host_to_the_byte(plan, images, task, flip):
    recipe = dataclasses.replace(plan.recipe, flip=flip)
    changed = dataclasses.replace(plan, recipe=recipe)
    known = [*rotjax.train_batches(images, task, 8, plan.steps, seed=1, flip=flip)]
    for feed in (HOST, DEVICE):
        stream = rotjax.run.train_stream(changed, feed, data_mesh(), task)
        assert (stream.data is None) == (feed is HOST)
        for one, other in zip(known, made(stream), strict=True):
            assert one.keys() == other.keys()
            for key in one:
                assert one[key].dtype == other[key].dtype
                np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("task", [tasks.classify, tasks.random_turn, tasks.all_turns])
def test_a_test_batch_made_on_the_device_is_that_of_the_host_to_the_byte(plan, task):
    data = plan.data.test
    known = [*rotjax.test_batches(data, task, 4, seed=1, epoch=3)]
    picks = rotjax.data.batches.test_picks(len(data["label"]), 4, epoch=3)
    view = partial(rotjax.data.augmentation.test_view, task=task, seed=1)
    for one, other in zip(known, made(DEVICE.stream(picks, view, DEVICE.put(data, data_mesh()))), strict=True):
        for key in one:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key])


def test_steps_of_one_dispatch_are_the_steps_of_several_to_rounding(plan):
    """In float64, where rounding is far below what a wrong batch or a forgotten sum would do."""
    with jax.enable_x64(True):
        model = rotjax.create("resnet18", 4, "cifar", width=4, dtype=jax.numpy.float64)
        optimizer = optim.adamw(optim.piecewise(0.01, [2]))
        variables = jax.tree.map(lambda x: np.asarray(x, np.float64), rotjax.init_variables(model, 0, 8))
        results = []
        for most, feed in ((1, HOST), (3, HOST), (4, HOST), (4, DEVICE)):
            stream = rotjax.run.train_stream(plan, feed, data_mesh(), rotjax.random_turn)
            step = training.train_steps(model, optimizer, make=stream.make)
            grouped = training.place(feeds.stacked(stream.elements, feeds.sizes(0, 6, 6, most)), axis=1)
            state, rows, step = training.init_state(optimizer, variables), [], partial(step, data=stream.data)
            for last, new in rotjax.fit(step, state, grouped, steps=6, epoch_steps=6, log_steps=2):
                rows, state = rows + new, last
            results.append((jax.tree.map(np.asarray, state.variables), rows))
    (known, rows), *others = results
    assert [row["step"] for row in rows] == [2, 4, 6, 6]
    for variables, found in others:
        for one, other in zip(rows, found, strict=True):
            assert one == pytest.approx(other, rel=1e-9)
        for one, other in zip(jax.tree.leaves(known), jax.tree.leaves(variables), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-10)


WAYS = [
    dict(augment="device"),
    dict(steps_per_dispatch=4),
    dict(augment="device", steps_per_dispatch=3, threads=2),
    dict(threads=3),
]


def carry_out(plan, workdir, **how):
    return list(rotjax.train(plan, workdir, log_steps=2, **how))


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_a_run_is_the_same_however_it_is_fed(plan, tmp_path, how):
    usual, other = carry_out(plan, tmp_path / "usual"), carry_out(plan, tmp_path / "other", **how)
    assert [row["step"] for row in other] == [row["step"] for row in usual] == [2, 4, 6, 6, 8, 10, 12, 12]
    assert other[0] == pytest.approx(usual[0], rel=1e-4)  # later ones have AdamW's steps between them
    if how.keys() == {"threads"}:
        assert (tmp_path / "other/metrics.jsonl").read_bytes() == (tmp_path / "usual/metrics.jsonl").read_bytes()
    counts = [
        np.array(json.loads((tmp_path / name / "summary.json").read_text())["confusion"]) for name in ("usual", "other")
    ]
    assert counts[0].sum() == counts[1].sum() == 44


def test_R3_a_run_of_several_steps_a_dispatch_that_is_stopped_goes_on_to_the_same_bits(plan, tmp_path):
    how = dict(augment="device", steps_per_dispatch=4)
    usual = carry_out(plan, tmp_path / "usual", **how)
    with pytest.raises(Stopped, match="stopped at step 4 of 12"):
        for row in rotjax.train(plan, tmp_path / "run", log_steps=2, **how):
            if row["step"] == 4:
                os.kill(os.getpid(), signal.SIGTERM)
    assert [row["step"] for row in carry_out(plan, tmp_path / "run", **how)] == [6, 6, 8, 10, 12, 12]
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "usual/metrics.jsonl").read_bytes()
    assert usual[-1]["step"] == 12


@pytest.mark.parametrize("start", range(13))
def test_dispatches_are_the_same_whichever_step_a_run_goes_on_from(start):
    """Their bounds are those of a run from the start, once the first of them is reached; none straddles an epoch."""
    whole = [0, *np.cumsum([*feeds.sizes(0, 29, 13, 4)])]
    sizes = [*feeds.sizes(start, 29, 13, 4)]
    bounds = [start, *(start + np.cumsum(sizes))]
    assert bounds[-1] == 29 and set(sizes) <= feeds.programs(start, 29, 13, 4) and {13, 26} <= set(bounds) | {start}
    assert set(bounds) >= {bound for bound in whole if bound >= -(-start // 4) * 4}


def test_what_is_not_said_suits_the_devices(plan, monkeypatch):
    class Device:
        def __init__(self, memory):
            self.memory = memory

        def memory_stats(self):
            return self.memory

    assert feeds.choose(plan, None, None, None) == feeds.Feed("host", 1, 0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for memory, where in (({"bytes_limit": 10**6}, "device"), ({"bytes_limit": 10**4}, "host"), (None, "host")):
        monkeypatch.setattr(jax, "local_devices", lambda memory=memory: [Device(memory)])
        assert feeds.choose(plan, None, None, None) == feeds.Feed(where, 4, 1)
    large = dataclasses.replace(plan, epoch_steps=390, steps=390)
    assert feeds.choose(large, "device", None, 2) == feeds.Feed("device", 32, 2)
    monkeypatch.setattr(feeds, "SENT", 5 * plan.data.train["image"][:8].nbytes)
    assert feeds.choose(large, "host", None, 0) == feeds.Feed("host", 4, 0)
    assert feeds.choose(plan, "host", 1024, 0).steps == plan.epoch_steps
    with pytest.raises(UsageError, match="--threads=-1 is out of range; it is at least 0 and at most 1024"):
        feeds.choose(plan, None, None, -1)
