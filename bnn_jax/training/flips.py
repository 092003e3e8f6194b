"""Flip rates: by layer, the share of quantized weights whose sign changed during an epoch.

The signs at the start of an epoch lie in the state, so that a run that goes on inside of it compares with the same. Of
weights that are averaged it is those that the steps change. A sign is -1, 0 or 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bnn_jax.stages import Stage
from bnn_jax.storage.weights import weight_signs
from bnn_jax.training.averaging import moving
from bnn_jax.training.state import TrainState

Signs = Callable[[TrainState], dict[str, jax.Array]]


def signs_program(stage: Stage, network: Any, image_shape: tuple[int, int, int]) -> Signs | None:
    """Function of a state of one seed, to be jitted, that gives the signs of its weights; None where nobody asks."""
    if not stage.log_flip_rate:
        return None
    return lambda state: weight_signs(network, moving(state).variables, image_shape)


def flip_rates(signs: Signs | None, state: TrainState) -> dict[str, jax.Array]:
    """By layer, the share of weights with another sign than at the start of the epoch, 0 to 1; {} without signs."""
    if signs is None:
        return {}
    return jax.tree.map(lambda old, new: jnp.mean((old != new).astype(jnp.float32)), state.signs, signs(state))
