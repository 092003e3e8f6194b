import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from bnn_jax.experiment import adapt
from bnn_jax.stages import Inherit, spec
from bnn_jax.storage.pytorch import Misfit
from tests.training import tiny

STAGE = dataclasses.replace(
    tiny.stage(),
    inherit=Inherit("file:x.pth", ("params", "batch_stats", "quant_state"), recompute=("/mask$",), adapt=True),
)
IDENTITY = spec("identity")


def fresh(**options) -> dict:
    network: Any = tiny.TinyNetwork(**options)
    return tiny.variables(network)


def saved(**options) -> dict:
    """Arrays of a file, with other values than fresh ones."""
    return {path: np.asarray(leaf) + 1.5 for path, leaf in adapt.flat_arrays(fresh(**options)).items()}


def test_a_network_with_other_classes_keeps_all_but_its_classifier():
    found, target = saved(num_classes=9), fresh()
    plan = adapt.plan(STAGE, found, target)
    result = adapt.flat_arrays(adapt.adapted(plan, found, target))
    for path, value in adapt.flat_arrays(target).items():
        kept = value if path.startswith("params/fc/") else found[path]
        np.testing.assert_array_equal(result[path], kept, err_msg=path)
    assert plan.describe(STAGE) == [
        "stage tiny: starts from x.pth: 6 arrays",
        "stage tiny: the classifier 'fc' is made new: 9 classes there, 4 here",
    ]


def test_with_the_same_classes_the_classifier_is_copied():
    plan = adapt.plan(STAGE, saved(), fresh())
    assert not plan.classifier and not plan.new and set(plan.copied) == set(saved())


def test_what_belongs_to_quantizers_may_be_missing_and_is_made_from_what_was_copied():
    plan = adapt.plan(STAGE, saved(weight=IDENTITY), fresh())
    (new,) = plan.new
    assert new == "quant_state/conv/weight_quantizer/mask"
    assert plan.describe(STAGE)[1] == f"stage tiny: 1 arrays are not in it and are made new: {new}"
    assert adapt.recomputed(plan, STAGE) == (f"^{new}$",)
    # One that the file has is not made anew.
    assert adapt.recomputed(adapt.plan(STAGE, saved(), fresh()), STAGE) == ()


def test_what_belongs_to_quantizers_may_be_left_over():
    plan = adapt.plan(STAGE, saved(), fresh(weight=IDENTITY))
    assert set(plan.copied) == set(saved(weight=IDENTITY))


@pytest.mark.parametrize("source", [IDENTITY, spec("categorical", values=(-1.0, 0.0, 1.0))])
def test_logits_of_searched_weights_start_afresh(source):
    target = fresh(weight=spec("categorical", values=(-1.0, 1.0)))
    assert adapt.plan(STAGE, saved(weight=source), target).new == ("params/conv/kernel",)


def test_every_branch_takes_the_values_of_a_network_without_branches():
    found = saved()
    target = jax.tree.map(np.asarray, fresh())
    for collection in ("params", "batch_stats"):
        target[collection] = {**target[collection]}
        target[collection]["bn"] = {name: np.zeros((3, 4), np.float32) for name in target[collection]["bn"]}
    plan = adapt.plan(STAGE, found, target, branches=3)
    scale = adapt.adapted(plan, found, target)["params"]["bn"]["scale"]
    np.testing.assert_array_equal(scale, np.broadcast_to(found["params/bn/scale"], (3, 4)))


def test_another_network_is_refused_with_the_nearest_names():
    found = saved()
    found["params/bn0/scale"] = found.pop("params/bn/scale")
    found["params/conv/kernel"] = found["params/conv/kernel"][:2]
    reason = (
        r"^checkpoint of another network: 1 missing in the file \(params/bn/scale\); 1 unknown to the network "
        r"\(params/bn0/scale\); 1 of another shape or type \(params/conv/kernel \(2, 3, 3, 4\) for \(3, 3, 3, 4\)\)$"
    )
    with pytest.raises(Misfit, match=reason):
        adapt.plan(STAGE, found, fresh())
