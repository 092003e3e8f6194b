"""Classes of pictures, by a stage of the run or a checkpoint."""

import tempfile
from pathlib import Path

from bnn_jax.deploy import Classifier, load
from bnn_jax.experiment.build import Experiment
from bnn_jax.experiment.exports import export_stage
from bnn_jax.experiment.folder import RunFolder


def classifier_of(
    experiment: Experiment, folder: RunFolder, *, stage_name: str | None = None, checkpoint: Path | None = None
) -> Classifier:
    """A classifier of the network of a stage or of a checkpoint, which is exported for it.

    Raises:
      UserError: there is no such network, or something in it that files do not have.
    """
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "network.bnn"
        export_stage(experiment, folder, stage_name=stage_name, checkpoint=checkpoint, output=path)
        return load(path)
