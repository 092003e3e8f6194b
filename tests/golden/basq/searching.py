"""Checks of the search: candidates and archives of the published program, and its folds."""

import itertools

import numpy as np

from bnn_jax.search.evolution import Evolution, Settings, Vector
from bnn_jax.search.folds import make_folds
from tests.golden.basq.parts import each_case
from tests.golden.comparison import Comparison, GoldenFile

CONF = "conf_seed_pop_mut_cro_sel_epochs_mult_folds_layers_states"


def synthetic_error(vector: Vector, mult: int) -> float:
    """The error the recorded searches were run with."""
    own = sum((i + 1) * ((3 * c + 2 * i + mult) % 7) for i, c in enumerate(vector))
    return own + sum((a * b) % 5 for a, b in itertools.pairwise(vector))


def check_evolution(file: GoldenFile, result: Comparison) -> None:
    """Whole searches, fold after fold on one stream of random numbers."""
    rng = np.random.RandomState(0)
    first = file["first_random_archs_seed0"]
    result.exact("first_random_archs_seed0", rng.randint(7, size=first.shape), first)
    for match in file.cases(rf"(.+)/{CONF}"):
        _check_run(file, result, match.group(1))


def _check_run(file: GoldenFile, result: Comparison, run: str) -> None:
    seed, population, mutations, crossovers, parents, generations, mult, folds, genes, choices = map(
        int, file[f"{run}/{CONF}"]
    )
    settings = Settings(
        genes=genes,
        choices=choices,
        population=population,
        mutations=mutations,
        crossovers=crossovers,
        parents=parents,
        generations=generations,
        mutation_probability=float(file[f"{run}/m_prob"]),
    )
    rng = np.random.RandomState(seed)
    for fold in range(folds):
        _check_fold(file, result, f"{run}/fold{fold}/", Evolution(settings, rng), mult)


def _check_fold(file: GoldenFile, result: Comparison, case: str, search: Evolution, mult: int) -> None:
    evaluated, sizes, best = [], [], []
    while not search.finished:
        candidates = search.ask()
        search.tell([synthetic_error(candidate, mult) for candidate in candidates])
        evaluated += candidates
        sizes.append(len(candidates))
        best.append(search.best)
    result.exact(f"{case}evals", evaluated, file[f"{case}evals"])
    result.exact(f"{case}gen_sizes", sizes, file[f"{case}gen_sizes"])
    result.exact(f"{case}fulls", best, file[f"{case}fulls"])
    ranking = [vector for vector, _ in search.ranking]
    for name in ("top", "top50"):
        stored = file[f"{case}{name}"]
        result.exact(f"{case}{name}", ranking[: len(stored)], stored)
    result.exact(f"{case}fold_acc", 100 - search.ranking[0][1], file[f"{case}fold_acc"])
    result.exact(f"{case}arch", search.best, file[f"{case}arch"])
    result.exact(f"{case}visited", search.drawn, file[f"{case}visited"])
    before = search.rng.get_state()
    result.exact(f"{case}rng_after", search.rng.randint(2**30), file[f"{case}rng_after"])
    search.rng.set_state(before)


@each_case
def check_folds(file: GoldenFile, result: Comparison, case: str) -> None:
    """Accuracy inside and outside of each contiguous fold."""
    count, batch_size, folds = (int(v) for v in file[f"{case}N_bs_k"])
    correct = np.unpackbits(file[f"{case}correct"])[:count]
    # All of one class: sorting keeps the order of the loader.
    split = make_folds(np.zeros(count, int), kind="contiguous", count=folds, batch_size=batch_size)
    inside = [100 * correct[split.images(index)].mean() for index in range(folds)]
    outside = [100 * correct[split.others(index)].mean() for index in range(folds)]
    result.close(f"{case}fold_acc", inside, file[f"{case}fold_acc"], atol=1e-4)
    result.close(f"{case}full_acc", outside, file[f"{case}full_acc"], atol=1e-4)
    batches = -(-count // batch_size)
    result.exact(f"{case}max_val_iters", len(split.images(0)) // batch_size, file[f"{case}max_val_iters"])
    left = batches - folds * (batches // folds)
    result.exact(f"{case}tail_batches", -(-int(np.sum(split.fold < 0)) // batch_size), left)
    result.exact(f"{case}tail_batches_in_no_fold", left, file[f"{case}tail_batches_in_no_fold"])
