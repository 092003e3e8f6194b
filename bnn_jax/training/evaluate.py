"""Accuracy and loss of a network on a split of the data, in evaluation mode, and of many paths of a supernet."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnn_jax.data.memory import Split
from bnn_jax.data.stream import StreamedSplit
from bnn_jax.quantizers.base import evaluation_context
from bnn_jax.training.devices import Devices
from bnn_jax.training.feed import Feed, Rows, fetch
from bnn_jax.training.seeds import ONE_SEED, Seeds

PrepareEval = Callable[[jax.Array], jax.Array]


def compile_eval_step(
    network: Any, prepare: PrepareEval, devices: Devices, *, with_choice: bool = False, seeds: Seeds = ONE_SEED
) -> Callable:
    """Jitted function of (variables, images, labels, rows (N,), mask (N,)) -> sums over the valid rows.

    The rows are indices or, with None for images and labels, images and labels themselves; see ``fetch``.

    With ``with_choice`` a last argument (searched layers,) chooses the branches of a supernet. Of several seeds
    the variables are stacked, and so are the sums; such a network has no branches.

    The sums are ``correct1``, ``correct5``, ``loss`` (cross-entropy) and ``count``. ``correct5`` counts labels among
    the five largest logits (among all where there are fewer classes).
    """

    replicated, rows = devices.replicated, devices.rows
    last = (replicated,) if with_choice else ()
    run = seeds.over(functools.partial(eval_step, network, prepare), in_axes=(0, None, None, None, None))
    return jax.jit(run, in_shardings=(replicated, replicated, replicated, rows, rows, *last), out_shardings=replicated)


def compile_path_step(network: Any, prepare: PrepareEval, devices: Devices) -> Callable:
    """Jitted function of (variables, images, labels, rows (N,), mask (N,), paths (P, G)) -> correct images (P,).

    The images go to all devices, the paths are divided among them.
    """

    def correct(*arguments: Any) -> jax.Array:
        return eval_step(network, prepare, *arguments)["correct1"]

    replicated, rows = devices.replicated, devices.rows
    run = jax.vmap(correct, in_axes=(*[None] * 5, 0))
    return jax.jit(run, in_shardings=(*[replicated] * 5, rows), out_shardings=replicated)


def eval_step(
    network: Any,
    prepare: PrepareEval,
    variables: Any,
    images: jax.Array | None,
    labels: jax.Array | None,
    rows: Rows,
    mask: jax.Array,
    choice: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Sums over the valid rows of a batch, see ``compile_eval_step``; a pure function to be jitted."""
    ctx = evaluation_context(variables, mask=mask, choice=choice)
    images, labels = fetch(images, labels, rows)
    logits = network.apply(variables, prepare(images), ctx).logits
    _, top = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = (top == labels[:, None]) & mask[:, None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {
        "correct1": jnp.sum(hits[:, 0]),
        "correct5": jnp.sum(hits),
        "loss": jnp.sum(jnp.where(mask, losses, 0.0)),
        "count": jnp.sum(mask),
    }


class Evaluator:
    """Evaluates variables on splits of the data; compiled once.

    Args:
      network: Linen module.
      prepare: uint8 images -> normalised float32 images.
      splits: images and labels by name; those in memory stay on the devices.
      batch_size: images per call; the last, partial batch is filled up and masked, no image is left out.
      devices: placement.
      workers: processes that read images that are not in memory; 0: threads.
      choice: int (searched layers,), branches of a supernet; None for networks without.
      seeds: those whose variables are evaluated side by side.
    """

    def __init__(
        self,
        network: Any,
        *,
        prepare: PrepareEval,
        splits: dict[str, Split | StreamedSplit],
        batch_size: int,
        devices: Devices,
        workers: int = 0,
        choice: Sequence[int] | None = None,
        seeds: Seeds = ONE_SEED,
    ):
        self._seeds = seeds
        self._step = compile_eval_step(network, prepare, devices, with_choice=choice is not None, seeds=self._seeds)
        self._choice = () if choice is None else (np.asarray(choice, np.int32),)
        self._batch_size = batch_size
        self._feeds = {name: Feed(split, devices, workers=workers) for name, split in splits.items()}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._feeds)

    def __call__(
        self, variables: dict[str, Any], split: str, *, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """``top1`` and ``top5`` in percent, mean ``loss`` and ``num_images``; None if asked to stop before the end.

        Of several seeds they are means, with ``top1_sd`` and so on beside them; see ``Seeds.summary``.

        Args:
          variables: params, batch_stats, quant_state; of several seeds, stacked.
          split: name of the split.
          should_stop: asked before every batch.
        """
        feed, sums = self._feeds[split], []
        for rows, mask in feed.batches(self._batch_size):
            if should_stop():
                return None
            sums.append(self._step(variables, *feed.arrays, rows, mask, *self._choice))
        sums = jax.device_get(sums)
        return self._seeds.summary([_means(list(rows)) for rows in zip(*map(self._seeds.unstack, sums), strict=True)])


def _means(sums: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies in percent, mean loss and number of images, from the sums of all batches."""
    # Batch sums are added in float64 on the host, so that the result does not depend on how many there are.
    totals = {name: float(np.sum([float(row[name]) for row in sums])) for name in sums[0]}
    count = totals["count"]
    return {
        "top1": 100.0 * totals["correct1"] / count,
        "top5": 100.0 * totals["correct5"] / count,
        "loss": totals["loss"] / count,
        "num_images": int(count),
    }


class PathEvaluator:
    """Evaluates paths of a supernet on images of a split, several at once; compiled once for all of them.

    What does not depend on the path, such as the quantized weights, is computed once for all paths of a call; the paths
    of a call are divided among the devices.

    Args:
      network: supernet.
      prepare: uint8 images -> normalised float32 images.
      split: images and labels.
      batch_size: images per call.
      paths_at_once: paths per call; the last, partial group is filled up.
      devices: placement.
      workers: processes that read images that are not in memory; 0: threads.
    """

    def __init__(
        self,
        network: Any,
        *,
        prepare: PrepareEval,
        split: Split | StreamedSplit,
        batch_size: int,
        paths_at_once: int,
        devices: Devices,
        workers: int = 0,
    ):
        self._step = compile_path_step(network, prepare, devices)
        self._feed = Feed(split, devices, workers=workers)
        self._batch_size, self._devices = batch_size, devices
        self._paths_at_once = _rounded_up(paths_at_once, devices.count)

    def __call__(
        self,
        variables: dict[str, Any],
        paths: Sequence[Sequence[int]],
        images: np.ndarray,
        *,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[float] | None:
        """Top-1 in percent of each path, in evaluation mode; None if asked to stop before the end.

        Args:
          variables: of the supernet, on the devices.
          paths: branches of each searched layer.
          images: int32 (M,), which images of the split.
          should_stop: asked before every call.
        """
        correct: list[int] = []
        for start in range(0, len(paths), self._paths_at_once):
            group = np.asarray(paths[start : start + self._paths_at_once], np.int32)
            missing = min(self._paths_at_once, _rounded_up(len(paths), self._devices.count)) - len(group)
            padded = np.concatenate([group, np.repeat(group[:1], missing, axis=0)])
            paths_of_devices = self._devices.split(padded, self._devices.rows)
            sums = []
            for rows, mask in self._feed.batches(self._batch_size, images=images, split_rows=False):
                if should_stop():
                    return None
                sums.append(self._step(variables, *self._feed.arrays, rows, mask, paths_of_devices))
            correct += np.sum(jax.device_get(sums), axis=0)[: len(group)].tolist()
        return [100.0 * number / len(images) for number in correct]


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def outputs_of(
    network: Any,
    variables: dict[str, Any],
    split: Split | StreamedSplit,
    *,
    part: Literal["logits", "features"],
    prepare: PrepareEval,
    batch_size: int,
    devices: Devices,
    workers: int = 0,
    choice: Sequence[int] | None = None,
) -> np.ndarray:
    """The logits, or what the classifier reads, for every image, in evaluation mode.

    Args:
      network: Linen module.
      variables: params, batch_stats, quant_state.
      split: N images.
      part: field of the network's output.
      prepare: uint8 images -> normalised float32 images.
      batch_size: images per call.
      devices: placement.
      workers: processes that read images that are not in memory; 0: threads.
      choice: branches of a supernet; None for networks without.

    Returns:
      float32 (N, K) or (N, D).
    """
    branches = None if choice is None else jnp.asarray(choice, jnp.int32)

    def forward(variables: dict[str, Any], images: Any, labels: Any, rows: Rows, mask: jax.Array) -> jax.Array:
        context = evaluation_context(variables, mask=mask, choice=branches)
        return getattr(network.apply(variables, prepare(fetch(images, labels, rows)[0]), context), part)

    replicated = devices.replicated
    run = jax.jit(forward, in_shardings=(replicated,) * 3 + (devices.rows,) * 2, out_shardings=replicated)
    feed, variables = Feed(split, devices, workers=workers), devices.replicate(variables)
    batches = feed.batches(batch_size)
    return np.concatenate([np.asarray(run(variables, *feed.arrays, *batch))[batch[1]] for batch in batches])
