"""The chain as data; the values are those of the specification's recipe and of its table of switches."""

from typing import Any

import pytest

from bnn_jax.errors import UserError
from bnn_jax.experiment.config import validate
from bnn_jax.methods import asbq
from bnn_jax.stages import IDENTITY, Inherit, Stage, Teacher, spec
from configs import asbq_resnet18, asbq_resnet20, asbq_vgg_small

ACT = {bits: spec("dorefa", bits=bits) for bits in (8, 4, 2, 1)}
SWITCHES = ("block", "w1", "prune_apply", "prune_source", "init", "copy_from", "kd_weight", "kd_reduction", "kd_factor")


def config(file: Any = asbq_resnet20, **changes: Any) -> dict[str, Any]:
    """A config of the project; keyword 'asbq_x' replaces config.asbq.x, others replace top-level keys."""
    chosen = file.get_config().to_dict()
    for key, value in changes.items():
        section, _, name = key.partition("_")
        if section in ("asbq", "train"):
            chosen[section][name] = value
        else:
            chosen[key] = value
    return validate(chosen)


def stages(file: Any = asbq_resnet20, **changes: Any) -> tuple[Stage, ...]:
    return asbq.stages(config(file, **changes))


MASKS = ("quant_state/.*/mask$",)


# ---- the recipe


def test_the_chain_has_five_rungs():
    chain = stages()
    assert [stage.name for stage in chain] == ["w32a32", "w8a8", "w4a4", "w2a2", "w1a1"]
    assert [stage.bits for stage in chain] == [32.0, 8.0, 4.0, 2.0, 1.0]


def test_every_rung_starts_from_the_parameters_of_the_one_before_alone():
    chain = stages()
    assert chain[0].inherit is None
    for stage, before in zip(chain[1:], chain):
        assert stage.inherit == Inherit(f"stage:{before.name}@last", ("params",), recompute=MASKS)


def test_every_rung_has_its_epochs_and_its_learning_rate():
    chain = stages()
    assert [stage.optim.epochs for stage in chain] == [240] * 5
    for stage, base in zip(chain, (0.1, 0.1, 0.1, 0.01, 0.01), strict=True):
        schedule = stage.optim.learning_rate.kwargs
        assert schedule["boundaries"] == (80.0, 120.0, 180.0)
        assert schedule["values"] == pytest.approx((base, 0.1 * base, 0.01 * base, 0.001 * base))


def test_the_optimiser_is_the_published_one():
    for stage in stages():
        assert stage.optim.optimizer == spec("sgd", momentum=0.9, nesterov=True)
        (group,) = stage.optim.groups
        assert (group.pattern, group.weight_decay, group.learning_rate_scale) == (".*", 1e-4, 1.0)
        assert (stage.optim.batch_size, stage.optim.drop_last_batch, stage.optim.gradient_clip_norm) == (
            128,
            False,
            None,
        )


def test_activations_share_the_bits_of_the_weights():
    for stage in stages():
        assert stage.quant.act == (IDENTITY if stage.bits == 32 else ACT[int(stage.bits)])


def test_first_layer_shortcuts_and_classifier_stay_full_precision():
    for stage in stages():
        assert stage.quant.first == stage.quant.last == stage.quant.shortcut == IDENTITY


def test_rungs_differ_in_the_seed_of_their_draws():
    assert [stage.seed for stage in stages(seed=7)] == [7, 1007, 2007, 3007, 4007]


def test_one_value_serves_all_rungs():
    chain = stages(asbq_epochs=(3,), asbq_learning_rates=(0.5,))
    assert [stage.optim.epochs for stage in chain] == [3] * 5
    assert {stage.optim.learning_rate.kwargs["values"][0] for stage in chain} == {0.5}


def test_each_rung_takes_its_own_value():
    chain = stages(asbq_bits=(32, 8, 1), asbq_epochs=(3, 2, 1), asbq_learning_rates=(0.3, 0.2, 0.1))
    assert [stage.optim.epochs for stage in chain] == [3, 2, 1]
    assert [stage.optim.learning_rate.kwargs["values"][0] for stage in chain] == [0.3, 0.2, 0.1]


@pytest.mark.parametrize("key", ["epochs", "learning_rates"])
def test_a_number_of_values_that_does_not_fit_the_rungs_is_refused(key):
    with pytest.raises(UserError, match=rf"^config\.asbq\.{key}=\(1.*, 2.*\): accepted is one value, or one for"):
        stages(**{f"asbq_{key}": (1, 2)})


@pytest.mark.parametrize(
    ("boundaries", "factors"), [((1.0, 2.0), (1.0, 0.1)), ((), (1.0, 0.1)), ((2.0, 1.0), (1.0, 0.1, 0.01))]
)
def test_learning_rate_factors_that_do_not_fit_the_boundaries_are_refused(boundaries, factors):
    with pytest.raises(UserError, match=r"^config\.asbq\.learning_rate_factors=.*one more than the rising boundaries"):
        stages(asbq_learning_rate_boundaries=boundaries, asbq_learning_rate_factors=factors)


# ---- presets: the specification's table, section 4


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("paper", ("release", "sign", "after_quant", "copied_weights", "he_normal", "last", 0.5, "batchmean", "T2")),
        ("release", ("release", "levels", "before_quant", "random_init", "uniform", "best", 0.0, "mean", "2T2")),
        ("checkpoint", ("checkpoint", "levels", "before_quant", "random_init", "uniform", "best", 0.0, "mean", "2T2")),
    ],
)
def test_a_preset_sets_every_switch(preset, expected):
    assert asbq.resolve(config(asbq_preset=preset)) == dict(zip(SWITCHES, expected, strict=True))


def test_checkpoint_differs_from_release_in_the_block_alone():
    release, checkpoint = asbq.PRESETS["release"], asbq.PRESETS["checkpoint"]
    assert {key for key in SWITCHES if release[key] != checkpoint[key]} == {"block"}


def test_paper_is_the_default():
    assert asbq.resolve(config()) == asbq.PRESETS["paper"]


@pytest.mark.parametrize("preset", asbq.PRESETS)
@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("block", "release"),
        ("block", "checkpoint"),
        ("w1", "sign"),
        ("w1", "levels"),
        ("prune_apply", "before_quant"),
        ("prune_apply", "after_quant"),
        ("prune_source", "random_init"),
        ("prune_source", "copied_weights"),
        ("init", "uniform"),
        ("init", "he_normal"),
        ("copy_from", "best"),
        ("copy_from", "last"),
        ("kd_weight", 0.0),
        ("kd_weight", 0.25),
        ("kd_reduction", "mean"),
        ("kd_reduction", "batchmean"),
        ("kd_factor", "1"),
        ("kd_factor", "T2"),
        ("kd_factor", "2T2"),
    ],
)
def test_a_switch_that_is_given_wins_over_the_preset(preset, switch, value):
    switches = asbq.resolve(config(asbq_preset=preset, **{f"asbq_{switch}": value}))
    assert switches == {**asbq.PRESETS[preset], switch: value}


def test_block_and_initialiser_reach_the_network():
    for stage in stages(asbq_preset="checkpoint", asbq_init="he_normal"):
        assert stage.network == spec("resnet20", block="checkpoint", kernel_init="he_normal")


@pytest.mark.parametrize(("preset", "one_bit"), [("paper", "sign"), ("release", "levels")])
def test_the_one_bit_rule_reaches_the_last_rung_only(preset, one_bit):
    inner = [stage.quant.weight.kwargs["inner"] for stage in stages(asbq_preset=preset)[1:]]
    assert inner == [*(spec("dorefa", bits=bits) for bits in (8, 4, 2)), spec("dorefa", bits=1, one_bit=one_bit)]


@pytest.mark.parametrize(("preset", "which"), [("paper", "last"), ("release", "best")])
def test_the_copied_epoch_is_also_the_teacher_s(preset, which):
    for stage, before in zip(stages(asbq_preset=preset, asbq_kd_weight=0.5)[1:], stages()):
        assert stage.inherit.source == stage.teacher.source == f"stage:{before.name}@{which}"


# ---- pruning masks


def test_paper_has_no_mask_before_there_are_trained_weights():
    first, *others = stages()
    assert first.quant.weight == IDENTITY
    for stage in others:
        assert stage.quant.weight.name == "pruned"
        assert stage.quant.weight.kwargs["apply_mask"] == "after"
        assert stage.quant.weight.kwargs["pattern"] == "filter"
        assert stage.quant.weight.kwargs["amount"] == 0.05
        assert stage.inherit.recompute == MASKS


def test_release_masks_every_rung_by_its_own_random_weights():
    first, *others = stages(asbq_preset="release")
    assert first.quant.weight == spec("pruned", inner=IDENTITY, amount=0.05, pattern="filter", apply_mask="before")
    for stage in others:
        assert stage.quant.weight.kwargs["apply_mask"] == "before"
        assert stage.inherit.recompute == ()


@pytest.mark.parametrize("preset", asbq.PRESETS)
def test_random_masks_are_the_same_in_all_rungs_but_the_first(preset):
    first, *others = stages(asbq_preset=preset, seed=3, asbq_mask_seed=77)
    assert first.init_seed == 3
    assert {stage.init_seed for stage in others} == {77}


def test_by_default_the_first_mask_is_another_one():
    first, second, *_ = stages(asbq_preset="release")
    assert first.init_seed != second.init_seed


def test_pruning_nothing_needs_no_mask():
    assert [s.quant.weight for s in stages(asbq_prune_amount=0.0)[1:4]] == [ACT[8], ACT[4], ACT[2]]


# ---- distillation


def test_paper_distils_from_the_second_rung_on():
    first, *others = stages()
    assert first.objectives == (spec("cross_entropy", weight=1.0),) and first.teacher is None
    for stage in others:
        # lambda 0.5, T 5: 0.5 * CE + 0.5 * T**2 * KD, averaged over the batch.
        assert stage.objectives == (
            spec("cross_entropy", weight=0.5),
            spec("distillation", weight=0.5 * 25.0, temperature=5.0, reduction="batchmean"),
        )
        assert stage.teacher == Teacher(stage.inherit.source)


@pytest.mark.parametrize("preset", ["release", "checkpoint"])
def test_release_does_not_distil(preset):
    for stage in stages(asbq_preset=preset):
        assert stage.objectives == (spec("cross_entropy", weight=1.0),)
        assert stage.teacher is None


@pytest.mark.parametrize(("factor", "value"), [("1", 1.0), ("T2", 9.0), ("2T2", 18.0)])
def test_the_factor_on_the_divergence(factor, value):
    _, second, *_ = stages(asbq_preset="release", asbq_kd_weight=0.25, asbq_kd_temperature=3.0, asbq_kd_factor=factor)
    assert second.objectives == (
        spec("cross_entropy", weight=0.75),
        spec("distillation", weight=0.25 * value, temperature=3.0, reduction="mean"),
    )


# ---- networks with rules of their own


def test_imagenet_networks_have_their_own_block_and_chain():
    chain = stages(asbq_resnet18)
    assert [stage.name for stage in chain] == ["w32a32", "w8a8", "w4a4", "w1a1"]
    assert [stage.optim.epochs for stage in chain] == [100, 60, 60, 100]
    assert {stage.network.kwargs["block"] for stage in chain} == {"imagenet"}
    assert {stage.data.name for stage in chain} == {"imagenet2012"}


@pytest.mark.parametrize("network", ("resnet18", "resnet34"))
@pytest.mark.parametrize("changes", [{"asbq_preset": "checkpoint"}, {"asbq_block": "checkpoint"}])
def test_imagenet_networks_refuse_the_checkpoint_block(network, changes):
    with pytest.raises(UserError, match=rf"^config\.asbq\.block='checkpoint': .*'{network}' is 'imagenet'"):
        stages(asbq_resnet18, network=network, **changes)


def test_imagenet_networks_refuse_the_release_block_if_asked_for_it():
    with pytest.raises(UserError, match=r"^config\.asbq\.block='release': .*'resnet18' is 'imagenet'"):
        stages(asbq_resnet18, asbq_block="release")


@pytest.mark.parametrize("preset", asbq.PRESETS)
def test_imagenet_networks_take_the_imagenet_block_if_asked_for_it(preset):
    switches = asbq.resolve(config(asbq_resnet18, asbq_preset=preset, asbq_block="imagenet"))
    assert switches == {**asbq.PRESETS[preset], "block": "imagenet"}


def test_cifar_networks_refuse_the_imagenet_block():
    with pytest.raises(UserError, match=r"^config\.asbq\.block='imagenet': accepted with network 'resnet20' are"):
        stages(asbq_block="imagenet")


def test_vgg_small_quantizes_its_first_convolution_too_and_masks_row_blocks():
    for stage in stages(asbq_vgg_small)[1:]:
        assert stage.quant.first == stage.quant.weight
        assert stage.quant.weight.kwargs["pattern"] == "row_block"
        assert stage.network == spec("vgg_small", kernel_init="he_normal")
    for stage in stages(asbq_vgg_small, asbq_preset="release"):
        assert stage.quant.first == stage.quant.weight
        assert stage.quant.weight.kwargs["pattern"] == "row_block"


@pytest.mark.parametrize("block", ["release", "checkpoint", "imagenet"])
@pytest.mark.parametrize("network", ["vgg_small", "hardtanh_resnet20"])
def test_other_networks_have_no_such_blocks(network, block):
    with pytest.raises(UserError, match=rf"^config\.asbq\.block='{block}': '{network}' has no such blocks"):
        stages(asbq_vgg_small, network=network, asbq_block=block)


def test_a_network_with_blocks_of_its_own_keeps_them():
    assert {stage.network for stage in stages(network="hardtanh_resnet20")} == {
        spec("hardtanh_resnet20", kernel_init="he_normal")
    }


def test_the_compute_type_reaches_every_rung():
    assert {stage.compute_dtype for stage in stages(train_compute_dtype="bfloat16")} == {"bfloat16"}


# ---- a chain that starts from a file

FILE = "file:w4a4.pth.tar"


def from_file(**changes: Any) -> tuple[Stage, ...]:
    return stages(asbq_bits=(2, 1), asbq_learning_rates=(0.01,), asbq_init_from=FILE, asbq_init_bits=4, **changes)


def test_the_first_rung_copies_the_file_and_is_masked_like_any_rung_but_the_first():
    first, second = from_file()
    assert (first.inherit.source, second.inherit.source) == (FILE, "stage:w2a2@last")
    assert first.inherit.recompute == second.inherit.recompute and first.init_seed == second.init_seed


def test_the_file_teaches_the_first_rung_as_the_network_it_is():
    first, second = from_file()
    whole = stages(asbq_bits=(8, 4), asbq_learning_rates=(0.1,))[1]
    assert (first.teacher.source, first.teacher.quant) == (FILE, whole.quant)
    assert first.teacher.network.name == whole.network.name
    assert second.teacher == Teacher("stage:w2a2@last")


def test_without_distillation_the_file_teaches_nobody():
    first, _ = from_file(asbq_preset="checkpoint")
    assert first.teacher is None


def test_boundaries_are_scaled_to_the_length_of_each_rung():
    first, second = from_file(asbq_epochs=(24, 48), asbq_schedule_epochs=240)
    assert first.optim.learning_rate.kwargs["boundaries"] == pytest.approx((8.0, 12.0, 18.0))
    assert second.optim.learning_rate.kwargs["boundaries"] == pytest.approx((16.0, 24.0, 36.0))
