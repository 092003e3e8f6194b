"""ReCU: binary weights and activations in one stage; weights far from 0 are clamped and so come back into play.

The weights of a filter are standardised, clamped to their quantiles 1 - tau and tau, and binarised; tau rises from 0.85
to 0.99, from small errors of quantization to much information in the weights. There is no teacher and no further loss.

The networks are those of IR-Net. The released ResNets differ from them in small parts: in ResNet-20 a shortcut that
halves the image takes means of 2x2 positions, in ResNet-18 the convolutions on the shortcuts are binary too.

Reference: Xu et al. 2021 (ICCV), "ReCU: Reviving the Dead Weights in Binary Neural Networks" (arXiv 2103.12369);
  release: z-hXu/ReCU.
"""

from collections.abc import Mapping
from typing import Any

from bnn_jax.keys import NOT_NEGATIVE, POSITIVE, Condition, Key, Section
from bnn_jax.knobs import CLAMP_QUANTILE
from bnn_jax.methods.common import data_spec, sgd_spec
from bnn_jax.stages import QuantSpec, Stage, spec

QUANTILE = Condition("0.5 <= value < 1", lambda value: 0.5 <= value < 1)

KEYS: Section = {
    "epochs": Key(600, "length of the run", POSITIVE),
    "learning_rate": Key(0.1, "learning rate at its height, falling to 0 by a cosine", POSITIVE),
    "warmup_epochs": Key(4, "epochs below that height at the start", NOT_NEGATIVE),
    "first_quantile": Key(0.85, "tau in the first epoch", QUANTILE),
    "last_quantile": Key(0.99, "tau that the last epoch comes near to", QUANTILE),
    "init": Key("he_fan_in_normal", "initial values of all convolutions", ("uniform", "he_normal", "he_fan_in_normal")),
}


def stages(config: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The one stage.

    Args:
      config: validated config with the section ``recu``.
    """
    recu = config["recu"]
    quantile = spec("exponential_by_epoch", initial=recu["first_quantile"], final=recu["last_quantile"])
    rate = spec("cosine_by_epoch", initial=recu["learning_rate"], warmup_epochs=recu["warmup_epochs"])
    return (
        Stage(
            name="train",
            network=spec(config["network"], kernel_init=recu["init"], full_precision_init=recu["init"]),
            quant=QuantSpec(weight=spec("recu"), act=spec("recu")),
            data=data_spec(config),
            objectives=(spec("cross_entropy", weight=1.0),),
            optim=sgd_spec(config, learning_rate=rate, epochs=recu["epochs"]),
            knobs=((CLAMP_QUANTILE.name, quantile),),
            seed=config["seed"],
            init_seed=config["seed"],
            bits=1.0,
            compute_dtype=config["train"]["compute_dtype"],
        ),
    )
