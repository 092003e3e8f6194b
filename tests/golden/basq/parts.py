"""Checks of single parts: quantizers, the quantized convolution, the shortcut."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.layers.conv import QuantConv
from bnn_jax.layers.shortcut import flexible_shortcut
from bnn_jax.ops.clipping import clipped_uniform
from bnn_jax.quantizers import QuantContext, build_act, build_weight
from bnn_jax.stages import IDENTITY, spec
from tests.golden.asbq.support import nchw, nhwc, to_ours, to_pytorch, value_and_pullback
from tests.golden.basq.support import relative_to_largest
from tests.golden.comparison import Comparison, GoldenFile


def each_case(check: Callable[[GoldenFile, Comparison, str], None]) -> Callable[[GoldenFile, Comparison], None]:
    """Makes a check of one case, 'c0_', 'c1_', ..., one of the whole file."""

    def check_all(file: GoldenFile, result: Comparison) -> None:
        for number in range(int(file["n_cases"])):
            check(file, result, f"c{number}_")

    return check_all


@each_case
def check_clipped_activation(file: GoldenFile, result: Comparison, case: str) -> None:
    """The searched quantizer, forward and backward."""
    function = _at_bits(int(file[f"{case}bits"]))
    arguments = (nhwc(file[f"{case}x"]), jnp.asarray(file[f"{case}alpha"]))
    y, (dx, dalpha) = value_and_pullback(function, arguments, nhwc(file[f"{case}ct"]))
    result.close(f"{case}y", nchw(y), file[f"{case}y"], atol=1e-6)
    result.close(f"{case}dx", nchw(dx), file[f"{case}dx"], atol=1e-6)
    result.close(f"{case}dalpha", dalpha, file[f"{case}dalpha"], atol=1e-5, rtol=1e-6)


@functools.cache
def _at_bits(bits: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda x, bound: clipped_uniform(x, bound, bits)


def check_edges(file: GoldenFile, result: Comparison) -> None:
    """The searched quantizer exactly on its thresholds."""
    x, alpha, bits = jnp.asarray(file["edge_x"]), jnp.asarray(file["edge_alpha"]), int(file["edge_bits"])
    y, pullback = jax.vjp(_at_bits(bits), x, alpha)
    dx, dalpha = pullback(jnp.ones_like(y))
    result.close("edge_y", y, file["edge_y"], atol=1e-6)
    result.exact("edge_dx", dx, file["edge_dx"])
    result.close("edge_dalpha", np.reshape(dalpha, file["edge_dalpha"].shape), file["edge_dalpha"], atol=1e-6)


@each_case
def check_lsq_weight(file: GoldenFile, result: Comparison, case: str) -> None:
    """Weights with a learned step per output channel: value, gradients, first step, range."""
    quantizer = build_weight(spec("lsq", bits=int(file[f"{case}bits"])))()
    w, s = to_ours(file[f"{case}w"]), jnp.asarray(file[f"{case}s"])
    y, pullback = jax.vjp(lambda w, s: quantizer.apply({"params": {"step": s}}, w, QuantContext()), w, s)
    dw, ds = pullback(to_ours(file[f"{case}ct"]))
    result.close(f"{case}y", to_pytorch(y), file[f"{case}y"], atol=1e-6)
    result.close(f"{case}dw", to_pytorch(dw), file[f"{case}dw"], atol=1e-6)
    relative_to_largest(result, f"{case}ds", ds, file[f"{case}ds"], 1e-5)
    first = quantizer.init(jax.random.key(0), w, QuantContext())["params"]["step"]
    result.close(f"{case}s_init", first, file[f"{case}s_init"], rtol=1e-6)
    codes = quantizer.apply({"params": {"step": s}}, w, QuantContext(), method="encode").levels
    result.exact(f"{case}thd", [codes[0], codes[-1]], file[f"{case}thd"])


@each_case
def check_lsq_act(file: GoldenFile, result: Comparison, case: str) -> None:
    """Activations with a learned step per input channel: value, gradients, first step, range."""
    bits = int(file[f"{case}bits"])
    quantizer = build_act(spec("lsq", bits=bits))()
    x, s = nhwc(file[f"{case}x"]), jnp.asarray(file[f"{case}s"])
    y, pullback = jax.vjp(lambda x, s: quantizer.apply({"params": {"step": s}}, x, QuantContext()), x, s)
    dx, ds = pullback(nhwc(file[f"{case}ct"]))
    result.close(f"{case}y", nchw(y), file[f"{case}y"], atol=1e-6)
    result.close(f"{case}dx", nchw(dx), file[f"{case}dx"], atol=1e-6)
    relative_to_largest(result, f"{case}ds", ds, file[f"{case}ds"], 1e-5)
    first = quantizer.init(jax.random.key(0), x, QuantContext())["params"]["step"]
    result.close(f"{case}s_init", first, file[f"{case}s_init"], rtol=1e-6)
    limits = quantizer.apply({"params": {"step": jnp.ones(x.shape[-1])}}, jnp.full_like(x, 1e3), QuantContext())
    result.exact(f"{case}thd", [0, limits.max()], file[f"{case}thd"])


@each_case
def check_conv(file: GoldenFile, result: Comparison, case: str) -> None:
    """Convolutions of unquantized inputs with quantized (or real) weights."""
    _, cout, size, stride, pad, groups, bits, quantized = (int(v) for v in file[f"{case}conf"])
    weight = build_weight(spec("lsq", bits=bits) if quantized else IDENTITY)
    layer = QuantConv(
        cout, (size, size), (stride, stride), ((pad, pad), (pad, pad)), groups=groups, weight_quantizer=weight
    )
    steps = {"weight_quantizer": {"step": jnp.asarray(file[f"{case}s"])}} if quantized else {}
    params = {"kernel": to_ours(file[f"{case}w_oihw"]), **steps}
    x, cotangent = nhwc(file[f"{case}x"]), nhwc(file[f"{case}ct"])
    y, pullback = jax.vjp(lambda p, x: layer.apply({"params": p}, x, QuantContext()), params, x)
    grads, dx = pullback(cotangent)
    result.close(f"{case}y", nchw(y), file[f"{case}y"], atol=1e-5)
    result.close(f"{case}dx", nchw(dx), file[f"{case}dx"], atol=1e-5)
    kernel_gradient = to_pytorch(grads["kernel"]).reshape(-1, 1)
    relative_to_largest(result, f"{case}dw_flat", kernel_gradient, file[f"{case}dw_flat"], 1e-5)
    if quantized:
        relative_to_largest(result, f"{case}ds", grads["weight_quantizer"]["step"], file[f"{case}ds"], 1e-5)
    else:
        file.not_compared(f"{case}d?s")


@each_case
def check_shortcut(file: GoldenFile, result: Comparison, case: str) -> None:
    """The shortcut between numbers of channels, with remainder and stride."""
    _, features, stride = (int(v) for v in file[f"{case}conf"])
    y, pullback = jax.vjp(lambda x: flexible_shortcut(x, features, stride=stride), nhwc(file[f"{case}x"]))
    result.close(f"{case}y", nchw(y), file[f"{case}y"], atol=1e-6)
    result.close(f"{case}dx", nchw(pullback(nhwc(file[f"{case}ct"]))[0]), file[f"{case}dx"], atol=1e-6)
