"""Speed of training steps beside what the device could do: images/s, FLOPs and bytes of the compiled program.

    python benchmarks/roofline.py [--steps=20] [--rounds=3] [--batch_size=N] [--only=TEXT] [--peak_tflops=...]
                                  [--peak_gbytes=...] [--json=FILE]

Each row compiles the real training step of a config's last stage on generated images, in float32 and (convolutions of
integer codes) in bfloat16, and runs it in rounds, all rows in turn; the time of a step is the median over the rounds.
FLOPs and bytes are XLA's count for that program. The share of the roofline is the time the program would take if the
device ran at its peak of operations or moved bytes at its peak, whichever is longer, over the measured time. Peaks are
known for some GPUs (dense tensor cores in bfloat16, TF32 being off in float32); otherwise they have to be given.

The step gets its images by index from a set in memory; reading and decoding are benchmarks/input.py's subject.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bnn_jax.experiment import folder as run_folder
from bnn_jax.experiment.build import make_experiment, set_up
from bnn_jax.experiment.config import validate
from bnn_jax.experiment.load import load_images
from bnn_jax.experiment.start import first_variables, init_variables, new_state
from bnn_jax.training.devices import all_devices
from bnn_jax.training.feed import Feed
from bnn_jax.training.step import Constants, compile_train_steps

# Config and images per step.
ROWS = {
    "irnet_resnet20": 128,
    "weight_search_resnet20": 128,
    "snn_resnet18_cifar": 128,
    "weight_search_resnet18": 256,
    "asbq_resnet18": 256,
}
# Operations per second (float32, bfloat16) and bytes per second, as the makers state them.
PEAKS = {
    "NVIDIA H200": (67e12, 989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (67e12, 989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (19.5e12, 312e12, 2.04e12),
}


class Step:
    """A compiled training step of a config, with its own copy of the state."""

    def __init__(self, name: str, dtype: str, batch_size: int):
        config = importlib.import_module(f"configs.{name}").get_config("smoke")
        config.train.batch_size = config.data.num_train = batch_size
        config.train.compute_dtype = dtype
        self.name, self.dtype, self.batch_size = name, dtype, batch_size
        experiment = make_experiment(validate(config.to_dict()))
        stage = experiment.stages[-1]
        setup = set_up(experiment, stage, load_images(experiment.config, stage.data))
        devices = all_devices()
        teacher = {}
        if setup.parts.teacher is not None:
            # Values do not matter for speed: any start of the teacher's network will do.
            (teacher,) = first_variables(set_up(experiment, experiment.stages[0], setup.source), None)
        feed = Feed(setup.source.train, devices)
        images, labels = feed.arrays
        self.constants = Constants(images, labels, devices.replicate(teacher))
        plan = np.arange(batch_size, dtype=np.int32)[None], np.ones((1, batch_size), bool)
        dispatch = next(feed.dispatches(*plan))
        self.batch = dispatch.rows, dispatch.mask
        # Fresh variables, whatever the stage would start from.
        size = jax.numpy.zeros((1, *setup.source.image_shape))
        self.state = new_state(setup, init_variables(setup.network, jax.random.key(0), size), devices)
        program = compile_train_steps(setup.parts, devices)
        started = time.perf_counter()
        self.program = program.lower(self.state, self.constants, *self.batch).compile()
        self.compile_seconds = time.perf_counter() - started
        costs = self.program.cost_analysis() or {}
        self.flops, self.bytes = costs.get("flops", 0.0), costs.get("bytes accessed", 0.0)
        self.temporary_bytes = self.program.memory_analysis().temp_size_in_bytes

    def seconds(self, steps: int) -> float:
        """Mean time of a step over ``steps`` of them."""
        started = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self.program(self.state, self.constants, *self.batch)
        jax.block_until_ready(self.state.params)
        return (time.perf_counter() - started) / steps


def measure(steps: list[Step], options: argparse.Namespace, peaks: tuple[float, float, float] | None) -> list[dict]:
    """One row for each step."""
    for step in steps:
        step.seconds(2)
    times = [[step.seconds(options.steps) for step in steps] for _ in range(options.rounds)]
    rows = []
    for step, seconds in zip(steps, map(statistics.median, zip(*times))):
        row = {
            "config": step.name,
            "compute_dtype": step.dtype,
            "batch_size": step.batch_size,
            "images_per_second": round(step.batch_size / seconds, 1),
            "milliseconds_per_step": round(1000 * seconds, 3),
            "gflops": round(step.flops / 1e9, 2),
            "gbytes": round(step.bytes / 1e9, 3),
            "temporary_mbytes": round(step.temporary_bytes / 1e6, 1),
            "compile_seconds": round(step.compile_seconds, 1),
        }
        if peaks is not None:
            peak = peaks[step.dtype == "bfloat16"]
            row["roofline_share"] = round(max(step.flops / peak, step.bytes / peaks[2]) / seconds, 3)
        rows.append(row)
    return rows


def known_peaks(options: argparse.Namespace) -> tuple[float, float, float] | None:
    """Peaks given, or known for this device; None otherwise."""
    if options.peak_tflops and options.peak_gbytes:
        return (options.peak_tflops * 1e12,) * 2 + (options.peak_gbytes * 1e9,)
    return PEAKS.get(jax.devices()[0].device_kind)


def main(argv: list[str] | None = None) -> None:
    """Measures all rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, help="images per step, instead of the configs' own")
    parser.add_argument("--only", default="", help="configs with this text in their names")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--peak_tflops", type=float, help="10^12 operations per second of the device")
    parser.add_argument("--peak_gbytes", type=float, help="10^9 bytes per second of the device")
    parser.add_argument("--json", help="file for the rows and where they come from")
    options = parser.parse_args(argv)
    chosen = {name: size for name, size in ROWS.items() if options.only in name}
    if not chosen:
        parser.error(f"--only={options.only}: accepted is a part of {', '.join(ROWS)}")
    steps = [
        Step(name, dtype, options.batch_size or size)
        for name, size in chosen.items()
        for dtype in options.dtypes.split(",")
    ]
    rows = measure(steps, options, known_peaks(options))
    device = jax.devices()[0].device_kind
    show(rows, device)
    if options.json:
        content = {"device": device, "steps": options.steps, "rounds": options.rounds, "rows": rows}
        Path(options.json).write_text(json.dumps({**content, **run_folder.provenance()}, indent=1) + "\n")


def show(rows: list[dict[str, Any]], device: str) -> None:
    """The table on stdout."""
    table = Table(title=f"Training steps on {device}")
    titles = {
        "config": "config",
        "compute_dtype": "type",
        "batch_size": "batch",
        "images_per_second": "images/s",
        "milliseconds_per_step": "ms/step",
        "gflops": "GFLOP",
        "gbytes": "GB moved",
        "temporary_mbytes": "MB temporary",
        "compile_seconds": "compile s",
        "roofline_share": "of roofline",
    }
    for key, title in titles.items():
        table.add_column(title, justify="left" if key in ("config", "compute_dtype") else "right")
    for row in rows:
        table.add_row(*(str(row.get(key, "-")) for key in titles))
    # Wide enough for the table also where the output is a file.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
