"""Images per second of the input pipelines for ImageNet, beside Pillow alone.

    python benchmarks/input.py [--data_dir=DIR] [--resized=DIR] [--images=N] [--per_round=480] [--batch_size=16]
                               [--image_size=224] [--workers=2] [--rounds=3] [--json=FILE]

'alone' decodes, crops and resizes files that lie in memory, in a loop on one core: no reading, no batches. The others
are ``StreamedSplit``s, which read from the folder: JPEG files ('jpeg') or resized pixels ('resized'), by threads of one
process or by several processes. Training images are cropped at random, images of the evaluation at the centre.

All sides read the same images, in turn, round after round. A pipeline's time starts after its first batches, when its
processes have come up. The ratio is that to Pillow alone in the same round; all figures are medians over the rounds.
CPU time is that of all threads of this program; what its processes need is not counted, and shown as '-'.

Without --resized, a small data set is resized into a folder that is removed at the end; of a large one the sides with
resized pixels are left out.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bnn_jax import data, picture_files
from bnn_jax.data import augment, prepare, tfds
from bnn_jax.data.order import Purpose, random_bits
from bnn_jax.data.stream import BATCHES_AHEAD, StreamedSplit, available_cores
from bnn_jax.errors import UserError
from bnn_jax.experiment import folder as run_folder
from bnn_jax.stages import DataSpec

ALONE = "pillow alone"
MOST_RESIZED = 2000  # images that are resized just to be measured
SKIPPED = 1 + BATCHES_AHEAD  # batches before a pipeline's time starts
RANDOM_CROPS = (0, 0)


class Timing(NamedTuple):
    """Images, the seconds they took, and the seconds of CPU time of this process."""

    images: int
    seconds: float
    cpu: float


def alone(contents: list[bytes], count: int, size: int, *, decoder: str, training: bool) -> Timing:
    """A loop over files in memory."""
    bits = [random_bits(*RANDOM_CROPS, purpose=Purpose.CROP, count=augment.NUM_DRAWS, item=n) for n in range(count)]
    started, cpu_started = time.perf_counter(), time.process_time()
    for number in range(count):
        content = contents[number % len(contents)]
        if training:
            augment.training_image(content, size, bits[number], decoder=decoder)
        else:
            picture_files.evaluation_image(content, size)
    return Timing(count, time.perf_counter() - started, time.process_time() - cpu_started)


def streamed(split: StreamedSplit, plan: np.ndarray, *, training: bool, workers: int) -> Timing:
    """A pass over a plan, from the batch after the first few on."""
    batches = split.batches(plan, random_crops=RANDOM_CROPS if training else None, workers=workers)
    for _ in range(SKIPPED):
        next(batches)
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(len(plan) - SKIPPED):
        next(batches)
    timing = Timing(plan[SKIPPED:].size, time.perf_counter() - started, time.process_time() - cpu_started)
    batches.close()
    return timing


def source(name: str, folder: str | None, options: argparse.Namespace, *, decoder: str) -> StreamedSplit:
    """The training images of a data source."""
    spec = DataSpec(
        name,
        num_train=options.images,
        augment="random_resized_crop_flip",
        options=(("image_size", options.image_size),),
        decoder=decoder,
    )
    split = data.build(spec, data_dir=folder).train
    assert isinstance(split, StreamedSplit)
    return split


def sides_of(options: argparse.Namespace, resized: str | None) -> dict[str, dict[str, Callable[[], Timing]]]:
    """'train' and 'eval', each with a function for each side."""
    decoders = ("pillow", "opencv") if crops_with_opencv() else ("pillow",)
    sources = {"jpeg": ("imagenet2012", options.data_dir)}
    if resized is not None:
        sources["resized"] = ("imagenet2012_resized", resized)
    splits = {
        (kind, decoder): source(*sources[kind], options, decoder=decoder) for kind in sources for decoder in decoders
    }
    first = splits["jpeg", "pillow"]
    contents = [content for content, _ in first.records.read(list(range(len(first))))]
    rows = SKIPPED + -(-options.per_round // options.batch_size)
    plan = np.arange(rows * options.batch_size).reshape(rows, options.batch_size) % len(first)
    sides: dict[str, dict[str, Callable[[], Timing]]] = {}
    for mode, used in (("train", decoders), ("eval", ("pillow",))):
        training = mode == "train"
        of_mode = sides.setdefault(mode, {})
        for decoder in used:
            of_mode[f"{decoder} alone"] = functools.partial(
                alone, contents, options.per_round, options.image_size, decoder=decoder, training=training
            )
        for kind in sources:
            for decoder in used:
                for workers in sorted({0, options.workers}):
                    how = f"{workers} processes" if workers else f"{available_cores()} threads"
                    of_mode[f"{kind}, {decoder}, {how}"] = functools.partial(
                        streamed, splits[kind, decoder], plan, training=training, workers=workers
                    )
    return sides


def crops_with_opencv() -> bool:
    """Whether OpenCV is installed."""
    try:
        augment.opencv()
    except UserError:
        return False
    return True


def measure(sides: dict[str, dict[str, Callable[[], Timing]]], rounds: int) -> list[dict[str, Any]]:
    """A row for each side."""
    measured = [
        {mode: {name: side() for name, side in of_mode.items()} for mode, of_mode in sides.items()}
        for _ in range(rounds)
    ]
    rows = []
    for mode, of_mode in sides.items():
        for name in of_mode:
            timings = [of_round[mode][name] for of_round in measured]
            ratios = [
                (of_round[mode][name].images / of_round[mode][name].seconds)
                / (of_round[mode][ALONE].images / of_round[mode][ALONE].seconds)
                for of_round in measured
            ]
            speed = statistics.median(timing.images / timing.seconds for timing in timings)
            cpu = statistics.median(timing.images / timing.cpu for timing in timings)
            rows.append(
                {
                    "mode": mode,
                    "pipeline": name,
                    "images_per_second": round(speed, 1),
                    "over_pillow_alone": round(statistics.median(ratios), 2),
                    "images_per_cpu_second": None if "processes" in name else round(cpu, 1),
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    table = Table("mode", title="Input of ImageNet")
    table.add_column("pipeline", no_wrap=True)
    for name in ("images/s", "over Pillow", "images per CPU s"):
        table.add_column(name, justify="right")
    for row in rows:
        cpu = row["images_per_cpu_second"]
        table.add_row(
            row["mode"],
            row["pipeline"],
            f"{row['images_per_second']:.0f}",
            f"{row['over_pillow_alone']:.2f}",
            "-" if cpu is None else f"{cpu:.0f}",
        )
    Console().print(table)


def run(options: argparse.Namespace, temporary: str) -> dict[str, Any]:
    """Measures all sides; the result is what --json writes."""
    resized = options.resized
    if resized is None and len(tfds.open_records("imagenet2012", "train", options.data_dir)) <= MOST_RESIZED:
        resized = temporary
        data_dir = tfds.absolute_data_dir(options.data_dir)
        prepare.prepare_imagenet(data_dir, Path(temporary), progress=sys.stderr.isatty())
    load = os.getloadavg()[0]
    rows = measure(sides_of(options, resized), options.rounds)
    settings = {name: value for name, value in vars(options).items() if name not in ("data_dir", "resized", "json")}
    machine = {"cores": available_cores(), "load_before": round(load, 1), "load_after": round(os.getloadavg()[0], 1)}
    return {**settings, **machine, "rows": rows, **run_folder.provenance()}


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a table and writes the file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="folder of prepared data sets with imagenet2012 (default: TFDS's own)")
    parser.add_argument("--resized", help="folder of prepared data sets with imagenet2012_resized, side 256")
    parser.add_argument("--images", type=int, help="the first training images only (default: all)")
    parser.add_argument("--per_round", type=int, default=480, help="images each side reads in a round")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--image_size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes of the sides with processes; 0 leaves them out"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            result = run(options, temporary)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(result["rows"])
    print(f"{result['cores']} cores; load {result['load_before']} before and {result['load_after']} after")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
