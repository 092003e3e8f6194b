"""A program as the list of C structures that the kernels run."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bnn_jax.deploy.fuse import Group, fuse
from bnn_jax.deploy.graph import Node, Program, compute
from bnn_jax.deploy.layouts import (
    codebook_chunk,
    neighbours_in_word,
    round_up,
)
from bnn_jax.deploy.memory import FORMATS, Buffer, Layers, Layout
from bnn_jax.deploy.native import SOURCES, STEPS, COperation, CStep, CTensor
from bnn_jax.deploy.reference import pool
from bnn_jax.deploy.weights import PatternWeights

Array = np.ndarray


class Plan:
    """A program for a number of images at once, ready to run.

    Attributes:
      batch: images of one run.
    """

    def __init__(self, program: Program, layers: Layers, *, batch: int):
        self.batch, self._program, self._layers, self._kernels = batch, program, layers, layers.kernels
        self._shapes = program.shapes({name: each.shape for name, each in layers.weights.items()})
        self._consumers = program.consumers()
        self._keep: list[Any] = []
        self._buffers: dict[tuple[int, str], Buffer] = {}
        self._free: dict[Layout, list[Buffer]] = {}
        # Operations of the kernels, or one that numpy does.
        self._segments: list[tuple[str, Any]] = []
        self._names: list[str] = []
        self._build()

    def run(self, images: Array, threads: int = 1) -> Array:
        """Logits (N, K) of normalised images (N, H, W, C); N is at most ``batch``."""
        inputs = self._buffers[(0, "float")].view(self.batch)
        inputs[: len(images)] = images
        for name, segment in self._segments:
            if name == "host":
                segment()
            else:
                self._kernels.run(segment, threads)
        output = self._buffers[(len(self._program.nodes), "float")].view(self.batch)
        return output[: len(images), 0, 0].copy()

    def timed(self, images: Array, threads: int = 1) -> list[tuple[str, float]]:
        """Names and seconds of the groups of operations, run one by one."""
        import time

        self.run(images, threads)
        found: list[tuple[str, float]] = []
        names = iter(self._names)
        for name, segment in self._segments:
            parts = [segment] if name == "host" else [(COperation * 1)(each) for each in segment]
            for part in parts:
                started = time.perf_counter()
                if name == "host":
                    part()  # type: ignore[operator]
                else:
                    self._kernels.run(part, threads)
                found.append((next(names), time.perf_counter() - started))
        return found

    # ---- building ----

    def _build(self) -> None:
        groups = fuse(self._program, self._shapes)
        place = {index: number for number, group in enumerate(groups) for index in group.nodes}
        last = len(self._program.nodes)
        self._readers = {
            value: {place[index] for index in readers} | ({len(groups)} if value in (0, last) else set())
            for value, readers in enumerate(self._consumers)
        }
        for layout in self._layouts(0, inside=None):
            self._buffers[(0, layout.format)] = Buffer(layout, self.batch, self._kernels)
        pending: list[COperation] = []
        for number, group in enumerate(groups):
            self._names.append(self._name(group))
            if group.on_host:
                self._flush(pending)
                self._segments.append(("host", self._host(group.nodes[0])))
                pending += self._repacking(group.nodes[0] + 1)
            else:
                pending.append(self._operation(group))
            self._release(number)
        self._flush(pending)

    def _flush(self, pending: list[COperation]) -> None:
        if pending:
            self._segments.append(("kernels", (COperation * len(pending))(*pending)))
            pending.clear()

    def _name(self, group: Group) -> str:
        nodes = [self._program.nodes[index] for index in group.nodes]
        first = nodes[0].options.get("layer", nodes[0].kind)
        product = self._layers.products.get(group.nodes[0])
        return f"{first}{f' ({product})' if product else ''}"

    def _release(self, number: int) -> None:
        """Buffers whose last reader was the group of that number can be used again."""
        for (value, form), buffer in list(self._buffers.items()):
            if max(self._readers[value]) == number:
                self._free.setdefault(buffer.layout, []).append(buffer)
                del self._buffers[(value, form)]

    def _image_shape(self, value: int) -> tuple[int, int, int]:
        shape = self._shapes[value]
        return shape if len(shape) == 3 else (1, 1, int(np.prod(shape)))  # type: ignore[return-value]

    def _layouts(self, value: int, inside: int | None) -> list[Layout]:
        """The layouts in which a value has to lie in memory: those its readers outside of its group want.

        Args:
          value: number of the value.
          inside: the operation that reads it inside of the group, or None.
        """
        shape, found = self._image_shape(value), {}
        wanted = [index for index in self._consumers[value] if index != inside]
        for index in wanted:
            node, product = self._program.nodes[index], self._layers.products.get(index)
            form = FORMATS[product] if product else "float"
            codes = node.options["codes"] if form in ("bytes", "shorts") else None
            padding = (0, 0, 0, 0)
            if product and node.kind == "conv" and form != "planes":
                (top, bottom), (left, right) = node.options["padding"]
                padding = (top, bottom, left, right)
            found.setdefault((form, codes), []).append(padding)
        if value == len(self._program.nodes) or value == 0:
            found.setdefault(("float", None), []).append((0, 0, 0, 0))
        return [
            Layout(form, shape, tuple(map(max, zip(*paddings, strict=True))), codes, exact=value == 0)  # type: ignore[arg-type]
            for (form, codes), paddings in found.items()
        ]

    def _allocate(self, value: int, layout: Layout) -> Buffer:
        free = self._free.get(layout)
        buffer = free.pop() if free else Buffer(layout, self.batch, self._kernels)
        self._buffers[(value, layout.format)] = buffer
        return buffer

    def _host(self, index: int) -> Callable[[], None]:
        """An operation that numpy does."""
        node, shape = self._program.nodes[index], self._image_shape(index + 1)
        inputs = [self._buffers[(each, "float")] for each in node.inputs]
        shapes = [self._shapes[each] for each in node.inputs]
        wanted = [each for each in self._layouts(index + 1, inside=None) if each.format == "float"]
        output = self._allocate(index + 1, wanted[0] if wanted else Layout("float", shape))

        def run() -> None:
            arrays = [b.view(self.batch).reshape(self.batch, *s) for b, s in zip(inputs, shapes, strict=True)]
            result = compute(np, node, arrays, _no_product, pool)
            output.view(self.batch)[...] = result.reshape(self.batch, *shape)

        return run

    def _repacking(self, value: int) -> list[COperation]:
        """What stores a value of numpy's in the other forms in which it is read."""
        packed = [each for each in self._layouts(value, inside=None) if each.format != "float"]
        if not packed:
            return []
        operation = self._moving(value, Node("load", (value,)), loads=True)
        self._finish(operation, [self._store(self._allocate(value, layout)) for layout in packed])
        self._names.append("packing")
        return [operation]

    def _operation(self, group: Group) -> COperation:
        first = group.nodes[0]
        node = self._program.nodes[first]
        is_product = not group.loads and first in self._layers.products
        operation = self._product(first, node) if is_product else self._moving(first + 1, node, loads=group.loads)
        # What sums of integers are still to be multiplied with and raised by.
        scaled = self._layers.scale(first, node) if is_product else None
        steps: list[CStep] = []
        for position, index in enumerate(group.nodes):
            following = group.nodes[position + 1] if position + 1 < len(group.nodes) else None
            outputs = [self._allocate(index + 1, each) for each in self._layouts(index + 1, inside=following)]
            if position or group.loads:
                before = group.nodes[position - 1] + 1 if position else node.inputs[0]
                scaled = self._follow(steps, index, before, operation.channels, scaled)
            if scaled is not None and (outputs or following is None):
                if np.any(scaled[0] != 1) or np.any(scaled[1] != 0):
                    steps.append(self._step("affine", operation.channels, first=scaled[0], second=scaled[1]))
                scaled = None
            if (position or group.loads) and self._needless(index, outputs, following):
                steps.pop()
            steps += [self._store(buffer) for buffer in outputs]
        self._finish(operation, steps)
        return operation

    def _follow(
        self, steps: list[CStep], index: int, before: int, channels: int, scaled: tuple[Any, Any] | None
    ) -> tuple[Any, Any] | None:
        """Adds the steps of an operation; returns what is still to be multiplied with, if it only does that."""
        node = self._program.nodes[index]
        if scaled is not None and node.kind == "affine":
            scale, offset = node.options.get("scale", np.float32(1)), node.options.get("offset", np.float32(0))
            return scaled[0] * scale, scaled[1] * scale + offset
        if scaled is not None:
            steps.append(self._step("affine", channels, first=scaled[0], second=scaled[1]))
        steps.append(self._follower(node, before, channels))
        if "sign" in node.options:
            steps.append(self._step("negate_some", channels, first=node.options["sign"]))
        return None

    def _finish(self, operation: COperation, steps: list[CStep]) -> None:
        array = (CStep * len(steps))(*steps)
        operation.steps, operation.step_count = array, len(steps)
        self._keep.append(array)

    def _needless(self, index: int, outputs: list[Buffer], following: int | None) -> bool:
        """Whether a sign is only stored as a sign, which storing does by itself."""
        is_sign = self._program.nodes[index].kind == "sign"
        return is_sign and following is None and all(b.layout.format in ("signs", "planes") for b in outputs)

    def _describe(self, value: int, buffer: Buffer) -> COperation:
        """An operation that makes a value of one that lies in the buffer."""
        height, width, channels = self._image_shape(value)
        operation = COperation(batch=self.batch, height=height, width=width, channels=channels)
        operation.input, operation.kernel_height, operation.kernel_width = buffer.tensor, 1, 1
        operation.stride_y = operation.stride_x = 1
        operation.input_height, operation.input_width, operation.input_channels = buffer.layout.shape
        return operation

    def _product(self, index: int, node: Node) -> COperation:
        product, layer = self._layers.products[index], self._layers.weights[node.options["layer"]]
        buffer = self._buffers[(node.inputs[0], FORMATS[product])]
        operation = self._describe(index + 1, buffer)
        weights, rows = self._layers.laid_out(index, node, buffer.elements)
        operation.source = SOURCES.index(f"conv_{product}")
        operation.weights, operation.input_channels = weights.ctypes.data, buffer.elements
        self._keep += [weights, rows]
        if node.kind == "conv":
            operation.kernel_height, operation.kernel_width = layer.shape[:2]
            operation.stride_y, operation.stride_x = node.options["strides"]
            (operation.pad_top, _), (operation.pad_left, _) = node.options["padding"]
        else:
            # Images side by side, so that weights are read once for several of them.
            operation.batch, operation.width = 1, self.batch
            operation.input = CTensor(buffer.tensor.data, 0, 0, buffer.tensor.image)
        if product == "codebook":
            assert isinstance(layer, PatternWeights) and rows is not None
            operation.shift, operation.patterns = buffer.plane, len(layer.levels)
            operation.chunk, operation.codebook = codebook_chunk(layer.shape[2]), rows.ctypes.data
        if product == "binary" and not self._kernels.reads_nibbles and node.kind == "conv":
            _, width, num_in, _ = layer.shape
            operation.chunk = num_in if neighbours_in_word(width, num_in) > 1 else 0
        if product == "bytes":
            codes, integers = node.options["codes"], layer.integers
            assert integers is not None
            operation.chunk = 32767 // (2 * max(1, int(np.abs(integers[0]).max()) * (codes.high - codes.low)))
        return operation

    def _moving(self, value: int, node: Node, *, loads: bool) -> COperation:
        """Pooling, or loading: all of the first input (``loads``), or what the operation takes of it."""
        operation = self._describe(value, self._buffers[(node.inputs[0], "float")])
        kind, options = ("load" if loads else node.kind), node.options
        source = {"max_pool": "pool_max", "sum_pool": "pool_sum", "sum": "pool_sum"}.get(kind, "load")
        operation.source = SOURCES.index(source)
        if kind in ("max_pool", "sum_pool"):
            operation.kernel_height, operation.kernel_width = options["window"]
            operation.stride_y, operation.stride_x = options["strides"]
            (operation.pad_top, _), (operation.pad_left, _) = options["padding"]
        elif kind == "sum":
            operation.kernel_height, operation.kernel_width = operation.input_height, operation.input_width
        elif kind == "slice":
            operation.stride_y, operation.stride_x = options["step"][:2]
            operation.pad_top, operation.pad_left = -options["start"][0], -options["start"][1]
        elif kind == "pad":
            operation.shift = options["low"][-1]
        return operation

    def _follower(self, node: Node, value: int, channels: int) -> CStep:
        """The step of an operation that follows the value in its group."""
        options = node.options
        match node.kind:
            case "affine":
                scale, offset = options.get("scale", np.float32(1)), options.get("offset", np.float32(0))
                return self._step("affine", channels, first=scale, second=offset)
            case "divide":
                return self._step("divide", channels, first=options["by"], rest=1.0)
            case "prelu":
                return self._step("prelu", channels, first=options["slope"])
            case "threshold":
                return self._step("threshold", channels, first=options["at"], second=options["below"], rest=np.inf)
            case "clip":
                step = self._step("clip", channels)
                step.low, step.high = options.get("low", -np.inf), options.get("high", np.inf)
                return step
            case "add":
                others = list(node.inputs)
                others.remove(value)
                step = self._step("add", channels)
                step.tensor = self._buffers[(others[0], "float")].tensor
                return step
        return self._step(node.kind, channels)

    def _step(self, kind: str, channels: int, *, first: Any = None, second: Any = None, rest: float = 0.0) -> Any:
        """A step with constants per channel; ``rest`` fills those beyond the last channel."""
        step = CStep(kind=STEPS.index(kind))
        for name, value, fill in (("first", first, rest), ("second", second, -rest if rest == np.inf else 0.0)):
            if value is not None:
                constants = np.full(round_up(channels, 64), fill, np.float32)
                constants[:channels] = value
                self._keep.append(constants)
                setattr(step, name, constants.ctypes.data)
        return step

    def _store(self, buffer: Buffer) -> CStep:
        layout = buffer.layout
        step = CStep(kind=STEPS.index(f"store_{layout.format}"), plane=buffer.plane)
        step.tensor = buffer.tensor
        if layout.codes is not None:
            step.low, step.high = 1 / layout.codes.scale, layout.codes.low
        return step


def _no_product(x: Array, node: Node) -> Array:
    raise ValueError(f"operation {node.kind} is no operation for numpy here")
