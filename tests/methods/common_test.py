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


def test_the_method_of_the_config_builds_the_stages():
    assert build(config()) == METHODS["asbq"](config())
