"""Categorical weights: value lists, initial logits, knobs, the by-bit mode (specification, section 2).

What all quantizers share is in battery_test.py, the arithmetic in tests/ops/categorical_test.py.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers import QuantConv
from bnn_jax.quantizers import QuantContext, build_weight
from bnn_jax.quantizers.categorical import VALUE_SETS, candidates_of, common_divisor, initial_logits
from bnn_jax.stages import spec

SHAPE = (3, 3, 4, 5)
SETS = pytest.mark.parametrize("name", VALUE_SETS)


def logits(count: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).normal(size=(count, *SHAPE)), jnp.float32)


def bound(variables: Any = None, **options: Any):
    return build_weight(spec("categorical", **options))().bind(variables or {})


def test_the_value_sets_are_the_published_ones_in_their_order():
    published = {
        "1b": (-1, 1),
        "po2-2b": (-1, -1 / 2, 1 / 2, 1),
        "po2-3b": (-1 / 4, -1 / 2, -1, -2, 2, 1, 1 / 2, 1 / 4),
        "po2-4b": (
            *(-1 / 16, -1 / 8, -1 / 4, -1 / 2, -1, -2, -4, -8),
            *(8, 4, 2, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16),
        ),
        "int-2b": (-2, -1, 0, 1),
        "int-3b": (-4, -3, -2, -1, 0, 1, 2, 3),
        "int-4b": tuple(range(-8, 8)),
    }
    assert published == VALUE_SETS


@SETS
def test_the_bits_in_a_set_s_name_are_those_stored(name):
    assert bound(values=name).cost((3, 3, 4, 4)).stored_bits == int(name[-2])


def test_a_list_of_three_stores_log2_3_bits():
    assert bound(values=(-1.0, 0.0, 1.0)).cost((3, 3, 4, 4)).stored_bits == math.log2(3)


@SETS
def test_evaluation_takes_every_value_and_none_else(name):
    values = VALUE_SETS[name]
    w = bound(values=name)(logits(len(values)), QuantContext())
    assert w.shape == SHAPE
    assert set(np.unique(w)) == set(values)


def test_evaluation_is_hard_and_depends_on_no_knob():
    a = logits(4)
    expected = bound()(a, QuantContext())
    for mode in ("hard", "soft"):
        quantizer = bound(mode=mode)
        for knobs in ({}, {"temperature": 0.01}, {"temperature": 7.0, "noise": 100.0}):
            np.testing.assert_array_equal(quantizer(a, QuantContext(knobs=knobs)), expected)
            np.testing.assert_array_equal(quantizer(a + 8.0, QuantContext(knobs=knobs)), expected)
    np.testing.assert_array_equal(bound()(a, QuantContext(train=True, knobs={"temperature": 0.1})), expected)


def test_soft_training_gives_the_expectation_at_the_temperature():
    a = logits(4)
    for temperature in (1.0, 0.1):
        w = bound(mode="soft")(a, QuantContext(train=True, knobs={"temperature": temperature}))
        p = np.exp(np.asarray(a, np.float64) / temperature)
        expected = np.tensordot(VALUE_SETS["po2-2b"], p / p.sum(axis=0), axes=1)
        np.testing.assert_allclose(w, expected, atol=2e-6)


# ---- noise


def noisy(seed: int, factor: float | None, *, train: bool = True) -> np.ndarray:
    quantizer = build_weight(spec("categorical"))()
    knobs = {} if factor is None else {"noise": jnp.float32(factor)}
    ctx = QuantContext(train=train, knobs=knobs)
    return np.asarray(quantizer.apply({}, logits(4), ctx, rngs={"quant": jax.random.key(seed)}))


def test_noise_changes_the_choice_in_training_only():
    plain = noisy(0, None)
    assert np.any(noisy(0, 1.0) != plain)
    assert np.any(noisy(0, 1.0) != noisy(1, 1.0))
    np.testing.assert_array_equal(noisy(0, 1.0), noisy(0, 1.0))
    np.testing.assert_array_equal(noisy(0, 1.0, train=False), plain)


def test_nothing_is_drawn_without_the_knob():
    def random_primitives(knobs: dict) -> bool:
        quantizer = build_weight(spec("categorical"))()
        ctx = QuantContext(train=True, knobs=knobs)
        jaxpr = jax.make_jaxpr(lambda a, key: quantizer.apply({}, a, ctx, rngs={"quant": key}))
        return "random_bits" in str(jaxpr(logits(4), jax.random.key(0)))

    assert not random_primitives({"temperature": 0.5})
    assert random_primitives({"temperature": 0.5, "noise": 1.0})


# ---- initial logits


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_initial_logits_are_almost_even(count):
    a = np.asarray(initial_logits(jax.random.key(0), (count, 3, 3, 32, 32)), np.float64)
    # Half a unit in the last place of ln(1/16) is 1.2e-7.
    assert np.abs(a - math.log(1 / count)).max() <= 5e-6 + 1.2e-7
    shares = np.bincount(np.argmax(a, axis=0).ravel(), minlength=count) / a[0].size
    # 9,216 draws: five standard errors; the first candidate wins the ties.
    assert np.abs(shares * count - 1).max() < 5 * math.sqrt(count / a[0].size) + 0.2
    assert shares[0] > shares[-1]


def test_an_even_start_chooses_the_first_value_everywhere():
    a = bound(start="even").latent_init(None)(jax.random.key(0), (4, *SHAPE))
    np.testing.assert_array_equal(a, np.float32(math.log(1 / 4)))
    np.testing.assert_array_equal(bound(start="even")(a, QuantContext(train=True)), -1.0)


def test_the_initial_logits_do_not_depend_on_the_layer_s_initialiser():
    def refuses(*_: Any) -> None:
        raise AssertionError("a categorical weight has no kernel to initialise")

    conv = QuantConv(5, weight_quantizer=build_weight(spec("categorical")), kernel_init=refuses)
    variables = conv.init(jax.random.key(0), jnp.zeros((1, 6, 6, 4)), QuantContext())
    assert variables["params"]["kernel"].shape == (4, 3, 3, 4, 5)


# ---- by bit: a fixed base


def chain_options(bit: int) -> dict[str, Any]:
    bases = ((), (-1.0, 1.0), (-1.0, -0.5, 0.5, 1.0))
    return {"values": (1.0, -1.0) if bit == 0 else (1.0, 0.5), "base_levels": bases[bit], "start": "even"}


@pytest.mark.parametrize(
    ("bit", "levels"), [(0, (-1, 1)), (1, (-1, -0.5, 0.5, 1)), (2, (-1, -0.5, -0.25, 0.25, 0.5, 1))]
)
def test_each_bit_adds_levels(bit, levels):
    quantizer = bound(**chain_options(bit))
    assert quantizer.weight_levels == levels
    assert quantizer.cost((3, 3, 4, 4)).stored_bits == math.log2(len(levels))


def test_a_fresh_base_is_ones_and_is_state():
    quantizer = build_weight(spec("categorical", **chain_options(1)))()
    variables = quantizer.init(jax.random.key(0), logits(2), QuantContext())
    assert set(variables) == {"quant_state"}
    np.testing.assert_array_equal(variables["quant_state"]["base"], np.ones(SHAPE, np.float32))


def test_weights_are_the_choice_times_the_base_and_encode_exactly():
    random = np.random.RandomState(3)
    base = jnp.asarray(random.choice([-1.0, -0.5, 0.5, 1.0], SHAPE), jnp.float32)
    quantizer = bound({"quant_state": {"base": base}}, **chain_options(2))
    a = logits(2, seed=4)
    w = quantizer(a, QuantContext(train=True))
    np.testing.assert_array_equal(w, np.where(a[0] >= a[1], 1.0, 0.5) * base)
    encoded = quantizer.encode(a, QuantContext())
    np.testing.assert_array_equal(encoded.decode(), w)
    assert encoded.levels.size == 6


def test_the_gradient_of_the_logits_is_scaled_by_the_base_and_the_base_has_none():
    base = jnp.asarray(np.random.RandomState(5).choice([-1.0, 0.5], SHAPE), jnp.float32)
    a, cotangent = logits(2, seed=6), logits(1, seed=7)[0]
    quantizer = bound({"quant_state": {"base": base}}, **chain_options(1))
    plain = bound(values=(1.0, 0.5))
    ctx = QuantContext(train=True, knobs={"temperature": 0.5})
    found = jax.vjp(lambda a: quantizer(a, ctx), a)[1](cotangent)[0]
    expected = jax.vjp(lambda a: plain(a, ctx), a)[1](cotangent * base)[0]
    np.testing.assert_array_equal(found, expected)


# ---- codes


@pytest.mark.parametrize(
    ("levels", "divisor"),
    [
        ((-1.0, 1.0), 1.0),
        ((-1.0, -0.5, 0.5, 1.0), 0.5),
        (VALUE_SETS["po2-4b"], 1 / 16),
        ((-1.0, 0.0, 1.0), 1.0),
        ((0.0, 3.0, 6.0), 3.0),
        ((0.3, 0.1), None),
        ((1.0, 256.0), 1.0),
        ((1.0, 257.0), None),
    ],
)
def test_the_code_scale_is_the_largest_common_divisor(levels, divisor):
    assert common_divisor(levels) == divisor


def test_soft_weights_have_no_codes():
    # In training they are no multiples of anything.
    assert bound(mode="soft").code_scale(logits(4), QuantContext()) is None
    assert float(bound().code_scale(logits(4), QuantContext())) == 0.5


# ---- mistakes


@pytest.mark.parametrize(
    "values",
    ["2b", "", (), (1.0,), (1.0, 1.0), (1.0, 1.0 + 1e-12), (0.0, math.inf), (0.0, math.nan), (0.0, 1e39), ("a", "b")],
)
def test_values_that_are_no_list_of_different_numbers_are_refused(values):
    with pytest.raises(
        ValueError, match=r"^values=.*: accepted are 1b, po2-2b, .*, or a list of two or more different"
    ):
        candidates_of(values)
    with pytest.raises(ValueError, match=r"^values=.*: accepted are"):
        build_weight(spec("categorical", values=values))()


@pytest.mark.parametrize(
    ("option", "message"), [({"mode": "gumbel"}, "mode='gumbel'"), ({"start": "normal"}, "start='normal'")]
)
def test_unknown_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        build_weight(spec("categorical", **option))()


def test_the_real_stream_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="no real-valued view"):
        bound().real_kernel(logits(4), QuantContext())


def test_pruning_by_norms_is_refused():
    with pytest.raises(ValueError, match="inner=CategoricalWeight: its latent weights are no kernel"):
        build_weight(spec("pruned", inner=spec("categorical")))()
