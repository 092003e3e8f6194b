"""Accuracy of many paths of a supernet on the same images, side by side on the devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.data.memory import Split
from bnn_jax.data.stream import StreamedSplit
from bnn_jax.quantizers.base import evaluation_context
from bnn_jax.training.devices import Devices
from bnn_jax.training.feed import Feed, Rows, fetch
from bnn_jax.training.step import PrepareEval


class PopulationEvaluator:
    """Evaluates paths of a supernet, several at once; compiled once for all of them.

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
        self._step = compile_population_step(network, prepare, devices)
        self._feed = Feed(split, devices, workers=workers)
        self._batch_size, self._devices = batch_size, devices
        self._paths_at_once = -(-paths_at_once // devices.count) * devices.count

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
        plan = _batches(images, min(self._batch_size, len(images)))
        correct: list[int] = []
        for start in range(0, len(paths), self._paths_at_once):
            group = np.asarray(paths[start : start + self._paths_at_once], np.int32)
            missing = min(self._paths_at_once, _rounded_up(len(paths), self._devices.count)) - len(group)
            padded = np.concatenate([group, np.repeat(group[:1], missing, axis=0)])
            paths_of_devices = self._devices.split(padded, self._devices.rows)
            sums = []
            for rows, mask in self._feed.batches(*plan, split_rows=False):
                if should_stop():
                    return None
                sums.append(self._step(variables, *self._feed.arrays, rows, mask, paths_of_devices))
            totals = np.sum(jax.device_get(sums), axis=0)[: len(group)]
            correct += [int(total) for total in totals]
        return [100.0 * number / len(images) for number in correct]


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _batches(images: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and masks of equal batches; the last one is filled up with image 0 and mask False."""
    missing = -len(images) % batch_size
    indices = np.pad(images.astype(np.int32), (0, missing)).reshape(-1, batch_size)
    mask = np.pad(np.ones(len(images), bool), (0, missing)).reshape(-1, batch_size)
    return indices, mask


def compile_population_step(network: Any, prepare: PrepareEval, devices: Devices) -> Callable:
    """Jitted function of (variables, images, labels, rows (N,), mask (N,), paths (P, G)) -> correct images (P,)."""

    def run(variables: Any, images: Any, labels: Any, rows: Rows, mask: jax.Array, paths: jax.Array) -> jax.Array:
        pixels, expected = fetch(images, labels, rows)
        x = prepare(pixels)

        def correct(path: jax.Array) -> jax.Array:
            logits = network.apply(variables, x, evaluation_context(variables, mask=mask, choice=path)).logits
            return jnp.sum((jnp.argmax(logits, axis=-1) == expected) & mask)

        return jax.vmap(correct)(paths)

    replicated = devices.replicated
    return jax.jit(run, in_shardings=(*[replicated] * 5, devices.rows), out_shardings=replicated)
