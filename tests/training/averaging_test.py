import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.training.averaging import averaged, moving, with_average
from bnn_jax.training.state import TrainState

SHAPES = {"conv": {"kernel": (3, 4), "codebook": (2, 9)}}


def weights(step: int) -> dict:
    rng = np.random.RandomState(step)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def state(step: int) -> TrainState:
    statistics = {"bn": {"mean": jnp.full(4, float(step))}}
    return TrainState(
        step=jnp.int32(step),
        params=weights(step),
        batch_stats=statistics,
        quant_state={"mask": jnp.asarray([step])},
        opt_state={},
        objective_state={},
        metric_sums={},
        rng=jax.random.key(0),
    )


def after(steps: int, *, decay: float, not_averaged: tuple[str, ...] = ()) -> TrainState:
    found = with_average(state(0))
    for step in range(1, steps + 1):
        found = averaged(found, state(step), decay=decay, not_averaged=not_averaged)
    return found


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_the_average_is_the_mean_of_all_steps_with_weights_that_decay(decay, steps):
    found = after(steps, decay=decay)
    share = decay ** np.arange(steps - 1, -1, -1.0)
    each = np.stack([np.asarray(weights(step)["conv"]["kernel"], np.float64) for step in range(1, steps + 1)])
    expected = np.tensordot(share / share.sum(), each, 1)
    # Twenty roundings of float32, of values of about 1.
    np.testing.assert_allclose(found.params["conv"]["kernel"], expected, atol=2e-6)
    mean = (share * np.arange(1, steps + 1)).sum() / share.sum()
    np.testing.assert_allclose(found.batch_stats["bn"]["mean"], np.full(4, mean), rtol=2e-6)


def test_what_the_steps_change_and_the_states_of_quantizers_are_those_of_the_last_step():
    found, last = after(3, decay=0.9), state(3)
    jax.tree.map(np.testing.assert_array_equal, found.moving, {"params": last.params, "batch_stats": last.batch_stats})
    assert found.quant_state["mask"] == last.quant_state["mask"] and found.step == 3
    back = moving(found)
    jax.tree.map(np.testing.assert_array_equal, back.variables, last.variables)
    assert back.moving == {}


def test_parameters_that_a_projection_replaces_are_not_averaged():
    found, last = after(3, decay=0.9, not_averaged=("^$", "codebook$")), weights(3)
    np.testing.assert_array_equal(found.params["conv"]["codebook"], last["conv"]["codebook"])
    assert (found.params["conv"]["kernel"] != last["conv"]["kernel"]).all()


def test_a_parameter_that_stands_still_keeps_its_bits():
    still = with_average(state(7).replace(step=jnp.int32(0)))
    for step in range(1, 6):
        still = averaged(still, state(7).replace(step=jnp.int32(step)), decay=0.7)
    jax.tree.map(np.testing.assert_array_equal, still.params, weights(7))


def test_a_state_without_an_average_is_handed_back():
    alone = state(1)
    assert moving(alone) is alone
