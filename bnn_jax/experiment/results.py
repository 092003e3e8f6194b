"""What is written of a finished stage: ``result.json``, the record as a table, the weights in use."""

from pathlib import Path
from typing import Any

import jax

from bnn_jax.experiment import folder as run_folder
from bnn_jax.experiment import search
from bnn_jax.experiment.build import (
    Assembly,
    Run,
)
from bnn_jax.report.costs import complexity, levels_in_use
from bnn_jax.stages import Stage, fingerprint, parse_choice
from bnn_jax.storage.weights import encoded_weights, save_weights
from bnn_jax.training import metrics, seeds
from bnn_jax.training.state import TrainState


def finish(run: Run, assembly: Assembly, state: TrainState, folder: Path) -> dict[str, Any]:
    """Writes what people and other programs read; returns the content of ``result.json``."""
    group = run.seeds_of(assembly.stage)
    each = dict(zip(group.names, group.unstack(jax.device_get(state.variables)), strict=True))
    result = _result(run, assembly, list(each.values()))
    _save_for_people(assembly, each, folder)
    return result


def _save_for_people(assembly: Assembly, each: dict[int, dict[str, Any]], folder: Path) -> None:
    """The record as a table, and the weights in use after the last epoch of each seed, for other programs to read."""
    records = [seeds.table_row(record) for record in metrics.read(folder / run_folder.METRICS)]
    metrics.write_csv(records, folder / run_folder.METRICS_TABLE)
    for seed, variables in each.items():
        encoded = encoded_weights(assembly.network, variables, assembly.source.image_shape)
        if encoded:
            save_weights(folder / run_folder.weights_file(seed if len(each) > 1 else None), encoded)


def _result(run: Run, assembly: Assembly, each: list[dict[str, Any]]) -> dict[str, Any]:
    """Content of ``result.json``: last epoch first, best beside it with how it was chosen.

    Args:
      run: the run.
      assembly: the stage.
      each: the variables of each seed.
    """
    stage, source = assembly.stage, assembly.source
    records = metrics.read(run.stage_folder(stage) / run_folder.METRICS)
    selection = "validation" if source.validation is not None else "test"
    best = max(records, key=lambda record: (record[f"{selection}_top1"], -record["epoch"]))
    last = records[-1]
    # What is left of a supernet when its winner is known has one branch.
    network = assembly.network.clone(branches=1) if is_winner(stage) else assembly.network
    costs = complexity(network, source.image_shape)
    in_use = [levels_in_use(assembly.network, variables, source.image_shape) for variables in each]
    device = jax.devices()[0]
    return {
        "stage": stage.name,
        "bits": stage.bits,
        "last_top1": last["test_top1"],
        "best_top1": best["test_top1"],
        "best_epoch": best["epoch"],
        "selection": selection,
        "last_top5": last["test_top5"],
        "last_loss": last["test_loss"],
        "epochs": len(records),
        "steps": last["step"],
        "seed": run.config["seed"],
        "data": stage.data.name,
        "num_train": len(source.train),
        "num_test": len(source.test),
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "images_per_second": round(sorted(record["images_per_second"] for record in records)[len(records) // 2], 1),
        "quantized_weight_bits": costs.total.quantized_bits,
        "stored_bits": costs.total.stored_bits,
        "level_bits": max((bits for layers in in_use for _, bits in layers.values()), default=None),
        "parameters": costs.total.parameters,
        "data_fingerprint": source.fingerprint,
        "stage_fingerprint": fingerprint(stage, run.stages),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        **(_winner(run, stage, records) if is_winner(stage) else {}),
        **(_of_seeds(records, best) if run.num_seeds > 1 else {}),
        **run_folder.provenance(),
    }


def _of_seeds(records: list[dict[str, Any]], best: dict[str, Any]) -> dict[str, Any]:
    """What the result of several seeds says besides: standard deviations of its means, and the values of each seed."""
    last = records[-1]
    names = {"last_top1": "test_top1", "last_top5": "test_top5", "last_loss": "test_loss"}
    return {
        "num_seeds": len(last["seeds"]),
        **{f"{name}_sd": last[f"{key}_sd"] for name, key in names.items()},
        "best_top1_sd": best["test_top1_sd"],
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


def is_winner(stage: Stage) -> bool:
    """Whether a stage trains one path of a supernet, that of a search's winner."""
    return stage.choice not in (None, "uniform")


def _winner(run: Run, stage: Stage, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the result of a fine-tuned winner says besides: its path, and its accuracies in and outside of its fold."""
    assert stage.choice is not None
    found = run.fold_result(stage.choice)
    options = run.find(parse_choice(stage.choice)[0]).search.kwargs  # type: ignore[union-attr]
    outside = [record["others_top1"] for record in records]
    best = options["report_epoch"] == "best"
    return {
        **{name: found[name] for name in ("fold", "path", "fold_top1", "full_top1")},
        "folds": options["folds"],
        "search_on": options["search_on"],
        # As released: of the values before fine-tuning and after each of its epochs.
        "tuned_top1": max(found["full_top1"], *outside) if best else outside[-1],
    }


def winners(run: Run) -> dict[str, Any] | None:
    """What came of the folds of a search, as far as they are fine-tuned; None where there is none."""
    results = (run_folder.read_result(run.stage_folder(stage)) for stage in run.stages)
    return search.winners([result for result in results if result is not None])
