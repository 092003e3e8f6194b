import importlib

import pytest

from bnn_jax import methods
from bnn_jax.errors import UserError
from bnn_jax.experiment.config import validate
from bnn_jax.methods import basq
from bnn_jax.stages import IDENTITY, Inherit, fingerprint, parse_choice


def config_of(name="basq_mobilenet_v2", **changes):
    config = importlib.import_module(f"configs.{name}").get_config()
    with config.unlocked():
        for key, value in changes.items():
            section, _, rest = key.partition("__")
            place = config[section] if rest else config
            place[rest or section] = value
    return validate(config.to_dict())


def stages_of(name="basq_mobilenet_v2", **changes):
    return {stage.name: stage for stage in methods.build(config_of(name, **changes))}


def test_the_stages_of_the_release():
    names = list(stages_of())
    assert names == ["supernet_activations", "supernet", "search", *(f"finetune_{fold}" for fold in range(10))]
    assert next(iter(stages_of(basq__teacher="stage"))) == "teacher"


def test_the_first_phase_quantizes_activations_only_and_the_second_both():
    stages = stages_of()
    first, second = stages["supernet_activations"], stages["supernet"]
    assert first.quant.weight == IDENTITY
    assert second.quant.weight.kwargs == {"bits": 2}
    assert first.quant.act == second.quant.act
    assert first.quant.searched == second.quant.searched


def test_the_second_phase_makes_the_weight_steps_anew_and_copies_all_else():
    second = stages_of()["supernet"]
    assert second.inherit.source == "stage:supernet_activations@last"
    assert second.inherit.collections == ("params", "batch_stats", "quant_state")
    assert second.inherit.recompute == second.inherit.may_be_new == ("/weight_quantizer/step$",)


def test_every_step_of_the_supernet_draws_its_path_and_learns_from_the_teacher_alone():
    for name in ("supernet_activations", "supernet"):
        stage = stages_of()[name]
        assert stage.choice == "uniform"
        assert [term.name for term in stage.objectives] == ["distillation"]
        assert stage.optim.optimizer.name == "adam"
        assert stage.optim.learning_rate.kwargs == {"initial": 3.75e-4, "steps": 466_000}
        assert stage.optim.gradient_clip_norm == 10
        assert stage.optim.unselected_branches == "decay"


def test_every_branch_has_its_published_decay():
    _, bounds, rest = stages_of()["supernet"].optim.groups
    assert bounds.weight_decay == (1e-2, 5e-3, 1e-3, 5e-4, 1e-4, 5e-5, 1e-5)
    assert rest.weight_decay == 0
    assert stages_of()["supernet"].network.kwargs["branches"] == 7


def test_the_winner_of_each_fold_is_fine_tuned_from_the_supernet():
    stages = stages_of()
    for fold in range(10):
        stage = stages[f"finetune_{fold}"]
        assert parse_choice(stage.choice) == ("search", fold)
        assert stage.inherit == Inherit("stage:supernet@last", ("params", "batch_stats", "quant_state"))
        assert stage.optim.unselected_branches == "freeze"
        assert stage.optim.groups[-1].learning_rate_scale == 0
        assert (stage.teacher, stage.search) == (None, None)


def test_a_change_of_the_search_changes_what_is_fine_tuned():
    first, second = (methods.build(config_of(basq__generations=number)) for number in (20, 21))
    for index, expected in ((1, True), (2, False), (3, False)):
        same = fingerprint(first[index], first) == fingerprint(second[index], second)
        assert same == expected


def test_presets_differ_in_the_images_a_winner_is_chosen_and_reported_by():
    release = stages_of()["search"].search.kwargs
    held_out = stages_of("basq_resnet20_cifar")["search"].search.kwargs
    differing = {name: (release[name], held_out[name]) for name in release if release[name] != held_out[name]}
    assert differing == {
        "fold_kind": ("contiguous", "stratified"),
        "search_on": ("test", "validation"),
        "one_random_stream": (True, False),
        "report_epoch": ("best", "last"),
    }


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("basq_mobilenet_v2", {"network": "resnet20"}, "config.network='resnet20': accepted with BASQ"),
        ("basq_mobilenet_v2", {"basq__epochs": (1, 2, 3)}, "config.basq.epochs"),
        ("basq_mobilenet_v2", {"basq__population": 20}, "config.basq.population=20"),
        ("basq_resnet20_cifar", {"data__validation_fraction": 0.0}, "config.data.validation_fraction=0.0"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(name, changes, message):
    with pytest.raises(UserError, match=message):
        basq.stages(config_of(name, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"basq__bits": 1},
        {"basq__folds": 1},
        {"basq__branch_decays": (0.1,)},
        {"basq__teacher_network": "nosuch"},
        {"basq__unselected": "none"},
    ],
)
def test_values_out_of_range_are_refused_by_name(changes):
    key = next(iter(changes)).replace("__", ".")
    with pytest.raises(UserError, match=rf"config\.{key}="):
        config_of(**changes)
