"""One, two and four devices compute the same first step; the devices are parts of one CPU, in a process of their own."""

import json
import os
import subprocess
import sys

import pytest

from rotjax.errors import UsageError
from rotjax.parallel import check_batch

FIRST_STEP = """
import jax, json, numpy as np, optax, rotjax
from rotjax.parallel import data_mesh
from rotjax.training import init_state, init_variables, train_step
rng = np.random.default_rng(0)
batch = {"image": rng.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8), "label": rng.integers(0, 4, 32).astype(np.int32)}
model = rotjax.create("resnet18", 4, "cifar", width=4)
results = []
for count in (1, 2, 4):
    mesh = data_mesh(jax.devices()[:count])
    optimizer = optax.sgd(1.0)  # what a step takes off the parameters is their gradient
    state = init_state(optimizer, init_variables(model, 0, 8), mesh)
    before = jax.tree.map(np.asarray, state.variables)
    (placed,) = rotjax.place([batch], mesh)
    state, metrics = train_step(model, optimizer, mesh)(state, placed)
    assert all(len(leaf.sharding.device_set) == count for leaf in jax.tree.leaves(state))
    after = jax.tree.map(np.asarray, state.variables)
    gradients = jax.tree.map(lambda a, b: a - b, before["params"], after["params"])
    results.append((float(metrics["loss"]), gradients, after["batch_stats"]))
def worst(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.max(abs(a - b)) / max(np.max(abs(a)), 1e-6)) for a, b in pairs)
print(json.dumps([[worst(a, b) for a, b in zip(results[0], other, strict=True)] for other in results[1:]]))
"""


def test_P1_loss_gradients_and_statistics_of_a_first_step_agree_on_1_2_and_4_devices():
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", FIRST_STEP], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for loss, gradients, statistics in json.loads(done.stdout.splitlines()[-1]):
        assert loss < 1e-6
        assert gradients < 1e-4
        assert statistics < 1e-5


def test_P4_a_batch_that_devices_cannot_share_is_refused_with_the_nearest_that_they_can():
    class Four:
        size = 4

    check_batch(128, Four)
    with pytest.raises(UsageError, match="batch_size 126 cannot be shared among 4 devices; use 128"):
        check_batch(126, Four)
    with pytest.raises(UsageError, match="use 4"):
        check_batch(1, Four)
