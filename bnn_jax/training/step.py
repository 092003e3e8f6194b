"""The training step: one for every method, network and quantizer.

Order of a training step: context of the step -> forward -> teacher's forward (where an objective needs it) -> sum of
the objectives -> gradient -> projections -> optimiser -> state of the objectives -> sums of the epoch's metrics.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from bnn_jax.objectives.base import Batch, Objective, Outputs
from bnn_jax.quantizers.base import QuantContext, evaluation_context
from bnn_jax.schedules import Schedule
from bnn_jax.training import averaging
from bnn_jax.training.devices import Devices
from bnn_jax.training.epoch_sums import COUNTS, add_metrics, step_metrics
from bnn_jax.training.feed import Rows, fetch
from bnn_jax.training.frozen import Frozen
from bnn_jax.training.mixup import mixed
from bnn_jax.training.projections import Projection, Update
from bnn_jax.training.seeds import ONE_SEED, Seeds
from bnn_jax.training.state import TrainState

# Streams of random numbers inside a step, each folded into the step's key.
AUGMENTATION, QUANTIZER, REAL_STREAM, PROJECTION, CHOICE, MIXUP = 0, 1, 2, 3, 4, 5

PrepareTrain = Callable[[jax.Array, jax.Array], jax.Array]
# (random key, step) -> int32 (searched layers,).
Choose = Callable[[jax.Array, jax.Array], jax.Array]


@flax.struct.dataclass
class Constants:
    """Arrays a stage's steps read but never change.

    Attributes:
      images: (M, H, W, C), uint8, the training images; None where every step brings its own.
      labels: (M,), int32, or None.
      teacher: variables of the teacher, or {}.
      choice: (searched layers,), int32, branches of a supernet that are trained; None where each step chooses anew or
        there are none.
    """

    images: jax.Array | None
    labels: jax.Array | None
    teacher: Any
    choice: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class StepParts:
    """What a training step is made of.

    Attributes:
      network: Linen module (images, context) -> NetworkOutput.
      objectives: loss terms.
      optimizer: optax transformation.
      prepare: (uint8 images, key) -> float32 images; augmentation and normalisation.
      knobs: schedules of the knobs by name.
      teacher: the teacher's Linen module, or None.
      log_gradient_norms: whether the gradient norm of every weighted objective is measured (a pullback for each).
      projections: changes made between gradient and optimiser, in this order.
      choose: draws the branches of a step, or None.
      accumulation_steps: parts of a batch that are passed through the network one after another, see
        ``accumulated_pass``.
      frozen: parameters and modules that no step changes.
      mixup: alpha of the distribution that images are mixed by, see ``mixup``; 0 mixes none.
      ema_decay: decay of the average of the weights, see ``averaging``; 0 averages nothing.
    """

    network: Any
    objectives: tuple[Objective, ...]
    optimizer: optax.GradientTransformationExtraArgs
    prepare: PrepareTrain
    knobs: Mapping[str, Schedule] = dataclasses.field(default_factory=dict)
    teacher: Any = None
    log_gradient_norms: bool = False
    projections: tuple[Projection, ...] = ()
    choose: Choose | None = None
    accumulation_steps: int = 1
    frozen: Frozen = dataclasses.field(default_factory=Frozen)
    mixup: float = 0.0
    ema_decay: float = 0.0


def uniform_choice(genes: int, branches: int) -> Choose:
    """Every branch equally likely, in every searched layer on its own."""
    return lambda key, step: jax.random.randint(key, (genes,), 0, branches, jnp.int32)


def needs_teacher(objectives: Sequence[Objective]) -> bool:
    """Whether any objective reads the teacher's logits."""
    return any("teacher_logits" in objective.needs for objective in objectives)


def needs_real_features(objectives: Sequence[Objective]) -> bool:
    """Whether any objective compares the network with its real stream."""
    return any("real_features" in objective.needs for objective in objectives)


@flax.struct.dataclass
class Pass:
    """What one forward and backward pass over (a part of) a batch gives.

    Attributes:
      grads: gradient of the loss with respect to the parameters.
      metrics: scalars, see ``train_step``.
      batch_stats: running statistics after the pass.
      quant_state: state of the quantizers after the pass.
      objective_state: state of the objectives after the pass.
    """

    grads: Any
    metrics: dict[str, jax.Array]
    batch_stats: Any
    quant_state: Any
    objective_state: Any


def train_step(
    parts: StepParts, state: TrainState, constants: Constants, rows: Rows, mask: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step, a pure function to be jitted.

    Args:
      parts: static parts.
      state: state before the step.
      constants: training images, labels, teacher.
      rows: (N,), int32, rows of the training images; or images (N, H, W, C), uint8, and labels (N,) themselves.
      mask: (N,), bool, False for rows that only fill up the batch.

    Returns:
      The state after the step, and scalars of this step: loss, each objective, count and correct.
    """
    key = jax.random.fold_in(state.rng, state.step)
    images, labels = fetch(constants.images, constants.labels, rows)
    images = parts.prepare(images, jax.random.fold_in(key, AUGMENTATION))
    batch = Batch(images=images, labels=labels, mask=mask)
    if parts.mixup:
        batch = mixed(batch, jax.random.fold_in(key, MIXUP), alpha=parts.mixup)
    knobs = {name: schedule(state.step) for name, schedule in parts.knobs.items()}
    choice = constants.choice
    if parts.choose is not None:
        choice = parts.choose(jax.random.fold_in(key, CHOICE), state.step)
    ctx = QuantContext(train=True, step=state.step, knobs=knobs, choice=choice, mask=mask)
    run = accumulated_pass if parts.accumulation_steps > 1 else one_pass
    done = run(parts, state, constants.teacher, batch, ctx, key=key)
    update = Update(state.params, done.quant_state, state.opt_state, done.grads)
    update = _project(parts.projections, update, ctx, jax.random.fold_in(key, PROJECTION))
    changes, opt_state = parts.optimizer.update(update.grads, update.opt_state, update.params, ctx=ctx)
    new_state = state.replace(
        step=state.step + 1,
        params=parts.frozen.keep_params(state.params, optax.apply_updates(update.params, changes)),
        batch_stats=done.batch_stats,
        quant_state=parts.frozen.keep_state(state.quant_state, update.quant_state),
        opt_state=opt_state,
        objective_state=done.objective_state,
        metric_sums=add_metrics(state.metric_sums, done.metrics, state.step),
        knobs={name: jnp.asarray(knobs.get(name, old), jnp.float32) for name, old in state.knobs.items()},
    )
    return new_state, done.metrics


def averaged_step(
    parts: StepParts, state: TrainState, constants: Constants, rows: Rows, mask: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """``train_step``, and the average of the weights where ``parts`` asks for one."""
    if not parts.ema_decay:
        return train_step(parts, state, constants, rows, mask)
    stepped, metrics = train_step(parts, averaging.moving(state), constants, rows, mask)
    rewritten = tuple(projection.rewrites for projection in parts.projections)
    return averaging.averaged(state, stepped, decay=parts.ema_decay, not_averaged=rewritten), metrics


def one_pass(
    parts: StepParts, state: TrainState, teacher: Any, batch: Batch, ctx: QuantContext, *, key: jax.Array
) -> Pass:
    """Forward and backward pass over a batch.

    Args:
      parts: static parts.
      state: state before the pass.
      teacher: variables of the teacher, or {}.
      batch: images, labels, mask.
      ctx: context of the step, with the batch's mask.
      key: random key of the pass.
    """
    teacher_logits = None
    if needs_teacher(parts.objectives):
        own_ctx = evaluation_context(teacher, mask=ctx.mask).replace(step=ctx.step)
        teacher_logits = parts.teacher.apply(teacher, batch.images, own_ctx).logits

    def terms_function(params: Any):
        variables = {**state.variables, "params": parts.frozen.stop_gradient(params)}
        outputs, updates = forward(parts, variables, batch.images, ctx, key=key)
        outputs = outputs.replace(teacher_logits=teacher_logits)
        terms = {o.name: o(outputs, batch, state.objective_state.get(o.name, {}), ctx) for o in parts.objectives}
        return terms, (outputs, updates)

    terms, grads, norms, (outputs, updates) = gradients(parts, terms_function, state.params)
    return Pass(
        grads=grads,
        metrics={**step_metrics(parts.objectives, terms, outputs, batch), **norms},
        batch_stats=updates.get("batch_stats", state.batch_stats),
        quant_state=updates.get("quant_state", state.quant_state),
        objective_state=_objective_states(parts.objectives, state, outputs, batch),
    )


def accumulated_pass(
    parts: StepParts, state: TrainState, teacher: Any, batch: Batch, ctx: QuantContext, *, key: jax.Array
) -> Pass:
    """``one_pass`` over one part of the batch after another, with the mean gradient over all images.

    Part i of A takes the rows i, i + A, i + 2 A, ..., so that every device has its share of it. A part without a valid
    row changes nothing. BatchNorm normalises each part by itself, and its running statistics move once for each; states
    of quantizers and objectives go from part to part too.
    """
    count = parts.accumulation_steps
    split = jax.tree.map(lambda rows: jnp.swapaxes(rows.reshape(-1, count, *rows.shape[1:]), 0, 1), batch)
    total = jnp.maximum(jnp.sum(batch.mask.astype(jnp.float32)), 1.0)

    def body(carry: Pass, xs: tuple[Batch, jax.Array]) -> tuple[Pass, None]:
        part, index = xs
        now = state.replace(
            batch_stats=carry.batch_stats, quant_state=carry.quant_state, objective_state=carry.objective_state
        )
        own_key = jax.random.fold_in(key, index)
        done = one_pass(parts, now, teacher, part, ctx.replace(mask=part.mask), key=own_key)
        share = done.metrics["count"] / total
        added = done.replace(
            grads=jax.tree.map(lambda total, value: total + share * value, carry.grads, done.grads),
            metrics={
                name: carry.metrics[name] + (value if name in COUNTS else share * value)
                for name, value in done.metrics.items()
            },
        )
        # Chosen, not multiplied by 0: the mean over no row may be NaN.
        return jax.tree.map(lambda new, old: jnp.where(share > 0, new, old), added, carry), None

    first = jax.tree.map(lambda rows: rows[0], split)
    shapes = jax.eval_shape(lambda: one_pass(parts, state, teacher, first, ctx.replace(mask=first.mask), key=key))
    carry = Pass(
        grads=jax.tree.map(jnp.zeros_like, state.params),
        metrics=jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes.metrics),
        batch_stats=state.batch_stats,
        quant_state=state.quant_state,
        objective_state=state.objective_state,
    )
    return jax.lax.scan(body, carry, (split, jnp.arange(count)), unroll=_unroll(count))[0]


def _unroll(length: int) -> int:
    # Convolutions in the body of an XLA:CPU loop are 20 times slower than outside: there the loop is unrolled.
    return length if jax.default_backend() == "cpu" else 1


def forward(
    parts: StepParts, variables: dict[str, Any], images: jax.Array, ctx: QuantContext, *, key: jax.Array
) -> tuple[Outputs, dict[str, Any]]:
    """The network's pass in training mode, and its real stream where an objective compares with it.

    Args:
      parts: static parts.
      variables: params, batch_stats, quant_state.
      images: (N, H, W, C), float32.
      ctx: context of the step.
      key: random key of the step.

    Returns:
      The outputs (without a teacher's), and the collections the pass changed.
    """
    with_real_stream = needs_real_features(parts.objectives)
    with parts.frozen.fixed_norms():
        output, updates = parts.network.apply(
            variables,
            images,
            ctx,
            mutable=["batch_stats", "quant_state", *(["taps", "block_features"] if with_real_stream else [])],
            rngs={"quant": jax.random.fold_in(key, QUANTIZER)},
        )
    outputs = Outputs(logits=output.logits, features=output.features)
    if with_real_stream:
        # The second pass reads the outputs of the first, changes nothing and carries no gradient.
        with parts.frozen.fixed_norms():
            _, real = parts.network.apply(
                # Without any quantized layer there is nothing to read: the two streams are then the same.
                jax.lax.stop_gradient({**variables, "taps": updates.get("taps", {})}),
                images,
                ctx.replace(stream="real"),
                mutable=["block_features"],
                rngs={"quant": jax.random.fold_in(key, REAL_STREAM)},
            )
        features = (jax.tree.leaves(collection.get("block_features", {})) for collection in (updates, real))
        outputs = outputs.replace(block_features=tuple(next(features)), real_features=tuple(next(features)))
    return outputs, {name: updates[name] for name in ("batch_stats", "quant_state") if name in updates}


def gradients(parts: StepParts, terms_function: Callable, params: Any):
    """Terms, gradient of their weighted sum and, if asked for, the gradient norm of every weighted term.

    Args:
      parts: static parts.
      terms_function: params -> (terms by name, other results).
      params: parameters.

    Returns:
      Terms, gradient, norms by name ('gradient_norm/NAME'; {} unless ``parts.log_gradient_norms``), other results.
    """
    terms, pullback, other = jax.vjp(terms_function, params, has_aux=True)
    weights = {objective.name: jnp.full_like(terms[objective.name], objective.weight) for objective in parts.objectives}
    if not parts.log_gradient_norms:
        return terms, pullback(weights)[0], {}, other
    zeros = jax.tree.map(jnp.zeros_like, weights)
    each = {name: pullback({**zeros, name: weight})[0] for name, weight in weights.items()}
    norms = {f"gradient_norm/{name}": optax.tree.norm(grads) for name, grads in each.items()}
    return terms, jax.tree.map(lambda *grads: sum(grads), *each.values()), norms, other


def _project(projections: Sequence[Projection], update: Update, ctx: QuantContext, key: jax.Array) -> Update:
    for index, projection in enumerate(projections):
        update = projection(update, ctx, jax.random.fold_in(key, index))
    return update


def _objective_states(objectives: Sequence[Objective], state: TrainState, outputs: Outputs, batch: Batch) -> Any:
    return {
        objective.name: objective.after_step(outputs, batch, state.objective_state[objective.name])
        for objective in objectives
        if objective.name in state.objective_state
    }


def compile_train_steps(parts: StepParts, devices: Devices, *, seeds: Seeds = ONE_SEED) -> Callable:
    """Jitted function of (state, constants, rows (K, N), mask (K, N)) that runs K steps in one dispatch.

    The rows of a step are indices or, where images are read as they are needed, images and labels; see ``train_step``.
    The state is donated. Returns the new state and the steps' metrics stacked (K,).

    Args:
      parts: static parts.
      devices: placement.
      seeds: of several, S, the state is stacked, rows and mask are (K, S, N), the metrics (K, S).
    """
    shared = Constants(images=None, labels=None, teacher=0 if seeds.own_teachers else None)
    step = seeds.over(functools.partial(averaged_step, parts), in_axes=(0, shared, 0, 0))

    def run(state: TrainState, constants: Constants, rows: Rows, mask: jax.Array):
        length = mask.shape[0]
        if length == 1:
            state, metrics = step(state, constants, jax.tree.map(lambda row: row[0], rows), mask[0])
            return state, jax.tree.map(lambda value: value[None], metrics)
        return jax.lax.scan(lambda carry, xs: step(carry, constants, *xs), state, (rows, mask), unroll=_unroll(length))

    replicated, split = devices.replicated, devices.stacked_rows
    return jax.jit(
        run,
        in_shardings=(replicated, replicated, split, split),
        out_shardings=(replicated, replicated),
        donate_argnums=0,
    )


def compile_end_of_epoch(
    objectives: Sequence[Objective],
    devices: Devices,
    *,
    seeds: Seeds = ONE_SEED,
    signs: Callable[[TrainState], Any] | None = None,
) -> Callable[[TrainState], TrainState]:
    """Jitted function that lets the objectives close the epoch and clears the epoch's sums, of one seed or several.

    Args:
      objectives: loss terms.
      devices: placement.
      seeds: those whose states are stacked.
      signs: gives the signs of the weights, with which the next epoch's are compared; None: they are not.
    """

    def end_of_epoch(state: TrainState) -> TrainState:
        states = {
            objective.name: objective.after_epoch(state.objective_state[objective.name])
            for objective in objectives
            if objective.name in state.objective_state
        }
        sums = jax.tree.map(jnp.zeros_like, state.metric_sums)
        sums["non_finite_step"] = jnp.full((), -1, jnp.int32)
        kept = {} if signs is None else signs(state)
        return state.replace(objective_state=states, metric_sums=sums, signs=kept)

    run = seeds.over(end_of_epoch)
    return jax.jit(run, in_shardings=(devices.replicated,), out_shardings=devices.replicated, donate_argnums=0)
