"""Checks of SNN's codebooks: codes, assignment, refill, one convolution, and 65 training steps of one."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnn_jax import schedules
from bnn_jax.experiment.start import create_state
from bnn_jax.knobs import REFINE_CODEBOOK
from bnn_jax.layers import QuantConv
from bnn_jax.networks.base import NetworkOutput
from bnn_jax.objectives.base import Batch, Objective, Outputs
from bnn_jax.ops import codebook as ops
from bnn_jax.quantizers import build_weight
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import OptimSpec, ParameterGroup, spec
from bnn_jax.training.devices import all_devices
from bnn_jax.training.optimizer import make_optimizer
from bnn_jax.training.projections import RefillCodebooks, Update
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import Constants, StepParts, train_step
from tests.golden.asbq.support import nchw, nhwc, to_ours, to_pytorch
from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.skd_bnn.support import relative_to_largest

# Every how many forward passes the codebooks are refined, and the width of the memory's dead zone.
INTERVAL, DEAD_ZONE = 25, 1e-3


def refining(refine: bool) -> QuantContext:
    """Context of a training step."""
    return QuantContext(train=True, knobs={REFINE_CODEBOOK.name: jnp.float32(refine)})


def recorded(candidates: np.ndarray) -> Callable[..., jax.Array]:
    """Draw of a file's candidates; where it offered none, a draw that has to have no effect."""
    return lambda key, count, ctx: jnp.asarray(candidates if candidates.size else np.arange(count), jnp.int32)


def refilled(patterns: np.ndarray, candidates: np.ndarray, *, refine: bool = True) -> np.ndarray:
    """The codebook after the library's projection in the release's order."""
    projection = RefillCodebooks(maintenance="release", draw=recorded(candidates))
    update = Update(
        params={"codebook": jnp.asarray(patterns)},
        quant_state={"memory": jnp.asarray(np.where(patterns > 0, 1.0, -1.0), jnp.float32)},
        opt_state=(),
        grads={"codebook": jnp.zeros(patterns.shape)},
    )
    return np.asarray(projection(update, refining(refine), jax.random.key(0)).params["codebook"])


def check_codes(file: GoldenFile, result: Comparison) -> None:
    """Codes, the table of patterns, initial codebooks, the nearest pattern."""
    result.exact("bnum", ops.codes(jnp.asarray(file["k"])), file["bnum"])
    table = ops.all_patterns()
    if "table512" in file:
        result.exact("table512", table, file["table512"])
        result.exact("table_bnum", ops.codes(table), file["table_bnum"])
    for match in file.cases(r"w_tau(\d+)$"):
        tau = match.group(1)
        patterns = table[file[f"rand_idx_tau{tau}"]]
        result.exact(f"rand_patterns_tau{tau}", patterns, file[f"rand_patterns_tau{tau}"])
        indices = ops.nearest(jnp.asarray(file[match.group()]), patterns)
        result.exact(f"idx_tau{tau}", indices, file[f"idx_tau{tau}"])
        result.exact(f"nearest_tau{tau}", patterns[indices], file[f"nearest_tau{tau}"])


def check_refine(file: GoldenFile, result: Comparison) -> None:
    """Removal of duplicates and their refill from recorded candidates."""
    for match in file.cases(r"(\w+?)__"):
        case = match.group()
        before = jnp.asarray(file[f"{case}patterns_before"])
        result.exact(f"{case}bnum_before", ops.codes(before), file[f"{case}bnum_before"])
        twice = np.asarray(ops.duplicates(before))
        result.exact(f"{case}n_missing", twice.sum(), file[f"{case}n_missing"])
        result.exact(f"{case}kept", before[~twice], file[f"{case}kept"])
        after = refilled(np.asarray(before), file[f"{case}resample_idx"])
        result.exact(f"{case}patterns_after", after, file[f"{case}patterns_after"])
        result.exact(f"{case}bnum_after", ops.codes(jnp.asarray(after)), file[f"{case}bnum_after"])


def check_binarize(file: GoldenFile, result: Comparison) -> None:
    """One pass of the binarizer: memory, assignment, values, gradients, and the codebook's maintenance."""
    for match in file.cases(r"t\d+_(plain|refine)_"):
        case, refine = match.group(), (int(file[f"{match.group()}step_before"]) + 1) % INTERVAL == 0
        result.require(f"{case}: refinement follows from the counter", refine == (match.group(1) == "refine"))
        p, rows = jnp.asarray(file[f"{case}patterns"]), ops.to_rows(to_ours(file[f"{case}w"]))
        memory = ops.remember(p, jnp.asarray(file[f"{case}memory_before"]), DEAD_ZONE)
        result.exact(f"{case}memory_after", memory, file[f"{case}memory_after"])
        result.exact(f"{case}idx", ops.nearest(rows, memory), file[f"{case}idx"])

        def binarize(rows, p, memory=memory, refine=refine):
            return ops.assign(rows, p, memory, jnp.float32(refine))

        y, pullback = jax.vjp(binarize, rows, p)
        cotangent = file[f"{case}cot"]
        d_rows, d_p = pullback(ops.to_rows(to_ours(cotangent)))
        result.close(f"{case}y", np.asarray(y).reshape(cotangent.shape), file[f"{case}y"], atol=1e-6)
        result.close(f"{case}dw", np.asarray(d_rows).reshape(cotangent.shape), file[f"{case}dw"], atol=1e-6)
        if refine:
            result.close(f"{case}dpatterns", d_p, file[f"{case}dpatterns"], atol=1e-6)
        else:
            result.exact(f"{case}no gradient of the codebook", d_p, np.zeros(p.shape))
        candidates = file.get(f"{case}resample_idx")
        after = refilled(np.asarray(p), np.zeros(0, int) if candidates is None else candidates, refine=refine)
        result.close(f"{case}patterns_after", after, file[f"{case}patterns_after"], atol=1e-6)


# ---- one convolution


def convolution(features: int, tau: int, stride: int = 1) -> QuantConv:
    """A 3x3 convolution of a codebook's weights with activations as they are."""
    return QuantConv(features, strides=(stride, stride), weight_quantizer=build_weight(spec("codebook", tau=tau)))


def variables_of(w: np.ndarray, patterns: np.ndarray, memory: np.ndarray) -> dict[str, Any]:
    """Variables of ``convolution`` from arrays in PyTorch's layout."""
    return {
        "params": {"kernel": to_ours(w), "weight_quantizer": {"codebook": jnp.asarray(patterns)}},
        "quant_state": {"weight_quantizer": {"memory": jnp.asarray(memory)}},
    }


def pass_and_gradients(layer: QuantConv, variables: Any, x: np.ndarray, cotangent: np.ndarray, *, refine: bool):
    """(y, gradient of the parameters, gradient of x) of a training step's pass."""

    def run(params, x):
        return layer.apply({**variables, "params": params}, x, refining(refine))

    y, pullback = jax.vjp(run, variables["params"], nhwc(x))
    return y, *pullback(nhwc(cotangent))


def check_hardconv(file: GoldenFile, result: Comparison) -> None:
    """The convolution with its scale per filter, and ReActNet's, whose gradient lacks that scale."""
    for match in file.cases(r"t(\d+)_s\d+_(plain|refine)_"):
        case, refine = match.group(), match.group(2) == "refine"
        w, stride = file[f"{case}w"], int(file[f"{case}stride"])
        layer = convolution(w.shape[0], int(match.group(1)), stride)
        variables = variables_of(w, file[f"{case}patterns"], file[f"{case}memory_before"])
        y, gradients, dx = pass_and_gradients(layer, variables, file[f"{case}x"], file[f"{case}cot"], refine=refine)
        relative_to_largest(result, f"{case}alpha", scale_of(layer, variables), file[f"{case}alpha"], rtol=1e-5)
        relative_to_largest(result, f"{case}y", nchw(y), file[f"{case}y"], rtol=1e-5)
        relative_to_largest(result, f"{case}dx", nchw(dx), file[f"{case}dx"], rtol=1e-5)
        relative_to_largest(result, f"{case}dw", to_pytorch(gradients["kernel"]), file[f"{case}dw"], rtol=1e-5)
        d_p = gradients["weight_quantizer"]["codebook"]
        if refine:
            relative_to_largest(result, f"{case}dpatterns", d_p, file[f"{case}dpatterns"], rtol=1e-5)
        else:
            result.exact(f"{case}no gradient of the codebook", d_p, np.zeros(d_p.shape))
    _check_reactnet(file, result)


def _check_reactnet(file: GoldenFile, result: Comparison) -> None:
    """With all patterns the forward pass is ReActNet's; the gradient of the latent is it times the scale."""
    table = np.asarray(ops.all_patterns())
    layer, variables = convolution(len(file["react_w"]), 9), variables_of(file["react_w"], table, table)
    y, gradients, dx = pass_and_gradients(layer, variables, file["react_x"], file["react_cot"], refine=False)
    relative_to_largest(result, "react_y", nchw(y), file["react_y"], rtol=1e-5)
    relative_to_largest(result, "react_dx", nchw(dx), file["react_dx"], rtol=1e-5)
    unscaled = to_pytorch(gradients["kernel"]) / scale_of(layer, variables)[:, None, None, None]
    relative_to_largest(result, "react_dw", unscaled, file["react_dw"], rtol=1e-5)


def scale_of(layer: QuantConv, variables: Mapping[str, Any]) -> np.ndarray:
    """The scale of every filter."""
    own = {name: tree["weight_quantizer"] for name, tree in variables.items()}
    scale = layer.weight_quantizer().apply(own, variables["params"]["kernel"], QuantContext(), method="code_scale")
    return np.asarray(scale).ravel()


# ---- training


class OneConvolution(nn.Module):
    """A network whose logits are the outputs of one convolution."""

    features: int
    tau: int

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        layer = QuantConv(self.features, weight_quantizer=build_weight(spec("codebook", tau=self.tau)), name="conv")
        y = layer(x, ctx).reshape(len(x), -1)
        return NetworkOutput(logits=y, features=y)


class SquaredError(Objective):
    """Mean squared distance to the target of the batch, whose number is every label of the batch."""

    name = "squared_error"

    def __init__(self, targets: np.ndarray):
        super().__init__()
        object.__setattr__(self, "targets", jnp.asarray(targets))

    def __call__(self, outputs: Outputs, batch: Batch, state: Any, ctx: QuantContext) -> jax.Array:
        return jnp.mean(jnp.square(outputs.logits - self.targets[batch.labels[0]]))


def keeping_gradients(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The optimiser with the last gradient it was given beside its state."""

    def update(grads, state, params=None, **extra):
        changes, after = inner.update(grads, state[0], params, **extra)
        return changes, (after, grads)

    return optax.GradientTransformationExtraArgs(lambda params: (inner.init(params), params), update)


def check_trajectory(file: GoldenFile, result: Comparison) -> None:
    """The library's training step with its gated Adam and its projection, on recorded candidates."""
    steps, batch = len(file["loss"]), file["X"].shape[1]
    parts, state = _training(file, without="skip" if file.path.stem.endswith("skip") else "step")
    images = jnp.concatenate([nhwc(images) for images in file["X"]])
    labels = jnp.repeat(jnp.arange(len(file["X"]), dtype=jnp.int32), batch)
    run = jax.jit(lambda state, rows: train_step(parts, state, Constants(images, labels, {}), rows, rows >= 0))
    kept: dict[str, list[np.ndarray]] = {name: [] for name in ("loss", "patterns", "memory", "idx", "w", "grads")}
    for step in range(steps):
        rows = ops.to_rows(state.params["conv"]["kernel"])
        state, metrics = run(state, (step % len(file["X"])) * batch + jnp.arange(batch, dtype=jnp.int32))
        memory = state.quant_state["conv"]["weight_quantizer"]["memory"]
        params, grads = state.params["conv"], state.opt_state[1]["conv"]
        now = {
            "loss": metrics["loss"],
            "patterns": params["weight_quantizer"]["codebook"],
            "memory": memory,
            "idx": ops.nearest(rows, memory),
            "w": to_pytorch(params["kernel"]),
            "grads": grads["weight_quantizer"]["codebook"],
        }
        for name, value in now.items():
            kept[name].append(np.array(value))
    _compare_trajectory(file, result, {name: np.stack(values) for name, values in kept.items()})


def _training(file: GoldenFile, *, without: str) -> tuple[StepParts, TrainState]:
    """Parts and first state: Adam at a constant rate, refinement by the counter, the recorded candidates."""
    decay, (count, _) = float(file["wd"]), file["p0"].shape
    groups = (
        ParameterGroup("codebook$", weight_decay=decay, gradient_knob=REFINE_CODEBOOK.name, without_gradient=without),
        ParameterGroup(".*", weight_decay=decay),
    )
    recipe = OptimSpec(spec("adam"), spec("constant", value=float(file["lr"])), epochs=1, batch_size=1, groups=groups)
    network = OneConvolution(features=len(file["w0"]), tau=count.bit_length() - 1)
    inner = variables_of(file["w0"], file["p0"], file["M0"])
    variables = {name: {"conv": tree} for name, tree in inner.items()}
    timing = {"steps_per_epoch": len(file["loss"]), "epochs": 1}
    schedule = schedules.build(recipe.learning_rate, **timing)
    optimizer = keeping_gradients(make_optimizer(recipe, variables["params"], schedule=schedule))
    offered = np.tile(np.arange(count), (len(file["loss"]), 1))
    offered[file["event_steps"]] = file["event_resample_idx"]

    def draw(key: jax.Array, count: int, ctx: QuantContext) -> jax.Array:
        return jnp.asarray(offered, jnp.int32)[ctx.step]

    term = SquaredError(np.stack([nhwc(target).reshape(len(target), -1) for target in file["T"]]))
    parts = StepParts(
        network=network,
        objectives=(term,),
        optimizer=optimizer,
        prepare=lambda images, key: images,
        knobs={
            REFINE_CODEBOOK.name: schedules.build(spec("every", interval=INTERVAL, start=int(file["step0"])), **timing)
        },
        projections=(RefillCodebooks(maintenance="release", draw=draw),),
    )
    state = create_state(
        variables, optimizer=optimizer, objectives=(term,), num_classes=2, seed=0, devices=all_devices()
    )
    return parts, state


def _compare_trajectory(file: GoldenFile, result: Comparison, own: Mapping[str, np.ndarray]) -> None:
    result.close("loss", own["loss"], file["loss"], rtol=1e-4)
    result.close("patterns", own["patterns"], file["patterns"], atol=1e-4)
    result.exact("memory", own["memory"], file["memory"])
    result.exact("idx", own["idx"], file["idx"])
    result.close("w", own["w"][file["w_steps"]], file["w"], atol=1e-4)
    with_gradient = np.flatnonzero(own["grads"].any(axis=(1, 2)))
    result.exact("pg_steps", with_gradient, file["pg_steps"])
    result.close("patterns_grad", own["grads"][file["pg_steps"]], file["patterns_grad"], atol=1e-4)
    # The steps on which rows were new are those with recorded candidates.
    before = np.concatenate([file["p0"][None], own["patterns"][:-1]])
    replaced = [step for step in with_gradient if np.asarray(ops.duplicates(jnp.asarray(before[step]))).any()]
    result.exact("event_steps", replaced, file["event_steps"])


PARTS: dict[str, Callable[[GoldenFile, Comparison], None]] = {
    "codes": check_codes,
    "refine": check_refine,
    "binarize": check_binarize,
    "hardconv": check_hardconv,
    "traj_conv_.+": check_trajectory,
}
