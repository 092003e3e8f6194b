"""Configs: the keys every config shares, their defaults, the check before anything is trained, and the help on them.

A method's own section (``config.<method>``) is defined in the method's file, see ``methods.SECTIONS``. Importing this
module does not import jax: the files of ``configs/`` take their defaults from here, and ``--help-config`` is quick.
"""

import difflib
import importlib.util
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from bnn_jax import methods
from bnn_jax.errors import UserError, one_line
from bnn_jax.keys import (
    ALL_ABOVE_0,
    ALL_NAMED,
    ALL_NOT_NEGATIVE,
    FILE,
    FRACTION,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    Key,
    Section,
    at_least,
    between,
    of_each_once,
)

# More images than any data set has, and more pixels than any picture: what is above cannot be meant.
BATCH, SIDE = between(1, 100_000_000), between(1, 1_000_000)

GENERAL: Section = {
    "name": Key("unnamed", "name of the run folder, runs/<name>", NOT_EMPTY),
    "method": Key("asbq", "method, whose own section config.<method> is read too", tuple(sorted(methods.METHODS))),
    "seed": Key(0, "seed of data order, augmentation, initial weights", SEED),
    "num_seeds": Key(
        1, "seeds trained side by side in one program on one accelerator: seed, seed + 1, ...", between(1, 64)
    ),
    "network": Key("resnet20", "network", table="bnn_jax.networks.NETWORKS"),
    "init_from": Key(
        None,
        "run folder or file of weights (PyTorch, .safetensors, .npz, .bnn) that the first stage starts from",
        FILE,
        kind=str,
    ),
    "freeze": Key((), "patterns of parameters that do not change: 'conv1', 'layer1_*', '**/bn*'", ALL_NAMED, item=str),
    "extra_objectives": Key(
        (),
        "objectives added to the method's own",
        of_each_once("feature_swap", "label_bank", "cluster"),
        item=str,
    ),
    "extra_objective_weights": Key(
        (), "weight of each extra objective; empty: 1, 0.05, 0.01 as published", ALL_NOT_NEGATIVE, item=float
    ),
    "extra_objectives_on": Key("last_stage", "stages that have the extra objectives", ("last_stage", "all_stages")),
}

DATA: Section = {
    "name": Key("cifar10", "data set", table="bnn_jax.data.SOURCES"),
    "data_dir": Key(
        None,
        "folder of prepared data, or of images; None: TFDS_DATA_DIR or TFDS's own",
        NOT_EMPTY,
        kind=str,
        may_change=True,
    ),
    "num_train": Key(None, "training images used; None: all", POSITIVE, kind=int),
    "num_eval": Key(None, "test images used; None: all", POSITIVE, kind=int),
    "validation_fraction": Key(
        0.0, "share of the training images held out to choose the best epoch; 0: chosen on the test images", FRACTION
    ),
    "augment": Key(
        "pad_crop_flip",
        "random change of training images",
        ("pad_crop_flip", "pad_crop", "edge_crop_flip", "random_resized_crop_flip", "none"),
    ),
    "decoder": Key("pillow", "what decodes training images that are read while training", ("pillow", "opencv")),
    "mixup": Key(
        0.0,
        "alpha of the Beta distribution that pairs of training images and labels are mixed by; 0: none",
        NOT_NEGATIVE,
    ),
    "color_jitter": Key(
        0.0, "largest random change of brightness, contrast and saturation of training images; 0: none", FRACTION
    ),
    "workers": Key(0, "processes that read such images; 0: threads of this process", NOT_NEGATIVE, may_change=True),
    "mean": Key((), "mean of pixels / 255 by channel; empty: that of the data set", item=float),
    "std": Key((), "their standard deviation; empty with the mean", ALL_ABOVE_0, item=float),
    "normalize": Key(True, "whether the channels are normalised; else pixels stay in [0, 1]"),
    "lighting": Key("none", "random change of light in training", ("none", "release", "paper")),
    "image_size": Key(
        None, "side in pixels, for ImageNet, a folder of images, generated and embedded images", SIDE, kind=int
    ),
    "test_fraction": Key(
        None, "share of each class held out for the test, for a folder without test pictures", FRACTION, kind=float
    ),
    "num_classes": Key(None, "number of classes, for generated images only", at_least(2), kind=int),
}

TRAIN: Section = {
    "batch_size": Key(128, "images per optimiser step, over all devices", BATCH),
    "eval_batch_size": Key(500, "images per evaluation call", BATCH, may_change=True),
    "momentum": Key(0.9, "momentum of stochastic gradient descent", FRACTION),
    "nesterov": Key(True, "whether the momentum is Nesterov's"),
    "weight_decay": Key(1e-4, "L2, added to the gradient before momentum; of adamw to the step", NOT_NEGATIVE),
    "drop_last_batch": Key(False, "whether the partial batch at the end of an epoch is left out"),
    "compute_dtype": Key(
        "float32", "'bfloat16': convolutions of integer codes run in bfloat16, exactly", ("float32", "bfloat16")
    ),
    "accumulation_steps": Key(
        1, "parts of a batch passed through the network in turn, where it does not fit", POSITIVE
    ),
    "remat": Key(False, "whether blocks are computed again in the backward pass, to need less memory"),
    "cpu_kernels": Key(
        "auto",
        "'auto': on one CPU, convolutions by the compiled kernels where there are any; 'xla': by XLA everywhere",
        ("auto", "xla"),
        may_change=True,
    ),
    "steps_per_dispatch": Key(
        0,
        "optimiser steps per call of the compiled program; 0: chosen by the device",
        NOT_NEGATIVE,
        may_change=True,
    ),
    "optimizer": Key(
        None,
        "optimiser in place of the recipe's; the learning rate stays the method's own key",
        ("sgd", "adam", "adamw"),
        kind=str,
    ),
    "schedule": Key(
        None,
        "how the learning rate goes on from the recipe's highest, instead of as in the recipe",
        ("constant", "cosine", "step"),
        kind=str,
    ),
    "step_epochs": Key(
        (), "epochs of a stage at which schedule='step' multiplies the rate", ALL_NOT_NEGATIVE, item=float
    ),
    "step_factor": Key(0.1, "factor on the rate at each of them", POSITIVE),
    "warmup_epochs": Key(
        0.0, "epochs in which the rate rises to that of the schedule; 0: as in the recipe", NOT_NEGATIVE
    ),
    "label_smoothing": Key(0.0, "share of a label that is spread over all classes", FRACTION),
    "gradient_clip_norm": Key(
        None,
        "L2 norm, over all parameters, that the gradient is clipped to; None: as in the recipe",
        POSITIVE,
        kind=float,
    ),
    "early_stopping": Key(
        0,
        "epochs in a row without a better top-1 on the validation images after which a stage ends; 0: never",
        NOT_NEGATIVE,
    ),
    "ema_decay": Key(
        0.0,
        "decay, per step, of the average of the weights that is evaluated, saved for use and handed on; 0: none",
        FRACTION,
    ),
    "checkpoint_seconds": Key(300.0, "seconds between checkpoints inside an epoch", NOT_NEGATIVE, may_change=True),
}

LOG: Section = {
    "tensorboard": Key(False, "whether the record is written as TensorBoard's event files too", may_change=True),
    "wandb": Key(False, "whether it is written as an offline run of Weights & Biases too", may_change=True),
    "flip_rate": Key(False, "whether it has the share of quantized weights that changed sign in an epoch, by layer"),
}

SECTIONS: dict[str, Section] = {"": GENERAL, "data": DATA, "train": TRAIN, "log": LOG, **methods.SECTIONS}
SHARED = ("", "data", "train", "log")
WIDTH = 100  # columns of the help
CHECKOUT = Path(__file__).resolve().parents[2]


def keys_of(sections: Iterable[str]) -> dict[str, Key]:
    """The keys of some sections by dotted name."""
    return {f"{section}.{name}".lstrip("."): key for section in sections for name, key in SECTIONS[section].items()}


# Keys that say where or how a run is done, not what it computes: they may change between a run and its continuation.
LOCATION_KEYS = frozenset(name for name, key in keys_of(SECTIONS).items() if key.may_change)


def defaults(section: str) -> ConfigDict:
    """A section of ``SECTIONS`` with its defaults."""
    found = ConfigDict()
    for name, key in SECTIONS[section].items():
        # A placeholder knows its type while it is empty, and of type object it may change it.
        if key.optional or key.kind is object:
            found[name] = config_dict.placeholder(key.kind)
        if not key.optional:
            found[name] = key.default
    return found


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values of a nested mapping."""
    flat = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value})
    return flat


def load(value: str) -> ConfigDict:
    """The config a file's ``get_config`` returns; 'FILE:ARGUMENT' hands it the argument.

    Raises:
      UserError: there is no such file, or something in it fails.
    """
    path, _, argument = value.partition(":")
    if not Path(path).is_file() or not path.endswith(".py"):
        raise UserError(f"--config={value}: {path} is no Python file; configs/ holds the configs")
    try:
        module_spec = importlib.util.spec_from_file_location("config", path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        config = module.get_config(argument)
    except (Exception, SystemExit) as error:
        # Anything can go wrong in a file of the user's; the message names the file, Python's own text the rest.
        raise UserError(f"--config={value}: {type(error).__name__}: {one_line(error)}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={value}: get_config must return a ConfigDict, not {type(config).__name__}")
    return config


def named(name: str, overrides: Mapping[str, Any]) -> ConfigDict:
    """``load`` of a path, or of a name in the configs/ of this project, with some values replaced.

    Raises:
      UserError: as ``load``, or an unknown key.
    """
    file, colon, argument = name.partition(":")
    if not file.endswith(".py"):
        path = CHECKOUT / "configs" / f"{file}.py"
        if not path.is_file():
            known = sorted(other.stem for other in path.parent.glob("[a-z]*.py") if other.stem != "common")
            raise UserError(f"config {file!r}: accepted are the path of a file, {', '.join(known)}")
        file = str(path)
    # Configs import each other; the interpreter may have been started anywhere.
    if str(CHECKOUT) not in sys.path:
        sys.path.append(str(CHECKOUT))
    config = load(f"{file}{colon}{argument}")
    known = flatten(config.to_dict())
    for key, value in overrides.items():
        if key not in known:
            raise UserError(f"config.{key}: unknown key; {suggest(key, known)}")
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise UserError(f"config.{key}={value!r}: {one_line(error)}") from None
    return config


def validate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a config against the definitions of its keys.

    Args:
      config: nested mapping (a ConfigDict's ``to_dict()``).

    Returns:
      The config as nested plain dicts, numbers in the type of their key, sequences as tuples.

    Raises:
      UserError: one line that names the key, its value and what is accepted.
    """
    flat = flatten(config)
    method = flat.get("method")
    if not isinstance(method, str) or method not in methods.SECTIONS:
        raise UserError(f"config.method={method!r}: accepted are {', '.join(sorted(methods.SECTIONS))}")
    known = keys_of((*SHARED, method))
    for name in flat:
        if name not in known:
            raise UserError(f"config.{name}: unknown key; {suggest(name, known)}")
    for name in known:
        if name not in flat:
            raise UserError(f"config.{name} is missing; see configs/common.py")
    values = {name: key.check(name, flat[name]) for name, key in known.items()}
    _check_names(values, known)
    if "weight_search.values" in values:
        values["weight_search.values"] = _searched_values(values["weight_search.values"])
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[last] = value
    return nested


def _check_names(values: Mapping[str, Any], known: Mapping[str, Key]) -> None:
    """Raises UserError for a name that is not in the table its key belongs to."""
    from bnn_jax.data import SOURCES
    from bnn_jax.networks import NETWORKS
    from bnn_jax.quantizers import ACT

    tables = {"bnn_jax.data.SOURCES": SOURCES, "bnn_jax.networks.NETWORKS": NETWORKS, "bnn_jax.quantizers.ACT": ACT}
    for name, key in known.items():
        if key.table and values[name] not in tables[key.table]:
            raise UserError(f"config.{name}={values[name]!r}: accepted are {', '.join(tables[key.table])}")


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


def suggest(name: str, known: Iterable[str]) -> str:
    """What might have been meant by an unknown dotted key, or else the keys that are there.

    Args:
      name: the unknown key.
      known: dotted names of the keys a config has.
    """
    known = sorted(known)
    section, _, last = name.rpartition(".")
    beside = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    # Near is what has the same name in another section, in this one has it as a word or is spelled alike, or is nearly
    # the same.
    found = (
        [other for other in known if other.endswith(f".{last}")][:1]
        or [other for short, other in beside.items() if last in short.split("_")]
        or [beside[near] for near in difflib.get_close_matches(last, beside, n=1, cutoff=0.7)]
        or difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    )
    if found:
        return f"did you mean {' or '.join(f'config.{other}' for other in found)}?"
    within = [other for other in known if other.startswith(f"{name.partition('.')[0]}.")]
    sections = sorted({f"{other.partition('.')[0]}.*" for other in known if "." in other})
    return f"accepted are {', '.join(within or [other for other in known if '.' not in other] + sections)}"


TITLES = {
    "": "of every config",
    "data": "images",
    "train": "training, whatever the method",
    "log": "what is recorded, beside metrics.jsonl",
    **methods.SUMMARIES,
}


def describe_keys() -> str:
    """All keys by section: default, what they mean, what is accepted; at most 100 columns."""
    lines = ["Keys of a config with their defaults. On the command line: --config.KEY=VALUE"]
    for section in SECTIONS:
        lines += ["", *textwrap.wrap(f"[{section or 'general'}] {TITLES[section]}", WIDTH, subsequent_indent="  ")]
        for name, key in keys_of([section]).items():
            accepted = f"accepted: {key.describe()}{'; or None' if key.optional else ''}"
            lines.append(f"  config.{name} = {key.default!r}")
            for text in (key.comment, accepted):
                lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 8)
    return "\n".join(lines)
