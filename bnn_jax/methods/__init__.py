"""Table of the methods: each is a function from a validated config to the stages of a run, and a section of keys."""

from collections.abc import Callable, Mapping
from typing import Any

from bnn_jax.keys import Section
from bnn_jax.methods import asbq, basq, recu, skd, snn, weight_search
from bnn_jax.methods.common import add_extra_objectives, fit_memory, start_from
from bnn_jax.methods.options import with_training_options
from bnn_jax.stages import Stage

_MODULES = {"asbq": asbq, "basq": basq, "recu": recu, "skd": skd, "snn": snn, "weight_search": weight_search}

METHODS: dict[str, Callable[[Mapping[str, Any]], tuple[Stage, ...]]] = {
    name: module.stages for name, module in _MODULES.items()
}
# The section config.<method> of each.
SECTIONS: dict[str, Section] = {name: module.KEYS for name, module in _MODULES.items()}
# What each is, in a line.
SUMMARIES: dict[str, str] = {name: (module.__doc__ or "").splitlines()[0] for name, module in _MODULES.items()}


def build(config: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages of ``config.method``, with what the shared sections say of all stages.

    Raises:
      UserError: a combination of values the method cannot do.
    """
    stages = start_from(config, METHODS[config["method"]](config))
    stages = fit_memory(config, add_extra_objectives(config, stages))
    return with_training_options(config, stages)
