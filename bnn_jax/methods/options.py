"""What people expect of a training program, for the stages of every method alike: ``config.train``, ``config.log``.

Every value is off by default, and a stage is then what its method has made of it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from bnn_jax.errors import UserError
from bnn_jax.stages import OptimSpec, Spec, Stage, spec

# Objectives that do not ask for the one class of an image, or know what to do with two.
MIXABLE = ("cross_entropy", "distillation", "feature_swap")


def with_training_options(config: Mapping[str, Any], stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages with what the config says of all of them; those that search are left as they are.

    Raises:
      UserError: an option that a stage has no use for, or that needs another one.
    """
    _check_schedule(config)
    train, validation = config["train"], config["data"]["validation_fraction"]
    if train["early_stopping"] and not validation:
        raise UserError(
            f"config.train.early_stopping={train['early_stopping']!r}: it looks at images held out of training; "
            "accepted with config.data.validation_fraction=0.0 is 0"
        )
    return tuple(stage if stage.kind == "search" else _with_options(config, stage) for stage in stages)


def _check_schedule(config: Mapping[str, Any]) -> None:
    kind, steps = config["train"]["schedule"], config["train"]["step_epochs"]
    what = f"config.train.step_epochs={steps!r}"
    if (kind == "step") != bool(steps):
        accepted = "one epoch or more" if kind == "step" else "()"
        raise UserError(f"{what}: accepted with config.train.schedule={kind!r} is {accepted}")
    if list(steps) != sorted(set(steps)):
        raise UserError(f"{what}: accepted are rising epochs")


def _with_options(config: Mapping[str, Any], stage: Stage) -> Stage:
    return dataclasses.replace(
        stage,
        objectives=_objectives(config, stage),
        optim=_optim(config["train"], stage.optim),
        log_flip_rate=config["log"]["flip_rate"],
    )


def _objectives(config: Mapping[str, Any], stage: Stage) -> tuple[Spec, ...]:
    """The stage's terms, of which the cross-entropy with the labels smooths them."""
    smoothing, mixup = config["train"]["label_smoothing"], config["data"]["mixup"]
    for term in stage.objectives:
        if mixup and term.name not in MIXABLE:
            raise UserError(
                f"config.data.mixup={mixup!r}: stage {stage.name} has the objective {term.name}, which wants images of "
                "one class; accepted is 0"
            )
    if not smoothing:
        return stage.objectives
    if "cross_entropy" not in [term.name for term in stage.objectives]:
        raise UserError(
            f"config.train.label_smoothing={smoothing!r}: stage {stage.name} has no cross-entropy with the labels; "
            "accepted is 0"
        )
    return tuple(
        spec(term.name, **term.kwargs, label_smoothing=smoothing) if term.name == "cross_entropy" else term
        for term in stage.objectives
    )


def _optim(train: Mapping[str, Any], optim: OptimSpec) -> OptimSpec:
    clip, optimizer = train["gradient_clip_norm"], optim.optimizer
    if train["optimizer"] is not None:
        options = {name: train[name] for name in ("momentum", "nesterov")} if train["optimizer"] == "sgd" else {}
        optimizer = spec(train["optimizer"], **options)
    return dataclasses.replace(
        optim,
        optimizer=optimizer,
        learning_rate=_learning_rate(train, optim.learning_rate),
        gradient_clip_norm=optim.gradient_clip_norm if clip is None else clip,
        ema_decay=train["ema_decay"],
        early_stopping=train["early_stopping"],
    )


def _learning_rate(train: Mapping[str, Any], recipe: Spec) -> Spec:
    """The schedule of the learning rate: the recipe's, or another from its highest rate on; with a warm-up in front."""
    options = recipe.kwargs
    highest = options["initial"] if "initial" in options else max(options.get("values", (options.get("value"),)))
    chosen = recipe
    if train["schedule"] == "step":
        values = tuple(highest * train["step_factor"] ** power for power in range(len(train["step_epochs"]) + 1))
        chosen = spec("piecewise", boundaries=train["step_epochs"], values=values)
    elif train["schedule"] is not None:
        name = {"constant": "value", "cosine": "initial"}[train["schedule"]]
        chosen = spec(train["schedule"], **{name: highest})
    if not train["warmup_epochs"]:
        return chosen
    # One warm-up: that of the config, where the recipe has its own.
    own = {name: value for name, value in chosen.kwargs.items() if name != "warmup_epochs"}
    return spec("warmup", schedule=spec(chosen.name, **own), warmup_epochs=train["warmup_epochs"])
