"""The stages of SNN as data; the values are those of the specification's recipe (section 2.9) and forensics."""

import re
from typing import Any

import jax
import pytest

from bnn_jax import networks
from bnn_jax.errors import UserError
from bnn_jax.experiment.config import validate
from bnn_jax.experiment.start import variable_shapes
from bnn_jax.methods import build, snn
from bnn_jax.methods.common import switches_of
from bnn_jax.stages import IDENTITY, Inherit, QuantSpec, Stage, Teacher, spec
from bnn_jax.training.optimizer import path_of
from configs import snn_resnet18, snn_resnet18_cifar, snn_resnet20, snn_skd_resnet20, snn_vgg_small

NAMES = ["teacher", "binary_activations", "sub_bit"]


def config(file: Any = snn_resnet20, **changes: Any) -> dict[str, Any]:
    """A config of the project; keyword 'snn_x' replaces config.snn.x, others replace top-level keys."""
    chosen = file.get_config().to_dict()
    for key, value in changes.items():
        section, _, name = key.partition("_")
        if section in ("snn", "train"):
            chosen[section][name] = value
        else:
            chosen[key] = value
    return validate(chosen)


def stages(file: Any = snn_resnet20, **changes: Any) -> tuple[Stage, ...]:
    return build(config(file, **changes))


def codebook_group(stage: Stage) -> Any:
    return next(group for group in stage.optim.groups if "codebook" in group.pattern)


# ---- the chain


@pytest.mark.parametrize("file", [snn_resnet20, snn_resnet18_cifar, snn_vgg_small, snn_skd_resnet20])
def test_on_cifar_the_teacher_is_trained_first_and_teaches_both_steps(file):
    chain = stages(file)
    assert [stage.name for stage in chain] == NAMES
    assert [stage.teacher for stage in chain] == [None, *[Teacher("stage:teacher@last")] * 2]


def test_on_imagenet_the_teacher_is_the_file_of_a_resnet34():
    chain = stages(snn_resnet18)
    assert [stage.name for stage in chain] == NAMES[1:]
    assert {stage.teacher for stage in chain} == {Teacher("file:resnet34-b627a593.pth", spec("standard_resnet34"))}


def test_only_activations_are_binary_in_the_first_step_and_kernels_come_from_codebooks_in_the_second():
    teacher, first, second = stages(snn_tau=4)
    assert teacher.quant == QuantSpec()
    assert first.quant == QuantSpec(act=spec("approx_sign"))
    assert second.quant == QuantSpec(weight=spec("codebook", tau=4), act=spec("approx_sign"))
    assert second.quant.first == second.quant.last == second.quant.shortcut == IDENTITY
    assert [stage.bits for stage in (teacher, first, second)] == [32.0, 32.0, pytest.approx(4 / 9)]
    assert first.network == second.network == spec("reactnet20")


def test_the_second_step_takes_over_everything_and_only_codebooks_are_new():
    _, first, second = stages()
    assert first.inherit is None
    assert second.inherit == Inherit(
        "stage:binary_activations@last",
        ("params", "batch_stats", "quant_state"),
        may_be_new=("/weight_quantizer/codebook$", "/weight_quantizer/memory$"),
    )


def test_from_scratch_there_is_no_first_step():
    teacher, second = stages(snn_two_step=False)
    assert (teacher.name, second.name) == ("teacher", "sub_bit")
    assert second.inherit is None
    assert [group.weight_decay for group in second.optim.groups] == [0.0] * 3
    _, _, chained = stages()
    assert (second.optim, second.knobs, second.projections) == (chained.optim, chained.knobs, chained.projections)


@pytest.mark.parametrize("name", ["reactnet18", "reactnet18_cifar", "reactnet20", "hardtanh_vgg_small"])
def test_from_scratch_the_kernels_have_both_signs(name):
    # All positive ones would crowd onto few patterns (specification, forensics F8).
    network = networks.build(spec(name), QuantSpec(), num_classes=10)
    init = network.layers.conv(8).kernel_init
    kernel = init(jax.random.key(0), (3, 3, 16, 8))
    assert 0.4 < float((kernel > 0).mean()) < 0.6
    # The gradient passes where a weight is at most 1 in size.
    assert float(abs(kernel).max()) < 1


def test_every_stage_draws_its_own_order_of_images():
    assert len({stage.seed for stage in stages()}) == 3


# ---- loss, optimiser


def test_both_steps_learn_from_the_teachers_probabilities_alone():
    teacher, *steps = stages()
    assert teacher.objectives == (spec("cross_entropy", weight=1.0),)
    for step in steps:
        assert step.objectives == (spec("distillation", weight=1.0, temperature=1.0, measure="cross_entropy"),)


def test_the_recipe_of_imagenet_is_the_published_one():
    chain = stages(snn_resnet18)
    for stage, decay in zip(chain, (1e-5, 0.0), strict=True):
        assert stage.optim.optimizer == spec("adam")
        assert stage.optim.learning_rate == spec("linear_by_epoch", initial=1e-3)
        assert (stage.optim.epochs, stage.optim.batch_size, stage.optim.gradient_clip_norm) == (256, 512, None)
        decays = {group.pattern: group.weight_decay for group in stage.optim.groups}
        assert decays.pop(".*") == 0.0
        assert set(decays.values()) == {decay}
    assert {stage.data.lighting for stage in chain} == {"release"}


@pytest.mark.parametrize("name", ["reactnet18", "reactnet20", "hardtanh_vgg_small"])
def test_decayed_are_the_kernels_of_convolutions_the_shifts_and_the_codebooks(name):
    stage = stages(network=name, snn_weight_decays=(0.25,))[-1]
    network = networks.build(stage.network, stage.quant, num_classes=10)
    with_axes, decayed = set(), set()
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(variable_shapes(network, (64, 64, 3))["params"]):
        path = path_of(key_path)
        group = next(group for group in stage.optim.groups if re.search(group.pattern, path))
        decayed |= {path} if group.weight_decay else set()
        # Those the release keeps with four axes, or whose name has 'conv' in it.
        with_axes |= {path} if leaf.ndim == 4 or path.endswith(("_shift/bias", "codebook")) else set()
    assert decayed == with_axes
    assert any(path.endswith("codebook") for path in decayed)


def test_the_teacher_is_trained_by_the_settings_of_config_train():
    changes = {"train_weight_decay": 0.125, "train_momentum": 0.5, "snn_teacher_epochs": 7}
    optim = stages(**changes, snn_teacher_learning_rate=0.2)[0].optim
    assert optim.optimizer == spec("sgd", momentum=0.5, nesterov=True)
    assert [group.weight_decay for group in optim.groups] == [0.125]
    assert (optim.epochs, optim.learning_rate) == (7, spec("cosine", initial=0.2))


def test_each_step_has_its_epochs_and_its_weight_decay():
    _, first, second = stages(snn_epochs=(3, 5), snn_weight_decays=(0.5, 0.25), snn_learning_rate=0.1)
    assert (first.optim.epochs, second.optim.epochs) == (3, 5)
    assert max(group.weight_decay for group in first.optim.groups) == 0.5
    assert max(group.weight_decay for group in second.optim.groups) == 0.25
    assert {stage.optim.learning_rate for stage in (first, second)} == {spec("linear_by_epoch", initial=0.1)}


# ---- refinement


def test_codebooks_are_refined_in_the_second_step_only():
    teacher, first, second = stages()
    assert (teacher.knobs, first.knobs, teacher.projections, first.projections) == ((), (), (), ())
    assert second.knobs == (("refine_codebook", spec("every", interval=25)),)
    assert second.projections == (spec("refill_codebooks", maintenance="clean"),)
    assert codebook_group(second).gradient_knob == "refine_codebook"


@pytest.mark.parametrize(
    ("preset", "switches"),
    [
        ("paper", {"refine": True, "maintenance": "clean", "pattern_optimizer": "release14"}),
        ("release_1gpu", {"refine": True, "maintenance": "release", "pattern_optimizer": "release14"}),
        ("release_4gpu", {"refine": False, "maintenance": "release", "pattern_optimizer": "release14"}),
    ],
)
def test_presets(preset, switches):
    assert switches_of(config(snn_preset=preset)["snn"], snn.PRESETS) == switches


@pytest.mark.parametrize("preset", snn.PRESETS)
@pytest.mark.parametrize(
    ("switch", "value"),
    [("refine", True), ("refine", False), ("maintenance", "clean"), ("pattern_optimizer", "skip")],
)
def test_a_switch_that_is_given_wins_over_the_preset(preset, switch, value):
    switches = switches_of(config(snn_preset=preset, **{f"snn_{switch}": value})["snn"], snn.PRESETS)
    assert switches == {**snn.PRESETS[preset], switch: value}


@pytest.mark.parametrize(("mode", "without"), [("release14", "step"), ("skip", "skip")])
def test_what_adam_does_between_two_gradients_of_a_codebook(mode, without):
    second = stages(snn_pattern_optimizer=mode, snn_weight_decays=(0.0, 0.5))[-1]
    group = codebook_group(second)
    assert (group.without_gradient, group.weight_decay, group.learning_rate_scale) == (without, 0.5, 1.0)


def test_the_release_moves_rows_up():
    assert stages(snn_preset="release_1gpu")[-1].projections == (spec("refill_codebooks", maintenance="release"),)


def test_without_refinement_codebooks_stay_as_they_were_drawn():
    second = stages(snn_preset="release_4gpu", snn_weight_decays=(0.5,))[-1]
    assert (second.knobs, second.projections) == ((), ())
    group = codebook_group(second)
    assert (group.learning_rate_scale, group.gradient_knob) == (0.0, None)


def test_the_interval_can_be_chosen():
    assert stages(snn_refine_interval=3)[-1].knobs == (("refine_codebook", spec("every", interval=3)),)


# ---- the combination with self-distillation


def test_the_terms_of_self_distillation_are_added_to_the_last_step():
    _, first, second = stages(snn_skd_resnet20)
    assert [term.name for term in first.objectives] == ["distillation"]
    assert [term.name for term in second.objectives] == ["distillation", "feature_swap", "label_bank", "cluster"]


# ---- mistakes


@pytest.mark.parametrize("key", ["epochs", "weight_decays"])
def test_a_number_of_values_that_does_not_fit_is_refused(key):
    with pytest.raises(UserError, match=rf"^config\.snn\.{key}=.*: accepted is one value, or one for each of "):
        stages(**{f"snn_{key}": (1, 2, 3)})


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("preset", "release", "accepted is one of 'paper', 'release_1gpu', 'release_4gpu'"),
        ("tau", 0, "accepted is int, 1 to 9"),
        ("tau", 10, "accepted is int, 1 to 9"),
        ("tau", 4.5, "accepted is int, 1 to 9"),
        ("two_step", 1, "accepted is bool"),
        ("epochs", (0,), "accepted is a tuple of int"),
        ("learning_rate", 0.0, "accepted is float, greater than 0"),
        ("weight_decays", (-1.0,), "accepted is a tuple of float"),
        ("refine", "yes", "accepted is bool"),
        ("refine_interval", 0, "accepted is int, greater than 0"),
        ("maintenance", "paper", "accepted is one of 'clean', 'release'"),
        ("pattern_optimizer", "step", "accepted is one of 'release14', 'skip'"),
        ("teacher", "resnet34.pth", "accepted is str, 'stage' or 'file:PATH'"),
        ("teacher", "file:", "accepted is str, 'stage' or 'file:PATH'"),
        ("teacher", None, "is empty: accepted is str, 'stage' or 'file:PATH'"),
        ("teacher_network", "resnet21", "accepted are resnet8, "),
        ("teacher_epochs", 0, "accepted is int, greater than 0"),
        ("teacher_learning_rate", -0.1, "accepted is float, greater than 0"),
    ],
)
def test_a_bad_value_is_refused_with_key_and_what_is_accepted(key, value, accepted):
    with pytest.raises(UserError) as error:
        config(**{f"snn_{key}": value})
    message = str(error.value)
    assert message.startswith(f"config.snn.{key}") and accepted in message and "\n" not in message
