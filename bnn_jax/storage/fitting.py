"""What might have been meant where the names in a file do not fit: the nearest names, and the networks that do fit."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from bnn_jax import networks
from bnn_jax.catalogue import facts_of
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.restricted_pickle import shown
from bnn_jax.stages import QuantSpec, spec

# Comparing names is quadratic.
MOST_COMPARED = 50
# Of ResNet-182, say: a file may claim any number.
MOST_BLOCKS = 60
_DROPPED = re.compile(r"/(weight|act)_quantizer/|^knobs/")


def nearest_first(rows: Sequence[str], others: Sequence[str]) -> list[str]:
    """The rows, those first that are most like one of ``others``; of many, only the first ones are compared."""
    compared, rest = list(rows[:MOST_COMPARED]), list(rows[MOST_COMPARED:])

    def likeness(row: str) -> float:
        matcher = difflib.SequenceMatcher(b=row, autojunk=False)
        best = 0.0
        for other in others[:MOST_COMPARED]:
            matcher.set_seq1(other)
            if matcher.real_quick_ratio() > best and matcher.quick_ratio() > best:
                best = max(best, matcher.ratio())
        return best

    return sorted(compared, key=likeness, reverse=True) + rest


def describe(missing: Sequence[str], unknown: Sequence[str], others: Sequence[str]) -> str:
    """One line about a file of another network: the nearest differences of each kind and their numbers; '' for none.

    Args:
      missing: paths of the network that the file does not have.
      unknown: paths of the file that the network does not have.
      others: phrases about those of another shape or type.
    """
    shown_unknown = [shown(path) for path in unknown]
    rows = {
        "missing in the file": nearest_first(missing, shown_unknown),
        "unknown to the network": nearest_first(shown_unknown, missing),
        "of another shape or type": others,
    }
    parts = [f"{len(found)} {kind} ({_first(found)})" for kind, found in rows.items() if found]
    return f"checkpoint of another network: {'; '.join(parts)}" if parts else ""


def _first(rows: Sequence[str], count: int = 3) -> str:
    return ", ".join(rows[:count]) + (", ..." if len(rows) > count else "")


def networks_that_fit(found: Mapping[str, Any], image_shape: tuple[int, int, int]) -> list[str]:
    """Names of the networks that arrays by our paths are all variables of, but for those of quantizers.

    Args:
      found: whatever has a shape, by path.
      image_shape: (H, W, C) of the images that the network reads.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in found.items() if not _DROPPED.search(path)}
    return [name for name in _candidates(shapes) if _shapes_of(name, shapes, image_shape) == shapes]


def _candidates(shapes: Mapping[str, Any]) -> Iterator[str]:
    """Names of networks with as many blocks in each stage: building one in shapes takes half a second."""
    found = {match.groups() for path in shapes if (match := re.match(r"params/layer(\d+)_(\d+)/", path))}
    stages = sorted({stage for stage, _ in found}, key=int)
    sizes = tuple(sum(other == stage for other, _ in found) for stage in stages)
    blocks = sizes[0] if len(set(sizes)) == 1 and sizes[0] <= MOST_BLOCKS else 0
    for name, build in networks.known_networks(blocks).items():
        if getattr(build, "keywords", {}).get("stage_sizes", ()) == sizes:
            yield name


def _shapes_of(name: str, shapes: Mapping[str, Any], image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Shapes of the variables of a network in full precision with the classes of the file; {} if there is none."""
    classifier = shapes.get(f"params/{facts_of(name).last_layer}/kernel")
    if classifier is None:
        return {}
    try:
        network = networks.build(spec(name), QuantSpec(), num_classes=classifier[-1])
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        made = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, QuantContext()), images)
    except (TypeError, ValueError, ZeroDivisionError):
        return {}  # Not with images of this size.
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(made, sep="/").items()}
