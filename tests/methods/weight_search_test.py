"""The stages of Weight Search as data; values are those of the specification (2.6 to 2.8, 3.3) and of the release."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from bnn_jax import networks
from bnn_jax.errors import UserError
from bnn_jax.experiment.config import validate
from bnn_jax.experiment.start import init_variables, variable_shapes
from bnn_jax.methods import METHODS, build
from bnn_jax.quantizers.categorical import VALUE_SETS
from bnn_jax.report.costs import complexity
from bnn_jax.stages import IDENTITY, Inherit, Stage, spec
from bnn_jax.training.optimizer import group_labels
from configs import (
    weight_search_resnet18,
    weight_search_resnet20,
    weight_search_vgg_small,
    weight_search_w1a1_resnet20,
)


def config(file: Any = weight_search_resnet20, **changes: Any) -> dict[str, Any]:
    """A config of the project; train_x replaces config.train.x, top-level keys themselves, others the section's."""
    chosen = file.get_config().to_dict()
    for key, value in changes.items():
        if key.startswith("train_"):
            chosen["train"][key.removeprefix("train_")] = value
        elif key in chosen:
            chosen[key] = value
        else:
            chosen["weight_search"][key] = value
    return validate(chosen)


def stages(file: Any = weight_search_resnet20, **changes: Any) -> tuple[Stage, ...]:
    return METHODS["weight_search"](config(file, **changes))


def stage(file: Any = weight_search_resnet20, **changes: Any) -> Stage:
    (only,) = stages(file, **changes)
    return only


# ---- the recipes


@pytest.mark.parametrize(
    ("file", "network", "rate", "decay", "batch", "epochs", "cooling"),
    [
        (weight_search_resnet20, "standard_resnet20", 0.1, 1e-4, 128, 200, 0.97),
        (weight_search_vgg_small, "standard_vgg_small", 0.02, 5e-4, 100, 200, 0.97),
        (weight_search_resnet18, "standard_resnet18", 0.1, 1e-4, 256, 120, 0.95),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_recipe_is_the_published_one(file, network, rate, decay, batch, epochs, cooling):
    found = stage(file)
    assert found.network == spec(network)
    assert found.optim.optimizer == spec("sgd", momentum=0.9, nesterov=False)
    assert found.optim.learning_rate == spec("cosine_by_epoch", initial=rate)
    (group,) = found.optim.groups
    assert (group.pattern, group.weight_decay) == (".*", decay)
    assert (found.optim.batch_size, found.optim.drop_last_batch, found.optim.epochs) == (batch, False, epochs)
    temperature = spec("decay_by_epoch", initial=1.0, rate=cooling, interval=1, floor=1e-5)
    assert found.knobs == (("temperature", temperature),)
    assert found.objectives == (spec("cross_entropy", weight=1.0),)
    assert (found.inherit, found.teacher, found.log_train_top5) == (None, None, True)


@pytest.mark.parametrize(
    ("file", "paper", "release"),
    [
        (weight_search_resnet20, "cosine_by_epoch", "cosine_by_epoch"),
        (weight_search_vgg_small, "cosine_by_epoch", "cosine"),
        (weight_search_resnet18, "cosine_by_epoch", "cosine"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_presets_differ_in_how_often_the_learning_rate_changes(file, paper, release):
    one, other = (stage(file, preset=preset) for preset in ("paper", "release"))
    assert (one.optim.learning_rate.name, other.optim.learning_rate.name) == (paper, release)
    for preset in ("paper", "release"):
        for unit, name in (("epoch", "cosine_by_epoch"), ("step", "cosine")):
            assert stage(file, preset=preset, schedule_unit=unit).optim.learning_rate.name == name


def test_given_boundaries_replace_the_cosine():
    found = stage(learning_rate_boundaries=(10, 30), learning_rate_factor=0.5).optim.learning_rate
    assert found == spec("piecewise", boundaries=(10.0, 30.0), values=(0.1, 0.05, 0.025))


def test_the_first_layer_and_the_classifier_stay_full_precision_and_shortcuts_are_searched():
    searched = spec("categorical", values="po2-2b", mode="hard")
    quant = stage().quant
    assert (quant.weight, quant.shortcut) == (searched, searched)
    assert quant.first == quant.last == quant.act == IDENTITY
    quant = stage(quantize_first=True, quantize_last=True).quant
    assert quant.first == quant.last == searched


# ---- values


@pytest.mark.parametrize("name", VALUE_SETS)
def test_values_by_name(name):
    found = stage(values=name)
    assert found.quant.weight.kwargs["values"] == name
    assert found.bits == math.log2(len(VALUE_SETS[name])) == int(name[-2])
    assert found.name == "search"


@pytest.mark.parametrize("values", [(-1.0, 0.0, 1.0), [-1, 0, 1]])
def test_values_as_any_list(values):
    found = stage(values=values)
    assert found.quant.weight.kwargs["values"] == (-1.0, 0.0, 1.0)
    assert found.bits == math.log2(3)


def test_the_full_precision_network_has_the_same_recipe():
    found, searched = stage(values="fp32"), stage()
    assert (found.name, found.bits, found.knobs) == ("full_precision", 32.0, ())
    assert found.quant.weight == found.quant.shortcut == IDENTITY
    assert (found.network, found.optim, found.data) == (searched.network, searched.optim, searched.data)


# ---- switches


def test_soft_training_is_a_mode_of_the_weights():
    assert stage(soft=True).quant.weight.kwargs["mode"] == "soft"


def test_noise_is_a_knob_only_where_there_is_some():
    assert "noise" not in dict(stage().knobs)
    found = dict(stage(noise=1.0, noise_rate=0.9, noise_interval=2).knobs)["noise"]
    assert found == spec("decay_by_epoch", initial=1.0, rate=0.9, interval=2)


def test_the_temperature_follows_the_config():
    changes = {"temperature": 2.0, "temperature_rate": 0.9, "temperature_interval": 3, "temperature_floor": 0.1}
    found = dict(stage(**changes).knobs)["temperature"]
    assert found == spec("decay_by_epoch", initial=2.0, rate=0.9, interval=3, floor=0.1)


@pytest.mark.parametrize(
    ("activations", "expected"),
    [("identity", IDENTITY), ("dorefa", spec("dorefa", bits=2)), ("sign", spec("sign")), ("irnet", spec("irnet"))],
)
def test_activations_can_be_those_of_other_methods(activations, expected):
    found = stage(weight_search_w1a1_resnet20, activations=activations, activation_bits=2)
    assert found.quant.act == expected
    names = {name for name, _ in found.knobs}
    assert names == {"temperature"} | ({"error_decay_k", "error_decay_t"} if activations == "irnet" else set())


def test_the_example_of_both_at_one_bit_is_irnet_s_network():
    found = stage(weight_search_w1a1_resnet20)
    assert found.network == spec("hardtanh_resnet20")
    assert (found.quant.weight.kwargs["values"], found.quant.act, found.bits) == ("1b", spec("irnet"), 1.0)


@pytest.mark.parametrize("quantize_first", [False, True])
@pytest.mark.parametrize("quantize_last", [False, True])
@pytest.mark.parametrize(
    ("network", "size"),
    [("standard_resnet20", 32), ("standard_vgg_small", 32), ("hardtanh_resnet20", 32), ("standard_resnet50", 64)],
)
def test_a_weight_decay_of_the_logits_reaches_them_alone(network, size, quantize_first, quantize_last):
    switches = {"quantize_first": quantize_first, "quantize_last": quantize_last}
    found = stage(network=network, values=(-1.0, 0.0, 1.0), logit_weight_decay=0.0, **switches)
    built = networks.build(found.network, found.quant, num_classes=7)
    params = variable_shapes(built, (size, size, 3))["params"]
    decays = [group.weight_decay for group in found.optim.groups]
    labels = flatten_dict(group_labels(params, found.optim.groups))
    for path, leaf in flatten_dict(params).items():
        # Logits have the three candidates in front of the axes of a kernel.
        is_logits = path[-1] == "kernel" and leaf.shape[0] == 3 and len(leaf.shape) in (3, 5)
        assert decays[int(labels[path])] == (0.0 if is_logits else 1e-4), path


def test_without_one_logits_decay_as_everything_else():
    assert len(stage().optim.groups) == len(stage(values="fp32", logit_weight_decay=0.0).optim.groups) == 1


def test_seed_and_compute_type_reach_the_stage():
    found = stage(seed=5, train_compute_dtype="bfloat16")
    assert (found.seed, found.init_seed, found.compute_dtype) == (5, 5, "bfloat16")


# ---- by bit


def test_the_chain_finds_signs_and_halves_them():
    chain = stages(by_bit=(0, 1, 2))
    assert [s.name for s in chain] == ["bit_0", "bit_1", "bit_2"]
    first, second, third = (s.quant.weight for s in chain)
    assert first == spec("categorical", values=(1.0, -1.0))
    factors = {"values": (1.0, 0.5), "start": "even"}
    assert second == spec("categorical", base_levels=(-1.0, 1.0), **factors)
    assert third == spec("categorical", base_levels=(-1.0, -0.5, 0.5, 1.0), **factors)
    assert [s.bits for s in chain] == [1.0, 2.0, math.log2(6)]
    assert [s.optim.epochs for s in chain] == [200] * 3


def test_a_further_bit_starts_from_the_weights_in_use_and_everything_else_of_the_one_before():
    first, second, third = stages(by_bit=(0, 1, 2))
    assert first.inherit is None
    for found, before in ((second, "bit_0"), (third, "bit_1")):
        assert found.inherit == Inherit(f"stage:{before}@last", ("params", "batch_stats"), realised_base=True)
    assert len({s.seed for s in (first, second, third)}) == 3


def test_each_bit_may_have_epochs_of_its_own():
    assert [s.optim.epochs for s in stages(by_bit=(0, 1), epochs=(3, 4))] == [3, 4]


# ---- sizes (specification, section 2.6)


# Of the published networks: searched layers and weights, floats that are trained, and millions of multiply-adds.
COUNTS = {
    "standard_vgg_small": (5, 4_571_136, 88_970, 607.6),
    "standard_resnet20": (18, 267_264, 2_458, 40.55),
    "standard_resnet18": (19, 11_157_504, 532_008, None),
    "standard_resnet34": (35, 21_258_240, 539_432, None),
    "standard_resnet50": (52, 23_445_504, 2_111_528, None),
}
IMAGENET = ("standard_resnet18", "standard_resnet34", "standard_resnet50")


def shapes_of(found: Stage, network: str) -> tuple[Any, Any, tuple[int, int, int]]:
    """The network, shapes of its parameters by path, and the images it reads."""
    size, classes = (224, 1000) if network in IMAGENET else (32, 10)
    built = networks.build(found.network, found.quant, num_classes=classes)
    return built, flatten_dict(variable_shapes(built, (size, size, 3))["params"]), (size, size, 3)


@pytest.mark.parametrize("network", COUNTS)
def test_searched_layers_weights_and_floats_are_the_published_ones(network):
    layers, weights, floats, _ = COUNTS[network]
    # Seven candidates: no kernel has that many rows, and none of the networks that many axes.
    values = tuple(map(float, range(7)))
    _, params, _ = shapes_of(stage(network=network, values=values), network)
    logits = {path: leaf for path, leaf in params.items() if len(leaf.shape) in (3, 5)}
    assert len(logits) == layers
    assert sum(leaf.size for leaf in logits.values()) == 7 * weights
    assert sum(leaf.size for path, leaf in params.items() if path not in logits) == floats


@pytest.mark.parametrize("network", ["standard_vgg_small", "standard_resnet20"])
def test_both_outer_layers_add_two_searched_layers(network):
    found = stage(network=network, values="po2-3b", quantize_first=True, quantize_last=True)
    _, params, _ = shapes_of(found, network)
    assert sum(len(leaf.shape) in (3, 5) for leaf in params.values()) == COUNTS[network][0] + 2


@pytest.mark.parametrize(
    ("network", "values", "bits"),
    [
        ("standard_vgg_small", "1b", 7_418_176),
        ("standard_resnet20", "1b", 345_920),
        ("standard_vgg_small", "fp32", 149_123_392),
        ("standard_resnet20", "fp32", 8_631_104),
    ],
)
def test_stored_bits_and_operations_are_the_published_ones(network, values, bits):
    built, _, image_shape = shapes_of(stage(network=network, values=values), network)
    total = complexity(built, image_shape).total
    # The specification counts trained numbers; we store the running statistics of BatchNorm too.
    channels = {"standard_vgg_small": 2 * (128 + 256 + 512), "standard_resnet20": 7 * 16 + 6 * 32 + 6 * 64}[network]
    assert total.stored_bits - 32 * 2 * channels == bits
    assert total.macs / 1e6 == pytest.approx(COUNTS[network][3], abs=0.05)


@pytest.mark.parametrize("quantize_last", [False, True])
def test_a_searched_classifier_starts_without_bias(quantize_last):
    small = spec("standard_resnet20", stage_sizes=(1,), widths=(4,))
    built = networks.build(small, stage(quantize_last=quantize_last).quant, num_classes=3)
    bias = init_variables(built, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]["fc"]["bias"]
    assert bool(jnp.any(bias != 0)) != quantize_last


# ---- mistakes


@pytest.mark.parametrize(
    "values", ["2b", "po2-5b", "", (), (1.0,), (1.0, 1.0), (0.0, float("nan")), ("a", "b"), 3, None, True]
)
def test_values_that_are_no_set_are_refused_in_one_line(values):
    with pytest.raises(UserError) as error:
        config(values=values)
    message = str(error.value)
    assert message.startswith("config.weight_search.values") and "\n" not in message
    assert "list of" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra_objectives": ("feature_swap",)}, "config.extra_objectives: 'feature_swap' needs real-valued weights"),
        ({"by_bit": (0, 1), "soft": True}, "config.weight_search.by_bit=(0, 1): accepted is () with soft=True"),
        ({"by_bit": (0,), "values": "fp32"}, "config.weight_search.by_bit=(0,): accepted is ()"),
        ({"epochs": (1, 2)}, "config.weight_search.epochs=(1, 2): accepted is one"),
        ({"by_bit": (0, 1, 2), "epochs": (1, 2)}, "config.weight_search.epochs=(1, 2): accepted is one, or one for"),
        ({"learning_rate_boundaries": (3.0, 2.0)}, "config.weight_search.learning_rate_boundaries=(3.0, 2.0)"),
        ({"activations": "sign"}, "config.weight_search.activations='sign': behind the ReLU of 'standard_resnet20'"),
    ],
)
def test_combinations_that_do_not_exist_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError) as error:
        build(config(**changes))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("preset", "published", "accepted is one of 'paper', 'release'"),
        ("by_bit", (1,), "accepted is a tuple of int, 0, 1, 2, ... in turn"),
        ("by_bit", (0, 2), "accepted is a tuple of int, 0, 1, 2, ... in turn"),
        ("schedule_unit", "batch", "accepted is one of 'epoch', 'step'"),
        ("temperature", 0.0, "accepted is float, greater than 0"),
        ("temperature_rate", 1.5, "accepted is float, 0 < value <= 1"),
        ("temperature_floor", 0.0, "accepted is float, greater than 0"),
        ("noise", -1.0, "accepted is float, 0 or more"),
        ("activations", "relu", "accepted are identity"),
        ("activation_bits", 9, "accepted is int, 1 to 8"),
        ("logit_weight_decay", -1.0, "accepted is float, 0 or more"),
    ],
)
def test_a_bad_value_is_refused_with_key_and_what_is_accepted(key, value, accepted):
    with pytest.raises(UserError) as error:
        config(**{key: value})
    message = str(error.value)
    assert message.startswith(f"config.weight_search.{key}") and accepted in message and "\n" not in message


def test_the_other_terms_of_self_distillation_can_be_added():
    found = build(config(extra_objectives=("label_bank", "cluster")))[-1]
    assert [term.name for term in found.objectives] == ["cross_entropy", "label_bank", "cluster"]
