"""Speed of exported networks on the CPU beside float networks in PyTorch, onnxruntime and JAX.

    python benchmarks/inference.py [--rounds=15] [--networks=resnet20,vgg_small,resnet18] [--batches=1,64]
                                   [--threads=1] [--instruction_set=avx2] [--profile] [--statistic=least]
                                   [--output=FILE.json]

All forms run in turn, round after round; times are medians (or the least, on a busy machine), and the ratios are those
of one run. PyTorch, onnxruntime
(and onnx, which writes its model) and JAX are measured where they are installed. Networks have random weights: speed
does not depend on them. The last lines are the figures promised in docs/deploy.md; exit status 1 where one is missed.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bnn_jax import networks
from bnn_jax.deploy import artefact, fuse, interchange, jax_backend, native
from bnn_jax.deploy.classifier import Classifier
from bnn_jax.deploy.graph import Codes, Node, Program
from bnn_jax.deploy.memory import Layers
from bnn_jax.deploy.plan import Plan
from bnn_jax.deploy.trace import trace
from bnn_jax.deploy.weights import FloatWeights, LevelWeights, PatternWeights, Weights
from bnn_jax.quantizers import QuantContext
from bnn_jax.stages import QuantSpec, Spec, spec

# On a machine that does other work beside it the least time says more than the median.
STATISTICS: dict[str, Callable[[list[float]], float]] = {"median": statistics.median, "least": min}

BINARY = QuantSpec(weight=spec("irnet"), act=spec("irnet"))
FLOAT = QuantSpec()

# Float network, images and the low-bit networks that are compared with it.
NETWORKS: dict[str, tuple[str, int, dict[str, tuple[Spec, QuantSpec]]]] = {
    "resnet20": (
        "standard_resnet20",
        32,
        {
            "binary": (spec("hardtanh_resnet20"), BINARY),
            "ASBQ 2 bit": (spec("resnet20"), QuantSpec(weight=spec("dorefa", bits=2), act=spec("dorefa", bits=2))),
            "ASBQ 4 bit": (spec("resnet20"), QuantSpec(weight=spec("dorefa", bits=4), act=spec("dorefa", bits=4))),
        },
    ),
    "vgg_small": ("standard_vgg_small", 32, {"binary": (spec("hardtanh_vgg_small"), BINARY)}),
    "resnet18": (
        "standard_resnet18",
        224,
        {
            "binary": (spec("hardtanh_resnet18"), BINARY),
            **{
                f"SNN tau {tau}": (
                    spec("reactnet18"),
                    QuantSpec(weight=spec("codebook", tau=tau), act=spec("approx_sign")),
                )
                for tau in (4, 5, 6)
            },
            "ASBQ 2 bit": (spec("resnet18"), QuantSpec(weight=spec("dorefa", bits=2), act=spec("dorefa", bits=2))),
        },
    ),
}


def random_export(choice: Spec, quant: QuantSpec, side: int) -> tuple[Program, dict[str, Weights]]:
    """A network with random variables as operations and weights."""
    network = networks.build(choice, quant, num_classes=1000 if side > 100 else 10)
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    shapes = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, QuantContext()), images)
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: np.abs(random.normal(0.5, 0.2, s.shape)).astype(s.dtype), dict(shapes))
    variables["params"] = jax.tree.map(lambda s: random.normal(0, 0.1, s.shape).astype(s.dtype), shapes["params"])
    return trace(network, variables, (side, side, 3))


def torch_form(program: Program, weights: dict[str, Weights], threads: int) -> Callable[[np.ndarray], Any] | None:
    """The program in PyTorch, as it would be written there: convolutions and BatchNorms of the library."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    steps = _torch_steps(torch, program, weights)

    def run(images: np.ndarray) -> Any:
        with torch.inference_mode():
            values = [torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()]
            for step, inputs in steps:
                values.append(step(*(values[value] for value in inputs)))
            return values[-1]

    return run


def _torch_steps(torch: Any, program: Program, weights: dict[str, Weights]) -> list[tuple[Callable, tuple[int, ...]]]:
    functional = torch.nn.functional
    shapes = program.shapes({name: each.shape for name, each in weights.items()})

    def step(node: Node, shape: tuple[int, ...]) -> Callable:
        o = node.options
        match node.kind:
            case "conv":
                kernel = torch.from_numpy(np.ascontiguousarray(weights[o["layer"]].kernel.transpose(3, 2, 0, 1)))
                padding = tuple(pair[0] for pair in o["padding"])
                return lambda x: functional.conv2d(x, kernel, stride=o["strides"], padding=padding)
            case "dense":
                matrix = torch.from_numpy(np.ascontiguousarray(weights[o["layer"]].kernel.T))
                return lambda x: functional.linear(x, matrix)
            case "affine":
                scale, offset = (
                    torch.from_numpy(np.broadcast_to(np.float32(o.get(name, default)), shape[-1:]).copy())
                    for name, default in (("scale", 1.0), ("offset", 0.0))
                )
                if len(shape) == 1:
                    return lambda x: x * scale + offset
                zero, one = torch.zeros(shape[-1]), torch.ones(shape[-1])
                return lambda x: functional.batch_norm(x, zero, one, scale, offset)
            case "clip":
                return functional.relu
            case "add":
                return torch.add
            case "divide":
                return lambda x: x / float(o["by"])
            case "sum":
                return lambda x: x.sum((2, 3))
            case "max_pool":
                padding = o["padding"][0][0]
                return lambda x: functional.max_pool2d(x, o["window"], o["strides"], padding)
            case "pad":
                return lambda x: functional.pad(x, (0, 0, 0, 0, o["low"][2], o["high"][2]))
            case "slice":
                return lambda x: x[:, :, :: o["step"][0], :: o["step"][1]]
            case "transpose":
                return lambda x: x
            case "reshape":
                return lambda x: x.reshape(len(x), -1)
        raise ValueError(node.kind)

    return [(step(node, shapes[node.inputs[0]]), node.inputs) for node in program.nodes]


def onnx_form(program: Program, weights: dict[str, Weights], threads: int) -> Callable[[np.ndarray], Any] | None:
    """The program in onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    model = interchange.to_onnx(program, weights)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def classifier(program: Program, weights: dict[str, Weights], options: argparse.Namespace) -> Classifier:
    """The exported network, through a file."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "network.bnn"
        artefact.save(path, program, weights, {})
        return Classifier(artefact.load(path), threads=options.threads, instruction_set=options.instruction_set)


def milliseconds(forms: dict[str, Callable[[], Any]], rounds: int, statistic: str) -> dict[str, float]:
    """Milliseconds of each form, of rounds in which all run in turn."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form()
    for _ in range(rounds):
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: STATISTICS[statistic](values) for name, values in times.items()}


def measure_network(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """All forms of one network with one batch size."""
    float_name, side, low_bit = NETWORKS[name]
    images = np.random.default_rng(1).normal(size=(batch, side, side, 3)).astype(np.float32)
    program, weights = random_export(spec(float_name), FLOAT, side)
    forms: dict[str, Callable[[], Any]] = {}
    others = {
        "PyTorch float32": torch_form(program, weights, options.threads),
        "onnxruntime float32": onnx_form(program, weights, options.threads),
        "JAX float32": jax_backend.compile_program(program, weights),
    }
    for other, form in others.items():
        if form is not None:
            forms[other] = lambda form=form: form(images)
    profiles = {}
    for kind, (choice, quant) in low_bit.items():
        packed = classifier(*random_export(choice, quant, side), options)
        forms[kind] = lambda packed=packed: packed.logits(images)
        if options.profile and batch == 1:
            profiles[kind] = [(layer, round(1e6 * seconds, 1)) for layer, seconds in packed.profile(images)]
    found = {"network": name, "batch": batch, "milliseconds": milliseconds(forms, options.rounds, options.statistic)}
    return {**found, "microseconds_by_layer": profiles} if profiles else found


def signs_program(channels: int, side: int, layer: Weights) -> tuple[Program, dict[str, Weights]]:
    """A sign, a 3x3 convolution of it and a sum."""
    options = {
        "layer": "layer",
        "strides": (1, 1),
        "padding": ((1, 1), (1, 1)),
        "groups": 1,
        "codes": Codes(1.0, -1, 1),
    }
    nodes = (Node("sign", (0,)), Node("conv", (1,), options), Node("sum", (2,)))
    return Program((side, side, channels), nodes), {"layer": layer}


def layer_form(layer: Weights, side: int, batch: int, options: argparse.Namespace) -> tuple[str, Callable[[], float]]:
    """Which product a layer is, and the seconds of its convolution alone; signs are packed before."""
    kernels = native.choose(options.instruction_set)
    assert kernels is not None
    program, weights = signs_program(layer.shape[2], side, layer)
    # Codebooks are looked up whether it pays or not.
    with mock.patch.dict(fuse.LEAST_FILTERS, {kernels.name: 0}):
        layers = Layers(program, weights, kernels)
    plan = Plan(program, layers, batch=batch)
    images = np.random.default_rng(1).normal(size=(batch, side, side, layer.shape[2])).astype(np.float32)
    return layers.products[1], lambda: plan.timed(images, options.threads)[1][1]


def measure_layer(channels: int, side: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """A 3x3 convolution: binary, from a codebook, and in PyTorch."""
    random = np.random.default_rng(0)
    shape = (3, 3, channels, channels)
    scale = np.ones(channels, np.float32)
    layers: dict[str, Weights] = {
        "binary": LevelWeights(random.integers(0, 2, shape).astype(np.uint16), np.array([-1, 1], np.float32), scale, 1)
    }
    for tau in (4, 5, 6):
        levels = np.where(random.random((2**tau, 9)) < 0.5, -1, 1).astype(np.float32)
        indices = random.integers(0, 2**tau, shape[2:]).astype(np.uint16)
        layers[f"SNN tau {tau}"] = PatternWeights(indices, levels, scale, all_patterns=False)
    forms = {name: layer_form(layer, side, batch, options) for name, layer in layers.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    torch_run = None
    program, weights = signs_program(channels, side, FloatWeights(random.normal(size=shape).astype(np.float32)))
    conv_only = Program(program.image_shape, (Node("conv", (0,), program.nodes[1].options),))
    torch_run = torch_form(conv_only, weights, options.threads)
    images = random.normal(size=(batch, side, side, channels)).astype(np.float32)
    for _ in range(3 * options.rounds):
        for name, (_, form) in forms.items():
            times[name].append(1000 * form())
        if torch_run is not None:
            started = time.perf_counter()
            torch_run(images)
            times.setdefault("PyTorch float32", []).append(1000 * (time.perf_counter() - started))
    found = {name: STATISTICS[options.statistic](values) for name, values in times.items()}
    products = {name: product for name, (product, _) in forms.items()}
    return {"layer": f"{channels} at {side}x{side}", "batch": batch, "milliseconds": found, "products": products}


def figures(results: dict[str, Any]) -> list[tuple[str, float | None, float]]:
    """What docs/deploy.md promises: what, measured, at least."""

    def ratio(rows: list[dict[str, Any]], of: str, over: str, **match: Any) -> float | None:
        for row in rows:
            if all(row.get(key) == value for key, value in match.items()) and {of, over} <= set(row["milliseconds"]):
                return row["milliseconds"][over] / row["milliseconds"][of]
        return None

    layers, nets = results["layers"], results["networks"]
    torch, runtime = "PyTorch float32", "onnxruntime float32"
    found = [
        (f"binary 3x3, {layer}, over {torch}", ratio(layers, "binary", torch, layer=layer, batch=1), 14.0)
        for layer in ("128 at 28x28", "256 at 14x14")
    ]
    found += [
        (f"binary ResNet-18 at 224 over {torch}", ratio(nets, "binary", torch, network="resnet18", batch=1), 6.0),
        (f"binary ResNet-20 at 32 over {runtime}", ratio(nets, "binary", runtime, network="resnet20", batch=1), 3.0),
    ]
    found += [
        (
            f"SNN tau {tau} over 1 bit, 256 at 14x14, batch 8",
            ratio(layers, f"SNN tau {tau}", "binary", layer="256 at 14x14", batch=8),
            1.5,
        )
        for tau in (4, 5)
    ]
    return found


def show(row: dict[str, Any]) -> None:
    name = row.get("network", row.get("layer"))
    print(f"{name}, batch {row['batch']}")
    for form, value in row["milliseconds"].items():
        print(f"    {form:24} {value:10.3f} ms")
    for kind, layers in row.get("microseconds_by_layer", {}).items():
        print(f"  {kind}")
        for layer, value in layers:
            print(f"    {layer:48} {value:10.1f} us")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--instruction_set", default=None)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--statistic", choices=STATISTICS, default="median")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    kernels = native.choose(options.instruction_set)
    results: dict[str, Any] = {
        "instruction_set": kernels.name if kernels else "numpy",
        "threads": options.threads,
        "statistic": options.statistic,
        "processors": len(os.sched_getaffinity(0)),
        "layers": [],
        "networks": [],
    }
    for channels, side, batch in ((64, 56, 1), (128, 28, 1), (256, 14, 1), (512, 7, 1), (256, 14, 8)):
        results["layers"].append(measure_layer(channels, side, batch, options))
        show(results["layers"][-1])
    for name in filter(None, options.networks.split(",")):
        for batch in map(int, options.batches.split(",")):
            results["networks"].append(measure_network(name, batch, options))
            show(results["networks"][-1])
    missed = False
    for what, value, least in figures(results):
        verdict = "not measured" if value is None else f"{value:.2f}, at least {least:g}"
        missed |= value is not None and value < least
        print(f"{what}: {verdict}{'  MISSED' if value is not None and value < least else ''}")
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
