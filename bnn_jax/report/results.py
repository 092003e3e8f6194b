"""The result files of the project, and the rows of its tables: the only source of numbers in its documents.

``results/<name>.json`` is one run, written by ``benchmarks/record.py``: what was run, with which command, config,
commit and versions, on what, and every stage with its result and its epochs. ``results/published.json`` holds the
numbers of the papers and their programs, each with its source; ``results/differences.json`` where these two differ.
"""

import dataclasses
import fnmatch
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bnn_jax import run_files
from bnn_jax.errors import UserError
from bnn_jax.run_files import COUNT, NAME, NUMBER, OBJECT, PERCENT, Value, whole

FOLDER, PUBLISHED, DIFFERENCES = "results", "published.json", "differences.json"

TEXT = Value("a text", lambda value: isinstance(value, str) and bool(value.strip()))
COMMIT = Value("a git commit", lambda value: isinstance(value, str) and len(value.removesuffix("-dirty")) == 40)
FLAG = Value("true or false", lambda value: type(value) is bool)

# What a stage must say to be shown; of a network that was only evaluated there are no epochs.
SHOWN = {
    **{"stage": NAME, "seed": COUNT, "data": NAME, "device": TEXT, "bits": NUMBER, "num_test": whole(1)},
    **{"last_top1": PERCENT, "best_top1?": PERCENT, "last_top1_sd?": NUMBER, "epochs?": whole(1)},
    **{"num_train?": whole(1), "stored_bits?": COUNT, "bit_operations?": COUNT, "metrics?": [OBJECT]},
    "all_test_images?": {"top1": PERCENT, "num_test": whole(1)},
}
FILE = {
    **{"what": TEXT, "command": TEXT, "hardware": TEXT, "git_commit": COMMIT, "stages": [{"stage": NAME}]},
    "versions": {"python": TEXT, "bnn_jax": TEXT, "jax": TEXT},
    "config": {"method": NAME, "name": NAME, "network": NAME, "seed": COUNT, "data": {"name": NAME}},
    **{"title?": TEXT, "shown?": [TEXT], "published?": OBJECT, "gap?": TEXT, "headline?": FLAG},
}
REFERENCE = {
    **{"title": TEXT, "source": TEXT, "epochs?": whole(1), "last?": PERCENT, "best": PERCENT, "note": TEXT},
    "curve?": [PERCENT],
}


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Top-1 in percent, of several runs their mean and standard deviation (n - 1)."""

    mean: float
    deviation: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


@dataclasses.dataclass(frozen=True)
class Published:
    """What a paper or its program states.

    Attributes:
      title: of what.
      source: where it stands.
      epochs: length of that run; None where it is not stated.
      last: top-1 of the last epoch, if it is stated.
      best: the published top-1, mostly of the best epoch on the test images.
      note: what to know before comparing.
      curve: test top-1 of every epoch, where it was published.
    """

    title: str
    source: str
    best: float
    note: str
    epochs: int | None = None
    last: float | None = None
    curve: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the tables: a stage of a run, or several that differ in seed or fold alone.

    Attributes:
      files: names of the result files.
      title: what it is.
      method, network, data: as the config names them.
      stage: name of the stage, or a pattern of names.
      count: runs, or stages, that the accuracies are means of.
      seeds: their seeds.
      epochs: epochs that were run; None where a network was only evaluated.
      num_train: training images; None as above.
      num_test: test images of the last epoch.
      last, best: top-1 of the last and of the best epoch.
      bits, stored_bits, bit_operations: per weight; of the whole network; of one image.
      curve: test top-1 of every epoch, means.
      published: what it compares with.
      gap: why it differs from that.
      command: that runs it again.
      headline: whether the README shows it.
    """

    files: tuple[str, ...]
    title: str
    method: str
    network: str
    data: str
    stage: str
    count: int
    seeds: tuple[int, ...]
    epochs: int | None
    num_train: int | None
    num_test: int
    last: Accuracy
    best: Accuracy | None
    bits: float
    stored_bits: int | None
    bit_operations: int | None
    curve: tuple[Accuracy, ...]
    published: Published | None
    gap: str
    command: str
    headline: bool


def read_published(folder: Path) -> dict[str, Published]:
    """The published numbers by key.

    Raises:
      UserError: the file is missing or damaged.
    """
    content = run_files.read(folder / PUBLISHED, OBJECT)
    if content is None:
        raise UserError(f"{folder / PUBLISHED} is missing: start this in the folder of the project")
    for key, entry in content.items():
        if wrong := run_files.problem(entry, REFERENCE, key):
            raise UserError(f"{folder / PUBLISHED}: {wrong}")
    return {key: Published(**{**entry, "curve": tuple(entry.get("curve", ()))}) for key, entry in content.items()}


def read_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files by name.

    Raises:
      UserError: one lacks something that a result has to say.
    """
    files = {}
    for path in sorted(folder.glob("*.json")):
        if path.name in (PUBLISHED, DIFFERENCES):
            continue
        try:
            content = run_files.parse(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        wrong = run_files.problem(content, FILE) or _problem_of_stages(content)
        if wrong:
            raise UserError(f"{path}: {wrong}")
        files[path.stem] = content
    return files


def _problem_of_stages(content: Mapping[str, Any]) -> str:
    groups = _shown(content)
    if missing := [pattern for pattern, stages in groups.items() if not stages]:
        return f"shown={missing[0]!r}: it has no such stage"
    every = [stage for stages in groups.values() for stage in stages]
    found = (run_files.problem(stage, SHOWN, f"stage {stage['stage']}") for stage in every)
    return next(filter(None, found), "")


def _shown(content: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The stages of each row by the name or pattern that chooses them: of the last trained one where none is named."""
    stages = content["stages"]
    trained = [stage["stage"] for stage in stages if stage.get("kind") != "search"]
    return {
        pattern: [stage for stage in stages if fnmatch.fnmatchcase(stage["stage"], pattern)]
        for pattern in content.get("shown") or trained[-1:]
    }


def read_rows(folder: Path) -> list[Row]:
    """The rows of all result files, those of one method together.

    Raises:
      UserError: a file is missing, damaged or incomplete, or names published numbers that are not there.
    """
    published, groups = read_published(folder), {}
    for name, content in read_files(folder).items():
        for pattern, stages in _shown(content).items():
            groups.setdefault(_same_but_seed(content, pattern, stages), []).append((name, content, pattern, stages))
    rows = [_row(found, published) for found in groups.values()]
    # Stable, so that rungs stay in the order of their chain.
    return sorted(rows, key=lambda row: (row.method, row.files[0]))


def _same_but_seed(content: Mapping[str, Any], pattern: str, stages: Sequence[Mapping[str, Any]]) -> str:
    """What runs have in common that are one row: everything but the seed, and how far they came."""
    config = {key: value for key, value in content["config"].items() if key not in ("seed", "name")}
    lengths = [(stage.get("epochs"), stage.get("kind")) for stage in stages]
    return json.dumps([content.get("title"), config, pattern, lengths], sort_keys=True)


def _row(found: Sequence[tuple[str, Mapping[str, Any], str, list[dict[str, Any]]]], published: Mapping) -> Row:
    """A row of the files that differ in their seed alone."""
    name, content, pattern, _ = found[0]
    stages = [stage for *_, of_file in found for stage in of_file]
    first, config = stages[0], content["config"]
    whole_test = all("all_test_images" in stage for stage in stages)
    return Row(
        files=tuple(entry[0] for entry in found),
        title=_title(content, first),
        method=config["method"],
        network=config["network"],
        data=first["data"],
        stage=pattern,
        count=first.get("num_seeds", len(stages)),
        seeds=tuple(sorted({stage["seed"] for stage in stages})),
        epochs=first.get("epochs"),
        num_train=first.get("num_train"),
        num_test=first["all_test_images"]["num_test"] if whole_test else first["num_test"],
        last=_mean(
            [stage["all_test_images"]["top1"] if whole_test else stage["last_top1"] for stage in stages],
            first.get("last_top1_sd"),
        ),
        best=_mean([stage["best_top1"] for stage in stages]) if "best_top1" in first else None,
        bits=first["bits"],
        stored_bits=first.get("stored_bits"),
        bit_operations=first.get("bit_operations"),
        curve=_curve(stages),
        published=_published(name, content, pattern, published),
        gap=content.get("gap", ""),
        command=content["command"],
        headline=content.get("headline", False),
    )


def _title(content: Mapping[str, Any], stage: Mapping[str, Any]) -> str:
    title = content.get("title", content["what"])
    return f"{title}, {stage['bits']:.3g} bit" if len(_shown(content)) > 1 else title


def _published(name: str, content: Mapping[str, Any], pattern: str, published: Mapping) -> Published | None:
    key = content.get("published", {}).get(pattern)
    if key is not None and key not in published:
        raise UserError(f"{FOLDER}/{name}.json: published={key!r}: {FOLDER}/{PUBLISHED} has no such entry")
    return published.get(key)


def _mean(values: Sequence[float], deviation: float | None = None) -> Accuracy:
    if len(values) > 1:
        deviation = statistics.stdev(values)
    return Accuracy(statistics.fmean(values), deviation)


def _curve(stages: Iterable[Mapping[str, Any]]) -> tuple[Accuracy, ...]:
    """Test top-1 of every epoch."""
    curves = [[record["test_top1"] for record in stage.get("metrics", ())] for stage in stages]
    return tuple(_mean(values) for values in zip(*curves))
