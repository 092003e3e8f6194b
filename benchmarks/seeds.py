"""Several seeds in one program (config.num_seeds) against the same seeds one after another: is it worth it here?

    python benchmarks/seeds.py [--seeds=2,4,8] [--network=resnet20] [--bits=32,1] [--batch_size=128] [--steps=8]
                               [--rounds=5] [--compute_dtype=float32] [--json=FILE]

Both sides take the same optimiser steps on the same images held on the device, in this process and in turn (together,
alone, together, alone, ...): one program of N seeds, and the program of one seed, called N times without waiting in
between. `ratio` is the median over the rounds of the time of the N single ones over the time together: above 1 the one
program is faster. Compilation is not in it; its seconds are beside it, of N seeds and of one.
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
from bnn_jax.experiment.build import Experiment, make_experiment, set_up
from bnn_jax.experiment.config import validate
from bnn_jax.experiment.load import load_images
from bnn_jax.experiment.start import first_state
from bnn_jax.training.devices import all_devices
from bnn_jax.training.loop import Setup, dispatch_length
from bnn_jax.training.step import Constants, compile_train_steps
from configs import asbq_resnet20


def make_experiment_of(options: argparse.Namespace, *, bits: int, num_seeds: int) -> Experiment:
    """A one-stage run of the given bit width and number of seeds on generated 32x32 images."""
    config = asbq_resnet20.get_config("smoke")
    config.network = options.network
    config.train.compute_dtype = options.compute_dtype
    config.train.batch_size = options.batch_size
    config.data.num_train = min(512, options.batch_size * options.steps)
    config.asbq.bits = (bits,)
    config.asbq.learning_rates = (0.01,)
    config.num_seeds = num_seeds
    return make_experiment(validate(config.to_dict()))


class Together:
    """All seeds in one program."""

    def __init__(self, setup: Setup):
        self.seeds, self.state = setup.seeds, first_state(setup, None, all_devices())
        self.program = compile_train_steps(setup.parts, all_devices(), seeds=setup.seeds)

    def __call__(self, constants: Constants, rows: Any, mask: Any) -> Any:
        """Starts the steps of one dispatch, rows (K, N, B)."""
        self.state, _ = self.program(self.state, constants, rows, mask)
        return self.state.params


class Alone:
    """Each seed by itself, one after another, in the program of one seed."""

    def __init__(self, setup: Setup, first: Any):
        self.states = setup.seeds.unstack(first)
        self.program = compile_train_steps(setup.parts, all_devices())

    def __call__(self, constants: Constants, rows: Any, mask: Any) -> Any:
        """Starts the steps of one dispatch of every seed, rows (K, N, B)."""
        for index, state in enumerate(self.states):
            self.states[index], _ = self.program(state, constants, rows[:, index], mask[:, index])
        return [state.params for state in self.states]


def measure(options: argparse.Namespace, *, bits: int, num_seeds: int) -> dict[str, Any]:
    """Times of both sides and their ratio, for a bit width and a number of seeds."""
    experiment = make_experiment_of(options, bits=bits, num_seeds=num_seeds)
    (stage,) = experiment.stages
    setup = set_up(experiment, stage, load_images(experiment.config, stage.data))
    images, labels = all_devices().replicate((setup.source.train.images, setup.source.train.labels))
    constants = Constants(images, labels, {})
    together = Together(setup)
    alone = Alone(setup, together.state)
    size = stage.optim.batch_size
    plan = together.seeds.index_plan(0, num_images=len(setup.source.train), batch_size=size, drop_last=True)
    length = dispatch_length(len(plan[0]), 0)
    dispatches = [(plan[0][i : i + length], plan[1][i : i + length]) for i in range(0, len(plan[0]), length)]

    def seconds(side: Callable) -> float:
        started = time.perf_counter()
        for rows, mask in dispatches:
            done = side(constants, rows, mask)
        jax.block_until_ready(done)
        return time.perf_counter() - started

    compiling = [seconds(side) for side in (together, alone)]
    rounds = [(seconds(together), seconds(alone)) for _ in range(options.rounds)]
    steps = len(plan[0])
    median = [statistics.median(times) for times in zip(*rounds, strict=True)]
    return {
        "bits": bits,
        "seeds": num_seeds,
        "steps": steps,
        "together_milliseconds": round(1000 * median[0] / steps, 2),
        "alone_milliseconds": round(1000 * median[1] / steps, 2),
        "ratio": round(statistics.median(single / joint for joint, single in rounds), 3),
        "images_per_second": round(num_seeds * size * steps / median[0], 1),
        "compile_seconds": [round(first - later, 1) for first, later in zip(compiling, median, strict=True)],
        "largest_difference": largest_difference(
            setup.seeds.unstack(together.state.params), [state.params for state in alone.states]
        ),
    }


def largest_difference(together: Any, alone: Any) -> float:
    """Largest absolute difference of the parameters of the two sides, which took the same steps."""
    sides = [jax.tree.leaves(side) for side in (together, alone)]
    return max(float(jnp.max(jnp.abs(one - other))) for one, other in zip(*sides, strict=True))


def main(argv: list[str] | None = None) -> None:
    """Measures every bit width with every number of seeds, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="2,4,8", help="numbers of seeds, from 2 on")
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--bits", default="32,1")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="per round; at most 512 images in all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compute_dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", help="file for the rows and where they come from")
    options = parser.parse_args(argv)
    rows, header = [], ("bits", "seeds", "ms/step together", "ms/step alone", "ratio", "images/s", "compile s")
    print(" ".join(f"{title:>16}" for title in header))
    for bits in map(int, options.bits.split(",")):
        for num_seeds in map(int, options.seeds.split(",")):
            row = measure(options, bits=bits, num_seeds=num_seeds)
            rows.append(row)
            names = ("bits", "seeds", "together_milliseconds", "alone_milliseconds", "ratio", "images_per_second")
            values = [*(row[name] for name in names), "{} / {}".format(*row["compile_seconds"])]
            print(" ".join(f"{value:>16}" for value in values), flush=True)
    device = jax.devices()[0]
    content = {**vars(options), "rows": rows, "device": device.device_kind, **run_folder.provenance()}
    if options.json:
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
