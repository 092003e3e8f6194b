"""Which pictures the objectives offer, and what they are drawn from."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnn_jax import objectives, quantizers
from bnn_jax.objectives import OBJECTIVES
from bnn_jax.report import pictures, plots
from bnn_jax.stages import spec


def build(*names: Any) -> tuple[objectives.Objective, ...]:
    return tuple(objectives.build(name if not isinstance(name, str) else spec(name)) for name in names)


def test_only_known_pictures_are_offered():
    for objective in build(*OBJECTIVES):
        assert objective.pictures <= set(pictures.PICTURES)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cross_entropy",), ()),
        (("cross_entropy", "distillation", "feature_swap"), ()),
        (("cross_entropy", "cluster"), ("features",)),
        (("cross_entropy", "label_bank"), ("label_bank", "features")),
        (("cluster", "label_bank"), ("label_bank", "features")),
        # A bank that is cleared at the end of every epoch has nothing to show.
        ((spec("label_bank", reset_each_epoch=True),), ("features",)),
    ],
)
def test_a_stage_offers_what_its_terms_offer(names, expected):
    assert pictures.offered(build(*names)) == expected


@pytest.mark.parametrize("choice", [spec("identity"), spec("irnet"), spec("codebook", tau=4)])
def test_quantizers_offer_known_pictures_through_pruning_too(choice):
    def offered(weight):
        return quantizers.build_weight(weight)(parent=None).pictures

    assert offered(choice) <= set(pictures.PICTURES)
    assert offered(spec("pruned", inner=choice)) == offered(choice)
    assert bool(offered(choice)) == (choice.name == "codebook")


@dataclasses.dataclass
class Drawn:
    """What the plots were called with."""

    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@pytest.fixture
def drawn(monkeypatch) -> Drawn:
    found = Drawn()

    def remember(*arguments: Any, **options: Any) -> None:
        found.arguments, found.options = arguments, options

    monkeypatch.setattr(plots, "plot_label_bank", remember)
    monkeypatch.setattr(plots, "plot_features", remember)
    return found


def stage(**bank: Any) -> pictures.FinishedStage:
    state = {"bank": np.arange(4.0).reshape(2, 2), "known": np.array([True, False])}
    return pictures.FinishedStage(
        name="w1a1",
        objectives=build("cross_entropy", spec("label_bank", **bank)),
        objective_state={"label_bank": state},
        features=lambda: (np.ones((3, 2)), np.array([0, 1, 0])),
        class_names=("cat", "dog"),
        variables=lambda: ({}, {}),
    )


def test_rows_of_classes_never_right_are_blank(drawn):
    pictures.PICTURES["label_bank"](stage(), Path("bank.png"))
    bank, names, path = drawn.arguments
    np.testing.assert_array_equal(bank, [[0.0, 1.0], [np.nan, np.nan]])
    assert (names, path) == (("cat", "dog"), Path("bank.png"))
    assert drawn.options == {"title": "label bank of stage w1a1 after the last epoch", "quantity": "mean logit"}


def test_a_bank_of_log_probabilities_is_named_so(drawn):
    pictures.PICTURES["label_bank"](stage(log_softmax=True), Path("bank.png"))
    assert drawn.options["quantity"] == "mean log-probability"


def test_features_are_those_of_the_stage(drawn):
    pictures.PICTURES["features"](stage(), Path("features.png"))
    features, labels, names, path = drawn.arguments
    np.testing.assert_array_equal(features, np.ones((3, 2)))
    np.testing.assert_array_equal(labels, [0, 1, 0])
    assert (names, path) == (("cat", "dog"), Path("features.png"))
