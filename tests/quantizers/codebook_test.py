import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers import QuantConv
from bnn_jax.ops import codebook as ops
from bnn_jax.quantizers import QuantContext, build_weight
from bnn_jax.quantizers.codebook import EncodedKernels
from bnn_jax.stages import spec

SHAPE = (3, 3, 6, 10)


def latent(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).normal(0, 0.5, shape), jnp.float32)


def quantizer(tau: int = 4, **options):
    return build_weight(spec("codebook", tau=tau, **options))()


def fresh(module, seed: int = 0) -> dict:
    return module.init(jax.random.key(seed), latent(), QuantContext())


def with_codebook(values: jax.Array, memory: jax.Array) -> dict:
    return {"params": {"codebook": values}, "quant_state": {"memory": memory}}


def context(**knobs: float) -> QuantContext:
    return QuantContext(train=True, knobs={name: jnp.float32(value) for name, value in knobs.items()})


# ---- initial state


@pytest.mark.parametrize("tau", range(1, 10))
def test_a_codebook_starts_as_different_patterns_with_their_memory(tau):
    variables = fresh(quantizer(tau))
    codebook, memory = variables["params"]["codebook"], variables["quant_state"]["memory"]
    assert codebook.shape == (2**tau, 9) and set(np.asarray(codebook).ravel()) == {-1.0, 1.0}
    assert len(np.unique(ops.codes(codebook))) == 2**tau
    np.testing.assert_array_equal(memory, codebook)


def test_layers_start_with_codebooks_of_their_own():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, ctx):
            for name in ("one", "two"):
                x = QuantConv(4, weight_quantizer=build_weight(spec("codebook", tau=4)), name=name)(x, ctx)
            return x

    params = Network().init(jax.random.key(0), jnp.zeros((1, 4, 4, 4)), QuantContext())["params"]
    one, two = (params[name]["weight_quantizer"]["codebook"] for name in ("one", "two"))
    assert (one != two).any()


def test_memory_made_anew_from_an_imported_codebook_is_its_signs():
    module, values = quantizer(1), jnp.asarray([[0.5] * 9, [-1e-9] * 4 + [0.0] * 5], jnp.float32)
    _, made = module.apply({"params": {"codebook": values}}, latent(), QuantContext(), mutable=["quant_state"])
    np.testing.assert_array_equal(made["quant_state"]["memory"], [[1.0] * 9, [-1.0] * 9])


# ---- values


@pytest.mark.parametrize("tau", [1, 4, 9])
def test_a_kernel_is_a_pattern_times_the_scale_of_its_filter(tau):
    module, w = quantizer(tau), latent()
    q = np.asarray(module.apply(fresh(module), w, QuantContext()))
    scale = np.abs(np.asarray(w)).mean(axis=(0, 1, 2))
    # Rounding of the mean; the magnitude itself is the same everywhere in a filter.
    np.testing.assert_allclose(np.abs(q), np.broadcast_to(scale, SHAPE), rtol=1e-6)
    assert all(len(np.unique(np.abs(q[..., o]))) == 1 for o in range(SHAPE[3]))
    assert len(np.unique(ops.codes(ops.to_rows(jnp.asarray(q))))) <= 2**tau


def test_with_all_patterns_it_is_the_sign_times_the_scale():
    module, w = quantizer(9), latent()
    q = module.apply(fresh(module), w, QuantContext())
    np.testing.assert_array_equal(jnp.sign(q), jnp.sign(w))


def test_it_is_invariant_to_the_order_of_the_codebook_and_proportional_to_the_latent():
    module, w = quantizer(4), latent()
    variables = fresh(module)
    q = module.apply(variables, w, QuantContext())
    order = np.random.RandomState(1).permutation(16)
    shuffled = jax.tree.map(lambda rows: rows[order], variables)
    np.testing.assert_array_equal(module.apply(shuffled, w, QuantContext()), q)
    np.testing.assert_array_equal(module.apply(variables, 4 * w, QuantContext()), 4 * q)


def test_values_in_the_dead_zone_take_the_memory_and_others_their_own_sign():
    module, w = quantizer(1), latent(shape=(3, 3, 1, 1))
    memory = jnp.asarray([[1.0] * 9, [-1.0] * 9])
    values = jnp.asarray([[-0.0005] * 8 + [-0.001], [-2.0] * 9], jnp.float32)
    variables = with_codebook(values, memory)
    np.testing.assert_array_equal(module.apply(variables, method="patterns"), [[1.0] * 8 + [-1.0], [-1.0] * 9])
    # Another dead zone leaves them outside.
    np.testing.assert_array_equal(quantizer(1, dead_zone=1e-4).apply(variables, method="patterns"), -np.ones((2, 9)))
    assert np.isfinite(module.apply(variables, w, QuantContext())).all()


# ---- state


def moved() -> tuple[dict, np.ndarray]:
    """A codebook whose signs are no longer those of its memory, and its new patterns."""
    rng = np.random.RandomState(2)
    values = rng.normal(0, 0.5, (16, 9)).astype(np.float32)
    values[3, :4], values[7, 2] = 0.0009, -0.0001
    memory = rng.choice([-1.0, 1.0], (16, 9)).astype(np.float32)
    expected = np.where(np.abs(values) >= 1e-3, np.sign(values), memory)
    return with_codebook(jnp.asarray(values), jnp.asarray(memory)), expected


def test_a_training_step_keeps_the_patterns_it_used_and_evaluation_uses_them_without_keeping_them():
    module, (variables, expected) = quantizer(4), moved()
    q, kept = module.apply(variables, latent(), context(), mutable=["quant_state"])
    np.testing.assert_array_equal(kept["quant_state"]["memory"], expected)
    evaluated, after = module.apply(variables, latent(), QuantContext(), mutable=["quant_state"])
    np.testing.assert_array_equal(evaluated, q)
    np.testing.assert_array_equal(after["quant_state"]["memory"], variables["quant_state"]["memory"])


def test_evaluation_changes_nothing_even_on_a_refinement_step():
    module, (variables, _) = quantizer(4), moved()
    ctx = QuantContext(train=False, knobs={"refine_codebook": jnp.ones(())})
    _, after = module.apply(variables, latent(), ctx, mutable=["params", "quant_state"])
    jax.tree.map(np.testing.assert_array_equal, dict(after), variables)


def test_evaluating_between_two_steps_makes_no_difference_to_training():
    # What a step keeps depends on codebook and memory alone, and is a fixed point.
    module, (variables, expected) = quantizer(4), moved()
    once = module.apply(variables, latent(), context(), mutable=["quant_state"])[1]["quant_state"]
    twice = module.apply({**variables, "quant_state": once}, latent(), context(), mutable=["quant_state"])[1][
        "quant_state"
    ]
    np.testing.assert_array_equal(twice["memory"], expected)


# ---- gradients


def gradients_of(variables: dict, ctx: QuantContext, cotangent: np.ndarray, w: jax.Array) -> tuple[np.ndarray, ...]:
    module = quantizer(4)

    def product(w, params):
        return jnp.sum(cotangent * module.apply({**variables, "params": params}, w, ctx))

    d_w, d_params = jax.grad(product, argnums=(0, 1))(w, variables["params"])
    return np.asarray(d_w), np.asarray(d_params["codebook"])


def test_the_latent_gets_the_scaled_gradient_up_to_size_1():
    w, cotangent = 2 * latent(), np.asarray(latent(seed=1))
    d_w, _ = gradients_of(moved()[0], context(), cotangent, w)
    scale = np.abs(np.asarray(w, np.float64)).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(d_w, scale * cotangent * (np.abs(w) <= 1), rtol=1e-6)
    assert 0.1 < (d_w == 0).mean() < 0.9


def test_the_codebook_gets_the_sum_over_its_kernels_on_refinement_steps_only():
    variables, patterns = moved()
    w, cotangent = 2 * latent(), np.asarray(latent(seed=1))
    for ctx in (context(), context(refine_codebook=0.0)):
        np.testing.assert_array_equal(gradients_of(variables, ctx, cotangent, w)[1], 0)
    _, d_p = gradients_of(variables, context(refine_codebook=1.0), cotangent, w)
    scale = np.abs(np.asarray(w, np.float64)).mean(axis=(0, 1, 2))
    per_kernel = np.asarray(ops.to_rows(jnp.asarray(scale * cotangent, jnp.float32)))
    indices = np.asarray(ops.nearest(ops.to_rows(w), jnp.asarray(patterns)))
    expected = np.zeros((16, 9))
    np.add.at(expected, indices, per_kernel)
    # Sums of a few float32 numbers of size 0.1.
    np.testing.assert_allclose(d_p, expected, atol=1e-5)
    np.testing.assert_allclose(d_p.sum(axis=0), per_kernel.sum(axis=0), atol=1e-5)


# ---- look-up form


@pytest.mark.parametrize(("tau", "dtype"), [(1, np.uint8), (4, np.uint8), (8, np.uint8), (9, np.uint16)])
def test_the_look_up_form_is_exactly_the_kernel_of_evaluation(tau, dtype):
    module, w = quantizer(tau), latent()
    variables = fresh(module)
    encoded = module.apply(variables, w, QuantContext(), method="encode")
    assert isinstance(encoded, EncodedKernels)
    assert encoded.indices.shape == SHAPE[2:] and encoded.indices.dtype == dtype
    assert encoded.levels.shape == (2**tau, 9) and encoded.scale.shape == (1, 1, 1, SHAPE[3])
    np.testing.assert_array_equal(encoded.decode(), module.apply(variables, w, QuantContext()))
    np.testing.assert_array_equal(encoded.per_weight().decode(), encoded.decode())


def test_the_look_up_form_has_the_memory_and_bears_patterns_that_are_double_or_unused():
    module, (variables, expected) = quantizer(4), moved()
    doubled = jax.tree.map(lambda rows: rows.at[5].set(rows[1]), variables)
    w = latent()
    encoded = module.apply(doubled, w, QuantContext(), method="encode")
    assert 5 not in np.asarray(encoded.indices), "the first of two equal patterns is used"
    assert len(np.unique(encoded.indices)) < 16
    expected[5] = expected[1]
    np.testing.assert_array_equal(encoded.levels, expected)
    np.testing.assert_array_equal(encoded.decode(), module.apply(doubled, w, QuantContext()))


# ---- costs


@pytest.mark.parametrize(("tau", "bits", "table"), [(4, 4, 144), (5, 5, 288), (6, 6, 576), (9, 9, 0)])
def test_a_kernel_is_stored_in_tau_bits_beside_the_table(tau, bits, table):
    cost = quantizer(tau).cost((3, 3, 8, 64))
    assert cost.stored_bits * 9 == pytest.approx(bits, abs=1e-12)
    assert (cost.codebook_bits, cost.operation_bits, cost.scales) == (table, 1.0, 64)


@pytest.mark.parametrize(
    ("tau", "num_out", "expected"),
    [(5, 512, 8 * (9 * 32 + 256)), (5, 64, 8 * (9 * 32 + 32)), (6, 64, 9 * 8 * 64), (9, 512, 9 * 8 * 512)],
)
def test_patterns_are_shared_where_there_are_fewer_than_output_channels(tau, num_out, expected):
    assert quantizer(tau).cost((3, 3, 8, num_out)).multiply_accumulates == expected


# ---- mistakes


@pytest.mark.parametrize("tau", [0, 10, 4.0, "4", None])
def test_another_tau_is_refused(tau):
    with pytest.raises(ValueError, match=r"tau=.*: accepted are 1 to 9"):
        quantizer(tau)


def test_a_negative_dead_zone_is_refused():
    with pytest.raises(ValueError, match=r"dead_zone=-0.1: accepted is 0 or more"):
        quantizer(4, dead_zone=-0.1)


@pytest.mark.parametrize("kernel_size", [(1, 1), (5, 5), (3, 1)])
def test_a_layer_of_other_kernels_is_refused(kernel_size):
    layer = QuantConv(4, kernel_size=kernel_size, weight_quantizer=build_weight(spec("codebook")))
    with pytest.raises(ValueError, match=r"kernel \dx\dx5x4: accepted are 3x3 convolutions"):
        layer.init(jax.random.key(0), jnp.zeros((1, 6, 6, 5)), QuantContext())


def test_a_dense_layer_is_refused():
    module = quantizer(4)
    with pytest.raises(ValueError, match="kernel 9x4: accepted are 3x3 convolutions"):
        module.init(jax.random.key(0), jnp.zeros((9, 4)), QuantContext())
