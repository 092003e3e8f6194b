"""The arrays of an exported network by the paths of the training network, so that training can start from them.

Weights in use become latent weights. Of a BatchNorm the file has a factor and a summand, or two thresholds, for each
channel: they become scale and bias with mean 0 and variance 1. Whoever trains on has to find statistics that fit
(``experiment.adapt.calibrated``).
"""

from collections.abc import Mapping

import numpy as np

from bnn_jax.deploy.artefact import Artefact, ArtefactError
from bnn_jax.deploy.graph import Node, Program

Array = np.ndarray

# In front of the path of each BatchNorm, True where a threshold has left nothing of its scale but the sign.
FOLDED = "folded/"


def modules_of(program: Program) -> dict[str, dict[str, int]]:
    """A fact for the file: the number of the operation that is all of a module, by the module's path."""
    paths = [node.module for node in program.nodes]
    return {"modules": {path: index for index, path in enumerate(paths) if path and paths.count(path) == 1}}


def arrays_of(exported: Artefact) -> dict[str, Array]:
    """The arrays by path ('params/conv1/kernel'), and ``FOLDED`` for each BatchNorm.

    Raises:
      ArtefactError: the facts name operations that there are not.
    """
    program, modules = exported.program, exported.facts.get("modules", {})
    shapes = program.shapes({name: layer.shape for name, layer in exported.weights.items()})
    found = {f"params/{name}/kernel": layer.kernel for name, layer in exported.weights.items()}
    if not isinstance(modules, Mapping):
        raise ArtefactError("facts: modules: no table")
    for path, index in modules.items():
        if type(index) is not int or not 0 <= index < len(program.nodes):
            raise ArtefactError(f"facts: modules: operation {index!r}")
        found.update(_parameters(path, program.nodes[index], shapes[index + 1][-1]))
    return found


def _parameters(path: str, node: Node, channels: int) -> dict[str, Array]:
    def option(name: str) -> Array:
        return np.broadcast_to(np.float32(node.options[name]), channels).copy()

    if node.kind == "prelu":
        return {f"params/{path}/slope": option("slope")}
    if node.kind == "affine" and "scale" not in node.options:
        return {f"params/{path}/bias": option("offset")}
    if node.kind == "affine":
        scale, bias = option("scale"), option("offset") if "offset" in node.options else np.zeros(channels, np.float32)
    elif node.kind == "threshold":
        scale = option("sign") if "sign" in node.options else np.ones(channels, np.float32)
        bias = -scale * _middle(option("at"), option("below"))
    else:
        return {}
    return {
        f"params/{path}/scale": scale,
        f"params/{path}/bias": bias,
        f"batch_stats/{path}/mean": np.zeros(channels, np.float32),
        f"batch_stats/{path}/var": np.ones(channels, np.float32),
        f"{FOLDED}{path}": np.full(channels, node.kind == "threshold"),
    }


def _middle(at: Array, below: Array) -> Array:
    """Between two thresholds, of which one may lie beyond all sums."""
    limit = np.finfo(np.float32).max
    return np.where(at >= limit, below, np.where(below <= -limit, at, below / 2 + at / 2))
