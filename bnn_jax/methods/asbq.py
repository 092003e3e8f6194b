"""ASBQ: a chain of precisions 32 -> 8 -> 4 -> 2 -> 1 bit, each rung initialised (and taught) by the one before.

Every rung is one training run; weights and activations share the bit width. A rung copies the trainable tensors of
the rung before, not its masks, running statistics or optimiser state. 5 % of the filters of every quantized
convolution are masked (VGG-Small: of the 1x2 blocks). Three presets answer the questions on which paper and released
code differ:

  paper: truly binary last rung; masks from the copied weights, applied after quantization; distillation (weight 0.5).
  release: as the code at its last commit: "1-bit" weights with several levels, random masks before quantization, no
    distillation.
  checkpoint: as release, with the block the published 4-bit checkpoint was trained with.

Reference: Xu et al., "Adaptive Multi-bit Progressive Quantization for Stable Training of Binary Neural Networks";
  release: Luadoo/ASBQ.
"""

from collections.abc import Mapping
from typing import Any

from bnn_jax.catalogue import facts_of
from bnn_jax.errors import UserError
from bnn_jax.keys import (
    ALL_NOT_NEGATIVE,
    ALL_POSITIVE,
    BITS,
    FALLING_BITS,
    FILE,
    FRACTION,
    POSITIVE,
    SEED,
    UNIT,
    Key,
    Section,
)
from bnn_jax.methods.common import data_spec, sgd_spec, switches_of
from bnn_jax.stages import IDENTITY, Inherit, QuantSpec, Spec, Stage, Teacher, spec

RELEASE: dict[str, Any] = {
    "block": "release",
    "w1": "levels",
    "prune_apply": "before_quant",
    "prune_source": "random_init",
    "init": "uniform",
    "copy_from": "best",
    "kd_weight": 0.0,
    "kd_reduction": "mean",
    "kd_factor": "2T2",
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "block": "release",
        "w1": "sign",
        "prune_apply": "after_quant",
        "prune_source": "copied_weights",
        "init": "he_normal",
        "copy_from": "last",
        "kd_weight": 0.5,
        "kd_reduction": "batchmean",
        "kd_factor": "T2",
    },
    "release": RELEASE,
    "checkpoint": {**RELEASE, "block": "checkpoint"},
}

KEYS: Section = {
    "preset": Key("paper", "published settings that fill what is empty, see bnn_jax/methods/asbq.py", tuple(PRESETS)),
    "bits": Key((32, 8, 4, 2, 1), "bit width of each rung", FALLING_BITS),
    "init_from": Key(None, "a checkpoint that the first rung starts from", FILE, kind=str),
    "init_bits": Key(32, "bit width of the network in init_from, which teaches the first rung", BITS),
    "epochs": Key((240,), "epochs per rung, or one number for all", ALL_POSITIVE),
    "learning_rates": Key((0.1, 0.1, 0.1, 0.01, 0.01), "base rate per rung, or one for all", ALL_POSITIVE),
    "learning_rate_boundaries": Key((80.0, 120.0, 180.0), "epochs at which the factor changes", ALL_NOT_NEGATIVE),
    "learning_rate_factors": Key((1.0, 0.1, 0.01, 0.001), "factors on the base rate", ALL_NOT_NEGATIVE),
    "schedule_epochs": Key(
        None, "epochs the boundaries are meant for, scaled to those of a rung; None: not scaled", POSITIVE, kind=int
    ),
    "block": Key(None, "block of the ResNets", ("release", "checkpoint", "imagenet"), kind=str),
    "w1": Key(None, "1-bit weights: binary, or with several levels as released", ("sign", "levels"), kind=str),
    "prune_amount": Key(0.05, "share of filters (VGG-Small: 1x2 blocks) masked", FRACTION),
    "prune_apply": Key(None, "where the mask is applied", ("before_quant", "after_quant"), kind=str),
    "prune_source": Key(None, "weights that the masks are chosen from", ("random_init", "copied_weights"), kind=str),
    "mask_seed": Key(1000, "seed of the random masks of all rungs but the first", SEED),
    "init": Key(None, "initial values of quantized convolutions", ("uniform", "he_normal"), kind=str),
    "copy_from": Key(None, "epoch of the previous rung that is copied", ("best", "last"), kind=str),
    "kd_weight": Key(None, "share of distillation in the loss", UNIT, kind=float),
    "kd_temperature": Key(5.0, "temperature of distillation", POSITIVE),
    "kd_reduction": Key(
        None, "mean of the divergence over images ('batchmean'), or over classes too", ("mean", "batchmean"), kind=str
    ),
    "kd_factor": Key(None, "factor on the divergence, T the temperature", ("1", "T2", "2T2"), kind=str),
}


def stage_name(bits: int) -> str:
    """'w4a4' for 4 bits."""
    return f"w{bits}a{bits}"


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """The switches of the run: the preset's values, replaced by those given explicitly.

    Raises:
      UserError: a combination that does not exist.
    """
    asbq = config["asbq"]
    switches = switches_of(asbq, PRESETS)
    network = config["network"]
    blocks = facts_of(network).asbq_blocks
    if blocks == ("imagenet",):
        if switches["block"] == "checkpoint" or asbq["block"] not in (None, "imagenet"):
            raise UserError(f"config.asbq.block={switches['block']!r}: accepted with network {network!r} is 'imagenet'")
        switches["block"] = "imagenet"
    elif not blocks:
        if asbq["block"] is not None:
            raise UserError(f"config.asbq.block={asbq['block']!r}: {network!r} has no such blocks; leave it empty")
    elif switches["block"] == "imagenet":
        raise UserError(f"config.asbq.block='imagenet': accepted with network {network!r} are 'release', 'checkpoint'")
    return switches


def stages(config: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The rungs of the chain.

    Args:
      config: validated config with the section ``asbq``.

    Raises:
      UserError: a combination that does not exist, or a number of epochs or learning rates that does not fit the rungs.
    """
    switches = resolve(config)
    bits = config["asbq"]["bits"]
    epochs = _per_rung(config, "epochs")
    rates = _per_rung(config, "learning_rates")
    sources = [
        config["asbq"]["init_from"] or config["init_from"],
        *(f"stage:{stage_name(rung)}@{switches['copy_from']}" for rung in bits),
    ]
    return tuple(
        _rung(config, switches, bits=rung, epochs=epochs[i], rate=rates[i], source=sources[i], seed=i)
        for i, rung in enumerate(bits)
    )


def _per_rung(config: Mapping[str, Any], key: str) -> tuple:
    """One value per rung; a single value serves all."""
    values, bits = config["asbq"][key], config["asbq"]["bits"]
    if len(values) == 1:
        return values * len(bits)
    if len(values) != len(bits):
        raise UserError(f"config.asbq.{key}={values!r}: accepted is one value, or one for each of the rungs {bits!r}")
    return values


def _rung(
    config: Mapping[str, Any],
    switches: Mapping[str, Any],
    *,
    bits: int,
    epochs: int,
    rate: float,
    source: str | None,
    seed: int,
) -> Stage:
    from_copied = switches["prune_source"] == "copied_weights"
    # A network that config.init_from brings may have other classes, so it teaches nothing.
    taught_by = None if source == config["init_from"] else source
    return Stage(
        name=stage_name(bits),
        network=network_spec(config, switches, kernel_init=switches["init"]),
        quant=quant_spec(config, switches, bits=bits, masked=source is not None or not _paper_masks(switches)),
        data=data_spec(config),
        objectives=objectives(config, switches, has_teacher=taught_by is not None),
        optim=sgd_spec(config, learning_rate=_learning_rate(config, rate, epochs=epochs), epochs=epochs),
        inherit=None if source is None else Inherit(source, recompute=("quant_state/.*/mask$",) if from_copied else ()),
        teacher=_teacher(config, switches, taught_by) if taught_by is not None and switches["kd_weight"] > 0 else None,
        seed=config["seed"] + 1000 * seed,
        # The published masks differ between the first rung and the others, and are the same in all others: each run
        # reseeds and draws the student after the teacher. A mask from random weights depends on this seed alone.
        init_seed=config["seed"] if source is None else config["asbq"]["mask_seed"],
        bits=float(bits),
        compute_dtype=config["train"]["compute_dtype"],
    )


def network_spec(config: Mapping[str, Any], switches: Mapping[str, Any], **options: Any) -> Spec:
    """The network, of the method's blocks where it has some."""
    block = {"block": switches["block"]} if facts_of(config["network"]).asbq_blocks else {}
    return spec(config["network"], **block, **options)


def _teacher(config: Mapping[str, Any], switches: Mapping[str, Any], source: str) -> Teacher:
    """The network that a rung starts from, as it was saved."""
    if not source.startswith("file:"):
        return Teacher(source)
    bits = config["asbq"]["init_bits"]
    quant = quant_spec(config, switches, bits=bits, masked=bits < 32 or not _paper_masks(switches))
    return Teacher(source, network_spec(config, switches), quant)


def _paper_masks(switches: Mapping[str, Any]) -> bool:
    """Whether masks come from trained weights, so that the first rung has none."""
    return switches["prune_source"] == "copied_weights"


def quant_spec(config: Mapping[str, Any], switches: Mapping[str, Any], *, bits: int, masked: bool) -> QuantSpec:
    """Quantizers of a rung; the first convolution, the shortcuts and the classifier stay full precision (VGG-Small: the
    first convolution is quantized too, its input is not)."""
    quantized_first = facts_of(config["network"]).quantized_first
    weight = IDENTITY if bits == 32 else spec("dorefa", bits=bits, **({"one_bit": switches["w1"]} if bits == 1 else {}))
    if masked and config["asbq"]["prune_amount"] > 0:
        weight = spec(
            "pruned",
            inner=weight,
            amount=config["asbq"]["prune_amount"],
            pattern="row_block" if quantized_first else "filter",
            apply_mask=switches["prune_apply"].removesuffix("_quant"),
        )
    act = IDENTITY if bits == 32 else spec("dorefa", bits=bits)
    return QuantSpec(weight=weight, act=act, first=weight if quantized_first else IDENTITY)


def objectives(config: Mapping[str, Any], switches: Mapping[str, Any], *, has_teacher: bool) -> tuple[Spec, ...]:
    """``(1 - l) * cross-entropy + l * factor * KD``, the second term only with a teacher and l > 0."""
    weight = switches["kd_weight"] if has_teacher else 0.0
    if weight == 0:
        return (spec("cross_entropy", weight=1.0),)
    temperature = config["asbq"]["kd_temperature"]
    factor = {"1": 1.0, "T2": temperature**2, "2T2": 2 * temperature**2}[switches["kd_factor"]]
    distillation = spec(
        "distillation", weight=weight * factor, temperature=temperature, reduction=switches["kd_reduction"]
    )
    return (spec("cross_entropy", weight=1.0 - weight), distillation)


def _learning_rate(config: Mapping[str, Any], base: float, *, epochs: int) -> Spec:
    asbq = config["asbq"]
    boundaries, factors = asbq["learning_rate_boundaries"], asbq["learning_rate_factors"]
    if len(factors) != len(boundaries) + 1 or list(boundaries) != sorted(boundaries):
        raise UserError(
            f"config.asbq.learning_rate_factors={factors!r}: accepted is one more than the rising boundaries, "
            f"{boundaries!r}"
        )
    if asbq["schedule_epochs"] is not None:
        boundaries = tuple(boundary * epochs / asbq["schedule_epochs"] for boundary in boundaries)
    return spec("piecewise", boundaries=boundaries, values=tuple(base * factor for factor in factors))
