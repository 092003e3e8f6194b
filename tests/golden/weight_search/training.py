"""Checks of the published training loop: every loss, learning rate, temperature, choice, and the state at the end."""

import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnn_jax import schedules
from bnn_jax.data.order import sequential_plan
from bnn_jax.experiment.start import create_state
from bnn_jax.layers import BatchNorm, QuantConv, QuantDense
from bnn_jax.networks.base import NetworkOutput, global_average_pool
from bnn_jax.objectives.classification import CrossEntropy
from bnn_jax.ops import categorical
from bnn_jax.quantizers import QuantContext, build_weight
from bnn_jax.stages import OptimSpec, ParameterGroup, Spec, spec
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import compile_eval_step
from bnn_jax.training.optimizer import make_optimizer
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import Constants, StepParts, compile_train_steps
from tests.golden.asbq.support import nhwc
from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.weight_search.support import (
    kernel_to_pytorch,
    logits_to_pytorch,
    our_path,
    relative,
    to_ours,
    to_pytorch,
)

SEARCHED = ("conv2", "conv3")


class SmallNetwork(nn.Module):
    """The network of the recorded runs: three convolutions, of which two are searched, and a classifier.

    Attributes:
      quantizer: of the searched convolutions.
      channels: of the three convolutions.
      num_classes: outputs.
    """

    quantizer: Spec
    channels: tuple[int, ...]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """(N, H, W, 3) -> logits (N, num_classes)."""
        for index, channels in enumerate(self.channels, start=1):
            searched = {"strides": (2, 2), "weight_quantizer": build_weight(self.quantizer)} if index > 1 else {}
            x = QuantConv(channels, name=f"conv{index}", **searched)(x, ctx)
            x = nn.relu(BatchNorm(name=f"bn{index}")(x, ctx))
        features = global_average_pool(x)
        return NetworkOutput(logits=QuantDense(self.num_classes, name="fc")(features, ctx), features=features)


def _recipe(config: Mapping[str, Any]) -> tuple[OptimSpec, Spec]:
    """Optimiser and temperature of a recorded run, as stages describe them."""
    rate, decay = config["init_lr"], config["weight_decay"]
    if config["lr_scheduler"] == "Cos":
        schedule = spec("cosine" if config["lr_step"] == "batch" else "cosine_by_epoch", initial=rate)
    else:
        factors = config["gamma"] ** np.arange(len(config["milestones"]) + 1)
        boundaries = tuple(map(float, config["milestones"]))
        schedule = spec("piecewise", boundaries=boundaries, values=tuple(map(float, rate * factors)))
    optim = OptimSpec(
        optimizer=spec("sgd", momentum=config["momentum"], nesterov=False),
        learning_rate=schedule,
        epochs=config["epochs"],
        batch_size=config["batch_size"],
        groups=(ParameterGroup(".*", weight_decay=decay),),
    )
    return optim, spec("decay_by_epoch", initial=1.0, rate=config["temp_anneal_rate"], floor=1e-5)


def _initial(file: GoldenFile) -> dict[str, Any]:
    """The state a run starts from, in our layout."""
    arrays = {name: array for name, array in file.group("init/").items() if not name.endswith("qvals")}
    paths = {name: our_path(name) for name in arrays}
    return unflatten_dict({path: to_ours(name, arrays[name]) for name, path in paths.items() if path}, sep="/")


class Run:
    """A recorded run in our own parts.

    Attributes:
      config: its settings.
      steps: optimiser steps in an epoch.
      schedule: learning rate by step.
      temperature: by step.
      parts: of the training step.
      state: before the first step.
      constants: images and labels.
    """

    def __init__(self, file: GoldenFile):
        self.config = json.loads(str(file["config"]))
        optim, knob = _recipe(self.config)
        variables, labels = _initial(file), file["data/Y"]
        network = SmallNetwork(
            quantizer=spec(
                "categorical",
                values=tuple(map(float, self.config["values"])),
                mode="hard" if self.config["hard"] else "soft",
            ),
            channels=tuple(len(variables["params"][f"bn{i}"]["bias"]) for i in (1, 2, 3)),
            num_classes=len(variables["params"]["fc"]["bias"]),
        )
        self.steps = len(labels) // optim.batch_size
        timing = {"steps_per_epoch": self.steps, "epochs": optim.epochs}
        self.schedule = schedules.build(optim.learning_rate, **timing)
        self.temperature = schedules.build(knob, **timing)
        terms = (CrossEntropy(),)
        optimizer = make_optimizer(optim, variables["params"], schedule=self.schedule)
        self.parts = StepParts(
            network=network,
            objectives=terms,
            optimizer=optimizer,
            prepare=lambda images, key: images,
            knobs={"temperature": self.temperature},
        )
        self.state: TrainState = create_state(
            variables,
            optimizer=optimizer,
            objectives=terms,
            num_classes=network.num_classes,
            seed=0,
            devices=all_devices(),
            log_train_top5=True,
        )
        self.constants = Constants(nhwc(file["data/X"]), jnp.asarray(labels, jnp.int32), teacher={})

    def logits(self) -> dict[str, jax.Array]:
        """Logits of the searched layers."""
        return {name: jnp.array(self.state.params[name]["kernel"]) for name in SEARCHED}


def check_train(file: GoldenFile, result: Comparison) -> None:
    """All steps of all epochs, evaluation after each, the state at the end."""
    run = Run(file)
    near_ties = _has_near_ties(run)
    _check_constants(file, result, run)
    own = _train(file, run)
    agreed = _check_choices(file, result, own, near_ties=near_ties)
    tolerance = 2e-4 if run.config["hard"] else 1e-3
    result.close("step/loss", own["loss"][:agreed], file["step/loss"][:agreed], atol=tolerance)
    saved_after = file["step/alpha_saved_after_steps"]
    for name in SEARCHED:
        saved = np.array([own[f"alpha_{name}"][step] for step in saved_after if step <= agreed])
        result.close(f"step/alpha_{name}", saved, file[f"step/alpha_{name}"][: len(saved)], atol=2e-5)
    if agreed < len(file["step/loss"]):
        file.not_compared("(history|final)/.+")
        return
    for name in ("train_loss", "val_loss"):
        result.close(f"history/{name}", own[name], file[f"history/{name}"], atol=tolerance)
    for name in ("train_acc1", "train_acc5", "val_acc1", "val_acc5"):
        result.close(f"history/{name}", own[name], file[f"history/{name}"], atol=1e-6)
    _check_final(file, result, run.state)


def _check_constants(file: GoldenFile, result: Comparison, run: Run) -> None:
    """Learning rate and temperature of every step, and the candidates of every layer."""
    steps = jnp.arange(len(file["step/lr"]))
    result.exact("steps", run.steps * run.config["epochs"], len(steps))
    result.close("step/lr", jax.vmap(run.schedule)(steps), file["step/lr"], atol=1e-6 * run.config["init_lr"])
    result.close("step/temp", jax.vmap(run.temperature)(steps), file["step/temp"], rtol=1e-6)
    for name in SEARCHED:
        for place in ("init", "final"):
            result.exact(f"{place}/{name}.qvals", file[f"{place}/{name}.qvals"], np.float32(run.config["values"]))


def _train(file: GoldenFile, run: Run) -> dict[str, Any]:
    """Trains to the end; returns every recorded quantity."""
    run_steps = compile_train_steps(run.parts, all_devices())
    evaluate = compile_eval_step(run.parts.network, lambda images: images, all_devices())
    batch = run.config["batch_size"]
    held_out = nhwc(file["data/Xv"]), jnp.asarray(file["data/Yv"], jnp.int32)
    own: dict[str, Any] = {"loss": [], **{f"index_{name}": [] for name in SEARCHED}}
    own |= {f"alpha_{name}": [None] for name in SEARCHED}
    rows = []
    for _ in range(run.config["epochs"]):
        totals = {"count": 0.0, "loss": 0.0, "correct": 0.0, "correct5": 0.0}
        for indices in np.arange(run.steps * batch, dtype=np.int32).reshape(run.steps, 1, batch):
            for name, logits in run.logits().items():
                own[f"index_{name}"].append(kernel_to_pytorch(categorical.chosen_index(logits)))
            plan = all_devices().pad_rows(indices, np.ones(indices.shape, bool))
            run.state, metrics = run_steps(run.state, run.constants, *plan)
            own["loss"].append(metrics["loss"][0])
            for name in totals:
                totals[name] += float(metrics[name][0] * (metrics["count"][0] if name == "loss" else 1))
            for name, logits in run.logits().items():
                own[f"alpha_{name}"].append(logits_to_pytorch(logits))
        count, test = totals["count"], _evaluated(evaluate, run.state, held_out, batch)
        trained = [totals[name] / count for name in ("loss", "correct", "correct5")]
        rows.append([*trained, *(test[name] / test["count"] for name in ("loss", "correct1", "correct5"))])
    names = ("train_loss", "train_acc1", "train_acc5", "val_loss", "val_acc1", "val_acc5")
    return {**own, **dict(zip(names, np.transpose(rows)))}


def _evaluated(evaluate: Any, state: TrainState, held_out: tuple[jax.Array, jax.Array], batch: int) -> dict[str, float]:
    """Sums over the held-out images."""
    plan = all_devices().pad_rows(*sequential_plan(len(held_out[1]), batch))
    sums = [evaluate(state.variables, *held_out, indices, mask) for indices, mask in zip(*plan)]
    return {name: float(np.sum([row[name] for row in sums])) for name in sums[0]}


# Of a start whose logits are almost tied, at the published width of the noise: how many weights may choose otherwise
# where another convolution's rounding first moves one, and the first step at which that can be.
HANDFUL, FIRST_STEP_OF_CHAOS = 5, 2


def _has_near_ties(run: Run) -> bool:
    """Whether the start is the published one: its two highest logits are closer than 2**-10 somewhere."""
    gaps = [np.diff(np.sort(np.asarray(logits), axis=0)[-2:], axis=0).min() for logits in run.logits().values()]
    return min(gaps) < 2.0**-10


def _check_choices(file: GoldenFile, result: Comparison, own: Mapping[str, Any], *, near_ties: bool) -> int:
    """The index in use in every forward pass; returns the number of steps whose choices all agree.

    From almost tied logits the run is chaotic: it is compared as far as the choices agree, and a few may then differ.
    """
    wrong = sum(
        (np.stack(own[f"index_{name}"]) != file[f"step/index_{name}"]).reshape(len(own["loss"]), -1).sum(axis=1)
        for name in SEARCHED
    )
    agreed = int(np.argmax(wrong > 0)) if wrong.any() else len(wrong)
    if not near_ties:
        result.at_most("step/index: choices that differ", int(wrong.sum()), 0)
    elif agreed < len(wrong):
        result.at_most("step/index: choices that differ at first", int(wrong[agreed]), HANDFUL)
        result.require(f"step/index: agree before step {FIRST_STEP_OF_CHAOS}", agreed >= FIRST_STEP_OF_CHAOS)
        result.notes.append(f"{wrong[agreed]} choices differ at step {agreed}; compared up to there")
    return agreed


def _check_final(file: GoldenFile, result: Comparison, state: TrainState) -> None:
    """Parameters and running statistics after the last step."""
    flat = flatten_dict(jax.device_get(state.variables), sep="/")
    for name, reference in file.group("final/").items():
        path = None if name.endswith("qvals") else our_path(name)
        if name.endswith("num_batches_tracked"):
            result.exact(f"final/{name}", int(state.step), reference)
        elif path is not None:
            relative(result, f"final/{name}", to_pytorch(name, flat[path]), reference, 1e-3)
