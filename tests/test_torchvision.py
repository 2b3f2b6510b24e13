"""Our networks are torchvision's: on the same weights the same logits, gradients and batch statistics.

Without torch and torchvision the counts, the names and the round trip are tested still.
"""

from functools import reduce
from operator import getitem

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import ks_2samp

import rotjax
from experiments import control, peers, rows
from rotjax.errors import UsageError
from rotjax.models import CIFAR10_MEAN, CIFAR10_STD
from rotjax.state import abstract_variables
from rotjax.torchvision import export_weights, import_weights

COUNTS = {"resnet18": 11_689_512, "resnet50": 25_557_032, "resnet101": 44_549_160, "densenet121": 7_978_856}
NUM_CLASSES = 10

# Where a convolution's output is 2x2 or smaller `rotjax.models.spatial` has forms of its own: at 72 px that is no map of
# ResNet18's (odd ones instead, 9x9 to 3x3) and DenseNet121's last, at 64 px stage 4, at 32 px stages 3 and 4 (1x1), with the
# cifar stem at 16 px stage 4.
CASES = {
    "resnet18-32px": ("resnet18", "imagenet", 32, 8),
    "resnet18-72px": ("resnet18", "imagenet", 72, 4),
    "resnet18-16px-cifar": ("resnet18", "cifar", 16, 8),
    "resnet50-64px": ("resnet50", "imagenet", 64, 4),
    "resnet101-64px": ("resnet101", "imagenet", 64, 4),
    "densenet121-72px": ("densenet121", "imagenet", 72, 4),
}
each_case = pytest.mark.parametrize(("name", "stem", "size", "batch"), CASES.values(), ids=CASES)
each_name = pytest.mark.parametrize("name", rotjax.BACKBONES)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", exc_type=ImportError)


@pytest.fixture(scope="module")
def networks(torch):
    try:
        return peers.networks()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def build(torch, networks):
    """`build(name, stem)` is torchvision's network; of what starts at zero or one nothing is left there."""

    def network(name, stem="imagenet"):
        torch.manual_seed(0)
        model = peers.stemmed(getattr(networks, name)(num_classes=NUM_CLASSES), stem)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.weight.uniform_(0.5, 1)
                    module.bias.normal_(0, 0.2)
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 1.5)
                elif isinstance(module, torch.nn.Linear):
                    module.bias.uniform_(-0.1, 0.1)
        return model

    return network


def state_of(network):
    """The state dict as NumPy copies."""
    return {key: value.numpy().copy() for key, value in network.state_dict().items()}


def pictures(torch, size, batch, dtype):
    """Random pixels for us, and the same normalised for torch."""
    pixels = np.random.default_rng(size).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    normalised = (pixels.astype(dtype) / 255 - np.array(CIFAR10_MEAN, dtype)) / np.array(CIFAR10_STD, dtype)
    return pixels, torch.from_numpy(np.ascontiguousarray(normalised.transpose(0, 3, 1, 2)))


def deviation(ours, theirs):
    """The largest difference of two arrays, relative to the largest absolute value of the second."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def worst(ours, theirs):
    """The largest `deviation` over the leaves of two trees of one structure, and its path."""
    leaves = jax.tree.leaves_with_path(jax.tree.map(deviation, ours, theirs))
    return max((value, jax.tree_util.keystr(path, simple=True, separator="/")) for path, value in leaves)


@each_case
def test_evaluation_logits(torch, build, name, stem, size, batch):
    network = build(name, stem).eval()
    pixels, x = pictures(torch, size, batch, np.float32)
    variables = import_weights(name, state_of(network))
    ours = np.asarray(jax.jit(rotjax.create(name, NUM_CLASSES, stem).apply)(variables, pixels))

    heir = build(name, stem).eval()
    for parameter in heir.parameters():
        torch.nn.init.zeros_(parameter)
    exported = {key: torch.from_numpy(array) for key, array in export_weights(name, variables).items()}
    heir.load_state_dict(exported, strict=True)
    with torch.no_grad():
        assert deviation(ours, network(x).numpy()) < 1e-5
        assert deviation(ours, heir(x).numpy()) < 1e-5


@each_case
def test_training_step(torch, build, name, stem, size, batch):
    """Logits, gradients and statistics in float64: in float32 torch itself is 2 to 6 % off on ResNet101's gradients."""
    network = build(name, stem).double().train()
    pixels, x = pictures(torch, size, batch, np.float64)
    labels = np.arange(batch) % NUM_CLASSES
    before = state_of(network)

    with jax.enable_x64(True):
        model = rotjax.create(name, NUM_CLASSES, stem, dtype=jnp.float64)

        def step(variables, images, labels):
            def loss(params):
                logits, updated = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, updated)

            gradients, (logits, updated) = jax.grad(loss, has_aux=True)(variables["params"])
            return logits, {"params": gradients} | updated

        compiled = jax.jit(step)
        our_logits, ours = jax.tree.map(np.asarray, compiled(import_weights(name, before), pixels, labels))

    elements = {}  # under each mean, by the norm's name
    for key, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda _, x, __, key=key: elements.update({key: x[0].numel() // x[0].shape[1]}))
    logits = network(x)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    after = state_of(network) | {key: parameter.grad.numpy() for key, parameter in network.named_parameters()}
    for norm, n in elements.items():  # torch moves towards the variance times n / (n - 1), ours towards the variance
        key = f"{norm}.running_var"
        after[key] = 0.9 * before[key] + (after[key] - 0.9 * before[key]) * (n - 1) / n

    assert deviation(our_logits, logits.detach().numpy()) < 1e-6
    deviant, path = worst(ours, import_weights(name, after))
    assert deviant < 1e-6, path


@each_name
def test_round_trip_of_torchvisions_state(build, name):
    state = state_of(build(name))
    exported = export_weights(name, import_weights(name, state))
    assert exported.keys() == {key for key in state if not key.endswith("num_batches_tracked")}
    for key, array in exported.items():
        assert array.dtype == state[key].dtype
        np.testing.assert_array_equal(array, state[key], err_msg=key)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("resnet18", "imagenet"), ("resnet18", "cifar"), ("resnet50", "imagenet"), ("densenet121", "imagenet")],
)
def test_initial_distributions(torch, networks, name, stem):
    torch.manual_seed(0)
    theirs = state_of(peers.stemmed(getattr(networks, name)(num_classes=1000), stem))
    init = jax.jit(rotjax.create(name, 1000, stem=stem).init)
    ours = export_weights(name, init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8)))
    for key, mine in ours.items():
        if np.ptp(theirs[key]) == 0:
            np.testing.assert_array_equal(mine, theirs[key], err_msg=key)
        else:  # of a normal sample of n the standard deviation is known to 1 / sqrt(2n), of a uniform one better
            assert abs(np.log(mine.std() / theirs[key].std())) < 5 / np.sqrt(mine.size), key
            fit = ks_2samp(mine.ravel()[:100_000], theirs[key].ravel()[:100_000])
            assert fit.pvalue > 1e-5, key  # pyright: ignore[reportAttributeAccessIssue] (scipy makes the class up at run time)
    constant = {key for key in ours if np.ptp(ours[key]) == 0}
    assert ("classifier.bias" in constant) == (name == "densenet121")


@each_name
def test_parameter_count(name):
    params = abstract_variables(rotjax.create(name, 1000), 32)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == COUNTS[name]


@each_name
def test_parameter_count_of_torchvision(torch, networks, name):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in getattr(networks, name)().parameters()) == COUNTS[name]


def random_variables(name, stem="imagenet", width=8):
    """Variables in float64 in which all arrays differ, of a network that is narrow unless said."""
    rng = np.random.default_rng(0)
    shapes = abstract_variables(rotjax.create(name, NUM_CLASSES, stem, width=width), 32)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)


@each_name
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_C15_round_trip_of_our_variables(name, stem):
    variables = random_variables(name, stem)
    exported = export_weights(name, variables)
    assert all(array.flags.c_contiguous and array.flags.writeable for array in exported.values())
    imported = import_weights(name, exported)
    jax.tree.map(np.testing.assert_array_equal, imported, variables)
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(imported))


NAMES = {
    "resnet18": {
        "params/backbone/stem/conv/kernel": "conv1.weight",
        "batch_stats/backbone/stem/norm/mean": "bn1.running_mean",
        "params/backbone/stage4/block2/norm2/bias": "layer4.1.bn2.bias",
    },
    "resnet101": {
        "params/backbone/stage3/block23/norm3/scale": "layer3.22.bn3.weight",
        "params/backbone/stage1/block1/shortcut_conv/kernel": "layer1.0.downsample.0.weight",
        "batch_stats/backbone/stage4/block1/shortcut_norm/var": "layer4.0.downsample.1.running_var",
        "params/head/kernel": "fc.weight",
    },
    "densenet121": {
        "params/backbone/stem/conv/kernel": "features.conv0.weight",
        "params/backbone/stage3/layer24/conv2/kernel": "features.denseblock3.denselayer24.conv2.weight",
        "params/backbone/stage4/transition/norm/bias": "features.transition3.norm.bias",
        "batch_stats/backbone/stage4/norm/var": "features.norm5.running_var",
        "params/head/bias": "classifier.bias",
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_layouts(name):
    variables = random_variables(name)
    exported = export_weights(name, variables)
    for path, key in NAMES[name].items():
        leaf = reduce(getitem, path.split("/"), variables)
        axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[leaf.ndim]
        np.testing.assert_array_equal(exported[key], leaf.transpose(axes), err_msg=path)


def test_an_import_is_a_copy():
    arrays = export_weights("resnet18", random_variables("resnet18"))
    variables = import_weights("resnet18", arrays)
    arrays["fc.bias"][:] = 7
    assert (variables["params"]["head"]["bias"] != 7).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fc.bias": None}, ["1 at fault", "fc.bias is absent, should be [10]"]),
        ({"conv1.weight": None}, ["1 at fault", "conv1.weight is absent, should be [64, 3, 7, 7]"]),
        ({"fc.gain": np.ones(3)}, ["1 at fault", "fc.gain is [3], should be absent"]),
        ({"layer1.0.bn1.weight": np.ones(9)}, ["1 at fault", "layer1.0.bn1.weight is [9], should be [64]"]),
        ({"fc.bias": np.ones((10, 1, 1))}, ["fc.bias is [10, 1, 1], should be [10]"]),
        ({"conv1.weight": np.ones((0, 3, 7, 7))}, ["1 at fault", "conv1.weight is [0, 3, 7, 7], should be [64, 3, 7, 7]"]),
        (
            {"layer1.0.bn1.weight": None, "fc.weight": np.ones((10, 7))},
            ["2 at fault", "layer1.0.bn1.weight is", "fc.weight is"],
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, said):
    arrays = export_weights("resnet18", random_variables("resnet18", width=64)) | change
    with pytest.raises(UsageError) as refusal:
        import_weights("resnet18", {key: array for key, array in arrays.items() if array is not None})
    message = str(refusal.value)
    assert "\n" not in message
    assert all(words in message for words in said), message


def test_another_network_is_refused():
    arrays = export_weights("resnet18", random_variables("resnet18"))
    for other in ("resnet50", "densenet121"):
        with pytest.raises(UsageError, match=f"the arrays are not those of {other}"):
            import_weights(other, arrays)
        with pytest.raises(UsageError, match=f"the arrays are not those of {other}"):
            export_weights(other, random_variables("resnet18"))
    with pytest.raises(UsageError, match="unknown backbone 'resnet19'"):
        import_weights("resnet19", arrays)
    with pytest.raises(UsageError, match="unknown backbone 'resnet19'"):
        export_weights("resnet19", random_variables("resnet18"))


def test_variables_of_another_form_are_refused():
    variables = random_variables("densenet121")
    for odd in (variables["params"], {"params": variables["params"]}, variables | {"params": np.ones(3)}, {}):
        with pytest.raises(UsageError, match="the arrays are not those of densenet121"):
            export_weights("densenet121", odd)


@pytest.mark.parametrize("preset", ["report", "strong"])
def test_a_control_has_the_rate_of_its_recipe_in_every_step(torch, preset):
    data = rotjax.Dataset(
        "cifar10", ("a", "b"), *[{"image": np.zeros((24, 32, 32, 3), np.uint8), "label": np.arange(24) % 2}] * 2
    )
    plan = rotjax.plan(rotjax.Classification(batch_size=8, epochs=20, preset=preset), data=data)
    optimizer, schedule = control._optimizer(plan.recipe, [torch.nn.Parameter(torch.zeros(()))], steps=3)
    rates = []
    for _ in range(plan.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates, [plan.schedule(step) for step in range(plan.steps)], rtol=1e-5, atol=1e-8)
    assert len({*rates}) > 1


def test_a_control_starts_from_the_backbone_of_the_run_before_and_trains_what_the_run_does(networks, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"image": rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), "label": np.arange(8) % 2}
    data = rotjax.Dataset("noise", ("a", "b"), arrays, arrays)
    first = rows.Run("1", "rotations", rotjax.Rotation(stem="cifar", image_size=8, batch_size=8, max_steps=1))
    recipe = rotjax.Classification(pretrained=first.name, trainable="last_block", image_size=8, batch_size=8)
    list(rotjax.train(rotjax.plan(first.recipe, data=data), tmp_path / first.name))
    _, variables, _ = rotjax.load(tmp_path / first.name)
    network = control._model(rows.Run("2a", "classes", recipe, after=first), 2, tmp_path)
    exported, found = export_weights("resnet18", variables), state_of(network)
    assert {"conv1.weight", "bn1.running_mean", "layer4.1.conv2.weight"} < exported.keys()
    for key in exported.keys() - {"fc.weight", "fc.bias"}:
        np.testing.assert_array_equal(found[key], exported[key], err_msg=key)
    assert network.fc.weight.shape == (2, 512) and network.conv1.weight.shape == (64, 3, 3, 3)
    trained = {key.partition(".")[0] for key, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {"layer4", "fc"}


@pytest.mark.parametrize(
    ("recipe", "epochs", "dtype"), [(rotjax.Rotation, 5, "float32"), (rotjax.Classification, 4, "bfloat16")]
)
def test_a_control_learns_by_the_strong_preset(networks, tmp_path, recipe, epochs, dtype):
    """Which way is up on ramps, or whether they are bright; few CPUs are fast in the preset's bfloat16."""
    ramp = np.linspace(0, 120, 16).astype(np.uint8)[:, None, None].repeat(16, 1).repeat(3, 2)
    labels = np.arange(32) % 2
    images = ramp + (100 * labels).astype(np.uint8)[:, None, None, None]
    data = rotjax.Dataset("ramps", ("dark", "bright"), *[{"image": images, "label": labels}] * 2)
    small = recipe(preset="strong", epochs=epochs, warmup_epochs=1, batch_size=16, dtype=dtype)
    run = rows.Run("S", "a control", small)
    *_, last = control.train(run, data, tmp_path)
    assert last["epoch"] == epochs and last["test_accuracy"] > 0.9
