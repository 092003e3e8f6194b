"""Optimisers in PyTorch's order of operations, with parameter groups by path.

PyTorch adds the L2 term to the gradient before momentum or Adam ("coupled"); optax's ``adamw`` does not. The chains
here do: ``gradient -> clip -> + weight_decay * parameter -> momentum or Adam -> * (-learning_rate)``.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bnn_jax.stages import OptimSpec, ParameterGroup, Spec
from bnn_jax.training.schedules import Schedule


def path_of(key_path: Sequence[Any]) -> str:
    """'layer1_0/conv1/kernel' for a jax key path of a nested dict."""
    return "/".join(str(getattr(key, "key", key)) for key in key_path)


def _core(optimizer: Spec) -> optax.GradientTransformation:
    """The optimiser proper, without weight decay and learning rate."""
    options = optimizer.kwargs
    if optimizer.name == "sgd":
        momentum, dampening = options.pop("momentum", 0.0), options.pop("dampening", 0.0)
        trace = optax.trace(decay=momentum, **options) if momentum else optax.identity()
        if not (momentum and dampening):
            return trace
        # PyTorch's buffer starts as the first gradient, undamped.
        return optax.chain(optax.scale_by_schedule(lambda step: jnp.where(step == 0, 1.0, 1.0 - dampening)), trace)
    if optimizer.name == "adam":
        return optax.scale_by_adam(**options)
    raise ValueError(f"optimizer {optimizer.name!r}: accepted are sgd, adam")


def _group_chain(optimizer: Spec, group: ParameterGroup, schedule: Schedule) -> optax.GradientTransformation:
    if group.learning_rate_scale == 0:
        return optax.set_to_zero()
    return optax.chain(
        optax.add_decayed_weights(group.weight_decay) if group.weight_decay else optax.identity(),
        _core(optimizer),
        optax.scale_by_schedule(lambda step: -group.learning_rate_scale * schedule(jnp.asarray(step))),
        optax.stateless_with_tree_map(functools.partial(_keep_within, group.bounds))
        if group.bounds
        else optax.identity(),
    )


def _keep_within(bounds: tuple[float, float], update: Any, parameter: Any) -> jax.Array:
    """The update after which the parameter lies within the bounds."""
    return jnp.clip(parameter + update, *bounds) - parameter


def group_labels(params: Any, groups: Sequence[ParameterGroup]) -> Any:
    """Tree of the index (as a string) of the first group whose pattern is found in each parameter's path.

    Raises:
      ValueError: a parameter no pattern matches.
    """

    def label(key_path: Sequence[Any], _: Any) -> str:
        path = path_of(key_path)
        for index, group in enumerate(groups):
            if re.search(group.pattern, path):
                return str(index)
        patterns = ", ".join(repr(group.pattern) for group in groups)
        raise ValueError(f"optimizer groups: parameter {path!r} matches none of {patterns}")

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(
    spec: OptimSpec, params: Any, *, schedule: Schedule, unused_parameters: Sequence[str] = ()
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimiser of a stage.

    Args:
      spec: optimiser, groups, clipping.
      params: the parameters (or their shapes).
      schedule: learning rate by step.
      unused_parameters: patterns of parameters without gradient by construction; they are left alone, as PyTorch skips
        parameters whose gradient is None: no weight decay moves them.

    Returns:
      An optax transformation whose ``update`` takes extra keyword arguments.

    Raises:
      ValueError: an unknown optimiser, or a parameter in no group.
    """
    frozen = tuple(ParameterGroup(pattern, learning_rate_scale=0.0) for pattern in unused_parameters)
    groups = frozen + spec.groups
    chains: dict[Any, Any] = {
        str(index): _group_chain(spec.optimizer, group, schedule) for index, group in enumerate(groups)
    }
    labels = group_labels(params, groups)
    used = set(jax.tree.leaves(labels))
    chains = {label: chain for label, chain in chains.items() if label in used}
    partition = optax.partition(chains, labels)
    if spec.gradient_clip_norm is None:
        return optax.with_extra_args_support(partition)
    return optax.with_extra_args_support(optax.chain(optax.clip_by_global_norm(spec.gradient_clip_norm), partition))
