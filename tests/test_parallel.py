"""One, two and four devices compute the same first step; the devices are parts of one CPU, in a process of their own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from rotjax.errors import UsageError
from rotjax.parallel import check_batch, place

STEPS = """
import jax, json, numpy as np, optax, rotjax, sys
from functools import cache, partial
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec as P
from rotjax import checkpoints
from rotjax.data.augmentation import train_view
from rotjax.data.batches import train_picks
from rotjax.feed import Feed
from rotjax.parallel import data_mesh
from rotjax.state import init_state, init_variables
from rotjax.training import eval_step, train_step
rng = np.random.default_rng(0)
batch = {"image": rng.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8), "label": rng.integers(0, 4, 32).astype(np.int32)}
model = rotjax.create("resnet18", 4, "cifar", width=4)

variables = init_variables(model, 0, 8)
optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)  # one program for every rate
step_of = cache(lambda mesh: train_step(model, optimizer, mesh))  # each is traced once

def trained(mesh, rate, steps, state=None):
    state = state or init_state(optimizer, variables, mesh)
    rates = state.opt_state.hyperparams
    rates["learning_rate"] = jax.device_put(np.float32(rate), rates["learning_rate"].sharding)
    step, (placed,) = step_of(mesh), rotjax.place([batch], mesh)
    before = jax.tree.map(np.array, state.variables["params"])
    for _ in range(steps):
        state, metrics = step(state, placed)
    assert all(len(leaf.sharding.device_set) == mesh.size for leaf in jax.tree.leaves(state))
    after = jax.tree.map(np.array, state.variables)
    gradients = jax.tree.map(lambda a, b: a - b, before, after["params"])  # with a rate of 1, what a step takes off
    return state, {"loss": float(metrics["loss"]), "gradient": gradients, "statistic": after["batch_stats"], **after}

def worst(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.max(abs(a - b)) / max(np.max(abs(a)), 1e-6)) for a, b in pairs)

def apart(results):
    return [{name: worst(results[0][name], other[name]) for name in other} for other in results[1:]]

def made(mesh):
    # how many images the first device of the mesh makes of a batch that is, in all, that of the host
    data = {"image": batch["image"], "label": batch["label"]}
    feed, view = Feed("device", 1, 0), partial(train_view, task=rotjax.random_turn, flip=True)
    stream = feed.stream(train_picks(32, 32, 2, seed=0), view, feed.put(data, mesh))
    (pick,) = rotjax.place([stream.elements[1]], mesh)
    found, known = jax.jit(stream.make)(stream.data, pick), rotjax.train_batches(data, rotjax.random_turn, 32, 2, seed=0)[1]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, found), known)
    return found["image"].addressable_shards[0].data.shape[0]

def counted(step, *arguments):
    # operations of each of four devices in a step on arrays as they are given
    return int(step.lower(*arguments).compile().cost_analysis()["flops"])

def seen(evaluation):
    # what is made of several batches
    batches = [{name: array[rows] for name, array in weighted.items()} for rows in (slice(16), slice(16, None))]
    result = rotjax.evaluate(evaluation, variables, rotjax.place(batches))
    features = rotjax.features(model, variables, batch["image"], batch_size=16)
    return [result["loss"], result["confusion"].tolist(), {name: rows.tolist() for name, rows in features.items()}]

one, two, four = (jax.devices()[:count] for count in (1, 2, 4))
meshes = [data_mesh(one), jax.make_mesh((2,), ("batch",), devices=two), data_mesh(four)]  # the second the caller's own
first = [trained(mesh, 1.0, 1)[1] for mesh in meshes]
fifth = [trained(mesh, 0.01, 5)[1] for mesh in meshes]
moved, other_variables = [], init_variables(model, 1, 8)
for mesh in meshes:
    with checkpoints.open_checkpoints(Path(sys.argv[1]) / str(mesh.size)) as opened:
        saved, _ = trained(mesh, 0.01, 1)
        checkpoints.save(opened, saved)
    bits = jax.tree.map(np.array, saved)
    for other in meshes:
        like = init_state(optimizer, other_variables, other)
        restored = checkpoints.restore(opened.directory, 1, like)
        jax.tree.map(np.testing.assert_array_equal, bits, jax.tree.map(np.array, restored))
        moved.append((mesh.size, trained(other, 1.0, 1, restored)[1]))
moved = [apart([result for size, result in moved if size == mesh.size]) for mesh in meshes]
weighted = batch | {"weight": np.ones(32, np.float32)}
(placed,) = rotjax.place([weighted])
state, step, evaluation = init_state(optimizer, variables), step_of(data_mesh()), eval_step(model)
operations = {"trained": [counted(step, state, given) for given in (placed, weighted, jax.device_put(weighted))]}
operations["evaluated"] = [counted(evaluation, state.variables, given) for given in (placed, weighted)]
sights = [seen(evaluation)]
with jax.set_mesh(jax.make_mesh((4,), ("data",))):  # of explicit axes
    sights.append(seen(evaluation))
    operations["trained"].append(counted(train_step(model, optimizer), state, weighted))
    losses = [eval_step(model)(init_variables(model, 0, 8), weighted)["loss"]]
alone = jax.shard_map(
    lambda variables, batch: evaluation(variables, batch)["loss"][None],
    mesh=data_mesh(), in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False,
)
own = jax.shard_map(step, mesh=data_mesh(), in_specs=(P(), P("data")), out_specs=(P(), P()), check_vma=False)
jax.eval_shape(own, state, {name: array[:8] for name, array in weighted.items()})  # 2 images each, not to be shared again
losses += [evaluation(state.variables, placed)["loss"], jax.jit(alone)(variables, weighted).sum()]
parts = [{name: array[rows] for name, array in weighted.items()} for rows in (slice(30), slice(30, None))]
losses.append(sum(evaluation(state.variables, part)["loss"] for part in parts))  # which four devices cannot share
try:
    counted(step, state, {name: array[:30] for name, array in weighted.items()})
except rotjax.errors.UsageError as error:
    refused = str(error)
other = jax.make_mesh((4,), ("x",))  # of explicit axes, which the step has to be told
lying = jax.device_put((state, weighted), NamedSharding(other, P()))
assert abs(counted(train_step(model, optimizer, other), *lying) / operations["trained"][0] - 1) < 1e-4
try:
    counted(step, *lying)
except rotjax.errors.UsageError as error:
    strange = str(error)
results = {"operations": operations, "losses": [float(loss) for loss in losses], "refused": refused, "sights": sights}
results |= {"made": [made(mesh) for mesh in meshes], "strange": strange}
print(json.dumps(results | {"first": apart(first), "fifth": apart(fifth), "moved": sum(moved, [])}))
"""


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """By how much 2 and 4 devices differ from 1, relative to the largest number of each array."""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    words = [sys.executable, "-c", STEPS, str(tmp_path_factory.mktemp("devices"))]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_P1_loss_gradients_and_statistics_of_a_first_step_agree_on_1_2_and_4_devices(differences):
    for found in differences["first"]:
        assert found["loss"] < 1e-6 and found["gradient"] < 3e-5 and found["statistic"] < 1e-5, found


def test_P1_parameters_after_5_steps_of_sgd_agree_on_1_2_and_4_devices(differences):
    for found in differences["fifth"]:
        assert found["params"] < 1e-4, found


def test_batches_made_on_1_2_and_4_devices_are_those_of_the_host_and_each_device_makes_its_share(differences):
    assert differences["made"] == [32, 16, 8]


def test_each_device_computes_its_share_wherever_a_batch_lies_and_whatever_mesh_is_set(differences):
    for placed, *others in differences["operations"].values():
        assert placed > 0 and set(others) == {placed}
    assert differences["losses"] == pytest.approx(differences["losses"][:1] * 4, rel=1e-5)
    assert differences["refused"].startswith("batch_size=30 cannot be shared among 4 devices; use 32")
    assert differences["strange"].startswith("arrays lie on a mesh of axes x, this is for one of data; pass the one `mesh=`")


def test_several_batches_are_evaluated_and_seen_alike_whatever_mesh_is_set(differences):
    alone, under_another_mesh = differences["sights"]
    assert alone[0] > 0 and alone == under_another_mesh


def test_P4_a_checkpoint_goes_on_on_any_number_of_devices_from_the_same_bits(differences):
    """The bits are compared where they are restored, for all pairs of 1, 2 and 4 devices; C16 is that of 2 and 1."""
    assert len(differences["moved"]) == 6
    for found in differences["moved"]:
        assert found["loss"] < 1e-6 and found["gradient"] < 3e-5 and found["statistic"] < 1e-5, found


def test_P4_a_batch_that_devices_cannot_share_is_refused_with_the_nearest_that_they_can():
    check_batch(128, 4)
    with pytest.raises(UsageError, match="^batch_size=126 cannot be shared among 4 devices; use 128"):
        check_batch(126, 4)
    with pytest.raises(UsageError, match="use 4"):
        check_batch(1, 4)
    with pytest.raises(UsageError, match="^batch_size=0 cannot be shared"):
        check_batch(0, 1)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"a": np.zeros(3), "image": np.zeros((4, 8, 8, 3))}, "3 a, 4 image"),
        ({"image": np.zeros((4, 8, 8, 3)), "epoch": 3}, "4 image, no epoch"),
        ({}, "no arrays"),
        ({"image": np.zeros((4, 8, 8, 3)), "one": np.zeros(()), "two": [1, 2]}, "4 image, no one, 2 two"),
    ],
)
def test_a_batch_whose_arrays_are_not_of_one_length_is_refused(batch, said):
    with pytest.raises(UsageError, match=f"^a batch has {said}; give it one entry of each for every image$"):
        next(place([batch]))
