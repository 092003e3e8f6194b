"""SKD-BNN: self-distillation on IR-Net, in one stage (ImageNet: two), without a teacher.

Binary weights and activations with the error decay estimator; next to the binary network runs a real stream whose
features, and a bank of the mean logits per class, teach it. With ``config.skd.distill=False`` it is IR-Net alone.

  paper    a class that was never right keeps its row of the bank and has no label loss until it has one;
           MNIST: 2,048 hidden units, squared hinge loss, a bank that persists
  release  NaN rows for such classes (``strict_release``); MNIST: 6,144 units, cross-entropy, bank cleared every epoch

Reference: Zeng et al. 2024 (Applied Intelligence 54, 4994); release: Wzixin/SKD-BNN. IR-Net: Qin et al. 2020.
"""

from collections.abc import Mapping
from typing import Any

from bnn_jax.catalogue import facts_of
from bnn_jax.errors import UserError
from bnn_jax.keys import ALL_NOT_NEGATIVE, ALL_POSITIVE, FRACTION, NOT_NEGATIVE, POSITIVE, Key, Section
from bnn_jax.knobs import ERROR_DECAY_K, ERROR_DECAY_T
from bnn_jax.methods.common import data_spec, switches_of
from bnn_jax.stages import Inherit, OptimSpec, ParameterGroup, QuantSpec, Spec, Stage, spec

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"strict_release": False, "reset_bank": False, "task_loss": "cross_entropy"},
    "release": {"strict_release": True, "reset_bank": False, "task_loss": "cross_entropy"},
}
MLP_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"strict_release": False, "reset_bank": False, "task_loss": "squared_hinge", "hidden": 2048},
    "release": {"strict_release": True, "reset_bank": True, "task_loss": "cross_entropy", "hidden": 6144},
}

KEYS: Section = {
    "preset": Key("paper", "published settings that fill what is empty, see bnn_jax/methods/skd.py", tuple(PRESETS)),
    "distill": Key(True, "whether the network teaches itself; False: IR-Net alone"),
    "epochs": Key((700,), "epochs per stage; each stage starts from the weights of the one before", ALL_POSITIVE),
    "learning_rates": Key((0.1,), "learning rate per stage, after the warm-up", ALL_POSITIVE),
    "warmup_epochs": Key((8,), "epochs per stage in which the rate rises", ALL_NOT_NEGATIVE),
    "final_learning_rate": Key(0.0, "what the cosine approaches", NOT_NEGATIVE),
    "optimizer": Key("sgd", "optimiser", ("sgd", "adam")),
    "feature_weight": Key(1.0, "alpha, weight of the feature loss", NOT_NEGATIVE),
    "label_weight": Key(0.05, "beta, weight of the label loss", NOT_NEGATIVE),
    "cluster_weight": Key(0.01, "gamma, weight of the cluster loss", NOT_NEGATIVE),
    "temperature": Key(4.0, "temperature of the label bank", POSITIVE),
    "strict_release": Key(None, "whether classes that were never right have rows of NaN in the bank", kind=bool),
    "reset_bank": Key(None, "whether the bank is cleared every epoch (MNIST release)", kind=bool),
    "task_loss": Key(None, "loss with the labels", ("cross_entropy", "squared_hinge"), kind=str),
    "hidden": Key(None, "units of each hidden layer of the MLP; other networks have none", POSITIVE, kind=int),
    "dropout": Key(0.5, "dropout rate of the MLP", FRACTION),
    "log_gradient_norms": Key(
        False, "whether the gradient norm of every loss term is recorded, at the cost of a backward pass for each"
    ),
}


def stages(config: Mapping[str, Any]) -> tuple[Stage, ...]:
    """A stage for each entry of ``config.skd.epochs``.

    Args:
      config: validated config with the section ``skd``.

    Raises:
      UserError: numbers of epochs, learning rates and warm-ups that do not fit, or an option the network does not have.
    """
    switches = resolve(config)
    skd = config["skd"]
    for key in ("learning_rates", "warmup_epochs"):
        if len(skd[key]) != len(skd["epochs"]):
            raise UserError(
                f"config.skd.{key}={skd[key]!r}: accepted is one for each stage of epochs {skd['epochs']!r}"
            )
    names = [f"train_{index + 1}" if len(skd["epochs"]) > 1 else "train" for index in range(len(skd["epochs"]))]
    return tuple(_stage(config, switches, names, index) for index in range(len(names)))


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """The switches of the run: the preset's values, replaced by those given explicitly.

    Raises:
      UserError: a number of hidden units for a network that has none.
    """
    skd = config["skd"]
    is_mlp = _is_mlp(config)
    if skd["hidden"] is not None and not is_mlp:
        raise UserError(f"config.skd.hidden={skd['hidden']!r}: network {config['network']!r} has no such option")
    return switches_of(skd, MLP_PRESETS if is_mlp else PRESETS)


def _is_mlp(config: Mapping[str, Any]) -> bool:
    return facts_of(config["network"]).dense


def _stage(config: Mapping[str, Any], switches: Mapping[str, Any], names: list[str], index: int) -> Stage:
    skd = config["skd"]
    quantizer = spec("sign" if _is_mlp(config) else "irnet")
    return Stage(
        name=names[index],
        network=network_spec(config, switches),
        quant=QuantSpec(weight=quantizer, act=quantizer),
        data=data_spec(config),
        objectives=objectives(config, switches),
        optim=optim_spec(config, index),
        knobs=() if _is_mlp(config) else tuple((knob.name, spec(knob.name)) for knob in (ERROR_DECAY_K, ERROR_DECAY_T)),
        # The second stage takes everything a state dict holds: weights and running statistics, not the optimiser.
        inherit=None if index == 0 else Inherit(f"stage:{names[index - 1]}@last", ("params", "batch_stats")),
        seed=config["seed"] + 1000 * index,
        init_seed=config["seed"],
        bits=1.0,
        compute_dtype=config["train"]["compute_dtype"],
        log_gradient_norms=skd["log_gradient_norms"],
    )


def network_spec(config: Mapping[str, Any], switches: Mapping[str, Any]) -> Spec:
    """The network with its published initialisers; networks of other methods keep their own."""
    if _is_mlp(config):
        return spec(config["network"], hidden=switches["hidden"], dropout=config["skd"]["dropout"])
    init = facts_of(config["network"]).released_init
    return spec(config["network"], **({"kernel_init": init, "full_precision_init": init} if init else {}))


def objectives(config: Mapping[str, Any], switches: Mapping[str, Any]) -> tuple[Spec, ...]:
    """The task's loss and, with ``distill``, the three terms of self-distillation."""
    skd, is_mlp = config["skd"], _is_mlp(config)
    task = (spec(switches["task_loss"], weight=1.0),)
    if not skd["distill"]:
        return task
    bank = spec(
        "label_bank",
        weight=skd["label_weight"],
        temperature=skd["temperature"],
        strict_release=switches["strict_release"],
        reset_each_epoch=switches["reset_bank"],
        log_softmax=is_mlp,
    )
    compare = "elementwise" if is_mlp else "channel_and_spatial"
    return (
        *task,
        spec("feature_swap", weight=skd["feature_weight"], compare=compare),
        bank,
        spec("cluster", weight=skd["cluster_weight"], on="logits" if is_mlp else "features"),
    )


def optim_spec(config: Mapping[str, Any], index: int) -> OptimSpec:
    """Optimiser, learning rate and length of a stage."""
    skd, train = config["skd"], config["train"]
    rate = spec(
        "cosine_by_epoch",
        initial=skd["learning_rates"][index],
        final=skd["final_learning_rate"],
        warmup_epochs=skd["warmup_epochs"][index],
    )
    if skd["optimizer"] == "adam":
        optimizer = spec("adam")
    else:
        optimizer = spec("sgd", momentum=train["momentum"], nesterov=train["nesterov"])
    decay = train["weight_decay"]
    # The release clamps the biases of the binary dense layers after every step.
    clamped = (ParameterGroup("^fc[123]/bias$", weight_decay=decay, bounds=(-1.0, 1.0)),) if _is_mlp(config) else ()
    return OptimSpec(
        optimizer=optimizer,
        learning_rate=rate,
        epochs=skd["epochs"][index],
        batch_size=train["batch_size"],
        groups=(*clamped, ParameterGroup(".*", weight_decay=decay)),
        drop_last_batch=train["drop_last_batch"],
    )
