"""Starting from the variables of a network with another classifier or other quantizers (``config.init_from``).

Copied is what has the same path and shape. New are the classifier where it has another shape, and what belongs to
quantizers; learned steps are made anew from the copied weights and the first images. A branch axis that the stage's
network has and the file's has not is filled with the same values. Anything else that does not fit is an error.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.catalogue import facts_of
from bnn_jax.deploy.restart import FOLDED
from bnn_jax.errors import CheckpointError
from bnn_jax.layers.norm import BatchNorm, batch_moments
from bnn_jax.quantizers.base import evaluation_context
from bnn_jax.stages import Stage
from bnn_jax.storage.fitting import describe
from bnn_jax.storage.pytorch import Misfit

QUANTIZER = re.compile(r"/(weight|act)_quantizer/")
EPSILON = BatchNorm.epsilon


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of each variable of a stage's network.

    Attributes:
      copied: paths taken from the file.
      repeated: those of them that every branch takes a copy of.
      classifier: 'OLD there, NEW here' if the classifier is new, else ''.
      new: other paths that keep their fresh values.
    """

    copied: tuple[str, ...]
    repeated: frozenset[str]
    classifier: str
    new: tuple[str, ...]

    def describe(self, stage: Stage) -> list[str]:
        """Lines for the log."""
        assert stage.inherit is not None  # it has a plan
        source = stage.inherit.source.removeprefix("file:")
        layer = facts_of(stage.network.name).last_layer
        lines = [f"stage {stage.name}: starts from {source}: {len(self.copied)} arrays"]
        if self.classifier:
            lines.append(f"stage {stage.name}: the classifier {layer!r} is made new: {self.classifier}")
        if self.new:
            more = ", ..." if len(self.new) > 3 else ""
            lines.append(
                f"stage {stage.name}: {len(self.new)} arrays are not in it and are made new: "
                f"{', '.join(self.new[:3])}{more}"
            )
        return lines


def plan(stage: Stage, found: Mapping[str, Any], target: Mapping[str, Any], branches: int = 1) -> Plan:
    """What a stage can take over from a file.

    Args:
      stage: the stage.
      found: whatever has a shape, by our paths.
      target: variables of the stage's network or their shapes, nested.
      branches: of the stage's network.

    Raises:
      Misfit: the file is of another network.
    """
    assert stage.inherit is not None  # it says where the file is
    last = f"params/{facts_of(stage.network.name).last_layer}/"
    wanted = {
        path: tuple(leaf.shape)
        for path, leaf in flat_arrays(target).items()
        if path.startswith(tuple(f"{name}/" for name in stage.inherit.collections))
    }
    shapes = {path: tuple(leaf.shape) for path, leaf in found.items() if not path.startswith(("knobs/", FOLDED))}
    exported = any(path.startswith(FOLDED) for path in found)
    repeated = {
        path
        for path, shape in wanted.items()
        if branches > 1 and path in shapes and shape == (branches, *shapes[path]) and not path.endswith("/kernel")
    }
    copied = tuple(path for path, shape in wanted.items() if shapes.get(path) == shape or path in repeated)
    left = [path for path in wanted if path not in copied]
    classifier = [path for path in left if path.startswith(last) and len(shapes.get(path, ())) == len(wanted[path])]
    new = [path for path in left if path not in classifier and _may_be_new(path, wanted[path], shapes, exported)]
    missing = [path for path in left if path not in {*classifier, *new}]
    unknown = [path for path in shapes if path not in wanted and not QUANTIZER.search(path)]
    if missing or unknown:
        absent = [path for path in missing if path not in shapes]
        others = [f"{path} {shapes[path]} for {wanted[path]}" for path in missing if path in shapes]
        raise Misfit(describe(absent, unknown, others), found)
    kernel = f"{last}kernel"
    change = f"{shapes[kernel][-1]} classes there, {wanted[kernel][-1]} here" if classifier else ""
    return Plan(copied, frozenset(repeated), change, tuple(new))


def _may_be_new(path: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], exported: bool) -> bool:
    """Whether a variable belongs to a quantizer, as the logits of searched weights do, which have an axis in front.

    In an exported network, small parameters may be part of a threshold that two modules share.
    """
    if QUANTIZER.search(path) or (exported and path not in shapes and not path.endswith("/kernel")):
        return True
    if not path.endswith("/kernel") or path not in shapes:
        return False
    other = shapes[path]
    are_logits = len(shape) in (3, 5) and len(other) in (3, 5) and shape[1:] == other[1:]
    return are_logits or shape[1:] == other or other[1:] == shape


def adapted(plan: Plan, found: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """``fresh`` with the variables that a plan copies, in buffers of their own."""
    flat = flat_arrays(fresh)
    for path in plan.copied:
        value = np.asarray(found[path], flat[path].dtype)
        flat[path] = jnp.array(np.broadcast_to(value, flat[path].shape), copy=True)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def calibrated(network: Any, variables: dict[str, Any], images: jax.Array, found: Mapping[str, Any]) -> dict[str, Any]:
    """The variables, where they are from an exported network, with statistics of BatchNorms for training.

    Such a file has a factor and a summand, or a threshold, for each channel. Mean and variance are those of the first
    images; scale and bias are such that the evaluation computes what it did, or, behind a threshold, the same signs of
    values with a standard deviation of 1.

    Args:
      network: of the variables.
      variables: copied ones.
      images: (N, H, W, C), normalised.
      found: what they were copied from.
    """
    modules = [path.removeprefix(FOLDED) for path in found if path.startswith(FOLDED)]
    if not modules:
        return variables
    flat, moments = flat_arrays(variables), jax.jit(functools.partial(_moments, network))(variables, images)
    for module in modules:
        if module not in moments or flat[f"params/{module}/scale"].ndim > 1:
            continue
        (mean, var), factor = moments[module], flat[f"params/{module}/scale"]
        deviation = jnp.sqrt(var + EPSILON)
        gain = jnp.where(found[f"{FOLDED}{module}"], 1 / deviation, 1.0)
        flat[f"params/{module}/bias"] = (flat[f"params/{module}/bias"] + mean * factor) * gain
        flat[f"params/{module}/scale"] = factor * deviation * gain
        flat[f"batch_stats/{module}/mean"], flat[f"batch_stats/{module}/var"] = mean, var
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _moments(network: Any, variables: dict[str, Any], images: jax.Array) -> dict[str, Any]:
    """Mean and variance of what each BatchNorm reads in an evaluation."""
    moments = {}

    def interceptor(next_function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            moments["/".join(context.module.path)] = batch_moments(args[0], None)[:2]
        return next_function(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        network.apply(variables, images, evaluation_context(variables))
    return moments


def recomputed(plan: Plan, stage: Stage) -> tuple[str, ...]:
    """Patterns of the new variables that are made anew from the copied ones."""
    assert stage.inherit is not None  # it has a plan
    paths = [path for path in plan.new if any(re.search(pattern, path) for pattern in stage.inherit.recompute)]
    return tuple(f"^{re.escape(path)}$" for path in paths)


def flat_arrays(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested variables by path."""
    return dict(flax.traverse_util.flatten_dict(dict(tree), sep="/"))


def source_of(stage: Stage) -> Path | None:
    """The file or folder that a stage's variables are adapted from; None where it starts otherwise."""
    if stage.inherit is None or not stage.inherit.adapt:
        return None
    if not stage.inherit.source.startswith("file:"):
        raise CheckpointError(f"config.init_from={stage.inherit.source!r}: accepted is 'file:PATH'")
    return Path(stage.inherit.source.removeprefix("file:"))
