import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rotjax
from rotjax import optim, training
from rotjax.data import batches, tasks
from rotjax.errors import NonFiniteError, UsageError
from rotjax.state import TrainState, abstract_variables, init_state, init_variables
from tests.runs import tiny


def small(num_classes=4, **options):
    return rotjax.create("resnet18", num_classes, "cifar", width=4, **options)


def batch(count=16, seed=0, classes=4):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8),
        "label": rng.integers(0, classes, count).astype(np.int32),
    }


def equal(a, b):
    return jax.tree.map(lambda x, y: bool((x == y).all()), a, b)


def test_a_step_is_adamw_on_the_mean_loss_with_decay_on_every_parameter():
    model, given = small(), batch()
    variables = init_variables(model, 0, 8)

    def loss(params):
        logits, updated = model.apply(variables | {"params": params}, given["image"], train=True, mutable=["batch_stats"])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), given["label"][:, None], 1).mean(), updated

    (value, updated), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    # Adam's first step is the sign of the gradient (g / (|g| + eps)), decoupled decay comes on top
    expected = jax.tree.map(lambda p, g: p - 0.1 * (g / (abs(g) + 1e-8) + 0.5 * p), variables["params"], gradients)
    optimizer = rotjax.adamw(0.1, weight_decay=0.5)
    state, metrics = training.train_step(model, optimizer)(init_state(optimizer, variables), given)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    for path, leaf in jax.tree.leaves_with_path(updated["batch_stats"]):
        np.testing.assert_allclose(
            dict(jax.tree.leaves_with_path(state.variables["batch_stats"]))[path], leaf, rtol=1e-4, atol=1e-6
        )
    errors = jax.tree.map(lambda a, b: float(np.median(abs(a - b))), state.variables["params"], expected)
    assert max(jax.tree.leaves(errors)) < 1e-5  # the median: where a gradient is round-off, so is its sign


def test_a_step_of_sgd_is_torchs_with_momentum_and_decay_through_the_gradient():
    optimizer = rotjax.sgd(0.1, weight_decay=0.5)
    params, gradients = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.5, 3.0])}
    state, velocity, expected = optimizer.init(params), np.zeros(2), np.array([1.0, -2.0])
    for _ in range(3):  # torch.optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.5, nesterov=True)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        gradient = np.array([0.5, 3.0]) + 0.5 * expected
        velocity = 0.9 * velocity + gradient
        expected = expected - 0.1 * (gradient + 0.9 * velocity)
        np.testing.assert_allclose(params["w"], expected, rtol=1e-6)


def test_the_rate_rises_and_falls_along_a_cosine(images):
    data = rotjax.Dataset("noise", ("a", "b", "c"), images, images)
    recipe = rotjax.Rotation(
        stem="cifar", width=4, batch_size=12, epochs=10, learning_rate=0.2, schedule="cosine", warmup_epochs=2, max_steps=9
    )
    plan = rotjax.plan(recipe, data=data)
    rates = [float(plan.schedule(step)) for step in range(41)]
    expected = [*(0.2 * np.arange(8) / 8), *(0.1 * (1 + np.cos(np.pi * np.arange(33) / 32)))]
    np.testing.assert_allclose(rates, expected, atol=1e-7)
    assert len(plan.boundaries) == 0 and plan.steps == 9


def test_the_rate_rises_and_falls_in_steps(images):
    data = rotjax.Dataset("noise", ("a", "b", "c"), images, images)
    recipe = rotjax.Rotation(stem="cifar", width=4, batch_size=12, epochs=7, decay_epochs=3, warmup_epochs=1)
    plan = rotjax.plan(recipe, data=data)
    expected = [0, 0.0025, 0.005, 0.0075, *[0.01] * 8, *[0.001] * 12, *[0.0001] * 4]
    np.testing.assert_allclose([float(plan.schedule(step)) for step in range(28)], expected, rtol=1e-5)


def test_losses_of_sixteen_bits_are_summed_in_thirty_two():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(4)((x / 255.0).mean((1, 2))).astype(jnp.float16)

    optimizer, model = rotjax.adamw(1e-3), Half()
    state = rotjax.init_state(optimizer, rotjax.init_variables(model, 0, 8))
    step = rotjax.train_step(model, optimizer, loss=lambda logits, labels: training.cross_entropy(600 * logits, labels))
    batch = {"image": np.full((512, 8, 8, 3), 200, np.uint8), "label": np.arange(512, dtype=np.int32) % 4}
    state, metrics = step(state, batch)
    assert metrics["loss"].dtype == jnp.float32 and np.isfinite(state.sums["loss"])
    np.testing.assert_allclose(state.sums["loss"] / 512, metrics["loss"], rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_labels_are_shared_evenly_over_the_classes(smoothing):
    logits, labels = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32), np.arange(6) % 5
    surprise = -np.asarray(jax.nn.log_softmax(logits))
    expected = (1 - smoothing) * surprise[np.arange(6), labels] + smoothing * surprise.mean(1)
    np.testing.assert_allclose(training.cross_entropy(logits, labels, smoothing), expected, rtol=1e-6)
    for others in (labels + 5, labels - 5):
        assert np.isnan(training.cross_entropy(logits, others, smoothing)).all(), "there is no such class"
    with pytest.raises(TypeError, match="labels are float32; give integers"):
        training.cross_entropy(logits, labels.astype(np.float32), smoothing)
    for others in (labels[:, None], labels[:3], labels[:1]):
        with pytest.raises(TypeError, match=r"for logits \[6, 5\]; give one for each image, \[B\]"):
            training.cross_entropy(logits, others, smoothing)
    for least in (np.int8(-1), np.uint32(2**32 - 1)):  # what a label of -1 becomes
        assert np.isnan(training.cross_entropy(np.zeros((1, 200)), np.array([least]), smoothing))


def test_the_schedule_falls_to_a_tenth_at_its_boundaries():
    schedule = rotjax.piecewise(0.01, [30, 60])
    np.testing.assert_allclose([schedule(t) for t in (0, 29, 30, 59, 60)], [1e-2, 1e-2, 1e-3, 1e-3, 1e-4], rtol=1e-6)


@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 16, 45])
def test_by_default_the_rate_is_reached_before_it_first_falls(images, epochs):
    data, shape = rotjax.Dataset("noise", ("a", "b", "c"), images, images), dict(width=4, batch_size=12)
    plan = rotjax.plan(rotjax.Rotation(preset="strong", schedule="steps", epochs=epochs, **shape), data=data)
    first = next(iter(plan.boundaries), plan.steps)
    assert max(float(plan.schedule(step)) for step in range(first)) == pytest.approx(plan.recipe.learning_rate)


def test_a_warmup_in_which_the_rate_falls_is_refused(images):
    data, given = rotjax.Dataset("noise", ("a", "b", "c"), images, images), dict(stem="cifar", width=4, batch_size=12)
    with pytest.raises(UsageError, match="^warmup_epochs=3 reaches the first drop of the rate, decay_epochs=3; give"):
        rotjax.plan(rotjax.Rotation(epochs=10, warmup_epochs=3, decay_epochs=3, **given), data=data)
    for able in (dict(epochs=10, decay_epochs=4), dict(epochs=3, decay_epochs=3), dict(epochs=9, schedule="cosine")):
        rotjax.plan(rotjax.Rotation(warmup_epochs=3, **able, **given), data=data)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_last_block_is_stage_four_and_the_head(name):
    params = abstract_variables(rotjax.create(name, 3, width=4), 32)["params"]
    labels = optim.labels(params, optim.FROZEN["last_block"])
    kinds = {
        "/".join(str(k.key) for k in path[:2]) if path[0].key == "backbone" else "head": label
        for path, label in jax.tree.leaves_with_path(labels)
    }
    assert {path for path, label in kinds.items() if label == "trainable"} == {"backbone/stage4", "head"}
    assert set(kinds) == {"head", "backbone/stem", *(f"backbone/stage{k}" for k in range(1, 5))}


def test_a_prefix_that_names_nothing_is_refused():
    with pytest.raises(UsageError, match=r"^held='backbone' is one string; give a tuple of them, \('backbone',\)$"):
        small(held="backbone")
    with pytest.raises(UsageError, match=r"^frozen='backbone' is one string; give a tuple of them, \('backbone',\)$"):
        optim.labels({"backbone": {}}, "backbone")
    with pytest.raises(UsageError, match="no parameters under backbone/stage7"):
        optim.labels({"backbone": {"stage1": 1.0}, "head": 1.0}, ("backbone/stage7",))
    for held in ("backbone/stage4/block1", "backbone/stage7", "stage4", "head"):
        with pytest.raises(UsageError, match="by stage"):
            small(held=(held,))


def test_a_hessian_times_a_vector_is_the_gradient_of_a_gradient():
    with jax.enable_x64(True):
        model, rng = tiny("imagenet", dtype=jnp.float64), np.random.default_rng(0)
        variables = jax.tree.map(lambda x: np.asarray(x, np.float64), init_variables(model, 0, 16))
        images = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)

        @jax.jit
        def gradient(params):
            def loss(params):
                logits, _ = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
                return training.cross_entropy(logits, np.arange(4)).mean()

            return jax.grad(loss)(params)

        params = variables["params"]
        along = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        found = jax.jit(jax.grad(lambda params: optax.tree.vdot(gradient(params), along)))(params)
        one, other = (gradient(optax.tree.add_scale(params, step, along)) for step in (1e-7, -1e-7))
        expected = jax.tree.map(lambda a, b: (a - b) / 2e-7, one, other)
        scale = max(float(abs(x).max()) for x in jax.tree.leaves(expected))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), found, expected)


def test_weights_are_drawn_alike_alone_and_within_a_program_of_the_users():
    alone, within = init_variables(small(), 3, 8), jax.jit(lambda: init_variables(small(), 3, 8))()
    for one, other in zip(*map(jax.tree.leaves, (alone, within)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)  # the tests' programs are optimized less than users'


def test_weights_drawn_on_the_host_for_a_gpu_are_the_same_and_bound_to_no_device(monkeypatch):
    here = init_variables(small(), 3, 8)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    there = init_variables(small(), 3, 8)
    assert all(jax.tree.leaves(equal(here, there)))
    assert all(x.devices() == {jax.devices()[0]} and not x.committed for x in jax.tree.leaves(there))


@pytest.mark.parametrize(
    ("trainable", "statistics", "kind"),
    [
        *((trainable, statistics, "adamw") for trainable in ("last_block", "head") for statistics in ("held", "moving")),
        ("last_block", "held", "sgd"),
    ],
)
def test_frozen_means_frozen(trainable, statistics, kind):
    frozen = optim.FROZEN[trainable]
    model = small(held=frozen if statistics == "held" else ())
    optimizer = optim.OPTIMIZERS[kind](0.1, weight_decay=0.5, frozen=frozen)
    variables = init_variables(model, 0, 8)
    state = init_state(optimizer, variables)
    step = training.train_step(model, optimizer)
    for seed in range(3):
        state, _ = step(state, batch(seed=seed))
    stays = {"last_block": {"stem", "stage1", "stage2", "stage3"}, "head": {"stem", "stage1", "stage2", "stage3", "stage4"}}
    for stage, before in variables["params"]["backbone"].items():
        same = jax.tree.leaves(equal(before, state.variables["params"]["backbone"][stage]))
        assert all(same) if stage in stays[trainable] else not any(same), stage
    for stage, before in variables["batch_stats"]["backbone"].items():
        same = jax.tree.leaves(equal(before, state.variables["batch_stats"]["backbone"][stage]))
        holds = statistics == "held" and stage in stays[trainable]
        assert all(same) if holds else not any(same), stage
    slots = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.float32)
    moving = sum(
        x.size
        for x, label in zip(
            jax.tree.leaves(variables["params"]),
            jax.tree.leaves(optim.labels(variables["params"], frozen)),
            strict=True,
        )
        if label == "trainable"
    )
    assert slots == {"adamw": 2, "sgd": 1}[kind] * moving


def test_frozen_stages_have_no_backward_pass():
    def flops(trainable):
        model = small(held=optim.FROZEN[trainable])
        optimizer = rotjax.adamw(0.1, frozen=optim.FROZEN[trainable])
        state = init_state(optimizer, init_variables(model, 0, 8))
        return training.train_step(model, optimizer).lower(state, batch()).compile().cost_analysis()["flops"]

    whole, block, head = (flops(trainable) for trainable in ("all", "last_block", "head"))
    assert block < 0.6 * whole
    assert head < 0.4 * whole  # forward alone is a third


def test_evaluation_counts_every_image_once_whatever_the_batch_size(images):
    model = small(3)
    variables = init_variables(model, 0, 8)
    step = training.eval_step(model)
    logits = np.asarray(jax.jit(model.apply)(variables, images["image"]))
    loss = float(optax.softmax_cross_entropy_with_integer_labels(logits, images["label"]).mean())
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (images["label"], logits.argmax(-1)), 1)
    for size in (7, 48, 64):
        result = training.evaluate(
            step, variables, rotjax.place(rotjax.read(rotjax.eval_batches(images, tasks.classify, size)))
        )
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        assert result["accuracy"] == pytest.approx(np.trace(confusion) / 48)
        np.testing.assert_array_equal(result["confusion"], confusion)
    halves = images | {"weight": np.full(48, 0.5, np.float32)}
    weighted = training.evaluate(step, variables, [halves])
    assert weighted["loss"] == pytest.approx(loss, rel=1e-5)
    assert weighted["accuracy"] == pytest.approx(np.trace(confusion) / 48)
    with pytest.raises(ValueError, match="no batch to evaluate on"):
        training.evaluate(step, variables, iter(()))
    for others in (images["label"] + 3, images["label"] - 3):
        with pytest.raises(ValueError, match="no image has a label from 0 on, below the number of logits"):
            training.evaluate(step, variables, [images | {"label": others, "weight": np.ones(48, np.float32)}])
    unknown = np.where(np.arange(48) < 5, -1, images["label"])
    partly = training.evaluate(step, variables, [images | {"label": unknown, "weight": np.ones(48, np.float32)}])
    assert np.isnan(partly["loss"]) and partly["confusion"].sum() == 43
    padding = {"image": images["image"][:5], "label": np.full(5, -1), "weight": np.zeros(5, np.float32)}
    padded = jax.tree.map(lambda *parts: np.concatenate(parts), images | {"weight": np.ones(48, np.float32)}, padding)
    assert training.evaluate(step, variables, [padded])["loss"] == pytest.approx(loss, rel=1e-5)
    with pytest.raises(UsageError, match="there are labels below 0, of images without a class"):
        rotjax.eval_batches(images | {"label": images["label"] - 1}, tasks.classify, 8)


def test_a_network_learns_how_32_images_were_turned():
    ramp = np.linspace(0, 200, 8).astype(np.uint8)[:, None, None]  # bright below, as an image may be
    data = {"image": batch(32, seed=9)["image"] // 5 + ramp, "label": np.zeros(32, np.int32)}
    model, optimizer = rotjax.create("resnet18", 4, "cifar", width=8), rotjax.adamw(1e-2)
    state = init_state(optimizer, init_variables(model, 0, 8))
    stream = batches.train_batches(data, tasks.all_turns, 32, 20, seed=0)
    rows = [
        row
        for _, rows in rotjax.fit(
            training.train_step(model, optimizer), state, rotjax.place(rotjax.read(stream)), steps=20, epoch_steps=1
        )
        for row in rows
    ]
    assert [row["step"] for row in rows if "train_accuracy" in row] == list(range(1, 21))
    assert rows[-1]["train_accuracy"] > 0.95


class Dropped(nn.Module):
    """A head with dropout on a backbone of ours."""

    backbone: nn.Module

    @nn.compact
    def __call__(self, images, *, train=False):
        *_, last = self.backbone(images / 255.0, train=train).values()
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=not train)(last.mean((1, 2))))


def test_dropout_of_a_model_of_the_user_s_is_drawn_anew_in_each_step_alike_in_one_dispatch_and_in_several():
    model, given, still = Dropped(tiny().backbone), batch(), rotjax.sgd(0.0)
    step, steps = training.train_step(model, still), training.train_steps(model, still)
    states = [init_state(still, init_variables(model, 0, 8)) for _ in range(2)]
    losses = []
    for _ in range(2):
        states[0], metrics = step(states[0], given)
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - losses[1]) > 1e-3
    _, metrics = steps(states[1], jax.tree.map(lambda x: np.stack([x, x]), given))
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [
        optax.polyak_sgd(),
        optax.chain(optax.sgd(1e-2), optax.contrib.reduce_on_plateau()),
        optax.MultiSteps(optax.polyak_sgd(), 2),
        optax.GradientTransformation(optax.sgd(1e-2).init, lambda grads, state, _: optax.sgd(1e-2).update(grads, state)),
    ],
)
def test_an_optimizer_may_ask_for_the_loss(rule):
    model = tiny()
    state = init_state(rule, init_variables(model, 0, 8))
    step, losses = training.train_step(model, rule), []
    for _ in range(5):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_an_optimizer_that_asks_for_the_loss_is_given_that_of_the_step():
    def update(gradients, state, params=None, *, value, **_):
        return gradients, value

    model, rule = tiny(), optax.GradientTransformationExtraArgs(lambda _: jnp.float32(0), update)
    state, metrics = training.train_step(model, rule)(init_state(rule, init_variables(model, 0, 8)), batch())
    assert state.opt_state == metrics["loss"] != 0


def test_rows_come_at_log_steps_and_ends_of_epochs():
    model, optimizer = tiny(), rotjax.adamw(1e-3)
    state = init_state(optimizer, init_variables(model, 0, 8))
    step = training.train_step(model, optimizer)
    given = [batch(seed=t) for t in range(7)]
    rows, last = [], state
    fitting = rotjax.fit(step, state, rotjax.place(given), steps=7, epoch_steps=3, log_steps=2)
    for last, new in fitting:  # noqa: B007
        rows += new
    assert [(row["step"], row["epoch"], "train_loss" in row) for row in rows] == [
        (2, 1, False), (3, 1, True), (4, 2, False), (6, 2, False), (6, 2, True), (7, 3, True)
    ]  # fmt: skip
    assert int(last.step) == 7 and int(last.sums["count"]) == 16


def test_a_loop_that_starts_later_yields_the_rows_that_are_left():
    model, optimizer = tiny(), rotjax.adamw(1e-3)
    step, given = training.train_step(model, optimizer), [batch(seed=t) for t in range(7)]

    def rows_of(parts):
        state, rows = init_state(optimizer, init_variables(model, 0, 8)), []
        for start, stop in itertools.pairwise(parts):
            batches = rotjax.place(given[start:stop])
            fitting = rotjax.fit(step, state, batches, start=start, steps=stop, epoch_steps=4, log_steps=2)
            for state, new in fitting:  # noqa: B007
                rows += new
        return [row for row in rows if row["step"] != 3]  # which ends an epoch where the steps end

    assert rows_of((0, 3, 7)) == rows_of((0, 7))


def test_training_goes_on_from_a_state_of_numpys_arrays():
    model, optimizer = tiny(), rotjax.adamw(1e-3)
    state = init_state(optimizer, init_variables(model, 0, 8))
    step, given = training.train_step(model, optimizer), [batch(seed=t) for t in range(2)]

    def trained(state):
        *_, (last, rows) = rotjax.fit(step, state, rotjax.place(given), steps=2, epoch_steps=1)
        return last.variables, rows

    jax.tree.map(np.testing.assert_array_equal, trained(jax.device_get(state)), trained(state))


def test_a_cadence_of_no_steps_is_refused():
    for odd in ({"epoch_steps": 0}, {"epoch_steps": 1, "log_steps": 0}):
        with pytest.raises(ValueError, match="have to be at least 1"):
            next(iter(rotjax.fit(lambda *_: None, None, [], steps=1, **odd)))


def test_batches_that_end_before_the_last_step_are_an_error():
    model, optimizer = tiny(), rotjax.adamw(1e-3)
    state = init_state(optimizer, init_variables(model, 0, 8))
    fitting = rotjax.fit(
        training.train_step(model, optimizer), state, rotjax.place([batch()] * 2), steps=3, epoch_steps=3, log_steps=1
    )
    with pytest.raises(ValueError, match="the batches end at step 2 of 3; give one for each step"):
        for done, (_, rows) in enumerate(fitting, 1):
            assert [row["step"] for row in rows] == [done]


def test_N1_a_loss_that_is_not_a_number_stops_the_training():
    model, optimizer = tiny(), rotjax.adamw(1e30)
    state = init_state(optimizer, init_variables(model, 0, 8))
    step = training.train_step(model, optimizer)
    with pytest.raises(NonFiniteError, match="not finite at step 1;"):  # said at step 8, with the first row
        for _ in rotjax.fit(step, state, rotjax.place(batch(seed=t) for t in range(9)), steps=9, epoch_steps=9, log_steps=8):
            pass


def test_N1_batch_statistics_that_are_not_finite_stop_the_training():
    """Of pixels a billion times too large: normalised they give a finite loss and finite updates."""
    model, optimizer = tiny(std=(1e-25,) * 3), rotjax.adamw(1e-3)
    state = init_state(optimizer, init_variables(model, 0, 8))
    state, metrics = training.train_step(model, optimizer)(state, batch())
    assert np.isfinite(metrics["loss"]) and np.isfinite(optax.tree.norm(state.variables["params"]))
    with pytest.raises(NonFiniteError, match="not finite at step 1;"):
        training.check_finite(state)


@pytest.mark.parametrize(("breaks", "std"), [(1, 0.2), (2, 0.2), (0, 1e-25)])
def test_N1_variables_that_are_not_finite_are_found_in_a_dispatch_of_two_steps(breaks, std):
    """Parameters by the loss of the next step, or after the last one as batch statistics are, which no loss shows."""
    model, optimizer = tiny(std=(std,) * 3), rotjax.adamw(lambda step: jnp.where(step + 1 == breaks, jnp.inf, 1e-3))
    state = init_state(optimizer, init_variables(model, 0, 8))
    (two,) = rotjax.place([jax.tree.map(lambda *arrays: np.stack(arrays), batch(seed=0), batch(seed=1))], axis=1)
    state, metrics = training.train_steps(model, optimizer)(state, two)
    assert np.isfinite(metrics["loss"]).tolist() == [True, breaks != 1]
    with pytest.raises(NonFiniteError, match="not finite at step 2;"):
        training.check_finite(state)


def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32():
    model, optimizer = small(dtype=jnp.bfloat16), rotjax.adamw(1e-3)
    state = jax.eval_shape(lambda: init_state(optimizer, init_variables(model, 0, 8)))
    state, _ = jax.eval_shape(training.train_step(model, optimizer), state, batch())
    assert {x.dtype for x in jax.tree.leaves(state.variables)} == {jnp.dtype("float32")}
    endpoints = jax.eval_shape(lambda: model.apply(init_variables(model, 0, 8), batch()["image"], method="endpoints"))
    assert {name: x.dtype for name, x in endpoints.items()} == {
        **dict.fromkeys(("stem", "stage1", "stage2", "stage3", "stage4"), jnp.dtype("bfloat16")),
        **dict.fromkeys(("features", "logits"), jnp.dtype("float32")),
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_bfloat16_sees_in_an_image_what_float32_does(name):
    """In one program: of two convolutions and a mean over their maps XLA made NaN on CPUs (jax 0.12)."""
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    models = [rotjax.create(name, 4, "cifar", width=4, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    variables = init_variables(models[0], 0, 32)
    pairs = [jax.jit(model.apply)(variables, images) for model in models]
    seen = [rotjax.features(model, variables, images) for model in models]
    for exact, found in (pairs, *zip(*(one.values() for one in seen), strict=True)):
        np.testing.assert_allclose(found, exact, atol=0.02 * np.abs(exact).max())


def test_a_network_eats_nothing_but_uint8():
    with pytest.raises(TypeError, match="uint8"):
        small().init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 3, 8, 8), (2, 8, 8, 1)])
def test_a_network_says_which_shape_it_eats(shape):
    with pytest.raises(TypeError, match=r"images are \[.*; give \[B,H,W,3\]"):
        small().init(jax.random.key(0), np.zeros(shape, np.uint8))


def test_a_state_has_an_abstract_form():
    """As it takes to restore into: shapes and dtypes, without computing any."""
    model, optimizer = tiny(), rotjax.adamw(0.01)

    def state():
        return init_state(optimizer, init_variables(model, 0, 8))

    def form(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert form(jax.eval_shape(state)) == form(state())


def test_only_one_call_of_a_step_is_under_way_when_a_state_is_yielded(monkeypatch):
    """Else a signal waits for all steps that were started since the last row."""
    waited, started = [], itertools.count(1)
    monkeypatch.setattr(jax, "block_until_ready", waited.append)

    def step(state, batch):
        return state, {"loss": np.float32(next(started))}

    state = TrainState(jnp.int32(0), {}, (), {"count": jnp.int32(1)})
    fitting = rotjax.fit(step, state, [{}] * 9, steps=9, epoch_steps=9, log_steps=9)
    for number in range(1, 6):
        next(fitting)
        assert waited[-1] == ({"loss": number - 1} if number > 1 else {})


def test_the_next_batch_is_made_before_anything_is_waited_for_and_none_beyond_the_last_step():
    drawn = []

    def given():
        for number in range(9):
            drawn.append(number)
            yield batch(seed=number)

    model, optimizer = tiny(), rotjax.adamw(0.01)
    state = rotjax.init_state(optimizer, init_variables(model, 0, 8))
    step = rotjax.train_step(model, optimizer)
    fitting = rotjax.fit(step, state, rotjax.place(given()), steps=4, epoch_steps=4, log_steps=1)
    assert [len(drawn) for _ in fitting] == [2, 3, 4, 4]
