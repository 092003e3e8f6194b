"""Config values that change the stages of every method alike."""

import importlib
from typing import Any

import pytest

from bnn_jax import methods
from bnn_jax.errors import UserError
from bnn_jax.experiment.config import validate
from bnn_jax.stages import Stage, spec, to_json

METHODS = ["asbq_resnet20", "basq_resnet20_cifar", "recu_resnet20", "skd_resnet20", "snn_resnet20"]
METHODS.append("weight_search_resnet20")


def stages(name: str, **changes: Any) -> tuple[Stage, ...]:
    chosen = importlib.import_module(f"configs.{name}").get_config()
    chosen.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return methods.build(validate(chosen.to_dict()))


def refusal(name: str, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        stages(name, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_off_leaves_no_trace_in_the_record_of_a_stage(name):
    content = str([to_json(stage) for stage in stages(name)])
    for word in ("mixup", "color_jitter", "ema_decay", "early_stopping", "log_flip_rate", "label_smoothing", "warmup'"):
        assert word not in content


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_options_of_the_optimiser(name):
    chosen = {"train__optimizer": "adamw", "train__gradient_clip_norm": 2.0, "train__ema_decay": 0.9}
    for before, stage in zip(stages(name), stages(name, **chosen, log__flip_rate=True), strict=True):
        if stage.kind == "search":
            assert stage == before
            continue
        assert (stage.optim.optimizer, stage.optim.gradient_clip_norm) == (spec("adamw"), 2.0)
        assert (stage.optim.ema_decay, stage.log_flip_rate) == (0.9, True)
        assert to_json(stage)["optim"]["ema_decay"] == 0.9
        assert stage.optim.groups == before.optim.groups


def test_sgd_has_the_momentum_of_the_config():
    chosen = {"train__optimizer": "sgd", "train__momentum": 0.5, "train__nesterov": False}
    assert stages("snn_resnet20", **chosen)[-1].optim.optimizer == spec("sgd", momentum=0.5, nesterov=False)


@pytest.mark.parametrize(
    ("name", "highest"), [("asbq_resnet20", 0.1), ("recu_resnet20", 0.1), ("snn_resnet20", 0.1), ("skd_resnet20", 0.1)]
)
def test_another_schedule_starts_from_the_highest_rate_of_the_recipe(name, highest):
    def first(**changes: Any) -> Any:
        return stages(name, **changes)[0].optim.learning_rate

    assert first(train__schedule="constant") == spec("constant", value=highest)
    assert first(train__schedule="cosine") == spec("cosine", initial=highest)
    stepped = first(train__schedule="step", train__step_epochs=(3.0, 5.0), train__step_factor=0.5)
    assert stepped == spec("piecewise", boundaries=(3.0, 5.0), values=(highest, 0.5 * highest, 0.25 * highest))


def test_a_warm_up_takes_the_place_of_the_recipes_own():
    own = stages("recu_resnet20")[0].optim.learning_rate
    chosen = stages("recu_resnet20", train__warmup_epochs=2.0)[0].optim.learning_rate
    assert own == spec("cosine_by_epoch", initial=0.1, warmup_epochs=4)
    assert chosen == spec("warmup", schedule=spec("cosine_by_epoch", initial=0.1), warmup_epochs=2.0)


def test_labels_are_smoothed_in_every_stage():
    for stage in stages("asbq_resnet20", train__label_smoothing=0.1):
        assert dict(stage.objectives[0].options)["label_smoothing"] == 0.1


def test_mixup_is_part_of_the_images_of_every_stage():
    assert {stage.data.mixup for stage in stages("snn_resnet20", data__mixup=0.2)} == {0.2}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "snn_resnet20",
            {"train__label_smoothing": 0.1},
            "config.train.label_smoothing=0.1: stage binary_activations has no cross-entropy with the labels; "
            "accepted is 0",
        ),
        (
            "skd_resnet20",
            {"data__mixup": 0.2},
            "config.data.mixup=0.2: stage train has the objective label_bank, which wants images of one class; "
            "accepted is 0",
        ),
        (
            "asbq_resnet20",
            {"train__early_stopping": 3},
            "config.train.early_stopping=3: it looks at images held out of training; accepted with "
            "config.data.validation_fraction=0.0 is 0",
        ),
        (
            "asbq_resnet20",
            {"train__schedule": "step"},
            "config.train.step_epochs=(): accepted with config.train.schedule='step' is one epoch or more",
        ),
        (
            "asbq_resnet20",
            {"train__step_epochs": (3.0,)},
            "config.train.step_epochs=(3.0,): accepted with config.train.schedule=None is ()",
        ),
        (
            "asbq_resnet20",
            {"train__schedule": "step", "train__step_epochs": (3.0, 2.0)},
            "config.train.step_epochs=(3.0, 2.0): accepted are rising epochs",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(name, changes, message):
    assert refusal(name, **changes) == message
