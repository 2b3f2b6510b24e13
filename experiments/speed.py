"""What `experiments.benchmark` measures: pairs of sides, each a function that gives one figure when it is called."""

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from unittest import mock

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import rotjax
from experiments import peers
from experiments.peers import Timed, timed
from rotjax import training
from rotjax.data.batches import Batches, train_picks
from rotjax.feed import STEPS, Where, stacked
from rotjax.models import spatial
from rotjax.optim import FROZEN
from rotjax.parallel import data_mesh
from rotjax.scoring import TOGETHER

log = logging.getLogger(__name__)

Side = Callable[[], float]
Sides = tuple[Side, Side | None]  # rotjax's, and that of a peer if it is installed

BATCH = 128
SECONDS = 1.0  # that a measurement takes at least
COUNTS = {  # training GFLOPs and, in bfloat16 with nothing fused, MB of traffic an image; cifar stem, 32 px
    "resnet18": (3.33, 17.5),
    "resnet50": (7.79, 96.0),
    "resnet101": (15.06, 143.0),
    "densenet121": (5.33, 146.0),
}

GRAPHED = (  # what a CUDA graph may hold: the default of jax 0.11, and the last two
    "FUSION", "CUBLAS", "CUBLASLT", "CUDNN", "CUSTOM_CALL", "CONDITIONAL", "DYNAMIC_SLICE_FUSION", "CONVOLUTION", "WHILE",
)  # fmt: skip


def images(count: int) -> dict[str, np.ndarray]:
    """Noise at 32 px, with labels from 0 to 3."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    return {"image": pixels, "label": rng.integers(0, 4, count, np.int32)}


def per_second(seconds: Timed, size: float) -> Side:
    """Images/s, or other work/s, of what does `size` at each count, for at least SECONDS; the other side may just have had
    the memory and the caches, so the first time does not count."""
    seconds(2)
    count = max(2, round(2 * SECONDS / seconds(2)))

    def side() -> float:
        seconds(1)
        return count * size / seconds(count)

    return side


def train_rate(
    name: str,
    stem: str,
    batch_size: int = BATCH,
    dtype: str = "float32",
    trainable: str = "all",
    options: dict[str, str | bool] | None = None,
) -> Side:
    """Images/s of jitted steps on resident batches, one a dispatch on a CPU, else STEPS; with the compiler's `options`."""
    size = _dispatched()
    lowered, state, given = _lowered(name, stem, batch_size, dtype, trainable, size)
    step = lowered.compile(compiler_options=options)

    def dispatch() -> rotjax.TrainState:
        nonlocal state
        state, _ = step(state, given)
        return state

    return per_second(timed(dispatch, jax.block_until_ready), size * batch_size)


def train_and_torch(name: str, stem: str, batch_size: int = BATCH, dtype: str = "float32", compiled: bool = False) -> Sides:
    """Images/s of rotjax's and of PyTorch's steps."""
    try:
        theirs = _torch_rate(name, stem, batch_size, dtype, peers.MODES if compiled else (None,))
    except ImportError:
        theirs = None
    peers.release()
    return train_rate(name, stem, batch_size, dtype), theirs


def _torch_rate(name: str, stem: str, batch_size: int, dtype: str, modes: Sequence[str | None]) -> Side:
    """Images/s of PyTorch's steps, compiled in the fastest of `modes`."""
    steps = {mode: peers.torch_step(name, stem, images(batch_size), dtype=dtype, mode=mode) for mode in modes}
    rates = {mode: per_second(step, batch_size) for mode, step in steps.items()}
    if len(modes) == 1:
        return rates[modes[0]]
    best = max(rates, key=lambda mode: rates[mode]())
    log.info(f"torch.compile is fastest in its mode {best!r}")
    return rates[best]


def products_and_convolutions() -> Sides:
    """GFLOP/s of XLA's matrix products as large as the 3x3 convolutions of ResNet18's four stages, which each have as much
    work, cifar stem; and of PyTorch's convolutions."""
    rng, shapes = np.random.default_rng(0), ((64, 32), (128, 16), (256, 8), (512, 4))
    maps = [rng.standard_normal((BATCH, side, side, channels), np.float32) for channels, side in shapes]
    pairs = [(jnp.tile(one.reshape(-1, one.shape[3]), 9), jnp.ones((9 * one.shape[3], one.shape[3]))) for one in maps]
    multiply = jax.jit(jnp.matmul)

    work = sum(2 * patches.size * kernel.shape[1] for patches, kernel in pairs) / 1e9
    products = timed(lambda: [multiply(patches, kernel) for patches, kernel in pairs], jax.block_until_ready)
    ours = per_second(products, work)
    try:
        return ours, per_second(peers.torch_convolutions(maps), work)
    except ImportError:
        return ours, None


def pipelines(options: grain.ReadOptions | None) -> Sides:
    """Images/s of the training batches, read on one core, and of Grain's from a new start, so that none is read ahead.

    Grain has one core too where `options` give it no threads, else as many as it likes.
    """
    data, count = images(10_000), round(400 * SECONDS)  # of the last few, threads have others under way

    def naive() -> float:
        with _one_core() if options else nullcontext():
            began = time.perf_counter()
            with closing(peers.naive_batches(data, BATCH, options)) as reader:
                for _ in itertools.islice(reader, count):
                    pass
                return count * BATCH / (time.perf_counter() - began)

    return per_second(_taken(rotjax.read(_batches(data))), BATCH), naive


def pipeline_and_step(augment: Where) -> Sides:
    """Images/s that one core of the host sends to the device, made where `augment` says, as dispatches want them; and of
    steps."""
    size, data = _dispatched(), images(10_000)
    elements = train_picks(len(data["label"]), BATCH, 10**6, seed=0) if augment == "device" else _batches(data)
    placed = rotjax.place(stacked(rotjax.read(elements), itertools.repeat(size)), axis=1)
    return per_second(_taken(placed), size * BATCH), train_rate("resnet18", "imagenet")


def frozen_and_full() -> Sides:
    """Seconds an image takes where the last block trains, and where everything does."""
    frozen, full = train_rate("resnet18", "imagenet", trainable="last_block"), train_rate("resnet18", "imagenet")
    return lambda: 1 / frozen(), lambda: 1 / full()


def frozen_and_full_flops() -> Sides:
    """Floating-point operations of the two steps, compiled for the CPU: those of a GPU's libraries count for nothing."""
    mesh = data_mesh(jax.devices("cpu")[:1])

    def operations(trainable: str) -> float:
        lowered, _, _ = _lowered("resnet18", "imagenet", BATCH, "float32", trainable, 1, mesh)
        return (lowered.compile().cost_analysis() or {})["flops"]

    frozen, full = operations("last_block"), operations("all")
    return lambda: frozen, lambda: full


def graphs_and_default() -> Sides:
    """Images/s of dispatches that XLA makes one CUDA graph each, and of its default: graphs that end at convolutions."""
    train = partial(train_rate, "resnet18", "imagenet")
    return train(options={"xla_gpu_enable_command_buffer": ",".join(GRAPHED)}), train()


def products_and_convolutions_of_small_maps(side: int) -> Sides:
    """Images/s of steps whose maps of up to `side` pixels come out of products of matrices, and all of convolutions."""

    def rate(small: int) -> Side:
        with mock.patch.dict(spatial.SMALL, {jax.default_backend(): small}):
            return train_rate("resnet18", "imagenet")

    return rate(side), rate(0)


def evaluation_and_training() -> Sides:
    """Images/s of evaluation, in batches as a command scores them, and of training."""
    model = rotjax.create("resnet18", 4)
    variables = rotjax.init_variables(model, 0, 32)
    size = BATCH * (1 if jax.default_backend() == "cpu" else TOGETHER)
    batch = jax.device_put(images(size) | {"weight": np.ones(size, np.float32)})
    step = rotjax.eval_step(model).lower(variables, batch).compile()

    evaluated = timed(lambda: step(variables, batch), jax.block_until_ready)
    return per_second(evaluated, size), train_rate("resnet18", "imagenet")


def step_and_floor(name: str) -> Sides:
    """Seconds of a step at batch 512 in bfloat16, and of its arithmetic and then its traffic on this device."""
    flops, traffic = COUNTS[name]
    step, peak = train_rate(name, "cifar", 512, "bfloat16"), _peaks()
    return lambda: 512 / step(), lambda: 512 * (flops * 1e9 / peak[0]() + traffic * 1e6 / peak[1]())


def _lowered(
    name: str, stem: str, batch_size: int, dtype: str, trainable: str, size: int, mesh: Mesh | None = None
) -> tuple[jax.stages.Lowered, rotjax.TrainState, dict]:
    """A dispatch of `size` train steps, and the state and the batches that it takes first."""
    frozen = FROZEN[trainable]
    model = rotjax.create(name, 4, stem, held=frozen, dtype=jnp.dtype(dtype))
    optimizer = rotjax.adamw(rotjax.piecewise(1e-3, [10**6]), 0.01, frozen)
    state = rotjax.init_state(optimizer, rotjax.init_variables(model, 0, 32), mesh)
    (given,) = rotjax.place(stacked([images(batch_size)] * size, [size]), mesh, axis=1)
    return training.train_steps(model, optimizer, mesh).lower(state, given), state, given


def _dispatched() -> int:
    """Steps of a dispatch, as a command takes them."""
    return 1 if jax.default_backend() == "cpu" else STEPS


def _batches(data: dict[str, np.ndarray]) -> Batches:
    return rotjax.train_batches(data, rotjax.random_turn, BATCH, 10**6, seed=0)


def _taken(batches: Iterator) -> Timed:
    """The next of `batches`, on one core, until they are where they are placed, if they are."""
    seconds = timed(partial(next, batches), jax.block_until_ready)

    def on_one_core(count: int) -> float:
        with _one_core():
            return seconds(count)

    return on_one_core


@contextmanager
def _one_core() -> Iterator[None]:
    """This thread on one core, where the system knows how."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _peaks() -> tuple[Side, Side]:
    """FLOP/s of a bfloat16 product of square matrices, and bytes/s of a copy, on this device."""
    side = 8192
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)

    def rate(function: Callable, work: float) -> Side:
        return per_second(timed(partial(jax.jit(function), matrix), jax.block_until_ready), work)

    return rate(lambda x: x @ x, 2 * side**3), rate(lambda x: -x, 2 * matrix.nbytes)
