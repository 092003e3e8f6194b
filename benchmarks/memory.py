"""Memory of one searched layer's forward and backward pass: our gradient beside the plain formula's.

    python benchmarks/memory.py [--counts=2,4,8] [--channels=512] [--least=10]

Both sides compile the same program, from the logits (K, 3, 3, C, C), a cotangent of the weights and a temperature to
the weights and the gradient of the logits; nothing is run. "Plain" is the published formula, differentiated by JAX: a
one-hot vector for the forward pass, minus the probabilities without their gradient, plus the probabilities, times the
values. "Ours" is ``bnn_jax.ops.categorical.hard_choice``, whose only residual is the logits.

arguments    what is handed in: logits, cotangent, temperature; the same on both sides
temporaries  what the program needs besides arguments and results
accessed     bytes its operations read and write, as the compiler counts them

The last line is the ratio of the temporaries for the largest number of values; the exit status is 1 where it is below
``--least``.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bnn_jax.ops.categorical import Values, hard_choice

MEGABYTE = 1e6

Choice = Callable[[jax.Array, Values, jax.Array], jax.Array]


def plain_choice(logits: jax.Array, values: Values, temperature: jax.Array) -> jax.Array:
    """The chosen values as the release computes them: (K, ...) -> (...)."""
    p = jax.nn.softmax(logits / temperature, axis=0)
    one_hot = jax.nn.one_hot(jnp.argmax(p, axis=0), len(values), axis=0)
    straight_through = (one_hot - jax.lax.stop_gradient(p)) + p
    return jnp.sum(straight_through * jnp.asarray(values).reshape((-1,) + (1,) * (logits.ndim - 1)), axis=0)


class Memory(NamedTuple):
    """Bytes of a compiled program; the module's docstring says what is what."""

    arguments: int
    temporaries: int
    accessed: int


def measure(choose: Choice, count: int, channels: int) -> Memory:
    """Compiles a layer's forward and backward pass for ``count`` values and asks what it needs."""
    values = tuple(float(k) - (count - 1) / 2 for k in range(count))
    kernel = (3, 3, channels, channels)

    def both_passes(logits: jax.Array, cotangent: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights, pullback = jax.vjp(lambda a: choose(a, values, temperature), logits)
        return weights, pullback(cotangent)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((count, *kernel), kernel, ())]
    compiled = jax.jit(both_passes).lower(*shapes).compile()
    analysis, costs = compiled.memory_analysis(), compiled.cost_analysis()
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        accessed=int(costs.get("bytes accessed", 0)),
    )


def compare(count: int, channels: int) -> float:
    """Prints the row of a number of values, and returns the ratio of the temporaries, plain over ours."""
    ours, plain = (measure(choose, count, channels) for choose in (hard_choice, plain_choice))
    ratio = plain.temporaries / max(ours.temporaries, 1)
    numbers = (ours.arguments, ours.temporaries, plain.temporaries, ours.accessed, plain.accessed)
    print(f"{count:>3}" + "".join(f"{number / MEGABYTE:>12.1f}" for number in numbers) + f"{ratio:>9.1f}", flush=True)
    return ratio


def main(arguments: list[str] | None = None) -> int:
    """Prints a row for each number of values and the last one's ratio; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="2,4,8", help="numbers of values K, separated by commas")
    parser.add_argument("--channels", type=int, default=512, help="input and output channels of the 3x3 layer")
    parser.add_argument("--least", type=float, default=10.0, help="ratio below which the exit status is 1")
    options = parser.parse_args(arguments)
    counts = [int(count) for count in options.counts.split(",")]
    device = jax.devices()[0]
    print(f"3x3 layer, {options.channels} channels; megabytes, jax {jax.__version__} on {device.device_kind}")
    print(f"{'':>3}{'':>12}{'temporaries':>24}{'accessed':>24}{'plain':>9}")
    print(f"{'K':>3}{'arguments':>12}" + f"{'ours':>12}{'plain':>12}" * 2 + f"{'/ ours':>9}")
    ratio = [compare(count, options.channels) for count in counts][-1]
    print(f"temporaries, plain over ours, for K = {counts[-1]}: {ratio:.1f}")
    return 0 if ratio >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
