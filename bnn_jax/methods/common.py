"""Parts of a stage that every method takes from the shared sections of the config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from bnn_jax.catalogue import facts_of
from bnn_jax.errors import UserError
from bnn_jax.keys import POSITIVE, STAGE_OR_FILE, Key, Section
from bnn_jax.stages import DataSpec, Inherit, OptimSpec, ParameterGroup, QuantSpec, Spec, Stage, Teacher, spec

TEACHER = "teacher"
COLLECTIONS = ("params", "batch_stats", "quant_state")
# Weights of the self-distillation terms in the published recipes.
EXTRA_OBJECTIVE_WEIGHTS = {"feature_swap": 1.0, "label_bank": 0.05, "cluster": 0.01}


def data_spec(config: Mapping[str, Any]) -> DataSpec:
    """``config.data`` as a ``DataSpec``."""
    data = config["data"]
    options = {key: data[key] for key in ("image_size", "num_classes", "test_fraction") if data[key] is not None}
    mean, std = data["mean"], data["std"]
    if len(mean) != len(std) or (mean and not data["normalize"]):
        raise UserError(
            f"config.data.mean={mean!r}, std={std!r}, normalize={data['normalize']!r}: accepted are both or neither, a "
            "number for each channel, and with them normalize=True"
        )
    return DataSpec(
        name=data["name"],
        num_train=data["num_train"],
        num_eval=data["num_eval"],
        validation_fraction=data["validation_fraction"],
        augment=data["augment"],
        normalize=data["normalize"],
        mean=mean,
        std=std,
        lighting=data["lighting"],
        decoder=data["decoder"],
        mixup=data["mixup"],
        color_jitter=data["color_jitter"],
        options=tuple(sorted(options.items())),
    )


def switches_of(section: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A method's switches: the values of the section's preset, replaced by those given explicitly."""
    preset = presets[section["preset"]]
    return {key: value if section[key] is None else section[key] for key, value in preset.items()}


def sgd_spec(config: Mapping[str, Any], *, learning_rate: Spec, epochs: int) -> OptimSpec:
    """Stochastic gradient descent as ``config.train`` says, one group for all parameters."""
    train = config["train"]
    return OptimSpec(
        optimizer=spec("sgd", momentum=train["momentum"], nesterov=train["nesterov"]),
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=train["batch_size"],
        groups=(ParameterGroup(".*", weight_decay=train["weight_decay"]),),
        drop_last_batch=train["drop_last_batch"],
    )


def teacher_keys(network: str) -> Section:
    """Keys of a method whose teacher is a file or is trained first, see ``teacher_stage``."""
    return {
        "teacher": Key("stage", "whether it is trained first, or read from a checkpoint", STAGE_OR_FILE),
        "teacher_network": Key(network, "network of the teacher", table="bnn_jax.networks.NETWORKS"),
        "teacher_epochs": Key(200, "epochs of the teacher; config.train has its momentum and weight decay", POSITIVE),
        "teacher_learning_rate": Key(0.1, "its learning rate at the start, falling to 0 by a cosine", POSITIVE),
    }


def teacher_stage(config: Mapping[str, Any], section: Mapping[str, Any], *, name: str) -> Stage:
    """A full-precision network, trained on the labels by stochastic gradient descent as ``config.train`` says.

    Args:
      config: validated config.
      section: the method's own section, with teacher_network, teacher_epochs and teacher_learning_rate.
      name: name of the stage.
    """
    rate = spec("cosine", initial=section["teacher_learning_rate"])
    return Stage(
        name=name,
        network=spec(section["teacher_network"]),
        quant=QuantSpec(),
        data=data_spec(config),
        objectives=(spec("cross_entropy", weight=1.0),),
        optim=sgd_spec(config, learning_rate=rate, epochs=section["teacher_epochs"]),
        seed=config["seed"],
        init_seed=config["seed"],
        compute_dtype=config["train"]["compute_dtype"],
    )


def teacher_of(section: Mapping[str, Any], *, stage: str) -> Teacher:
    """The teacher of the other stages: the stage of that name, or a file with the section's teacher_network."""
    if section["teacher"] == "stage":
        return Teacher(f"stage:{stage}@last")
    return Teacher(section["teacher"], spec(section["teacher_network"]))


def start_from(config: Mapping[str, Any], stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages with ``config.freeze``, and with ``config.init_from`` at the first of ``config.network``.

    A teacher that is trained first has neither.

    Raises:
      UserError: the first stage starts from something else.
    """
    if not config["init_from"] and not config["freeze"]:
        return stages
    count = sum(stage.name == TEACHER for stage in stages[:1])
    first, *others = stages[count:]
    if config["init_from"]:
        own = first.inherit
        if own is not None and own.source != config["init_from"]:
            raise UserError(f"config.init_from={config['init_from']!r}: stage {first.name} starts from {own.source!r}")
        recompute = ("/step$",) if own is None else ("/step$", *own.recompute)
        inherit = Inherit(config["init_from"], COLLECTIONS, recompute=recompute, adapt=True)
        first = dataclasses.replace(first, inherit=inherit)
    frozen = [dataclasses.replace(stage, freeze=config["freeze"]) for stage in (first, *others)]
    return (*stages[:count], *frozen)


def add_extra_objectives(config: Mapping[str, Any], stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages with ``config.extra_objectives`` added, on the last one or on all.

    Raises:
      UserError: the weights do not fit the objectives, or an objective is there already.
    """
    names, weights = config["extra_objectives"], config["extra_objective_weights"]
    if weights and len(weights) != len(names):
        raise UserError(f"config.extra_objective_weights={weights!r}: accepted is none, or one for each of {names!r}")
    weights = weights or tuple(EXTRA_OBJECTIVE_WEIGHTS[name] for name in names)
    first = len(stages) - 1 if config["extra_objectives_on"] == "last_stage" else 0
    for stage in stages[first:]:
        twice = {term.name for term in stage.objectives} & set(names)
        if twice:
            raise UserError(f"config.extra_objectives: {sorted(twice)[0]!r} is part of stage {stage.name} already")

    def extended(stage: Stage) -> Stage:
        extra = tuple(_extra_objective(stage, *choice) for choice in zip(names, weights))
        return dataclasses.replace(stage, objectives=stage.objectives + extra)

    return stages[:first] + tuple(extended(stage) for stage in stages[first:])


def fit_memory(config: Mapping[str, Any], stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages with what ``config.train`` does for batches that do not fit into memory.

    Raises:
      UserError: a batch has fewer images than parts.
    """
    train = config["train"]
    parts, batch_size = train["accumulation_steps"], train["batch_size"]
    if parts > batch_size:
        raise UserError(f"config.train.accumulation_steps={parts}: accepted is at most the batch size, {batch_size}")
    return tuple(
        dataclasses.replace(
            stage, optim=dataclasses.replace(stage.optim, accumulation_steps=parts), remat=train["remat"]
        )
        for stage in stages
    )


def _extra_objective(stage: Stage, name: str, weight: float) -> Spec:
    # Features of a dense layer have no positions to average over.
    flat = name == "feature_swap" and facts_of(stage.network.name).dense
    return spec(name, weight=weight, **({"compare": "elementwise"} if flat else {}))
