"""What the SKD-BNN checks share: the published objectives, networks of a state's depth, one recorded training step."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnn_jax import networks, objectives, schedules
from bnn_jax.experiment.start import create_state
from bnn_jax.objectives import Objective
from bnn_jax.objectives.base import Batch, Outputs
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.schedules import Schedule
from bnn_jax.stages import QuantSpec, Spec, spec
from bnn_jax.training.devices import all_devices
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import Constants, StepParts, train_step
from tests.golden.asbq.support import in_pytorch_form
from tests.golden.comparison import Comparison, GoldenFile

# Weights and temperature of the published recipe; the golden files' README fixes them for all files.
ALPHA, BETA, GAMMA, TEMPERATURE = 1.0, 0.05, 0.01, 4.0

IRNET = QuantSpec(weight=spec("irnet"), act=spec("irnet"))
SIGN = QuantSpec(weight=spec("sign"), act=spec("sign"))

# Names of the released terms and ours, in the order of the arrays ``losses_ce_feature_label_cluster_total``.
TERMS = {"ce": "cross_entropy", "feature": "feature_swap", "label": "label_bank", "cluster": "cluster"}


def without_module(name: str) -> str:
    """PyTorch's name without the ``module.`` of DataParallel."""
    return name.removeprefix("module.")


def state_by_name(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by PyTorch's names without ``module.``."""
    return {without_module(name): array for name, array in arrays.items()}


def knobs_of(k: np.ndarray, t: np.ndarray) -> dict[str, jax.Array]:
    """The estimator's knobs from a file's k and t, each (1,) or a scalar."""
    return {"error_decay_k": jnp.float32(np.squeeze(k)), "error_decay_t": jnp.float32(np.squeeze(t))}


def compare_estimator(result: Comparison, case: str, file: GoldenFile, *, epoch: int, epochs: int) -> None:
    """The library's schedules give the k and t a file has for an epoch, as ``<case>k`` and ``<case>t``."""
    for name in ("k", "t"):
        schedule = schedules.build(spec(f"error_decay_{name}"), steps_per_epoch=1, epochs=epochs)
        result.close(case + name, schedule(jnp.int32(epoch)), np.squeeze(file[case + name]), rtol=1e-6)


def held(values: np.ndarray, *, steps: int = 1) -> Schedule:
    """Schedule of a value per epoch of ``steps`` steps, as a file states it."""
    table = jnp.asarray(np.atleast_1d(np.squeeze(values)), jnp.float32)
    return lambda step: table[step // steps]


def loss_terms(*, mlp: bool = False, on: str = "features") -> tuple[Objective, ...]:
    """The four terms of the release with their weights."""
    compare = "elementwise" if mlp else "channel_and_spatial"
    bank = {"temperature": TEMPERATURE, "strict_release": True, "log_softmax": mlp, "reset_each_epoch": mlp}
    specs: tuple[Spec, ...] = (
        spec("cross_entropy", weight=1.0),
        spec("feature_swap", weight=ALPHA, compare=compare),
        spec("label_bank", weight=BETA, **bank),
        spec("cluster", weight=GAMMA, on="logits" if mlp else on),
    )
    return tuple(objectives.build(term) for term in specs)


def bank_state(bank: np.ndarray, *, epochs: int = 1) -> dict[str, jax.Array]:
    """State of the label bank at the beginning of an epoch: the rows of the epoch before, empty sums."""
    classes = len(bank)
    return {
        "bank": jnp.asarray(bank),
        "known": jnp.ones((classes,), bool),
        "sum": jnp.zeros((classes, classes), bank.dtype),
        "count": jnp.zeros((classes,), jnp.float32),
        "epochs": jnp.int32(epochs),
    }


def resnet(shapes: Mapping[str, tuple[int, ...]], name: str) -> Any:
    """A network of the table with the depth, widths and classes of a state by PyTorch's names."""
    matches = [re.fullmatch(r"layer(\d+)\.(\d+)\.conv2\.weight", key) for key in shapes]
    blocks = [(int(match.group(1)), shapes[match.string][0]) for match in matches if match]
    stages = sorted({stage for stage, _ in blocks})
    choice = spec(
        name,
        stage_sizes=tuple(sum(other == stage for other, _ in blocks) for stage in stages),
        widths=tuple(next(width for other, width in blocks if other == stage) for stage in stages),
    )
    classes = next(shape[0] for key, shape in shapes.items() if key in ("linear.weight", "fc.weight"))
    return networks.build(choice, IRNET, num_classes=classes)


class KeepOutputs(Objective):
    """A term of value 0 that keeps what the training step saw, as its state."""

    name = "kept"
    needs = frozenset({"real_features"})

    def __call__(self, outputs: Outputs, batch: Batch, state: Any, ctx: QuantContext) -> jax.Array:
        return jnp.zeros(())

    def after_step(self, outputs: Outputs, batch: Batch, state: Any) -> Outputs:
        return outputs


def keep_gradients() -> optax.GradientTransformationExtraArgs:
    """An optimiser that moves nothing; its state is the gradient it was given."""
    return optax.GradientTransformationExtraArgs(
        init=lambda params: params,
        update=lambda grads, state, params=None, **_: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


@flax.struct.dataclass
class RecordedStep:
    """What one training step did.

    Attributes:
      outputs: logits, features, and the feature maps of both streams.
      gradients: of the total loss, as the optimiser got them.
      metrics: of the step.
      state: the state after it; its parameters are those before.
    """

    outputs: Outputs
    gradients: Any
    metrics: dict[str, jax.Array]
    state: TrainState


def record_step(
    network: Any,
    variables: Mapping[str, Any],
    images: jax.Array,
    labels: np.ndarray,
    *,
    terms: tuple[Objective, ...],
    bank: np.ndarray,
    knobs: Mapping[str, Schedule],
    log_gradient_norms: bool = False,
) -> RecordedStep:
    """Runs the library's training step once on prepared images and records it.

    Args:
      network: Linen module.
      variables: its collections.
      images: (N, H, W, C), float32, as the network sees them.
      labels: (N,).
      terms: loss terms.
      bank: (K, K), rows of the epoch before.
      knobs: schedules by name.
      log_gradient_norms: whether the gradient norm of each term is measured.

    Float64 inputs are computed in float64 where JAX is set to it.
    """
    terms = (*terms, KeepOutputs(weight=0.0))
    optimizer = keep_gradients()
    parts = StepParts(
        network=network,
        objectives=terms,
        optimizer=optimizer,
        prepare=lambda images, key: images,
        knobs=knobs,
        log_gradient_norms=log_gradient_norms,
    )
    state = create_state(
        dict(variables),
        optimizer=optimizer,
        objectives=terms,
        num_classes=len(bank),
        seed=0,
        devices=all_devices(),
        log_gradient_norms=log_gradient_norms,
    )
    state = state.replace(objective_state={**state.objective_state, "label_bank": bank_state(bank), "kept": {}})
    constants = Constants(images=images, labels=jnp.asarray(labels, jnp.int32), teacher={})
    rows = jnp.arange(len(labels), dtype=jnp.int32)
    step = jax.jit(lambda *arguments: train_step(parts, *arguments))
    after, metrics = step(state, constants, rows, jnp.ones(rows.shape, bool))
    return RecordedStep(outputs=after.objective_state["kept"], gradients=after.opt_state, metrics=metrics, state=after)


def weighted(metrics: Mapping[str, jax.Array], terms: tuple[Objective, ...]) -> dict[str, jax.Array]:
    """The weighted terms by the release's names, and their ``total``."""
    weights = {term.name: term.weight for term in terms}
    own = {name: weights[ours] * metrics[f"loss/{ours}"] for name, ours in TERMS.items()}
    return {**own, "total": metrics["loss"]}


def pair_losses(outputs: Outputs, compare: Callable[..., jax.Array]) -> jax.Array:
    """The distance of each pair of feature maps of a recorded step, not weighted and not averaged."""
    mask = jnp.ones(outputs.logits.shape[:1], bool)
    pairs = zip(outputs.block_features, outputs.real_features, strict=True)
    return jnp.stack([compare(binary, real, mask) for binary, real in pairs])


def relative_to_largest(
    result: Comparison, what: str, own: Any, reference: np.ndarray, *, rtol: float, floor: float = 0.0
) -> None:
    """Compares with a tolerance of ``rtol`` of the array's largest magnitude, as the files' README defines it.

    Args:
      result: collects the comparison.
      what: name.
      own: ours.
      reference: the file's.
      rtol: share of the largest magnitude.
      floor: smallest magnitude taken as the largest.
    """
    largest = max(float(np.abs(reference).max(initial=0.0)), floor)
    result.close(what, own, reference, atol=rtol * largest)


def compare_gradients(
    result: Comparison,
    case: str,
    gradients: Any,
    expected: Mapping[str, np.ndarray],
    *,
    rtol: float,
    truly_zero: str = r"(?!)",
) -> None:
    """Compares all gradients by PyTorch's names, each relative to its largest element; none may be missing.

    Args:
      result: collects the comparisons.
      case: prefix of the names.
      gradients: ours, as parameters.
      expected: the file's, by PyTorch's names.
      rtol: share of the largest element.
      truly_zero: pattern of names whose gradient is zero but for rounding: both must be below 1e-6.
    """
    own = in_pytorch_form({"params": gradients}, expected)
    result.exact(f"{case}parameters", sorted(own), sorted(expected))
    result.exact(f"{case}number of gradients", len(jax.tree.leaves(gradients)), len(expected))
    for name, value in own.items():
        if re.fullmatch(truly_zero, name):
            result.close(f"{case}{name}", value, expected[name], atol=1e-6)
        else:
            relative_to_largest(result, f"{case}{name}", value, expected[name], rtol=rtol)


def compare_variables(
    result: Comparison,
    case: str,
    variables: Mapping[str, Any],
    expected: Mapping[str, np.ndarray],
    *,
    parameters: float,
    statistics: float,
    left_out: str = r"(?!)",
) -> None:
    """Compares those parameters (absolute) and running statistics (relative to the largest) a file has.

    Args:
      result: collects the comparisons.
      case: prefix of the names.
      variables: ours.
      expected: the file's, by PyTorch's names.
      parameters: absolute tolerance.
      statistics: tolerance as a share of the largest element.
      left_out: pattern of names the files' README excludes.
    """
    expected = {name: array for name, array in expected.items() if not name.endswith("num_batches_tracked")}
    own = in_pytorch_form(variables, expected)
    result.exact(f"{case}names", sorted(own), sorted(expected))
    for name, value in own.items():
        if re.fullmatch(left_out, name):
            continue
        if "running_" in name:
            relative_to_largest(result, case + name, value, expected[name], rtol=statistics)
        else:
            result.close(case + name, value, expected[name], atol=parameters)
