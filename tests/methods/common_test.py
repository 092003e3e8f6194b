import dataclasses

import pytest

from bnn_jax.errors import UserError
from bnn_jax.experiment.config import validate
from bnn_jax.methods import METHODS, build
from bnn_jax.methods.common import data_spec, sgd_spec
from bnn_jax.stages import DataSpec, OptimSpec, ParameterGroup, spec
from configs import common


def config(**sections):
    chosen = common.base()
    chosen.asbq = common.asbq()
    for name, values in sections.items():
        chosen[name].update(values)
    return validate(chosen.to_dict())


def test_data_are_taken_from_the_config():
    values = {"name": "digits", "num_train": 7, "num_eval": 3, "validation_fraction": 0.1, "augment": "none"}
    values["lighting"] = "paper"
    assert data_spec(config(data=values)) == DataSpec(**values)


def test_options_that_are_left_empty_are_the_data_sets_own():
    assert data_spec(config()).options == ()
    assert data_spec(config(data={"num_classes": 3, "image_size": 8})).options == (
        ("image_size", 8),
        ("num_classes", 3),
    )


def test_where_the_data_lie_is_no_part_of_a_stage():
    assert data_spec(config(data={"data_dir": "/somewhere"})) == data_spec(config())


def test_the_optimiser_is_taken_from_the_config():
    train = {"batch_size": 7, "momentum": 0.5, "nesterov": False, "weight_decay": 0.25, "drop_last_batch": True}
    rate = spec("constant", value=0.1)
    assert sgd_spec(config(train=train), learning_rate=rate, epochs=3) == OptimSpec(
        spec("sgd", momentum=0.5, nesterov=False),
        rate,
        epochs=3,
        batch_size=7,
        groups=(ParameterGroup(".*", weight_decay=0.25),),
        drop_last_batch=True,
    )


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_starts_from_a_file_at_its_first_stage_that_is_no_teacher(name):
    chosen = common.base()
    chosen[name] = common.defaults(name)
    chosen.method, chosen.network = name, "basq_resnet20_cifar" if name == "basq" else "reactnet20"
    chosen.data.validation_fraction = 0.1
    plain = build(validate(chosen.to_dict()))
    chosen.init_from, chosen.freeze = "file:x.pth", ("conv1",)
    first, *others = (stage for stage in build(validate(chosen.to_dict())) if stage.name != "teacher")
    assert first.inherit is not None and first.inherit.source == "file:x.pth" and first.inherit.adapt
    assert first.teacher is None or first.teacher.source != "file:x.pth"
    assert all(stage.freeze == ("conv1",) for stage in (first, *others))
    own = plain[len(plain) - len(others) :]
    assert [dataclasses.replace(stage, freeze=()) for stage in others] == list(own)


def test_one_file_to_start_from_is_enough():
    chosen = common.base()
    chosen.asbq, chosen.init_from = common.asbq(), "file:x.pth"
    chosen.asbq.init_from = "file:y.pth"
    with pytest.raises(UserError, match=r"^config\.init_from='file:x\.pth': stage w32a32 starts from 'file:y\.pth'$"):
        build(validate(chosen.to_dict()))


@pytest.mark.parametrize(
    "data", [{"mean": (0.5,)}, {"std": (0.5, 0.5)}, {"mean": (0.5,), "std": (0.5,), "normalize": False}]
)
def test_a_mean_comes_with_a_standard_deviation_and_normalisation(data):
    with pytest.raises(UserError, match=r"^config\.data\.mean=.*: accepted are both or neither"):
        data_spec(config(data=data))


def test_the_method_of_the_config_builds_the_stages():
    assert build(config()) == METHODS["asbq"](config())
