"""BatchNorm and whatever else stands between a layer of integer sums and a sign, as two thresholds per channel.

A layer of small integers has finitely many sums. If the sign, as a function of the sum, only rises or only falls in
every channel, two thresholds say the same, and exactly: both are found by computing what the network computes for every
sum there can be.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from bnn_jax.deploy.graph import Codes, Node, Program, compute
from bnn_jax.deploy.simplify import used
from bnn_jax.deploy.weights import Weights

# Kinds that can stand between the layer and the sign.
FOLDED = ("affine", "divide", "clip", "prelu")
LARGEST_TABLE = 2**24

Array = np.ndarray


def fold_thresholds(program: Program, weights: Mapping[str, Weights]) -> Program:
    """The program with thresholds in place of those chains of operations that end in a sign.

    A chain that is read on its way, too, stays as it is.
    """
    nodes, consumers = list(program.nodes), program.consumers()
    for index, node in enumerate(program.nodes):
        chain = _chain(program, consumers, index) if node.kind == "sign" else []
        if len(chain) < 2:
            continue
        thresholds = _thresholds(program, weights, chain)
        if thresholds is not None:
            modules = {program.nodes[place].module for place in chain} - {""}
            module = modules.pop() if len(modules) == 1 else ""
            nodes[index] = Node("threshold", program.nodes[chain[0]].inputs, thresholds, module)
    return dataclasses.replace(program, nodes=tuple(used(nodes, len(nodes))))


def _chain(program: Program, consumers: list[list[int]], index: int) -> list[int]:
    """The operations from behind a layer (or its pooling) to the sign, if each is read by the next one only."""
    chain = [index]
    while True:
        before = program.nodes[chain[0]].inputs[0]
        if before == 0 or len(consumers[before]) > 1 or program.nodes[before - 1].kind not in FOLDED:
            return chain
        chain.insert(0, before - 1)


def _layer_behind(program: Program, value: int) -> Node | None:
    """The layer whose sums a value holds, or the largest of several of them."""
    while value > 0:
        node = program.nodes[value - 1]
        if node.kind in ("conv", "dense"):
            return node
        if node.kind != "max_pool":
            return None
        value = node.inputs[0]
    return None


def _thresholds(program: Program, weights: Mapping[str, Weights], chain: list[int]) -> dict[str, Array] | None:
    layer_node = _layer_behind(program, program.nodes[chain[0]].inputs[0])
    codes: Codes | None = None if layer_node is None else layer_node.options.get("codes")
    if layer_node is None or codes is None:
        return None
    layer = weights[layer_node.options["layer"]]
    integers = layer.integers
    if integers is None:
        return None
    values, scale = integers
    flat = np.abs(values.reshape(-1, values.shape[-1]).astype(np.int64)).sum(axis=0).max()
    largest = int(flat) * max(abs(codes.low), abs(codes.high))
    if (2 * largest + 1) * values.shape[-1] > LARGEST_TABLE or np.any(scale < 0):
        return None
    sums = np.arange(-largest, largest + 1, dtype=np.float32)[:, None]
    start = np.broadcast_to(sums * (scale * np.float32(codes.scale)), (len(sums), values.shape[-1]))
    signs = start
    for index in chain:
        signs = compute(np, program.nodes[index], [signs], _nothing, _nothing)
    return _from_table(start, signs)


def _nothing(x: Array, node: Node) -> Array:
    raise ValueError(node.kind)


def _from_table(values: Array, signs: Array) -> dict[str, Array] | None:
    """Thresholds from the sign of every value (M, C), the values rising; None where a sign rises and falls."""
    steps = np.diff(signs, axis=0)
    falls = np.any(steps < 0, axis=0)
    if np.any(falls & np.any(steps > 0, axis=0)):
        return None
    direction = np.where(falls, np.float32(-1), np.float32(1))
    rising = signs * direction
    at = np.where(rising > 0, values, np.inf).min(axis=0)
    below = np.where(rising < 0, values, -np.inf).max(axis=0)
    # Numbers that files hold: infinity is written as the largest float.
    limit = np.finfo(np.float32).max
    found = {"at": np.clip(at, -limit, limit), "below": np.clip(below, -limit, limit)}
    if np.any(falls):
        found["sign"] = direction
    return {name: value.astype(np.float32) for name, value in found.items()}
