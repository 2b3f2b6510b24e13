import flax.core
import jax
import numpy as np
import pytest

import rotjax
from rotjax import transfer
from rotjax.errors import UsageError
from rotjax.state import init_variables


def network(num_classes, seed=0, name="resnet18", width=4):
    return init_variables(rotjax.create(name, num_classes, "cifar", width=width), seed, 8)


def test_a_graft_takes_the_backbone_and_leaves_the_head():
    donor, classifier = network(4, seed=1), network(10, seed=2)
    before = jax.tree.map(np.asarray, classifier)
    grafted = rotjax.graft(classifier, "backbone", rotjax.part(donor, "backbone"))
    jax.tree.map(np.testing.assert_array_equal, rotjax.part(grafted, "backbone"), rotjax.part(donor, "backbone"))
    jax.tree.map(np.testing.assert_array_equal, rotjax.part(grafted, "head"), rotjax.part(classifier, "head"))
    jax.tree.map(np.testing.assert_array_equal, before, classifier)
    frozen = rotjax.graft(flax.core.freeze(classifier), "backbone", rotjax.part(donor, "backbone"))
    jax.tree.map(np.testing.assert_array_equal, flax.core.unfreeze(frozen), grafted)
    state = rotjax.init_state(rotjax.adamw(1e-3), flax.core.freeze(classifier))
    jax.tree.map(np.testing.assert_array_equal, state.variables, classifier)


def test_parts_are_joined_to_what_they_were_taken_from():
    variables = network(4)
    parts = {name: rotjax.part(variables, name) for name in ("backbone", "head")}
    assert "batch_stats" not in parts["head"]
    jax.tree.map(np.testing.assert_array_equal, transfer.joined(parts), variables)
    with pytest.raises(UsageError, match="no part 'backbones'; there are backbone, head"):
        rotjax.part(variables, "backbones")


def test_a_part_that_does_not_fit_is_refused_naming_the_first_difference():
    classifier = network(10)
    with pytest.raises(UsageError, match=r"backbones differ in \d+ arrays, first .*float32\[.*8\] in the donor, .*4\] here"):
        rotjax.graft(classifier, "backbone", rotjax.part(network(4, width=8), "backbone"))
    with pytest.raises(UsageError, match="absent"):
        rotjax.graft(classifier, "backbone", rotjax.part(network(4, name="resnet50"), "backbone"))
    with pytest.raises(UsageError, match=r"heads differ in 2 arrays"):
        rotjax.graft(classifier, "head", rotjax.part(network(4), "head"))
    without = rotjax.part(network(4), "backbone")
    del without["batch_stats"]
    with pytest.raises(UsageError, match="absent in the donor"):
        rotjax.graft(classifier, "backbone", without)
