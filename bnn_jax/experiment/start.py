"""The initial state of a stage: fresh variables, copied ones, and those made anew from the copied ones."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from bnn_jax.errors import CheckpointError
from bnn_jax.networks.base import knobs_of
from bnn_jax.objectives.base import Objective
from bnn_jax.quantizers.base import QuantContext, evaluation_context
from bnn_jax.training.devices import Devices
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import zero_metric_sums

COLLECTIONS = ("params", "batch_stats", "quant_state")


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled functions that make variables of a network, for several seeds: compiled once, not for each of them.

    Attributes:
      init: (key, images, knobs) -> fresh variables.
      recompute: (variables, images) -> variables with those that were missing.
    """

    init: Callable[..., dict[str, Any]]
    recompute: Callable[[dict[str, Any], jax.Array], Any]


def programs(network: Any) -> Programs:
    """The functions of a network; compiled when they are first called."""
    return Programs(jax.jit(_init_function(network)), jax.jit(_recompute_function(network)))


def init_variables(
    network: Any,
    key: jax.Array,
    images: jax.Array,
    *,
    knobs: Mapping[str, jax.Array] | None = None,
    shared: Programs | None = None,
) -> dict[str, Any]:
    """Fresh variables of a network.

    Args:
      network: Linen module.
      key: random key.
      images: (N, H, W, C) normalised images; quantizers that start from data see these.
      knobs: values of the knobs before the first step, by name; None takes the defaults.
      shared: functions that are used for other keys too; None compiles one for this key.
    """
    if shared is not None:
        return shared.init(key, images, knobs or {})
    return jax.jit(functools.partial(_init_function(network), key))(images, knobs or {})


def _init_function(network: Any) -> Callable[..., dict[str, Any]]:
    def init(key: jax.Array, images: jax.Array, knobs: Mapping[str, jax.Array]) -> dict[str, Any]:
        variables = network.init({"params": key, "quant": key}, images, QuantContext(train=True, knobs=knobs))
        stored = {knob.name: jnp.float32(knobs.get(knob.name, knob.default)) for knob in knobs_of(network)}
        variables = {**variables, **({"knobs": stored} if stored else {})}
        return {name: variables[name] for name in (*COLLECTIONS, "knobs") if name in variables}

    return init


def variable_shapes(network: Any, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Shapes and types of a network's variables, without computing anything."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
    shapes = jax.eval_shape(lambda x: network.init(keys, x, QuantContext(train=True)), images)
    knobs = {knob.name: jax.ShapeDtypeStruct((), jnp.float32) for knob in knobs_of(network)}
    # A collection the network does not have is named too, as empty: restoring is then strict about it.
    return {**{name: shapes.get(name, {}) for name in COLLECTIONS}, "knobs": knobs}


def transfer(
    source: dict[str, Any], target: dict[str, Any], *, collections: Sequence[str], may_be_new: Sequence[str] = ()
) -> dict[str, Any]:
    """``target`` with the named collections taken from ``source``, in buffers of their own.

    Args:
      source: variables of another network.
      target: fresh variables.
      collections: which collections are copied.
      may_be_new: patterns of paths ('params/...') that keep their fresh value where the source has none.

    Raises:
      CheckpointError: a path that is missing in the source, unknown in the target, or of another shape.
    """
    result = dict(target)
    for collection in collections:
        if collection not in target:
            continue
        old: dict[str, Any] = flax.traverse_util.flatten_dict(source.get(collection, {}), sep="/")
        new: dict[str, Any] = flax.traverse_util.flatten_dict(target[collection], sep="/")
        for path, value in new.items():
            full = f"{collection}/{path}"
            if path in old and jnp.shape(old[path]) == jnp.shape(value):
                new[path] = jnp.array(old[path], dtype=value.dtype, copy=True)
            elif path not in old and any(re.search(pattern, full) for pattern in may_be_new):
                continue
            else:
                found = f"shape {jnp.shape(old[path])}" if path in old else "missing"
                raise CheckpointError(f"initial variables: {full}: {found}, expected shape {jnp.shape(value)}")
        unknown = sorted(old.keys() - new.keys())
        if unknown:
            raise CheckpointError(f"initial variables: {collection}/{unknown[0]} is not part of this network")
        result[collection] = flax.traverse_util.unflatten_dict(new, sep="/")
    return result


def recompute(
    network: Any,
    variables: dict[str, Any],
    images: jax.Array,
    *,
    patterns: Sequence[str],
    shared: Programs | None = None,
) -> dict[str, Any]:
    """Variables in which every leaf that a pattern matches ('quant_state/.*/mask') is made anew by the network.

    Linen creates only what is missing: the matching leaves are dropped, and one forward pass makes them from the other
    variables and the images.
    """
    if not patterns:
        return variables
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    kept = {path: leaf for path, leaf in flat.items() if not any(re.search(p, path) for p in patterns)}
    variables = flax.traverse_util.unflatten_dict(kept, sep="/")
    forward = shared.recompute if shared is not None else jax.jit(_recompute_function(network))
    return {**variables, **forward(variables, images)}


def _recompute_function(network: Any) -> Callable[[dict[str, Any], jax.Array], Any]:
    def forward(variables: dict[str, Any], images: jax.Array):
        ctx = evaluation_context(variables)
        return network.apply(variables, images, ctx, mutable=list(COLLECTIONS), rngs=keys)[1]

    keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
    return forward


def create_state(
    variables: dict[str, Any],
    *,
    optimizer: optax.GradientTransformation,
    objectives: Sequence[Objective],
    num_classes: int,
    seed: int | Sequence[int],
    devices: Devices,
    log_gradient_norms: bool = False,
    log_train_top5: bool = False,
) -> TrainState:
    """The state before the first step, replicated on all devices; of several seeds, stacked.

    Args:
      variables: params, batch_stats, quant_state, knobs; of several seeds, stacked.
      optimizer: optax transformation.
      objectives: loss terms.
      num_classes: K.
      seed: seed of the stage's random draws, or several.
      devices: placement.
      log_gradient_norms: whether the gradient norm of every objective is summed too.
      log_train_top5: whether training images with the label among the five largest logits are counted too.
    """
    states = objective_states(objectives, num_classes)

    def make_one(variables: dict[str, Any], seed: int | jax.Array) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            quant_state=variables.get("quant_state", {}),
            knobs=variables.get("knobs", {}),
            opt_state=optimizer.init(variables["params"]),
            objective_state=states,
            metric_sums=zero_metric_sums(objectives, with_norms=log_gradient_norms, with_top5=log_train_top5),
            rng=jax.random.key(seed),
        )

    def make(variables: dict[str, Any]) -> TrainState:
        if isinstance(seed, int):
            return make_one(variables, seed)
        return jax.vmap(make_one)(variables, jnp.asarray(seed, jnp.uint32))

    return jax.jit(make, out_shardings=devices.replicated)(variables)


def objective_states(objectives: Sequence[Objective], num_classes: int) -> dict[str, Any]:
    """States at the start of a stage, by name, of the objectives that have one."""
    states = {objective.name: objective.init(num_classes) for objective in objectives}
    return {name: state for name, state in states.items() if jax.tree.leaves(state)}
