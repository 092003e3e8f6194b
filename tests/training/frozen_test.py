import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.errors import UserError
from bnn_jax.quantizers.base import evaluation_context
from bnn_jax.stages import spec
from bnn_jax.training.frozen import check_patterns, frozen_part, matching
from bnn_jax.training.projections import RefillCodebooks
from bnn_jax.training.step import train_step
from tests.training import tiny

PATHS = ["bn/scale", "conv1/kernel", "conv10/kernel", "layer1_0/bn1/scale", "layer1_0/conv1/kernel", "fc/bias"]
DATA = tiny.source()


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("conv1", ["conv1/kernel"]),
        ("conv1*", ["conv1/kernel", "conv10/kernel"]),
        ("conv1/kernel", ["conv1/kernel"]),
        ("layer1_*", ["layer1_0/bn1/scale", "layer1_0/conv1/kernel"]),
        ("layer1_0/**", ["layer1_0/bn1/scale", "layer1_0/conv1/kernel"]),
        ("*/conv1", ["layer1_0/conv1/kernel"]),
        ("**/bn*", ["bn/scale", "layer1_0/bn1/scale"]),
        ("conv", []),
        ("conv1.kernel", []),
    ],
)
def test_a_pattern_names_parameters_and_modules(pattern, matched):
    assert matching([pattern], PATHS) == matched


def test_a_pattern_that_matches_nothing_is_refused_with_near_paths():
    with pytest.raises(
        UserError, match=r"^config\.freeze: 'layer1\.0/conv1' matches no parameter; near are layer1_0/c"
    ):
        check_patterns(("fc", "layer1.0/conv1"), PATHS)


def stepped(*patterns: str, network: Any = tiny.TinyNetwork(), **options):  # noqa: B008 - frozen
    """A state before and after three steps with a large weight decay, and the metrics of the last one."""
    frozen = frozen_part(patterns, tiny.variables(network)["params"])
    parts = tiny.parts(network=network, augment="none", frozen=frozen, **options)
    before = state = tiny.state(parts)
    step = jax.jit(functools.partial(train_step, parts))
    for _ in range(3):
        state, metrics = step(state, tiny.constants(DATA), jnp.arange(8), jnp.ones(8, bool))
    return before, state, metrics


def test_what_is_frozen_stays_bit_for_bit_and_the_rest_moves():
    before, after, _ = stepped("conv", "bn")
    for name in ("conv", "bn"):
        tiny.assert_equal(after.params[name], before.params[name])
    tiny.assert_equal(after.batch_stats, before.batch_stats)
    assert (after.params["fc"]["kernel"] != before.params["fc"]["kernel"]).any()
    assert (after.params["fc"]["bias"] != before.params["fc"]["bias"]).any()


def test_a_norm_with_a_parameter_left_keeps_learning_its_statistics():
    before, after, _ = stepped("bn/scale")
    tiny.assert_equal(after.params["bn"]["scale"], before.params["bn"]["scale"])
    assert (after.batch_stats["bn"]["mean"] != before.batch_stats["bn"]["mean"]).any()


def test_a_frozen_norm_works_in_training_as_in_evaluation():
    parts = tiny.parts(augment="none", frozen=frozen_part(("conv", "bn"), tiny.variables()["params"]))
    state = tiny.state(parts)
    step = jax.jit(functools.partial(train_step, parts))
    _, metrics = step(state, tiny.constants(DATA), jnp.arange(8), jnp.ones(8, bool))
    images = tiny.prepare_for_evaluation(jnp.asarray(DATA.train.images[:8]))
    logits = parts.network.apply(state.variables, images, evaluation_context(state.variables)).logits
    expected = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), DATA.train.labels[:8]])
    # The same sums in float32, compiled as a whole and by operation.
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_frozen_parameters_have_no_gradient():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    frozen = frozen_part(("a",), params)
    grads = jax.grad(lambda tree: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(frozen.stop_gradient(tree))))(params)
    np.testing.assert_array_equal(grads["a"], 0.0)
    np.testing.assert_array_equal(grads["b"], 2.0)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_projection_moves_a_frozen_codebook_or_its_memory(frozen):
    network = tiny.TinyNetwork(weight=spec("codebook", tau=4))
    options = {"projections": (RefillCodebooks(),), "knobs": {"refine_codebook": lambda step: jnp.float32(1)}}
    before, after, _ = stepped(*(["conv"] if frozen else []), network=network, **options)
    same = after.params["conv"]["weight_quantizer"]["codebook"] == before.params["conv"]["weight_quantizer"]["codebook"]
    assert bool(same.all()) == frozen
    if frozen:
        tiny.assert_equal(after.quant_state, before.quant_state)
