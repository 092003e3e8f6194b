"""BASQ: a supernet with seven clip values per searched layer, evolution on each of ten folds, fine-tuning per winner.

  [teacher]               full precision, unless it is a file
  supernet_activations    activations quantized, weights real; every step trains one random path
  supernet                both quantized; a new optimiser, weight steps made anew
  search                  evolution on every fold: the path with the highest top-1 in it, by the supernet as it is
  finetune_<i>            the winner of fold i: BatchNorm's running statistics, biases and clip values; all else frozen

The training of the supernet needs no labels: its loss is the cross-entropy with the teacher's probabilities.

  release   folds are the tenths of the test images sorted by class, one random stream runs through the folds, and the
            accuracy of a winner on the images outside of its fold is the best of those before and after each epoch of
            fine-tuning, so that images choose what is reported on them
  held_out  folds hold every class alike and come from images held out from training, the last epoch counts, and the
            test images are seen once, at the end

Reference: Kim, Park, Yoo 2022 (ECCV, LNCS 13672, 17-33); release: HanByulKim/BASQ (MobileNet-v2, ImageNet, 2 bits).
  Other networks, images of 32x32 pixels and other bit widths are by analogy (bnn_jax/networks/searched.py).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from bnn_jax.catalogue import facts_of
from bnn_jax.errors import UserError
from bnn_jax.keys import (
    ALL_POSITIVE,
    NOT_NEGATIVE,
    POSITIVE,
    TWO_NOT_NEGATIVE,
    UNIT,
    Key,
    Section,
    at_least,
    between,
)
from bnn_jax.methods.common import COLLECTIONS, TEACHER, data_spec, switches_of, teacher_keys, teacher_of, teacher_stage
from bnn_jax.stages import Inherit, OptimSpec, ParameterGroup, QuantSpec, Spec, Stage, spec

PRESETS: dict[str, dict[str, Any]] = {
    "release": {"fold_kind": "contiguous", "search_on": "test", "one_random_stream": True, "report_epoch": "best"},
    "held_out": {
        "fold_kind": "stratified",
        "search_on": "validation",
        "one_random_stream": False,
        "report_epoch": "last",
    },
}

KEYS: Section = {
    "preset": Key("release", "published settings that fill what is empty, see bnn_jax/methods/basq.py", tuple(PRESETS)),
    "bits": Key(2, "bits of weights and activations; 2-bit weights are ternary", between(2, 8)),
    "branch_decays": Key(
        (1e-2, 5e-3, 1e-3, 5e-4, 1e-4, 5e-5, 1e-5), "L2 of the clip values, one per branch", TWO_NOT_NEGATIVE
    ),
    "epochs": Key((280,), "epochs per phase of the supernet, or one number for both", ALL_POSITIVE),
    "learning_rate": Key(3.75e-4, "rate of Adam at the start, falling to 0 by a cosine over the steps", POSITIVE),
    "schedule_steps": Key(None, "steps of the cosine; None: those of the phase", POSITIVE, kind=int),
    "weight_decay": Key(5e-6, "L2 of the convolutions", NOT_NEGATIVE),
    "gradient_clip_norm": Key(10.0, "L2 norm that the gradient is clipped to", POSITIVE),
    "unselected": Key(
        "decay", "branches a step has not chosen: have gradient 0 ('decay') or are left alone", ("decay", "freeze")
    ),
    "folds": Key(10, "folds of the images that the search looks at, each with a winner of its own", at_least(2)),
    "fold_kind": Key(
        None,
        "what a fold holds: neighbours in the order of classes, or every class alike",
        ("contiguous", "stratified"),
        kind=str,
    ),
    "fold_batch": Key(200, "images in a batch of contiguous folds", POSITIVE),
    "search_on": Key(
        None, "images of the folds; 'validation' are held out from training", ("test", "validation"), kind=str
    ),
    "one_random_stream": Key(None, "whether one random stream runs through all folds; else each has a seed", kind=bool),
    "report_epoch": Key(None, "epoch of the fine-tuning that is reported", ("best", "last"), kind=str),
    "population": Key(45, "paths in a generation", POSITIVE),
    "mutations": Key(15, "paths of a generation that are mutations", NOT_NEGATIVE),
    "crossovers": Key(15, "paths of a generation that are crossovers", NOT_NEGATIVE),
    "parents": Key(10, "best paths so far, which the next ones are made from", POSITIVE),
    "generations": Key(20, "generations after the first, random one", NOT_NEGATIVE),
    "mutation_probability": Key(0.1, "probability with which each gene mutates", UNIT),
    "paths_at_once": Key(0, "paths evaluated side by side; 0: chosen by the device", NOT_NEGATIVE, may_change=True),
    "finetune_epochs": Key(3, "epochs of fine-tuning for each winner", POSITIVE),
    "finetune_learning_rate": Key(7.5e-6, "learning rate of fine-tuning", POSITIVE),
    **teacher_keys("standard_resnet18_cifar"),
}

FIRST, SECOND, SEARCH = "supernet_activations", "supernet", "search"

STEPS_OF_WEIGHTS = "/weight_quantizer/step$"


def stages(config: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Teacher (unless it is a file), both phases of the supernet, the search, a fine-tuning for every fold.

    Args:
      config: validated config with the section ``basq``.

    Raises:
      UserError: a network without branches, or values that do not fit each other.
    """
    basq, switches = config["basq"], switches_of(config["basq"], PRESETS)
    _check(config, switches)
    first = _supernet(config, FIRST, epochs=basq["epochs"][0])
    second = _supernet(config, SECOND, epochs=basq["epochs"][-1])
    search = dataclasses.replace(
        second,
        name=SEARCH,
        kind="search",
        inherit=Inherit(f"stage:{SECOND}@last", COLLECTIONS),
        objectives=(),
        teacher=None,
        choice=None,
        search=search_spec(config, switches),
        seed=config["seed"] + 3000,
    )
    tuned = [_finetune(config, search, fold) for fold in range(basq["folds"])]
    teacher = (teacher_stage(config, basq, name=TEACHER),) if basq["teacher"] == "stage" else ()
    return (*teacher, first, second, search, *tuned)


def _check(config: Mapping[str, Any], switches: Mapping[str, Any]) -> None:
    basq = config["basq"]
    if not facts_of(config["network"]).searched:
        raise UserError(f"config.network={config['network']!r}: accepted with BASQ are the networks 'basq_...'")
    if len(basq["epochs"]) not in (1, 2):
        raise UserError(f"config.basq.epochs={basq['epochs']!r}: accepted is one value, or one for each of 2 phases")
    if basq["mutations"] + basq["crossovers"] > basq["population"]:
        raise UserError(
            f"config.basq.population={basq['population']!r}: mutations={basq['mutations']!r} and "
            f"crossovers={basq['crossovers']!r} are more"
        )
    if switches["search_on"] == "validation" and config["data"]["validation_fraction"] == 0:
        raise UserError(
            "config.data.validation_fraction=0.0: config.basq.search_on='validation' needs images held out of training"
        )


def quant_spec(bits: int, *, quantize_weights: bool) -> QuantSpec:
    """Learned steps for weights and for the inputs of 1x1 convolutions, branches for those of the searched ones."""
    weight = {"weight": spec("lsq", bits=bits)} if quantize_weights else {}
    return QuantSpec(**weight, act=spec("lsq", bits=bits), searched=spec("branch_clip", bits=bits))


def network_spec(config: Mapping[str, Any]) -> Spec:
    """The supernet: a branch for each weight decay."""
    return spec(config["network"], branches=len(config["basq"]["branch_decays"]))


def _supernet(config: Mapping[str, Any], name: str, *, epochs: int) -> Stage:
    basq, second = config["basq"], name == SECOND
    return Stage(
        name=name,
        network=network_spec(config),
        quant=quant_spec(basq["bits"], quantize_weights=second),
        data=data_spec(config),
        objectives=(spec("distillation", weight=1.0, temperature=1.0, measure="cross_entropy"),),
        optim=supernet_optim(config, epochs=epochs),
        # The second phase starts from what the first has trained, with steps for the weights as they are by then.
        inherit=Inherit(
            f"stage:{FIRST}@last", COLLECTIONS, may_be_new=(STEPS_OF_WEIGHTS,), recompute=(STEPS_OF_WEIGHTS,)
        )
        if second
        else None,
        teacher=teacher_of(basq, stage=TEACHER),
        choice="uniform",
        seed=config["seed"] + (2000 if second else 1000),
        init_seed=config["seed"],
        bits=float(basq["bits"]) if second else 32.0,
        compute_dtype=config["train"]["compute_dtype"],
    )


def supernet_optim(config: Mapping[str, Any], *, epochs: int) -> OptimSpec:
    """Adam with the L2 term in its gradient, a cosine over the steps, a clipped gradient."""
    basq = config["basq"]
    period = {} if basq["schedule_steps"] is None else {"steps": basq["schedule_steps"]}
    return OptimSpec(
        optimizer=spec("adam"),
        learning_rate=spec("cosine_by_step", initial=basq["learning_rate"], **period),
        epochs=epochs,
        batch_size=config["train"]["batch_size"],
        groups=supernet_groups(basq["branch_decays"], weight_decay=basq["weight_decay"]),
        drop_last_batch=config["train"]["drop_last_batch"],
        gradient_clip_norm=basq["gradient_clip_norm"],
        unselected_branches=basq["unselected"],
    )


def supernet_groups(branch_decays: tuple[float, ...], *, weight_decay: float) -> tuple[ParameterGroup, ...]:
    """Kernels of convolutions are decayed alike, every clip value by its branch's factor, nothing else."""
    return (
        ParameterGroup(r"conv/kernel$", weight_decay=weight_decay),
        ParameterGroup(r"/upper_bound$", weight_decay=branch_decays),
        ParameterGroup(".*"),
    )


def finetune_groups(branch_decays: tuple[float, ...]) -> tuple[ParameterGroup, ...]:
    """Biases (of BatchNorms and of the classifier) and clip values; all else is frozen."""
    return (
        ParameterGroup(r"/bias$"),
        ParameterGroup(r"/upper_bound$", weight_decay=branch_decays),
        ParameterGroup(".*", learning_rate_scale=0.0),
    )


def search_spec(config: Mapping[str, Any], switches: Mapping[str, Any]) -> Spec:
    """Folds and evolution."""
    basq = config["basq"]
    names = ("folds", "population", "mutations", "crossovers", "parents", "generations", "mutation_probability")
    return spec(
        "evolution",
        **{name: basq[name] for name in names},
        fold_kind=switches["fold_kind"],
        fold_batch=basq["fold_batch"],
        search_on=switches["search_on"],
        one_random_stream=switches["one_random_stream"],
        report_epoch=switches["report_epoch"],
        seed=config["seed"],
    )


def _finetune(config: Mapping[str, Any], search: Stage, fold: int) -> Stage:
    basq = config["basq"]
    optim = dataclasses.replace(
        search.optim,
        optimizer=spec("sgd", momentum=0.9, nesterov=True),
        learning_rate=spec("cosine_by_epoch", initial=basq["finetune_learning_rate"]),
        epochs=basq["finetune_epochs"],
        groups=finetune_groups(basq["branch_decays"]),
        # One path is trained: the others have no gradient on any step.
        unselected_branches="freeze",
    )
    return dataclasses.replace(
        search,
        name=f"finetune_{fold}",
        kind="train",
        objectives=(spec("cross_entropy", weight=1.0),),
        optim=optim,
        choice=f"search:{SEARCH}#{fold}",
        search=None,
        seed=config["seed"] + 4000 + fold,
    )
