"""Activation quantizer with several branches, each with a clip value of its own; BASQ searches the branch per layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnn_jax.ops.clipping import clipped_uniform
from bnn_jax.quantizers.base import ActQuantizer, QuantContext, chosen_branch, validate_bits

# L2 factors on the clip values of the seven published branches; branch 0 is pulled down hardest.
PUBLISHED_DECAYS = (1e-2, 5e-3, 1e-3, 5e-4, 1e-4, 5e-5, 1e-5)


class BranchClipAct(ActQuantizer):
    """Clips to [0, a_j] and rounds to ``2**bits`` levels, with the clip value of the chosen branch j.

    Forward: ``ops.clipping.clipped_uniform`` with ``a_j``, ``j = ctx.choice[index]``; without a choice branch 0.
    Backward: ``dx = dy`` where ``0 < x < a_j``; ``da_j = sum of dy where x > a_j``, and 0 for all other branches.

    The parameter ``upper_bound`` (branches,), one scalar () without branches, starts at 6. What makes the branches
    differ is the weight decay of each, which belongs to the optimiser (``ParameterGroup.weight_decay``).

    Attributes:
      bits: 1 to 8.
      branches: number of branches; 1 is an ordinary quantizer, without a branch axis.
      index: place of this layer in ``ctx.choice``.
      initial_bound: value all branches start at.

    Reference: BASQ, Kim et al. 2022 (ECCV), section 3; release: HanByulKim/BASQ: mbv2_supernet.py.
    """

    branches: int = len(PUBLISHED_DECAYS)
    index: int = 0
    initial_bound: float = 6.0

    def __post_init__(self):
        validate_bits(self.bits, range(1, 9), "branch_clip activation quantizer")
        if self.branches < 1:
            raise ValueError(f"branch_clip activation quantizer: branches={self.branches!r}: accepted is 1 or more")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        shape = (self.branches,) if self.branches > 1 else ()
        bounds = self.param("upper_bound", nn.initializers.constant(self.initial_bound), shape, jnp.float32)
        bound = bounds if self.branches == 1 else bounds[chosen_branch(ctx, self.index)]
        return clipped_uniform(x, bound, int(self.bits))
