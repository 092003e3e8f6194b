"""A network and data small enough that a training step compiles in a fraction of a second."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import schedules
from bnn_jax.data.augment import prepare_eval, prepare_train
from bnn_jax.data.memory import ImageSource, Split, fingerprint
from bnn_jax.experiment import start
from bnn_jax.layers.conv import QuantConv, QuantDense
from bnn_jax.layers.norm import BatchNorm
from bnn_jax.networks.base import NetworkOutput
from bnn_jax.objectives import Objective
from bnn_jax.objectives.classification import CrossEntropy
from bnn_jax.quantizers import build_act, build_weight
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import DataSpec, OptimSpec, ParameterGroup, QuantSpec, Spec, Stage, spec
from bnn_jax.training.devices import Devices, all_devices
from bnn_jax.training.evaluate import Evaluator
from bnn_jax.training.loop import Setup, steps_per_epoch
from bnn_jax.training.optimizer import make_optimizer
from bnn_jax.training.seeds import Seeds, one_seed
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import Constants, StepParts

SIZE, CLASSES = 6, 4
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
PRUNED = spec("pruned", inner=spec("dorefa", bits=4), amount=0.3)
GROUPS = (ParameterGroup(".*", weight_decay=1e-3),)


class TinyNetwork(nn.Module):
    """Convolution, BatchNorm, ReLU, average pooling, classifier."""

    weight: Spec = PRUNED
    act: Spec = spec("identity")
    num_classes: int = CLASSES

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        quantizers = {"weight_quantizer": build_weight(self.weight), "act_quantizer": build_act(self.act)}
        x = QuantConv(4, strides=(2, 2), name="conv", **quantizers)(x, ctx)
        x = jnp.mean(jax.nn.relu(BatchNorm(name="bn")(x, ctx)), axis=(1, 2))
        return NetworkOutput(logits=QuantDense(self.num_classes, name="fc")(x, ctx), features=x)


def split(count: int, seed: int) -> Split:
    """Images whose brightness tells the class, and noise."""
    rng = np.random.RandomState(seed)
    labels = rng.randint(0, CLASSES, count).astype(np.int32)
    images = rng.randint(0, 120, (count, SIZE, SIZE, 3)) + 40 * labels[:, None, None, None]
    return Split(images.astype(np.uint8), labels)


def source(*, num_train: int = 20, num_test: int = 10, num_validation: int = 0) -> ImageSource:
    """Data held in memory."""
    train, test = split(num_train, 0), split(num_test, 1)
    validation = split(num_validation, 2) if num_validation else None
    return ImageSource(
        name="tiny",
        num_classes=CLASSES,
        train=train,
        test=test,
        validation=validation,
        mean=MEAN,
        std=STD,
        augment="pad_crop_flip",
        pad=1,
        fingerprint=fingerprint(train, test, validation),
    )


def stage(*, epochs: int = 2, batch_size: int = 8, learning_rate: float = 0.1, **options: Any) -> Stage:
    """A stage whose network and objectives are only names: the tests build their own."""
    return Stage(
        name="tiny",
        network=spec("tiny"),
        quant=QuantSpec(),
        data=DataSpec("tiny"),
        objectives=(spec("cross_entropy"),),
        optim=OptimSpec(
            spec("sgd", momentum=0.9, nesterov=True),
            spec("piecewise", boundaries=(1.0,), values=(learning_rate, 0.1 * learning_rate)),
            epochs=epochs,
            batch_size=batch_size,
            groups=GROUPS,
            **options,
        ),
        seed=3,
    )


@functools.cache
def variables(network: TinyNetwork = TinyNetwork()) -> dict[str, Any]:  # noqa: B008 - frozen
    """Initial variables as numpy arrays, made once."""
    # Values, even if the first call stands inside a function that is being traced.
    with jax.ensure_compile_time_eval():
        return jax.device_get(start.init_variables(network, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3))))


def setup(chosen: Stage, parts: StepParts, source: ImageSource, *, seeds: Seeds | None = None) -> Setup:
    """The objects of a tiny stage, for the loop."""
    epochs, steps = chosen.optim.epochs, steps_per_epoch(chosen, len(source.train))
    schedule = schedules.build(chosen.optim.learning_rate, steps_per_epoch=steps, epochs=epochs)
    return Setup(chosen, source, schedule, parts.network, parts, {}, seeds or one_seed(chosen.seed))


def parts(
    *,
    network: TinyNetwork | None = None,
    objectives: tuple[Objective, ...] = (CrossEntropy(),),
    chosen: Stage | None = None,
    steps_per_epoch: int = 3,
    augment: str = "pad_crop_flip",
    **options: Any,
) -> StepParts:
    """What the step of a tiny stage is made of."""
    network, chosen = network or TinyNetwork(), chosen or stage()
    schedule = schedules.build(chosen.optim.learning_rate, steps_per_epoch=steps_per_epoch, epochs=chosen.optim.epochs)
    return StepParts(
        network=network,
        objectives=objectives,
        optimizer=make_optimizer(chosen.optim, variables(network)["params"], schedule=schedule),
        prepare=functools.partial(prepare_train, mean=MEAN, std=STD, augment=augment, pad=1),
        **options,
    )


def state(step_parts: StepParts, *, seed: int = 3, devices: Devices | None = None) -> TrainState:
    """A new state in buffers of its own."""
    return start.create_state(
        jax.tree.map(jnp.array, variables(step_parts.network)),
        optimizer=step_parts.optimizer,
        objectives=step_parts.objectives,
        num_classes=CLASSES,
        seed=seed,
        devices=devices or all_devices(),
    )


def constants(data: ImageSource, teacher: Any = None) -> Constants:
    """The arrays a step reads."""
    return Constants(jnp.asarray(data.train.images), jnp.asarray(data.train.labels), teacher or {})


prepare_for_evaluation = functools.partial(prepare_eval, mean=MEAN, std=STD)


def assert_equal(actual: Any, expected: Any) -> None:
    """Bit for bit, keys of random generators too."""

    def plain(leaf: Any) -> np.ndarray:
        is_key = jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(plain(one), plain(other), err_msg=jax.tree_util.keystr(path))


def evaluator(network: Any, splits: dict[str, Split], *, batch_size: int = 5) -> Evaluator:
    """Evaluates on tiny images, on all devices."""
    return Evaluator(
        network, prepare=prepare_for_evaluation, splits=splits, batch_size=batch_size, devices=all_devices()
    )
