from typing import Any

import pytest

from bnn_jax.errors import UserError
from bnn_jax.experiment.config import SECTIONS, SHARED, flatten, keys_of, suggest, validate
from bnn_jax.keys import Key
from bnn_jax.methods import METHODS
from configs import asbq_resnet20, common

METHOD_NAMES = f"accepted are {', '.join(sorted(METHODS))}"


def config(**changes: Any) -> dict[str, Any]:
    """The config of ResNet-20 with values of dotted keys replaced; REMOVED takes a key out."""
    nested = asbq_resnet20.get_config().to_dict()
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return nested


def refusal(**changes: Any) -> str:
    """The one line with which a config is refused."""
    with pytest.raises(UserError) as error:
        validate(config(**changes))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_config_of_the_project_is_accepted_and_comes_back_as_plain_values():
    result = validate(config())
    assert result["asbq"]["bits"] == (32, 8, 4, 2, 1)
    assert result["train"]["batch_size"] == 128
    assert result["data"]["data_dir"] is None
    assert type(result["asbq"]) is dict


def test_validation_is_idempotent():
    once = validate(config())
    assert validate(once) == once


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_of_every_method_are_accepted_and_fill_its_section(method):
    nested = common.base()
    nested.method = method
    nested[method] = common.defaults(method)
    assert set(flatten(nested.to_dict())) == set(keys_of((*SHARED, method)))
    assert validate(nested.to_dict())[method] == nested[method].to_dict()


@pytest.mark.parametrize(("name", "key"), keys_of(SECTIONS).items())
def test_a_key_says_what_it_means_and_its_default_is_accepted(name: str, key: Key):
    assert key.comment and key.kind in (int, float, str, bool, tuple, object)
    assert key.kind is not tuple or key.item in (int, float, str)
    assert key.check(name, key.default) == key.default


def test_an_empty_default_still_takes_only_values_of_its_type():
    section = common.asbq()
    with pytest.raises(TypeError):
        section.w1 = 3
    section.w1 = "sign"
    search = common.weight_search()
    search["values"] = (-1.0, 1.0)
    assert search["values"] == (-1.0, 1.0)


def test_numbers_and_sequences_get_the_type_of_the_schema():
    result = validate(config(**{"train.momentum": 0, "asbq.learning_rates": [1, 0.5, 1, 1, 1], "asbq.kd_weight": 1}))
    assert result["train"]["momentum"] == 0.0 and type(result["train"]["momentum"]) is float
    assert result["asbq"]["learning_rates"] == (1.0, 0.5, 1.0, 1.0, 1.0)
    assert type(result["asbq"]["kd_weight"]) is float


# ---- bad values: every line names the key, the value and what is accepted


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        # wrong types
        ("train.batch_size", "128", "accepted is int, 1 to 100,000,000"),
        ("train.batch_size", 128.0, "accepted is int, 1 to 100,000,000"),
        ("train.batch_size", True, "accepted is int, 1 to 100,000,000"),
        ("train.nesterov", 1, "accepted is bool"),
        ("train.momentum", "0.9", "accepted is float, 0 <= value < 1"),
        ("train.momentum", True, "accepted is float, 0 <= value < 1"),
        ("data.data_dir", 3, "accepted is str"),
        ("network", 20, "accepted is str"),
        ("asbq.bits", 4, "accepted is a tuple of int, a falling sequence of 32, 8 to 1"),
        ("asbq.bits", (32, 4.0), "accepted is a tuple of int"),
        ("asbq.epochs", (True,), "accepted is a tuple of int"),
        ("asbq.learning_rates", ("0.1",), "accepted is a tuple of float"),
        # out of range
        ("train.batch_size", 0, "accepted is int, 1 to 100,000,000"),
        ("train.eval_batch_size", -1, "accepted is int, 1 to 100,000,000"),
        ("train.momentum", 1.0, "accepted is float, 0 <= value < 1"),
        ("train.weight_decay", -1e-4, "accepted is float, 0 or more"),
        ("train.weight_decay", float("nan"), "accepted is float, 0 or more"),
        ("train.weight_decay", float("inf"), "accepted is float, 0 or more"),
        ("train.steps_per_dispatch", -1, "accepted is int, 0 or more"),
        ("train.checkpoint_seconds", -1.0, "accepted is float, 0 or more"),
        ("seed", -1, "accepted is int, 0 to 2,000,000,000"),
        ("seed", 2**31, "accepted is int, 0 to 2,000,000,000"),
        ("train.batch_size", 100_000_000_000, "accepted is int, 1 to 100,000,000"),
        ("train.momentum", 10**400, "accepted is float, 0 <= value < 1"),
        ("data.image_size", 10**12, "accepted is int, 1 to 1,000,000"),
        ("data.data_dir", "", "accepted is str, not empty"),
        ("name", "", "accepted is str, not empty"),
        ("data.num_train", 0, "accepted is int, greater than 0"),
        ("data.validation_fraction", 1.0, "accepted is float, 0 <= value < 1"),
        ("data.num_classes", 1, "accepted is int, 2 or more"),
        ("asbq.epochs", (0,), "accepted is a tuple of int, one or more numbers greater than 0"),
        ("asbq.epochs", (), "accepted is a tuple of int, one or more numbers greater than 0"),
        ("asbq.learning_rates", (0.1, 0.0), "accepted is a tuple of float, one or more numbers greater than 0"),
        ("asbq.learning_rates", (float("inf"),), "accepted is a tuple of float"),
        ("asbq.learning_rate_boundaries", (-1.0,), "accepted is a tuple of float, numbers of 0 or more"),
        ("asbq.prune_amount", 1.0, "accepted is float, 0 <= value < 1"),
        ("asbq.kd_weight", 1.5, "accepted is float, 0 <= value <= 1"),
        ("asbq.kd_temperature", 0.0, "accepted is float, greater than 0"),
        # bit widths
        ("asbq.bits", (32, 16, 8), "a falling sequence of 32, 8 to 1"),
        ("asbq.bits", (32, 9), "a falling sequence of 32, 8 to 1"),
        ("asbq.bits", (32, 0), "a falling sequence of 32, 8 to 1"),
        ("asbq.bits", (1, 2, 4), "a falling sequence of 32, 8 to 1"),
        ("asbq.bits", (32, 4, 4), "a falling sequence of 32, 8 to 1"),
        ("asbq.bits", (), "a falling sequence of 32, 8 to 1"),
        # names
        ("network", "resnet21", "accepted are resnet8, resnet14, resnet20"),
        ("data.name", "cifar11", "accepted are "),
        ("data.augment", "flip", "accepted is one of 'pad_crop_flip', 'pad_crop', "),
        ("data.lighting", "on", "accepted is one of 'none', 'release', 'paper'"),
        ("train.compute_dtype", "float16", "accepted is one of 'float32', 'bfloat16'"),
        ("method", "snn2", METHOD_NAMES),
        ("method", None, METHOD_NAMES),
        ("method", ["asbq"], METHOD_NAMES),
        ("asbq.preset", "published", "accepted is one of 'paper', 'release', 'checkpoint'"),
        ("asbq.block", "bottleneck", "accepted is one of 'release', 'checkpoint', 'imagenet'"),
        ("asbq.w1", "binary", "accepted is one of 'sign', 'levels'"),
        ("asbq.prune_apply", "after", "accepted is one of 'before_quant', 'after_quant'"),
        ("asbq.prune_source", "teacher", "accepted is one of 'random_init', 'copied_weights'"),
        ("asbq.init", "xavier", "accepted is one of 'uniform', 'he_normal'"),
        ("asbq.copy_from", "first", "accepted is one of 'best', 'last'"),
        ("asbq.kd_reduction", "sum", "accepted is one of 'mean', 'batchmean'"),
        ("asbq.kd_factor", "T", "accepted is one of '1', 'T2', '2T2'"),
        # further objectives
        ("extra_objectives", "cluster", "accepted is a tuple of str, of feature_swap, label_bank, cluster, each once"),
        ("extra_objectives", ("clusters",), "accepted is a tuple of str, of feature_swap, label_bank, cluster"),
        ("extra_objectives", ("cluster", "cluster"), "accepted is a tuple of str, of feature_swap, label_bank"),
        ("extra_objective_weights", (-1.0,), "accepted is a tuple of float, numbers of 0 or more"),
        ("extra_objectives_on", "first_stage", "accepted is one of 'last_stage', 'all_stages'"),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_what_is_accepted(key, value, accepted):
    message = refusal(**{key: value})
    assert message.startswith(f"config.{key}={value!r}: ")
    assert accepted in message


@pytest.mark.parametrize("key", ["seed", "network", "train.batch_size", "asbq.bits", "asbq.preset"])
def test_an_empty_value_is_refused_where_nothing_gives_a_default(key):
    assert refusal(**{key: None}).startswith(f"config.{key} is empty: accepted is ")


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    message = refusal(**{"train.batchsize": 8})
    assert message == "config.train.batchsize: unknown key; did you mean config.train.batch_size?"


def test_an_unknown_key_that_is_like_no_other_is_refused_with_those_of_its_section():
    message = refusal(**{"data.zzzzzzzz": 8})
    assert message.startswith("config.data.zzzzzzzz: unknown key; accepted are data.augment, ")
    assert "train.batch_size" not in message


def test_an_unknown_section_is_refused_with_what_there_is():
    message = refusal(**{"skd.alpha": 1.0})
    assert message.startswith("config.skd.alpha: unknown key; accepted are extra_objective_weights, ")
    assert message.endswith("seed, asbq.*, data.*, log.*, train.*")


@pytest.mark.parametrize("key", ["seed", "train.momentum", "asbq.kd_factor"])
def test_a_missing_key_is_refused(key):
    nested = config()
    *sections, last = key.split(".")
    place = nested
    for section in sections:
        place = place[section]
    del place[last]
    with pytest.raises(UserError, match=rf"^config\.{key} is missing; see configs/common\.py$"):
        validate(nested)


def test_a_value_where_a_section_belongs_is_refused():
    nested = config()
    nested["train"] = 3
    with pytest.raises(UserError, match=r"config\.train: unknown key"):
        validate(nested)


@pytest.mark.parametrize("bits", [(1,), (32,), (8, 7, 6, 5, 4, 3, 2, 1), (32, 8, 1)])
def test_chains_of_other_bit_widths_are_accepted(bits):
    assert validate(config(**{"asbq.bits": bits}))["asbq"]["bits"] == bits


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("asbq.preseed", "asbq.preset"),
        ("sedd", "seed"),
        ("trian.batch_size", "train.batch_size"),
        # the right name in another section
        ("momentum", "train.momentum"),
        ("train.num_train", "data.num_train"),
        # a word of a name
        ("train.clip", "train.gradient_clip_norm"),
        ("train.decay", "train.ema_decay or config.train.weight_decay"),
    ],
)
def test_a_suggestion_names_the_flag_to_type(unknown, meant):
    assert suggest(unknown, keys_of((*SHARED, "asbq"))) == f"did you mean config.{meant}?"


@pytest.mark.parametrize("unknown", ["train.cutoff", "train", "train.lr"])
def test_nothing_is_suggested_that_is_not_near(unknown):
    message = suggest(unknown, keys_of((*SHARED, "asbq")))
    assert message == f"accepted are {', '.join(sorted(keys_of(['train'])))}"
