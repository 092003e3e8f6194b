"""Checks of the released ResNet-20's training: one step in full detail, and three epochs with the label bank."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import schedules
from bnn_jax.experiment.start import create_state
from bnn_jax.objectives.self_distill import channel_and_spatial_distance
from bnn_jax.stages import OptimSpec, ParameterGroup, spec
from bnn_jax.training.devices import all_devices
from bnn_jax.training.optimizer import make_optimizer
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import Constants, StepParts, compile_end_of_epoch, compile_train_steps
from tests.golden.asbq.support import in_pytorch_form, nchw, normalised
from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.skd_bnn.models import feature_statistics, load_state
from tests.golden.skd_bnn.support import (
    TERMS,
    RecordedStep,
    compare_estimator,
    compare_gradients,
    compare_variables,
    held,
    loss_terms,
    pair_losses,
    record_step,
    relative_to_largest,
    state_by_name,
    weighted,
)


def images_of(file: GoldenFile) -> np.ndarray:
    """The uint8 images (N, H, W, C) a file points to: rows of the images file in its own folder.

    Raises:
      FileNotFoundError: the folder has no file of images.
    """
    found = sorted(file.path.parent.glob("resnet20_*_images_logits.npz"))
    if not found:
        raise FileNotFoundError(f"{file.path.name} needs resnet20_best_images_logits.npz beside it")
    return GoldenFile(found[0])["images_u8_nhwc"][file["idx_into_256"]]


def check_train_step_vectors(file: GoldenFile, result: Comparison) -> None:
    """One training step: outputs, losses, feature maps, all gradients, the norm of each term's gradient."""
    network, variables = load_state(file.path, str(file["state"]))
    for match in file.cases(r"epoch_of_(\d+)$"):
        compare_estimator(result, "", file, epoch=int(file[match.group()]), epochs=int(match.group(1)))
    terms = loss_terms()
    step = record_step(
        network,
        variables,
        normalised(images_of(file)),
        file["labels"],
        terms=terms,
        bank=file["bank"],
        knobs={f"error_decay_{name}": held(file[name]) for name in ("k", "t")},
        log_gradient_norms=True,
    )
    result.close("logits", step.outputs.logits, file["logits"], atol=1e-4)
    result.close("penultimate", step.outputs.features, file["penultimate"], atol=1e-4)
    for name, value in weighted(step.metrics, terms).items():
        result.close(f"loss_{name}", value, file[f"loss_{name}"], rtol=1e-4)
    for name, ours in TERMS.items():
        result.close(f"gradnorm_{name}", step.metrics[f"gradient_norm/{ours}"], file[f"gradnorm_{name}"], rtol=1e-3)
    _check_features(file, result, step, network.stage_sizes)
    compare_gradients(result, "grad/", step.gradients, state_by_name(file.group("grad/")), rtol=1e-3)
    compare_variables(
        result,
        "buffer_after/",
        step.state.variables,
        state_by_name(file.group("buffer_after/")),
        parameters=0.0,
        statistics=1e-4,
    )


def _check_features(file: GoldenFile, result: Comparison, step: RecordedStep, stage_sizes: tuple[int, ...]) -> None:
    """Numbers about every pair of feature maps, and whole maps of some images at some places."""
    pairs = list(zip(step.outputs.block_features, step.outputs.real_features, strict=True))
    count = len(pairs)
    losses = pair_losses(step.outputs, channel_and_spatial_distance)
    result.close(f"feature_losses_{count}", losses, file[f"feature_losses_{count}"], rtol=1e-4)
    statistics = feature_statistics(step)
    names = ("mean_bin", "absmean_bin", "mean_real", "absmean_real", "sign_agreement")
    for column, name in zip(statistics.T, names, strict=True):
        result.close(f"{name}_{count}", column, file[f"{name}_{count}"], atol=1e-4)
    for match in file.cases(r"L(\d+)_(\d+)_(bin|real)_img(\d+)(?:to(\d+))?$"):
        stage, place, stream, first, last = match.groups()
        # Two pairs for each block of the stages before.
        index = 2 * sum(stage_sizes[: int(stage) - 1]) + int(place) - 1
        feature = nchw(pairs[index][("bin", "real").index(stream)])
        own = feature[int(first)] if last is None else feature[int(first) : int(last) + 1]
        result.close(match.group(), own, file[match.group()], atol=1e-4)


def check_trajectory(file: GoldenFile, result: Comparison) -> None:
    """Losses of every step, the bank and some arrays after every epoch, the state at the end."""
    network, variables = load_state(file.path, str(file["init_state"]))
    epochs, batch = int(file["n_epochs_run"]), int(file["batch"])
    top, bottom, left, right = file["crop"]
    images, labels = images_of(file)[:, top:bottom, left:right], file["labels"]
    steps = len(labels) // batch
    check_schedules(file, result, epochs)
    parts, state = _training(file, network, variables, steps)
    run, end_of_epoch = compile_train_steps(parts, all_devices()), compile_end_of_epoch(parts.objectives, all_devices())
    constants = Constants(images=jnp.asarray(images), labels=jnp.asarray(labels, jnp.int32), teacher={})
    losses, banks, states = [], [], []
    for _ in range(epochs):
        for indices in np.arange(steps * batch, dtype=np.int32).reshape(steps, 1, batch):
            state, metrics = run(state, constants, *all_devices().pad_rows(indices, np.ones(indices.shape, bool)))
            own = weighted({name: value[0] for name, value in metrics.items()}, parts.objectives)
            top1 = 100 * metrics["correct"][0] / metrics["count"][0]
            losses.append([*(own[name] for name in ("total", "feature", "label", "cluster")), top1])
        state = end_of_epoch(state)
        banks.append(np.array(state.objective_state["label_bank"]["bank"]))
        states.append(jax.tree.map(np.array, state.variables))
    name = "steps_total_feature_label_cluster_top1"
    result.close(name, np.array(losses).reshape(epochs, steps, 5), file[name], atol=1e-4)
    known = ~np.isnan(file["banks"])
    result.exact("banks, known classes", ~np.isnan(banks), known)
    result.close("banks", banks, file["banks"], atol=1e-4, where=known)
    final = state_by_name(file.group("final/"))
    compare_variables(result, "final/", states[-1], final, parameters=1e-5, statistics=1e-5)
    _check_arrays_per_epoch(file, result, states, final)


def check_schedules(file: GoldenFile, result: Comparison, epochs: int) -> None:
    """The library's schedules give the file's learning rates, k and t."""
    options = {"initial": float(file["base_lr"]), "warmup_epochs": int(file["warmup_W"])}
    specs = {"lr": spec("cosine_by_epoch", **options), "k": spec("error_decay_k"), "t": spec("error_decay_t")}
    for name, choice in specs.items():
        schedule = schedules.build(choice, steps_per_epoch=1, epochs=int(file["epochs_E"]))
        result.close(name, schedule(jnp.arange(epochs)), file[name], rtol=1e-6)


def _training(file: GoldenFile, network: Any, variables: Mapping[str, Any], steps: int) -> tuple[StepParts, TrainState]:
    """Parts and first state: SGD as the file says, its rates, k and t epoch by epoch, an empty bank."""
    recipe = OptimSpec(
        optimizer=spec("sgd", momentum=float(file["momentum"]), nesterov=False),
        learning_rate=spec("constant", value=0.0),
        epochs=1,
        batch_size=1,
        groups=(ParameterGroup(".*", weight_decay=float(file["weight_decay"])),),
    )
    optimizer = make_optimizer(
        recipe,
        variables["params"],
        schedule=held(file["lr"], steps=steps),
        unused_parameters=network.unused_parameters,
    )
    terms = loss_terms()
    parts = StepParts(
        network=network,
        objectives=terms,
        optimizer=optimizer,
        prepare=lambda images, key: normalised(images),
        knobs={f"error_decay_{name}": held(file[name], steps=steps) for name in ("k", "t")},
    )
    state = create_state(
        dict(variables),
        optimizer=optimizer,
        objectives=terms,
        num_classes=network.num_classes,
        seed=0,
        devices=all_devices(),
    )
    return parts, state


def _check_arrays_per_epoch(
    file: GoldenFile, result: Comparison, states: list[Mapping[str, Any]], final: Mapping[str, np.ndarray]
) -> None:
    """Arrays stored after each epoch, as '<name with underscores>_per_epoch'."""
    names = {name.replace(".", "_"): name for name in final}
    for match in file.cases(r"(.+)_per_epoch$"):
        name = names[match.group(1)]
        own = np.stack([in_pytorch_form(state, {name: final[name]})[name] for state in states])
        if "running_" in name:
            relative_to_largest(result, match.group(), own, file[match.group()], rtol=1e-5)
        else:
            result.close(match.group(), own, file[match.group()], atol=1e-5)
