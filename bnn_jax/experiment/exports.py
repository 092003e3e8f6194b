"""A stage's network as a file that classifies by itself, and its accuracy."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnn_jax import data
from bnn_jax.data.memory import ImageSource, Normalization, Split
from bnn_jax.deploy import Classifier, artefact
from bnn_jax.deploy.export import export
from bnn_jax.deploy.interchange import to_onnx, to_stablehlo
from bnn_jax.errors import UserError
from bnn_jax.experiment.build import Experiment
from bnn_jax.experiment.evaluation import StageVariables, evaluated_choice, only_test, read_stage
from bnn_jax.experiment.folder import RunFolder
from bnn_jax.experiment.load import load_images, normalization_of
from bnn_jax.quantizers.base import evaluation_context
from bnn_jax.report.costs import complexity

CONVERTERS: dict[str, Callable[..., bytes]] = {"stablehlo": to_stablehlo, "onnx": to_onnx}


def export_stage(
    experiment: Experiment,
    folder: RunFolder,
    *,
    stage_name: str | None = None,
    checkpoint: Path | None = None,
    output: Path | None = None,
    form: str = "bnn",
) -> dict[str, Any]:
    """Writes the network of a stage, or of a checkpoint, to a file.

    Args:
      experiment: the experiment.
      folder: its run folder; not looked at when ``checkpoint`` is given.
      stage_name: 'w4a4' or 'w4a4@best'; None is the last stage (with a checkpoint) or the last finished one.
      checkpoint: file of one network's variables, or folder of saved ones.
      output: the file; None: '<stage>.bnn' in the stage's folder, or beside the checkpoint.
      form: 'bnn', or a key of ``CONVERTERS``, whose weights are floats.

    Returns:
      ``stage``, ``path`` and ``file_bytes``; of 'bnn' also ``weights_bytes``, ``predicted_bytes`` of all layers, and
      ``layers``.

    Raises:
      UserError: nothing to export, or something that files do not have.
    """
    if experiment.config["num_seeds"] > 1:
        raise UserError(f"config.num_seeds={experiment.config['num_seeds']}: accepted with --mode=export is 1")
    found = read_stage(experiment, folder, stage_name=stage_name, checkpoint=checkpoint)
    if output is None:
        beside = folder.stage(found.stage.name) if checkpoint is None else checkpoint.parent
        output = beside / f"{found.stage.name}.{form}"
    if form != "bnn":
        return {"stage": found.stage.name, **_convert(experiment, folder, found, output, form)}
    written = _write(experiment, folder, found, output)
    predicted = written.facts["predicted_bytes"]
    layers = [
        {"layer": name, "predicted_bytes": predicted.get(name), "file_bytes": size}
        for name, size in written.bytes_by_layer.items()
    ]
    return {
        "stage": found.stage.name,
        "path": str(output),
        "file_bytes": output.stat().st_size,
        "weights_bytes": sum(written.bytes_by_layer.values()),
        "predicted_bytes": sum(predicted.values()),
        "layers": layers,
    }


def _convert(
    experiment: Experiment, folder: RunFolder, found: StageVariables, output: Path, form: str
) -> dict[str, Any]:
    """Writes another format than our own."""
    with tempfile.TemporaryDirectory() as place:
        written = _write(experiment, folder, found, Path(place) / "network.bnn")
    content = CONVERTERS[form](written.program, written.weights)
    try:
        output.write_bytes(content)
    except OSError as error:
        raise UserError(f"--output={output}: {error.strerror}") from None
    return {"path": str(output), "file_bytes": len(content)}


def _write(experiment: Experiment, folder: RunFolder, found: StageVariables, output: Path) -> artefact.Artefact:
    stage, config = found.stage, experiment.config
    one_image = dataclasses.replace(only_test(stage.data), num_eval=1)
    source = load_images(config, one_image, normalization_of(experiment, folder, stage) if found.trained_here else None)
    choice = evaluated_choice(stage, found.network, folder)
    context = evaluation_context(found.variables, choice=None if choice is None else jnp.asarray(choice, jnp.int32))
    costs = complexity(found.network, source.image_shape)
    predicted = {
        layer.path: -(-layer.quantized_bits // 8) + -(-layer.codebook_bits // 8)
        for layer in costs.layers
        if layer.quantized
    }
    result = folder.result(stage.name) if found.trained_here else None
    facts = {
        "network": stage.network.name,
        "method": config["method"],
        "stage": stage.name,
        "run": config["name"],
        "source": found.path.name,
        "accuracy": None if result is None else {key: result.get(key) for key in ("last_top1", "best_top1")},
        "classes": list(data.class_names(stage.data, data_dir=config["data"]["data_dir"])),
        "mean": list(source.mean),
        "std": list(source.std),
        "crop_margin": source.crop_margin,
        "predicted_bytes": predicted,
    }
    return export(output, found.network, found.variables, source.image_shape, facts=facts, context=context)


def evaluate_exported(experiment: Experiment, path: Path, *, stage_name: str | None) -> dict[str, Any]:
    """Accuracy of an exported file on the test images.

    Raises:
      UserError: the file is damaged, or reads other images.
    """
    classifier = Classifier(artefact.load(path))
    stage = experiment.find((stage_name or "").partition("@")[0]) if stage_name else experiment.stages[-1]
    # The file normalises the pixels itself; a folder's need not be measured.
    identity = Normalization((0.0,) * 3, (1.0,) * 3)
    source = load_images(experiment.config, only_test(stage.data), identity)
    if source.image_shape != classifier.image_shape or source.num_classes != len(classifier.classes):
        raise UserError(
            f"--checkpoint={path}: it reads images of {'x'.join(map(str, classifier.image_shape))} in "
            f"{len(classifier.classes)} classes; the config's are of {'x'.join(map(str, source.image_shape))} in "
            f"{source.num_classes}"
        )
    return {**_accuracy(classifier, source, experiment), "stage": stage.name, "checkpoint": str(path)}


def _accuracy(classifier: Classifier, source: ImageSource, experiment: Experiment) -> dict[str, Any]:
    test, size = source.test, experiment.config["train"]["eval_batch_size"]
    plan = [np.arange(start, min(start + size, len(test))) for start in range(0, len(test), size)]
    if isinstance(test, Split):
        batches = ((test.images[rows], test.labels[rows]) for rows in plan)
    else:
        batches = (next(test.batches(rows[None])) for rows in plan)
    hits, top5, loss = 0, 0, 0.0
    for images, labels in batches:
        logits = classifier.logits(images).astype(np.float64)
        own = logits[np.arange(len(labels)), labels]
        rank = (logits > own[:, None]).sum(axis=1)
        hits, top5 = hits + int((rank == 0).sum()), top5 + int((rank < 5).sum())
        highest = logits.max(axis=1)
        loss += float((np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest - own).sum())
    count = len(test)
    return {"top1": 100 * hits / count, "top5": 100 * top5 / count, "loss": loss / count, "num_images": count}
