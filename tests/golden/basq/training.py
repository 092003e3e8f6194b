"""Checks of training: schedules, the first steps of activations, steps of both phases, fine-tuning."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from bnn_jax import objectives, schedules
from bnn_jax.experiment.start import create_state
from bnn_jax.methods import basq
from bnn_jax.quantizers import QuantContext
from bnn_jax.quantizers.branch_clip import PUBLISHED_DECAYS
from bnn_jax.search.folds import make_folds
from bnn_jax.stages import OptimSpec, spec
from bnn_jax.training.devices import all_devices
from bnn_jax.training.optimizer import group_labels, make_optimizer
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import Constants, StepParts, train_step
from tests.golden.asbq.support import nhwc
from tests.golden.basq.models import flat_of, nested, variable_shapes_of
from tests.golden.basq.support import Variables, place_of, quant_spec, relative_to_largest, tiny_network
from tests.golden.comparison import Comparison, GoldenFile

WEIGHT_DECAY = 5e-6
CLIP_NORM = 10.0
LEARNING_RATE = 3.75e-4


def check_schedules(file: GoldenFile, result: Comparison) -> None:
    """Learning rates of the supernet, step by step, and of the fine-tuning, epoch by epoch."""
    rates = file["supernet_lr_Tmax1000"]
    schedule = schedules.build(
        spec("cosine_by_step", initial=float(rates[0]), steps=1000), steps_per_epoch=1, epochs=len(rates)
    )
    result.close("supernet_lr_Tmax1000", schedule(jnp.arange(len(rates))), rates, atol=1e-9)
    rates = file["finetune_lr"]
    schedule = schedules.build(spec("cosine_by_epoch", initial=float(rates[0])), steps_per_epoch=1, epochs=len(rates))
    result.close("finetune_lr", schedule(jnp.arange(len(rates))), rates, atol=1e-9)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A file's network and its variables' names.

    Attributes:
      network: our network.
      names: conversion between the file's arrays and ours.
      variables: the state before the first step, on the device.
    """

    network: Any
    names: Variables
    variables: dict[str, Any]


def setting_of(file: GoldenFile, images: jax.Array, start: Mapping[str, np.ndarray], *, weights: bool) -> Setting:
    """The network of a file with the variables it starts from."""
    network, head = tiny_network(
        file["setting_tcns"],
        head_width=int(file["last_channel"]),
        num_classes=int(file["num_classes"]),
        quant=quant_spec(int(file["bits"]), quantize_weights=weights),
    )
    names = Variables(variable_shapes_of(network, images[:1]), head)
    return Setting(network, names, nested(names.to_ours(start)))


def check_first_steps(file: GoldenFile, result: Comparison) -> None:
    """The pass over the first batch that sets the steps of all activation quantizers."""
    x = nhwc(file["x"])
    start = file.group("p/")
    setting = setting_of(file, x, start, weights=False)
    flat = flat_of(setting.variables)
    without = nested({path: value for path, value in flat.items() if not path.endswith("act_quantizer/step")})
    genes = len(setting.network.branch_patterns)
    ctx = QuantContext(train=True, choice=jnp.asarray(file["drawn18"][:genes], jnp.int32))
    # Linen asks for a key where a parameter is made; this one is made from the data.
    options = {"mutable": ["params", "batch_stats"], "rngs": {"params": jax.random.key(0)}}
    run = jax.jit(lambda v, x: setting.network.apply(v, x, ctx, **options)[1])
    after = {**flat, **flat_of(run(without, x))}
    reference = file.group("after/")
    own = setting.names.by_name(after, {**start, **reference})
    for name, value in own.items():
        if name not in reference:
            result.close(f"{name}, unchanged", value, start[name], atol=1e-6)
        elif name.endswith(".s"):
            relative_to_largest(result, f"after/{name}", value, reference[name], 1e-4)
        else:
            result.close(f"after/{name}", value, reference[name], atol=1e-5, rtol=1e-5)
    result.require("all changed entries are compared", set(reference) <= set(own))


class RecordedTeacher:
    """Answers with logits that were recorded for each step."""

    @staticmethod
    def apply(variables: dict[str, jax.Array], images: jax.Array, ctx: QuantContext) -> Any:
        """The logits of the context's step."""
        return types.SimpleNamespace(logits=variables["logits"][ctx.step])


def with_norms(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The optimiser with the norm of the last gradient, before clipping, in front of its state."""

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        changes, inner = optimizer.update(grads, state[1], params, **extra)
        return changes, (optax.tree.norm(grads), inner)

    return optax.GradientTransformationExtraArgs(lambda params: (jnp.zeros(()), optimizer.init(params)), update)


def start_of(setting: Setting, parts: StepParts) -> TrainState:
    """The state before the first step."""
    return create_state(
        setting.variables,
        optimizer=parts.optimizer,
        objectives=parts.objectives,
        num_classes=setting.network.num_classes,
        seed=0,
        devices=all_devices(),
    )


def check_trajectory(file: GoldenFile, result: Comparison) -> None:
    """Training steps of the supernet with the recorded paths and the recorded answers of the teacher."""
    file.not_compared("dev_f32_f64.*|max_dev.*|margin|kd_loss_f64|w_bin")
    phase, unselected = file.path.stem.removeprefix("traj_").split("_")
    steps, batch = file["x"].shape[:2]
    images = nhwc(file["x"].reshape(-1, *file["x"].shape[2:]))
    setting = setting_of(file, images, file.group("p0/"), weights=phase == "phase2")
    genes = len(setting.network.branch_patterns)
    rate = schedules.build(
        spec("cosine_by_step", initial=LEARNING_RATE, steps=int(file["T_max"])), steps_per_epoch=1, epochs=steps
    )
    result.close("lr", rate(jnp.arange(steps)), file["lr"], atol=1e-9)
    optim = _optim("adam", groups=basq.supernet_groups(PUBLISHED_DECAYS, weight_decay=WEIGHT_DECAY))
    optim = dataclasses.replace(optim, unselected_branches={"zeros": "decay", "none": "freeze"}[unselected])
    _check_groups(file, result, setting, optim)
    selection = jnp.asarray(file["selection18"][:, :genes], jnp.int32)
    parts = _parts(setting, optim, rate, spec("distillation", weight=1.0, measure="cross_entropy"))
    parts = dataclasses.replace(parts, choose=lambda key, step: selection[step], teacher=RecordedTeacher())
    constants = Constants(images, jnp.zeros(len(images), jnp.int32), {"logits": jnp.asarray(file["teacher"])})
    states, losses, norms = _run(parts, start_of(setting, parts), constants, steps=steps, batch=batch)
    result.close("kd_loss", losses, file["kd_loss"], atol=1e-5)
    result.close("gnorm_preclip", norms, file["gnorm_preclip"], atol=1e-5)
    _check_bounds(file, result, setting, states)
    _check_end(file, result, setting, states[-1], slack=4 * LEARNING_RATE * steps)


def _optim(optimizer: str, *, groups: Any, **options: Any) -> OptimSpec:
    return OptimSpec(
        spec(optimizer, **options), spec("constant", value=0.0), 1, 1, groups=groups, gradient_clip_norm=CLIP_NORM
    )


def _parts(setting: Setting, optim: OptimSpec, rate: Any, objective: Any) -> StepParts:
    optimizer = make_optimizer(
        optim, setting.variables["params"], schedule=rate, branch_patterns=setting.network.branch_patterns
    )
    return StepParts(
        network=setting.network,
        objectives=(objectives.build(objective),),
        optimizer=with_norms(optimizer),
        prepare=lambda images, key: images,
    )


def _run(
    parts: StepParts, state: TrainState, constants: Constants, *, steps: int, batch: int
) -> tuple[list[TrainState], list[float], list[float]]:
    """States after every step, losses and gradient norms."""
    run = jax.jit(lambda state, rows: train_step(parts, state, constants, rows, rows >= 0))
    states, losses, norms = [], [], []
    for step in range(steps):
        state, metrics = run(state, jnp.arange(step * batch, (step + 1) * batch))
        states.append(state)
        losses.append(float(metrics["loss"]))
        norms.append(float(state.opt_state[0]))
    return states, losses, norms


def _check_groups(file: GoldenFile, result: Comparison, setting: Setting, optim: OptimSpec) -> None:
    """The weight decay of every parameter is that of the published groups."""
    labels = flatten_dict(group_labels(setting.variables["params"], optim.groups), sep="/")
    decays = [0.0, WEIGHT_DECAY, *PUBLISHED_DECAYS]
    wrong = []
    for name, index in zip(file["group_names"], file["group_index"]):
        path, branch = place_of(str(name), head=setting.names.head)  # type: ignore[misc]
        if path.removeprefix("params/") not in labels:
            continue
        decay = optim.groups[int(labels[path.removeprefix("params/")])].weight_decay
        own = decay[branch] if isinstance(decay, tuple) else decay
        wrong += [str(name)] if own != decays[int(index)] else []
    result.require(f"weight decay of {wrong[:3]} as published", not wrong)


def _check_bounds(file: GoldenFile, result: Comparison, setting: Setting, states: list[TrainState]) -> None:
    """All clip values after every step."""
    names = [str(name) for name in file["ub_names"]]
    rows = []
    for state in states:
        flat = flat_of({"params": state.params})
        own = setting.names.by_name(flat, {name: np.zeros(()) for name in names})
        rows.append([float(own[name]) for name in names])
    result.close("ub_traj", rows, file["ub_traj"], atol=1e-6)


def _check_end(file: GoldenFile, result: Comparison, setting: Setting, state: TrainState, *, slack: float) -> None:
    """Everything after the last step; what the file does not list has not changed.

    Biases without a true gradient walk at random under Adam, and the running means behind them follow. Of the other
    entries, one in a thousand may be a bias of that kind by chance.
    """
    start, end = file.group("p0/"), file.group("pend/")
    without_gradient = set(map(str, file["zero_grad_bias_names"]))
    own = setting.names.by_name(flat_of(state.variables), start)
    result.require("entries that changed are ours", set(end) <= set(own))
    beyond = total = 0
    for name, value in own.items():
        reference = end.get(name, start[name])
        if name in without_gradient or name.endswith("running_mean"):
            result.close(f"pend/{name}", value, reference, atol=4e-3)
            continue
        error = np.abs(value - reference)
        beyond, total = beyond + int(np.sum(error > 2e-5)), total + error.size
        result.at_most(f"pend/{name}", float(error.max()), slack if name in end else 1e-6)
    result.at_most("share of entries beyond 2e-5", beyond / total, 1e-3)


def check_finetuning(file: GoldenFile, result: Comparison) -> None:
    """Fine-tuning of one path, and its accuracy on the other folds after each epoch."""
    file.not_compared("margin|names_(skip|bin)")
    epochs, (steps, batch) = int(file["epochs"]), file["x_train"].shape[:2]
    images = nhwc(file["x_train"].reshape(-1, *file["x_train"].shape[2:]))
    setting = setting_of(file, images, file.group("p0/"), weights=True)
    rate = schedules.build(
        spec("cosine_by_epoch", initial=float(file["lr_base"])), steps_per_epoch=steps, epochs=epochs
    )
    result.close("lr_steps", rate(jnp.arange(epochs * steps)), file["lr_steps"], rtol=1e-6)
    groups = basq.finetune_groups(PUBLISHED_DECAYS)
    optim = _optim("sgd", groups=groups, momentum=0.9, nesterov=True)
    optim = dataclasses.replace(optim, unselected_branches="freeze")
    _check_trained(file, result, setting, optim)
    path = jnp.asarray(file["arch"], jnp.int32)
    parts = _parts(setting, optim, rate, spec("cross_entropy", weight=1.0))
    labels = jnp.asarray(file["y_train"].reshape(-1), jnp.int32)
    # The same batches in every epoch.
    constants = Constants(jnp.tile(images, (epochs, 1, 1, 1)), jnp.tile(labels, epochs), {}, path)
    states, losses, norms = _run(parts, start_of(setting, parts), constants, steps=epochs * steps, batch=batch)
    result.close("ce_loss", losses, file["ce_loss"], atol=1e-4)
    result.close("gnorm_preclip", norms, file["gnorm_preclip"], atol=1e-4)
    _check_accuracy(file, result, setting, states[steps - 1 :: steps], path)
    own = setting.names.by_name(flat_of(states[-1].variables), file.group("p0/"))
    end = file.group("pend/")
    for name, value in own.items():
        changed = name in end
        reference = end[name] if changed else file[f"p0/{name}"]
        result.close(f"pend/{name}", value, reference, atol=1e-3 if changed else 1e-6)


def _check_trained(file: GoldenFile, result: Comparison, setting: Setting, optim: OptimSpec) -> None:
    """Which parameters are trained at all, and the branch that decays each clip value."""
    labels = flatten_dict(group_labels(setting.variables["params"], optim.groups), sep="/")

    def group_of(name: str) -> tuple[int, int | None]:
        path, branch = place_of(name, head=setting.names.head)  # type: ignore[misc]
        return int(labels[path.removeprefix("params/")]), branch

    expected = (("names_bnbias", 0), ("names_bound", 1), ("names_weight", 2), ("names_other", 2))
    for key, group in expected:
        found = {group_of(str(name))[0] for name in file[key]}
        result.require(f"{key}: group {group}", found == {group})
    branches = [group_of(str(name))[1] for name in file["names_bound"]]
    result.exact("bound_branch", branches, file["bound_branch"])


def _check_accuracy(
    file: GoldenFile, result: Comparison, setting: Setting, states: list[TrainState], path: jax.Array
) -> None:
    labels = file["y_val"].reshape(-1)
    images = nhwc(file["x_val"].reshape(-1, *file["x_val"].shape[2:]))
    batches, batch = file["y_val"].shape
    folds = make_folds(
        np.zeros(len(labels), int), kind="contiguous", count=batches // int(file["max_val_iters"]), batch_size=batch
    )
    others = folds.others(int(file["fold"]))
    run = jax.jit(lambda v: setting.network.apply(v, images, QuantContext(choice=path)).logits)
    hits = [np.argmax(run(state.variables), axis=-1) == labels for state in states]
    accuracies = [100 * hit[others].mean() for hit in hits]
    result.close("val_acc_other_folds", accuracies, file["val_acc_other_folds"], atol=1e-4)
    result.close("best_acc", max(accuracies), file["best_acc"], atol=1e-4)
