"""Costs of a stage's network."""

import dataclasses

from bnn_jax.experiment.build import (
    Run,
)
from bnn_jax.experiment.check import network_of
from bnn_jax.experiment.results import is_winner
from bnn_jax.report.costs import Complexity, complexity


def summary(run: Run, *, stage_name: str | None = None) -> Complexity:
    """Costs of a stage's network, layer by layer; None is the last stage.

    Raises:
      UserError: no such stage, or its network cannot be built.
    """
    stage = run.find(stage_name) if stage_name else run.stages[-1]
    network, _ = network_of(run, stage)
    if is_winner(stage):
        network = network.clone(branches=1)
    image_shape, _ = run.describe(stage)
    title = f"Stage {stage.name}: {stage.network.name}, images of {'x'.join(map(str, image_shape))}"
    others = [f"--stage={other.name}" for other in run.stages if other is not stage]
    if others:
        title += f"\n(other stages: {', '.join(others)})"
    return dataclasses.replace(complexity(network, image_shape), title=title)
