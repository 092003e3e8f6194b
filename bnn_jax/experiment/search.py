"""The stage that searches: evolution on one fold of the images after another, saved after every generation.

In the stage's folder: ``fold_<nn>.json``, the result of a finished fold, and ``state.json``, the search under way. A
killed search goes on with the generation that was under way and ends with the same archive. Of several processes each
keeps the same archive, from the same accuracies; the first one writes it.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnn_jax import hosts
from bnn_jax.data.augment import prepare_eval
from bnn_jax.data.memory import ImageSource
from bnn_jax.errors import Interrupted
from bnn_jax.experiment import folder as run_folder
from bnn_jax.experiment.build import Run, fold_path, folds_of, searched_split
from bnn_jax.search.evolution import Evolution, Settings, restored_rng, rng_state
from bnn_jax.search.folds import Folds
from bnn_jax.search.population import PopulationEvaluator
from bnn_jax.search.results import combined, correlation, statistics
from bnn_jax.stages import Stage, fingerprint
from bnn_jax.training.devices import all_devices
from bnn_jax.training.interrupt import StopRequest
from bnn_jax.training.progress import Progress, say

STATE = "state.json"
# Of the archive that a fold's result keeps.
ARCHIVE_KEPT = 50
# Paths per call where the config leaves it open.
PATHS_AT_ONCE = {"cpu": 5}
PATHS_AT_ONCE_ELSEWHERE = 15

Evaluate = Callable[[Sequence[Sequence[int]], np.ndarray], list[float] | None]


@dataclasses.dataclass
class FoldSearch:
    """The search on one fold under way.

    Attributes:
      fold: its number.
      evolution: candidates and archive.
      history: best path, its top-1 in the fold and outside of it, after every generation.
    """

    fold: int
    evolution: Evolution
    history: list[dict[str, Any]]

    def state(self) -> dict[str, Any]:
        """Content of ``state.json``."""
        return {"fold": self.fold, "evolution": self.evolution.state(), "history": self.history}

    def result(self) -> dict[str, Any]:
        """Content of ``fold_<nn>.json``."""
        ranking, last = self.evolution.ranking, self.history[-1]
        return {
            "fold": self.fold,
            "path": list(ranking[0][0]),
            "fold_top1": last["fold_top1"],
            "full_top1": last["full_top1"],
            "evaluations": len(ranking),
            "archive": [{"path": list(path), "fold_top1": 100 - error} for path, error in ranking[:ARCHIVE_KEPT]],
            "history": self.history,
            "rng": rng_state(self.evolution.rng),
        }


def search(run: Run, stage: Stage, stop: StopRequest) -> dict[str, Any]:
    """Searches what is left of the folds and returns the content of ``result.json``.

    Raises:
      Interrupted: asked to stop; every finished generation is saved.
    """
    source = run.load_data(stage)
    folder = run.stage_folder(stage)
    hosts.from_first("search folder", lambda: folder.mkdir(exist_ok=True))
    folds = folds_of(stage, source)
    settings = _settings(run, stage, source)
    done = [_read(folder / fold_path(fold)) for fold in range(folds.count)]
    evaluate = None if all(done) else _evaluator(run, stage, source, stop)
    started = time.monotonic()
    generations_done = sum(len(result["history"]) for result in done if result)
    total = folds.count * (settings.generations + 1)
    with Progress(stage.name, total=total, done=generations_done) as progress:
        for fold in range(folds.count):
            if done[fold] is None:
                under_way = _start(stage, settings, folder, fold, done[fold - 1] if fold else None)
                progress.skip(len(under_way.history))
                assert evaluate is not None  # made where a fold is left
                done[fold] = _search_fold(under_way, folds, evaluate, folder, progress, stop)
    return _result(run, stage, source, [result for result in done if result], time.monotonic() - started)


def _settings(run: Run, stage: Stage, source: ImageSource) -> Settings:
    assert stage.search is not None  # a stage of this kind has one
    names = {field.name for field in dataclasses.fields(Settings)}
    network = run.network(stage, num_classes=source.num_classes)
    chosen = {name: value for name, value in stage.search.kwargs.items() if name in names}
    return Settings(genes=len(network.branch_patterns), choices=network.branches, **chosen)


def _start(stage: Stage, settings: Settings, folder: Path, fold: int, before: Mapping[str, Any] | None) -> FoldSearch:
    """The search on a fold, from its saved state or from the beginning."""
    assert stage.search is not None
    state = _read(folder / STATE)
    if state is not None and state["fold"] == fold:
        generation = state["evolution"]["generation"]
        say(f"stage {stage.name}: fold {fold + 1} goes on after generation {generation}")
        return FoldSearch(fold, Evolution.from_state(settings, state["evolution"]), state["history"])
    options = stage.search.kwargs
    if options["one_random_stream"] and before is not None:
        rng = restored_rng(before["rng"])
    else:
        rng = np.random.RandomState(options["seed"] + (0 if options["one_random_stream"] else fold))
    return FoldSearch(fold, Evolution(settings, rng), [])


def _evaluator(run: Run, stage: Stage, source: ImageSource, stop: StopRequest) -> Evaluate:
    """Top-1 of paths on some images of the split that is searched on; None if asked to stop."""
    assert stage.init_from is not None  # the supernet
    devices = all_devices()
    network, variables = run.referenced(stage.init_from, source=source, default=stage)
    at_once = run.config["basq"]["paths_at_once"] or PATHS_AT_ONCE.get(jax.default_backend(), PATHS_AT_ONCE_ELSEWHERE)
    evaluator = PopulationEvaluator(
        network,
        prepare=functools.partial(prepare_eval, mean=source.mean, std=source.std),
        split=searched_split(stage, source),
        batch_size=run.config["train"]["eval_batch_size"],
        paths_at_once=at_once,
        devices=devices,
        workers=run.config["data"]["workers"],
    )
    variables = devices.replicate(variables)
    return lambda paths, images: evaluator(variables, paths, images, should_stop=stop.agreed)


def _search_fold(
    under_way: FoldSearch, folds: Folds, evaluate: Evaluate, folder: Path, progress: Progress, stop: StopRequest
) -> dict[str, Any]:
    fold, evolution = under_way.fold, under_way.evolution
    inside, outside = folds.images(fold), folds.others(fold)
    known_outside = {tuple(row["path"]): row["full_top1"] for row in under_way.history}

    def top1(paths: Sequence[Sequence[int]], images: np.ndarray) -> list[float]:
        found = evaluate(paths, images)
        if found is None:
            raise Interrupted(
                f"search stopped in fold {fold + 1} after generation {evolution.generation}; "
                "the same command goes on from there",
                stop.signal_number,
            )
        return found

    while not evolution.finished:
        candidates = evolution.ask()
        evolution.tell([100 - value for value in top1(candidates, inside)])
        best, error = evolution.ranking[0]
        if best not in known_outside:
            known_outside[best] = top1([best], outside)[0]
        row = {"path": list(best), "fold_top1": 100 - error, "full_top1": known_outside[best]}
        under_way.history.append(row)
        _write(folder / STATE, under_way.state())
        status = (
            f"fold {fold + 1}/{folds.count}  generation {evolution.generation}  best {row['fold_top1']:.2f} % "
            f"(outside of the fold {row['full_top1']:.2f} %)"
        )
        progress.update(progress.done + 1, status, line=f"{status}  path {' '.join(map(str, best))}")
    result = under_way.result()
    _write(folder / fold_path(fold), result)
    return result


def _read(path: Path) -> dict[str, Any] | None:
    return hosts.from_first(path.name, lambda: run_folder.read_json(path))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    hosts.from_first(path.name, lambda: run_folder.write_json(path, content))


def _result(
    run: Run, stage: Stage, source: ImageSource, folds: Sequence[Mapping[str, Any]], seconds: float
) -> dict[str, Any]:
    """Content of ``result.json``: what was found on every fold, and in the mean."""
    kept = ("fold", "path", "fold_top1", "full_top1", "evaluations")
    device = jax.devices()[0]
    return {
        "stage": stage.name,
        "kind": "search",
        "bits": stage.bits,
        "folds": [{name: fold[name] for name in kept} for fold in folds],
        "fold_top1": dataclasses.asdict(statistics([fold["fold_top1"] for fold in folds])),
        "full_top1": dataclasses.asdict(statistics([fold["full_top1"] for fold in folds])),
        "evaluations": sum(fold["evaluations"] for fold in folds),
        "seed": run.config["seed"],
        "data": stage.data.name,
        "seconds": round(seconds, 1),
        "data_fingerprint": source.fingerprint,
        "stage_fingerprint": fingerprint(stage, run.stages),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        **run_folder.provenance(),
    }


def winners(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What came of the folds' winners, from the results of all stages; None without a fine-tuned winner.

    Returns:
      ``rows``, one for each fold: ``fold``, ``path``, ``fold_top1``, ``full_top1``, ``tuned_top1``, ``combined_top1``,
      ``test_top1``; ``statistics`` of each accuracy; ``correlation`` of ``fold_top1`` and ``tuned_top1``.
    """
    tuned = [result for result in results if "tuned_top1" in result]
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
