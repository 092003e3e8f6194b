"""What is written of a finished stage: ``result.json``, the record as a table, the weights in use."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from bnn_jax import run_files
from bnn_jax.data.memory import ImageSource
from bnn_jax.experiment.build import Experiment, described_network, seeds_of
from bnn_jax.experiment.folder import METRICS_TABLE, RunFolder, provenance, weights_file
from bnn_jax.experiment.load import SavedVariables
from bnn_jax.ops import convolution
from bnn_jax.report.costs import complexity, levels_in_use
from bnn_jax.search.results import combined, correlation, statistics
from bnn_jax.stages import Stage, fingerprint, parse_choice
from bnn_jax.storage.weights import encoded_weights, is_sound, save_weights
from bnn_jax.training import metrics
from bnn_jax.training.devices import describe_devices
from bnn_jax.training.loop import Setup
from bnn_jax.training.progress import say
from bnn_jax.training.seeds import Seeds, table_row
from bnn_jax.training.state import TrainState


def finish(experiment: Experiment, folder: RunFolder, setup: Setup, state: TrainState) -> dict[str, Any]:
    """Writes what people and other programs read of a trained stage; returns the content of ``result.json``."""
    stage, seeds = setup.stage, setup.seeds
    records = metrics.read(folder.metrics(stage.name))
    each = seeds.unstack(jax.device_get(state.variables))
    _write_table(folder, stage, records)
    _write_weights(folder, stage, seeds, setup.network, each, setup.source.image_shape)
    return {
        **described_run(experiment, stage, setup.source),
        **_result(setup, records, each),
        **(_winner(experiment, folder, setup, records) if stage.trains_winner else {}),
        **(_of_seeds(records) if seeds.count > 1 else {}),
    }


def remake(experiment: Experiment, folder: RunFolder, stage: Stage, result: Mapping[str, Any]) -> None:
    """Writes the table and the weights in use of a finished stage anew where they are missing, or the weights damaged.

    Args:
      experiment: the experiment.
      folder: its run folder.
      stage: a stage that was trained.
      result: its result.

    Raises:
      UserError: what they are made from is missing or damaged.
    """
    where, seeds = folder.stage(stage.name), seeds_of(experiment, stage)
    if not (where / METRICS_TABLE).exists():
        _write_table(folder, stage, metrics.read(folder.metrics(stage.name), epochs=result["epochs"]))
        say(f"stage {stage.name}: wrote {METRICS_TABLE} anew from the record")
    # Without quantized weights there is no such file.
    if result.get("level_bits") is None or all(is_sound(where / name) for name in _weights_files(seeds)):
        return
    network, shapes = described_network(experiment, stage)
    variables = SavedVariables(experiment, folder).load(f"stage:{stage.name}", shapes, seeds)
    each = seeds.unstack(jax.device_get(variables))
    _write_weights(folder, stage, seeds, network, each, experiment.describe(stage)[0])
    say(f"stage {stage.name}: wrote {', '.join(_weights_files(seeds))} anew from the last checkpoint")


def _write_table(folder: RunFolder, stage: Stage, records: list[dict[str, Any]]) -> None:
    metrics.write_csv([table_row(record) for record in records], folder.stage(stage.name) / METRICS_TABLE)


def _weights_files(seeds: Seeds) -> list[str]:
    return [weights_file(seed if seeds.count > 1 else None) for seed in seeds.names]


def _write_weights(
    folder: RunFolder,
    stage: Stage,
    seeds: Seeds,
    network: Any,
    each: Sequence[Mapping[str, Any]],
    image_shape: tuple[int, int, int],
) -> None:
    """Writes the weights in use of each seed, if there are any."""
    for name, variables in zip(_weights_files(seeds), each, strict=True):
        if encoded := encoded_weights(network, variables, image_shape):
            save_weights(folder.stage(stage.name) / name, encoded)


def described_run(experiment: Experiment, stage: Stage, source: ImageSource) -> dict[str, Any]:
    """What the result of every stage says about where it comes from."""
    return {
        "stage": stage.name,
        "bits": stage.bits,
        "seed": experiment.config["seed"],
        "data": stage.data.name,
        "data_fingerprint": source.fingerprint,
        "data_mean": list(source.mean),
        "data_std": list(source.std),
        "stage_fingerprint": fingerprint(stage, experiment.stages),
        "device": describe_devices(),
        "cpu_kernels": convolution.choice(experiment.cpu_kernels),
        **provenance(),
    }


def best_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the best epoch: on held-out images where there are some, of equal ones the first."""
    name = f"{_selection(records)}_top1"
    return max(records, key=lambda record: (record[name], -record["epoch"]))


def _selection(records: list[dict[str, Any]]) -> str:
    return "validation" if "validation_top1" in records[-1] else "test"


def _result(setup: Setup, records: list[dict[str, Any]], each: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies and sizes: last epoch first, best beside it with how it was chosen.

    Args:
      setup: the stage.
      records: its record.
      each: the variables of each seed.
    """
    source, last, best = setup.source, records[-1], best_of(records)
    # What is left of a supernet when its winner is known has one branch.
    network = setup.network.clone(branches=1) if setup.stage.trains_winner else setup.network
    costs = complexity(network, source.image_shape).total
    in_use = [levels_in_use(setup.network, variables, source.image_shape) for variables in each]
    return {
        "last_top1": last["test_top1"],
        "best_top1": best["test_top1"],
        "best_epoch": best["epoch"],
        "selection": _selection(records),
        "last_top5": last["test_top5"],
        "last_loss": last["test_loss"],
        "epochs": len(records),
        "steps": last["step"],
        "num_train": len(source.train),
        "num_test": len(source.test),
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "images_per_second": round(sorted(record["images_per_second"] for record in records)[len(records) // 2], 1),
        "quantized_weight_bits": costs.quantized_bits,
        "stored_bits": costs.stored_bits,
        "level_bits": max((bits for layers in in_use for _, bits in layers.values()), default=None),
        "parameters": costs.parameters,
    }


def _of_seeds(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the result of several seeds says besides: standard deviations of its means, and the values of each seed."""
    last = records[-1]
    names = {"last_top1": "test_top1", "last_top5": "test_top5", "last_loss": "test_loss"}
    return {
        "num_seeds": len(last["seeds"]),
        **{f"{name}_sd": last[f"{key}_sd"] for name, key in names.items()},
        "best_top1_sd": best_of(records)["test_top1_sd"],
        "seeds": [
            {
                "seed": row["seed"],
                "last_top1": row["test_top1"],
                "best_top1": max(record["seeds"][index]["test_top1"] for record in records),
                "last_loss": row["test_loss"],
            }
            for index, row in enumerate(last["seeds"])
        ],
    }


def _winner(experiment: Experiment, folder: RunFolder, setup: Setup, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the result of a fine-tuned winner says besides: its path, and its accuracies in and outside of its fold."""
    choice, network = setup.stage.choice, setup.network
    assert choice is not None
    found = folder.winner(choice, run_files.vector(len(network.branch_patterns), network.branches))
    options = experiment.find(parse_choice(choice)[0]).search.kwargs  # type: ignore[union-attr]
    outside = [record["others_top1"] for record in records]
    best = options["report_epoch"] == "best"
    return {
        **{name: found[name] for name in ("fold", "path", "fold_top1", "full_top1")},
        "folds": options["folds"],
        "search_on": options["search_on"],
        # As released: of the values before fine-tuning and after each of its epochs.
        "tuned_top1": max(found["full_top1"], *outside) if best else outside[-1],
    }


def winners(folder: RunFolder) -> dict[str, Any] | None:
    """What came of the winners of a search, as far as they are fine-tuned; None where there is none.

    Returns:
      ``rows``, one for each fold: ``fold``, ``path``, ``fold_top1``, ``full_top1``, ``tuned_top1``, ``combined_top1``,
      ``test_top1``; ``statistics`` of each accuracy; ``correlation`` of ``fold_top1`` and ``tuned_top1``.
    """
    results = [folder.result(stage.name) for stage in folder.stages if stage.trains_winner]
    tuned = [result for result in results if result is not None]
    if not tuned:
        return None
    rows = [
        {
            "fold": result["fold"],
            "path": result["path"],
            "fold_top1": result["fold_top1"],
            "full_top1": result["full_top1"],
            "tuned_top1": result["tuned_top1"],
            "combined_top1": combined(result["fold_top1"], result["full_top1"], folds=result["folds"]),
            "test_top1": result["last_top1"],
        }
        for result in tuned
    ]
    names = ("fold_top1", "full_top1", "tuned_top1", "combined_top1", "test_top1")
    columns = {name: [row[name] for row in rows] for name in names}
    return {
        "rows": rows,
        "statistics": {name: dataclasses.asdict(statistics(values)) for name, values in columns.items()},
        "correlation": correlation(columns["fold_top1"], columns["tuned_top1"]),
    }
