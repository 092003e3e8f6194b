"""Accuracy and loss of a network on a split of the data, in evaluation mode."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bnn_jax.data.memory import Split
from bnn_jax.data.order import sequential_plan
from bnn_jax.data.stream import StreamedSplit
from bnn_jax.quantizers.base import evaluation_context
from bnn_jax.training.devices import Devices
from bnn_jax.training.feed import Feed, Rows, fetch
from bnn_jax.training.seeds import ONE_SEED, Seeds
from bnn_jax.training.step import PrepareEval, compile_eval_step


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
        self._devices, self._batch_size = devices, batch_size
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
        feed = self._feeds[split]
        plan = self._devices.pad_rows(*sequential_plan(len(feed), min(self._batch_size, len(feed))))
        sums = []
        for rows, mask in feed.batches(*plan):
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


def features_of(
    network: Any,
    variables: dict[str, Any],
    split: Split | StreamedSplit,
    *,
    prepare: PrepareEval,
    batch_size: int,
    devices: Devices,
) -> np.ndarray:
    """What the classifier reads, for every image, in evaluation mode.

    Args:
      network: Linen module.
      variables: params, batch_stats, quant_state.
      split: N images.
      prepare: uint8 images -> normalised float32 images.
      batch_size: images per call.
      devices: placement.

    Returns:
      float32 (N, D).
    """

    def forward(variables: dict[str, Any], images: Any, labels: Any, rows: Rows, mask: jax.Array) -> jax.Array:
        return network.apply(
            variables, prepare(fetch(images, labels, rows)[0]), evaluation_context(variables, mask=mask)
        ).features

    replicated = devices.replicated
    run = jax.jit(forward, in_shardings=(replicated,) * 3 + (devices.rows,) * 2, out_shardings=replicated)
    indices, mask = devices.pad_rows(*sequential_plan(len(split), min(batch_size, len(split))))
    feed, variables = Feed(split, devices), devices.replicate(variables)
    batches = [np.asarray(run(variables, *feed.arrays, *batch)) for batch in feed.batches(indices, mask)]
    return np.concatenate(batches)[mask.ravel()]
