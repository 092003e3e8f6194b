"""From a trained network to a small file, and from the file to predictions.

Reading a file and classifying with it needs numpy and safetensors alone; exporting needs jax.
"""

from bnn_jax.deploy.artefact import Artefact, ArtefactError
from bnn_jax.deploy.classifier import Classifier, load

__all__ = ["Artefact", "ArtefactError", "Classifier", "load"]
