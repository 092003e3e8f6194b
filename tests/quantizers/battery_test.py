"""What every quantizer of the tables has to satisfy. A new table entry needs example options here."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers import ACT, WEIGHT, QuantContext, build_act, build_weight
from bnn_jax.stages import IDENTITY, Spec, spec

# Example options of every entry, and the most levels the documentation allows (None: real-valued or data-dependent).
WEIGHT_EXAMPLES: dict[str, list[tuple[Spec, int | None]]] = {
    "identity": [(IDENTITY, None)],
    "dorefa": [
        *((spec("dorefa", bits=bits), 2**bits) for bits in (1, 2, 5, 8)),
        (spec("dorefa", bits=1, one_bit="levels"), None),
    ],
    "pruned": [
        (spec("pruned"), None),
        (spec("pruned", inner=spec("dorefa", bits=4), amount=0.1), 16),
        (spec("pruned", inner=spec("dorefa", bits=4), amount=0.1, apply_mask="after"), 17),
        (spec("pruned", inner=spec("dorefa", bits=1), amount=0.1, apply_mask="after"), 3),
        (spec("pruned", inner=spec("dorefa", bits=1, one_bit="levels"), amount=0.1), None),
        (spec("pruned", inner=spec("dorefa", bits=2), amount=0.2, pattern="row_block", apply_mask="after"), 5),
        (spec("pruned", inner=spec("irnet"), amount=0.1, apply_mask="after"), None),
    ],
    # A scale for each filter.
    "irnet": [(spec("irnet"), None)],
    # A learned scale for each filter.
    "recu": [(spec("recu"), None)],
    # Zero is a level of its own.
    "sign": [(spec("sign"), 3)],
    # A step for each filter.
    "lsq": [(spec("lsq", bits=bits), None) for bits in (2, 3, 8)],
    "categorical": [
        *((spec("categorical", values=name), 2 ** int(name[-2])) for name in ("1b", "po2-3b", "int-4b")),
        (spec("categorical", values=(-0.3, 0.0, 0.7), mode="soft"), 3),
        (spec("categorical", values=(1.0, 0.5), base_levels=(-1.0, -0.5, 0.5, 1.0), start="even"), 6),
    ],
    # A scale for each filter.
    "codebook": [
        *((spec("codebook", tau=tau), None) for tau in (1, 4, 9)),
        *(
            (spec("pruned", inner=spec("codebook", tau=4), amount=0.1, apply_mask=place, pattern=pattern), None)
            for place, pattern in (("before", "filter"), ("after", "row_block"))
        ),
    ],
}
ACT_EXAMPLES: dict[str, list[Spec]] = {
    "identity": [IDENTITY],
    "dorefa": [spec("dorefa", bits=bits) for bits in (1, 2, 5, 8)],
    "irnet": [spec("irnet")],
    "recu": [spec("recu")],
    "sign": [spec("sign")],
    "lsq": [spec("lsq", bits=bits) for bits in (1, 2, 8)],
    "branch_clip": [spec("branch_clip", bits=2), spec("branch_clip", bits=4, branches=1)],
    "approx_sign": [spec("approx_sign")],
}
# Binary quantizers whose sign of zero is zero: a level that real data do not reach.
ZERO_LEVEL = {"irnet", "sign", "approx_sign", "recu"}
# Kernels (kh, kw, I, O): the usual one, 1x1 with odd channels, dense (I, O).
SHAPES = [(3, 3, 8, 20), (1, 1, 5, 7), (12, 10)]
# The quantizers whose options do not fit dense kernels, and those for 3x3 kernels.
NEEDS_FOUR_AXES = {"pruned"}
NEEDS_3X3 = {"codebook"}
# The quantizers that give no gradient to what they clip; theirs are tested in lsq_test.py and branch_clip_test.py.
CLIPPING = {"lsq", "branch_clip"}

WEIGHTS = [example for examples in WEIGHT_EXAMPLES.values() for example in examples]
ACTS = [example for examples in ACT_EXAMPLES.values() for example in examples]


def spec_id(value: Any) -> str:
    """'pruned(amount=0.1,inner=dorefa(bits=4))'."""
    if not isinstance(value, Spec):
        return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
    options = ",".join(f"{key}={spec_id(option)}" for key, option in value.options)
    return f"{value.name}({options})"


def shapes_of(choice: Spec) -> list[tuple[int, ...]]:
    shapes = [shape for shape in SHAPES if len(shape) == 4 or choice.name not in NEEDS_FOUR_AXES]
    names = {choice.name, choice.kwargs.get("inner", choice).name}
    return [shape for shape in shapes if shape[:2] == (3, 3) or not names & NEEDS_3X3]


WEIGHT_CASES = [(choice, levels, shape) for choice, levels in WEIGHTS for shape in shapes_of(choice)]
each_weight = pytest.mark.parametrize(("choice", "levels", "shape"), WEIGHT_CASES, ids=spec_id)
each_weight_spec = pytest.mark.parametrize("choice", [choice for choice, _ in WEIGHTS], ids=spec_id)
each_act = pytest.mark.parametrize("choice", ACTS, ids=spec_id)


def kernel(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).normal(0, 0.2, shape), jnp.float32)


def latent_of(choice: Spec, shape: tuple[int, ...] = (3, 3, 8, 20), seed: int = 0) -> jax.Array:
    """Latent weights behind a kernel of that shape."""
    return kernel(build_weight(choice)(parent=None).latent_shape(shape), seed)


def make_weight(choice: Spec, latent: jax.Array) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Function (method name, arguments) of a built quantizer, and its variables."""
    module = build_weight(choice)()
    variables = module.init(jax.random.key(0), latent, QuantContext())

    def call(method: str, *args: Any) -> Any:
        return module.apply(variables, *args, method=method)

    return call, variables


@pytest.mark.parametrize(("table", "examples"), [(WEIGHT, WEIGHT_EXAMPLES), (ACT, ACT_EXAMPLES)], ids=["WEIGHT", "ACT"])
def test_every_table_entry_has_examples(table: dict, examples: dict) -> None:
    missing = sorted(set(table) - set(examples))
    assert not missing, f"quantizers {missing}: add options to WEIGHT_EXAMPLES or ACT_EXAMPLES of {__file__}"


@each_weight
def test_weight_has_the_kernel_shape_and_no_more_levels_than_documented(choice: Spec, levels, shape) -> None:
    latent = latent_of(choice, shape)
    q = np.asarray(make_weight(choice, latent)[0]("__call__", latent, QuantContext()))
    assert (q.shape, q.dtype) == (shape, np.float32)
    assert np.all(np.isfinite(q))
    if levels is not None:
        # Levels apart by float32 rounding are one level: neighbours are at least 2/255 of the largest apart.
        assert len(np.unique(np.round(q / np.abs(q).max() * 1e4))) <= levels


@each_weight
def test_decoding_the_encoded_weights_gives_the_weights(choice: Spec, levels, shape) -> None:
    latent = latent_of(choice, shape, seed=1)
    call, _ = make_weight(choice, latent)
    encoded = call("encode", latent, QuantContext())
    if encoded is None:
        assert levels is None
        return
    q = np.asarray(call("__call__", latent, QuantContext()))
    assert jnp.issubdtype(encoded.indices.dtype, jnp.unsignedinteger)
    if encoded.levels.ndim == 2:
        # Look-ups of whole kernels.
        assert encoded.levels.shape[1] * encoded.indices.size == latent.size
        np.testing.assert_allclose(encoded.per_weight().decode(), encoded.decode(), rtol=1e-6)
    else:
        assert np.all(np.diff(encoded.levels) > 0)
    assert levels is None or encoded.levels.size == levels
    # 1e-6 of the largest weight: the scale is multiplied in another order than in the forward pass.
    np.testing.assert_allclose(encoded.decode(), q, rtol=1e-6, atol=1e-6 * np.abs(q).max())


@each_weight
def test_weights_are_small_integers_times_the_code_scale(choice: Spec, levels, shape) -> None:
    latent = latent_of(choice, shape, seed=2)
    call, _ = make_weight(choice, latent)
    scale = call("code_scale", latent, QuantContext())
    if scale is None:
        return
    # A filter that is masked as a whole has the scale 0.
    codes = np.asarray(call("__call__", latent, QuantContext()) / jnp.where(scale == 0, 1.0, scale))
    # 256 is the largest integer up to which bfloat16 holds every integer.
    assert np.abs(np.round(codes)).max() <= 256
    # 3e-6 relative (golden tolerance of the weights) of a code of up to 255.
    np.testing.assert_allclose(codes, np.round(codes), atol=3e-6 * 256)


@pytest.mark.parametrize("choice", [c for c, _ in WEIGHTS if c.name not in CLIPPING], ids=spec_id)
def test_weight_gradient_is_finite_and_reaches_every_unmasked_weight(choice: Spec) -> None:
    latent = latent_of(choice, seed=3)
    call, variables = make_weight(choice, latent)
    gradient = jax.grad(lambda w: jnp.sum(call("__call__", w, QuantContext())))(latent)
    mask = variables.get("quant_state", {}).get("mask", jnp.ones_like(latent))
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(np.asarray(gradient) != 0, np.asarray(mask) != 0)


# The gradients of 'irnet' and 'recu' go through mean and standard deviation of each filter, that of 'categorical' to K
# logits: see irnet_test.py, recu_test.py and tests/ops/categorical_test.py; that of 'lsq' is in lsq_test.py.
OWN_GRADIENT = ("irnet", "recu", "categorical", "lsq")


@pytest.mark.parametrize(
    "choice", [c for c, _ in WEIGHTS if not any(name in spec_id(c) for name in OWN_GRADIENT)], ids=spec_id
)
def test_weight_gradient_has_the_documented_form(choice: Spec) -> None:
    latent = latent_of(choice, seed=4)
    cotangent = kernel((3, 3, 8, 20), seed=5)
    call, variables = make_weight(choice, latent)
    gradient = jax.vjp(lambda w: call("__call__", w, QuantContext()), latent)[1](cotangent)[0]
    inner = choice.kwargs.get("inner", choice)
    mask = variables.get("quant_state", {}).get("mask", jnp.ones_like(latent))
    bits = inner.kwargs.get("bits", 32)
    slope = 1 - np.tanh(np.asarray(latent)) ** 2 if 2 <= bits <= 8 else 1.0
    if inner.name == "codebook":
        # The estimator is that of the binary kernel: its scale stays in front.
        masked = latent * mask if choice.kwargs.get("apply_mask") == "before" else latent
        slope = jnp.mean(jnp.abs(masked), axis=(0, 1, 2), keepdims=True)
    # 1e-6 absolute, the golden files' tolerance of gradients.
    np.testing.assert_allclose(gradient, mask * slope * cotangent, atol=1e-6)


@each_weight_spec
def test_weight_under_jit_equals_eager(choice: Spec) -> None:
    latent = latent_of(choice, seed=6)
    call, _ = make_weight(choice, latent)

    def function(w: jax.Array) -> jax.Array:
        return call("__call__", w, QuantContext())

    # A fused multiply-add or a reordered mean moves the scale by an ulp or two: 5e-7 of the largest weight.
    q = function(latent)
    np.testing.assert_allclose(jax.jit(function)(latent), q, rtol=0, atol=5e-7 * float(jnp.abs(q).max()))


# Logits of zero are a tie, which the first value wins.
@pytest.mark.parametrize("choice", [c for c, _ in WEIGHTS if c.name != "categorical"], ids=spec_id)
def test_weight_of_a_tensor_of_zeros_is_finite_zero_and_encodes(choice: Spec) -> None:
    zeros = jnp.zeros((3, 3, 8, 20))
    call, _ = make_weight(choice, zeros)
    value, gradient = jax.value_and_grad(lambda w: jnp.sum(call("__call__", w, QuantContext()) ** 2))(zeros)
    assert value == 0
    assert np.all(np.isfinite(gradient))
    encoded = call("encode", zeros, QuantContext())
    assert encoded is None or np.all(np.asarray(encoded.decode()) == 0)


@each_weight_spec
def test_weight_does_not_change_its_state(choice: Spec) -> None:
    latent = latent_of(choice, seed=7)
    module = build_weight(choice)()
    variables = module.init(jax.random.key(0), latent, QuantContext())
    _, changed = module.apply(variables, latent * 2 - 1, QuantContext(train=True), mutable=["quant_state"])
    jax.tree.map(np.testing.assert_array_equal, changed.get("quant_state", {}), variables.get("quant_state", {}))


def apply_act(module: Any, x: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The quantizer as a function, with variables made from ``x``."""
    variables = module.init(jax.random.key(0), x, QuantContext())
    return lambda x: module.apply(variables, x, QuantContext())


@each_act
def test_activation_takes_its_documented_levels(choice: Spec) -> None:
    module = build_act(choice)()
    x = jnp.asarray(np.random.RandomState(0).normal(0.4, 1.0, (2, 5, 3, 7)), jnp.float32)
    q = np.asarray(apply_act(module, x)(x))
    assert (q.shape, q.dtype) == (x.shape, np.float32)
    levels = module.apply({}, QuantContext(), method="levels")
    if levels is None:
        return
    assert levels.size == 2 ** int(module.bits) + (choice.name in ZERO_LEVEL)
    assert np.all(np.diff(levels) > 0)
    # An ulp of the largest level: i / n may be computed as i * (1 / n).
    assert np.abs(q[..., None] - np.asarray(levels)).min(axis=-1).max() <= 1.2e-7


@each_act
def test_activation_code_scale_makes_small_integers(choice: Spec) -> None:
    module = build_act(choice)()
    scale = module.apply({}, QuantContext(), method="code_scale")
    if scale is None:
        return
    codes = np.asarray(module.apply({}, QuantContext(), method="levels") / scale)
    assert np.abs(codes).max() <= 256
    np.testing.assert_allclose(codes, np.round(codes), rtol=3e-7)


@pytest.mark.parametrize("choice", [c for c in ACTS if c.name not in {"irnet"} | CLIPPING], ids=spec_id)
def test_activation_gradient_passes_inside_its_range_only(choice: Spec) -> None:
    module = build_act(choice)()
    x = jnp.array([[-2.0, -0.01, 0.01, 0.5, 0.99, 1.01, 3.0]])
    gradient = jax.grad(lambda x: jnp.sum(module.apply({}, x, QuantContext())))(x)
    slopes = {
        "dorefa": (x > 0) & (x < 1),
        # Twice as steep as the identity at 0, 0 from 1 on.
        **dict.fromkeys(("approx_sign", "recu"), jnp.maximum(0, 2 - 2 * jnp.abs(x))),
    }
    np.testing.assert_array_equal(gradient, slopes.get(choice.name, jnp.ones(x.shape)))


@each_act
def test_activation_under_jit_equals_eager(choice: Spec) -> None:
    module = build_act(choice)()
    x = jnp.asarray(np.random.RandomState(1).normal(0.4, 1.0, (2, 5, 3, 7)), jnp.float32)
    function = apply_act(module, x)
    q = function(x)
    # An ulp of the largest level (1 or more): a division by n may become a product with 1 / n.
    np.testing.assert_allclose(jax.jit(function)(x), q, atol=1.2e-7 * max(1.0, float(jnp.abs(q).max())))


@pytest.mark.parametrize("bits", [0, 9, 16, 31, 32, 2.5, "4"])
@pytest.mark.parametrize("build", [build_weight, build_act])
def test_unsupported_bit_widths_are_refused_by_name(build: Callable, bits: Any) -> None:
    with pytest.raises(ValueError, match=f"bits={bits!r}: accepted are 1, 2"):
        build(spec("dorefa", bits=bits))()


@pytest.mark.parametrize("build", [build_weight, build_act])
def test_an_unknown_quantizer_is_refused_with_the_accepted_names(build: Callable) -> None:
    with pytest.raises(ValueError, match="'nosuch': accepted are identity"):
        build(spec("nosuch"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "row"}, "pattern='row'"),
        ({"apply_mask": "never"}, "apply_mask='never'"),
        ({"amount": 1.0}, "amount=1.0"),
        ({"amount": -0.1}, "amount=-0.1"),
    ],
)
def test_wrong_options_of_pruning_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_weight(spec("pruned", **options))()
