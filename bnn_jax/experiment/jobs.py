"""What ``launch.py`` does in each of its modes: the job, its tables on standard output, and its result as plain values.

The functions of ``bnn_jax.experiment`` are these, from a config.
"""

from pathlib import Path
from typing import Any

from bnn_jax import hosts
from bnn_jax.deploy import jobs as deploy_jobs
from bnn_jax.experiment.build import Experiment
from bnn_jax.experiment.evaluation import evaluate as evaluate_stage
from bnn_jax.experiment.exports import evaluate_exported, export_stage
from bnn_jax.experiment.folder import RunFolder
from bnn_jax.experiment.predict import classifier_of
from bnn_jax.experiment.reports import report as report_stages
from bnn_jax.experiment.results import winners
from bnn_jax.experiment.summaries import summary as costs_of
from bnn_jax.experiment.training import train as train_stages
from bnn_jax.report import classes, tables


def train(
    experiment: Experiment,
    folder: RunFolder,
    *,
    stage: str | None = None,
    fresh: bool = False,
    group: hosts.Group | None = None,
) -> dict[str, Any]:
    """Trains what is left; shows the stages before and the results after it. Only the first process shows anything.

    Returns:
      ``stages``, the results; ``winners`` of a search.
    """
    if hosts.is_first():
        tables.show(tables.stages_table(experiment.stages))
    result = {"stages": train_stages(experiment, folder, from_stage=stage, fresh=fresh, group=group)}
    if hosts.is_first():
        tables.show(tables.results_table(result["stages"]))
        _show_winners(folder, result)
    return result


def evaluate(
    experiment: Experiment, folder: RunFolder, *, stage: str | None = None, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Accuracy of a stage, a checkpoint or an exported file; of several seeds a line for each."""
    if deploy_jobs.is_exported(checkpoint):
        assert checkpoint is not None
        result = evaluate_exported(experiment, checkpoint, stage_name=stage)
    else:
        result = evaluate_stage(experiment, folder, stage_name=stage, checkpoint=checkpoint)
    if hosts.is_first():
        name = stage or result["stage"]
        for row in result.get("seeds", ()):
            print(f"{name}, seed {row['seed']}: {_evaluated(row)}")
        several = f", mean of {len(result['seeds'])} seeds" if "seeds" in result else ""
        print(f"{name}{several}: {_evaluated(result)}  ({result['num_images']:,} images, {result['checkpoint']})")
    return result


def _evaluated(result: dict[str, Any]) -> str:
    """Accuracies and loss of an evaluation, with standard deviations where there are any."""

    def number(name: str, digits: int) -> str:
        deviation = result.get(f"{name}_sd")
        return f"{result[name]:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")

    return f"top-1 {number('top1', 2)} %  top-5 {number('top5', 2)} %  loss {number('loss', 4)}"


def summary(experiment: Experiment, *, stage: str | None = None) -> dict[str, Any]:
    """Costs of a stage's network, layer by layer; None is the last stage."""
    costs = costs_of(experiment, stage_name=stage)
    tables.show(tables.costs_table(costs))
    return {"stage": stage or experiment.stages[-1].name, **costs.to_json()}


def report(experiment: Experiment, folder: RunFolder) -> dict[str, Any]:
    """Table and pictures of the finished stages."""
    result = report_stages(experiment, folder)
    tables.show(tables.results_table(result["stages"]))
    _show_winners(folder, result)
    if "classes" in result:
        tables.show(classes.classes_table(result["classes"], stage=result["classified_by"]))
    for path in result["pictures"]:
        print(f"picture: {path}")
    for path in result.get("numbers", ()):
        print(f"numbers: {path}")
    return result


def _show_winners(folder: RunFolder, result: dict[str, Any]) -> None:
    """Shows the winners of a search, if there are any, and adds them to the result."""
    found = winners(folder)
    if found is not None:
        tables.show(tables.winners_table(found))
        result["winners"] = found


def report_project(root: Path) -> dict[str, Any]:
    """Tables and plots of the project's documents, made anew from its result files.

    Returns:
      ``changed``, the documents that have changed; ``pictures``, all that were drawn.

    Raises:
      UserError: it is no folder of the project, or a result is incomplete.
    """
    from bnn_jax.report import documents, result_plots

    changed = documents.rewrite(root)
    pictures = result_plots.draw(root)
    for path in changed:
        print(f"written anew: {path}")
    for path in pictures:
        print(f"picture: {path}")
    return {"changed": list(map(str, changed)), "pictures": list(map(str, pictures))}


def export(
    experiment: Experiment,
    folder: RunFolder,
    *,
    stage: str | None = None,
    checkpoint: Path | None = None,
    output: Path | None = None,
    form: str = "bnn",
) -> dict[str, Any]:
    """The network of a stage or a checkpoint as a file that classifies; shows the bytes of its layers."""
    result = export_stage(experiment, folder, stage_name=stage, checkpoint=checkpoint, output=output, form=form)
    if "layers" in result:
        tables.show(tables.stored_table(result))
    print(f"{result['path']}: {result['file_bytes']:,} bytes")
    return result


def predict(
    experiment: Experiment,
    folder: RunFolder,
    images: list[str],
    *,
    stage: str | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Classes of pictures by a stage or a checkpoint."""
    classifier = classifier_of(experiment, folder, stage_name=stage, checkpoint=checkpoint)
    result = deploy_jobs.predict(classifier, images)
    tables.show(tables.predictions_table(result["predictions"]))
    return result
