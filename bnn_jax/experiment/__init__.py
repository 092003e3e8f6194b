"""Experiments: a config becomes stages, stages are built, trained, evaluated and reported.

    from bnn_jax import experiment

    config = experiment.load_config("quickstart")
    experiment.train(config, "runs/quickstart")
    experiment.report(config, "runs/quickstart")

The functions do what the modes of ``launch.py`` do: they print the same tables, and return what ``--json`` prints. A
mistake raises ``bnn_jax.errors.UserError``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

# jax is imported by the first function that needs it: the files of configs/ import this package too.
if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from bnn_jax.experiment.build import Experiment
    from bnn_jax.experiment.folder import RunFolder

__all__ = ["evaluate", "export", "load_config", "report", "summary", "train"]

Place = str | Path | None


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> "ConfigDict":
    """A config by its name ('quickstart', 'skd_resnet20:smoke') or the path of its file.

    Args:
      name: name of a file in configs/, or a path; behind a colon 'smoke' or 'smoke_real'.
      overrides: values by dotted key, such as ``{"asbq.epochs": (2,)}``; the config itself can be changed as well.

    Raises:
      UserError: there is no such file, or no such key.
    """
    from bnn_jax.experiment import config

    return config.named(name, overrides or {})


def train(config: "ConfigDict", workdir: Place = None, *, stage: str | None = None, fresh: bool = False) -> dict:
    """Trains what is left of a run: finished stages are skipped, an interrupted one goes on.

    Args:
      config: from ``load_config``.
      workdir: run folder; None: ``runs/<config.name>``.
      stage: train this stage and all after it again.
      fresh: move an existing run folder aside first.

    Returns:
      ``stages``, the result of each; of a search ``winners`` too.
    """
    from bnn_jax.experiment import jobs

    return jobs.train(*_opened(config, workdir), stage=stage, fresh=fresh)


def evaluate(
    config: "ConfigDict", workdir: Place = None, *, stage: str | None = None, checkpoint: Place = None
) -> dict[str, Any]:
    """Accuracy on the test images.

    Args:
      config: from ``load_config``.
      workdir: run folder; None: ``runs/<config.name>``.
      stage: 'w4a4' or 'w4a4@best'; None: the last finished one.
      checkpoint: a file instead of a stage: of PyTorch's, or an exported one.

    Returns:
      ``top1`` and ``top5`` in percent, ``loss``, ``num_images``.
    """
    from bnn_jax.experiment import jobs

    return jobs.evaluate(*_opened(config, workdir), stage=stage, checkpoint=_path(checkpoint))


def summary(config: "ConfigDict", *, stage: str | None = None) -> dict[str, Any]:
    """Parameters, stored bits and bit operations of a stage's network; None is the last stage.

    Returns:
      ``layers`` and their ``total``.
    """
    from bnn_jax.experiment import jobs

    return jobs.summary(_opened(config, None)[0], stage=stage)


def report(config: "ConfigDict | None" = None, workdir: Place = None) -> dict[str, Any]:
    """Table and pictures of the finished stages of a run; without a config the tables and plots of the project.

    Args:
      config: from ``load_config``; None: everything that the documents of the project show of ``results/``.
      workdir: run folder, None: ``runs/<config.name>``; without a config the folder of the project, None: this one.

    Returns:
      ``pictures``, paths of what was drawn; ``stages``, the results, or ``changed``, the documents.
    """
    from bnn_jax.experiment import jobs

    if config is None:
        return jobs.report_project(Path(workdir or "."))
    return jobs.report(*_opened(config, workdir))


def export(
    config: "ConfigDict",
    workdir: Place = None,
    *,
    stage: str | None = None,
    checkpoint: Place = None,
    output: Place = None,
    form: str = "bnn",
) -> dict[str, Any]:
    """The network of a stage or a checkpoint as a small file that classifies; ``bnn_jax.deploy.load`` reads it.

    Args:
      config: from ``load_config``.
      workdir: run folder; None: ``runs/<config.name>``.
      stage: 'w4a4' or 'w4a4@best'; None: the last finished one.
      checkpoint: a file instead of a stage.
      output: file to write; None: in the folder of the stage, or beside the checkpoint.
      form: 'bnn', or with float weights 'stablehlo' or 'onnx'.

    Returns:
      ``path`` and ``file_bytes``; of 'bnn' the bytes of every layer too.
    """
    from bnn_jax.experiment import jobs

    paths = {"checkpoint": _path(checkpoint), "output": _path(output)}
    return jobs.export(*_opened(config, workdir), stage=stage, form=form, **paths)


def _opened(config: "ConfigDict", workdir: Place) -> tuple["Experiment", "RunFolder"]:
    """The experiment of a config, and its run folder."""
    from bnn_jax.experiment.build import make_experiment
    from bnn_jax.experiment.config import validate
    from bnn_jax.experiment.folder import RunFolder

    experiment = make_experiment(validate(config.to_dict()))
    return experiment, RunFolder(Path(workdir or Path("runs") / str(config.name)), experiment.stages)


def _path(place: Place) -> Path | None:
    return None if place is None else Path(place)
