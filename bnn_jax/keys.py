"""Config keys as plain data: default, type, accepted values and meaning of each, in one place.

The sections that every config shares are defined in ``experiment/config.py``, a method's own section in the method's
file. The defaults of ``configs/common.py``, the check of a config and ``launch.py --help-config`` all come from there.
Nothing here imports jax.
"""

import dataclasses
import itertools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

from bnn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Condition:
    """Values a key accepts, by a test.

    Attributes:
      description: what is accepted, for messages.
      test: of a value that has the key's type.
    """

    description: str
    test: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Key:
    """A config key.

    Attributes:
      default: value in ``configs/common.py``; None where the preset or the data set decides, and then None is accepted.
      comment: what the key means, its unit, what an empty value stands for.
      accepted: the values, a condition, or None for all of the type.
      kind: int, float, str, bool, tuple, or object for several of them; ``default`` tells it unless it is None.
      item: type of the items of a tuple; ``default`` tells it unless it is empty.
      table: name of the table whose keys are accepted, with the module it lies in: 'bnn_jax.networks.NETWORKS'.
      may_change: whether it only says where or how a run is done, not what it computes: it may change between a run
        and its continuation.
    """

    default: Any
    comment: str
    accepted: tuple[Any, ...] | Condition | None = None
    _: dataclasses.KW_ONLY
    kind: type = types.NoneType
    item: type = object
    table: str = ""
    may_change: bool = False

    def __post_init__(self):
        if self.default is not None and self.kind is types.NoneType:
            object.__setattr__(self, "kind", type(self.default))
        if isinstance(self.default, tuple) and self.default:
            object.__setattr__(self, "item", type(self.default[0]))

    @property
    def optional(self) -> bool:
        """Whether None is accepted."""
        return self.default is None

    def describe(self) -> str:
        """What is accepted, in a few words."""
        if self.table:
            return f"{self.kind.__name__}, a key of {self.table}"
        if isinstance(self.accepted, tuple):
            return f"one of {', '.join(map(repr, self.accepted))}"
        kind = f"a tuple of {self.item.__name__}" if self.kind is tuple else self.kind.__name__
        if self.accepted is None:
            return kind
        return self.accepted.description if self.kind is object else f"{kind}, {self.accepted.description}"

    def check(self, name: str, value: Any) -> Any:
        """The value in the key's type: an int for a float becomes one, a list a tuple.

        Args:
          name: dotted name of the key, for messages.
          value: what a config has there.

        Raises:
          UserError: it is of another type, or not accepted.
        """
        if value is None and self.optional:
            return None
        if value is None:
            raise UserError(f"config.{name} is empty: accepted is {self.describe()}")
        typed = self._in_type(value)
        if typed is None or not self._accepts(typed):
            raise UserError(f"config.{name}={value!r}: accepted is {self.describe()}")
        return typed

    def _in_type(self, value: Any) -> Any:
        """The value in the key's type, or None if it is of another."""
        if self.kind is not tuple:
            return _convert(value, self.kind)
        if not isinstance(value, (tuple, list)):
            return None
        items = tuple(_convert(item, self.item) for item in value)
        return None if None in items else items

    def _accepts(self, value: Any) -> bool:
        if isinstance(self.accepted, Condition):
            return self.accepted.test(value)
        return self.accepted is None or value in self.accepted


Section = Mapping[str, Key]


def _convert(value: Any, kind: type) -> Any:
    """``value`` as ``kind``, else None: an int is a float too, a bool is no number, nor are NaN and infinity."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**300:
        value = float(value)
    fits = isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool))
    return value if fits and not (isinstance(value, float) and not math.isfinite(value)) else None


def between(low: int, high: int) -> Condition:
    """Numbers from ``low`` to ``high``, both included."""
    return Condition(f"{low:,} to {high:,}", lambda value: low <= value <= high)


def at_least(low: int) -> Condition:
    """Numbers from ``low`` on."""
    return Condition(f"{low} or more", lambda value: value >= low)


def of_each_once(*names: str) -> Condition:
    """Tuples of some of these names, none of them twice."""
    return Condition(
        f"of {', '.join(names)}, each once", lambda value: len(set(value)) == len(value) and set(value) <= set(names)
    )


POSITIVE = Condition("greater than 0", lambda value: value > 0)
NOT_NEGATIVE = at_least(0)
SEED = between(0, 2_000_000_000)
FRACTION = Condition("0 <= value < 1", lambda value: 0 <= value < 1)
UNIT = Condition("0 <= value <= 1", lambda value: 0 <= value <= 1)
RATE = Condition("0 < value <= 1", lambda value: 0 < value <= 1)
ALL_POSITIVE = Condition(
    "one or more numbers greater than 0", lambda values: len(values) > 0 and all(v > 0 for v in values)
)
ALL_NOT_NEGATIVE = Condition("numbers of 0 or more", lambda values: all(v >= 0 for v in values))
ALL_ABOVE_0 = Condition("numbers greater than 0", lambda values: all(v > 0 for v in values))
ALL_NAMED = Condition("texts that are not empty", all)
TWO_NOT_NEGATIVE = Condition("2 or more numbers of 0 or more", lambda v: len(v) > 1 and all(item >= 0 for item in v))
FALLING_BITS = Condition(
    "a falling sequence of 32, 8 to 1",
    lambda bits: (
        len(bits) > 0 and all(b == 32 or 1 <= b <= 8 for b in bits) and all(a > b for a, b in itertools.pairwise(bits))
    ),
)
BITS = Condition("32, or 1 to 8", lambda bits: bits == 32 or 1 <= bits <= 8)
BITS_IN_TURN = Condition("0, 1, 2, ... in turn", lambda bits: bits == tuple(range(len(bits))))
NOT_EMPTY = Condition("not empty", bool)
FILE = Condition("'file:PATH'", lambda value: value.startswith("file:") and value != "file:")
STAGE_OR_FILE = Condition("'stage' or 'file:PATH'", lambda value: value == "stage" or FILE.test(value))
