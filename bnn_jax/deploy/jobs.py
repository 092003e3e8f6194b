"""What ``launch.py`` does with an exported file alone, without a config and without jax."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnn_jax.deploy.artefact import load
from bnn_jax.deploy.classifier import Classifier
from bnn_jax.deploy.pictures import read
from bnn_jax.errors import UserError


def is_exported(checkpoint: str | Path | None) -> bool:
    """Whether ``--checkpoint`` names an exported file."""
    return checkpoint is not None and str(checkpoint).endswith(".bnn")


def predict(classifier: Classifier, images: Sequence[str], *, top: int = 5) -> dict[str, Any]:
    """The likeliest classes of pictures.

    Returns:
      ``predictions``: for each picture its path and, likeliest first, names and probabilities.

    Raises:
      UserError: no picture is given, or one cannot be read.
    """
    if not images:
        raise UserError("--mode=predict: no picture is given; name files behind the options")
    pixels = read(images, classifier.facts, classifier.image_shape)
    rows = [
        {"image": str(path), "classes": [{"name": name, "probability": value} for name, value in found]}
        for path, found in zip(images, classifier.predict(pixels, top=top), strict=True)
    ]
    return {"predictions": rows}


def summary(path: Path) -> dict[str, Any]:
    """Stored bytes of each layer of an exported file, beside what the network's description predicted.

    Raises:
      ArtefactError: the file is missing or damaged.
    """
    exported = load(path)
    predicted = exported.facts.get("predicted_bytes", {})
    layers = [
        {
            "layer": name,
            "kernel_shape": list(weights.shape),
            "predicted_bytes": predicted.get(name),
            "file_bytes": exported.bytes_by_layer[name],
        }
        for name, weights in exported.weights.items()
    ]
    facts = {name: exported.facts.get(name) for name in ("network", "method", "stage", "accuracy")}
    weights_bytes = sum(exported.bytes_by_layer.values())
    return {**facts, "layers": layers, "weights_bytes": weights_bytes, "file_bytes": path.stat().st_size}
