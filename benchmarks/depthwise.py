"""Speed of two forms of the 3x3 depthwise convolution: XLA's grouped convolution and a sum of shifted products.

    python benchmarks/depthwise.py [--batch_size=32] [--rounds=7]

Shapes are those of MobileNet-v2 for 32x32 images. Both forms run in turn; milliseconds are medians. The last line is
one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bnn_jax.experiment import folder as run_folder
from bnn_jax.layers.conv import LAYOUT
from bnn_jax.ops.depthwise import depthwise_convolution

PADDING = ((1, 1), (1, 1))
# Side of the input, channels, stride.
SHAPES = ((32, 96, 1), (32, 144, 2), (16, 192, 1), (8, 384, 1), (4, 960, 1))


def grouped(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """XLA's convolution with a group for each channel."""
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, PADDING, dimension_numbers=LAYOUT, feature_group_count=x.shape[-1]
    )


def shifted(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A sum of shifted products."""
    return depthwise_convolution(x, kernel, (stride, stride), PADDING)


def programs(form: Callable, stride: int) -> dict[str, Callable]:
    """Forward pass, and forward and backward pass, compiled."""
    return {
        "forward": jax.jit(lambda x, kernel: form(x, kernel, stride)),
        "training": jax.jit(jax.grad(lambda x, kernel: jnp.sum(jnp.sin(form(x, kernel, stride))), (0, 1))),
    }


def milliseconds(program: Callable, *arguments: jax.Array) -> float:
    """Time of one call."""
    started = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return 1000 * (time.perf_counter() - started)


def measure(options: argparse.Namespace, side: int, channels: int, stride: int) -> dict[str, Any]:
    """Medians of both forms for one shape."""
    x = jax.random.normal(jax.random.key(0), (options.batch_size, side, side, channels))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, channels))
    row: dict[str, Any] = {"side": side, "channels": channels, "stride": stride}
    for kind in ("forward", "training"):
        forms = {form.__name__: programs(form, stride)[kind] for form in (grouped, shifted)}
        for program in forms.values():
            milliseconds(program, x, kernel)
        rounds = [{name: milliseconds(p, x, kernel) for name, p in forms.items()} for _ in range(options.rounds)]
        for name in forms:
            row[f"{kind}_{name}_ms"] = round(statistics.median(times[name] for times in rounds), 2)
    return row


def main() -> None:
    """Measures every shape and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    names = [f"{kind}_{form}_ms" for kind in ("forward", "training") for form in ("grouped", "shifted")]
    print(f"{'input':>12} {'stride':>6} " + " ".join(f"{name[:-3]:>17}" for name in names) + "   (ms)")
    rows = []
    for side, channels, stride in SHAPES:
        row = measure(options, side, channels, stride)
        rows.append(row)
        print(f"{side:>4}x{side}x{channels:<4} {stride:>6} " + " ".join(f"{row[name]:>17}" for name in names))
    device = jax.devices()[0]
    print(json.dumps({**vars(options), "rows": rows, "device": device.device_kind, **run_folder.provenance()}))


if __name__ == "__main__":
    main()
