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

from bnn_jax import hosts, run_files
from bnn_jax.data.augment import prepare_eval
from bnn_jax.data.memory import ImageSource, Split
from bnn_jax.data.stream import StreamedSplit
from bnn_jax.errors import Interrupted, UserError
from bnn_jax.experiment import folder as files
from bnn_jax.experiment.build import Experiment, build_network
from bnn_jax.experiment.folder import RunFolder
from bnn_jax.experiment.load import SavedVariables
from bnn_jax.experiment.results import described_run
from bnn_jax.search.evolution import Evolution, Settings, restored_rng, rng_state
from bnn_jax.search.folds import Folds, make_folds
from bnn_jax.search.results import statistics
from bnn_jax.stages import Stage
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import PathEvaluator
from bnn_jax.training.interrupt import StopRequest
from bnn_jax.training.progress import Progress, say
from bnn_jax.training.seeds import one_seed

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


def search(
    experiment: Experiment, folder: RunFolder, stage: Stage, source: ImageSource, stop: StopRequest
) -> dict[str, Any]:
    """Searches what is left of the folds and returns the content of ``result.json``.

    Raises:
      Interrupted: asked to stop; every finished generation is saved.
    """
    hosts.from_first("search folder", lambda: folder.stage(stage.name).mkdir(exist_ok=True))
    folds, settings = folds_of(stage, source), _settings(stage, source)
    path = run_files.vector(settings.genes, settings.choices)
    done = [_read(folder.fold(stage.name, fold), run_files.fold(fold, path)) for fold in range(folds.count)]
    evaluate = None if all(done) else _evaluator(experiment, folder, stage, source, stop)
    started = time.monotonic()
    generations_done = sum(len(result["history"]) for result in done if result)
    total = folds.count * (settings.generations + 1)
    with Progress(stage.name, total=total, done=generations_done) as progress:
        for fold in range(folds.count):
            if done[fold] is None:
                path = folder.fold(stage.name, fold)
                under_way = _start(stage, settings, path.parent / STATE, fold, done[fold - 1] if fold else None)
                progress.skip(len(under_way.history))
                assert evaluate is not None  # made where a fold is left
                done[fold] = _search_fold(under_way, folds, evaluate, path, progress, stop)
    result = _result([result for result in done if result])
    return {**described_run(experiment, stage, source), **result, "seconds": round(time.monotonic() - started, 1)}


def _settings(stage: Stage, source: ImageSource) -> Settings:
    assert stage.search is not None  # a stage of this kind has one
    names = {field.name for field in dataclasses.fields(Settings)}
    network = build_network(stage, source.num_classes)
    chosen = {name: value for name, value in stage.search.kwargs.items() if name in names}
    return Settings(genes=len(network.branch_patterns), choices=network.branches, **chosen)


def _start(stage: Stage, settings: Settings, path: Path, fold: int, before: Mapping[str, Any] | None) -> FoldSearch:
    """The search on a fold, from its saved state or from the beginning."""
    assert stage.search is not None
    state = _read(path, run_files.search_state(run_files.vector(settings.genes, settings.choices)))
    if state is not None and state["fold"] == fold:
        generation, rows = state["evolution"]["generation"], len(state["history"])
        if rows != generation or generation < 1:
            raise run_files.damaged(path, f"history has {rows} rows: accepted are evolution.generation={generation}")
        if not state["evolution"]["evaluated"]:
            raise run_files.damaged(path, "evolution.evaluated=[]: accepted is one or more")
        say(f"stage {stage.name}: fold {fold + 1} goes on after generation {generation}")
        return FoldSearch(fold, Evolution.from_state(settings, state["evolution"]), state["history"])
    options = stage.search.kwargs
    if options["one_random_stream"] and before is not None:
        rng = restored_rng(before["rng"])
    else:
        rng = np.random.RandomState(options["seed"] + (0 if options["one_random_stream"] else fold))
    return FoldSearch(fold, Evolution(settings, rng), [])


def _evaluator(
    experiment: Experiment, folder: RunFolder, stage: Stage, source: ImageSource, stop: StopRequest
) -> Evaluate:
    """Top-1 of paths on some images of the split that is searched on; None if asked to stop."""
    assert stage.inherit is not None  # the supernet
    config, devices, saved = experiment.config, all_devices(), SavedVariables(experiment, folder)
    network, variables = saved.with_network(stage.inherit.source, source=source, default=stage, seeds=one_seed(0))
    at_once = config["basq"]["paths_at_once"] or PATHS_AT_ONCE.get(jax.default_backend(), PATHS_AT_ONCE_ELSEWHERE)
    evaluator = PathEvaluator(
        network,
        prepare=functools.partial(prepare_eval, mean=source.mean, std=source.std),
        split=searched_split(stage, source),
        batch_size=config["train"]["eval_batch_size"],
        paths_at_once=at_once,
        devices=devices,
        workers=config["data"]["workers"],
    )
    variables = devices.replicate(variables)
    return lambda paths, images: evaluator(variables, paths, images, should_stop=stop.agreed)


def _search_fold(
    under_way: FoldSearch, folds: Folds, evaluate: Evaluate, path: Path, progress: Progress, stop: StopRequest
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
        _write(path.parent / STATE, under_way.state())
        status = (
            f"fold {fold + 1}/{folds.count}  generation {evolution.generation}  best {row['fold_top1']:.2f} % "
            f"(outside of the fold {row['full_top1']:.2f} %)"
        )
        progress.update(progress.done + 1, status, line=f"{status}  path {' '.join(map(str, best))}")
    result = under_way.result()
    _write(path, result)
    return result


def _read(path: Path, shape: Any) -> dict[str, Any] | None:
    return hosts.from_first(path.name, lambda: run_files.read(path, shape))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    hosts.from_first(path.name, lambda: files.write_json(path, content))


def _result(folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was found on every fold, and in the mean."""
    kept = ("fold", "path", "fold_top1", "full_top1", "evaluations")
    return {
        "kind": "search",
        "folds": [{name: fold[name] for name in kept} for fold in folds],
        "fold_top1": dataclasses.asdict(statistics([fold["fold_top1"] for fold in folds])),
        "full_top1": dataclasses.asdict(statistics([fold["full_top1"] for fold in folds])),
        "evaluations": sum(fold["evaluations"] for fold in folds),
    }


def searched_split(search: Stage, source: ImageSource) -> Split | StreamedSplit:
    """The images a search looks at.

    Raises:
      UserError: they are to be held out from training, and none are.
    """
    assert search.search is not None
    if search.search.kwargs["search_on"] == "test":
        return source.test
    if source.validation is None:
        raise UserError(f"stage {search.name}: no images are held out; config.data.validation_fraction says how many")
    return source.validation


def folds_of(search: Stage, source: ImageSource) -> Folds:
    """The folds of a search's images."""
    assert search.search is not None
    options = search.search.kwargs
    labels = searched_split(search, source).labels
    return make_folds(labels, kind=options["fold_kind"], count=options["folds"], batch_size=options["fold_batch"])
