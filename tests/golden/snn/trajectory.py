"""Checks of whole training runs: four epochs of two steps, through the library's own step and the method's stages."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import objectives, schedules
from bnn_jax.experiment.start import create_state
from bnn_jax.methods import snn
from bnn_jax.networks.base import NetworkOutput
from bnn_jax.objectives.base import Outputs
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import Stage, spec
from bnn_jax.training import projections
from bnn_jax.training.devices import all_devices
from bnn_jax.training.optimizer import make_optimizer
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import Constants, StepParts, compile_train_steps
from configs import snn_resnet18
from tests.golden.asbq.support import nhwc
from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.skd_bnn.support import KeepOutputs, relative_to_largest
from tests.golden.snn.networks import in_pytorch_form, load, snn_stages

# Share of the entries of a 3x3 latent tensor that may have gone another way: where a bit of the input is the same in
# the whole batch, BatchNorm takes the gradient away, and Adam makes a step of the rate's size out of its rounding.
SHARE_WITHOUT_GRADIENT = 0.05


class KeepLogits(KeepOutputs):
    """A term of value 0 that keeps the logits, as its state."""

    needs = frozenset()

    def after_step(self, outputs: Outputs, batch: Any, state: Any) -> jax.Array:
        return outputs.logits


@dataclasses.dataclass(frozen=True)
class RecordedTeacher:
    """A teacher whose only variable are its logits (batches, N, K), the batches in turn."""

    def apply(self, variables: dict[str, jax.Array], images: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """The logits of this step's batch."""
        logits = variables["logits"][ctx.step % variables["logits"].shape[0]]
        return NetworkOutput(logits=logits, features=logits)


def check_trajectory(file: GoldenFile, result: Comparison) -> None:
    """Logits and loss of every step, parameters after the first and the last, evaluation at the end."""
    images = jnp.stack([nhwc(batch) for batch in file["x"]])
    network, variables = load(file.group("in."), images.shape[2:])
    stage = _stage(file)
    parts, state = _training(file, result, stage, network, variables)
    constants = Constants(
        images=images.reshape(-1, *images.shape[2:]),
        labels=jnp.zeros(images.shape[0] * images.shape[1], jnp.int32),
        teacher={"logits": jnp.asarray(file["teacher_logits"])},
    )
    run = compile_train_steps(parts, all_devices())
    batches = np.arange(len(constants.labels), dtype=np.int32).reshape(images.shape[:2])
    logits, losses = [], []
    for step in range(len(file["loss"])):
        rows = batches[step % len(batches)][None]
        state, metrics = run(state, constants, *all_devices().pad_rows(rows, np.ones(rows.shape, bool)))
        logits.append(np.asarray(state.objective_state["kept"])[: rows.size])
        losses.append(float(metrics["loss"][0]))
        if step == 0:
            _compare_state(file, result, "after1.", state.variables)
    relative_to_largest(result, "logits", np.stack(logits), file["logits"], rtol=1e-3)
    result.close("loss", losses, file["loss"], rtol=1e-3)
    _compare_state(file, result, "end.", state.variables)
    evaluated = jax.jit(lambda variables, x: network.apply(variables, x, QuantContext()).logits)
    relative_to_largest(result, "logits_eval", evaluated(state.variables, images[0]), file["logits_eval"], rtol=1e-3)


def _stage(file: GoldenFile) -> Stage:
    """The stage of the method with the file's numbers; its counter of forward passes begins where the file's does."""
    changes = {
        "preset": "release_1gpu",
        "epochs": (len(file["loss"]) // len(file["x"]),),
        "learning_rate": float(file["lr0"]),
        "weight_decays": (float(file["wd"]),),
    }
    name = snn.FIRST if file.path.stem.endswith("s1") else snn.SECOND
    (stage,) = (stage for stage in snn_stages(snn_resnet18, **changes) if stage.name == name)
    start = int(file["step0"])
    counted = tuple((knob, spec(s.name, **s.kwargs, start=start)) for knob, s in stage.knobs)
    return dataclasses.replace(stage, knobs=counted)


def _training(
    file: GoldenFile, result: Comparison, stage: Stage, network: Any, variables: Mapping[str, Any]
) -> tuple[StepParts, TrainState]:
    timing = {"steps_per_epoch": len(file["x"]), "epochs": stage.optim.epochs}
    schedule = schedules.build(stage.optim.learning_rate, **timing)
    result.close("lr", schedule(jnp.arange(len(file["lr"]))), file["lr"], rtol=1e-6)
    terms = (*(objectives.build(term) for term in stage.objectives), KeepLogits(weight=0.0))
    optimizer = make_optimizer(
        stage.optim, variables["params"], schedule=schedule, unused_parameters=network.unused_parameters
    )
    parts = StepParts(
        network=network,
        objectives=terms,
        optimizer=optimizer,
        prepare=lambda images, key: images,
        knobs={name: schedules.build(knob, **timing) for name, knob in stage.knobs},
        teacher=RecordedTeacher(),
        projections=tuple(projections.build(projection) for projection in stage.projections),
    )
    state = create_state(
        dict(variables),
        optimizer=optimizer,
        objectives=terms,
        num_classes=network.num_classes,
        seed=0,
        devices=all_devices(),
    )
    # The logits of the first step take the place of zeros.
    rows, devices = file["x"].shape[1], all_devices()
    padded = devices.pad_rows(np.zeros((1, rows), np.int32), np.ones((1, rows), bool))[0].shape[1]
    kept = devices.replicate(jnp.zeros((padded, network.num_classes)))
    return parts, state.replace(objective_state={**state.objective_state, "kept": kept})


def _compare_state(file: GoldenFile, result: Comparison, case: str, variables: Mapping[str, Any]) -> None:
    """Parameters and running statistics; see the files' README for the tolerances."""
    expected = file.group(case)
    own = in_pytorch_form(variables, expected)
    if file.path.stem.endswith("_wd"):
        for name, value in own.items():
            result.close(case + name, value, expected[name], atol=2e-5)
        return
    steps = 1 if case == "after1." else len(file["lr"])
    moved = float(np.sum(file["lr"][:steps]))
    for name, value in own.items():
        limit = np.full(value.shape, 1e-4)
        layer, _, statistic = name.rpartition("bn1.running_")
        if name.endswith("binary_conv.weight"):
            beyond = np.abs(value - expected[name]) > limit
            result.at_most(f"{case}{name}, share elsewhere", float(np.mean(beyond)), SHARE_WITHOUT_GRADIENT)
            limit += moved
        elif statistic and f"{layer}binary_conv.weight" in own:
            # Inputs are at most 1 in size, so an output is off by no more than the sum of its filter's weights are.
            errors = np.abs(own[f"{layer}binary_conv.weight"] - expected[f"{layer}binary_conv.weight"]).sum((1, 2, 3))
            limit += errors if statistic == "mean" else errors * (2 * np.sqrt(expected[name]) + errors)
        result.close(case + name, value, expected[name], atol=limit)


TRAJECTORY: dict[str, Callable[[GoldenFile, Comparison], None]] = {"traj_s(1|2|2_wd)": check_trajectory}
