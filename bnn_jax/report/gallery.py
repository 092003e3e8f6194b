"""What quantizers do to a single value, and what gradient they give it: pictures of every entry of the tables."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.quantizers import ACT, WEIGHT, QuantContext, build_act, build_weight
from bnn_jax.report.plots import BAR_COLOUR, CLASS_COLOURS, style_axis
from bnn_jax.stages import Spec, spec

# 3x3 kernels of 20 filters: enough for codebooks, and for a filter that is masked.
KERNEL = (3, 3, 8, 20)
LARGEST, POINTS = 1.5, 801
# Of those that may have any number of bits.
SHOWN_BITS = 2


def example(table: dict[str, Any], name: str) -> Spec:
    """The quantizer with its own defaults; with two bits where it has none."""
    bits = table[name].bits
    if name == "identity" or bits < 32:
        return spec(name)
    return spec(name, inner=spec("dorefa", bits=SHOWN_BITS)) if name == "pruned" else spec(name, bits=SHOWN_BITS)


def weight_response(name: str, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights from -1.5 to 1.5 in random places of a layer, what becomes of each, and its own gradient dQ/dw.

    Where latent weights are logits of candidates, these are those of the last candidate, and the others are 0.

    Args:
      name: key of ``WEIGHT``.
      seed: of the places.

    Returns:
      Values, quantized values, gradients, each (N,).
    """
    module = build_weight(example(WEIGHT, name))()
    values = np.random.default_rng(seed).permutation(np.linspace(-LARGEST, LARGEST, int(np.prod(KERNEL))))
    kernel = jnp.asarray(values.reshape(KERNEL), jnp.float32)
    shape = module.latent_shape(KERNEL)

    def latent(kernel: jax.Array) -> jax.Array:
        if shape == KERNEL:
            return kernel
        others = jnp.zeros(shape)
        return others.at[-1].set(kernel) if shape[1:] == KERNEL else others.at[..., -1].set(kernel)

    variables = module.init(jax.random.key(seed), latent(kernel), QuantContext())

    def quantized(kernel: jax.Array) -> Any:
        return module.apply(variables, latent(kernel), QuantContext())

    return values, *_response(quantized, kernel)


def activation_response(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations, what becomes of each, and the gradient dq/dx; the range reaches beyond the largest level.

    Args:
      name: key of ``ACT``.
    """
    module = build_act(example(ACT, name))()
    wide = jnp.linspace(-8.0, 8.0, POINTS).reshape(-1, 1, 1, 1)
    variables = module.init(jax.random.key(0), wide, QuantContext())

    def quantized(x: jax.Array) -> Any:
        return module.apply(variables, x, QuantContext())

    highest = float(quantized(wide).max())
    reach = LARGEST if highest >= 8 else 1.4 * max(highest, 1.0)
    x = jnp.linspace(-reach, reach, POINTS).reshape(-1, 1, 1, 1)
    return np.asarray(x).ravel(), *_response(quantized, x)


def _response(quantized: Any, x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Values of a function that keeps the shape, and the diagonal of its Jacobian."""
    q, pull = jax.vjp(quantized, x)

    def own(index: jax.Array) -> jax.Array:
        return pull(jnp.zeros(q.size).at[index].set(1.0).reshape(q.shape))[0].ravel()[index]

    gradients = jax.jit(lambda: jax.lax.map(own, jnp.arange(x.size), batch_size=160))()
    return np.asarray(q).ravel(), np.asarray(gradients)


def draw(name: str, forward: Any, gradient: Any, *, activation: bool = False) -> None:
    """Draws a quantizer: values before and after, and the gradient.

    Args:
      name: key of ``WEIGHT``, or of ``ACT``.
      forward: matplotlib axes of the values.
      gradient: axes of the gradients.
      activation: whether it is a quantizer of activations.
    """
    x, q, own = activation_response(name) if activation else weight_response(name)
    order = np.argsort(x)
    forward.plot(x[order], q[order], ".", markersize=2, color=BAR_COLOUR)
    gradient.plot(x[order], own[order], ".", markersize=2, color=CLASS_COLOURS[3])
    bits = getattr(example(ACT if activation else WEIGHT, name), "kwargs", {}).get("bits")
    forward.set_title(name if bits is None else f"{name}, {bits} bits", fontsize=9)
    kind = "activation" if activation else "weight"
    style_axis(forward, x_label=kind, y_label=f"quantized {kind}")
    style_axis(gradient, x_label=kind, y_label="its gradient")
