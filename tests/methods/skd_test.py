"""The stages of SKD-BNN as data; the values are those of the specification's recipes (section 2.9) and forensics."""

from typing import Any

import pytest

from bnn_jax.errors import UserError
from bnn_jax.experiment.config import validate
from bnn_jax.methods import METHODS, skd
from bnn_jax.stages import IDENTITY, Inherit, Stage, spec
from configs import (
    irnet_resnet20,
    skd_mnist_mlp,
    skd_resnet18,
    skd_resnet18_imagenet,
    skd_resnet20,
    skd_vgg_small,
)


def config(file: Any = skd_resnet20, **changes: Any) -> dict[str, Any]:
    """A config of the project; keyword 'skd_x' replaces config.skd.x, others replace top-level keys."""
    chosen = file.get_config().to_dict()
    for key, value in changes.items():
        section, _, name = key.partition("_")
        if section in ("skd", "train"):
            chosen[section][name] = value
        else:
            chosen[key] = value
    return validate(chosen)


def stages(file: Any = skd_resnet20, **changes: Any) -> tuple[Stage, ...]:
    return METHODS["skd"](config(file, **changes))


def terms(stage: Stage) -> dict[str, dict[str, Any]]:
    return {term.name: term.kwargs for term in stage.objectives}


# ---- the recipes


@pytest.mark.parametrize(
    ("file", "epochs", "rates", "warmups", "decay", "batch"),
    [
        (skd_resnet20, [700], [0.1], [8], 1e-4, 128),
        (skd_vgg_small, [600], [0.05], [8], 1e-4, 128),
        (skd_resnet18, [800], [0.3], [16], 1e-5, 128),
        (skd_resnet18_imagenet, [128, 128], [0.1, 0.001], [8, 0], 1e-5, 256),
        (irnet_resnet20, [700], [0.1], [8], 1e-4, 128),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_recipe_is_the_published_one(file, epochs, rates, warmups, decay, batch):
    found = stages(file)
    assert [stage.optim.epochs for stage in found] == epochs
    for stage, rate, warmup in zip(found, rates, warmups, strict=True):
        optim = stage.optim
        assert optim.learning_rate == spec("cosine_by_epoch", initial=rate, final=0.0, warmup_epochs=warmup)
        assert optim.optimizer == spec("sgd", momentum=0.9, nesterov=False)
        (group,) = optim.groups
        assert (group.pattern, group.weight_decay, group.bounds) == (".*", decay, None)
        assert (optim.batch_size, optim.drop_last_batch, optim.gradient_clip_norm) == (batch, True, None)


@pytest.mark.parametrize("file", [skd_resnet20, skd_vgg_small, skd_resnet18, skd_resnet18_imagenet])
def test_the_terms_have_the_published_weights(file):
    for stage in stages(file):
        assert terms(stage) == {
            "cross_entropy": {"weight": 1.0},
            "feature_swap": {"weight": 1.0, "compare": "channel_and_spatial"},
            "label_bank": {
                "weight": 0.05,
                "temperature": 4.0,
                "strict_release": False,
                "reset_each_epoch": False,
                "log_softmax": False,
            },
            "cluster": {"weight": 0.01, "on": "features"},
        }


@pytest.mark.parametrize(
    ("file", "network", "init"),
    [
        (skd_resnet20, "hardtanh_resnet20", "he_fan_in_normal"),
        (skd_resnet18, "hardtanh_resnet18_cifar", "he_fan_in_normal"),
        (skd_resnet18_imagenet, "hardtanh_resnet18", "he_normal"),
        (skd_vgg_small, "hardtanh_vgg_small", "he_normal"),
    ],
)
def test_networks_and_their_initial_values_are_the_published_ones(file, network, init):
    for stage in stages(file):
        assert stage.network == spec(network, kernel_init=init, full_precision_init=init)


def test_inner_convolutions_are_irnets_and_the_rest_is_full_precision():
    for stage in stages():
        assert stage.quant.weight == stage.quant.act == spec("irnet")
        assert stage.quant.first == stage.quant.last == stage.quant.shortcut == IDENTITY
        assert stage.bits == 1.0


def test_the_error_decay_follows_the_epochs_of_each_stage():
    for stage in stages(skd_resnet18_imagenet):
        assert dict(stage.knobs) == {"error_decay_k": spec("error_decay_k"), "error_decay_t": spec("error_decay_t")}


def test_images_are_padded_by_their_border_and_flipped():
    assert {stage.data.augment for file in (skd_resnet20, skd_vgg_small) for stage in stages(file)} == {
        "edge_crop_flip"
    }


def test_the_second_stage_starts_from_weights_and_running_statistics_of_the_first():
    first, second = stages(skd_resnet18_imagenet)
    assert (first.name, second.name) == ("train_1", "train_2")
    assert first.inherit is None
    assert second.inherit == Inherit("stage:train_1@last", ("params", "batch_stats"))
    assert first.seed != second.seed


def test_one_stage_has_a_plain_name():
    assert [stage.name for stage in stages()] == ["train"]


def test_no_stage_needs_a_teacher():
    assert {stage.teacher for file in (skd_resnet20, skd_resnet18_imagenet) for stage in stages(file)} == {None}


def test_irnet_alone_has_the_task_loss_alone():
    (stage,) = stages(irnet_resnet20)
    assert terms(stage) == {"cross_entropy": {"weight": 1.0}}
    (distilled,) = stages()
    assert (stage.network, stage.quant, stage.optim) == (distilled.network, distilled.quant, distilled.optim)


# ---- MNIST


def test_mnist_of_the_paper_has_2048_units_squared_hinge_and_a_persistent_bank():
    (stage,) = stages(skd_mnist_mlp)
    assert stage.network == spec("hardtanh_mlp", hidden=2048, dropout=0.5)
    assert set(terms(stage)) == {"squared_hinge", "feature_swap", "label_bank", "cluster"}
    bank = terms(stage)["label_bank"]
    assert (bank["reset_each_epoch"], bank["strict_release"], bank["log_softmax"]) == (False, False, True)
    assert terms(stage)["feature_swap"]["compare"] == "elementwise"
    assert terms(stage)["cluster"]["on"] == "logits"


def test_mnist_of_the_release_has_6144_units_cross_entropy_and_a_bank_cleared_each_epoch():
    (stage,) = stages(skd_mnist_mlp, skd_preset="release")
    assert stage.network.kwargs["hidden"] == 6144
    assert set(terms(stage)) == {"cross_entropy", "feature_swap", "label_bank", "cluster"}
    bank = terms(stage)["label_bank"]
    assert (bank["reset_each_epoch"], bank["strict_release"], bank["log_softmax"]) == (True, True, True)


def test_mnist_trains_by_adam_clamps_the_biases_of_the_binary_layers_and_keeps_pixels_as_they_are():
    (stage,) = stages(skd_mnist_mlp)
    assert stage.optim.optimizer == spec("adam")
    assert stage.optim.learning_rate == spec("cosine_by_epoch", initial=0.01, final=1e-5, warmup_epochs=0)
    assert (stage.optim.epochs, stage.optim.batch_size, stage.optim.drop_last_batch) == (100, 256, False)
    clamped, rest = stage.optim.groups
    assert (clamped.pattern, clamped.bounds) == ("^fc[123]/bias$", (-1.0, 1.0))
    assert (rest.bounds, rest.weight_decay, clamped.weight_decay) == (None, 0.0, 0.0)
    assert (stage.data.normalize, stage.data.augment) == (False, "none")
    assert stage.quant.weight == stage.quant.act == spec("sign")


# ---- presets and switches


def test_presets_of_convolutional_networks_differ_in_the_rows_of_classes_never_right():
    assert skd.resolve(config()) == {"strict_release": False, "reset_bank": False, "task_loss": "cross_entropy"}
    release = skd.resolve(config(skd_preset="release"))
    assert release == {"strict_release": True, "reset_bank": False, "task_loss": "cross_entropy"}
    assert terms(stages(skd_preset="release")[0])["label_bank"]["strict_release"] is True


@pytest.mark.parametrize("preset", ["paper", "release"])
@pytest.mark.parametrize(
    ("switch", "value"),
    [("strict_release", True), ("strict_release", False), ("reset_bank", True), ("task_loss", "squared_hinge")],
)
def test_a_switch_that_is_given_wins_over_the_preset(preset, switch, value):
    switches = skd.resolve(config(skd_preset=preset, **{f"skd_{switch}": value}))
    assert switches == {**skd.PRESETS[preset], switch: value}


def test_the_units_of_the_mlp_can_be_chosen():
    (stage,) = stages(skd_mnist_mlp, skd_hidden=64, skd_dropout=0.0)
    assert stage.network == spec("hardtanh_mlp", hidden=64, dropout=0.0)


def test_weights_and_temperature_reach_the_terms():
    changes = {"feature_weight": 2.0, "label_weight": 0.0, "cluster_weight": 3.0, "temperature": 7.0}
    found = terms(stages(**{f"skd_{key}": value for key, value in changes.items()})[0])
    assert [found[name]["weight"] for name in ("feature_swap", "label_bank", "cluster")] == [2.0, 0.0, 3.0]
    assert found["label_bank"]["temperature"] == 7.0


def test_gradient_norms_are_recorded_when_asked_for():
    assert [stages(skd_log_gradient_norms=value)[0].log_gradient_norms for value in (False, True)] == [False, True]


def test_the_compute_type_reaches_the_stage():
    assert stages(train_compute_dtype="bfloat16")[0].compute_dtype == "bfloat16"


def test_networks_of_other_methods_keep_their_own_initial_values():
    assert stages(network="resnet20")[0].network == spec("resnet20")


# ---- mistakes


@pytest.mark.parametrize(
    ("key", "values"), [("learning_rates", (1, 2)), ("warmup_epochs", (1, 2)), ("warmup_epochs", ())]
)
def test_a_number_of_values_that_does_not_fit_the_stages_is_refused(key, values):
    with pytest.raises(UserError, match=rf"^config\.skd\.{key}=.*: accepted is one for each stage of epochs \(700,\)$"):
        stages(**{f"skd_{key}": values})


def test_hidden_units_of_a_network_without_them_are_refused():
    with pytest.raises(UserError, match=r"^config\.skd\.hidden=64: network 'hardtanh_resnet20' has no such option$"):
        stages(skd_hidden=64)


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("preset", "checkpoint", "accepted is one of 'paper', 'release'"),
        ("distill", 1, "accepted is bool"),
        ("epochs", (), "accepted is a tuple of int"),
        ("epochs", (0,), "accepted is a tuple of int"),
        ("epochs", 700, "accepted is a tuple of int"),
        ("learning_rates", (0.0,), "accepted is a tuple of float"),
        ("warmup_epochs", (-1,), "accepted is a tuple of int"),
        ("final_learning_rate", -1e-5, "accepted is float, 0 or more"),
        ("optimizer", "lion", "accepted is one of 'sgd', 'adam'"),
        ("feature_weight", -1.0, "accepted is float, 0 or more"),
        ("label_weight", float("nan"), "accepted is float, 0 or more"),
        ("cluster_weight", "0.01", "accepted is float, 0 or more"),
        ("temperature", 0.0, "accepted is float, greater than 0"),
        ("strict_release", "yes", "accepted is bool"),
        ("task_loss", "hinge", "accepted is one of 'cross_entropy', 'squared_hinge'"),
        ("hidden", 0, "accepted is int, greater than 0"),
        ("dropout", 1.0, "accepted is float, 0 <= value < 1"),
        ("log_gradient_norms", None, "is empty: accepted is bool"),
    ],
)
def test_a_bad_value_is_refused_with_key_and_what_is_accepted(key, value, accepted):
    with pytest.raises(UserError) as error:
        config(**{f"skd_{key}": value})
    message = str(error.value)
    assert message.startswith(f"config.skd.{key}") and accepted in message and "\n" not in message


def test_sections_of_other_methods_are_refused():
    with pytest.raises(UserError, match=r"^config\.asbq\.bits: unknown key"):
        config(asbq={"bits": (1,)})
