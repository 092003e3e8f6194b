"""Binary activations of ReActNet and SNN."""

import jax

from bnn_jax.ops import ste
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.quantizers.irnet import SignActBase


class ApproxSignAct(SignActBase):
    """Binary activations whose gradient is that of a piecewise quadratic curve.

    Forward: ``q = sign(x)``, sign(0) = 0.
    Backward: ``dx = dq * max(0, 2 - 2 |x|)``.

    Attributes:
      bits: 1.

    Reference: Bi-Real Net, Liu et al. 2018 (arXiv 1808.00278), section 3.3; release: yikaiw/SNN, liuzechun/ReActNet.
    """

    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        return ste.approx_sign(x)
