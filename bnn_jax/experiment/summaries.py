"""Costs of a stage's network."""

import dataclasses

from bnn_jax.experiment.build import Experiment, described_network
from bnn_jax.report.costs import Complexity, complexity


def summary(experiment: Experiment, *, stage_name: str | None = None) -> Complexity:
    """Costs of a stage's network, layer by layer; None is the last stage.

    Raises:
      UserError: no such stage, or its network cannot be built.
    """
    stage = experiment.find(stage_name) if stage_name else experiment.stages[-1]
    network, _ = described_network(experiment, stage)
    if stage.trains_winner:
        network = network.clone(branches=1)
    image_shape, _ = experiment.describe(stage)
    title = f"Stage {stage.name}: {stage.network.name}, images of {'x'.join(map(str, image_shape))}"
    others = [f"--stage={other.name}" for other in experiment.stages if other is not stage]
    if others:
        title += f"\n(other stages: {', '.join(others)})"
    return dataclasses.replace(complexity(network, image_shape), title=title)
