"""Checking a config before anything is trained: unknown keys, wrong types, values out of range.

``validate`` compares a config with the schema below. Every method adds its own section (``config.<method>``) to
``SECTIONS``.
"""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from bnn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Key:
    """What a config key accepts.

    Attributes:
      kind: int, float, str, bool, tuple, or object for several of them.
      accepted: the values, or a test with its description.
      item: type of the items of a tuple.
      optional: whether None is accepted (and means: as the preset or the data set says).
    """

    kind: type
    accepted: tuple[Any, ...] | None = None
    item: type | None = None
    optional: bool = False


def _range(description: str, test: Callable[[Any], bool]) -> tuple[Any, ...]:
    return (description, test)


POSITIVE = _range("greater than 0", lambda value: value > 0)
NOT_NEGATIVE = _range("0 or more", lambda value: value >= 0)
SEED = _range("0 to 2,000,000,000", lambda value: 0 <= value <= 2_000_000_000)
FRACTION = _range("0 <= value < 1", lambda value: 0 <= value < 1)
UNIT = _range("0 <= value <= 1", lambda value: 0 <= value <= 1)
ALL_POSITIVE = _range(
    "one or more numbers greater than 0", lambda values: len(values) > 0 and all(v > 0 for v in values)
)
ALL_NOT_NEGATIVE = _range("numbers of 0 or more", lambda values: all(v >= 0 for v in values))
CHAIN_BITS = _range(
    "a falling sequence of 32, 8 to 1",
    lambda bits: (
        len(bits) > 0 and all(b == 32 or 1 <= b <= 8 for b in bits) and all(a > b for a, b in itertools.pairwise(bits))
    ),
)

BRANCH_DECAYS = _range("2 or more numbers of 0 or more", lambda values: len(values) > 1 and all(v >= 0 for v in values))
RATE = _range("0 < value <= 1", lambda value: 0 < value <= 1)
BITS_IN_TURN = _range("0, 1, 2, ... in turn", lambda bits: bits == tuple(range(len(bits))))

OBJECTIVE_NAMES = _range(
    "of feature_swap, label_bank, cluster, each once",
    lambda names: len(set(names)) == len(names) and set(names) <= {"feature_swap", "label_bank", "cluster"},
)

TEACHER = _range(
    "'stage' or 'file:PATH'", lambda value: value == "stage" or (value.startswith("file:") and value != "file:")
)

FILE = _range("'file:PATH'", lambda value: value.startswith("file:") and value != "file:")

COMMON: dict[str, Key] = {
    "method": Key(str),
    "name": Key(str),
    "seed": Key(int, SEED),
    "num_seeds": Key(int, _range("1 to 64", lambda value: 1 <= value <= 64)),
    "network": Key(str),
    "data.name": Key(str),
    "data.data_dir": Key(str, optional=True),
    "data.num_train": Key(int, POSITIVE, optional=True),
    "data.num_eval": Key(int, POSITIVE, optional=True),
    "data.validation_fraction": Key(float, FRACTION),
    "data.augment": Key(str, ("pad_crop_flip", "pad_crop", "edge_crop_flip", "random_resized_crop_flip", "none")),
    "data.decoder": Key(str, ("pillow", "opencv")),
    "data.workers": Key(int, NOT_NEGATIVE),
    "data.normalize": Key(bool),
    "data.lighting": Key(str, ("none", "release", "paper")),
    "data.image_size": Key(int, POSITIVE, optional=True),
    "data.num_classes": Key(int, _range("2 or more", lambda value: value >= 2), optional=True),
    "train.batch_size": Key(int, POSITIVE),
    "train.eval_batch_size": Key(int, POSITIVE),
    "train.momentum": Key(float, FRACTION),
    "train.nesterov": Key(bool),
    "train.weight_decay": Key(float, NOT_NEGATIVE),
    "train.drop_last_batch": Key(bool),
    "train.compute_dtype": Key(str, ("float32", "bfloat16")),
    "train.accumulation_steps": Key(int, POSITIVE),
    "train.remat": Key(bool),
    "train.steps_per_dispatch": Key(int, NOT_NEGATIVE),
    "train.checkpoint_seconds": Key(float, NOT_NEGATIVE),
    "extra_objectives": Key(tuple, OBJECTIVE_NAMES, item=str),
    "extra_objective_weights": Key(tuple, ALL_NOT_NEGATIVE, item=float),
    "extra_objectives_on": Key(str, ("last_stage", "all_stages")),
}

SECTIONS: dict[str, dict[str, Key]] = {
    "skd": {
        "skd.preset": Key(str, ("paper", "release")),
        "skd.distill": Key(bool),
        "skd.epochs": Key(tuple, ALL_POSITIVE, item=int),
        "skd.learning_rates": Key(tuple, ALL_POSITIVE, item=float),
        "skd.warmup_epochs": Key(tuple, ALL_NOT_NEGATIVE, item=int),
        "skd.final_learning_rate": Key(float, NOT_NEGATIVE),
        "skd.optimizer": Key(str, ("sgd", "adam")),
        "skd.feature_weight": Key(float, NOT_NEGATIVE),
        "skd.label_weight": Key(float, NOT_NEGATIVE),
        "skd.cluster_weight": Key(float, NOT_NEGATIVE),
        "skd.temperature": Key(float, POSITIVE),
        "skd.strict_release": Key(bool, optional=True),
        "skd.reset_bank": Key(bool, optional=True),
        "skd.task_loss": Key(str, ("cross_entropy", "squared_hinge"), optional=True),
        "skd.hidden": Key(int, POSITIVE, optional=True),
        "skd.dropout": Key(float, FRACTION),
        "skd.log_gradient_norms": Key(bool),
    },
    "asbq": {
        "asbq.preset": Key(str, ("paper", "release", "checkpoint")),
        "asbq.bits": Key(tuple, CHAIN_BITS, item=int),
        "asbq.init_from": Key(str, FILE, optional=True),
        "asbq.init_bits": Key(int, _range("32, or 1 to 8", lambda bits: bits == 32 or 1 <= bits <= 8)),
        "asbq.epochs": Key(tuple, ALL_POSITIVE, item=int),
        "asbq.learning_rates": Key(tuple, ALL_POSITIVE, item=float),
        "asbq.learning_rate_boundaries": Key(tuple, ALL_NOT_NEGATIVE, item=float),
        "asbq.learning_rate_factors": Key(tuple, ALL_NOT_NEGATIVE, item=float),
        "asbq.schedule_epochs": Key(int, POSITIVE, optional=True),
        "asbq.block": Key(str, ("release", "checkpoint", "imagenet"), optional=True),
        "asbq.w1": Key(str, ("sign", "levels"), optional=True),
        "asbq.prune_amount": Key(float, FRACTION),
        "asbq.prune_apply": Key(str, ("before_quant", "after_quant"), optional=True),
        "asbq.prune_source": Key(str, ("random_init", "copied_weights"), optional=True),
        "asbq.mask_seed": Key(int, SEED),
        "asbq.init": Key(str, ("uniform", "he_normal"), optional=True),
        "asbq.copy_from": Key(str, ("best", "last"), optional=True),
        "asbq.kd_weight": Key(float, UNIT, optional=True),
        "asbq.kd_temperature": Key(float, POSITIVE),
        "asbq.kd_reduction": Key(str, ("mean", "batchmean"), optional=True),
        "asbq.kd_factor": Key(str, ("1", "T2", "2T2"), optional=True),
    },
    "weight_search": {
        "weight_search.preset": Key(str, ("paper", "release")),
        "weight_search.values": Key(object, _range("the name of a set or a list of numbers", lambda _: True)),
        "weight_search.by_bit": Key(tuple, BITS_IN_TURN, item=int),
        "weight_search.epochs": Key(tuple, ALL_POSITIVE, item=int),
        "weight_search.learning_rate": Key(float, POSITIVE),
        "weight_search.schedule_unit": Key(str, ("epoch", "step"), optional=True),
        "weight_search.learning_rate_boundaries": Key(tuple, ALL_NOT_NEGATIVE, item=float),
        "weight_search.learning_rate_factor": Key(float, POSITIVE),
        "weight_search.temperature": Key(float, POSITIVE),
        "weight_search.temperature_rate": Key(float, RATE),
        "weight_search.temperature_interval": Key(int, POSITIVE),
        "weight_search.temperature_floor": Key(float, POSITIVE),
        "weight_search.soft": Key(bool),
        "weight_search.noise": Key(float, NOT_NEGATIVE),
        "weight_search.noise_rate": Key(float, RATE),
        "weight_search.noise_interval": Key(int, POSITIVE),
        "weight_search.quantize_first": Key(bool),
        "weight_search.quantize_last": Key(bool),
        "weight_search.logit_weight_decay": Key(float, NOT_NEGATIVE, optional=True),
        "weight_search.activations": Key(str),
        "weight_search.activation_bits": Key(int, _range("1 to 8", lambda value: 1 <= value <= 8)),
    },
    "snn": {
        "snn.preset": Key(str, ("paper", "release_1gpu", "release_4gpu")),
        "snn.tau": Key(int, _range("1 to 9", lambda value: 1 <= value <= 9)),
        "snn.two_step": Key(bool),
        "snn.epochs": Key(tuple, ALL_POSITIVE, item=int),
        "snn.learning_rate": Key(float, POSITIVE),
        "snn.weight_decays": Key(tuple, ALL_NOT_NEGATIVE, item=float),
        "snn.refine": Key(bool, optional=True),
        "snn.refine_interval": Key(int, POSITIVE),
        "snn.maintenance": Key(str, ("clean", "release"), optional=True),
        "snn.pattern_optimizer": Key(str, ("release14", "skip"), optional=True),
        "snn.teacher": Key(str, TEACHER),
        "snn.teacher_network": Key(str),
        "snn.teacher_epochs": Key(int, POSITIVE),
        "snn.teacher_learning_rate": Key(float, POSITIVE),
    },
    "basq": {
        "basq.preset": Key(str, ("release", "held_out")),
        "basq.bits": Key(int, _range("2 to 8", lambda bits: 2 <= bits <= 8)),
        "basq.branch_decays": Key(tuple, BRANCH_DECAYS, item=float),
        "basq.epochs": Key(tuple, ALL_POSITIVE, item=int),
        "basq.learning_rate": Key(float, POSITIVE),
        "basq.schedule_steps": Key(int, POSITIVE, optional=True),
        "basq.weight_decay": Key(float, NOT_NEGATIVE),
        "basq.gradient_clip_norm": Key(float, POSITIVE),
        "basq.unselected": Key(str, ("decay", "freeze")),
        "basq.folds": Key(int, _range("2 or more", lambda value: value >= 2)),
        "basq.fold_kind": Key(str, ("contiguous", "stratified"), optional=True),
        "basq.fold_batch": Key(int, POSITIVE),
        "basq.search_on": Key(str, ("test", "validation"), optional=True),
        "basq.one_random_stream": Key(bool, optional=True),
        "basq.report_epoch": Key(str, ("best", "last"), optional=True),
        "basq.population": Key(int, POSITIVE),
        "basq.mutations": Key(int, NOT_NEGATIVE),
        "basq.crossovers": Key(int, NOT_NEGATIVE),
        "basq.parents": Key(int, POSITIVE),
        "basq.generations": Key(int, NOT_NEGATIVE),
        "basq.mutation_probability": Key(float, UNIT),
        "basq.paths_at_once": Key(int, NOT_NEGATIVE),
        "basq.finetune_epochs": Key(int, POSITIVE),
        "basq.finetune_learning_rate": Key(float, POSITIVE),
        "basq.teacher": Key(str, TEACHER),
        "basq.teacher_network": Key(str),
        "basq.teacher_epochs": Key(int, POSITIVE),
        "basq.teacher_learning_rate": Key(float, POSITIVE),
    },
}

# Keys that say where or how a run is done, not what it computes: they may change between a run and its continuation.
LOCATION_KEYS = frozenset(
    {
        "data.data_dir",
        "data.workers",
        "train.eval_batch_size",
        "train.steps_per_dispatch",
        "train.checkpoint_seconds",
        "basq.paths_at_once",
    }
)


# Keys added after runs were made, with the value that stands for what those runs did: their folders stay usable.
ADDED_LATER = {
    "num_seeds": 1,
    "data.lighting": "none",
    "data.decoder": "pillow",
    "train.accumulation_steps": 1,
    "train.remat": False,
}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values of a nested mapping."""
    flat = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value})
    return flat


def validate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a config against the schema.

    Args:
      config: nested mapping (a ConfigDict's ``to_dict()``).

    Returns:
      The config as nested plain dicts, numbers in the type the schema names, sequences as tuples.

    Raises:
      UserError: one line that names the key, its value and what is accepted.
    """
    from bnn_jax.data import SOURCES
    from bnn_jax.networks import NETWORKS
    from bnn_jax.quantizers import ACT

    flat = flatten(config)
    method = flat.get("method")
    if not isinstance(method, str) or method not in SECTIONS:
        raise UserError(f"config.method={method!r}: accepted are {', '.join(sorted(SECTIONS))}")
    schema = {**COMMON, **SECTIONS[method]}
    for key in flat:
        if key not in schema:
            raise UserError(f"config.{key}: unknown key; {suggest(key, schema)}")
    for key in schema:
        if key not in flat:
            raise UserError(f"config.{key} is missing; see configs/common.py")
    values = {key: _check(key, flat[key], schema[key]) for key in schema}
    tables = {
        "network": NETWORKS,
        "snn.teacher_network": NETWORKS,
        "basq.teacher_network": NETWORKS,
        "weight_search.activations": ACT,
        "data.name": SOURCES,
    }
    for key, table in tables.items():
        if key in values and values[key] not in table:
            raise UserError(f"config.{key}={values[key]!r}: accepted are {', '.join(table)}")
    if "weight_search.values" in values:
        values["weight_search.values"] = _searched_values(values["weight_search.values"])
    return _unflatten(values)


def _searched_values(values: Any) -> str | tuple[float, ...]:
    """The name of a set of values, 'fp32', or a list of numbers, as a tuple.

    Raises:
      UserError: it is none of these.
    """
    from bnn_jax.methods.weight_search import FULL_PRECISION
    from bnn_jax.quantizers.categorical import candidates_of

    if values == FULL_PRECISION:
        return values
    try:
        found = candidates_of(values)
    except ValueError as error:
        raise UserError(f"config.weight_search.{error}, or {FULL_PRECISION}") from None
    return values if isinstance(values, str) else found


def suggest(key: str, schema: Mapping[str, Any]) -> str:
    """What might have been meant by an unknown dotted key."""
    in_section = sorted(name for name in schema if name.startswith(key.split(".")[0] + "."))
    close = difflib.get_close_matches(key, schema, n=1)
    # The name of a section alone is close to those of its shortest keys, which says nothing.
    if close and not ("." not in key and in_section):
        return f"did you mean config.{close[0]}?"
    return f"accepted are {', '.join(in_section or sorted(schema))}"


def _check(key: str, value: Any, rule: Key) -> Any:
    """The value in the rule's type, or a UserError."""
    if value is None:
        if rule.optional:
            return None
        raise UserError(f"config.{key} is empty: accepted is {_describe(rule)}")
    typed = _in_type(value, rule)
    if typed is None or (rule.accepted is not None and not _accepts(rule.accepted, typed)):
        raise UserError(f"config.{key}={value!r}: accepted is {_describe(rule)}")
    return typed


def _in_type(value: Any, rule: Key) -> Any:
    """The value in the rule's type, or None if it is of another."""
    if rule.kind is not tuple:
        return _convert(value, rule.kind)
    if not isinstance(value, (tuple, list)):
        return None
    items = tuple(_convert(item, rule.item or object) for item in value)
    return None if None in items else items


def _convert(value: Any, kind: type) -> Any:
    """``value`` as ``kind``, else None: an int is a float too, a bool is no number, nor are NaN and infinity."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    fits = isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool))
    return value if fits and not (isinstance(value, float) and not math.isfinite(value)) else None


def _accepts(accepted: tuple, value: Any) -> bool:
    if len(accepted) == 2 and callable(accepted[1]):
        return bool(accepted[1](value))
    return value in accepted


def _describe(rule: Key) -> str:
    kind = f"a tuple of {rule.item.__name__}" if rule.kind is tuple and rule.item else f"{rule.kind.__name__}"
    if rule.accepted is None:
        return kind
    if len(rule.accepted) == 2 and callable(rule.accepted[1]):
        return rule.accepted[0] if rule.kind is object else f"{kind}, {rule.accepted[0]}"
    return f"one of {', '.join(map(repr, rule.accepted))}"


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return nested
