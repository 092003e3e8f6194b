import itertools
import json

import numpy as np
import pytest

from bnn_jax.search.evolution import Evolution, Settings

SMALL = Settings(genes=6, choices=4, population=12, mutations=4, crossovers=4, parents=3, generations=5)


def error(vector):
    return float(sum((gene - 1) ** 2 * (i + 1) for i, gene in enumerate(vector)))


def step(search):
    candidates = search.ask()
    search.tell([error(candidate) for candidate in candidates])
    return candidates


def new(settings=SMALL, seed=0):
    return Evolution(settings, np.random.RandomState(seed))


def finish(search):
    while not search.finished:
        step(search)
    return search


def test_candidates_are_new_vectors_of_the_right_form():
    search, seen = new(), set()
    while not search.finished:
        candidates = step(search)
        assert len(candidates) == len(set(candidates)) == SMALL.population
        assert not seen & set(candidates)
        seen |= set(candidates)
        assert all(len(vector) == 6 and set(vector) <= set(range(4)) for vector in candidates)
    assert len(search.ranking) == SMALL.population * (SMALL.generations + 1)


def test_the_best_error_never_rises_and_the_search_beats_its_first_random_generation():
    search, best = new(), []
    while not search.finished:
        step(search)
        best.append(search.ranking[0][1])
    assert best == sorted(best, reverse=True)
    assert best[-1] < best[0]


def test_children_come_from_the_parents():
    settings = Settings(genes=30, choices=7, population=20, mutations=0, crossovers=20, parents=2, generations=1)
    search = new(settings)
    step(search)
    parents = [vector for vector, _ in search.ranking[:2]]
    for child in search.ask():
        assert all(gene in pair for gene, *pair in zip(child, *parents))


def test_about_a_tenth_of_the_genes_mutate():
    settings = Settings(genes=40, choices=50, population=50, mutations=50, crossovers=0, parents=1, generations=1)
    search = new(settings)
    step(search)
    changed = [np.mean(np.array(child) != search.best) for child in search.ask()]
    # 2,000 draws with probability 0.1 * 49/50: five standard deviations are 0.033.
    assert abs(np.mean(changed) - 0.098) < 0.033


def test_equal_errors_keep_the_order_of_evaluation():
    search = new()
    candidates = search.ask()
    search.tell([1.0] * len(candidates))
    assert [vector for vector, _ in search.ranking] == candidates


@pytest.mark.parametrize("generations", range(6))
def test_a_search_restored_after_any_generation_ends_the_same(generations):
    whole, search = finish(new()), new()
    for _ in range(generations):
        step(search)
    state = json.loads(json.dumps(search.state()))
    restored = finish(Evolution.from_state(SMALL, state))
    assert restored.ranking == whole.ranking
    assert restored.drawn == whole.drawn
    assert restored.rng.randint(2**30) == whole.rng.randint(2**30)


@pytest.mark.parametrize(("genes", "choices", "population"), [(1, 3, 12), (2, 5, 12), (3, 3, 27), (2, 2, 100)])
def test_a_space_smaller_than_the_search_is_evaluated_once_and_then_ends(genes, choices, population):
    settings = Settings(genes, choices, population=population, mutations=4, crossovers=4, parents=3, generations=50)
    search = finish(new(settings))
    vectors = [vector for vector, _ in search.ranking]
    assert sorted(vectors) == sorted(itertools.product(range(choices), repeat=genes))


def test_the_next_candidates_need_the_errors_of_the_last():
    search = new()
    search.ask()
    with pytest.raises(ValueError, match="errors first"):
        search.ask()
    with pytest.raises(ValueError, match="errors come first"):
        search.state()
    with pytest.raises(ValueError, match="3 errors for 12 candidates"):
        search.tell([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="not finite"):
        search.tell([float("nan")] * 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genes": 0}, "genes=0: accepted is 1 or more"),
        ({"population": 20}, "mutations=15 and crossovers=15 are more than population=20"),
        ({"generations": -1}, "generations=-1: accepted is 0 or more"),
        ({"mutation_probability": 1.5}, "mutation_probability=1.5"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"genes": 3, "choices": 7, **change})
