"""Accuracy and loss of a network on a split of the data, in evaluation mode."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bnn_jax.data.base import Split, sequential_plan
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.training.devices import Devices
from bnn_jax.training.steps import PrepareEval, compile_eval_step


class Evaluator:
    """Evaluates variables on splits that stay on the device; compiled once.

    Args:
      network: Linen module.
      prepare: uint8 images -> normalised float32 images.
      splits: images and labels by name.
      batch_size: images per call; the last, partial batch is filled up and masked, no image is left out.
      devices: placement.
      choice: int (searched layers,), branches of a supernet; None for networks without.
    """

    def __init__(
        self,
        network: Any,
        *,
        prepare: PrepareEval,
        splits: dict[str, Split],
        batch_size: int,
        devices: Devices,
        choice: Sequence[int] | None = None,
    ):
        self._step = compile_eval_step(network, prepare, devices, with_choice=choice is not None)
        self._choice = () if choice is None else (np.asarray(choice, np.int32),)
        self._devices, self._batch_size = devices, batch_size
        self._arrays = {name: devices.replicate((split.images, split.labels)) for name, split in splits.items()}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._arrays)

    def __call__(
        self, variables: dict[str, Any], split: str, *, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """``top1`` and ``top5`` in percent, mean ``loss`` and ``num_images``; None if asked to stop before the end.

        Args:
          variables: params, batch_stats, quant_state.
          split: name of the split.
          should_stop: asked before every batch.
        """
        images, labels = self._arrays[split]
        plan = self._devices.pad_rows(*sequential_plan(labels.shape[0], min(self._batch_size, labels.shape[0])))
        sums = []
        for indices, mask in zip(*plan, strict=True):
            if should_stop():
                return None
            sums.append(self._step(variables, images, labels, indices, mask, *self._choice))
        # Batch sums are added in float64 on the host, so that the result does not depend on how many there are.
        totals = {name: float(np.sum([float(row[name]) for row in jax.device_get(sums)])) for name in sums[0]}
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
    images: np.ndarray,
    *,
    prepare: PrepareEval,
    batch_size: int,
    devices: Devices,
) -> np.ndarray:
    """What the classifier reads, for every image, in evaluation mode.

    Args:
      network: Linen module.
      variables: params, batch_stats, quant_state.
      images: uint8 (N, H, W, C).
      prepare: uint8 images -> normalised float32 images.
      batch_size: images per call.
      devices: placement.

    Returns:
      float32 (N, D).
    """

    def forward(variables: dict[str, Any], images: jax.Array, indices: jax.Array, mask: jax.Array) -> jax.Array:
        return network.apply(variables, prepare(images[indices]), QuantContext(mask=mask)).features

    replicated, rows = devices.replicated, devices.rows
    run = jax.jit(forward, in_shardings=(replicated, replicated, rows, rows), out_shardings=replicated)
    indices, mask = devices.pad_rows(*sequential_plan(len(images), min(batch_size, len(images))))
    variables, images = devices.replicate((variables, images))
    batches = [np.asarray(run(variables, images, *batch)) for batch in zip(indices, mask, strict=True)]
    return np.concatenate(batches)[mask.ravel()]
