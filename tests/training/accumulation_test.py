"""Batches passed through the network in parts, and batches that bring their own images."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers.conv import QuantConv, QuantDense
from bnn_jax.layers.norm import BatchNorm
from bnn_jax.networks.base import NetworkOutput
from bnn_jax.quantizers import build_act, build_weight
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import spec
from bnn_jax.training.devices import all_devices
from bnn_jax.training.step import StepParts, compile_train_steps, train_step
from tests.training import tiny

DATA = tiny.source()
BATCH = np.arange(8, dtype=np.int32)


class DeepNetwork(nn.Module):
    """Convolutions of signs, with BatchNorm or without, so that there is something between them to compute again."""

    depth: int = 1
    normalise: bool = False
    unused_parameters = ()

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        quantizers = {
            "weight_quantizer": build_weight(spec("dorefa", bits=4)),
            "act_quantizer": build_act(spec("identity")),
        }
        for index in range(self.depth):
            x = QuantConv(4, name=f"conv{index}", **quantizers)(x, ctx)
            x = jax.nn.relu(BatchNorm(name=f"bn{index}")(x, ctx) if self.normalise else x)
        features = jnp.mean(x, axis=(1, 2))
        dense = QuantDense(tiny.CLASSES, name="fc", **quantizers)
        return NetworkOutput(logits=dense(features, ctx), features=features)


def run_step(parts: StepParts, *, valid: int = 8, rows: Any = BATCH) -> tuple[Any, dict[str, jax.Array]]:
    """One step on the first images, of which some only fill up the batch."""
    step = jax.jit(functools.partial(train_step, parts))
    return step(tiny.state(parts), tiny.constants(DATA), rows, np.arange(8) < valid)


@pytest.mark.parametrize("valid", [8, 5, 1])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_without_batch_norm_a_step_in_parts_is_the_step_of_the_whole_batch(count, valid):
    parts = tiny.parts(network=DeepNetwork())
    whole, metrics = run_step(parts, valid=valid)
    divided, of_parts = run_step(dataclasses.replace(parts, accumulation_steps=count), valid=valid)
    # The same sums in another order: a few times the float32 rounding of values of about 1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), divided.params, whole.params)
    assert of_parts.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(of_parts[name], value, rtol=1e-5, err_msg=name)


def test_a_step_in_parts_moves_the_running_statistics_once_for_each_part():
    network = DeepNetwork(normalise=True)
    parts = tiny.parts(network=network, accumulation_steps=2, augment="none")
    # The last part has no valid row: rows 1, 3, 5, 7.
    mask = np.asarray([True, False] * 4)
    state, _ = jax.jit(functools.partial(train_step, parts))(tiny.state(parts), tiny.constants(DATA), BATCH, mask)
    variables, images = tiny.variables(network), tiny.prepare_for_evaluation(jnp.asarray(DATA.train.images[:8:2]))
    context = QuantContext(train=True, mask=jnp.ones(4, bool))
    _, expected = network.apply(variables, images, context, mutable=["batch_stats"])
    # Another program: rounding.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.batch_stats, expected["batch_stats"]
    )
    both, _ = jax.jit(functools.partial(train_step, parts))(
        tiny.state(parts), tiny.constants(DATA), BATCH, np.ones(8, bool)
    )
    other = tiny.prepare_for_evaluation(jnp.asarray(DATA.train.images[1:8:2]))
    _, expected = network.apply({**variables, **expected}, other, context, mutable=["batch_stats"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), both.batch_stats, expected["batch_stats"]
    )


def test_rows_may_be_the_images_themselves():
    parts = tiny.parts()
    by_index, _ = run_step(parts)
    images, labels = DATA.train.images[:8], DATA.train.labels[:8]
    by_image, _ = run_step(parts, rows=(images, labels))
    tiny.assert_equal(jax.device_get(by_image), jax.device_get(by_index))


def test_a_compiled_step_takes_images_too():
    parts = tiny.parts()
    run, devices = compile_train_steps(parts, all_devices()), all_devices()
    indices, mask = devices.pad_rows(BATCH[None], np.ones((1, 8), bool))
    by_index, _ = run(tiny.state(parts), tiny.constants(DATA), indices, mask)
    rows = (DATA.train.images[indices], DATA.train.labels[indices])
    by_image, _ = run(tiny.state(parts), tiny.constants(DATA).replace(images=None, labels=None), rows, mask)
    tiny.assert_equal(jax.device_get(by_image), jax.device_get(by_index))
