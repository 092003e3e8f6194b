"""The real stream inside the training step: what it computes, and everything it must leave alone."""

import dataclasses
import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax import networks
from bnn_jax.data.order import index_plan
from bnn_jax.objectives import Batch
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import QuantSpec, spec
from bnn_jax.training.devices import all_devices
from bnn_jax.training.step import (
    StepParts,
    compile_end_of_epoch,
    compile_train_steps,
    forward,
    gradients,
    needs_real_features,
    train_step,
)
from tests.conftest import ROOT
from tests.layers.conv_test import explicit_convolution
from tests.training import tiny, tiny_skd

DATA = tiny.source()
# Sums over the rows of a batch in another order, in float32.
OTHER_ORDER = {"rtol": 1e-4, "atol": 1e-6}


def plan(epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return index_plan(3, epoch, num_images=20, batch_size=8, drop_last=False)


def images_of(indices: np.ndarray) -> jax.Array:
    return tiny.prepare_for_evaluation(jnp.asarray(DATA.train.images[indices]))


def context(mask: Any = None, **options: Any) -> QuantContext:
    knobs = {"error_decay_k": jnp.float32(10.0), "error_decay_t": jnp.float32(0.1)}
    return QuantContext(train=True, knobs=knobs, mask=mask, **options)


def run_forward(step_parts: StepParts, variables: Any, images: jax.Array, mask: Any = None) -> Any:
    return jax.jit(lambda v, x: forward(step_parts, v, x, context(mask), key=jax.random.key(1)))(variables, images)


def one_step(step_parts: StepParts, state: Any, indices: Any, mask: Any) -> tuple[Any, dict]:
    step = jax.jit(functools.partial(train_step, step_parts))
    return step(state, tiny.constants(DATA), jnp.asarray(indices), jnp.asarray(mask))


def assert_close(one: Any, other: Any, **tolerance: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or OTHER_ORDER)), one, other)


# Programs are compiled once for the whole file: compiling is what takes the time here.
@pytest.fixture(scope="module")
def parts() -> StepParts:
    return tiny_skd.parts()


@pytest.fixture(scope="module")
def run_steps(parts):
    return compile_train_steps(parts, all_devices())


# ---- what it computes


class TwoStreams:
    """Both streams of a network of two blocks in training mode, in float64 (specification, section 2.4)."""

    def __init__(self, variables: Any):
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
        self.smallest_real_product = np.inf

    def leaf(self, *path: str) -> np.ndarray:
        return functools.reduce(lambda tree, name: tree[name], path, self.params)

    def norm(self, x: np.ndarray, *path: str) -> np.ndarray:
        mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        return (x - mean) / np.sqrt(var + 1e-5) * self.leaf(*path, "scale") + self.leaf(*path, "bias")

    def conv(self, a: np.ndarray, r: np.ndarray, *path: str, stride: int) -> tuple[np.ndarray, np.ndarray]:
        kernel = self.leaf(*path, "kernel")
        w2 = (kernel - kernel.mean(axis=(0, 1, 2))) / kernel.std(axis=(0, 1, 2), ddof=1)
        binary = 2.0 ** np.round(np.log2(np.abs(w2).mean(axis=(0, 1, 2)))) * np.sign(w2)
        convolve = functools.partial(explicit_convolution, strides=(stride, stride), padding=((1, 1), (1, 1)))
        y, q = convolve(np.sign(a), binary), convolve(r, w2)
        self.smallest_real_product = min(self.smallest_real_product, np.abs(q).min())
        return y, np.abs(y) * np.sign(q)

    def shortcut(self, x: np.ndarray, width: int) -> np.ndarray:
        if x.shape[-1] == width:
            return x
        zeros = np.zeros((*x[:, ::2, ::2].shape[:3], width // 4))
        return np.concatenate([zeros, x[:, ::2, ::2], zeros], axis=-1)

    def __call__(self, images: jax.Array) -> list[tuple[np.ndarray, np.ndarray]]:
        """All pairs of features."""
        stem = explicit_convolution(np.asarray(images), self.leaf("conv1", "kernel"), (1, 1), ((1, 1), (1, 1)))
        a = r = np.clip(self.norm(stem, "bn1"), -1, 1)
        pairs = []
        for block, stride in (("layer1_0", 1), ("layer2_0", 2)):
            for index in (1, 2):
                y, z = self.conv(a, r, block, f"conv{index}", stride=stride if index == 1 else 1)
                skips = [self.shortcut(x, y.shape[-1]) for x in (a, r)]
                a, r = (np.clip(self.norm(v, block, f"bn{index}") + s, -1, 1) for v, s in zip((y, z), skips))
                pairs.append((a, r))
        return pairs


def test_both_streams_follow_the_specification():
    # A block that keeps its shape and one that does not.
    choice = spec("hardtanh_resnet20", stage_sizes=(1, 1), widths=(4, 8))
    network = networks.build(choice, tiny_skd.IRNET, num_classes=tiny.CLASSES)
    variables, images = tiny.variables(network), images_of(plan()[0][0])
    outputs, _ = run_forward(tiny_skd.parts(network=network), variables, images)
    reference = TwoStreams(variables)
    expected = reference(images)
    # Far enough from 0 that float32 gives the same signs.
    assert reference.smallest_real_product > 1e-5
    found = zip(outputs.block_features, outputs.real_features, strict=True)
    for (a, r), (expected_a, expected_r) in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, expected_a, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(r, expected_r, rtol=1e-4, atol=1e-4)
        assert (np.sign(a) != np.sign(r)).mean() > 0.02


def test_without_quantized_layers_both_streams_are_the_same():
    network = networks.build(tiny_skd.CHOICE, QuantSpec(), num_classes=tiny.CLASSES)
    step_parts = tiny_skd.parts(network=network)
    outputs, _ = run_forward(step_parts, tiny.variables(network), images_of(plan()[0][0]))
    for a, r in zip(outputs.block_features, outputs.real_features, strict=True):
        np.testing.assert_array_equal(a, r)
    indices, mask = plan()
    _, metrics = one_step(step_parts, tiny_skd.state(step_parts), indices[0], mask[0])
    # Inside a large program the two may be fused differently: an ulp in some features.
    assert float(metrics["loss/feature_swap"]) < 1e-7
    assert np.isfinite(float(metrics["loss"]))


def test_each_stream_drops_units_of_its_own():
    # At 32 bits and without dropout the streams are equal, so what differs is what was dropped.
    choice = spec("hardtanh_mlp", hidden=16, dropout=0.5)
    network = networks.build(choice, QuantSpec(), num_classes=tiny.CLASSES)
    step_parts = tiny_skd.parts(
        network=network, objectives=tiny_skd.build_terms(spec("feature_swap", compare="elementwise"))
    )
    outputs, _ = run_forward(step_parts, tiny.variables(network), images_of(plan()[0][0]))
    same = [np.array_equal(a, r) for a, r in zip(outputs.block_features, outputs.real_features, strict=True)]
    assert same == [True, True, False]


# ---- what it leaves alone


def test_only_a_term_that_compares_features_runs_the_real_stream(parts):
    assert needs_real_features(parts.objectives)
    others = tiny_skd.build_terms(spec("cross_entropy"), spec("label_bank"), spec("cluster"))
    assert not needs_real_features(others)
    outputs, _ = run_forward(
        tiny_skd.parts(objectives=others), tiny.variables(tiny_skd.NETWORK), images_of(plan()[0][0])
    )
    assert outputs.block_features == outputs.real_features == ()


def test_logits_and_running_statistics_are_those_of_the_network_alone(parts):
    variables, images = tiny.variables(tiny_skd.NETWORK), images_of(plan()[0][0])
    alone = tiny_skd.parts(objectives=tiny_skd.build_terms(spec("cross_entropy")))
    with_stream, updates = run_forward(parts, variables, images)
    without, updates_without = run_forward(alone, variables, images)
    np.testing.assert_array_equal(with_stream.logits, without.logits)
    np.testing.assert_array_equal(with_stream.features, without.features)
    assert set(updates) == {"batch_stats"}
    # The larger program may fuse the update of a statistic otherwise: an ulp.
    assert_close(updates, updates_without, rtol=1e-6, atol=1e-7)


def test_the_gradient_is_the_one_with_constant_real_features(parts):
    variables, indices = tiny.variables(tiny_skd.NETWORK), plan()[0][0]
    images, (swap,) = images_of(indices), tiny_skd.build_terms(spec("feature_swap"))
    batch = Batch(images=images, labels=jnp.asarray(DATA.train.labels[indices]), mask=jnp.ones(8, bool))

    def term(params: Any, real_features: Any) -> jax.Array:
        outputs, _ = forward(parts, {**variables, "params": params}, images, context(), key=jax.random.key(1))
        if real_features is not None:
            outputs = outputs.replace(real_features=real_features)
        return swap(outputs, batch, {}, context())

    constant = run_forward(parts, variables, images)[0].real_features
    gradient = jax.jit(jax.grad(term))
    found, expected = gradient(variables["params"], None), gradient(variables["params"], constant)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(found)) > 1e-4
    assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_real_stream_of_weight_0_changes_no_parameter(parts):
    none = tiny_skd.parts(objectives=tiny_skd.build_terms(spec("cross_entropy")))
    zero = tiny_skd.parts(objectives=tiny_skd.build_terms(spec("cross_entropy"), spec("feature_swap", weight=0.0)))
    indices, mask = plan()
    one, _ = one_step(none, tiny_skd.state(none), indices[0], mask[0])
    other, metrics = one_step(zero, tiny_skd.state(zero), indices[0], mask[0])
    assert_close(one.params, other.params, rtol=1e-5, atol=1e-7)
    # It is measured all the same.
    assert float(metrics["loss/feature_swap"]) > 0


def test_evaluation_needs_no_real_stream_and_no_knobs():
    variables, images = tiny.variables(tiny_skd.NETWORK), images_of(plan()[0][0])

    @functools.partial(jax.jit, static_argnames="collect")
    def evaluate(variables: Any, images: jax.Array, collect: bool) -> jax.Array:
        if not collect:
            return tiny_skd.NETWORK.apply(variables, images, QuantContext()).logits
        ctx = context().replace(train=False)
        output, kept = tiny_skd.NETWORK.apply(variables, images, ctx, mutable=["taps", "block_features"])
        tiny_skd.NETWORK.apply({**variables, **kept}, images, ctx.replace(stream="real"), mutable=["block_features"])
        return output.logits

    np.testing.assert_array_equal(evaluate(variables, images, collect=False), evaluate(variables, images, collect=True))


# ---- rows that fill up a batch, devices, dispatches


def test_the_masked_last_batch_equals_the_unpadded_one():
    # Augmentation off: its draws are tested to be the same for both in devices_test.
    plain = tiny_skd.parts(augment="none")
    indices = plan()[0][0]
    # In the second epoch, where the bank teaches.
    state, _ = one_step(plain, tiny_skd.state(plain), indices, np.ones(8, bool))
    state = compile_end_of_epoch(plain.objectives, all_devices())(state)
    padded, padded_metrics = one_step(plain, state, indices, np.arange(8) < 5)
    short, short_metrics = one_step(plain, state, indices[:5], np.ones(5, bool))
    assert float(padded_metrics["loss/label_bank"]) > 0
    assert float(padded_metrics["count"]) == 5
    assert_close(padded_metrics, short_metrics)
    for field in ("params", "batch_stats", "opt_state", "objective_state", "metric_sums"):
        assert_close(getattr(padded, field), getattr(short, field), rtol=1e-3, atol=1e-6)


def test_what_fills_up_a_batch_changes_nothing(parts, run_steps):
    indices, mask = plan()
    other = np.where(mask[-1], indices[-1], 17).astype(np.int32)
    one, _ = run_steps(tiny_skd.state(parts), tiny.constants(DATA), indices[-1:], mask[-1:])
    two, _ = run_steps(tiny_skd.state(parts), tiny.constants(DATA), other[None], mask[-1:])
    tiny.assert_equal(two, one)


def test_one_program_serves_all_steps_of_a_stage(parts):
    # The knobs follow the epoch, the label bank starts in the second: neither compiles anything.
    run_steps, end_of_epoch = (
        compile_train_steps(parts, all_devices()),
        compile_end_of_epoch(parts.objectives, all_devices()),
    )
    state, constants = tiny_skd.state(parts), tiny.constants(DATA)
    for epoch in range(3):
        for indices, mask in zip(*plan(epoch)):
            state, metrics = run_steps(state, constants, indices[None], mask[None])
        assert (float(metrics["loss/label_bank"][0]) > 0) == (epoch > 0)
        state = end_of_epoch(state)
    assert run_steps._cache_size() == 1


def test_eight_devices_give_the_step_of_one(tmp_path: Path, parts, run_steps):
    program = f"""
        import sys, jax
        import numpy as np
        sys.path.insert(0, {str(ROOT)!r})
        from tests.training.real_stream_test import save_two_steps
        assert jax.device_count() == 8
        save_two_steps({str(tmp_path / "eight.npz")!r})
    """
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    save_two_steps(str(tmp_path / "one.npz"))
    one, eight = (np.load(tmp_path / f"{name}.npz") for name in ("one", "eight"))
    assert set(one.files) == set(eight.files) and any("label_bank" in name for name in one.files)
    for name in one.files:
        # Batch statistics and gradients are summed in another order; no sign of an activation is near its threshold.
        np.testing.assert_allclose(eight[name], one[name], rtol=2e-4, atol=2e-5, err_msg=name)


def save_two_steps(path: str) -> None:
    """State and metrics after a step of the first epoch and a partial batch of the second, over all devices."""
    devices, step_parts = all_devices(), tiny_skd.parts()
    run_steps, end_of_epoch = (
        compile_train_steps(step_parts, devices),
        compile_end_of_epoch(step_parts.objectives, devices),
    )
    indices, mask = devices.pad_rows(*plan())
    state, constants = tiny_skd.state(step_parts, devices=devices), devices.replicate(tiny.constants(DATA))
    state, _ = run_steps(state, constants, indices[:1], mask[:1])
    state, metrics = run_steps(end_of_epoch(state), constants, indices[-1:], mask[-1:])
    fields = ("params", "batch_stats", "opt_state", "objective_state")
    tree = {"metrics": metrics, **{name: getattr(state, name) for name in fields}}
    np.savez(path, **{jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)})


# ---- gradient norms


def test_the_norm_of_every_weighted_term_is_recorded_and_the_step_stays_the_same(parts):
    measuring = tiny_skd.parts(log_gradient_norms=True)
    indices, mask = plan()
    end_of_epoch = compile_end_of_epoch(parts.objectives, all_devices())
    states, found = [], []
    for step_parts in (parts, measuring):
        state = end_of_epoch(one_step(step_parts, tiny_skd.state(step_parts), indices[0], mask[0])[0])
        state, metrics = one_step(step_parts, state, indices[1], mask[1])
        states.append(state)
        found.append(metrics)
    names = {f"gradient_norm/{objective.name}" for objective in measuring.objectives}
    assert set(found[1]) - set(found[0]) == names
    assert all(float(found[1][name]) > 0 for name in names)
    for field in ("params", "opt_state", "objective_state"):
        # The gradient is a sum of four instead of one pullback of the sum; values are of the order of 1.
        assert_close(getattr(states[0], field), getattr(states[1], field), rtol=1e-4, atol=1e-5)
    # Sums over the images of the epoch, from which its record takes the means.
    for name in names:
        np.testing.assert_allclose(states[1].metric_sums[name], 8 * found[1][name], rtol=1e-6)


def test_the_norm_of_a_term_is_that_of_its_own_gradient():
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
    objectives = tiny_skd.build_terms(spec("cross_entropy", weight=0.5), spec("cluster", weight=3.0))

    def terms(params: Any) -> tuple[dict[str, jax.Array], str]:
        return {"cross_entropy": jnp.sum(params["a"] ** 2), "cluster": params["b"] ** 3}, "other"

    step_parts = dataclasses.replace(tiny_skd.parts(), objectives=objectives, log_gradient_norms=True)
    values, grads, norms, other = gradients(step_parts, terms, params)
    assert (float(values["cross_entropy"]), float(values["cluster"]), other) == (5.0, 27.0, "other")
    np.testing.assert_allclose(grads["a"], 0.5 * 2 * params["a"])
    np.testing.assert_allclose(grads["b"], 3.0 * 27.0)
    np.testing.assert_allclose(norms["gradient_norm/cross_entropy"], np.sqrt(5.0), rtol=1e-6)
    np.testing.assert_allclose(norms["gradient_norm/cluster"], 81.0)
    plain = gradients(dataclasses.replace(step_parts, log_gradient_norms=False), terms, params)
    assert plain[2] == {}
    assert_close(plain[1], grads)


# ---- the bank inside the step


def test_the_bank_collects_the_logits_from_before_the_update(parts, run_steps):
    indices, mask = plan()
    before = tiny.variables(tiny_skd.NETWORK)
    plain = tiny_skd.parts(augment="none")
    state, _ = one_step(plain, tiny_skd.state(plain), indices[0], mask[0])
    logits = np.asarray(run_forward(plain, before, images_of(indices[0]))[0].logits)
    labels = DATA.train.labels[indices[0]]
    right = logits.argmax(axis=1) == labels
    assert right.any() and not right.all()
    expected = np.stack([logits[right & (labels == label)].sum(axis=0) for label in range(tiny.CLASSES)])
    np.testing.assert_allclose(state.objective_state["label_bank"]["sum"], expected, rtol=1e-5, atol=1e-6)
    counts = np.bincount(labels[right], minlength=tiny.CLASSES)
    np.testing.assert_array_equal(state.objective_state["label_bank"]["count"], counts)
