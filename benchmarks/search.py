"""Speed of the search: evaluations of paths per second, side by side by ``vmap`` and one at a time.

    python benchmarks/search.py [--network=basq_resnet20_cifar] [--paths=45] [--images=100] [--batch_size=100]
                                [--paths_at_once=5,15,45] [--rounds=3] [--bits=2]

All sides evaluate the same population of random paths on the same generated images, in turn, round after round; the
ratios are those of the times of a round, the median over the rounds. 'one' calls the evaluation step of an ordinary
stage with one path after another, the others the population's step with that many paths at once. Programs are counted
over all paths.

The last line is one JSON object.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bnn_jax import data, networks
from bnn_jax.data.augment import prepare_eval
from bnn_jax.experiment import folder as run_folder
from bnn_jax.experiment import start
from bnn_jax.methods.basq import quant_spec
from bnn_jax.stages import DataSpec, spec
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import Evaluator, PathEvaluator


def setting(options: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Network, variables on the devices, images and their preparation."""
    size = 32 if options.network.endswith("cifar") else 224
    choice = DataSpec("synthetic", num_train=1, num_eval=options.images, options=(("image_size", size),))
    source = data.build(choice, data_dir=None)
    quant = quant_spec(options.bits, quantize_weights=True)
    network = networks.build(spec(options.network), quant, num_classes=source.num_classes)
    variables = start.init_variables(network, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    prepare = functools.partial(prepare_eval, mean=source.mean, std=source.std)
    return network, all_devices().replicate(variables), source.test, prepare


def sides_of(options: argparse.Namespace) -> dict[str, tuple[Callable[[], list[float]], Callable[[], int]]]:
    """By name, a function that evaluates all paths and one that counts the programs compiled for it."""
    network, variables, split, prepare = setting(options)
    genes = len(network.branch_patterns)
    paths = np.random.RandomState(0).randint(network.branches, size=(options.paths, genes)).astype(np.int32)
    shared = {"prepare": prepare, "batch_size": options.batch_size, "devices": all_devices()}
    one = Evaluator(network, splits={"test": split}, choice=paths[0], **shared)

    def one_at_a_time() -> list[float]:
        found = []
        for path in paths:
            one._choice = (path,)
            result = one(variables, "test")
            assert result is not None  # only asked to stop could it be
            found.append(result["top1"])
        return found

    sides: dict[str, Any] = {"one": (one_at_a_time, one._step._cache_size)}
    for at_once in map(int, options.paths_at_once.split(",")):
        several = PathEvaluator(network, split=split, paths_at_once=at_once, **shared)
        images = np.arange(len(split), dtype=np.int32)
        sides[str(at_once)] = (
            functools.partial(several, variables, paths.tolist(), images),
            several._step._cache_size,
        )
    return sides


def timed(function: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Seconds of a call, and its result."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each side.

    Raises:
      SystemExit: two sides found different accuracies.
    """
    sides = sides_of(options)
    first = {name: timed(evaluate) for name, (evaluate, _) in sides.items()}
    for name, (_, found) in first.items():
        # A value near a rounding threshold may fall on its other side in another program: a few images at most.
        if np.abs(np.subtract(found, first["one"][1])).max() > 300.0 / options.images:
            raise SystemExit(f"{name} at once: other accuracies than one at a time")
    rounds = [{name: timed(evaluate)[0] for name, (evaluate, _) in sides.items()} for _ in range(options.rounds)]
    rows = []
    for name, (_, programs) in sides.items():
        seconds = statistics.median(times[name] for times in rounds)
        rows.append(
            {
                "paths_at_once": name,
                "evaluations_per_second": round(options.paths / seconds, 2),
                "images_per_second": round(options.paths * options.images / seconds, 1),
                "first_call_seconds": round(first[name][0], 1),
                "compiled_programs": programs(),
                "speed_over_one": round(statistics.median(times["one"] / times[name] for times in rounds), 2),
            }
        )
    return rows


def main() -> None:
    """Measures and prints a line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="basq_resnet20_cifar", help="'basq_...'")
    parser.add_argument("--paths", type=int, default=45, help="paths in the population")
    parser.add_argument("--images", type=int, default=100, help="images each path is evaluated on")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--paths_at_once", default="5,15,45")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", type=int, default=2)
    options = parser.parse_args()
    rows = measure(options)
    print(f"{'at once':>8} {'paths/s':>9} {'images/s':>10} {'first call s':>13} {'programs':>9} {'over one':>9}")
    for row in rows:
        print(
            f"{row['paths_at_once']:>8} {row['evaluations_per_second']:>9} {row['images_per_second']:>10} "
            f"{row['first_call_seconds']:>13} {row['compiled_programs']:>9} {row['speed_over_one']:>9}"
        )
    device = jax.devices()[0]
    print(json.dumps({**vars(options), "rows": rows, "device": device.device_kind, **run_folder.provenance()}))


if __name__ == "__main__":
    main()
