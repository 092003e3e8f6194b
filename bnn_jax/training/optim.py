"""Optimisers in PyTorch's order of operations, with parameter groups by path.

PyTorch adds the L2 term to the gradient before momentum or Adam ("coupled"); optax's ``adamw`` does not. The chains
here do: ``gradient -> clip -> + weight_decay * parameter -> momentum or Adam -> * (-learning_rate)``.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bnn_jax.quantizers.base import QuantContext
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
    direction = (
        optax.add_decayed_weights(group.weight_decay) if group.weight_decay else optax.identity(),
        _core(optimizer),
    )
    if group.gradient_knob is not None:
        gated = _only_with_gradient(optax.chain(*direction), group.gradient_knob, without=group.without_gradient)
        direction = (gated,)
    return optax.chain(
        *direction,
        # Outside of the gate: the learning rate follows the steps of the stage.
        optax.scale_by_schedule(lambda step: -group.learning_rate_scale * schedule(jnp.asarray(step))),
        optax.stateless_with_tree_map(functools.partial(_keep_within, group.bounds))
        if group.bounds
        else optax.identity(),
    )


class GatedState(NamedTuple):
    """State of ``_only_with_gradient``.

    Attributes:
      started: bool scalar, whether there has been a gradient.
      inner: state of the gated transformation.
    """

    started: jax.Array
    inner: Any


def _only_with_gradient(
    transformation: optax.GradientTransformation, knob: str, *, without: Literal["step", "skip"]
) -> optax.GradientTransformationExtraArgs:
    """Runs a transformation on the steps with a gradient, those on which a knob is above 0; else gives the change 0.

    Args:
      transformation: gets a gradient, gives a change.
      knob: its name; a stage without it never has a gradient.
      without: what a step without a gradient does after the first gradient: 'step' runs the transformation all the
        same, 'skip' does not. Before the first one neither does, and the transformation's clock stands.

    Raises:
      ValueError: ``without`` is something else.
    """
    if without not in ("step", "skip"):
        raise ValueError(f"optimizer groups: without_gradient={without!r}: accepted are 'step', 'skip'")

    def init(params: Any) -> GatedState:
        return GatedState(started=jnp.zeros((), jnp.bool_), inner=transformation.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, GatedState]:
        ctx: QuantContext = extra["ctx"]
        has_gradient = jnp.asarray(ctx.knobs.get(knob, 0.0)) > 0
        started = state.started | has_gradient
        runs = started if without == "step" else has_gradient
        changes, inner = transformation.update(updates, state.inner, params)
        changes = jax.tree.map(lambda change: jnp.where(runs, change, jnp.zeros_like(change)), changes)
        inner = jax.tree.map(lambda new, old: jnp.where(runs, new, old), inner, state.inner)
        return changes, GatedState(started=started, inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)


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
      An optax transformation whose ``update`` takes the context of the step too, as ``ctx``.

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
