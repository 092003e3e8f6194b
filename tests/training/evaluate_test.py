import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnn_jax.quantizers.base import QuantContext
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import Evaluator, outputs_of
from tests.training import tiny

DATA = tiny.source(num_test=11, num_validation=4)
NETWORK = tiny.TinyNetwork()


def evaluator(batch_size: int, **options) -> Evaluator:
    splits = {"test": DATA.test, "validation": DATA.validation}
    return Evaluator(
        options.get("network", NETWORK),
        prepare=tiny.prepare_for_evaluation,
        splits=splits,
        batch_size=batch_size,
        devices=all_devices(),
    )


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    """All test images in one batch, evaluated by hand."""
    images, labels = jnp.asarray(DATA.test.images), jnp.asarray(DATA.test.labels)

    @jax.jit
    def forward(images: jax.Array) -> jax.Array:
        return NETWORK.apply(tiny.variables(), tiny.prepare_for_evaluation(images), QuantContext()).logits

    logits = forward(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"top1": 100 * int((logits.argmax(axis=1) == labels).sum()) / 11, "loss": float(losses.mean())}


@pytest.mark.parametrize("batch_size", [1, 4, 11, 500])
def test_every_image_counts_once_whatever_the_batch_size(batch_size, expected):
    result = evaluator(batch_size)(tiny.variables(), "test")
    assert result["num_images"] == 11
    assert result["top1"] == pytest.approx(expected["top1"], abs=1e-9)
    # Logits of another batch size differ by rounding.
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert result["top5"] == 100.0


def test_one_program_serves_all_batches_and_calls():
    evaluate = evaluator(4)
    for _ in range(2):
        evaluate(tiny.variables(), "test")
    assert evaluate._step._cache_size() == 1


def test_splits_are_evaluated_by_name():
    evaluate = evaluator(4)
    assert evaluate.splits == ("test", "validation")
    assert evaluate(tiny.variables(), "validation")["num_images"] == 4


def test_the_variables_are_not_changed():
    before = jax.tree.map(np.copy, tiny.variables())
    evaluator(4)(tiny.variables(), "test")
    tiny.assert_equal(tiny.variables(), before)


def test_an_evaluation_asked_to_stop_gives_nothing():
    answers = iter([False, True])
    assert evaluator(4)(tiny.variables(), "test", should_stop=lambda: next(answers)) is None
    assert next(answers, "asked no more") == "asked no more"


def test_an_evaluation_asked_to_stop_after_its_last_batch_is_finished():
    answers = iter([False, False, False])
    assert evaluator(4)(tiny.variables(), "test", should_stop=lambda: next(answers, True)) is not None


@pytest.mark.parametrize("batch_size", [11, 4, 500])
def test_features_are_those_of_every_image_in_order(batch_size):
    found = outputs_of(
        NETWORK,
        tiny.variables(),
        DATA.test,
        part="features",
        prepare=tiny.prepare_for_evaluation,
        batch_size=batch_size,
        devices=all_devices(),
    )
    images = tiny.prepare_for_evaluation(jnp.asarray(DATA.test.images))
    expected = jax.jit(lambda x: NETWORK.apply(tiny.variables(), x, QuantContext()).features)(images)
    assert found.shape == (11, 4) and found.dtype == np.float32
    # Convolutions of another batch size may add in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
