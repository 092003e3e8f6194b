"""Speed of the training step: images/s per bit width, compilation, and what our loop costs over a bare jitted step;
what self-distillation and its real stream cost; our step against PyTorch's.

    python benchmarks/train_step.py [--methods=asbq,skd] [--network=resnet20] [--batch_size=128] [--steps=4]
                                    [--rounds=3] [--bits=32,8,4,2,1]
    python benchmarks/train_step.py --against=pytorch [--networks=resnet20,vgg_small,resnet18_cifar] [...]

ASBQ: both sides run in this process in turn (loop, bare, loop, bare, ...) on the same network and batch size; the ratio
is the median over the rounds of their times, pair by pair, so that it holds when the machine's speed drifts. The bare
step is forward, backward and optimiser on one fixed float batch: no gathering, no augmentation, no mask, no metrics, no
progress.

SKD-BNN: the loop of its ResNet-20 with all terms, without the one that needs the real stream, and of IR-Net alone, run
in turn too; the ratios are those of the times of a round, the median over the rounds.

Against PyTorch: the bare step of both on a fixed batch, in turn in this process, with as many threads and with the huge
pages that launch.py asks for, after a pause and a step that is not timed: ours with our kernels and with XLA's
convolutions, PyTorch's in its two layouts. The ratio is the median over the rounds of theirs in the faster layout over
ours, of a round's times.

The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import launch
from bnn_jax.experiment import folder as run_folder
from bnn_jax.experiment.build import Experiment, make_experiment, set_up
from bnn_jax.experiment.config import validate
from bnn_jax.experiment.evaluation import make_evaluator
from bnn_jax.experiment.folder import RunFolder
from bnn_jax.experiment.load import load_images
from bnn_jax.experiment.start import first_variables, new_state
from bnn_jax.quantizers import QuantContext
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.training.devices import all_devices
from bnn_jax.training.interrupt import StopRequest
from bnn_jax.training.loop import EpochMeter, LoopOptions, Setup, StageLoop
from bnn_jax.training.progress import Progress
from configs import asbq_resnet20, skd_resnet20


def make_run(options: argparse.Namespace, bits: int) -> Experiment:
    """A one-stage run of the given bit width on generated 32x32 images."""
    config = asbq_resnet20.get_config("smoke")
    config.network = options.network
    config.train.compute_dtype = options.compute_dtype
    config.train.batch_size = options.batch_size
    config.data.num_train = min(512, options.batch_size * options.steps)
    config.data.num_eval = 8
    config.asbq.bits = (bits,)
    config.asbq.learning_rates = (0.01,)
    return make_experiment(validate(config.to_dict()))


# Sides of the comparison: name, and the terms besides the task's own.
SKD_SIDES = {
    "all terms": ("feature_swap", "label_bank", "cluster"),
    "no real stream": ("label_bank", "cluster"),
    "IR-Net alone": (),
}


def make_skd_run(options: argparse.Namespace, terms: tuple[str, ...]) -> Experiment:
    """A run of SKD-BNN's ResNet-20 on generated images, with these terms of its own besides the cross-entropy."""
    config = skd_resnet20.get_config("smoke")
    config.train.compute_dtype = options.compute_dtype
    config.train.batch_size = options.batch_size
    config.data.num_train = min(512, options.batch_size * options.steps)
    config.data.num_eval = 8
    experiment = make_experiment(validate(config.to_dict()))
    (stage,) = experiment.stages
    kept = tuple(term for term in stage.objectives if term.name in ("cross_entropy", *terms))
    return dataclasses.replace(experiment, stages=(dataclasses.replace(stage, objectives=kept),))


def bare_step(network: Any, optimizer: Any):
    """A jitted step as one would write it by hand: forward, backward, optimiser."""

    def step(params, other, opt_state, images, labels):
        def loss_function(params):
            output, updates = network.apply(
                {"params": params, **other}, images, QuantContext(train=True), mutable=["batch_stats", "quant_state"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(output.logits, labels).mean(), updates

        (_, updates), grads = jax.value_and_grad(loss_function, has_aux=True)(params)
        changes, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), {**other, **updates}, opt_state

    return jax.jit(step, donate_argnums=(0, 1, 2))


class LoopSide:
    """Our loop: epochs of ``steps`` steps, with gathering, augmentation, mask, metrics and progress."""

    def __init__(self, experiment: Experiment, folder: Path):
        (stage,), devices = experiment.stages, all_devices()
        source = load_images(experiment.config, stage.data)
        self.setup, run_folder = set_up(experiment, stage, source), RunFolder(folder, experiment.stages)
        self.loop = StageLoop(
            self.setup,
            teacher={},
            evaluator=make_evaluator(experiment, run_folder, stage, self.setup.network, source, devices),
            store=CheckpointStore(folder / "checkpoints"),
            metrics_path=folder / "metrics.jsonl",
            options=LoopOptions(checkpoint_seconds=1e9),
            devices=devices,
        )
        (self.variables,) = first_variables(self.setup, None)
        self.state = new_state(self.setup, self.variables, devices)
        self.epoch = 0

    def run(self) -> tuple[float, int]:
        """Seconds and images of the training steps of one epoch."""
        progress, meter = Progress("benchmark", total=10**9), EpochMeter(self.refuse)
        self.state = self.loop.run_epoch(self.state, self.epoch, meter, progress, StopRequest())
        self.loop.store.wait()
        self.epoch += 1
        return meter.seconds, meter.images

    @staticmethod
    def refuse(step: int, _: Any) -> NoReturn:
        """Ends a benchmark whose loss is not finite."""
        raise SystemExit(f"the loss is not finite at step {step}")


class BareSide:
    """The bare step on one fixed batch."""

    def __init__(self, setup: Setup, variables: Any, batch_size: int):
        size, _, channels = setup.source.image_shape
        self.images = jax.random.normal(jax.random.key(0), (batch_size, size, size, channels))
        self.labels = jnp.arange(batch_size) % setup.source.num_classes
        variables = jax.tree.map(jnp.array, variables)
        self.other = {name: value for name, value in variables.items() if name != "params"}
        self.params = variables["params"]
        self.opt_state = setup.parts.optimizer.init(self.params)
        self.network, self.step = setup.network, bare_step(setup.network, setup.parts.optimizer)

    def run(self, steps: int) -> float:
        """Seconds of ``steps`` steps."""
        started = time.perf_counter()
        for _ in range(steps):
            self.params, self.other, self.opt_state = self.step(
                self.params, self.other, self.opt_state, self.images, self.labels
            )
        jax.block_until_ready(self.params)
        return time.perf_counter() - started


def measure(options: argparse.Namespace, bits: int) -> dict[str, Any]:
    """Throughput, compilation and ratio for one bit width."""
    with tempfile.TemporaryDirectory() as folder:
        loop_side = LoopSide(make_run(options, bits), Path(folder))
        steps = loop_side.loop.steps_per_epoch
        first_seconds, _ = loop_side.run()
        bare_side = BareSide(loop_side.setup, loop_side.variables, options.batch_size)
        bare_side.run(1)
        pairs = []
        for _ in range(options.rounds):
            seconds, images = loop_side.run()
            pairs.append((seconds, bare_side.run(steps), images))
    loop_seconds = statistics.median(pair[0] for pair in pairs)
    return {
        "bits": bits,
        "images_per_second": round(pairs[0][2] / loop_seconds, 1),
        "milliseconds_per_step": round(1000 * loop_seconds / steps, 1),
        "compile_seconds": round(first_seconds - loop_seconds, 1),
        "compiled_programs": loop_side.loop.run_steps._cache_size(),
        "loop_over_bare": round(statistics.median(a / b for a, b, _ in pairs), 3),
    }


def measure_skd(options: argparse.Namespace) -> dict[str, Any]:
    """Throughput and compilation of each side, and the ratios of their times."""
    with tempfile.TemporaryDirectory() as folder:
        sides, compiling = {}, {}
        for name, terms in SKD_SIDES.items():
            place = Path(folder) / name.replace(" ", "_")
            sides[name] = LoopSide(make_skd_run(options, terms), place)
            compiling[name] = sides[name].run()[0]
        rounds = [{name: side.run() for name, side in sides.items()} for _ in range(options.rounds)]
        steps = next(iter(sides.values())).loop.steps_per_epoch
    seconds = {name: statistics.median(times[name][0] for times in rounds) for name in sides}

    def ratio(one: str, other: str) -> float:
        return round(statistics.median(times[one][0] / times[other][0] for times in rounds), 3)

    rows = [
        {
            "terms": name,
            "images_per_second": round(rounds[0][name][1] / seconds[name], 1),
            "milliseconds_per_step": round(1000 * seconds[name] / steps, 1),
            "compile_seconds": round(compiling[name] - seconds[name], 1),
            "over_irnet": ratio(name, "IR-Net alone"),
        }
        for name in sides
    ]
    return {"rows": rows, "real_stream_ratio": ratio("all terms", "no real stream")}


def show_skd(options: argparse.Namespace) -> dict[str, Any]:
    """Measures SKD-BNN and prints a line for each side."""
    result = measure_skd(options)
    print(f"{'SKD-BNN ResNet-20':<18} {'images/s':>10} {'ms/step':>9} {'compile s':>10} {'over IR-Net':>12}")
    for row in result["rows"]:
        print(
            f"{row['terms']:<18} {row['images_per_second']:>10} {row['milliseconds_per_step']:>9} "
            f"{row['compile_seconds']:>10} {row['over_irnet']:>12}"
        )
    print(f"the real stream makes a step {result['real_stream_ratio']} times as long", flush=True)
    return result


def rested(side: Any, steps: int) -> float:
    """Seconds of ``steps`` steps, once the other side's threads have gone to sleep and its data has left the caches."""
    time.sleep(0.3)
    side.run(1)
    return side.run(steps)


def measure_against_pytorch(options: argparse.Namespace, name: str, bits: int) -> dict[str, Any]:
    """Milliseconds of our bare step and of PyTorch's, and the ratio of the faster layout's to ours."""
    from benchmarks.pytorch_step import PytorchSide

    experiment = make_run(argparse.Namespace(**{**vars(options), "network": name}), bits)
    sides: dict[str, Any] = {}
    for cpu_kernels in ("auto", "xla"):
        config = {**experiment.config, "train": {**experiment.config["train"], "cpu_kernels": cpu_kernels}}
        own = make_experiment(config)
        (stage,) = own.stages
        setup = set_up(own, stage, load_images(config, stage.data))
        sides[cpu_kernels] = BareSide(setup, first_variables(setup, None)[0], options.batch_size)
    for layout in ("contiguous", "channels_last"):
        sides[layout] = PytorchSide(
            sides["auto"].network, bits, options.batch_size, channels_last=layout == "channels_last"
        )
    for side in sides.values():
        side.run(1)
    rounds = [{key: rested(side, options.steps) for key, side in sides.items()} for _ in range(options.rounds)]
    times = {key: statistics.median(seconds[key] for seconds in rounds) for key in sides}
    faster = min(("contiguous", "channels_last"), key=lambda layout: times[layout])
    return {
        "network": name,
        "bits": bits,
        **{key: round(1000 * seconds / options.steps, 1) for key, seconds in times.items()},
        "ratio": round(statistics.median(seconds[faster] / seconds["auto"] for seconds in rounds), 2),
        "ratio_of_least": round(min(seconds[faster] for seconds in rounds) / min(s["auto"] for s in rounds), 2),
    }


def show_against_pytorch(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures every network and bit width against PyTorch and prints a line for each."""
    titles = ("network", "bits", "auto", "xla", "contiguous", "channels_last", "ratio", "ratio_of_least")
    print("milliseconds per step: ours, ours with XLA's convolutions, PyTorch in two layouts")
    print("".join(f"{title:>16}" for title in titles))
    rows = []
    for name in options.networks.split(","):
        for bits in map(int, options.bits.split(",")):
            rows.append(measure_against_pytorch(options, name, bits))
            print("".join(f"{rows[-1][title]:>16}" for title in titles), flush=True)
    return rows


def show_asbq(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures every bit width and prints a line for each."""
    rows = []
    print(f"{'bits':>4} {'images/s':>10} {'ms/step':>9} {'compile s':>10} {'programs':>9} {'loop/bare':>10}")
    for bits in map(int, options.bits.split(",")):
        row = measure(options, bits)
        rows.append(row)
        print(
            f"{row['bits']:>4} {row['images_per_second']:>10} {row['milliseconds_per_step']:>9} "
            f"{row['compile_seconds']:>10} {row['compiled_programs']:>9} {row['loop_over_bare']:>10}",
            flush=True,
        )
    return rows


def main() -> None:
    """Measures every bit width and SKD-BNN, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="asbq,skd", help="which tables are made, separated by commas")
    parser.add_argument("--network", default="resnet20", help="of the ASBQ rows")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="steps per round; at most 512 images in all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", default="32,8,4,2,1")
    parser.add_argument("--compute_dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--against", choices=("pytorch",), help="what our step is compared with, instead of the tables")
    parser.add_argument("--networks", default="resnet20,vgg_small,resnet18_cifar", help="of the comparison")
    options = parser.parse_args()
    methods = options.methods.split(",")
    if not set(methods) <= {"asbq", "skd"}:
        parser.error(f"--methods={options.methods}: accepted are asbq, skd")
    device = jax.devices()[0]
    content = {**vars(options), "device": device.device_kind, **run_folder.provenance()}
    if options.against:
        content["against"] = show_against_pytorch(options)
    else:
        content["rows"] = show_asbq(options) if "asbq" in methods else []
        content["skd"] = show_skd(options) if "skd" in methods else None
    print(json.dumps(content))


if __name__ == "__main__":
    launch.ask_for_huge_pages()
    main()
