"""The first state of a stage: fresh variables, copied ones, and those made anew from the copied ones.

What is copied from where says ``Stage.inherit``; ``first_variables`` carries it out.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from bnn_jax import hosts
from bnn_jax.data.augment import prepare_eval
from bnn_jax.data.memory import ImageSource, Split
from bnn_jax.data.order import index_plan
from bnn_jax.errors import CheckpointError
from bnn_jax.experiment import adapt
from bnn_jax.networks.base import knobs_of
from bnn_jax.objectives.base import Objective
from bnn_jax.quantizers.base import QuantContext, evaluation_context
from bnn_jax.storage.weights import encoded_weights, put_base
from bnn_jax.training.averaging import with_average
from bnn_jax.training.devices import Devices
from bnn_jax.training.epoch_sums import zero_metric_sums
from bnn_jax.training.flips import signs_program
from bnn_jax.training.loop import Setup
from bnn_jax.training.progress import say
from bnn_jax.training.state import TrainState

COLLECTIONS = ("params", "batch_stats", "quant_state")


@dataclasses.dataclass(frozen=True)
class Inherited:
    """What ``Stage.inherit`` refers to.

    Attributes:
      network: network of the source.
      variables: its variables, for each seed of the stage; by path where they are to be adapted.
    """

    network: Any
    variables: Sequence[dict[str, Any]]


def first_state(setup: Setup, inherited: Inherited | None, devices: Devices) -> TrainState:
    """The state before the first step of a stage; of several seeds each one's, stacked."""
    variables = setup.seeds.stack(first_variables(setup, inherited))
    return new_state(setup, hosts.values_of_first(variables), devices)


def first_variables(setup: Setup, inherited: Inherited | None) -> list[dict[str, Any]]:
    """Variables of each seed before the first step: fresh, then copied, then made anew where the stage says so."""
    stage, seeds, found = setup.stage, setup.seeds, []
    init, recompute = init_program(setup.network), recompute_program(setup.network)
    knobs = {name: schedule(jnp.int32(0)) for name, schedule in setup.parts.knobs.items()}
    if inherited is not None and adapt.source_of(stage):
        for line in _plan(setup, inherited.variables[0]).describe(stage):
            say(line)
    for index, (order, initial) in enumerate(zip(seeds.orders, seeds.initials, strict=True)):
        images = _first_images(setup.source, order, batch_size=stage.optim.batch_size)
        variables = init(jax.random.key(initial), images, knobs)
        if inherited is not None and adapt.source_of(stage):
            variables = _adapt(setup, inherited.variables[index], variables, images, recompute)
        elif inherited is not None and stage.inherit is not None:
            variables = _inherit(setup, inherited.network, inherited.variables[index], fresh=variables)
            if stage.inherit.recompute:
                variables = recompute(without(variables, stage.inherit.recompute), images)
        found.append(variables)
    return found


def _inherit(setup: Setup, network: Any, copied: dict[str, Any], *, fresh: dict[str, Any]) -> dict[str, Any]:
    record = setup.stage.inherit
    assert record is not None  # the caller has something to copy
    variables = transfer(copied, fresh, collections=record.collections, may_be_new=record.may_be_new)
    if not record.realised_base:
        return variables
    return put_base(variables, fresh, encoded_weights(network, copied, setup.source.image_shape))


def _adapt(
    setup: Setup, found: dict[str, Any], fresh: dict[str, Any], images: jax.Array, recompute: Callable[..., Any]
) -> dict[str, Any]:
    plan = _plan(setup, found)
    variables = adapt.adapted(plan, found, fresh)
    patterns = adapt.recomputed(plan, setup.stage)
    variables = recompute(without(variables, patterns), images) if patterns else variables
    return adapt.calibrated(setup.network, variables, images, found)


def _plan(setup: Setup, found: dict[str, Any]) -> adapt.Plan:
    return adapt.plan(setup.stage, found, setup.shapes, branches=getattr(setup.network, "branches", 1))


def _first_images(source: ImageSource, order: int, *, batch_size: int) -> jax.Array:
    """The images of the first step, normalised and not augmented: quantizers that start from data see these."""
    split, size = source.train, min(batch_size, len(source.train))
    indices, _ = index_plan(order, 0, num_images=len(split), batch_size=size, drop_last=False)
    # Images that are read when needed are cropped as in evaluation.
    images = split.images[indices[0]] if isinstance(split, Split) else next(split.batches(indices[:1]))[0]
    return prepare_eval(jnp.asarray(images), mean=source.mean, std=source.std)


def init_variables(network: Any, key: jax.Array, images: jax.Array) -> dict[str, Any]:
    """Fresh variables of a network.

    Args:
      network: Linen module.
      key: random key.
      images: (N, H, W, C) normalised images; quantizers that start from data see these.
    """
    return init_program(network)(key, images, {})


def init_program(network: Any) -> Callable[..., dict[str, Any]]:
    """Jitted function of (key, images, values of the knobs by name) that makes fresh variables."""

    def init(key: jax.Array, images: jax.Array, knobs: Mapping[str, jax.Array]) -> dict[str, Any]:
        variables = network.init({"params": key, "quant": key}, images, QuantContext(train=True, knobs=knobs))
        stored = {knob.name: jnp.float32(knobs.get(knob.name, knob.default)) for knob in knobs_of(network)}
        variables = {**variables, **({"knobs": stored} if stored else {})}
        return {name: variables[name] for name in (*COLLECTIONS, "knobs") if name in variables}

    return _jit_once(init)


def _jit_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Jitted, for what runs once: on a CPU compiled four times faster, to a slower program with the same bits.

    The initial values of a ResNet-8 take 1.6 s to compile, at the usual level 6.5, more than its training step.
    """
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


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


def without(variables: dict[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """The variables that no pattern of a path ('quant_state/.*/mask') matches."""
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    kept = {path: leaf for path, leaf in flat.items() if not any(re.search(p, path) for p in patterns)}
    return flax.traverse_util.unflatten_dict(kept, sep="/")


def recompute_program(network: Any) -> Callable[[dict[str, Any], jax.Array], Any]:
    """Function of (variables, images), compiled once: the variables with those that were missing.

    Linen creates only what is missing: one forward pass makes it from the other variables and the images.
    """
    keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
    apply = functools.partial(network.apply, mutable=list(COLLECTIONS), rngs=keys)
    made = _jit_once(lambda variables, images: apply(variables, images, evaluation_context(variables))[1])
    return lambda variables, images: {**variables, **made(variables, images)}


def new_state(setup: Setup, variables: dict[str, Any], devices: Devices) -> TrainState:
    """The state of a stage before its first step; of several seeds, stacked.

    Args:
      setup: the stage.
      variables: params, batch_stats, quant_state; of several seeds, stacked.
      devices: placement.
    """
    return create_state(
        variables,
        optimizer=setup.parts.optimizer,
        objectives=setup.parts.objectives,
        num_classes=setup.source.num_classes,
        seed=setup.seeds.orders,
        devices=devices,
        log_gradient_norms=setup.stage.log_gradient_norms,
        log_train_top5=setup.stage.log_train_top5,
        extend=functools.partial(_extended, setup),
    )


def _extended(setup: Setup, state: TrainState) -> TrainState:
    """A first state with what only some stages have: an average of the weights, their signs."""
    state = with_average(state) if setup.parts.ema_decay else state
    signs = signs_program(setup.stage, setup.network, setup.source.image_shape)
    return state if signs is None else state.replace(signs=signs(state))


def state_shapes(setup: Setup, devices: Devices) -> TrainState:
    """Shapes of ``new_state``, for restoring one."""
    return jax.eval_shape(lambda shapes: new_state(setup, shapes, devices), setup.seeds.shapes(setup.shapes))


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
    extend: Callable[[TrainState], TrainState] = lambda state: state,
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
      extend: adds to the state of a seed, inside jit.
    """
    states = objective_states(objectives, num_classes)

    def make_one(variables: dict[str, Any], seed: int | jax.Array) -> TrainState:
        state = TrainState(
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
        return extend(state)

    def make(variables: dict[str, Any]) -> TrainState:
        each = (seed,) if isinstance(seed, int) else tuple(seed)
        if len(each) == 1:
            return make_one(variables, each[0])
        return jax.vmap(make_one)(variables, jnp.asarray(each, jnp.uint32))

    return jax.jit(make, out_shardings=devices.replicated)(variables)


def objective_states(objectives: Sequence[Objective], num_classes: int) -> dict[str, Any]:
    """States at the start of a stage, by name, of the objectives that have one."""
    states = {objective.name: objective.init(num_classes) for objective in objectives}
    return {name: state for name, state in states.items() if jax.tree.leaves(state)}
