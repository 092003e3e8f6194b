"""Pictures that objectives and quantizers offer of a finished stage: which there are, what each is drawn from."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnn_jax.objectives import Objective
from bnn_jax.report import codebook_plots, plots
from bnn_jax.report.codebooks import codebook_uses

# Test images whose features are drawn: enough to see groups, few enough for a minute of t-SNE.
MOST_IMAGES = 2000


@dataclasses.dataclass(frozen=True)
class FinishedStage:
    """What a stage left that pictures are drawn from.

    Attributes:
      name: of the stage.
      objectives: its loss terms.
      objective_state: their states after the last epoch.
      features: gives what the classifier reads for the first ``MOST_IMAGES`` test images, (N, D), and their labels.
      class_names: names of the classes.
      variables: gives the network's variables before the first step and after the last epoch.
    """

    name: str
    objectives: tuple[Objective, ...]
    objective_state: Mapping[str, Any]
    features: Callable[[], tuple[np.ndarray, np.ndarray]]
    class_names: tuple[str, ...]
    variables: Callable[[], tuple[Mapping[str, Any], Mapping[str, Any]]]


def draw_label_bank(stage: FinishedStage, path: Path) -> None:
    """The mean outputs of each class that the stage ended with; a class without a row is left blank."""
    objective = next(term for term in stage.objectives if "label_bank" in term.pictures)
    state = stage.objective_state[objective.name]
    bank = np.where(np.asarray(state["known"])[:, None], np.asarray(state["bank"]), np.nan)
    quantity = "mean log-probability" if getattr(objective, "log_softmax", False) else "mean logit"
    title = f"label bank of stage {stage.name} after the last epoch"
    plots.plot_label_bank(bank, stage.class_names, path, title=title, quantity=quantity)


def draw_features(stage: FinishedStage, path: Path) -> None:
    """What the classifier reads, in two dimensions."""
    features, labels = stage.features()
    title = f"features of stage {stage.name} after the last epoch"
    plots.plot_features(features, labels, stage.class_names, path, title=title)


def draw_pattern_use(stage: FinishedStage, path: Path) -> None:
    """How the kernels of each layer use its codebook."""
    initial, last = stage.variables()
    title = f"use of the codebooks of stage {stage.name} after the last epoch"
    codebook_plots.plot_pattern_use(codebook_uses(last, initial), path, title=title)


def draw_pattern_motion(stage: FinishedStage, path: Path) -> None:
    """How far training moved the codebook of each layer."""
    initial, last = stage.variables()
    title = f"motion of the codebooks in stage {stage.name}, from its start to after the last epoch"
    codebook_plots.plot_pattern_motion(codebook_uses(last, initial), path, title=title)


PICTURES: dict[str, Callable[[FinishedStage, Path], None]] = {
    "label_bank": draw_label_bank,
    "features": draw_features,
    "pattern_use": draw_pattern_use,
    "pattern_motion": draw_pattern_motion,
}


def offered(parts: Iterable[Any]) -> tuple[str, ...]:
    """Names of the pictures a stage made of these parts can show, in the order of ``PICTURES``.

    Args:
      parts: its objectives and weight quantizers; each has ``pictures``, a set of names.
    """
    names = frozenset().union(*(part.pictures for part in parts))
    return tuple(name for name in PICTURES if name in names)
