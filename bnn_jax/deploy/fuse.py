"""Which operations run as one: a source of rows, then everything that can be done with each row while it is at hand."""

import dataclasses

import numpy as np

from bnn_jax.deploy.graph import Node, Program, Shape
from bnn_jax.deploy.weights import PatternWeights, Weights

# Kinds of operations that start a group, and those that can follow in one.
SOURCES = ("conv", "dense", "max_pool", "sum_pool", "sum", "slice", "pad")
FOLLOWERS = ("affine", "divide", "add", "clip", "prelu", "round", "round_away", "sign", "threshold")

# Filters for each pattern from which on a codebook is used, by instruction set; absent: never.
LEAST_FILTERS = {"avx2": 16, "plain": 1}

LARGEST_SUM = 2**31 - 1
# Sums of looked-up fours are kept in 16 bits.
MOST_FOURS = 4095


@dataclasses.dataclass(frozen=True)
class Group:
    """Operations that run together.

    Attributes:
      nodes: their numbers, in order; each but the first reads the result of the one before.
      loads: whether the rows are loaded from the first operation's first input, else the first operation makes them.
      on_host: whether it is a single operation that numpy does.
    """

    nodes: tuple[int, ...]
    loads: bool = False
    on_host: bool = False


def fuse(program: Program, shapes: list[Shape]) -> list[Group]:
    """All operations in groups, in an order in which they can run.

    A group ends where the next operation needs something that is computed later: that operation then follows in the
    group of what it waits for.
    """
    consumers, done, groups = program.consumers(), {0}, []
    for index, node in enumerate(program.nodes):
        if index + 1 in done:
            continue
        starts, follows = _is_source(node, shapes), _is_follower(node)
        chain = [index]
        done.add(index + 1)
        if starts or follows:
            while (following := _next(program, consumers[chain[-1] + 1], chain[-1] + 1, done)) is not None:
                chain.append(following)
                done.add(following + 1)
        groups.append(Group(tuple(chain), loads=follows, on_host=not starts and not follows))
    return groups


def _next(program: Program, consumers: list[int], value: int, done: set[int]) -> int | None:
    for index in consumers:
        node = program.nodes[index]
        others = list(node.inputs)
        others.remove(value)
        if index + 1 not in done and _is_follower(node) and all(o in done and o != value for o in others):
            return index
    return None


def _is_source(node: Node, shapes: list[Shape]) -> bool:
    if node.kind == "slice":
        # Whole channels of an image; what is left out on the sides does not matter.
        shape, options = shapes[node.inputs[0]], node.options
        return len(shape) == 3 and (options["start"][2], options["stop"][2], options["step"][2]) == (0, shape[2], 1)
    if node.kind == "pad":
        return not any((*node.options["low"][:-1], *node.options["high"][:-1]))
    return node.kind in SOURCES


def _is_follower(node: Node) -> bool:
    bounds = node.kind != "clip" or all(np.ndim(bound) == 0 for bound in node.options.values())
    return node.kind in FOLLOWERS and bounds


def product_of(node: Node, layer: Weights, *, instruction_set: str) -> str:
    """How a layer is multiplied: 'float', 'depthwise', 'binary', 'codebook', 'bytes' or 'shorts'.

    Args:
      node: 'conv' or 'dense'.
      layer: its weights.
      instruction_set: of the kernels.
    """
    shape, codes = layer.shape, node.options.get("codes")
    groups = node.options.get("groups", 1)
    if groups > 1:
        return "depthwise" if groups == shape[-1] and shape[2] == 1 else "float"
    integers = layer.integers if codes is not None else None
    if codes is None or integers is None:
        return "float"
    largest, fan_in = int(np.abs(integers[0]).max(initial=0)), int(np.prod(shape[:-1]))
    if codes.low >= -1 and codes.high <= 1 and bool(np.all(np.abs(integers[0]) == 1)):
        if _prefers_codebook(node, layer, instruction_set):
            return "codebook"
        if fan_in <= 4 * MOST_FOURS - 4 * shape[0] * shape[1]:
            return "binary"
    span = codes.high - codes.low
    if fan_in * max(span, 256) * max(largest, 1) > LARGEST_SUM:
        return "float"
    return "bytes" if span <= 255 and largest <= 127 and 2 * span * largest <= 32767 else "shorts"


def _prefers_codebook(node: Node, layer: Weights, instruction_set: str) -> bool:
    """Whether adding up looked-up patterns is faster than multiplying signs; docs/deploy.md measures it."""
    if not isinstance(layer, PatternWeights) or node.kind != "conv":
        return False
    fits = node.options["strides"] == (1, 1) and node.options["padding"] == ((1, 1), (1, 1))
    patterns, num_out = len(layer.levels), layer.shape[3]
    least = LEAST_FILTERS.get(instruction_set)
    return fits and least is not None and patterns <= 64 and num_out >= least * patterns
