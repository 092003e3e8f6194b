"""Whether an exported network answers as it did in training, and how large its file is, for every method.

    python benchmarks/deployment.py --data_dir=DIR --released=FOLDER [--workdir=runs/deployment] [--only=snn,...]
                                    [--json=FILE]

Released checkpoints are imported from FOLDER; the other networks are trained for a few steps first, since their answers
need only be the same, not right (a run that is finished is used again). Each network classifies all test images of
CIFAR-10 in training's own network, in the same with XLA's convolutions, in jax, packed and, where it is installed, in
onnxruntime; on every image all should answer alike. Float sums in another order (the first convolution's, BatchNorm's)
put a value that lies on the edge of a step on its other side now and then; the second form shows how often training's
own network does that. Then the bytes of each file beside those that the summary predicts, and those of SNN's ResNet-18
for ImageNet beside the published numbers. Exit status 1 where a size is missed or an answer differs.
"""

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import launch
from benchmarks.inference import random_export
from bnn_jax import command_line
from bnn_jax.data.augment import prepare_eval
from bnn_jax.deploy import artefact, interchange, load, native
from bnn_jax.deploy.weights import PatternWeights
from bnn_jax.experiment.build import make_experiment
from bnn_jax.experiment.config import validate
from bnn_jax.experiment.evaluation import evaluated_choice, only_test, read_stage
from bnn_jax.experiment.exports import export_stage
from bnn_jax.experiment.folder import RunFolder, provenance
from bnn_jax.experiment.load import load_images
from bnn_jax.ops import convolution
from bnn_jax.report.costs import complexity
from bnn_jax.stages import QuantSpec, spec
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import outputs_of

# Mbit of the quantized weights of ResNet-18 on ImageNet, published for each tau.
SNN_MBIT = {9: 10.99, 6: 7.324, 5: 6.103, 4: 4.882}

# A file may take 1.02 times the summary's bytes and this for operations, names and checksums.
DESCRIPTION_BYTES = 4096
BATCH = 500


@dataclasses.dataclass(frozen=True)
class Row:
    """A network that is exported: its config, options, and the released file it is imported from."""

    config: str
    options: tuple[str, ...] = ()
    released: str | None = None
    stage: str | None = None


FEW_STEPS = ("--config.data.num_train=2560", "--config.data.num_eval=500")
ROWS = {
    "skd": Row("skd_resnet20", released="skd_resnet20_cifar10_w1a1.th"),
    "asbq 4 bit": Row(
        "asbq_resnet20",
        ("--config.asbq.preset=checkpoint",),
        released="asbq_resnet20_cifar10_w4a4.pth.tar",
        stage="w4a4",
    ),
    "asbq 1 bit": Row(
        "asbq_resnet20",
        (*FEW_STEPS, "--config.asbq.bits=(1,)", "--config.asbq.epochs=(1,)", "--config.asbq.learning_rates=(0.01,)"),
    ),
    "recu": Row("recu_resnet20", (*FEW_STEPS, "--config.recu.epochs=2", "--config.recu.warmup_epochs=1")),
    "weight_search 1b": Row(
        "weight_search_resnet20",
        (*FEW_STEPS, "--config.weight_search.epochs=(1,)", "--config.weight_search.values=1b"),
    ),
    "weight_search 3 values": Row(
        "weight_search_resnet20",
        (*FEW_STEPS, "--config.weight_search.epochs=(1,)", "--config.weight_search.values=(-1.0,0.0,1.0)"),
    ),
    **{
        f"snn tau {tau}": Row(
            "snn_resnet20",
            (*FEW_STEPS, "--config.snn.teacher_epochs=1", "--config.snn.epochs=(1,)", f"--config.snn.tau={tau}"),
        )
        for tau in (9, 6, 5, 4)
    },
    "basq 2 bit": Row("basq_resnet20_cifar:smoke_real", ("--config.data.num_train=1280", "--config.data.num_eval=400")),
}


def experiment_of(row: Row, options: argparse.Namespace, workdir: Path) -> tuple[Any, RunFolder, Path | None]:
    """The experiment, its run folder and the checkpoint; trains where there is none and no finished run."""
    arguments = [
        "launch.py",
        f"--config=configs/{row.config.replace(':', '.py:', 1) if ':' in row.config else row.config + '.py'}",
        f"--config.data.data_dir={options.data_dir}",
        f"--workdir={workdir}",
        *row.options,
    ]
    if row.released is None and launch.main(arguments):
        raise SystemExit(f"training failed: {' '.join(arguments)}")
    config = validate(command_line.parse(arguments).config.to_dict())
    experiment = make_experiment(config)
    checkpoint = None if row.released is None else options.released / row.released
    return experiment, RunFolder(workdir, experiment.stages), checkpoint


def onnx_logits(path: Path, images: np.ndarray) -> np.ndarray | None:
    """Logits in onnxruntime, or None where it is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError:
        return None
    exported = artefact.load(path)
    model = interchange.to_onnx(exported.program, exported.weights)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    parts = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    return np.concatenate([session.run(None, {"images": part})[0] for part in parts])


def compare(name: str, row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Answers and bytes of one exported network."""
    workdir = options.workdir / name.replace(" ", "_")
    experiment, folder, checkpoint = experiment_of(row, options, workdir)
    found = read_stage(experiment, folder, stage_name=row.stage, checkpoint=checkpoint)
    # All images, whatever the training's own evaluation saw.
    source = load_images(experiment.config, only_test(dataclasses.replace(found.stage.data, num_eval=None)))
    labels = np.asarray(source.test.labels)
    images = (np.asarray(source.test.images, np.float32) / np.float32(255) - source.mean) / source.std
    images = images.astype(np.float32)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "network.bnn"
    written = export_stage(experiment, folder, stage_name=row.stage, checkpoint=checkpoint, output=path)
    answer = functools.partial(
        outputs_of,
        found.network,
        found.variables,
        source.test,
        part="logits",
        prepare=functools.partial(prepare_eval, mean=source.mean, std=source.std),
        batch_size=BATCH,
        devices=all_devices(),
        choice=evaluated_choice(found.stage, found.network, folder),
    )
    logits = answer()
    jax.clear_caches()
    with mock.patch.object(convolution, "choice", lambda _: "xla"):
        by_xla = answer()
    jax.clear_caches()
    others = {
        "training_by_xla": by_xla,
        "packed": load(path).logits(images),
        "jax": load(path, backend="jax").logits(images),
        "onnxruntime": onnx_logits(path, images),
    }
    answers = logits.argmax(axis=1)
    differ = {
        f"{other}_differ": None if each is None else int((each.argmax(axis=1) != answers).sum())
        for other, each in others.items()
    }
    quantized = [layer["file_bytes"] for layer in written["layers"] if layer["predicted_bytes"] is not None]
    return {
        "network": name,
        "config": row.config,
        "options": list(row.options),
        "released": row.released,
        "top1": 100 * float((answers == labels).mean()),
        "answers": len({*answers.tolist()}),
        "images": len(images),
        **differ,
        "largest_difference": max(float(np.abs(each - logits).max()) for each in others.values() if each is not None),
        "logits_spread": float(logits.std()),
        "quantized_bytes": sum(quantized),
        "predicted_bytes": written["predicted_bytes"],
        "file_bytes": written["file_bytes"],
        # Weights, codebooks and all floats, by the summary.
        "summary_bytes": complexity(found.network, source.image_shape).total.stored_bits // 8,
    }


def snn_size(tau: int) -> dict[str, Any]:
    """Bits of the indices of SNN's ResNet-18 for ImageNet, as they lie in its file, beside the published number."""
    quant = QuantSpec(weight=spec("codebook", tau=tau), act=spec("approx_sign"))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "network.bnn"
        artefact.save(path, *random_export(spec("reactnet18"), quant, 224), {})
        exported, file_bytes = artefact.load(path), path.stat().st_size
    patterns = {name: each for name, each in exported.weights.items() if isinstance(each, PatternWeights)}
    stored = sum(exported.bytes_by_layer[name] for name in patterns)
    codebooks = sum(0 if each.all_patterns else -(-each.levels.size // 8) for each in patterns.values())
    return {
        "tau": tau,
        "published_mbit": SNN_MBIT[tau],
        "index_bits": 8 * (stored - codebooks),
        "codebook_bytes": codebooks,
        "file_bytes": file_bytes,
    }


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Prints rows as a table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=240).print(table)


def missed(rows: list[dict[str, Any]], sizes: list[dict[str, Any]]) -> list[str]:
    """What is not as it should be."""
    found = [
        f"{row['network']}: {row[key]} answers of {key.removesuffix('_differ')} differ"
        for row in rows
        for key in ("packed_differ", "jax_differ", "onnxruntime_differ")
        if row[key]
    ]
    found += [
        f"{row['network']}: {row['quantized_bytes']} bytes of weights, predicted are {row['predicted_bytes']}"
        for row in rows
        if row["quantized_bytes"] != row["predicted_bytes"]
    ]
    found += [
        f"{row['network']}: a file of {row['file_bytes']} bytes, the summary has {row['summary_bytes']}"
        for row in rows
        if row["file_bytes"] > 1.02 * row["summary_bytes"] + DESCRIPTION_BYTES
    ]
    return found + [
        f"SNN tau {row['tau']}: {row['index_bits']} bits of indices, published are {row['published_mbit']} Mbit"
        for row in sizes
        if f"{row['index_bits'] / 1e6:.4g}" != f"{row['published_mbit']:.4g}"
    ]


def main() -> int:
    """Compares every network, prints the tables and what is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of prepared data with CIFAR-10")
    parser.add_argument("--released", type=Path, required=True, help="folder of the released checkpoints")
    parser.add_argument("--workdir", type=Path, default=Path("runs/deployment"))
    parser.add_argument("--only", default="", help="beginnings of the networks' names; default: all")
    parser.add_argument("--json", type=Path, help="file for the rows and where they come from")
    options = parser.parse_args()
    chosen = tuple(options.only.split(","))
    rows = [compare(name, row, options) for name, row in ROWS.items() if name.startswith(chosen)]
    sizes = [snn_size(tau) for tau in SNN_MBIT]
    show(
        [{k: v for k, v in row.items() if k not in ("config", "options", "released")} for row in rows],
        "answers and bytes",
    )
    show(sizes, "SNN ResNet-18, ImageNet")
    problems = missed(rows, sizes)
    if options.json:
        where = {"instruction_set": getattr(native.choose(), "name", "numpy"), **provenance()}
        options.json.write_text(
            json.dumps({**where, "networks": rows, "snn_resnet18": sizes, "missed": problems}, indent=1)
        )
    print("\n".join(problems) or "every answer and every size is as it should be")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
