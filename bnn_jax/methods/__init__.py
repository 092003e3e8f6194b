"""Table of the methods: each is a function from a validated config to the stages of a run."""

from collections.abc import Callable, Mapping
from typing import Any

from bnn_jax.methods import asbq, basq, skd, snn, weight_search
from bnn_jax.methods.common import add_extra_objectives, fit_memory
from bnn_jax.stages import Stage

METHODS: dict[str, Callable[[Mapping[str, Any]], tuple[Stage, ...]]] = {
    "asbq": asbq.stages,
    "basq": basq.stages,
    "skd": skd.stages,
    "weight_search": weight_search.stages,
    "snn": snn.stages,
}


def build(config: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages of ``config.method``, with what the shared sections say of all stages.

    Raises:
      UserError: a combination of values the method cannot do.
    """
    return fit_memory(config, add_extra_objectives(config, METHODS[config["method"]](config)))
