"""Tables of the quantizers, and the one function that builds them from a ``Spec``."""

import functools
from collections.abc import Callable
from typing import Any

from bnn_jax.knobs import Knob
from bnn_jax.quantizers.approx_sign import ApproxSignAct
from bnn_jax.quantizers.base import ActQuantizer, Encoded, QuantContext, WeightQuantizer
from bnn_jax.quantizers.branch_clip import BranchClipAct
from bnn_jax.quantizers.categorical import CategoricalWeight
from bnn_jax.quantizers.codebook import CodebookWeight
from bnn_jax.quantizers.dorefa import DorefaAct, DorefaWeight
from bnn_jax.quantizers.irnet import IrNetAct, IrNetWeight, SignAct, SignWeight
from bnn_jax.quantizers.lsq import LsqAct, LsqWeight
from bnn_jax.quantizers.pruned import Pruned
from bnn_jax.quantizers.recu import ReCuAct, ReCuWeight
from bnn_jax.stages import QuantSpec, Spec

WEIGHT: dict[str, type[WeightQuantizer]] = {
    "identity": WeightQuantizer,
    "dorefa": DorefaWeight,
    "irnet": IrNetWeight,
    "sign": SignWeight,
    "lsq": LsqWeight,
    "pruned": Pruned,
    "categorical": CategoricalWeight,
    "codebook": CodebookWeight,
    "recu": ReCuWeight,
}

ACT: dict[str, type[ActQuantizer]] = {
    "identity": ActQuantizer,
    "dorefa": DorefaAct,
    "irnet": IrNetAct,
    "sign": SignAct,
    "lsq": LsqAct,
    "branch_clip": BranchClipAct,
    "approx_sign": ApproxSignAct,
    "recu": ReCuAct,
}


def build_weight(spec: Spec) -> Callable[..., WeightQuantizer]:
    """Factory of the weight quantizer a ``Spec`` names; a nested Spec (``inner``) becomes a factory too.

    Raises:
      ValueError: the name is not in the table or the options do not fit.
    """
    return _factory(WEIGHT, spec, "weight quantizer")


def build_act(spec: Spec) -> Callable[..., ActQuantizer]:
    """Factory of the activation quantizer a ``Spec`` names.

    Raises:
      ValueError: the name is not in the table or the options do not fit.
    """
    return _factory(ACT, spec, "activation quantizer")


def declared_knobs(quant: QuantSpec) -> tuple[Knob, ...]:
    """The knobs that the quantizers of a network's layers read, each once, sorted by name."""
    weights = (quant.weight, quant.first, quant.last, quant.shortcut)
    quantizers = [
        build(choice)(parent=None)
        for build, choices in ((build_weight, weights), (build_act, (quant.act, quant.searched)))
        for choice in choices
    ]
    return tuple(sorted({knob for quantizer in quantizers for knob in quantizer.knobs}, key=lambda knob: knob.name))


def _factory(table: dict[str, Any], spec: Spec, kind: str) -> Callable[..., Any]:
    if spec.name not in table:
        raise ValueError(f"{kind} {spec.name!r}: accepted are {', '.join(table)}")
    options = {key: _factory(table, value, kind) if isinstance(value, Spec) else value for key, value in spec.options}
    return functools.partial(table[spec.name], **options)


__all__ = [
    "ACT",
    "WEIGHT",
    "ActQuantizer",
    "Encoded",
    "QuantContext",
    "WeightQuantizer",
    "build_act",
    "build_weight",
    "declared_knobs",
]
