"""The JSON files of a run folder: what each has to hold, and the one place that reads them.

A shape is a ``Value``, a dict of shapes by field ('level_bits?' may be missing or null; others may be there besides), a
list of the one shape of all items, or a tuple of the shapes of each item. Declared are the fields that are read.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bnn_jax.errors import UserError

MOST_BYTES = 4 << 20  # of a file, or of a line of one; a search of 25,000 paths stays below
MOST_CONTAINERS = 400_000  # an empty list of 3 bytes takes 64 in memory
MOST_LEVELS = 50  # of nesting; the deepest file, config.json, has less than ten
MOST_SHOWN = 60  # characters of a wrong value


@dataclasses.dataclass(frozen=True)
class Value:
    """A text or number.

    Attributes:
      accepted: in words.
      test: whether a JSON value is accepted.
    """

    accepted: str
    test: Callable[[Any], bool]


def whole(low: int = 0, high: int = 2**63 - 1) -> Value:
    """Whole numbers from ``low`` to ``high``."""
    upper = "" if high == 2**63 - 1 else f" to {high}"
    return Value(f"a whole number from {low}{upper}", lambda value: type(value) is int and low <= value <= high)


def vector(genes: int, choices: int) -> tuple[Value, ...]:
    """The path that a search of so many layers and branches finds."""
    return (whole(0, choices - 1),) * genes


def _number(accepted: str, low: float, high: float) -> Value:
    # NaN lies in no range; a bool is no number.
    return Value(accepted, lambda value: type(value) in (int, float) and low <= value <= high)


COUNT, _WORD = whole(), whole(0, 2**32 - 1)
NUMBER = _number("a finite number", -1e300, 1e300)
PERCENT = _number("a number from 0 to 100", 0, 100)
NAME = Value(
    "a name of letters, digits, _, - and .",
    lambda value: isinstance(value, str) and re.fullmatch(r"[\w.-]{1,100}", value) is not None,
)
OBJECT = Value("an object", lambda value: isinstance(value, dict))
WORDS = Value(
    "a list of 624 whole numbers below 2**32, not all of them 0",
    # Of nothing but zeros the generator makes zeros for ever.
    lambda value: isinstance(value, list) and len(value) == 624 and all(map(_WORD.test, value)) and any(value[1:]),
)
RNG = (Value("'MT19937'", lambda value: value == "MT19937"), WORDS, whole(0, 624), whole(0, 1), NUMBER)

TEXT = Value("a text", lambda value: isinstance(value, str))
IMAGES = {"classes": [TEXT], "mean": (NUMBER,) * 3, "std": (NUMBER,) * 3, "fingerprint": NAME}
CONFIG = {"config": OBJECT, "stages": [OBJECT]}
FINISHED = {"stage": NAME, "stage_fingerprint": NAME, "bits": NUMBER, "seconds": NUMBER}
TRAINED = {
    **FINISHED,
    **{"last_top1": PERCENT, "best_top1": PERCENT, "best_epoch": COUNT, "selection": NAME, "epochs": whole(1)},
    **{"images_per_second": NUMBER, "quantized_weight_bits": COUNT, "stored_bits": COUNT, "level_bits?": NUMBER},
    "last_top1_sd?": NUMBER,
}
# Of a search the tables show the same columns, as far as there are any.
SEARCHED = {**{f"{name.removesuffix('?')}?": shape for name, shape in TRAINED.items()}, **FINISHED}
FOUND = {"fold": COUNT, "path": [COUNT], "fold_top1": PERCENT, "full_top1": PERCENT}
WINNER = {**TRAINED, **FOUND, "tuned_top1": PERCENT, "folds": whole(2)}
HEADER = {"step": COUNT, "meta": OBJECT, "metrics?": {"selection_top1": NUMBER}, "tables": OBJECT, "hashes": OBJECT}


def record(splits: Iterable[str] = ("test",), *, several: bool = False) -> dict[str, Any]:
    """A line of ``metrics.jsonl``.

    Args:
      splits: what was evaluated on.
      several: whether several seeds are trained.
    """
    held_out = {"top1": PERCENT, "top5": PERCENT, "loss": NUMBER}
    each = [{"seed": COUNT, "test_top1": PERCENT, "test_loss": NUMBER}]
    deviations = {f"test_{name}_sd": NUMBER for name in held_out}
    return {
        **{"epoch": COUNT, "step": COUNT, "seconds": NUMBER, "images_per_second": NUMBER, "train_loss": NUMBER},
        **{"train_top1?": PERCENT, "train_top5?": PERCENT, "validation_top1?": PERCENT},
        **{f"{split}_{name}": shape for split in splits for name, shape in held_out.items()},
        **({"seeds": each, **deviations} if several else {"seeds?": each}),
    }


def fold(number: int, path: Any) -> dict[str, Any]:
    """The result of a fold; ``path`` is the shape of a path."""
    row = {"path": path, "fold_top1": PERCENT, "full_top1": PERCENT}
    return {**row, "fold": whole(number, number), "evaluations": COUNT, "history": [row], "rng": RNG}


def search_state(path: Any) -> dict[str, Any]:
    """A search under way; ``path`` is the shape of a path."""
    evolution = {"generation": COUNT, "evaluated": [(path, PERCENT)], "seen": [path], "rng": RNG}
    return {"fold": COUNT, "evolution": evolution, "history": fold(0, path)["history"]}


def read(path: Path, shape: Any) -> dict[str, Any] | None:
    """Content of a JSON file, or None where there is none.

    Raises:
      UserError: it does not have the shape.
    """
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            content = parse(file.read(MOST_BYTES + 1))
    except ValueError as error:
        raise damaged(path, str(error)) from None
    if wrong := problem(content, shape):
        raise damaged(path, wrong)
    return content


def damaged(path: Path, what: str) -> UserError:
    """The error about a file that is read whole."""
    return UserError(f"{path} is damaged: {what}; move it away to make it anew")


def parse(text: bytes) -> Any:
    """The JSON value that a text stands for.

    Raises:
      ValueError: none, or one that is too large or nested too deeply to be looked at.
    """
    if len(text) > MOST_BYTES or text.count(b"[") + text.count(b"{") > MOST_CONTAINERS:
        raise ValueError(f"accepted is JSON of at most {MOST_BYTES} bytes and {MOST_CONTAINERS} lists and objects")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("accepted is JSON") from None
    level = [content]
    for _ in range(MOST_LEVELS):
        level = [item for value in level for item in _items(value)]
        if not level:
            return content
    raise ValueError(f"accepted is JSON of at most {MOST_LEVELS} levels")


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def problem(value: Any, shape: Any, field: str = "") -> str:
    """The first field of a JSON value that does not have its shape, and what is accepted there; '' if there is none."""
    if isinstance(shape, Value):
        return "" if shape.test(value) else _refusal(field, value, shape)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _refusal(field, value, shape)
        found = (_problem_of(value, name, part, field) for name, part in shape.items())
    else:
        if not isinstance(value, list) or (isinstance(shape, tuple) and len(value) != len(shape)):
            return _refusal(field, value, shape)
        items = zip(value, shape if isinstance(shape, tuple) else shape * len(value))
        found = (problem(item, part, f"{field}[{index}]") for index, (item, part) in enumerate(items))
    return next(filter(None, found), "")


def _problem_of(value: dict[str, Any], name: str, shape: Any, field: str) -> str:
    """What is wrong with one field of an object."""
    plain = name.removesuffix("?")
    here = f"{field}.{plain}".lstrip(".")
    if plain in value and not (name != plain and value[plain] is None):
        return problem(value[plain], shape, here)
    return f"{here} is missing: accepted is {_describe(shape)}" if name == plain else ""


def _refusal(field: str, value: Any, shape: Any) -> str:
    text = repr(value)
    shown = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
    return f"{field}={shown}: accepted is {_describe(shape)}".lstrip("=")


def _describe(shape: Any) -> str:
    if isinstance(shape, Value):
        return shape.accepted
    if isinstance(shape, dict):
        return f"an object with {', '.join(name for name in shape if not name.endswith('?'))}"
    return f"a list of {len(shape)}" if isinstance(shape, tuple) else "a list"
