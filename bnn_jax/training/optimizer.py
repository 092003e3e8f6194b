"""Optimisers in PyTorch's order of operations, with parameter groups by path.

PyTorch adds the L2 term to the gradient before momentum or Adam ("coupled"); optax's ``adamw`` does not. The chains
here do: ``gradient -> clip -> + weight_decay * parameter -> momentum or Adam -> * (-learning_rate)``. Of 'adamw' the
term comes behind Adam, in front of the learning rate, as in PyTorch's AdamW.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bnn_jax.quantizers.base import QuantContext
from bnn_jax.schedules import Schedule
from bnn_jax.stages import OptimSpec, ParameterGroup, Spec


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
    if optimizer.name in ("adam", "adamw"):
        return optax.scale_by_adam(**options)
    raise ValueError(f"optimizer {optimizer.name!r}: accepted are sgd, adam, adamw")


def _group_chain(
    optimizer: Spec, group: ParameterGroup, schedule: Schedule, *, genes: dict[str, int] | None = None
) -> optax.GradientTransformation:
    """Optimiser of a group; ``genes`` are those of its parameters where only the chosen branch of each may move."""
    if group.learning_rate_scale == 0:
        return optax.set_to_zero()
    core = _core(optimizer)
    direction = (_decay(group.weight_decay), core if genes is None else _only_chosen(core, genes))
    if optimizer.name == "adamw":
        direction = (*reversed(direction), optax.identity() if genes is None else _without_others(genes))
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


def _decay(factor: float | tuple[float, ...]) -> optax.GradientTransformation:
    """Adds ``factor * parameter`` to the gradient; a tuple has one factor for each row."""
    if not isinstance(factor, tuple):
        return optax.add_decayed_weights(factor) if factor else optax.identity()

    def update(gradient: Any, parameter: Any) -> jax.Array:
        if parameter.ndim == 0 or parameter.shape[0] != len(factor):
            raise ValueError(f"optimizer groups: {len(factor)} weight decays for a parameter {parameter.shape}")
        rows = jnp.asarray(factor, jnp.float32).reshape((-1,) + (1,) * (parameter.ndim - 1))
        return gradient + rows * parameter

    return optax.stateless_with_tree_map(update)


def _only_chosen(core: optax.GradientTransformation, genes: dict[str, int]) -> optax.GradientTransformationExtraArgs:
    """Runs an optimiser for the chosen row of each parameter only; the others, and their clocks, stand still.

    Every row has a state of its own, so a branch that was chosen n times has taken n steps, whatever the others did.

    Args:
      core: gets a gradient, gives a change.
      genes: place in ``ctx.choice`` by path of the parameter; its first axis is that of the branches.
    """

    def rows(tree: Any) -> dict[str, jax.Array]:
        return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def init(params: Any) -> dict[str, Any]:
        return {path: jax.vmap(core.init)(leaf) for path, leaf in rows(params).items()}

    def update(updates: Any, state: Any, params: Any = None, *, ctx: Any = None, **_: Any):
        if ctx is None or ctx.choice is None:
            raise ValueError("optimizer: unselected_branches='freeze' needs the branches a step has chosen")
        choice, changes, states = ctx.choice, {}, {}
        for path, gradient in rows(updates).items():
            chosen = jnp.arange(gradient.shape[0]) == choice[genes[path]]
            change, new = jax.vmap(lambda row, old: core.update(row, old))(gradient, state[path])
            changes[path] = _select(chosen, change, 0.0)
            states[path] = jax.tree.map(functools.partial(_select, chosen), new, state[path])
        return jax.tree_util.tree_map_with_path(lambda path, _: changes[path_of(path)], updates), states

    return optax.GradientTransformationExtraArgs(init, update)


def _without_others(genes: dict[str, int]) -> optax.GradientTransformationExtraArgs:
    """Makes the change of every row but the chosen one 0; arguments as those of ``_only_chosen``."""

    def init(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, *, ctx: Any = None, **_: Any):
        choice = ctx.choice  # ``_only_chosen``, which comes first, has looked whether it is there

        def kept(path: Any, change: jax.Array) -> jax.Array:
            return _select(jnp.arange(change.shape[0]) == choice[genes[path_of(path)]], change, 0.0)

        return jax.tree_util.tree_map_with_path(kept, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _select(rows: jax.Array, new: Any, old: Any) -> jax.Array:
    """``new`` in the rows where ``rows`` is True, ``old`` in the others."""
    return jnp.where(rows.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)


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
      knob: its name.
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
        has_gradient = jnp.asarray(ctx.knobs[knob]) > 0
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


def branch_genes(params: Any, branch_patterns: Sequence[str]) -> dict[str, int]:
    """Place in ``ctx.choice`` by path of each parameter that a branch pattern matches."""
    return {
        path_of(path): gene
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
        for gene, pattern in enumerate(branch_patterns)
        if re.search(pattern, path_of(path))
    }


def make_optimizer(
    spec: OptimSpec,
    params: Any,
    *,
    schedule: Schedule,
    unused_parameters: Sequence[str] = (),
    branch_patterns: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimiser of a stage.

    Args:
      spec: optimiser, groups, clipping.
      params: the parameters (or their shapes).
      schedule: learning rate by step.
      unused_parameters: patterns of parameters without gradient by construction; they are left alone, as PyTorch skips
        parameters whose gradient is None: no weight decay moves them.
      branch_patterns: for each place in ``ctx.choice`` a pattern of the parameters with a leading branch axis.

    Returns:
      An optax transformation whose ``update`` takes the context of the step too, as ``ctx``.

    Raises:
      ValueError: an unknown optimiser, or a parameter in no group.
    """
    frozen = tuple(ParameterGroup(pattern, learning_rate_scale=0.0) for pattern in unused_parameters)
    groups = frozen + spec.groups
    genes = branch_genes(params, branch_patterns if spec.unselected_branches == "freeze" else ())
    chains: dict[Any, Any] = {}
    for index, group in enumerate(groups):
        chains[str(index)] = _group_chain(spec.optimizer, group, schedule)
        chains[f"{index} chosen"] = _group_chain(spec.optimizer, group, schedule, genes=genes)
    labels = jax.tree_util.tree_map_with_path(
        lambda path, label: f"{label} chosen" if path_of(path) in genes else label, group_labels(params, groups)
    )
    used = set(jax.tree.leaves(labels))
    chains = {label: chain for label, chain in chains.items() if label in used}
    partition = optax.partition(chains, labels)
    if spec.gradient_clip_norm is None:
        return optax.with_extra_args_support(partition)
    return optax.with_extra_args_support(optax.chain(optax.clip_by_global_norm(spec.gradient_clip_norm), partition))
