"""Projections: changes to parameters and state between a step's gradient and its optimiser.

To add one: a subclass of ``Projection`` here and a line in ``PROJECTIONS``; a stage names it in ``Stage.projections``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp

from bnn_jax.knobs import REFINE_CODEBOOK, Knob
from bnn_jax.ops import codebook as ops
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import Spec


@flax.struct.dataclass
class Update:
    """What an optimiser's step is about to be made from.

    Attributes:
      params: parameters before the step.
      quant_state: state of the quantizers after the step's forward pass.
      opt_state: optimiser's state before the step.
      grads: gradient of the loss, like ``params``.
    """

    params: Any
    quant_state: Any
    opt_state: Any
    grads: Any


class Projection:
    """Base class: a pure function of an update, to be jitted; ``knobs`` are those it reads.

    ``rewrites`` is a pattern of the paths of parameters that it replaces by others, so that an average over steps would
    mean nothing.
    """

    knobs: ClassVar[tuple[Knob, ...]] = ()
    rewrites: ClassVar[str] = "^$"

    def __call__(self, update: Update, ctx: QuantContext, key: jax.Array) -> Update:
        """The changed update.

        Args:
          update: what the optimiser is about to use.
          ctx: context of the step.
          key: random key of this projection in this step.
        """
        raise NotImplementedError


Draw = Callable[[jax.Array, int, QuantContext], jax.Array]


def random_candidates(key: jax.Array, count: int, ctx: QuantContext) -> jax.Array:
    """(count,) different rows of ``ops.codebook.all_patterns``, in random order."""
    return ops.random_patterns(key, count)


@dataclasses.dataclass(frozen=True)
class RefillCodebooks(Projection):
    """Replaces the duplicates of every codebook by new random patterns, and clips the codebook.

    It works on the steps on which the knob 'refine_codebook' is above 0. Two rows are duplicates if their signs agree
    (0 counts as -1); the first stays.

    Attributes:
      maintenance: 'clean' puts new patterns where the duplicates were, and resets what belongs to those rows: the
        memory becomes the pattern, gradient and moments of the optimiser become 0. 'release' moves the rows that stay
        up and puts the new ones behind them; memory, gradient and moments stay where they are, and so belong to other
        rows than before.
      limit: entries are clipped to -limit and +limit.
      draw: (key, n, context) -> (n,) candidates, different rows of the table of patterns. Those a codebook has already
        are left out, the others are taken in order.

    Reference: SNN, Wang et al. 2021 (arXiv 2110.09195); release: yikaiw/SNN.
    """

    maintenance: Literal["clean", "release"] = "clean"
    limit: float = 3.0
    draw: Draw = random_candidates

    knobs: ClassVar[tuple[Knob, ...]] = (REFINE_CODEBOOK,)
    rewrites: ClassVar[str] = "codebook$"

    def __post_init__(self):
        if self.maintenance not in ("clean", "release"):
            raise ValueError(f"refill_codebooks: maintenance={self.maintenance!r}: accepted are 'clean', 'release'")
        if not self.limit >= 1:
            raise ValueError(f"refill_codebooks: limit={self.limit!r}: accepted is 1, the size of a pattern, or more")

    def __call__(self, update: Update, ctx: QuantContext, key: jax.Array) -> Update:
        refine, parts = jnp.asarray(ctx.knob(REFINE_CODEBOOK)), _codebook_parts(update)
        if not parts:
            return update

        def refilled(parts: dict[str, dict]) -> dict[str, dict]:
            keys = jax.random.split(key, len(parts))
            return {path: self._refill(part, key, ctx) for key, (path, part) in zip(keys, sorted(parts.items()))}

        # Only what belongs to codebooks goes through the conditional, so that nothing else may be copied for it.
        return _with_parts(update, jax.lax.cond(refine > 0, refilled, lambda parts: parts, parts))

    def _refill(self, part: dict[str, Any], key: jax.Array, ctx: QuantContext) -> dict[str, Any]:
        codebook = part["codebook"]
        candidates = self.draw(key, codebook.shape[0], ctx)
        if self.maintenance == "release":
            refilled = ops.refill_as_released(codebook, candidates)
            return {**part, "codebook": jnp.clip(refilled, -self.limit, self.limit)}
        refilled, new = ops.replace_duplicates(codebook, candidates)
        new = new[:, None]
        return {
            "codebook": jnp.clip(refilled, -self.limit, self.limit),
            "memory": jnp.where(new, refilled, part["memory"]),
            "of_rows": [jnp.where(new, 0.0, value) for value in part["of_rows"]],
        }


def _codebook_parts(update: Update) -> dict[str, dict[str, Any]]:
    """By path of each codebook: the codebook, its memory, and what else has a row for each of its rows."""
    memories = _flatten(update.quant_state)
    return {
        path: {
            "codebook": codebook,
            "memory": memories[_memory_of(path)],
            "of_rows": [_flatten(update.grads)[path], *_moments(update.opt_state, path, codebook.shape)],
        }
        for path, codebook in _flatten(update.params).items()
        if path.endswith("codebook") and _memory_of(path) in memories
    }


def _with_parts(update: Update, parts: Mapping[str, dict[str, Any]]) -> Update:
    params, quant_state, grads = (_flatten(tree) for tree in (update.params, update.quant_state, update.grads))
    opt_state = update.opt_state
    for path, part in parts.items():
        params[path], quant_state[_memory_of(path)] = part["codebook"], part["memory"]
        grads[path], *moments = part["of_rows"]
        opt_state = _replace_moments(opt_state, path, part["codebook"].shape, moments)
    return Update(
        params=_unflatten(params), quant_state=_unflatten(quant_state), opt_state=opt_state, grads=_unflatten(grads)
    )


def _memory_of(path: str) -> str:
    return path.removesuffix("codebook") + "memory"


def _flatten(tree: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/", keep_empty_nodes=True)


def _unflatten(flat: dict[str, Any]) -> Any:
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _belongs_to(key_path: tuple[Any, ...], leaf: Any, path: str, shape: tuple[int, ...]) -> bool:
    """Whether a leaf of an optimiser's state is about one parameter: its keys end with the parameter's, all of them."""
    names: list[str] = []
    for key in reversed(key_path):
        if not isinstance(key, jax.tree_util.DictKey):
            break
        names.insert(0, str(key.key))
    return "/".join(names) == path and jnp.shape(leaf) == shape


def _moments(opt_state: Any, path: str, shape: tuple[int, ...]) -> list[jax.Array]:
    """The arrays an optimiser keeps for each entry of a parameter (momentum, moments), whatever the optimiser is."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return [leaf for key_path, leaf in leaves if _belongs_to(key_path, leaf, path, shape)]


def _replace_moments(opt_state: Any, path: str, shape: tuple[int, ...], new: list[jax.Array]) -> Any:
    """The optimiser's state with other arrays in place of those ``_moments`` finds, in the same order."""
    rest = iter(new)
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: next(rest) if _belongs_to(key_path, leaf, path, shape) else leaf, opt_state
    )


PROJECTIONS: dict[str, Callable[..., Projection]] = {"refill_codebooks": RefillCodebooks}


def build(spec: Spec) -> Projection:
    """Builds the projection a ``Spec`` names.

    Raises:
      ValueError: the name is not in the table or an option does not fit.
    """
    if spec.name not in PROJECTIONS:
        raise ValueError(f"projection {spec.name!r}: accepted are {', '.join(PROJECTIONS)}")
    return PROJECTIONS[spec.name](**spec.kwargs)
