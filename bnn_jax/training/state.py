"""Everything that must survive a restart, in one pytree."""

from typing import Any

import flax.struct
import jax
import numpy as np


@flax.struct.dataclass
class TrainState:
    """State of one training stage.

    Attributes:
      step: int32 scalar, optimiser steps done.
      params: trainable parameters, as they are evaluated, exported and handed on: with an average over the steps, that.
      batch_stats: running statistics of BatchNorm, likewise.
      quant_state: state of the quantizers (masks, codebook memories); {} if there is none.
      opt_state: optimiser state.
      objective_state: state of the objectives by name; {} if there is none.
      metric_sums: sums over the images of the current epoch, so that an epoch's metrics survive a restart too.
      rng: typed key all random draws are folded from; it never changes.
      knobs: values, in the last step, of the knobs that the network's quantizers read; {} if there are none.
      moving: where ``params`` and ``batch_stats`` are averages, those that the steps change, by these names; else {}.
      signs: by layer, int8, signs of the quantized weights at the start of the epoch; {} unless flips are recorded.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    quant_state: Any
    opt_state: Any
    objective_state: Any
    metric_sums: Any
    rng: jax.Array
    knobs: Any = flax.struct.field(default_factory=dict)
    moving: Any = flax.struct.field(default_factory=dict)
    signs: Any = flax.struct.field(default_factory=dict)

    @property
    def steps_done(self) -> int:
        """``step`` as a number; of several seeds, stacked, all steps are equal."""
        return int(np.asarray(self.step).max())

    @property
    def variables(self) -> dict[str, Any]:
        """The collections the network is applied with."""
        names = ("params", "batch_stats", "quant_state", "knobs")
        return {name: value for name in names if (value := getattr(self, name))}
