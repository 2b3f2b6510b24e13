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
from rotjax import optim, scoring, training
from rotjax.data import tasks
from rotjax.errors import NonFiniteError, Stopped, UsageError
from rotjax.parallel import data_mesh
from rotjax.state import TrainState, abstract_variables, init_state, no_sums
from tests.runs import tiny

SMALL = dict(stem="cifar", width=4, batch_size=9, epochs=2, seed=1)  # epochs of 5 steps
HOST, DEVICE = (feeds.Feed(where, 1, 0) for where in ("host", "device"))


@pytest.fixture(scope="module")
def plan(data):
    return rotjax.plan(rotjax.Rotation(**SMALL), data=data)


def made(stream):
    make = jax.jit(stream.make)
    return [jax.tree.map(np.asarray, make(stream.data, element)) for element in stream.elements]


@pytest.mark.parametrize("task", [tasks.classify, tasks.random_turn, tasks.all_turns])
@pytest.mark.parametrize(("flip", "cutout", "seed"), [(True, 0.0, 0), (True, 0.4, 2**32 - 1), (False, 1.0, 1)])
def test_a_batch_made_on_the_device_is_that_of_the_host_to_the_byte(plan, images, task, flip, cutout, seed):
    kinds = {tasks.classify: rotjax.Classification, tasks.all_turns: partial(rotjax.Rotation, rotations="all")}
    recipe = kinds.get(task, rotjax.Rotation)(**SMALL | {"flip": flip, "cutout": cutout, "seed": seed})
    changed = dataclasses.replace(plan, recipe=recipe)
    known = [*rotjax.train_batches(images, task, 9, plan.steps, seed=seed, flip=flip, cutout=cutout)]
    for feed in (HOST, DEVICE):
        stream = rotjax.run.train_stream(changed, feed, data_mesh())
        assert (stream.data is None) == (feed is HOST)
        for one, other in zip(known, made(stream), strict=True):
            assert one.keys() == other.keys()
            for key in one:
                assert one[key].dtype == other[key].dtype
                np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("task", [tasks.classify, tasks.random_turn, tasks.all_turns])
def test_a_test_batch_made_on_the_device_is_that_of_the_host_to_the_byte(plan, task):
    data = plan.data.test
    known = [*rotjax.eval_batches(data, task, 4, seed=1, epoch=3)]
    picks = rotjax.data.batches.eval_picks(len(data["label"]), 4, seed=1, epoch=3)
    view = partial(rotjax.data.augmentation.eval_view, task=task)
    for one, other in zip(known, made(DEVICE.stream(picks, view, DEVICE.put(data, data_mesh()))), strict=True):
        for key in one:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key])


@pytest.fixture
def elsewhere(monkeypatch):
    """From its call on, what a GPU or TPU is given: a loop over the steps, and XLA's own convolutions."""
    return lambda: monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_an_accelerator_scores_several_batches_at_once(plan, elsewhere):
    recipe = dataclasses.replace(plan.recipe, batch_size=2)
    model, sizes = recipe.model(), []

    def seen(picks):
        for pick in picks:
            sizes.append(len(pick["index"]))
            yield pick

    score = scoring.scorer(dataclasses.replace(plan, recipe=recipe), model, DEVICE, seen)
    variables = rotjax.init_variables(model, 0, 8)
    known = score(variables, tasks.random_turn, 3)
    elsewhere()
    found, every = (score(variables, task, 3) for task in (tasks.random_turn, tasks.all_turns))
    assert sizes == [2] * 6 + [8] * 2 + [2] * 6, "four times as many; as many where each image has four turns"
    np.testing.assert_array_equal(known.pop("confusion"), found.pop("confusion"))
    assert known == pytest.approx(found) and every["confusion"].sum() == 4 * 11


def test_steps_of_one_dispatch_are_the_steps_of_several_to_rounding(plan, elsewhere):
    """In float64, where rounding is far below what a wrong batch or a forgotten sum would do."""
    with jax.enable_x64(True):
        model, optimizer = tiny(dtype=jax.numpy.float64), optim.adamw(optim.piecewise(0.01, [2]))
        variables = jax.tree.map(lambda x: np.asarray(x, np.float64), rotjax.init_variables(model, 0, 8))
        results = []
        for most, feed, loop in ((1, HOST, False), (2, DEVICE, False), (2, HOST, True), (3, DEVICE, True)):
            if loop:
                elsewhere()
            stream = rotjax.run.train_stream(plan, feed, data_mesh())
            step = training.train_steps(model, optimizer, make=stream.make)
            grouped = rotjax.place(feeds.stacked(stream.elements, feeds.sizes(0, 5, 5, most)), axis=1)
            state, rows, step = init_state(optimizer, variables), [], partial(step, data=stream.data)
            for last, new in rotjax.fit(step, state, grouped, steps=5, epoch_steps=5, log_steps=2):
                rows, state = rows + new, last
            results.append((jax.tree.map(np.asarray, state.variables), rows))
    (known, rows), *others = results
    assert [row["step"] for row in rows] == [2, 4, 5]
    for variables, found in others:
        for one, other in zip(rows, found, strict=True):
            assert one == pytest.approx(other, rel=1e-9)
        for one, other in zip(jax.tree.leaves(known), jax.tree.leaves(variables), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_any_network_takes_several_steps_a_dispatch(elsewhere, name, dtype):
    """A loop wants its state back as it was: the same shapes and dtypes."""
    elsewhere()
    frozen = optim.FROZEN["last_block"]
    model = rotjax.create(name, 4, width=8, dtype=jax.numpy.dtype(dtype), held=frozen)
    optimizer = optim.adamw(optim.piecewise(0.01, [2]), 0.01, frozen)
    variables = abstract_variables(model, 32)
    opt_state = jax.eval_shape(optimizer.init, variables["params"])
    state = TrainState(jax.ShapeDtypeStruct((), "int32"), variables, opt_state, jax.eval_shape(no_sums))
    given = {"image": jax.ShapeDtypeStruct((3, 8, 32, 32, 3), "uint8"), "label": jax.ShapeDtypeStruct((3, 8), "int32")}
    after, metrics = jax.eval_shape(training.train_steps(model, optimizer), state, given)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {name: x.shape for name, x in metrics.items()} == {"loss": (3,), "accuracy": (3,)}


def test_statistics_keep_their_dtype_whatever_the_network_s():
    with jax.enable_x64(True):
        model, optimizer = rotjax.create("resnet18", 4, "cifar", width=2, dtype=jax.numpy.float64), optim.sgd(0.1)
        state = jax.eval_shape(lambda: init_state(optimizer, rotjax.init_variables(model, 0, 8)))
        given = {"image": jax.ShapeDtypeStruct((2, 8, 8, 8, 3), "uint8"), "label": jax.ShapeDtypeStruct((2, 8), "int32")}
        after, _ = jax.eval_shape(training.train_steps(model, optimizer), state, given)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_N1_rows_before_the_step_that_is_not_finite_are_kept():
    """Of the same dispatch too."""

    def step(state, batch):
        sums = state.sums | {"bad_step": np.int32(5)}
        return dataclasses.replace(state, sums=sums), {"loss": np.arange(8.0), "accuracy": np.zeros(8)}

    state, rows = TrainState(jax.numpy.int32(0), {}, (), {}), []
    with pytest.raises(NonFiniteError, match="not finite at step 5"):
        for _, new in rotjax.fit(step, state, [{}], steps=8, epoch_steps=8, log_steps=2):
            rows += new
    assert [(row["step"], row["loss"]) for row in rows] == [(2, 1.0), (4, 3.0)]


def test_batches_of_one_dispatch_that_are_not_of_one_epoch_are_refused():
    def step(state, batch):
        return state, {"loss": np.zeros(4)}

    state = TrainState(jax.numpy.int32(0), {}, (), {})
    with pytest.raises(ValueError, match="4 batches after step 0 go beyond its epoch, or step 9"):
        next(rotjax.fit(step, state, [{}], steps=9, epoch_steps=3))


WAYS = [dict(augment="device"), dict(steps_per_dispatch=2), dict(augment="device", steps_per_dispatch=2, threads=3)]


def carry_out(plan, workdir, **how):
    return list(rotjax.train(plan, workdir, log_steps=2, **how))


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def usual(plan, tmp_path_factory):
    """A run whose weights hardly move, so that another program's rounding shows as such in every row."""
    slow = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, learning_rate=1e-9))
    workdir = tmp_path_factory.mktemp("usual") / "run"
    carry_out(slow, workdir)
    return slow, workdir


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_a_run_is_the_same_however_it_is_fed(usual, tmp_path, how):
    plan, workdir = usual
    carry_out(plan, tmp_path / "run", **how)
    known, found = metrics(workdir), metrics(tmp_path / "run")
    assert [row["step"] for row in found] == [2, 4, 5, 6, 8, 10, 10]
    for one, other in zip(known, found, strict=True):
        assert other == pytest.approx(one, rel=1e-4), (one, other)
    one, other = (json.loads((folder / "summary.json").read_text())["confusion"] for folder in (workdir, tmp_path / "run"))
    assert one == other


def test_threads_change_no_bit(usual, tmp_path):
    plan, workdir = usual
    carry_out(plan, tmp_path / "run", threads=3)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("row", [2, 5])
def test_R3_a_run_of_several_steps_a_dispatch_that_is_stopped_goes_on_to_the_same_bits(plan, tmp_path, row):
    """Stopped after a dispatch of several steps, or after those that an epoch's end leaves over."""
    how = dict(augment="device", steps_per_dispatch=2)
    carry_out(plan, tmp_path / "usual", **how)
    with pytest.raises(Stopped, match=f"stopped at step {row} of 10"):
        for seen in rotjax.train(plan, tmp_path / "run", log_steps=2, **how):
            if seen["step"] == row:
                os.kill(os.getpid(), signal.SIGTERM)
    carry_out(plan, tmp_path / "run", **how)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "usual/metrics.jsonl").read_bytes()
    one, other = (jax.tree.leaves(rotjax.load(tmp_path / name)[1]) for name in ("run", "usual"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_R11_a_run_goes_on_with_another_feed(usual, tmp_path):
    plan, workdir = usual
    with pytest.raises(Stopped):
        for seen in rotjax.train(plan, tmp_path / "run", log_steps=1):
            if seen["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    carry_out(plan, tmp_path / "run", augment="device", steps_per_dispatch=2)
    known, found = ({row["step"]: row for row in metrics(w) if "loss" in row} for w in (workdir, tmp_path / "run"))
    assert {4, 6, 8, 10} <= found.keys()
    for step in found.keys() & known.keys():
        assert found[step] == pytest.approx(known[step], rel=1e-4)


@pytest.mark.parametrize("start", range(13))
def test_dispatches_are_the_same_whichever_step_a_run_goes_on_from(start):
    """Their bounds are those of a run from the start, once the first of them is reached; none straddles an epoch."""
    whole = [0, *np.cumsum([*feeds.sizes(0, 29, 13, 4)])]
    sizes = [*feeds.sizes(start, 29, 13, 4)]
    bounds = [start, *(start + np.cumsum(sizes))]
    assert bounds[-1] == 29 and set(sizes) == feeds.programs(start, 29, 13, 4) and {13, 26} <= set(bounds) | {start}
    assert set(bounds) >= {bound for bound in whole if bound >= -(-start // 4) * 4}


def test_what_is_not_said_suits_the_devices(plan, monkeypatch, caplog):
    caplog.set_level("INFO", "rotjax.feed")

    class Device:
        def __init__(self, memory):
            self.memory = memory

        def memory_stats(self):
            return self.memory

    assert feeds.choose(plan, None, None, None) == feeds.Feed("host", 1, 0) and not caplog.text
    with pytest.raises(UsageError, match="^steps_per_dispatch=9 is out of range; it is at least 1 and here at most 8"):
        feeds.choose(plan, None, 9, None)
    for given in (dict(per_dispatch=1.5, threads=None), dict(per_dispatch=None, threads=0.5)):
        with pytest.raises(UsageError, match="=[01].5 is no integer; give one$"):
            feeds.choose(plan, None, **given)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for memory, where in (({"bytes_limit": 10**6}, "device"), ({"bytes_limit": 10**4}, "host"), (None, "host")):
        monkeypatch.setattr(jax, "local_devices", lambda memory=memory: [Device(memory)])
        caplog.clear()
        assert feeds.choose(plan, None, None, None) == feeds.Feed(where, 5, 1)
        assert ("the host makes the batches: the devices do not say" in caplog.text) == (where == "host")
    for steps, most in ((390, 30), (73, 24), (781, 30), (64, 32), (63, 21), (62, 31), (7, 7), (1, 1)):
        large = dataclasses.replace(plan, epoch_steps=steps, steps=10 * steps)
        assert feeds.choose(large, "device", None, 2) == feeds.Feed("device", most, 2)
    monkeypatch.setattr(feeds, "SENT", 5 * plan.data.train["image"][:9].nbytes)
    assert feeds.choose(dataclasses.replace(plan, epoch_steps=64, steps=64), "host", None, 0) == feeds.Feed("host", 4, 0)
    every = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, rotations="all"))
    assert feeds.choose(every, "host", None, 0) == feeds.Feed("host", 1, 0), "four views of each image are sent"
    assert feeds.choose(plan, "host", 1024, 0).per_dispatch == plan.epoch_steps
    with pytest.raises(UsageError, match="^threads=-1 is out of range; it is at least 0 and here at most 1024"):
        feeds.choose(plan, None, None, -1)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_several_steps_lower_for_an_accelerator_as_one_loop(platform, monkeypatch):
    """As far as a CPU can tell: crops, turns and steps in bfloat16, without what has no deterministic form on GPUs."""
    model, optimizer = rotjax.create("resnet18", 4, width=2, dtype=jax.numpy.bfloat16), optim.sgd(0.1, 5e-4)
    state = rotjax.init_state(optimizer, rotjax.init_variables(model, 0, 32))
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    data = {"image": jax.ShapeDtypeStruct((9, 32, 32, 3), np.uint8), "label": jax.ShapeDtypeStruct((9,), np.int32)}
    kinds = {"seed": np.uint32, "epoch": np.int32, "index": np.int32}
    picks = {name: jax.ShapeDtypeStruct((5, 8), dtype) for name, dtype in kinds.items()}
    make = partial(rotjax.data.augmentation.train_view, task=tasks.all_turns, flip=True, cutout=0.4)
    steps = training.train_steps(model, optimizer, make=make).trace(state, picks, data)
    text = steps.lower(lowering_platforms=(platform,)).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == 20 + 20 + 19  # forwards, kernels' gradients, maps' but the pixels': the loop is not unrolled
    assert all("tensor<32x" in line and line.count("xbf16>") == 3 for line in convolutions)
    assert "stablehlo.while" in text and "select_and_scatter" not in text
