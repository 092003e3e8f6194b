import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnn_jax import schedules
from bnn_jax.ops import codebook as ops
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import OptimSpec, ParameterGroup, spec
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.training import projections
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import compile_eval_step
from bnn_jax.training.optimizer import make_optimizer
from bnn_jax.training.projections import PROJECTIONS, Projection, RefillCodebooks, Update
from bnn_jax.training.step import compile_train_steps, train_step
from tests.training import tiny

TABLE = np.asarray(ops.all_patterns())
KEY = jax.random.key(0)
PATHS = ("one/weight_quantizer", "two/weight_quantizer")

# Options of every entry; a new projection needs some here.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "refill_codebooks": [{}, {"maintenance": "release", "limit": 2.0}],
}


def refining(on: bool = True) -> QuantContext:
    return QuantContext(train=True, knobs={"refine_codebook": jnp.float32(on)})


def random(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).normal(size=shape), jnp.float32)


def with_duplicates(seed: int, rows: tuple[int, ...] = (3, 6)) -> jax.Array:
    """(8, 9) with row 0 repeated, in other sizes; some entries are larger than 3."""
    p = np.array(TABLE[np.random.RandomState(seed).permutation(512)[:8]]) * np.linspace(0.5, 5, 8)[:, None]
    for row in rows:
        p[row] = 0.25 * row * p[0]
    return jnp.asarray(p, jnp.float32)


def nested(**leaves: jax.Array) -> dict:
    """{'one__codebook': ...} as {'one': {'weight_quantizer': {'codebook': ...}}}."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        layer, key = name.split("__")
        tree.setdefault(layer, {}).setdefault("weight_quantizer", {})[key] = leaf
    return tree


def update_of(optim: OptimSpec | None = None, *, seed: int = 0) -> Update:
    """Two layers with codebooks that have duplicates, and a kernel; an optimiser that has run with random gradients."""
    params = nested(one__codebook=with_duplicates(seed), two__codebook=with_duplicates(seed + 1, rows=(1,)))
    params["one"]["kernel"] = random(3, 3, 2, 2, seed=3)
    memory = nested(
        one__memory=jnp.asarray(np.random.RandomState(4).choice([-1.0, 1.0], (8, 9)), jnp.float32),
        two__memory=jnp.ones((8, 9)),
    )
    memory["one"]["weight_quantizer"]["mask"] = jnp.zeros(3)
    grads = jax.tree.map(lambda p: random(*p.shape, seed=p.size), params)
    optimizer = make_optimizer(optim or optim_spec(), params, schedule=lambda step: jnp.float32(0.1))
    _, opt_state = optimizer.update(grads, optimizer.init(params), params, ctx=refining())
    return Update(params, memory, opt_state, grads)


def optim_spec(optimizer: Any = None, **options: Any) -> OptimSpec:
    groups = (ParameterGroup("codebook$", gradient_knob="refine_codebook"), ParameterGroup(".*"))
    return OptimSpec(
        optimizer or spec("adam"), spec("constant", value=0.1), epochs=1, batch_size=1, **{"groups": groups, **options}
    )


def of_codebooks(tree: Any, name: str = "codebook") -> list[np.ndarray]:
    return [np.asarray(tree[layer]["weight_quantizer"][name]) for layer in ("one", "two")]


def other_leaves(tree: Any, own: tuple[str, ...] = ("codebook", "memory")) -> list[np.ndarray]:
    """Leaves that are about no codebook."""
    rows = jax.tree_util.tree_leaves_with_path(tree)
    return [
        np.asarray(leaf) for path, leaf in rows if not any(f"'{name}'" in jax.tree_util.keystr(path) for name in own)
    ]


def moments_of(opt_state: Any, layer: str) -> list[np.ndarray]:
    rows = jax.tree_util.tree_leaves_with_path(opt_state)
    return [
        np.asarray(leaf)
        for path, leaf in rows
        if f"['{layer}']['weight_quantizer']['codebook']" in jax.tree_util.keystr(path)
    ]


def assert_same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


# ---- table


def test_every_projection_has_examples():
    assert set(PROJECTIONS) == set(EXAMPLES)


@pytest.mark.parametrize(("name", "options"), [(name, o) for name, all_ in EXAMPLES.items() for o in all_])
def test_a_projection_keeps_structure_shapes_and_types_inside_and_outside_jit(name, options):
    projection, update = projections.build(spec(name, **options)), update_of()
    for ctx in (refining(True), refining(False), QuantContext(train=True)):
        after = projection(update, ctx, KEY)
        assert jax.tree.structure(after) == jax.tree.structure(update)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), update)
        assert_same(jax.jit(projection)(update, ctx, KEY), after)


def test_an_unknown_projection_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="projection 'clip': accepted are refill_codebooks"):
        projections.build(spec("clip"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maintenance": "never"}, "maintenance='never': accepted are 'clean', 'release'"),
        ({"limit": 0.5}, "limit=0.5: accepted is 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        projections.build(spec("refill_codebooks", **options))


# ---- when


@pytest.mark.parametrize("maintenance", ["clean", "release"])
@pytest.mark.parametrize("ctx", [refining(False), QuantContext(train=True)], ids=["off", "absent"])
def test_it_does_nothing_on_other_steps(maintenance, ctx):
    update = update_of()
    assert_same(RefillCodebooks(maintenance)(update, ctx, KEY), update)


def test_without_codebooks_it_does_nothing():
    update = Update({"conv": {"kernel": jnp.ones(3)}}, {"conv": {"memory": jnp.ones(3)}}, (), {"conv": {"kernel": KEY}})
    assert RefillCodebooks()(update, refining(), KEY) is update


# ---- what


@pytest.mark.parametrize("maintenance", ["clean", "release"])
def test_afterwards_all_patterns_differ_and_entries_are_at_most_the_limit(maintenance):
    update = update_of()
    assert all(np.asarray(ops.duplicates(jnp.asarray(p))).any() for p in of_codebooks(update.params))
    after = RefillCodebooks(maintenance)(update, refining(), KEY)
    for before, p in zip(of_codebooks(update.params), of_codebooks(after.params)):
        assert p.shape == (8, 9) and len(np.unique(ops.codes(jnp.asarray(p)))) == 8
        assert np.abs(before).max() > 3 and np.abs(p).max() == 3


@pytest.mark.parametrize("maintenance", ["clean", "release"])
def test_what_is_about_no_codebook_stays(maintenance):
    update = update_of()
    after = RefillCodebooks(maintenance)(update, refining(), KEY)
    assert len(other_leaves(update)) == 10, "kernel, its gradient and two moments, mask, gate, four clocks"
    assert_same(other_leaves(after), other_leaves(update))


def test_clean_maintenance_puts_new_patterns_in_place_of_the_duplicates_and_resets_what_belongs_to_them():
    update = update_of()
    after = RefillCodebooks("clean")(update, refining(), KEY)
    for index, (layer, rows) in enumerate((("one", [3, 6]), ("two", [1]))):
        new = np.isin(np.arange(8), rows)
        before, p = of_codebooks(update.params)[index], of_codebooks(after.params)[index]
        np.testing.assert_array_equal(p[~new], np.clip(before[~new], -3, 3))
        assert set(np.abs(p[new]).ravel()) == {1.0}
        old_memory, memory = (of_codebooks(u.quant_state, "memory")[index] for u in (update, after))
        np.testing.assert_array_equal(memory[new], p[new])
        np.testing.assert_array_equal(memory[~new], old_memory[~new])
        pairs = [(of_codebooks(update.grads)[index], of_codebooks(after.grads)[index])]
        pairs += zip(moments_of(update.opt_state, layer), moments_of(after.opt_state, layer), strict=True)
        assert len(pairs) == 3
        for old, value in pairs:
            assert (old != 0).all()
            np.testing.assert_array_equal(value, np.where(new[:, None], 0, old))


def test_a_new_row_of_clean_maintenance_is_not_moved_by_this_step():
    optim = optim_spec()
    update = update_of(optim)
    optimizer = make_optimizer(optim, update.params, schedule=lambda step: jnp.float32(0.1))
    after = RefillCodebooks("clean")(update, refining(), KEY)
    changes, _ = optimizer.update(after.grads, after.opt_state, after.params, ctx=refining())
    moved = (np.asarray(changes["one"]["weight_quantizer"]["codebook"]) != 0).any(axis=1)
    np.testing.assert_array_equal(moved, ~np.isin(np.arange(8), [3, 6]))


def test_maintenance_of_the_release_moves_rows_up_and_nothing_with_them():
    update = update_of()
    after = RefillCodebooks("release")(update, refining(), KEY)
    for index, kept in enumerate(([0, 1, 2, 4, 5, 7], [0, 2, 3, 4, 5, 6, 7])):
        before, p = of_codebooks(update.params)[index], of_codebooks(after.params)[index]
        np.testing.assert_array_equal(p[: len(kept)], np.clip(before[kept], -3, 3))
        assert set(np.abs(p[len(kept) :]).ravel()) == {1.0}
    assert_same((after.quant_state, after.grads, after.opt_state), (update.quant_state, update.grads, update.opt_state))


def test_the_draw_can_be_injected_and_is_told_size_and_step():
    told, update = [], update_of()
    known = np.concatenate([ops.codes(jnp.asarray(p)) for p in of_codebooks(update.params)])
    offered = [m for m in range(512) if int(ops.codes(jnp.asarray(TABLE[m]))) not in known]

    def draw(key, count, ctx):
        told.append((count, ctx.step))
        return jnp.asarray(offered[:count], jnp.int32)

    after = RefillCodebooks("clean", draw=draw)(update, refining().replace(step=7), KEY)
    assert told == [(8, 7), (8, 7)]
    np.testing.assert_array_equal(of_codebooks(after.params)[0][[3, 6]], TABLE[offered[:2]])


def test_layers_draw_differently_and_a_draw_is_a_function_of_the_key():
    worst = jnp.ones((8, 9))
    update = update_of()
    update = update.replace(params={**update.params, **nested(one__codebook=worst, two__codebook=worst)})

    def refilled(seed: int) -> list[np.ndarray]:
        return of_codebooks(RefillCodebooks()(update, refining(), jax.random.key(seed)).params)

    assert (refilled(0)[0] != refilled(0)[1]).any()
    assert_same(refilled(0), refilled(0))
    assert (refilled(0)[0] != refilled(1)[0]).any()


@pytest.mark.parametrize(
    ("optimizer", "options", "count"),
    [
        (spec("adam"), {}, 2),
        (spec("sgd", momentum=0.9), {}, 1),
        (spec("sgd"), {}, 0),
        (spec("adam"), {"gradient_clip_norm": 1.0}, 2),
        (spec("adam"), {"groups": (ParameterGroup(".*", weight_decay=0.1),)}, 2),
    ],
)
def test_moments_are_found_whatever_the_optimizer_is(optimizer, options, count):
    update = update_of(optim_spec(optimizer, **options))
    after = RefillCodebooks()(update, refining(), KEY)
    moments = moments_of(after.opt_state, "one")
    assert len(moments) == count
    for moment in moments:
        np.testing.assert_array_equal((moment == 0).all(axis=1), np.isin(np.arange(8), [3, 6]))


def test_a_parameter_whose_path_ends_like_another_is_not_taken_for_it():
    inner = nested(one__codebook=with_duplicates(0))
    params = {**inner, "outer": nested(one__codebook=with_duplicates(1, rows=()))}
    memory = {**nested(one__memory=jnp.ones((8, 9))), "outer": nested(one__memory=jnp.ones((8, 9)))}
    grads = jax.tree.map(jnp.ones_like, params)
    state = optax.TraceState(trace=grads)
    after = RefillCodebooks()(Update(params, memory, state, grads), refining(), KEY)
    assert_same(after.opt_state.trace["outer"], grads["outer"])
    assert (after.opt_state.trace["one"]["weight_quantizer"]["codebook"] == 0).any()


# ---- in the training step

# Every third step refines.
INTERVAL = 3


@dataclasses.dataclass(frozen=True)
class Shift(Projection):
    """Scales the parameters, adds to them, and takes the gradient away."""

    factor: float
    summand: float

    def __call__(self, update: Update, ctx: QuantContext, key: jax.Array) -> Update:
        params = jax.tree.map(lambda p: self.factor * p + self.summand, update.params)
        return update.replace(params=params, grads=jax.tree.map(jnp.zeros_like, update.grads))


def test_projections_run_one_after_another_between_gradient_and_optimizer():
    parts = tiny.parts(chosen=no_decay(), projections=(Shift(2.0, 0.0), Shift(1.0, 1.0)))
    before = tiny.state(parts)
    rows = jnp.arange(8)
    after, _ = jax.jit(functools.partial(train_step, parts))(before, tiny.constants(tiny.source()), rows, rows >= 0)
    # Gradient and so momentum are zero; the parameters are those of the projections in their order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b + 1, rtol=1e-6), after.params, before.params)


def no_decay() -> Any:
    stage = tiny.stage()
    return dataclasses.replace(stage, optim=dataclasses.replace(stage.optim, groups=(ParameterGroup(".*"),)))


def codebook_parts(*, refine: bool = True, maintenance: str = "clean") -> Any:
    """A tiny network with a codebook of two patterns, which often become one, and Adam."""
    stage = tiny.stage()
    optim = optim_spec()
    stage = dataclasses.replace(
        stage, optim=dataclasses.replace(stage.optim, optimizer=optim.optimizer, groups=optim.groups)
    )
    choice = spec("every", interval=INTERVAL) if refine else spec("constant", value=0.0)
    return tiny.parts(
        network=tiny.TinyNetwork(weight=spec("codebook", tau=1)),
        chosen=stage,
        knobs={"refine_codebook": schedules.build(choice, steps_per_epoch=3, epochs=2)},
        projections=(RefillCodebooks(maintenance),),
    )


@pytest.fixture(scope="module")
def parts():
    return codebook_parts()


@pytest.fixture(scope="module")
def run_steps(parts):
    return compile_train_steps(parts, all_devices())


def run(run_steps: Any, state: Any, steps: int) -> list[Any]:
    """States after each of the next steps, on the host."""
    data, states = tiny.constants(tiny.source()), []
    for _ in range(steps):
        rows = (8 * int(state.step) + np.arange(8, dtype=np.int32))[None] % 20
        state, _ = run_steps(state, data, rows, rows >= 0)
        states.append(jax.tree.map(jnp.copy, state))
    return states


def codebook_of(state: Any) -> np.ndarray:
    return np.asarray(state.params["conv"]["weight_quantizer"]["codebook"])


def test_a_codebook_stands_until_the_first_refinement_step_and_moves_at_every_step_from_then_on(parts, run_steps):
    start = codebook_of(tiny.state(parts))
    states = run(run_steps, tiny.state(parts), 3 * INTERVAL)
    codebooks = [start, *map(codebook_of, states)]
    moved = [bool((codebooks[i + 1] != codebooks[i]).any()) for i in range(3 * INTERVAL)]
    assert moved == [step >= INTERVAL - 1 for step in range(3 * INTERVAL)]


def test_while_the_knob_is_0_a_codebook_never_changes():
    fixed = codebook_parts(refine=False)
    states = run(compile_train_steps(fixed, all_devices()), tiny.state(fixed), 4)
    for tree, name in ((states[-1].params, "codebook"), (states[-1].quant_state, "memory")):
        np.testing.assert_array_equal(tree["conv"]["weight_quantizer"][name], codebook_of(tiny.state(fixed)))


def with_equal_rows(state: Any) -> Any:
    """The state with a codebook whose rows are the same."""
    rows = jnp.broadcast_to(state.params["conv"]["weight_quantizer"]["codebook"][:1], (2, 9)) + 0.0
    conv = state.params["conv"]
    return state.replace(params={**state.params, "conv": {**conv, "weight_quantizer": {"codebook": rows}}})


@pytest.mark.parametrize("maintenance", ["clean", "release"])
def test_duplicates_are_replaced_on_a_refinement_step_and_not_before(maintenance):
    parts = codebook_parts(maintenance=maintenance)
    states = run(compile_train_steps(parts, all_devices()), with_equal_rows(tiny.state(parts)), INTERVAL)
    distinct = [len(np.unique(ops.codes(jnp.asarray(codebook_of(state))))) for state in states]
    assert distinct == [1, 1, 2]


def test_the_new_pattern_depends_on_the_seed_only(parts, run_steps):
    def after(seed: int) -> np.ndarray:
        return codebook_of(run(run_steps, with_equal_rows(tiny.state(parts, seed=seed)), INTERVAL)[-1])

    np.testing.assert_array_equal(after(1), after(1))
    assert (after(1) != after(2)).any()


def test_one_program_serves_steps_with_and_without_refinement(parts):
    run_steps = compile_train_steps(parts, all_devices())
    run(run_steps, tiny.state(parts), 2 * INTERVAL)
    assert run_steps._cache_size() == 1


def test_evaluation_between_steps_makes_no_difference(parts, run_steps):
    source = tiny.source()
    evaluate = compile_eval_step(parts.network, tiny.prepare_for_evaluation, all_devices())
    plain = run(run_steps, with_equal_rows(tiny.state(parts)), 2 * INTERVAL)[-1]
    state = with_equal_rows(tiny.state(parts))
    for _ in range(2 * INTERVAL):
        state = run(run_steps, state, 1)[-1]
        sums = evaluate(state.variables, source.test.images, source.test.labels, np.arange(10), np.ones(10, bool))
        assert int(sums["count"]) == 10
    tiny.assert_equal(state, plain)


@pytest.mark.parametrize("saved_after", [1, INTERVAL - 1, INTERVAL, INTERVAL + 1])
def test_a_state_saved_and_restored_around_a_refinement_goes_on_bit_for_bit(tmp_path, parts, run_steps, saved_after):
    states = run(run_steps, with_equal_rows(tiny.state(parts)), 2 * INTERVAL)
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.save(states[saved_after - 1], meta={}, metrics=None)
        restored, _ = store.restore(jax.eval_shape(lambda: tiny.state(parts)))
    restored = all_devices().replicate(restored)
    tiny.assert_equal(restored, states[saved_after - 1])
    tiny.assert_equal(run(run_steps, restored, 2 * INTERVAL - saved_after)[-1], states[-1])
