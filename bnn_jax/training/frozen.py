"""Parameters that training leaves as they are (``config.freeze``).

A pattern names parameters, or modules with all their parameters, by path: ``*`` stands for anything within a part of
it, ``**`` for any number of parts ('conv1', 'layer1_*', '**/bn*'). A frozen parameter has no gradient, so it counts in
no norm of one; no optimiser, decay or projection moves it. Where all parameters of a module are frozen, its state is
too: a BatchNorm normalises by its running statistics, which stay, and codebooks keep their memory. So what is frozen
computes the same in every step, in training as in evaluation.
"""

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax

from bnn_jax.errors import UserError
from bnn_jax.layers.norm import BatchNorm
from bnn_jax.training.optimizer import path_of

_WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def regular_expression(pattern: str) -> str:
    """The regular expression, to be searched in a path, that a pattern stands for."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return f"^{''.join(_WILDCARDS.get(part, re.escape(part)) for part in parts)}(?:/|$)"


def matching(patterns: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The paths that a pattern matches."""
    expressions = [re.compile(regular_expression(pattern)) for pattern in patterns]
    return [path for path in paths if any(expression.search(path) for expression in expressions)]


def check_patterns(patterns: Sequence[str], paths: Sequence[str]) -> None:
    """Checks that every pattern matches something.

    Raises:
      UserError: one does not; near paths are named.
    """
    modules = {"/".join(path.split("/")[:end]) for path in paths for end in range(1, path.count("/") + 2)}
    for pattern in patterns:
        if not matching([pattern], paths):
            plain = pattern.strip("*/")
            near = difflib.get_close_matches(plain, sorted(modules), n=3, cutoff=0.4) or sorted(modules)[:3]
            raise UserError(f"config.freeze: {pattern!r} matches no parameter; near are {', '.join(near)}")


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The frozen part of a network.

    Attributes:
      params: paths of the frozen parameters.
      modules: paths of the modules with parameters that are all frozen.
    """

    params: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()

    def stop_gradient(self, params: Any) -> Any:
        """The parameters, of which the frozen ones have no gradient."""
        if not self.params:
            return params
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.lax.stop_gradient(leaf) if path_of(path) in self.params else leaf, params
        )

    def keep_params(self, old: Any, new: Any) -> Any:
        """New parameters, of which the frozen ones are the old ones."""
        return _chosen(lambda path: path in self.params, old, new) if self.params else new

    def keep_state(self, old: Any, new: Any) -> Any:
        """New state of the quantizers, of which that of frozen modules is the old one."""

        def is_frozen(path: str) -> bool:
            parts = path.split("/")
            return any("/".join(parts[:end]) in self.modules for end in range(len(parts)))

        return _chosen(is_frozen, old, new) if self.modules else new

    def fixed_norms(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which BatchNorms that are frozen work as in evaluation."""
        return nn.intercept_methods(self._interceptor) if self.modules else contextlib.nullcontext()

    def _interceptor(
        self, next_function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if (
            isinstance(module, BatchNorm)
            and context.method_name == "__call__"
            and "/".join(module.path) in self.modules
        ):
            x, ctx = args
            return next_function(x, ctx.replace(train=False), **kwargs)
        return next_function(*args, **kwargs)


def frozen_part(patterns: Sequence[str], params: Any) -> Frozen:
    """What the patterns freeze of parameters, concrete or abstract."""
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    frozen = frozenset(matching(patterns, paths))
    if not frozen:
        return Frozen()
    moving = {parent for path in paths if path not in frozen for parent in _parents(path)}
    return Frozen(frozen, frozenset(parent for path in frozen for parent in _parents(path)) - moving)


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


def _chosen(is_old: Callable[[str], bool], old: Any, new: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, before, after: before if is_old(path_of(path)) else after, old, new
    )
