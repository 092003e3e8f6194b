"""Weight Search: every weight is one of a few values, and its choice is trained as K logits.

By value: one stage that searches in a list of values. By bit: a chain of stages, of which the first finds signs and
each further one whether a weight found before is halved. Both train from random logits with SGD and cross-entropy; the
temperature of the gradient falls from epoch to epoch. The first convolution and the classifier stay full precision.

  paper    cosine by epoch, as the published runs were made
  release  cosine by step, as the last commit has it for all networks but ResNet-20, whose file says nothing

Reference: release: qinglu0330/DNN-weight-search, which cites no paper; very likely the code of Lu et al., "Quantization
  Through Search: A Novel Scheme to Quantize Convolutional Neural Networks in Finite Weight Space", ASP-DAC 2023.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from bnn_jax.catalogue import facts_of
from bnn_jax.errors import UserError
from bnn_jax.keys import (
    ALL_NOT_NEGATIVE,
    ALL_POSITIVE,
    BITS_IN_TURN,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    Condition,
    Key,
    Section,
    between,
)
from bnn_jax.knobs import ERROR_DECAY_K, ERROR_DECAY_T, NOISE, TEMPERATURE
from bnn_jax.methods.common import data_spec, sgd_spec
from bnn_jax.stages import IDENTITY, Inherit, OptimSpec, ParameterGroup, QuantSpec, Spec, Stage, spec

# Unit of the cosine by network where the preset leaves it to the network.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"schedule_unit": "epoch"},
    "release": {"schedule_unit": "step"},
}
RELEASE_BY_EPOCH = ("standard_resnet20",)

# Instead of a list of values: the same network and recipe in full precision, which the search is compared with.
FULL_PRECISION = "fp32"

KEYS: Section = {
    "preset": Key(
        "paper", "published settings that fill what is empty, see bnn_jax/methods/weight_search.py", tuple(PRESETS)
    ),
    "values": Key(
        "po2-2b",
        "values of a weight: '1b', 'po2-2b', 'po2-3b', 'po2-4b', 'int-2b', 'int-3b', 'int-4b', a list such as "
        "(-1.0, 0.0, 1.0), or 'fp32' for the same training in full precision",
        Condition("the name of a set or a list of numbers", lambda _: True),
        kind=object,
    ),
    "by_bit": Key(
        (),
        "(0, 1, ...): signs first, then a halving for each further bit; values are not used then",
        BITS_IN_TURN,
        item=int,
    ),
    "epochs": Key((200,), "epochs per stage, or one number for all", ALL_POSITIVE),
    "learning_rate": Key(0.1, "learning rate at the start", POSITIVE),
    "schedule_unit": Key(None, "how often the cosine moves", ("epoch", "step"), kind=str),
    "learning_rate_boundaries": Key(
        (), "epochs at which the rate is multiplied instead of following a cosine", ALL_NOT_NEGATIVE, item=float
    ),
    "learning_rate_factor": Key(0.1, "factor on the rate at each of the boundaries", POSITIVE),
    "temperature": Key(1.0, "temperature of the choices, at the start", POSITIVE),
    "temperature_rate": Key(0.97, "factor on the temperature", RATE),
    "temperature_interval": Key(1, "epochs between two such factors", POSITIVE),
    "temperature_floor": Key(1e-5, "smallest temperature", POSITIVE),
    "soft": Key(False, "whether training uses the expected weight instead of the chosen one"),
    "noise": Key(0.0, "factor on Gumbel noise in training; 0: nothing is drawn", NOT_NEGATIVE),
    "noise_rate": Key(1.0, "factor on the noise", RATE),
    "noise_interval": Key(1, "epochs between two such factors", POSITIVE),
    "quantize_first": Key(False, "whether the first convolution is searched too"),
    "quantize_last": Key(False, "whether the classifier is searched too"),
    "logit_weight_decay": Key(
        None, "L2 of the logits alone; None: config.train.weight_decay", NOT_NEGATIVE, kind=float
    ),
    "activations": Key("identity", "activation quantizer", table="bnn_jax.quantizers.ACT"),
    "activation_bits": Key(1, "bits of activation quantizer 'dorefa'", between(1, 8)),
}

# By bit: what the first stage chooses between, and the factors each further one multiplies with.
SIGNS, FACTORS = (1.0, -1.0), (1.0, 0.5)

# Activation quantizers that binarise to -1 and +1; of what a ReLU leaves they make +1 alone.
SIGN_ACTIVATIONS = ("sign", "irnet", "approx_sign")


def stages(config: Mapping[str, Any]) -> tuple[Stage, ...]:
    """One stage, or with ``config.weight_search.by_bit`` one for each bit.

    Args:
      config: validated config with the section ``weight_search``.

    Raises:
      UserError: a combination that does not exist.
    """
    _check(config)
    section = config["weight_search"]
    chain = section["by_bit"]
    epochs = section["epochs"] * (len(chain) or 1) if len(section["epochs"]) == 1 else section["epochs"]
    if len(epochs) != max(len(chain), 1):
        raise UserError(
            f"config.weight_search.epochs={section['epochs']!r}: accepted is one, or one for each bit of {chain!r}"
        )
    if chain:
        return tuple(_bit_stage(config, bit, epochs=epochs[bit]) for bit in chain)
    full_precision = section["values"] == FULL_PRECISION
    weight = IDENTITY if full_precision else spec("categorical", values=section["values"], mode=_mode(config))
    name = "full_precision" if full_precision else "search"
    return (_stage(config, name, weight, bits=bits_of(section["values"]), epochs=epochs[0]),)


def bits_of(values: str | tuple[float, ...]) -> float:
    """log2 of the number of values; the name of a set ends in its bits ('po2-3b')."""
    if values == FULL_PRECISION:
        return 32.0
    return float(values[:-1].rpartition("-")[2]) if isinstance(values, str) else math.log2(len(values))


def bit_levels(bit: int) -> tuple[float, ...]:
    """The values weights can take after the stage of a bit, increasing."""
    levels = set(SIGNS)
    for _ in range(bit):
        levels = {level * factor for level in levels for factor in FACTORS}
    return tuple(sorted(levels))


def _check(config: Mapping[str, Any]) -> None:
    """Raises UserError for combinations that do not exist."""
    section, network = config["weight_search"], config["network"]
    if "feature_swap" in config["extra_objectives"]:
        raise UserError(
            "config.extra_objectives: 'feature_swap' needs real-valued weights, which weight_search does not have; "
            "accepted are label_bank, cluster"
        )
    if section["by_bit"] and (section["soft"] or section["values"] == FULL_PRECISION):
        raise UserError(
            f"config.weight_search.by_bit={section['by_bit']!r}: accepted is () with soft={section['soft']!r}, "
            f"values={section['values']!r}: bits are found by hard choices"
        )
    if section["activations"] in SIGN_ACTIVATIONS and facts_of(network).behind_relu:
        raise UserError(
            f"config.weight_search.activations={section['activations']!r}: behind the ReLU of {network!r} no sign is "
            "-1; accepted are identity, dorefa, or a network without ReLU such as 'hardtanh_resnet20'"
        )


def _mode(config: Mapping[str, Any]) -> str:
    return "soft" if config["weight_search"]["soft"] else "hard"


def _bit_stage(config: Mapping[str, Any], bit: int, *, epochs: int) -> Stage:
    """The stage of one bit: signs, or whether the weights of the stage before are halved."""
    if bit == 0:
        return _stage(config, "bit_0", spec("categorical", values=SIGNS), bits=1.0, epochs=epochs)
    weight = spec("categorical", values=FACTORS, base_levels=bit_levels(bit - 1), start="even")
    return _stage(
        config,
        f"bit_{bit}",
        weight,
        bits=math.log2(len(bit_levels(bit))),
        epochs=epochs,
        seed=config["seed"] + 1000 * bit,
        inherit=Inherit(f"stage:bit_{bit - 1}@last", ("params", "batch_stats"), realised_base=True),
    )


def _stage(config: Mapping[str, Any], name: str, weight: Spec, *, bits: float, epochs: int, **options: Any) -> Stage:
    return Stage(
        name=name,
        network=spec(config["network"]),
        quant=quant_spec(config, weight),
        data=data_spec(config),
        objectives=(spec("cross_entropy", weight=1.0),),
        optim=optim_spec(config, weight, epochs=epochs),
        knobs=knobs(config, weight),
        **{"seed": config["seed"], **options},
        init_seed=config["seed"],
        bits=bits,
        compute_dtype=config["train"]["compute_dtype"],
        log_train_top5=True,
    )


def quant_spec(config: Mapping[str, Any], weight: Spec) -> QuantSpec:
    """The search in all inner convolutions and shortcuts; in the first and last layer on demand."""
    section = config["weight_search"]
    act = IDENTITY
    if section["activations"] != "identity":
        bits = {"bits": section["activation_bits"]} if section["activations"] == "dorefa" else {}
        act = spec(section["activations"], **bits)
    return QuantSpec(
        weight=weight,
        act=act,
        first=weight if section["quantize_first"] else IDENTITY,
        last=weight if section["quantize_last"] else IDENTITY,
        shortcut=weight,
    )


def knobs(config: Mapping[str, Any], weight: Spec) -> tuple[tuple[str, Spec], ...]:
    """Temperature and, unless it is 0, noise of the choices; the estimator's knobs of IR-Net's activations."""
    section = config["weight_search"]
    found = []
    if weight != IDENTITY:
        options = {key: section[f"temperature_{key}"] for key in ("rate", "interval", "floor")}
        found.append((TEMPERATURE.name, spec("decay_by_epoch", initial=section["temperature"], **options)))
        if section["noise"] > 0:
            options = {key: section[f"noise_{key}"] for key in ("rate", "interval")}
            found.append((NOISE.name, spec("decay_by_epoch", initial=section["noise"], **options)))
    if section["activations"] == "irnet":
        found += [(knob.name, spec(knob.name)) for knob in (ERROR_DECAY_K, ERROR_DECAY_T)]
    return tuple(found)


def optim_spec(config: Mapping[str, Any], weight: Spec, *, epochs: int) -> OptimSpec:
    """SGD on logits and all other parameters alike, unless the logits have a weight decay of their own."""
    section, decay = config["weight_search"], config["train"]["weight_decay"]
    optim = sgd_spec(config, learning_rate=learning_rate(config), epochs=epochs)
    own = section["logit_weight_decay"]
    if own is None or weight == IDENTITY:
        return optim
    facts = facts_of(config["network"])
    outer = [
        layer
        for layer, searched in (
            (facts.first_layer, section["quantize_first"] or facts.dense),
            (facts.last_layer, section["quantize_last"]),
        )
        if not searched
    ]
    full_precision = [ParameterGroup(f"^({'|'.join(outer)})/", weight_decay=decay)] if outer else []
    groups = (*full_precision, ParameterGroup("kernel$", weight_decay=own), ParameterGroup(".*", weight_decay=decay))
    return dataclasses.replace(optim, groups=groups)


def learning_rate(config: Mapping[str, Any]) -> Spec:
    """Steps at the given epochs where there are some, else a cosine by epoch or by step."""
    section = config["weight_search"]
    rate, boundaries = section["learning_rate"], section["learning_rate_boundaries"]
    if boundaries:
        if list(boundaries) != sorted(boundaries):
            raise UserError(f"config.weight_search.learning_rate_boundaries={boundaries!r}: accepted are rising epochs")
        values = tuple(rate * section["learning_rate_factor"] ** power for power in range(len(boundaries) + 1))
        return spec("piecewise", boundaries=boundaries, values=values)
    return spec("cosine" if schedule_unit(config) == "step" else "cosine_by_epoch", initial=rate)


def schedule_unit(config: Mapping[str, Any]) -> str:
    """'epoch' or 'step': how often the cosine moves; the preset's unless it is given."""
    section = config["weight_search"]
    if section["schedule_unit"] is not None:
        return section["schedule_unit"]
    if section["preset"] == "release" and config["network"] in RELEASE_BY_EPOCH:
        return "epoch"
    return PRESETS[section["preset"]]["schedule_unit"]
