"""Reads released PyTorch checkpoints without PyTorch, and without running anything from the file.

``read_pytorch`` takes the arrays out of the file, ``state_dict`` finds the network's among them, ``convert_names``
gives them our names and layout, and ``import_state`` compares the result with a network, leaf by leaf.
``other_files`` reads files of any format. Methods whose networks have other names add lines to ``MODULE_NAMES``,
``MODULE_ALIASES`` and ``LEAF_NAMES``. The networks ``standard_resnet18``, ``-34`` and ``-50`` take torchvision's
ImageNet weights, names and shapes.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

import flax.traverse_util
import numpy as np

from bnn_jax.errors import CheckpointError
from bnn_jax.restricted_pickle import shown
from bnn_jax.storage.fitting import describe
from bnn_jax.storage.torch_files import MAX_TENSORS

MODEL_STATE_KEYS = ("model_state_dict", "state_dict", "model", "net")
# What programs put in front of every name: DataParallel, and classes around the network.
PREFIX = re.compile(r"^((module|model|net)\.)+")

# Names of modules: PyTorch's (those of torchvision's ResNets), ours; {} is a number that both share.
MODULE_NAMES: tuple[tuple[str, str], ...] = (
    ("layer{}.{}", "layer{}_{}"),
    ("downsample.0", "downsample_conv"),
    ("downsample.1", "downsample_bn"),
    # ReActNet and SNN.
    ("move0", "sign_shift"),
    ("move1", "rprelu.input_shift"),
    ("prelu", "rprelu.prelu"),
    ("move2", "rprelu.output_shift"),
)

# Further names of PyTorch for the same modules, only read: names written are those above.
MODULE_ALIASES: tuple[tuple[str, str], ...] = (
    # The CIFAR networks of SKD-BNN.
    ("linear", "fc"),
    ("shortcut.0", "downsample_conv"),
    ("shortcut.1", "downsample_bn"),
    # ReActNet and SNN, whose shortcuts begin with a pooling.
    ("binary_conv", "conv1"),
    ("binarize", "weight_quantizer"),
    ("downsample.2", "downsample_bn"),
)
# Those for kernels only: elsewhere the same name is another module's.
KERNEL_ALIASES: tuple[tuple[str, str], ...] = (("downsample.1", "downsample_conv"),)


@dataclasses.dataclass(frozen=True)
class LeafName:
    """How one kind of array is called.

    Attributes:
      pytorch: last part of PyTorch's name.
      collection: collection it belongs to.
      ours: end of our path.
      one_dimensional: whether the rule is for arrays with one axis, with more (False), or for all (None).
      module: last part of our module's name that the rule is for; None for all.
    """

    pytorch: str
    collection: str
    ours: str
    one_dimensional: bool | None = None
    module: str | None = None


LEAF_NAMES: tuple[LeafName, ...] = (
    LeafName("weight", "params", "kernel", one_dimensional=False),
    LeafName("weight", "params", "slope", one_dimensional=True, module="prelu"),
    LeafName("weight", "params", "scale", one_dimensional=True),
    LeafName("bias", "params", "bias"),
    LeafName("running_mean", "batch_stats", "mean"),
    LeafName("running_var", "batch_stats", "var"),
    # torch.nn.utils.prune splits the weight in two.
    LeafName("weight_orig", "params", "kernel"),
    LeafName("weight_mask", "quant_state", "weight_quantizer/mask"),
    # SNN's codebooks.
    LeafName("patterns", "params", "codebook"),
)

# Counts the batches seen; PyTorch reads it only where the momentum is None.
IGNORED_LEAVES = ("num_batches_tracked",)


def state_dict(raw: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The network's arrays by name, wherever the file keeps them, without ``PREFIX``.

    Args:
      raw: what ``read_pytorch`` returns: the state itself, or a dictionary with it under 'model_state_dict',
        'state_dict', 'model' or 'net'.

    Raises:
      CheckpointError: there is no such state.
    """
    state = next((raw[key] for key in MODEL_STATE_KEYS if isinstance(raw.get(key), dict)), raw)
    if not state or not all(type(k) is str and isinstance(value, np.ndarray) for k, value in state.items()):
        keys = ", ".join(shown(str(key)) for key in list(raw)[:8])
        accepted = ", ".join(MODEL_STATE_KEYS)
        raise CheckpointError(f"no state of a network: keys are {keys or 'none'}; accepted are {accepted}, or arrays")
    if len(state) > MAX_TENSORS:
        raise CheckpointError(f"refused: {len(state)} arrays; accepted are at most {MAX_TENSORS}")
    named = {PREFIX.sub("", name): array for name, array in state.items()}
    if len(named) != len(state):
        raise CheckpointError("two arrays have the same name but for 'module.' in front")
    return named


def convert_layout(array: np.ndarray, *, to: Literal["ours", "pytorch"]) -> np.ndarray:
    """Kernel from PyTorch's layout to ours or back, as a view: OIHW <-> HWIO, (out, in) <-> (in, out).

    Arrays with other numbers of axes are the same in both.
    """
    if array.ndim == 4:
        return array.transpose((2, 3, 1, 0) if to == "ours" else (3, 2, 0, 1))
    return array.T if array.ndim == 2 else array


def rename(text: str, source: str, target: str) -> str:
    """Replaces whole dotted parts that fit the template ``source`` by the template ``target``."""
    pattern, replacement = _replacement(source, target)
    return pattern.sub(replacement, text)


@functools.cache
def _replacement(source: str, target: str) -> tuple[re.Pattern[str], str]:
    """Pattern and replacement of two templates."""
    pattern = re.escape(source).replace(r"\{\}", r"(\d+)")
    numbers = iter(range(1, source.count("{}") + 1))
    replacement = re.sub(r"\{\}", lambda _: rf"\g<{next(numbers)}>", target)
    return re.compile(rf"(?<![^.]){pattern}(?![^.])"), replacement


def to_path(name: str, *, ndim: int) -> str | None:
    """Our path for a name of PyTorch's; None for arrays we do not keep.

    'layer2.0.downsample.0.weight' -> 'params/layer2_0/downsample_conv/kernel'. Unknown last parts stay as they are, in
    'params', so that a strict comparison names them.

    Args:
      name: PyTorch's name without 'module.'.
      ndim: number of axes, which tells a kernel from a scale.
    """
    module, _, leaf = name.rpartition(".")
    if leaf in IGNORED_LEAVES:
        return None
    only_kernels = KERNEL_ALIASES if leaf == "weight" and ndim > 1 else ()
    for pytorch, ours in only_kernels + MODULE_NAMES + MODULE_ALIASES:
        module = rename(module, pytorch, ours)
    parts = module.split(".") if module else []
    for rule in LEAF_NAMES:
        fits = rule.one_dimensional in (None, ndim == 1) and rule.module in (None, *parts[-1:])
        if rule.pytorch == leaf and fits:
            return "/".join([rule.collection, *parts, rule.ours])
    return "/".join(["params", *parts, leaf])


def convert_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state of PyTorch under our paths, not nested, and in our layout.

    Args:
      state: arrays by PyTorch's names, as ``state_dict`` returns them.

    Raises:
      CheckpointError: two names stand for the same array.
    """
    converted: dict[str, np.ndarray] = {}
    for name, array in state.items():
        path = to_path(name, ndim=array.ndim)
        if path is None:
            continue
        if path in converted:
            raise CheckpointError(f"two arrays of the file belong to {shown(path)}")
        converted[path] = _in_our_layout(path, array)
    return converted


def _in_our_layout(path: str, array: np.ndarray) -> np.ndarray:
    if path.endswith(("/kernel", "/mask")):
        return convert_layout(array, to="ours")
    # ReActNet's shifts have the axes of the activations, (1, C, 1, 1).
    is_shift = path.endswith("_shift/bias") and array.ndim == 4 and array.size == array.shape[1]
    return array.reshape(-1) if is_shift else array


class Misfit(CheckpointError):
    """The arrays of a file are those of another network.

    Attributes:
      found: the arrays by our paths.
    """

    def __init__(self, message: str, found: Mapping[str, np.ndarray]):
        super().__init__(message)
        self.found = found


def import_state(state: Mapping[str, np.ndarray], target: Mapping[str, Any]) -> dict[str, Any]:
    """``import_arrays`` of a state by PyTorch's names."""
    return import_arrays(convert_names(state), target)


def import_arrays(found: Mapping[str, np.ndarray], target: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a network from arrays by our paths; nothing may be missing, left over or of another shape.

    Args:
      found: the arrays.
      target: the network's variables, as arrays or ``jax.ShapeDtypeStruct``: collections of nested dictionaries.

    Returns:
      New arrays in the structure, shapes and types of ``target``; knobs that the file does not have are left out, so
      that their defaults hold.

    Raises:
      Misfit: the arrays are of another network; one line with the nearest differences and their numbers.
    """
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(target, sep="/")
    wanted = {path: leaf for path, leaf in leaves.items() if path in found or not path.startswith("knobs/")}
    found = _with_memories(found, wanted)
    missing = [path for path in wanted if path not in found]
    unknown = [path for path in found if path not in wanted]
    others = [
        f"{path} {found[path].dtype}{found[path].shape} for {wanted[path].dtype}{tuple(wanted[path].shape)}"
        for path in wanted
        if path in found and not fits(path, found[path], wanted[path])
    ]
    if differences := describe(missing, unknown, others):
        raise Misfit(differences, found)
    arrays = {path: np.array(found[path], wanted[path].dtype, order="C") for path in wanted}
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def _with_memories(found: Mapping[str, np.ndarray], wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays and, for each codebook, the memory that SNN's files leave out: at its start, the codebook's signs."""
    memories = [path for path in wanted if path.endswith("/weight_quantizer/memory") and path not in found]
    sources = {
        path: path.replace("quant_state/", "params/", 1).removesuffix("memory") + "codebook" for path in memories
    }
    signs = {
        path: np.where(found[source] > 0, 1, -1).astype(np.float32)
        for path, source in sources.items()
        if source in found
    }
    return {**found, **signs}


def fits(path: str, array: np.ndarray, leaf: Any) -> bool:
    """Same shape and kind of number; a mask may be saved in any type."""
    return array.shape == tuple(leaf.shape) and (
        path.endswith("/mask") or array.dtype.kind == np.dtype(leaf.dtype).kind
    )
