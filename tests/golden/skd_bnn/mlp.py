"""Check of the MNIST MLP: one recorded training step, evaluation, and two epochs with Adam."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import networks, schedules
from bnn_jax.experiment.start import create_state, variable_shapes
from bnn_jax.objectives.self_distill import elementwise_distance
from bnn_jax.stages import OptimSpec, ParameterGroup, spec
from bnn_jax.storage import pytorch
from bnn_jax.training.devices import all_devices
from bnn_jax.training.optimizer import make_optimizer
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import Constants, StepParts, compile_end_of_epoch, compile_train_steps
from tests.golden.asbq.support import nhwc
from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.skd_bnn.models import evaluated
from tests.golden.skd_bnn.support import (
    SIGN,
    compare_gradients,
    compare_variables,
    held,
    loss_terms,
    pair_losses,
    record_step,
    relative_to_largest,
    weighted,
)

# What the files' README fixes: the cosine's length and the release's lowest rate.
COSINE_EPOCHS, FINAL_RATE = 4, 1e-5

# A bias before a BatchNorm has no true gradient: rounding noise decides which way Adam moves it, and the mean follows.
NOISE = r"fc[123]\.bias|bn[123]\.running_mean"


def check_mnist_mlp(file: GoldenFile, result: Comparison) -> None:
    """Forward of both streams, losses, gradients, evaluation, and a trajectory."""
    initial = file.group("init/")
    network = networks.build(
        spec("hardtanh_mlp", hidden=int(file["hidden"]), dropout=0.0), SIGN, num_classes=len(initial["fc4.bias"])
    )
    x = file["x"]
    images = jnp.stack([nhwc(batch) for batch in x])
    variables = pytorch.import_state(initial, variable_shapes(network, images.shape[2:]))
    _check_step(file, result, network, variables, images[0])
    logits = evaluated(network, variables, images[0]).logits
    result.close("eval_logsoftmax", jax.nn.log_softmax(logits), file["eval_logsoftmax"], atol=1e-4)
    _check_trajectory(file, result, network, variables, images)


def _check_step(
    file: GoldenFile, result: Comparison, network: Any, variables: Mapping[str, Any], images: jax.Array
) -> None:
    """Outputs, losses and gradients of the first batch with the file's bank."""
    terms = loss_terms(mlp=True)
    step = record_step(network, variables, images, file["y"][0], terms=terms, bank=file["bank"], knobs={})
    outputs = step.outputs
    result.close("penult_logits", outputs.logits, file["penult_logits"], atol=1e-4)
    result.close("logsoftmax", jax.nn.log_softmax(outputs.logits), file["logsoftmax"], atol=1e-4)
    result.exact("pairs", len(outputs.block_features), len(file["feature_losses"]))
    for number, pair in enumerate(zip(outputs.block_features, outputs.real_features), start=1):
        for stream, own in zip(("bin", "real"), pair):
            result.close(f"{stream}{number}", own, file[f"{stream}{number}"], atol=1e-4)
    distances = pair_losses(outputs, elementwise_distance)
    relative_to_largest(result, "feature_losses", distances, file["feature_losses"], rtol=1e-4)
    own = jnp.stack(list(weighted(step.metrics, terms).values()))
    name = "losses_ce_feature_label_cluster_total"
    result.close(name, own, file[name], rtol=1e-4)
    compare_gradients(result, "grad/", step.gradients, file.group("grad/"), rtol=1e-3, truly_zero=r"fc[123]\.bias")


def _training(
    network: Any, variables: Mapping[str, Any], rates: np.ndarray, steps: int
) -> tuple[StepParts, TrainState]:
    """Parts and first state of a run with Adam, the rate of every epoch as the file states it."""
    recipe = OptimSpec(
        optimizer=spec("adam"),
        learning_rate=spec("constant", value=0.0),
        epochs=len(rates),
        batch_size=1,
        groups=(ParameterGroup(r"^fc[123]/bias$", bounds=(-1.0, 1.0)), ParameterGroup(".*")),
    )
    terms = loss_terms(mlp=True)
    optimizer = make_optimizer(recipe, variables["params"], schedule=held(rates, steps=steps))
    parts = StepParts(
        network=network, objectives=terms, optimizer=optimizer, prepare=lambda images, key: images, knobs={}
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


def _check_trajectory(
    file: GoldenFile, result: Comparison, network: Any, variables: Mapping[str, Any], images: jax.Array
) -> None:
    """Losses of every step, the bank each epoch has collected, the state at the end."""
    rates, labels = file["traj_lr"], file["y"]
    epochs, steps, rows = len(rates), images.shape[0], images.shape[1]
    check_rates(result, rates)
    parts, state = _training(network, variables, rates, steps)
    run, end_of_epoch = compile_train_steps(parts, all_devices()), compile_end_of_epoch(parts.objectives, all_devices())
    constants = Constants(
        images=images.reshape(-1, *images.shape[2:]), labels=jnp.asarray(labels.reshape(-1), jnp.int32), teacher={}
    )
    totals, label_losses, banks = [], [], []
    for _ in range(epochs):
        for step in range(steps):
            indices = np.arange(step * rows, (step + 1) * rows, dtype=np.int32)[None]
            state, metrics = run(state, constants, *all_devices().pad_rows(indices, np.ones(indices.shape, bool)))
            own = weighted({name: value[0] for name, value in metrics.items()}, parts.objectives)
            totals.append(own["total"])
            label_losses.append(own["label"])
        bank = jax.tree.map(np.asarray, state.objective_state["label_bank"])
        with np.errstate(invalid="ignore"):
            banks.append(bank["sum"] / bank["count"][:, None])
        state = end_of_epoch(state)
        result.exact("bank after the epoch", state.objective_state["label_bank"]["bank"], np.zeros_like(banks[-1]))
    result.close("traj_total_loss", totals, file["traj_total_loss"], atol=1e-4)
    result.close("traj_label_loss", label_losses, file["traj_label_loss"], atol=1e-4)
    known = ~np.isnan(file["traj_banks"])
    result.exact("traj_banks, known classes", ~np.isnan(banks), known)
    result.close("traj_banks", banks, file["traj_banks"], atol=1e-4, where=known)
    compare_variables(
        result, "final/", state.variables, file.group("final/"), parameters=1e-4, statistics=1e-4, left_out=NOISE
    )


def check_rates(result: Comparison, rates: np.ndarray) -> None:
    """The library's cosine gives the file's rates."""
    cosine = spec("cosine_by_epoch", initial=float(rates[0]), final=FINAL_RATE)
    schedule = schedules.build(cosine, steps_per_epoch=1, epochs=COSINE_EPOCHS)
    result.close("traj_lr", [schedule(jnp.int32(epoch)) for epoch in range(len(rates))], rates, rtol=1e-6)
