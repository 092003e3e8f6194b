import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.schedules import SCHEDULES, build
from bnn_jax.stages import spec

# Options of every entry; a new schedule needs some here.
EXAMPLES = {
    "constant": {"value": 0.3},
    "piecewise": {"boundaries": (1.0, 2.0), "values": (1.0, 0.1, 0.01)},
    "cosine": {"initial": 0.1, "warmup_epochs": 1.0},
    "cosine_by_epoch": {"initial": 0.1, "warmup_epochs": 1},
    "cosine_by_step": {"initial": 0.1, "steps": 7},
    "linear_by_epoch": {"initial": 0.1},
    "every": {"interval": 4, "start": 1},
    "decay_by_epoch": {"initial": 1.0, "rate": 0.5, "interval": 2, "floor": 0.3},
    "exponential_by_epoch": {"initial": 0.85, "final": 0.99},
    "error_decay_t": {},
    "error_decay_k": {},
    "warmup": {"schedule": spec("cosine", initial=0.1), "warmup_epochs": 1.5},
}


def values(schedule, steps) -> np.ndarray:
    return np.array([float(schedule(jnp.int32(step))) for step in steps])


def test_every_schedule_has_examples():
    assert set(SCHEDULES) == set(EXAMPLES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_gives_a_float32_scalar_inside_and_outside_jit(name):
    schedule = build(spec(name, **EXAMPLES[name]), steps_per_epoch=5, epochs=3)
    for step in (0, 4, 5, 14, 15, 100):
        value, jitted = schedule(jnp.int32(step)), jax.jit(schedule)(jnp.int32(step))
        assert value.shape == () and value.dtype == jnp.float32
        # jit contracts the cosine's arithmetic: a few units in the last place of its largest value, 0.1.
        np.testing.assert_allclose(jitted, value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_traced_so_that_another_step_compiles_nothing(name):
    schedule = jax.jit(build(spec(name, **EXAMPLES[name]), steps_per_epoch=5, epochs=3))
    for step in range(15):
        schedule(jnp.int32(step))
    assert schedule._cache_size() == 1


def test_constant_stays():
    schedule = build(spec("constant", value=0.3), steps_per_epoch=5, epochs=3)
    np.testing.assert_array_equal(values(schedule, range(20)), np.float32(0.3))


def test_piecewise_changes_with_the_first_step_of_the_boundary_epoch():
    schedule = build(spec("piecewise", boundaries=(2.0, 3.0), values=(1.0, 0.5, 0.25)), steps_per_epoch=10, epochs=4)
    np.testing.assert_array_equal(values(schedule, (0, 19, 20, 29, 30, 1000)), [1.0, 1.0, 0.5, 0.5, 0.25, 0.25])


def test_piecewise_takes_boundaries_inside_an_epoch():
    schedule = build(spec("piecewise", boundaries=(0.5,), values=(1.0, 2.0)), steps_per_epoch=10, epochs=1)
    np.testing.assert_array_equal(values(schedule, (4, 5)), [1.0, 2.0])


def test_piecewise_without_boundaries_is_constant():
    schedule = build(spec("piecewise", boundaries=(), values=(0.7,)), steps_per_epoch=10, epochs=1)
    np.testing.assert_array_equal(values(schedule, (0, 9)), np.float32(0.7))


def test_piecewise_takes_a_vector_of_steps():
    schedule = build(spec("piecewise", boundaries=(1.0,), values=(1.0, 2.0)), steps_per_epoch=2, epochs=2)
    np.testing.assert_array_equal(schedule(jnp.arange(4)), [1.0, 1.0, 2.0, 2.0])


@pytest.mark.parametrize(
    "options",
    [
        {"boundaries": (1.0,), "values": (1.0,)},
        {"boundaries": (1.0,), "values": (1.0, 2.0, 3.0)},
        {"boundaries": (2.0, 1.0), "values": (1.0, 2.0, 3.0)},
    ],
)
def test_piecewise_refuses_values_that_do_not_fit_its_boundaries(options):
    with pytest.raises(ValueError, match="one value more than boundaries"):
        build(spec("piecewise", **options), steps_per_epoch=10, epochs=4)


def test_cosine_falls_from_its_initial_to_its_final_value():
    schedule = build(spec("cosine", initial=0.2, final=0.05), steps_per_epoch=10, epochs=4)
    # Half-way the mean of the two; rounding of float32 only.
    np.testing.assert_allclose(values(schedule, (0, 20, 40, 100)), [0.2, 0.125, 0.05, 0.05], rtol=1e-6)
    assert (np.diff(values(schedule, range(41))) < 0).all()


def test_cosine_rises_linearly_over_the_warm_up():
    schedule = build(spec("cosine", initial=0.1, warmup_epochs=2.0), steps_per_epoch=10, epochs=4)
    np.testing.assert_allclose(values(schedule, (0, 5, 10, 20)), [0.0, 0.025, 0.05, 0.1], rtol=1e-6)
    np.testing.assert_allclose(values(schedule, (30, 40)), [0.05, 0.0], rtol=1e-6, atol=1e-9)


# Epochs, warm-up, base rate of the five published recipes (SKD-BNN specification, section 2.9).
RECIPES = [(700, 8, 0.1), (600, 8, 0.05), (800, 16, 0.3), (128, 8, 0.1), (128, 0, 0.001)]


@pytest.mark.parametrize(("epochs", "warmup", "base"), RECIPES)
def test_cosine_by_epoch_is_that_of_the_published_recipes(epochs, warmup, base):
    schedule = build(spec("cosine_by_epoch", initial=base, warmup_epochs=warmup), steps_per_epoch=3, epochs=epochs)
    e = np.arange(epochs)
    rising = base * (e + 1) / (warmup + 1)
    falling = base * 0.5 * (1 + np.cos(np.pi * (e - warmup) / (epochs - warmup)))
    expected = np.where(e <= warmup, rising, falling)
    # One rounding to float32; the last value is 1e-6 of the base rate.
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(3 * jnp.arange(epochs)), expected, rtol=1e-6)
    assert expected[0] == pytest.approx(base / (warmup + 1)) and expected[warmup] == base


def test_cosine_by_epoch_is_constant_within_an_epoch_and_stays_after_the_last():
    schedule = build(spec("cosine_by_epoch", initial=1.0, final=0.5, warmup_epochs=1), steps_per_epoch=4, epochs=3)
    found = values(schedule, range(12)).reshape(3, 4)
    np.testing.assert_array_equal(found, found[:, :1].repeat(4, axis=1))
    np.testing.assert_allclose(found[:, 0], [0.5, 1.0, 0.75], rtol=1e-6)
    assert float(schedule(jnp.int32(100))) == found[2, 0]


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_cosine_by_epoch_takes_a_warm_up_longer_than_the_stage(epochs):
    schedule = build(spec("cosine_by_epoch", initial=0.9, warmup_epochs=8), steps_per_epoch=1, epochs=epochs)
    np.testing.assert_allclose(values(schedule, range(epochs)), 0.1 * (1 + np.arange(epochs)), rtol=1e-6)


@pytest.mark.parametrize(("epochs", "base"), [(256, 1e-3), (128, 2.5e-3)])
def test_linear_by_epoch_is_that_of_the_published_recipes(epochs, base):
    schedule = build(spec("linear_by_epoch", initial=base), steps_per_epoch=3, epochs=epochs)
    expected = base * (1 - np.arange(1, epochs + 1) / epochs)
    found = jax.jit(jax.vmap(schedule))(3 * jnp.arange(epochs) + 2)
    # One rounding to float32.
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[0] == pytest.approx(base * (epochs - 1) / epochs) and found[-1] == 0


def test_linear_by_epoch_is_constant_within_an_epoch_and_stays_0_after_the_last():
    schedule = build(spec("linear_by_epoch", initial=1.0), steps_per_epoch=4, epochs=4)
    np.testing.assert_array_equal(values(schedule, range(20)), np.repeat([0.75, 0.5, 0.25, 0.0, 0.0], 4))


@pytest.mark.parametrize(("start", "expected"), [(0, [24, 49, 74]), (20, [4, 29, 54]), (24, [0, 25, 50])])
def test_every_is_1_on_each_interval_th_step_counted_from_its_start(start, expected):
    schedule = build(spec("every", interval=25, start=start), steps_per_epoch=7, epochs=2)
    assert np.flatnonzero(values(schedule, range(75))).tolist() == expected
    assert set(values(schedule, range(75))) == {0.0, 1.0}


def test_every_step_is_an_interval_of_1_and_less_is_refused():
    np.testing.assert_array_equal(values(build(spec("every", interval=1), steps_per_epoch=1, epochs=1), range(5)), 1)
    with pytest.raises(ValueError, match="interval=0: accepted is 1 or more"):
        build(spec("every", interval=0), steps_per_epoch=1, epochs=1)


@pytest.mark.parametrize("epochs", [128, 600, 700, 800])
def test_error_decay_rises_to_almost_ten_and_its_height_is_1_from_t_1_on(epochs):
    t, k = (build(spec(f"error_decay_{name}"), steps_per_epoch=2, epochs=epochs) for name in "tk")
    steps = 2 * jnp.arange(epochs) + 1
    t, k = (np.asarray(jax.jit(jax.vmap(schedule))(steps), np.float64) for schedule in (t, k))
    expected = 10.0 ** (-3 + 4 * np.arange(epochs) / epochs)
    np.testing.assert_allclose(t, expected, rtol=1e-6)
    np.testing.assert_allclose(k, np.where(expected < 1, 1 / expected, 1.0), rtol=1e-6)
    assert t[0] == pytest.approx(1e-3) and 9 < t[-1] < 10
    # The slope at 0 is 1 for three quarters of the stage, and t after that.
    np.testing.assert_array_equal(np.abs(k * t - 1) < 1e-6, expected <= 1)
    assert (expected <= 1).sum() == epochs * 3 // 4 + 1


def test_decay_by_epoch_multiplies_every_few_epochs_down_to_its_floor():
    options = {"initial": 2.0, "rate": 0.5, "interval": 2, "floor": 0.3}
    schedule = build(spec("decay_by_epoch", **options), steps_per_epoch=3, epochs=8)
    found = values(schedule, range(24)).reshape(8, 3)
    np.testing.assert_array_equal(found, np.float32([2, 2, 1, 1, 0.5, 0.5, 0.3, 0.3])[:, None].repeat(3, axis=1))
    assert float(schedule(jnp.int32(1000))) == np.float32(0.3)


def test_decay_by_epoch_is_the_temperature_of_weight_search():
    options = {"initial": 1.0, "rate": 0.97, "floor": 1e-5}
    schedule = build(spec("decay_by_epoch", **options), steps_per_epoch=391, epochs=200)
    epochs = (0, 50, 100, 150, 199)
    # Specification, section 2.8: four digits.
    published = [1, 0.2181, 0.04755, 0.01037, 0.00233]
    np.testing.assert_allclose(values(schedule, [391 * e + 390 for e in epochs]), published, rtol=2e-3)


def test_decay_by_epoch_refuses_an_interval_below_one():
    with pytest.raises(ValueError, match="interval=0: accepted is 1 or more"):
        build(spec("decay_by_epoch", initial=1.0, rate=0.5, interval=0), steps_per_epoch=1, epochs=1)


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'linear': accepted are constant, piecewise, cosine"):
        build(spec("linear"), steps_per_epoch=1, epochs=1)


def test_the_cosine_by_step_falls_to_zero_at_its_period_and_rises_again_behind_it():
    schedule = build(spec("cosine_by_step", initial=2.0, steps=10), steps_per_epoch=4, epochs=3)
    values = np.asarray(schedule(jnp.arange(12)))
    np.testing.assert_allclose(values, 1 + np.cos(np.pi * np.arange(12) / 10), atol=1e-6)
    assert values[11] > values[10]


def test_the_cosine_by_step_takes_the_whole_stage_unless_told_otherwise():
    schedule = build(spec("cosine_by_step", initial=2.0), steps_per_epoch=4, epochs=3)
    np.testing.assert_allclose(schedule(jnp.array([0, 6, 12])), [2, 1, 0], atol=1e-6)


def test_a_warm_up_multiplies_another_schedule_by_a_line_that_never_is_0():
    inner, steps = spec("cosine", initial=0.1), np.arange(40)
    schedule = build(spec("warmup", schedule=inner, warmup_epochs=1.5), steps_per_epoch=10, epochs=4)
    expected = 0.1 * 0.5 * (1 + np.cos(np.pi * steps / 40)) * np.minimum((steps + 1) / 15, 1)
    np.testing.assert_allclose(values(schedule, steps), expected, rtol=1e-5, atol=1e-8)
