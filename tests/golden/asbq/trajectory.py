"""Check of training trajectories: the rungs of a chain, a few optimiser steps each, through the library's own step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnn_jax import schedules
from bnn_jax.experiment.start import create_state, transfer, variable_shapes
from bnn_jax.networks.blocks import BLOCKS
from bnn_jax.stages import OptimSpec, ParameterGroup, spec
from bnn_jax.storage import pytorch
from bnn_jax.training.devices import all_devices
from bnn_jax.training.optimizer import make_optimizer
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import Constants, StepParts, compile_train_steps
from tests.golden.asbq.support import full_masks, in_pytorch_form, loss_terms, normalised, resnet
from tests.golden.comparison import Comparison, GoldenFile

# What the files' README fixes for all trajectories; the rest is in the file.
TEMPERATURE = 5.0
REDUCTION = "mean"
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Absolute tolerances of a rung: the first step's loss, later losses, parameters and running statistics."""

    first_loss: float
    later_loss: float
    parameters: float


def tolerance_of(bits: int, *, chained: bool) -> Tolerance:
    """About ten times the gap between float32 and float64 in the original; more where errors of rungs add up."""
    if bits == 32:
        return Tolerance(1e-4, 1e-4, 1e-3)
    if chained:
        return Tolerance(2e-2, 2e-2, 1e-1) if bits > 4 else Tolerance(1e-1, 1e-1, 2e-1)
    # At 4 and 8 bits values flip between levels under batch statistics; below, usually nothing flips.
    return Tolerance(1e-3, 1e-2, 3e-2) if bits >= 4 else Tolerance(1e-3, 1e-3, 3e-3)


def learning_rate_of(bits: int) -> float:
    """The recipe's base rate."""
    return 0.1 if bits >= 4 else 0.01


@dataclasses.dataclass(frozen=True)
class Rung:
    """One rung.

    Attributes:
      bits: bit width.
      network: its network.
      start: the student's variables before the first step.
      teacher: the rung before, its variables as ``final``, or None.
      final: variables that teach and initialise the next rung: the stored ones where there are any, else our own.
      chained: whether ``start`` comes from our own training of an earlier rung.
    """

    bits: int
    network: Any
    start: Mapping[str, Any]
    teacher: "Rung | None"
    final: Mapping[str, Any] | None = None
    chained: bool = False


def check_trajectory(file: GoldenFile, result: Comparison) -> None:
    """Losses of every step, selected parameters and statistics after it, the state after the last one, rung by rung."""
    block = file.path.stem.removeprefix("trajectory_")
    assert block in BLOCKS, f"{file.path.name}: block {block!r}: accepted are {', '.join(BLOCKS)}"
    # The same run in float64, from which the tolerances were derived.
    file.not_compared(r"b\d+/lam[^/]+/loss_f64")
    initial = file.group("init/")
    widths = sorted({int(match.group(1)) for match in file.cases(r"b(\d+)/")}, reverse=True)
    previous = None
    for bits in widths:
        rung = _begin(file, block, bits, initial, previous)
        runs = sorted((match.group(1) for match in file.cases(rf"b{bits}/lam([^/]+)/")), key=float, reverse=True)
        # The run of largest weight comes first: its end is where the next rung begins.
        ends = [_check_run(file, result, rung, weight) for weight in runs]
        stored = file.group(f"b{bits}/final/")
        if stored:
            _check_state(result, f"b{bits}/final/", ends[0], stored, rung)
            final = pytorch.import_state({**stored, **_masks(file, bits, stored)}, ends[0])
            previous = dataclasses.replace(rung, final=final, chained=False)
        else:
            previous = dataclasses.replace(rung, final=ends[0], chained=True)
    result.notes.append(f"rungs {', '.join(map(str, widths))}")


def _masks(file: GoldenFile, bits: int, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return full_masks(file.group(f"b{bits}/keep/"), state)


def _begin(file: GoldenFile, block: str, bits: int, initial: Mapping[str, np.ndarray], previous: Rung | None) -> Rung:
    """The rung before its first step: parameters of the rung before, fresh running statistics, its own masks."""
    network = resnet({name: array.shape for name, array in initial.items()}, bits, block=block)
    shapes = variable_shapes(network, file["images"].shape[2:])
    # The stored initial running statistics are 0 and 1, those of every student.
    start = pytorch.import_state({**initial, **_masks(file, bits, initial)}, shapes)
    if previous is None:
        return Rung(bits, network, start, None)
    start = transfer(previous.final, start, collections=("params",))
    return Rung(bits, network, start, previous, chained=previous.chained)


def _check_run(file: GoldenFile, result: Comparison, rung: Rung, weight: str) -> dict[str, Any]:
    """Trains a rung with one weight of the distillation, compares every step, and returns the variables at the end."""
    case, tolerance = f"b{rung.bits}/lam{weight}/", tolerance_of(rung.bits, chained=rung.chained)
    images, labels = file["images"], file["labels"]
    terms = loss_terms(weight=float(weight), temperature=TEMPERATURE, reduction=REDUCTION)
    terms = terms if rung.teacher else (dataclasses.replace(terms[0], weight=1.0),)
    step, state = _training(rung, terms, num_classes=int(file["init/fc.bias"].size))
    constants = Constants(
        images=jnp.asarray(images.reshape(-1, *images.shape[2:])),
        labels=jnp.asarray(labels.reshape(-1), jnp.int32),
        teacher=rung.teacher.final if rung.teacher else {},
    )
    losses: dict[str, list[float]] = {"loss": [], "ce": [], "kd": []}
    for number, rows in enumerate(np.arange(labels.size, dtype=np.int32).reshape(labels.shape), start=1):
        state, metrics = step(state, constants, *all_devices().pad_rows(rows[None], np.ones((1, rows.size), bool)))
        for name, metric in (("loss", "loss"), ("ce", "loss/cross_entropy"), ("kd", "loss/distillation")):
            if metric in metrics:
                losses[name].append(float(metrics[metric][0]))
        _check_state(result, f"{case}step{number}/", state.variables, file.group(f"{case}step{number}/"), rung)
    for name, values in losses.items():
        limits = np.full(len(values), tolerance.later_loss)
        limits[:1] = tolerance.first_loss
        result.close(case + name, values, file[case + name], atol=limits)
    return state.variables


def _training(rung: Rung, terms: tuple, *, num_classes: int) -> tuple[Any, TrainState]:
    """The compiled step of a rung and its state before the first step, with a fresh optimiser."""
    recipe = OptimSpec(
        optimizer=spec("sgd", momentum=MOMENTUM, nesterov=True),
        learning_rate=spec("constant", value=learning_rate_of(rung.bits)),
        epochs=1,
        batch_size=1,
        groups=(ParameterGroup(".*", weight_decay=WEIGHT_DECAY),),
    )
    schedule = schedules.build(recipe.learning_rate, steps_per_epoch=1, epochs=recipe.epochs)
    optimizer = make_optimizer(
        recipe, rung.start["params"], schedule=schedule, unused_parameters=rung.network.unused_parameters
    )
    parts = StepParts(
        network=rung.network,
        objectives=terms,
        optimizer=optimizer,
        prepare=lambda images, key: normalised(images),
        teacher=rung.teacher.network if rung.teacher else None,
    )
    devices = all_devices()
    state = create_state(
        rung.start, optimizer=optimizer, objectives=terms, num_classes=num_classes, seed=0, devices=devices
    )
    return compile_train_steps(parts, devices), state


def _check_state(
    result: Comparison, case: str, variables: Mapping[str, Any], reference: Mapping[str, np.ndarray], rung: Rung
) -> None:
    """Compares those parameters and running statistics that are stored."""
    reference = {name: array for name, array in reference.items() if not name.endswith("num_batches_tracked")}
    own = in_pytorch_form(variables, reference)
    result.exact(f"{case} names", sorted(own), sorted(reference))
    tolerance = tolerance_of(rung.bits, chained=rung.chained).parameters
    for name, value in own.items():
        result.close(case + name, value, reference[name], atol=tolerance)
