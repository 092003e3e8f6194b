"""Loss terms that a config adds to the stages of any method."""

import importlib
from typing import Any

import pytest

from bnn_jax import methods
from bnn_jax.errors import UserError
from bnn_jax.experiment.config import validate
from bnn_jax.stages import Stage, spec

EXTRA = ("feature_swap", "label_bank", "cluster")


def stages(name: str, **changes: Any) -> tuple[Stage, ...]:
    chosen = importlib.import_module(f"configs.{name}").get_config().to_dict()
    for key, value in changes.items():
        if key == "distill":
            chosen["skd"][key] = value
        else:
            chosen[key] = value
    return methods.build(validate(chosen))


def test_nothing_is_added_by_default():
    assert stages("asbq_resnet20") == methods.METHODS["asbq"](
        validate(importlib.import_module("configs.asbq_resnet20").get_config().to_dict())
    )


def test_the_shipped_combination_adds_all_three_terms_to_the_last_rung_with_the_published_weights():
    plain, combined = stages("asbq_resnet20"), stages("asbq_skd_resnet20")
    assert combined[:-1] == plain[:-1]
    added = (spec("feature_swap", weight=1.0), spec("label_bank", weight=0.05), spec("cluster", weight=0.01))
    assert combined[-1].objectives == plain[-1].objectives + added
    assert combined[-1].bits == 1.0


def test_terms_can_be_added_to_all_stages():
    for stage in stages("asbq_resnet20", extra_objectives=("cluster",), extra_objectives_on="all_stages"):
        assert stage.objectives[-1] == spec("cluster", weight=0.01)


def test_weights_can_be_given():
    chosen = {"extra_objectives": ("cluster", "label_bank"), "extra_objective_weights": (0.5, 2)}
    last = stages("asbq_resnet20", **chosen)[-1]
    assert last.objectives[-2:] == (spec("cluster", weight=0.5), spec("label_bank", weight=2.0))


def test_terms_can_be_added_to_irnet_alone():
    (stage,) = stages("irnet_resnet20", extra_objectives=("label_bank",))
    assert [term.name for term in stage.objectives] == ["cross_entropy", "label_bank"]


def test_features_without_positions_are_compared_element_by_element():
    (stage,) = stages("skd_mnist_mlp", distill=False, extra_objectives=("feature_swap",))
    assert stage.objectives[-1] == spec("feature_swap", weight=1.0, compare="elementwise")


@pytest.mark.parametrize("name", EXTRA)
def test_a_term_that_is_there_already_is_refused(name):
    with pytest.raises(UserError, match=rf"^config\.extra_objectives: '{name}' is part of stage train already$"):
        stages("skd_resnet20", extra_objectives=(name,))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0)])
def test_weights_that_do_not_fit_the_terms_are_refused(weights):
    with pytest.raises(UserError, match=r"^config\.extra_objective_weights=.*: accepted is none, or one for each of"):
        stages("asbq_resnet20", extra_objectives=("cluster", "label_bank"), extra_objective_weights=weights)
