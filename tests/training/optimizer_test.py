"""The optimisers against PyTorch's rules written out in NumPy (float64)."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import OptimSpec, ParameterGroup, Spec, spec
from bnn_jax.training.optimizer import group_labels, make_optimizer

# Ten steps in float32 against float64; errors of 1e-7 per step, relative to values of about 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
STEPS = 10
RATES = np.where(np.arange(STEPS) < 6, 0.1, 0.01)


def parameters() -> dict:
    rng = np.random.RandomState(0)
    return {
        "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)},
        "norm": {"scale": jnp.asarray(rng.normal(size=4), jnp.float32)},
    }


def gradients(step: int) -> dict:
    rng = np.random.RandomState(100 + step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), parameters())


def schedule(step: jax.Array) -> jax.Array:
    return jnp.asarray(RATES, jnp.float32)[step]


def optim_spec(optimizer: Spec, **options) -> OptimSpec:
    return OptimSpec(optimizer, spec("constant", value=0.1), epochs=1, batch_size=1, **options)


def train(optim: OptimSpec, *, steps: int = STEPS, unused: tuple[str, ...] = ()) -> dict:
    params = parameters()
    optimizer = make_optimizer(optim, params, schedule=schedule, unused_parameters=unused)
    state = optimizer.init(params)
    for step in range(steps):
        changes, state = optimizer.update(gradients(step), state, params, ctx=None)
        params = optax.apply_updates(params, changes)
    return params


def flat64(tree: dict) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def pytorch_sgd(
    *,
    momentum: float,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    clip: float | None = None,
) -> np.ndarray:
    p, buffer = flat64(parameters()), None
    for step in range(STEPS):
        g = flat64(gradients(step))
        if clip is not None:
            g = g * min(1.0, clip / np.linalg.norm(g))
        g = g + weight_decay * p
        if momentum:
            buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
            g = g + momentum * buffer if nesterov else buffer
        p = p - RATES[step] * g
    return p


def pytorch_adam(*, b1: float, b2: float, eps: float, weight_decay: float = 0.0, decoupled: float = 0.0) -> np.ndarray:
    p = flat64(parameters())
    m, v = np.zeros_like(p), np.zeros_like(p)
    for step in range(STEPS):
        g = flat64(gradients(step)) + weight_decay * p
        p = p - RATES[step] * decoupled * p
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        denominator = np.sqrt(v / (1 - b2 ** (step + 1))) + eps
        p = p - RATES[step] * m / (1 - b1 ** (step + 1)) / denominator
    return p


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, False)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_sgd_follows_pytorch_with_coupled_weight_decay(momentum, nesterov, weight_decay):
    groups = (ParameterGroup(".*", weight_decay=weight_decay),)
    params = train(optim_spec(spec("sgd", momentum=momentum, nesterov=nesterov), groups=groups))
    expected = pytorch_sgd(momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    np.testing.assert_allclose(flat64(params), expected, **TOLERANCE)


@pytest.mark.parametrize("momentum", [0.8, 0.0])
def test_dampening_begins_with_the_second_gradient(momentum):
    # PyTorch has no buffer, and so nothing to dampen, without momentum.
    params = train(optim_spec(spec("sgd", momentum=momentum, dampening=0.3)))
    np.testing.assert_allclose(flat64(params), pytorch_sgd(momentum=momentum, dampening=0.3), **TOLERANCE)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_adam_follows_pytorch_with_coupled_weight_decay(weight_decay):
    options = {"b1": 0.8, "b2": 0.95, "eps": 1e-6}
    params = train(optim_spec(spec("adam", **options), groups=(ParameterGroup(".*", weight_decay=weight_decay),)))
    np.testing.assert_allclose(flat64(params), pytorch_adam(**options, weight_decay=weight_decay), **TOLERANCE)


def test_adamw_follows_pytorch_with_decoupled_weight_decay():
    options = {"b1": 0.8, "b2": 0.95, "eps": 1e-6}
    params = train(optim_spec(spec("adamw", **options), groups=(ParameterGroup(".*", weight_decay=0.5),)))
    np.testing.assert_allclose(flat64(params), pytorch_adam(**options, decoupled=0.5), **TOLERANCE)


def test_of_branches_adamw_decays_the_chosen_one_alone():
    groups = (ParameterGroup(".*", weight_decay=0.5),)
    optim = optim_spec(spec("adamw"), groups=groups, unselected_branches="freeze")
    params = {"bound": jnp.asarray([1.0, 2.0, 3.0])}
    optimizer = make_optimizer(optim, params, schedule=schedule, branch_patterns=("bound",))
    ctx = QuantContext(choice=jnp.asarray([1]))
    changes, _ = optimizer.update({"bound": jnp.zeros(3)}, optimizer.init(params), params, ctx=ctx)
    np.testing.assert_allclose(changes["bound"], [0.0, -0.1 * 0.5 * 2.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize("norm", [0.5, 1e6])
def test_the_gradient_is_clipped_before_weight_decay(norm):
    groups = (ParameterGroup(".*", weight_decay=0.05),)
    optim = optim_spec(spec("sgd", momentum=0.9, nesterov=True), groups=groups, gradient_clip_norm=norm)
    expected = pytorch_sgd(momentum=0.9, nesterov=True, weight_decay=0.05, clip=norm)
    np.testing.assert_allclose(flat64(train(optim)), expected, **TOLERANCE)


def test_the_first_group_that_matches_takes_the_parameter():
    groups = (ParameterGroup("kernel$"), ParameterGroup("^conv/"), ParameterGroup("norm"))
    assert group_labels(parameters(), groups) == {"conv": {"kernel": "0"}, "norm": {"scale": "2"}}


def test_groups_have_their_own_weight_decay_and_learning_rate():
    groups = (ParameterGroup("kernel$", weight_decay=0.5), ParameterGroup(".*", learning_rate_scale=0.1))
    params = train(optim_spec(spec("sgd"), groups=groups), steps=1)
    before, g = parameters(), gradients(0)
    kernel, scale = before["conv"]["kernel"], before["norm"]["scale"]
    np.testing.assert_allclose(params["conv"]["kernel"], kernel - 0.1 * (g["conv"]["kernel"] + 0.5 * kernel), rtol=1e-5)
    np.testing.assert_allclose(params["norm"]["scale"], scale - 0.01 * g["norm"]["scale"], rtol=1e-5)


def test_a_parameter_in_no_group_is_refused_by_its_path():
    with pytest.raises(ValueError, match=r"'norm/scale' matches none of 'kernel\$'"):
        make_optimizer(optim_spec(spec("sgd"), groups=(ParameterGroup("kernel$"),)), parameters(), schedule=schedule)


def test_a_group_of_learning_rate_0_is_frozen():
    groups = (ParameterGroup("norm", weight_decay=0.5, learning_rate_scale=0.0), ParameterGroup(".*"))
    params = train(optim_spec(spec("sgd", momentum=0.9), groups=groups))
    np.testing.assert_array_equal(params["norm"]["scale"], parameters()["norm"]["scale"])
    assert (params["conv"]["kernel"] != parameters()["conv"]["kernel"]).all()


def test_bounded_parameters_stay_within_their_bounds_after_every_step():
    groups = (ParameterGroup("norm", bounds=(-0.5, 0.25)), ParameterGroup(".*"))
    optim, steps = optim_spec(spec("sgd", momentum=0.9), groups=groups), range(1, STEPS)
    bounded = [np.asarray(train(optim, steps=n)["norm"]["scale"]) for n in steps]
    free = [np.asarray(train(optim_spec(spec("sgd", momentum=0.9)), steps=n)["norm"]["scale"]) for n in steps]
    # An update is added to the parameter, which may round by a unit in the last place.
    assert all((p >= -0.5 - 1e-7).all() and (p <= 0.25 + 1e-7).all() for p in bounded)
    np.testing.assert_allclose(bounded[0], np.clip(free[0], -0.5, 0.25), rtol=1e-6)
    assert any((np.abs(p) > 0.5).any() for p in free)
    # Others are left alone, and so is the momentum.
    np.testing.assert_array_equal(
        train(optim)["conv"]["kernel"], train(optim_spec(spec("sgd", momentum=0.9)))["conv"]["kernel"]
    )


def test_adam_respects_bounds_too():
    groups = (ParameterGroup(".*", bounds=(-0.1, 0.1)),)
    params = train(optim_spec(spec("adam"), groups=groups))
    assert np.abs(flat64(params)).max() <= 0.1 + 1e-8
    assert (np.abs(flat64(params)) > 0.099).any()


def test_no_weight_decay_moves_an_unused_parameter():
    optim = optim_spec(spec("sgd", momentum=0.9), groups=(ParameterGroup(".*", weight_decay=0.5),))
    params = train(optim, unused=("^norm/",))
    np.testing.assert_array_equal(params["norm"]["scale"], parameters()["norm"]["scale"])
    np.testing.assert_array_equal(params["conv"]["kernel"], train(optim)["conv"]["kernel"])


def test_an_unknown_optimizer_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'lion': accepted are sgd, adam"):
        make_optimizer(optim_spec(spec("lion")), parameters(), schedule=schedule)


def test_an_option_the_optimizer_does_not_have_is_refused():
    with pytest.raises(TypeError, match="beta1"):
        make_optimizer(optim_spec(spec("adam", beta1=0.9)), parameters(), schedule=schedule)


def test_the_optimizer_is_built_from_shapes_alone():
    shapes = jax.eval_shape(parameters)
    optimizer = make_optimizer(optim_spec(spec("sgd", momentum=0.9)), shapes, schedule=schedule)
    assert jax.tree.leaves(jax.eval_shape(optimizer.init, shapes))


# ---- parameters with a gradient on some steps only

# Steps of the ten on which the knob 'refine' is on.
ON = (2, 5, 6)


def gated_groups(without: str, *, weight_decay: float = 0.0) -> tuple[ParameterGroup, ...]:
    gate = {"gradient_knob": "refine", "without_gradient": without}
    return (ParameterGroup("norm", weight_decay=weight_decay, **gate), ParameterGroup(".*", weight_decay=weight_decay))


def train_gated(optim: OptimSpec, *, on: tuple[int, ...] = ON) -> tuple[list[dict], Any]:
    """Parameters before and after every step, and the optimiser's last state; 'norm' has a gradient on some steps."""
    params = parameters()
    optimizer = make_optimizer(optim, params, schedule=schedule)
    state, history = optimizer.init(params), [params]

    @jax.jit
    def update(grads, state, params, step):
        value = jnp.any(step == jnp.asarray(on)).astype(jnp.float32)
        ctx = QuantContext(train=True, step=step, knobs={"refine": value})
        grads = {**grads, "norm": jax.tree.map(lambda g: g * value, grads["norm"])}
        changes, state = optimizer.update(grads, state, params, ctx=ctx)
        return optax.apply_updates(params, changes), state

    for step in range(STEPS):
        params, state = update(gradients(step), state, params, jnp.int32(step))
        history.append(params)
    return history, state


def pytorch_gated_adam(without: str, *, weight_decay: float) -> np.ndarray:
    """Adam that is told of a gradient on the steps ON; 'step': from the first on it sees zeros, 'skip': nothing."""
    p = np.asarray(parameters()["norm"]["scale"], np.float64)
    m, v, count = np.zeros_like(p), np.zeros_like(p), 0
    for step in range(STEPS):
        if step not in ON and (without == "skip" or step < ON[0]):
            continue
        g = np.asarray(gradients(step)["norm"]["scale"], np.float64) * (step in ON) + weight_decay * p
        count += 1
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - RATES[step] * m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
    return p


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("without", ["step", "skip"])
def test_adam_has_a_clock_of_its_own_for_parameters_with_a_gradient_on_some_steps(without, weight_decay):
    history, _ = train_gated(optim_spec(spec("adam"), groups=gated_groups(without, weight_decay=weight_decay)))
    expected = pytorch_gated_adam(without, weight_decay=weight_decay)
    # In float32 the bias correction 1 - 0.999**n has a relative error of 6e-8 / 1e-3; the moves sum up to 0.5.
    np.testing.assert_allclose(history[-1]["norm"]["scale"], expected, atol=2e-5)
    scales = [params["norm"]["scale"] for params in history]
    moved = [bool((before != after).any()) for before, after in itertools.pairwise(scales)]
    assert moved == [step in ON if without == "skip" else step >= ON[0] for step in range(STEPS)]


@pytest.mark.parametrize("without", ["step", "skip"])
def test_the_gate_of_one_group_leaves_the_others_alone(without):
    gated = train_gated(optim_spec(spec("adam"), groups=gated_groups(without)))[0][-1]
    free = train(optim_spec(spec("adam"), groups=(ParameterGroup(".*"),)))
    # Two programs, one of them compiled as a whole.
    np.testing.assert_allclose(gated["conv"]["kernel"], free["conv"]["kernel"], **TOLERANCE)


def test_without_any_gradient_neither_weight_decay_nor_the_clock_moves():
    optim = optim_spec(spec("adam"), groups=gated_groups("step", weight_decay=0.5))
    history, state = train_gated(optim, on=())
    np.testing.assert_array_equal(history[-1]["norm"]["scale"], parameters()["norm"]["scale"])
    gate = state.inner_states["0"].inner_state[0]
    assert not gate.started
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gate.inner))


def test_the_gate_works_for_momentum_too():
    history, _ = train_gated(optim_spec(spec("sgd", momentum=0.9), groups=gated_groups("step")))
    p, buffer = np.asarray(parameters()["norm"]["scale"], np.float64), 0.0
    for step in range(ON[0], STEPS):
        buffer = 0.9 * buffer + np.asarray(gradients(step)["norm"]["scale"], np.float64) * (step in ON)
        p = p - RATES[step] * buffer
    np.testing.assert_allclose(history[-1]["norm"]["scale"], p, **TOLERANCE)


def displacements(without: str, steps: int, interval: int = 25) -> np.ndarray:
    """Change of a parameter over each step, in learning rates, under a constant gradient every 25th step."""
    params, gate = {"p": jnp.zeros(1)}, ParameterGroup(".*", gradient_knob="refine", without_gradient=without)
    optimizer = make_optimizer(
        optim_spec(spec("adam"), groups=(gate,)), params, schedule=lambda step: jnp.float32(1e-3)
    )

    def one(carry, step):
        params, state = carry
        on = ((step + 1) % interval == 0).astype(jnp.float32)
        ctx = QuantContext(train=True, step=step, knobs={"refine": on})
        changes, state = optimizer.update({"p": jnp.full(1, -0.5) * on}, state, params, ctx=ctx)
        return (optax.apply_updates(params, changes), state), changes["p"][0] / 1e-3

    return np.asarray(jax.lax.scan(one, (params, optimizer.init(params)), jnp.arange(steps))[1])


def test_momentum_carries_on_between_two_gradients_as_in_the_release():
    moves = displacements("step", 25 * 200)
    assert (moves[:24] == 0).all()
    # Figures of the specification, section 2.10, to the digits given there.
    np.testing.assert_allclose(moves[24:28], [1.00, 0.67, 0.52, 0.42], atol=0.005)
    assert moves[24:49].sum() == pytest.approx(5.57, abs=0.005)
    # Limit: the moments of Adam fill up over thousands of steps.
    assert moves[-25:].sum() == pytest.approx(4.99, abs=0.05)


def test_with_skipping_a_gradient_moves_once():
    moves = displacements("skip", 25 * 4)
    np.testing.assert_allclose(moves[24::25], 1.0, rtol=1e-4)
    assert (np.delete(moves, np.arange(24, 100, 25)) == 0).all()


def test_another_rule_for_steps_without_gradient_is_refused():
    groups = (ParameterGroup(".*", gradient_knob="refine", without_gradient="stop"),)
    with pytest.raises(ValueError, match="without_gradient='stop': accepted are 'step', 'skip'"):
        make_optimizer(optim_spec(spec("adam"), groups=groups), parameters(), schedule=schedule)


def test_the_state_of_a_group_without_a_gate_keeps_its_structure_so_that_checkpoints_stay_readable():
    optimizer = make_optimizer(optim_spec(spec("sgd", momentum=0.9)), parameters(), schedule=schedule)
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(optimizer.init(parameters()))
    ]
    trace = ".inner_states['0'].inner_state[1].trace"
    assert paths == [
        f"{trace}['conv']['kernel']",
        f"{trace}['norm']['scale']",
        ".inner_states['0'].inner_state[2].count",
    ]


# ---- branches of a supernet

BRANCHES = 3
DECAYS = (0.5, 0.05, 0.0)
# The branch of each searched layer on every step.
CHOICES = [(0, 2), (1, 2), (0, 1), (0, 2), (2, 2), (1, 0)]
PATTERNS = ("^first/", "^second/")


def branched() -> dict:
    random = np.random.RandomState(5)
    return {
        name: {"bound": jnp.asarray(random.normal(size=shape), jnp.float32)}
        for name, shape in (("first", (BRANCHES,)), ("second", (BRANCHES, 4)), ("shared", (BRANCHES, 4)))
    }


def branch_gradients(step: int) -> dict:
    """Gradients as a supernet has them: 0 in the rows that were not chosen; 'shared' is no branch parameter."""
    random = np.random.RandomState(100 + step)
    grads = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), branched())
    for name, branch in zip(("first", "second"), CHOICES[step]):
        rows = jnp.arange(BRANCHES) == branch
        grads[name] = jax.tree.map(lambda g: g * rows.reshape((-1,) + (1,) * (g.ndim - 1)), grads[name])  # noqa: B023
    return grads


def train_branches(optimizer: Spec, unselected: str) -> dict:
    groups = (ParameterGroup("bound", weight_decay=DECAYS),)
    optim = optim_spec(optimizer, groups=groups, unselected_branches=unselected)
    params = branched()
    built = make_optimizer(optim, params, schedule=schedule, branch_patterns=PATTERNS)
    state = built.init(params)

    @jax.jit
    def update(grads, state, params, choice):
        changes, state = built.update(grads, state, params, ctx=QuantContext(train=True, choice=choice))
        return optax.apply_updates(params, changes), state

    for step, choice in enumerate(CHOICES):
        params, state = update(branch_gradients(step), state, params, jnp.array(choice))
    assert update._cache_size() == 1
    return params


def train_row(optimizer: Spec, name: str, branch: int, steps: list[int]) -> np.ndarray:
    """One row on its own, on those steps only; its learning rates are those of the steps."""
    params = {"row": branched()[name]["bound"][branch]}
    rates = jnp.asarray([float(schedule(jnp.int32(step))) for step in steps] or [0.0])
    groups = (ParameterGroup(".*", weight_decay=DECAYS[branch]),)
    built = make_optimizer(optim_spec(optimizer, groups=groups), params, schedule=lambda count: rates[count])
    state = built.init(params)
    for step in steps:
        grads = {"row": branch_gradients(step)[name]["bound"][branch]}
        changes, state = built.update(grads, state, params, ctx=QuantContext(train=True))
        params = optax.apply_updates(params, changes)
    return np.asarray(params["row"])


each_optimizer = pytest.mark.parametrize("optimizer", [spec("adam"), spec("sgd", momentum=0.9, nesterov=True)])


@each_optimizer
@pytest.mark.parametrize(("name", "gene"), [("first", 0), ("second", 1)])
@pytest.mark.parametrize("branch", range(BRANCHES))
def test_a_frozen_branch_takes_only_the_steps_that_chose_it_with_a_clock_of_its_own(optimizer, name, gene, branch):
    steps = [step for step, choice in enumerate(CHOICES) if choice[gene] == branch]
    own = np.asarray(train_branches(optimizer, "freeze")[name]["bound"][branch])
    # The same arithmetic, vectorised: rounding of a few steps.
    np.testing.assert_allclose(own, train_row(optimizer, name, branch, steps), rtol=1e-5)
    if not steps:
        np.testing.assert_array_equal(own, branched()[name]["bound"][branch])


@each_optimizer
@pytest.mark.parametrize("branch", range(BRANCHES))
def test_a_decaying_branch_takes_every_step_with_its_own_decay(optimizer, branch):
    own = np.asarray(train_branches(optimizer, "decay")["first"]["bound"][branch])
    np.testing.assert_allclose(own, train_row(optimizer, "first", branch, list(range(len(CHOICES)))), rtol=1e-5)


@each_optimizer
@pytest.mark.parametrize("unselected", ["decay", "freeze"])
def test_parameters_that_all_paths_share_take_every_step(optimizer, unselected):
    own = np.asarray(train_branches(optimizer, unselected)["shared"]["bound"][1])
    np.testing.assert_allclose(own, train_row(optimizer, "shared", 1, list(range(len(CHOICES)))), rtol=1e-5)


def test_weight_decays_need_a_row_for_each():
    groups = (ParameterGroup(".*", weight_decay=(0.1, 0.2)),)
    optimizer = make_optimizer(optim_spec(spec("sgd"), groups=groups), branched(), schedule=schedule)
    with pytest.raises(ValueError, match="2 weight decays for a parameter"):
        optimizer.update(branched(), optimizer.init(branched()), branched(), ctx=QuantContext())


def test_freezing_needs_the_chosen_branches():
    optim = optim_spec(spec("adam"), groups=(ParameterGroup(".*"),), unselected_branches="freeze")
    optimizer = make_optimizer(optim, branched(), schedule=schedule, branch_patterns=PATTERNS)
    with pytest.raises(ValueError, match="needs the branches a step has chosen"):
        optimizer.update(branched(), optimizer.init(branched()), branched(), ctx=QuantContext())
