"""Evolutionary search over vectors of choices, by ask and tell.

    search = Evolution(settings, np.random.RandomState(0))
    while not search.finished:
        candidates = search.ask()
        search.tell([error(candidate) for candidate in candidates])
    search.best

The order of the random draws is that of the published program, so with NumPy's legacy generator and the same seed it
proposes the same candidates; NumPy keeps that generator's stream the same in all versions. ``state`` holds everything
as plain JSON values: a search restored from it goes on with the same candidates.

Reference: BASQ, Kim et al. 2022 (ECCV), section 3.3; release: HanByulKim/BASQ: 02kfold_evolution.py.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Vector = tuple[int, ...]

# Candidates are drawn in groups of this size; what a group has left over is thrown away.
DRAWN_TOGETHER = 10
# Draws a kind of children may take for each child wanted.
DRAWS_PER_CHILD = 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a search is done.

    Attributes:
      genes: length of a vector.
      choices: values of a gene, 0 to ``choices - 1``.
      population: candidates in each generation.
      mutations: of them, children of one parent with some genes drawn anew, at most.
      crossovers: of them, children that take every gene from one of two parents, at most; the rest is random.
      parents: best candidates so far that children are made from.
      generations: number of generations after the first, random one.
      mutation_probability: probability that a gene is drawn anew.

    Raises:
      ValueError: a number out of range.
    """

    genes: int
    choices: int
    population: int = 45
    mutations: int = 15
    crossovers: int = 15
    parents: int = 10
    generations: int = 20
    mutation_probability: float = 0.1

    def __post_init__(self):
        for name in ("genes", "choices", "population", "parents"):
            if getattr(self, name) < 1:
                raise ValueError(f"evolution: {name}={getattr(self, name)!r}: accepted is 1 or more")
        for name in ("mutations", "crossovers", "generations"):
            if getattr(self, name) < 0:
                raise ValueError(f"evolution: {name}={getattr(self, name)!r}: accepted is 0 or more")
        if self.mutations + self.crossovers > self.population:
            raise ValueError(
                f"evolution: mutations={self.mutations!r} and crossovers={self.crossovers!r} are more than "
                f"population={self.population!r}"
            )
        if not 0 <= self.mutation_probability <= 1:
            raise ValueError(
                f"evolution: mutation_probability={self.mutation_probability!r}: accepted is 0 <= value <= 1"
            )

    @property
    def vectors(self) -> int:
        """Number of different vectors."""
        return self.choices**self.genes


class Evolution:
    """A search under way.

    Attributes:
      settings: how it is done.
      rng: NumPy's legacy generator; several searches may draw from one, one after another.
      generation: generations told so far; the first, random one counts.
    """

    def __init__(self, settings: Settings, rng: np.random.RandomState):
        self.settings, self.rng, self.generation = settings, rng, 0
        self._errors: dict[Vector, float] = {}
        self._seen: set[Vector] = set()
        self._asked: list[Vector] | None = None

    @property
    def finished(self) -> bool:
        """Whether all generations are done, or no vector is left that was not evaluated."""
        return self.generation > self.settings.generations or len(self._errors) == self.settings.vectors

    @property
    def ranking(self) -> list[tuple[Vector, float]]:
        """All evaluated vectors with their errors, the best first, equal ones in the order of evaluation."""
        return sorted(self._errors.items(), key=lambda item: item[1])

    @property
    def best(self) -> Vector:
        """The evaluated vector of the smallest error."""
        return self.ranking[0][0]

    @property
    def drawn(self) -> int:
        """Different vectors drawn so far, evaluated or not."""
        return len(self._seen)

    def ask(self) -> list[Vector]:
        """The candidates of the next generation: mutations, then crossovers, then random vectors.

        All are different, and none was evaluated before. There are fewer than a population where too few are left.

        Raises:
          ValueError: the search is finished, or the errors of the last candidates are missing.
        """
        if self.finished or self._asked is not None:
            raise ValueError("evolution: ask() needs the last candidates' errors first, and an unfinished search")
        settings, candidates = self.settings, []
        if self.generation > 0:
            parents = [vector for vector, _ in self.ranking[: settings.parents]]
            # A crossover cannot repeat a mutation of this generation, nor a random vector either of them.
            candidates += self._children(lambda: self._mutate(parents), settings.mutations, candidates)
            candidates += self._children(lambda: self._cross(parents), settings.crossovers, candidates)
        missing = min(settings.population, settings.vectors - len(self._errors)) - len(candidates)
        candidates += self._draw(self._random, missing, candidates, most_draws=None)
        self._asked = candidates
        return list(candidates)

    def tell(self, errors: Sequence[float]) -> None:
        """Takes the errors of the candidates last asked for, in their order.

        Raises:
          ValueError: another number of errors, an error that is not finite, or no candidates were asked for.
        """
        if self._asked is None or len(errors) != len(self._asked):
            raise ValueError(f"evolution: {len(errors)} errors for {len(self._asked or [])} candidates")
        if not np.all(np.isfinite(errors)):
            raise ValueError("evolution: an error is not finite")
        self._errors.update(zip(self._asked, map(float, errors), strict=True))
        self._asked = None
        self.generation += 1

    def _children(self, make: Callable[[], Vector], wanted: int, taken: list[Vector]) -> list[Vector]:
        return self._draw(make, wanted, taken, most_draws=wanted * DRAWS_PER_CHILD)

    def _draw(
        self, make: Callable[[], Vector], wanted: int, taken: list[Vector], *, most_draws: int | None
    ) -> list[Vector]:
        """Up to ``wanted`` new vectors; they were neither evaluated nor ``taken``."""
        known, found, draws = set(taken), [], 0
        group: list[Vector] = []
        while len(found) < wanted and (most_draws is None or draws < most_draws):
            if not group:
                group = [make() for _ in range(DRAWN_TOGETHER)]
                self._seen.update(group)
            vector = group.pop(0)
            draws += 1
            if vector not in self._errors and vector not in known:
                known.add(vector)
                found.append(vector)
        return found

    def _random(self) -> Vector:
        return tuple(int(self.rng.randint(self.settings.choices)) for _ in range(self.settings.genes))

    def _mutate(self, parents: list[Vector]) -> Vector:
        vector = list(parents[self.rng.randint(len(parents))])
        for gene in range(self.settings.genes):
            if self.rng.random_sample() < self.settings.mutation_probability:
                vector[gene] = int(self.rng.randint(self.settings.choices))
        return tuple(vector)

    def _cross(self, parents: list[Vector]) -> Vector:
        first, second = (parents[self.rng.randint(len(parents))] for _ in range(2))
        return tuple((first, second)[self.rng.randint(2)][gene] for gene in range(self.settings.genes))

    def state(self) -> dict[str, Any]:
        """Everything a search needs to go on, as JSON values; only between ``tell`` and ``ask``.

        Raises:
          ValueError: candidates are asked for and their errors are missing.
        """
        if self._asked is not None:
            raise ValueError("evolution: candidates were asked for; their errors come first")
        return {
            "generation": self.generation,
            "evaluated": [[list(vector), error] for vector, error in self._errors.items()],
            "seen": sorted(map(list, self._seen - set(self._errors))),
            "rng": rng_state(self.rng),
        }

    @classmethod
    def from_state(cls, settings: Settings, state: Mapping[str, Any]) -> "Evolution":
        """The search that ``state`` was taken from, with a generator of its own."""
        search = cls(settings, restored_rng(state["rng"]))
        search.generation = state["generation"]
        search._errors = {tuple(vector): error for vector, error in state["evaluated"]}
        search._seen = {tuple(vector) for vector in state["seen"]} | set(search._errors)
        return search


def rng_state(rng: np.random.RandomState) -> list[Any]:
    """State of a legacy generator as JSON values."""
    name, keys, position, has_gauss, cached = rng.get_state(legacy=True)  # type: ignore[misc]
    return [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)]


def restored_rng(state: Sequence[Any]) -> np.random.RandomState:
    """A legacy generator in a state from ``rng_state``."""
    name, keys, position, has_gauss, cached = state
    rng = np.random.RandomState()
    rng.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))
    return rng
