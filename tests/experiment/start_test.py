import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax import objectives
from bnn_jax.errors import CheckpointError
from bnn_jax.experiment import start
from bnn_jax.objectives.classification import CrossEntropy
from bnn_jax.ops.pruning import filter_mask
from bnn_jax.stages import spec
from bnn_jax.training.devices import all_devices
from tests.training import tiny

NETWORK = tiny.TinyNetwork()
IMAGES = jnp.zeros((2, tiny.SIZE, tiny.SIZE, 3))
COLLECTIONS = ("params", "batch_stats", "quant_state")


def fresh() -> dict:
    return jax.tree.map(jnp.array, tiny.variables())


def trained() -> dict:
    """Variables with other values in every leaf."""
    return jax.tree.map(lambda leaf: leaf + 1.5, fresh())


def recomputed(variables: dict, images: jax.Array, pattern: str) -> dict:
    return start.recompute_program(NETWORK)(start.without(variables, (pattern,)), images)


def test_shapes_are_those_of_the_variables():
    shapes = start.variable_shapes(NETWORK, (tiny.SIZE, tiny.SIZE, 3))
    variables = tiny.variables()
    assert jax.tree.structure(shapes) == jax.tree.structure({**variables, "knobs": {}})
    assert [(s.shape, s.dtype) for s in jax.tree.leaves(shapes)] == [
        (v.shape, v.dtype) for v in jax.tree.leaves(variables)
    ]


def test_the_key_alone_chooses_the_fresh_variables():
    one, same, other = (start.init_variables(NETWORK, jax.random.key(seed), IMAGES) for seed in (5, 5, 6))
    tiny.assert_equal(one, same)
    assert (one["params"]["conv"]["kernel"] != other["params"]["conv"]["kernel"]).any()


def test_transfer_copies_the_named_collections_only():
    result = start.transfer(trained(), fresh(), collections=("params",))
    tiny.assert_equal(result["params"], trained()["params"])
    tiny.assert_equal(result["batch_stats"], fresh()["batch_stats"])
    tiny.assert_equal(result["quant_state"], fresh()["quant_state"])


def test_transfer_copies_into_buffers_of_its_own():
    # The new state is donated to the training step: a shared buffer would take the teacher's variables with it.
    source = trained()
    result = start.transfer(source, fresh(), collections=COLLECTIONS)
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(result)
    tiny.assert_equal(source, trained())


def test_transfer_takes_the_type_of_the_target():
    source = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), trained())
    result = start.transfer(source, fresh(), collections=("params",))
    assert {leaf.dtype for leaf in jax.tree.leaves(result["params"])} == {jnp.dtype("float32")}


def test_transfer_refuses_a_missing_path():
    source = trained()
    del source["params"]["fc"]["bias"]
    with pytest.raises(CheckpointError, match=r"params/fc/bias: missing, expected shape \(4,\)"):
        start.transfer(source, fresh(), collections=("params",))


def test_transfer_refuses_a_missing_collection():
    with pytest.raises(CheckpointError, match="params/bn/bias: missing"):
        start.transfer({}, fresh(), collections=("params",))


def test_transfer_refuses_another_shape():
    source = trained()
    source["params"]["fc"]["bias"] = jnp.zeros(7)
    with pytest.raises(CheckpointError, match=r"params/fc/bias: shape \(7,\), expected shape \(4,\)"):
        start.transfer(source, fresh(), collections=("params",))


def test_transfer_refuses_a_path_the_network_does_not_have():
    source = trained()
    source["params"]["extra"] = {"kernel": jnp.zeros(3)}
    with pytest.raises(CheckpointError, match="params/extra/kernel is not part of this network"):
        start.transfer(source, fresh(), collections=("params",))


def test_a_path_that_may_be_new_keeps_its_fresh_value_where_the_source_has_none():
    source = trained()
    del source["params"]["fc"]
    result = start.transfer(source, fresh(), collections=("params",), may_be_new=("^params/fc/",))
    tiny.assert_equal(result["params"]["fc"], fresh()["params"]["fc"])
    tiny.assert_equal(result["params"]["conv"], source["params"]["conv"])


def test_a_path_that_may_be_new_is_copied_where_the_source_has_it():
    result = start.transfer(trained(), fresh(), collections=("params",), may_be_new=(".*",))
    tiny.assert_equal(result["params"], trained()["params"])


def test_a_path_that_may_be_new_still_needs_the_right_shape():
    source = trained()
    source["params"]["fc"]["bias"] = jnp.zeros(7)
    with pytest.raises(CheckpointError, match="params/fc/bias: shape"):
        start.transfer(source, fresh(), collections=("params",), may_be_new=(".*",))


def test_recompute_makes_masks_from_the_copied_weights():
    variables = fresh()
    kernel = jnp.asarray(np.random.RandomState(1).normal(size=(3, 3, 3, 4)), jnp.float32)
    variables["params"]["conv"]["kernel"] = kernel
    expected = filter_mask(kernel, 0.3)
    assert (expected != variables["quant_state"]["conv"]["weight_quantizer"]["mask"]).any()
    result = recomputed(variables, IMAGES, "quant_state/.*/mask$")
    np.testing.assert_array_equal(result["quant_state"]["conv"]["weight_quantizer"]["mask"], expected)


def test_recompute_leaves_everything_else_alone():
    result = recomputed(trained(), IMAGES + 3.0, "quant_state/.*/mask$")
    tiny.assert_equal(result["params"], trained()["params"])
    tiny.assert_equal(result["batch_stats"], trained()["batch_stats"])


def test_recompute_of_nothing_changes_nothing():
    tiny.assert_equal(recomputed(trained(), IMAGES, "quant_state/.*/scale"), trained())


def test_a_new_state_stands_before_the_first_step():
    parts = tiny.parts()
    state = tiny.state(parts, seed=9)
    assert int(state.step) == 0
    tiny.assert_equal(state.variables, tiny.variables())
    tiny.assert_equal(state.opt_state, parts.optimizer.init(tiny.variables()["params"]))
    assert state.objective_state == {}
    assert float(state.metric_sums["count"]) == 0
    np.testing.assert_array_equal(jax.random.key_data(state.rng), jax.random.key_data(jax.random.key(9)))


def test_a_network_without_state_has_empty_collections():
    state = start.create_state(
        {"params": {"kernel": jnp.ones(3)}},
        optimizer=tiny.parts().optimizer.__class__(lambda params: {}, lambda *args: args),
        objectives=(CrossEntropy(),),
        num_classes=4,
        seed=0,
        devices=all_devices(),
    )
    assert state.batch_stats == state.quant_state == {}
    assert set(state.variables) == {"params"}


def test_only_objectives_with_a_state_have_one():
    terms = tuple(objectives.build(spec(name)) for name in ("cross_entropy", "label_bank", "cluster"))
    states = start.objective_states(terms, 3)
    assert set(states) == {"label_bank"}
    assert states["label_bank"]["bank"].shape == (3, 3)
