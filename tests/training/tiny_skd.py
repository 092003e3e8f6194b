"""Self-distillation small enough that a training step compiles in seconds; see tiny.py for the data."""

from typing import Any

import jax

from bnn_jax import networks, objectives, schedules
from bnn_jax.experiment import start
from bnn_jax.stages import QuantSpec, Stage, spec
from bnn_jax.training.devices import Devices, all_devices
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import StepParts
from tests.training import tiny

IRNET = QuantSpec(weight=spec("irnet"), act=spec("irnet"))
# One block, which halves the image.
CHOICE = spec("hardtanh_resnet20", stage_sizes=(0, 1), widths=(4, 8))
NETWORK = networks.build(CHOICE, IRNET, num_classes=tiny.CLASSES)
TERMS = (
    spec("cross_entropy"),
    spec("feature_swap", weight=2.0),
    spec("label_bank", weight=0.5),
    spec("cluster", weight=0.1),
)
KNOBS = ("error_decay_k", "error_decay_t")


def build_terms(*choices: Any) -> tuple[objectives.Objective, ...]:
    """Objectives; all four by default."""
    return tuple(objectives.build(choice) for choice in choices or TERMS)


def parts(*, chosen: Stage | None = None, steps_per_epoch: int = 3, **options: Any) -> StepParts:
    """What the step is made of."""
    chosen = chosen or tiny.stage()
    timing = {"steps_per_epoch": steps_per_epoch, "epochs": chosen.optim.epochs}
    options = {
        "network": NETWORK,
        "objectives": build_terms(),
        "knobs": {name: schedules.build(spec(name), **timing) for name in KNOBS},
        **options,
    }
    return tiny.parts(chosen=chosen, steps_per_epoch=steps_per_epoch, **options)


def state(step_parts: StepParts, *, devices: Devices | None = None) -> TrainState:
    """A new state in buffers of its own."""
    return start.create_state(
        jax.tree.map(jax.numpy.array, tiny.variables(step_parts.network)),
        optimizer=step_parts.optimizer,
        objectives=step_parts.objectives,
        num_classes=tiny.CLASSES,
        seed=3,
        devices=devices or all_devices(),
        log_gradient_norms=step_parts.log_gradient_norms,
    )
