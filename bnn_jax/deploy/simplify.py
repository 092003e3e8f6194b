"""Patterns of operations that are one operation of the format, and the removal of what no output depends on."""

import dataclasses

import numpy as np

from bnn_jax.deploy.graph import Node

# Kinds that exist only until here, as parts of patterns.
TEMPORARY = ("select", "is_positive")


def simplify(nodes: list[Node], output: int) -> list[Node]:
    """The operations the output depends on, in order, the output last.

    Args:
      nodes: operations as they were read; value i + 1 is the result of nodes[i].
      output: number of the output's value.

    Raises:
      ValueError: a comparison that is no part of a known pattern.
    """
    nodes = list(nodes)
    for rewrite in (_rectifier, _round_away, _merge):
        for index in range(len(nodes)):
            nodes[index] = rewrite(nodes, index)
    nodes = used(nodes, output)
    for node in nodes:
        if node.kind in TEMPORARY:
            raise ValueError("export: the network compares values in a way that files do not have")
    return nodes


def _made_by(nodes: list[Node], value: int) -> Node:
    return nodes[value - 1] if value > 0 else Node("images", ())


def _rectifier(nodes: list[Node], index: int) -> Node:
    """``where(x > 0, x, slope * x)``."""
    node = nodes[index]
    if node.kind != "select":
        return node
    condition, otherwise, value = node.inputs
    scaled = _made_by(nodes, otherwise)
    is_pattern = (
        _made_by(nodes, condition) == Node("is_positive", (value,))
        and scaled.kind == "affine"
        and scaled.inputs == (value,)
        and set(scaled.options) == {"scale"}
    )
    return Node("prelu", (value,), {"slope": scaled.options["scale"]}, node.module) if is_pattern else node


def _round_away(nodes: list[Node], index: int) -> Node:
    """``sign(x) * floor(|x| + 1/2)``."""
    node = nodes[index]
    if node.kind != "multiply":
        return node
    for sign, floor in (node.inputs, node.inputs[::-1]):
        signed, floored = _made_by(nodes, sign), _made_by(nodes, floor)
        if signed.kind != "sign" or floored.kind != "floor":
            continue
        raised = _made_by(nodes, floored.inputs[0])
        magnitude = _made_by(nodes, raised.inputs[0])
        half = set(raised.options) == {"offset"} and np.all(raised.options["offset"] == 0.5)
        if half and magnitude.kind == "abs" and magnitude.inputs == signed.inputs:
            return Node("round_away", signed.inputs)
    return node


def _merge(nodes: list[Node], index: int) -> Node:
    """A scale and the offset behind it are one operation, and so are two bounds."""
    node = nodes[index]
    if node.kind not in ("affine", "clip"):
        return node
    before = _made_by(nodes, node.inputs[0])
    if before.kind != node.kind or sum(node.inputs[0] in other.inputs for other in nodes) > 1:
        return node
    scale_then_offset = set(before.options) == {"scale"} and set(node.options) == {"offset"}
    low_then_high = set(before.options) == {"low"} and set(node.options) == {"high"}
    if scale_then_offset or low_then_high:
        module = node.module if node.module == before.module else ""
        return Node(node.kind, before.inputs, {**before.options, **node.options}, module)
    return node


def used(nodes: list[Node], output: int) -> list[Node]:
    """The operations that a value depends on, numbered anew."""
    needed, keep = {output}, []
    for index in range(len(nodes) - 1, -1, -1):
        if index + 1 in needed:
            keep.append(index)
            needed.update(nodes[index].inputs)
    keep.reverse()
    number = {0: 0, **{index + 1: place + 1 for place, index in enumerate(keep)}}
    return [dataclasses.replace(nodes[i], inputs=tuple(number[value] for value in nodes[i].inputs)) for i in keep]
