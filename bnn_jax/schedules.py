"""Schedules: scalars that follow the training step, as functions usable inside jit."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bnn_jax.stages import Spec

Schedule = Callable[[jax.Array], jax.Array]


def constant(*, value: float, steps_per_epoch: int, epochs: int) -> Schedule:
    """``value`` at every step."""
    return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def piecewise(
    *, boundaries: tuple[float, ...], values: tuple[float, ...], steps_per_epoch: int, epochs: int
) -> Schedule:
    """``values[i]`` in epoch e, where i is the number of boundaries that are <= e.

    Args:
      boundaries: increasing, in epochs.
      values: one more than boundaries.
      steps_per_epoch: optimiser steps in an epoch.
      epochs: length of the stage.

    Raises:
      ValueError: the numbers of values and boundaries do not fit.
    """
    if len(values) != len(boundaries) + 1 or list(boundaries) != sorted(boundaries):
        raise ValueError(
            f"piecewise schedule: boundaries={boundaries!r}, values={values!r}: accepted are increasing boundaries "
            "and one value more than boundaries"
        )
    limits = jnp.asarray([round(epoch * steps_per_epoch) for epoch in boundaries], jnp.int32)
    table = jnp.asarray(values, jnp.float32)
    return lambda step: table[jnp.searchsorted(limits, step, side="right", method="compare_all")]


def cosine(
    *, initial: float, final: float = 0.0, warmup_epochs: float = 0.0, steps_per_epoch: int, epochs: int
) -> Schedule:
    """Linear rise from 0 over the warm-up, then half a cosine from ``initial`` to ``final`` at the last step.

    Args:
      initial: value after the warm-up.
      final: value at the end.
      warmup_epochs: length of the rise.
      steps_per_epoch: optimiser steps in an epoch.
      epochs: length of the stage.
    """
    warmup = warmup_epochs * steps_per_epoch
    span = max(epochs * steps_per_epoch - warmup, 1)

    def schedule(step: jax.Array) -> jax.Array:
        progress = jnp.clip((step - warmup) / span, 0.0, 1.0)
        falling = final + (initial - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, initial * step / max(warmup, 1), falling).astype(jnp.float32)

    return schedule


def cosine_by_epoch(
    *, initial: float, final: float = 0.0, warmup_epochs: int = 0, steps_per_epoch: int, epochs: int
) -> Schedule:
    """Constant within an epoch: ``initial * (e+1)/(W+1)`` for e <= W, then half a cosine to ``final`` at epoch E.

    Args:
      initial: value at the end of the warm-up.
      final: value the cosine approaches.
      warmup_epochs: W.
      steps_per_epoch: optimiser steps in an epoch.
      epochs: E.
    """
    values = cosine_by_epoch_values(initial=initial, final=final, warmup_epochs=warmup_epochs, epochs=epochs)
    return _by_epoch(values, steps_per_epoch)


def cosine_by_epoch_values(*, initial: float, final: float = 0.0, warmup_epochs: int = 0, epochs: int) -> list[float]:
    """The value of every epoch, in double precision; see ``cosine_by_epoch``."""
    falling = [
        final + (initial - final) * 0.5 * (1 + math.cos(math.pi * (e - warmup_epochs) / max(epochs - warmup_epochs, 1)))
        for e in range(epochs)
    ]
    rising = [initial * (e + 1) / (warmup_epochs + 1) for e in range(min(warmup_epochs + 1, epochs))]
    return rising + falling[len(rising) :]


def cosine_by_step(*, initial: float, steps: int | None = None, steps_per_epoch: int, epochs: int) -> Schedule:
    """``initial / 2 * (1 + cos(pi * step / T))``: from ``initial`` to 0 at step T, and up again behind it.

    Args:
      initial: value at step 0.
      steps: T; None takes the length of the stage.
      steps_per_epoch: optimiser steps in an epoch.
      epochs: length of the stage.

    Reference: PyTorch's CosineAnnealingLR, advanced every step; release: HanByulKim/BASQ: 01train_supernet.py, which
      trains a little past T.
    """
    period = steps or steps_per_epoch * epochs
    return lambda step: initial * 0.5 * (1 + jnp.cos(jnp.pi * (step / period)))


def linear_by_epoch(*, initial: float, steps_per_epoch: int, epochs: int) -> Schedule:
    """``initial * (1 - (e+1)/E)`` in epoch e of E: constant within an epoch, and 0 in the last one.

    Args:
      initial: value the first epoch stays one E-th below.
      steps_per_epoch: optimiser steps in an epoch.
      epochs: E.

    Reference: release: yikaiw/SNN, whose scheduler is advanced before each epoch; ReActNet too.
    """
    return _by_epoch(linear_by_epoch_values(initial=initial, epochs=epochs), steps_per_epoch)


def linear_by_epoch_values(*, initial: float, epochs: int) -> list[float]:
    """The value of every epoch, in double precision; see ``linear_by_epoch``."""
    return [initial * (1.0 - (e + 1) / epochs) for e in range(epochs)]


def every(*, interval: int, start: int = 0, steps_per_epoch: int, epochs: int) -> Schedule:
    """1 on every ``interval``-th step, else 0: on the steps (from 0) where ``start + step + 1`` is a multiple of it.

    Args:
      interval: in steps, 1 or more.
      start: steps counted before the first one.
      steps_per_epoch: optimiser steps in an epoch.
      epochs: length of the stage.

    Raises:
      ValueError: the interval is below 1.
    """
    if interval < 1:
        raise ValueError(f"every schedule: interval={interval!r}: accepted is 1 or more")
    return lambda step: ((start + step + 1) % interval == 0).astype(jnp.float32)


def decay_by_epoch(
    *, initial: float, rate: float, interval: int = 1, floor: float = 0.0, steps_per_epoch: int, epochs: int
) -> Schedule:
    """Constant within an epoch: ``max(initial * rate**floor(e / interval), floor)`` in epoch e.

    Args:
      initial: value of the first epoch.
      rate: factor, 0 to 1.
      interval: epochs between two decays, 1 or more.
      floor: smallest value.
      steps_per_epoch: optimiser steps in an epoch.
      epochs: length of the stage.

    Raises:
      ValueError: the interval is below 1.

    Reference: temperature and noise of weight search; release: qinglu0330/DNN-weight-search: backend/fitting.py.
    """
    if interval < 1:
        raise ValueError(f"decay_by_epoch schedule: interval={interval!r}: accepted is 1 or more")
    return _by_epoch([max(initial * rate ** (e // interval), floor) for e in range(epochs)], steps_per_epoch)


def exponential_by_epoch(*, initial: float, final: float, steps_per_epoch: int, epochs: int) -> Schedule:
    """Constant within an epoch: ``initial + (final - initial) * (exp(e / E) - 1) / (exp(1) - 1)`` in epoch e of E.

    Reference: ReCU, Xu et al. 2021 (arXiv 2103.12369), section 5.2.
    """
    span = (final - initial) / math.expm1(1.0)
    return _by_epoch([initial + span * math.expm1(e / epochs) for e in range(epochs)], steps_per_epoch)


def error_decay_t(*, steps_per_epoch: int, epochs: int) -> Schedule:
    """Inverse width of the error decay estimator, ``t = 10**(-3 + 4 e / E)`` in epoch e of E.

    Reference: IR-Net, Qin et al. 2020 (arXiv 1909.10788), equation 15; release: 1e-3 to 10.
    """
    return _by_epoch([10.0 ** (-3 + 4 * e / epochs) for e in range(epochs)], steps_per_epoch)


def error_decay_k(*, steps_per_epoch: int, epochs: int) -> Schedule:
    """Height of the error decay estimator over t: ``1/t`` while t < 1, then 1."""
    return _by_epoch([max(10.0 ** (3 - 4 * e / epochs), 1.0) for e in range(epochs)], steps_per_epoch)


def _by_epoch(values: list[float], steps_per_epoch: int) -> Schedule:
    table = jnp.asarray(values, jnp.float32)
    return lambda step: table[jnp.minimum(step // steps_per_epoch, table.size - 1)]


def warmup(*, schedule: Spec, warmup_epochs: float, steps_per_epoch: int, epochs: int) -> Schedule:
    """Another schedule times ``min(1, (step + 1) / (W * S))``, W epochs of S steps: it rises in a line, never from 0.

    Args:
      schedule: the other one.
      warmup_epochs: W, greater than 0.
      steps_per_epoch: S.
      epochs: length of the stage.
    """
    inner = build(schedule, steps_per_epoch=steps_per_epoch, epochs=epochs)
    return lambda step: inner(step) * jnp.minimum((step + 1) / (warmup_epochs * steps_per_epoch), 1.0)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "piecewise": piecewise,
    "cosine": cosine,
    "cosine_by_epoch": cosine_by_epoch,
    "cosine_by_step": cosine_by_step,
    "linear_by_epoch": linear_by_epoch,
    "every": every,
    "decay_by_epoch": decay_by_epoch,
    "exponential_by_epoch": exponential_by_epoch,
    "error_decay_t": error_decay_t,
    "error_decay_k": error_decay_k,
    "warmup": warmup,
}


def build(spec: Spec, *, steps_per_epoch: int, epochs: int) -> Schedule:
    """Builds the schedule a ``Spec`` names: a function from the int32 step to a float32 scalar.

    Raises:
      ValueError: the name is not in the table or an option does not fit.
    """
    if spec.name not in SCHEDULES:
        raise ValueError(f"schedule {spec.name!r}: accepted are {', '.join(SCHEDULES)}")
    return SCHEDULES[spec.name](**spec.kwargs, steps_per_epoch=steps_per_epoch, epochs=epochs)
