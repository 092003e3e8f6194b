"""Knobs: scalars that follow a schedule of the stage and that quantizers, objectives and projections read by name."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Knob:
    """What one of them is. Whoever reads it lists it in its ``knobs`` and asks the context: ``ctx.knob(TEMPERATURE)``.

    Attributes:
      name: name under which a stage gives its schedule (``Stage.knobs``) and a checkpoint its last value.
      meaning: what it does, for messages.
      default: value where nothing was trained: in a network before its training, and in one whose variables come from
        a file that holds none.
      optional: whether a stage may train without a schedule for it, since the published method does; the default holds
        then. Otherwise building the stage fails.
    """

    name: str
    meaning: str
    default: float
    optional: bool = False


ERROR_DECAY_K = Knob("error_decay_k", "height of the error decay estimator's gradient", default=10.0)
ERROR_DECAY_T = Knob("error_decay_t", "inverse width of the error decay estimator's gradient", default=0.1)
TEMPERATURE = Knob("temperature", "temperature of the choices between candidate weights", default=1.0)
NOISE = Knob("noise", "factor on the Gumbel noise of these choices; without it nothing is drawn", 0.0, optional=True)
REFINE_CODEBOOK = Knob(
    "refine_codebook",
    "above 0 on the steps on which codebooks have a gradient; without it they never have one",
    default=0.0,
    optional=True,
)
CLAMP_QUANTILE = Knob(
    "clamp_quantile", "tau, the quantile that weights are clamped to for their gradient", default=0.99
)
