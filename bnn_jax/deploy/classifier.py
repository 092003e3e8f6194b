"""An exported network that classifies pictures."""

import concurrent.futures
import functools
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bnn_jax.deploy.artefact import Artefact
from bnn_jax.deploy.artefact import load as load_artefact
from bnn_jax.deploy.memory import Layers
from bnn_jax.deploy.native import choose
from bnn_jax.deploy.plan import Plan
from bnn_jax.deploy.reference import run as run_reference
from bnn_jax.errors import UserError

Array = np.ndarray
Backend = Literal["packed", "jax"]

# Images of one run where values are small: weights are read once for several images, and values still fit the caches.
MOST_AT_ONCE, SMALL_VALUES = 8, 2**18


def load(
    path: Path | str,
    *,
    backend: Backend = "packed",
    threads: int | None = None,
    instruction_set: str | None = None,
) -> "Classifier":
    """Reads an exported network.

    Args:
      path: '.bnn' file.
      backend: 'packed' multiplies small integers on the CPU; 'jax' runs anywhere, and needs jax.
      threads: of the backend 'packed'; None: as many as there are processors for this process.
      instruction_set: 'avx512', 'avx2', 'plain' or 'numpy'; None: the environment variable BNN_JAX_INSTRUCTION_SET,
        else the best one of this machine.

    Raises:
      ArtefactError: the file is missing or damaged.
      UserError: a backend or an instruction set that does not exist here.
    """
    if backend not in ("packed", "jax"):
        raise UserError(f"backend={backend!r}: accepted are 'packed', 'jax'")
    return Classifier(load_artefact(path), backend=backend, threads=threads, instruction_set=instruction_set)


class Classifier:
    """A network and how it is run.

    Attributes:
      facts: what the file says of the network: 'network', 'method', 'stage', 'accuracy', ...
      classes: names of the outputs; '0', '1', ... where the file names none.
      layers: for each layer its path, kernel shape, kind of product and stored bytes.
    """

    def __init__(
        self,
        exported: Artefact,
        *,
        backend: Backend = "packed",
        threads: int | None = None,
        instruction_set: str | None = None,
    ):
        self.facts, self._exported, self._backend = exported.facts, exported, backend
        self._threads = threads or len(os.sched_getaffinity(0))
        self._kernels = choose(instruction_set) if backend == "packed" else None
        shapes = exported.program.shapes({name: each.shape for name, each in exported.weights.items()})
        self._largest_value = 4 * max(int(np.prod(shape)) for shape in shapes)
        self.classes: tuple[str, ...] = tuple(exported.facts.get("classes") or map(str, range(shapes[-1][0])))
        self._plans: dict[int, list[Plan]] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images the network reads."""
        return self._exported.program.image_shape

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Path, kernel shape, kind of product and stored bytes of each layer, in the order of their calls."""
        nodes = enumerate(self._exported.program.nodes)
        found = [(index, node.options["layer"]) for index, node in nodes if "layer" in node.options]
        products = self._layers.products if self._kernels is not None else {}
        return [
            {
                "layer": name,
                "kernel_shape": self._exported.weights[name].shape,
                "product": products.get(index, self._backend if self._backend == "jax" else "numpy"),
                "bytes": self._exported.bytes_by_layer.get(name, 0),
            }
            for index, name in found
        ]

    def logits(self, images: Array) -> Array:
        """Logits (N, K), float32.

        Args:
          images: (N, H, W, C): uint8 pixels, which are normalised as the network was trained, or floats that are.

        Raises:
          ValueError: images of another shape.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            expected = "x".join(map(str, ("N", *self.image_shape)))
            raise ValueError(f"images of shape {'x'.join(map(str, images.shape))}: accepted are {expected}")
        if images.dtype == np.uint8:
            images = self._normalised(images)
        images = np.ascontiguousarray(images, np.float32)
        if not len(images):
            return np.zeros((0, len(self.classes)), np.float32)
        if self._backend == "jax":
            return self._jax_logits(images)
        if self._kernels is None:
            parts = [images[i : i + 16] for i in range(0, len(images), 16)]
            run = functools.partial(run_reference, self._exported.program, self._exported.weights)
            return np.concatenate([run(part) for part in parts])
        return self._packed_logits(images)

    def predict(self, images: Array, *, top: int = 5) -> list[list[tuple[str, float]]]:
        """For each image the names of the likeliest classes and their probabilities, the likeliest first."""
        logits = self.logits(images).astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
        return [
            [(self.classes[k], float(row[k])) for k in order] for row, order in zip(probabilities, best, strict=True)
        ]

    def profile(self, images: Array) -> list[tuple[str, float]]:
        """Names and seconds of the groups of operations for some images, with the backend 'packed'."""
        plan = self._plan(len(images))
        return plan.timed(np.ascontiguousarray(images, np.float32), self._threads)

    def _normalised(self, images: Array) -> Array:
        channels = self.image_shape[2]
        mean, std = (
            np.asarray(self.facts.get(name, [default] * channels), np.float32)
            for name, default in (("mean", 0.0), ("std", 1.0))
        )
        return (images.astype(np.float32) / np.float32(255) - mean) / std

    @functools.cached_property
    def _layers(self) -> Layers:
        assert self._kernels is not None
        return Layers(self._exported.program, self._exported.weights, self._kernels)

    @functools.cached_property
    def _jax_logits(self) -> Any:
        from bnn_jax.deploy.jax_backend import compile_program

        return compile_program(self._exported.program, self._exported.weights)

    def _plan(self, batch: int) -> Plan:
        return Plan(self._exported.program, self._layers, batch=batch)

    def _packed_logits(self, images: Array) -> Array:
        """One image with all threads, or several images or parts of the batch in threads of their own."""
        together = min(MOST_AT_ONCE, len(images)) if self._largest_value <= SMALL_VALUES else 1
        if self._threads > 1:
            together = max(1, min(together, len(images) // self._threads))
        parts = [images[i : i + together] for i in range(0, len(images), together)]
        workers = min(self._threads, len(parts))
        plans = self._plans.setdefault(together, [])
        plans += [self._plan(together) for _ in range(workers - len(plans))]
        if workers == 1:
            return np.concatenate([plans[0].run(part, self._threads) for part in parts])

        def some(worker: int) -> list[Array]:
            return [plans[worker].run(part) for part in parts[worker::workers]]

        results: list[Array] = [np.zeros(0)] * len(parts)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for worker, found in enumerate(pool.map(some, range(workers))):
                results[worker::workers] = found
        return np.concatenate(results)
