"""Reads released PyTorch checkpoints without PyTorch, and without running anything from the file.

``read_pytorch`` takes the arrays out of the file, ``state_dict`` finds the network's among them, ``convert_names``
gives them our names and layout, ``import_state`` compares the result with a network, leaf by leaf, and
``import_pytorch`` does all of it. The golden tests use the steps, and single names in both directions.
Methods whose networks have other names add lines to ``MODULE_NAMES``, ``MODULE_ALIASES`` and ``LEAF_NAMES``. The
networks ``standard_resnet18``, ``-34`` and ``-50`` take torchvision's ImageNet weights, names and shapes.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bnn_jax import restricted_pickle
from bnn_jax.errors import CheckpointError, UserError
from bnn_jax.restricted_pickle import Buildable, shown

# torch.save wrote this number, as a pickle, in front of everything before PyTorch 1.6.
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

MODEL_STATE_KEYS = ("model_state_dict", "state_dict", "model")

MAX_NESTING = 64

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


@contextlib.contextmanager
def _errors_name(path: str | os.PathLike) -> Iterator[None]:
    """Makes every error on the way a CheckpointError of one line that begins with the path."""
    try:
        yield
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # Whatever a damaged file makes zipfile, zlib or numpy raise, it is the file's fault.
        raise CheckpointError(f"{path}: damaged PyTorch file ({type(error).__name__})") from error


def read_pytorch(path: str | os.PathLike) -> dict:
    """Everything in a file of ``torch.save``: tensors as arrays, plain scalars and containers as they are.

    Args:
      path: a file of PyTorch 1.6 or newer (a zip archive with a pickle in it).

    Returns:
      The saved dictionary; arrays are read-only and in PyTorch's layout.

    Raises:
      CheckpointError: no such file, a damaged file, or one that asks for anything but tensors and plain data.
    """
    with _errors_name(path):
        _require_zip(Path(path))
        with zipfile.ZipFile(path) as archive:
            reader = _TorchArchive(archive, size=Path(path).stat().st_size)
            content = restricted_pickle.load(
                io.BytesIO(reader.record("data.pkl")),
                allowed=_allowed_globals(),
                persistent_load=reader.storage,
                encoding="utf-8",
            )
        if type(content) is not dict:
            raise UserError(f"holds a {type(content).__name__}; accepted is a dictionary")
        _require_plain(content)
        return content


def _require_zip(path: Path) -> None:
    """Raises UserError, with the most likely mistake, unless the path is a zip file."""
    if not path.exists():
        raise UserError("no such file; accepted is a PyTorch checkpoint (.pth, .pt, .th, .pth.tar)")
    if not path.is_file():
        raise UserError("not a file; accepted is a PyTorch checkpoint (.pth, .pt, .th, .pth.tar)")
    with path.open("rb") as file:
        start = file.read(len(LEGACY_MAGIC))
    if start == LEGACY_MAGIC:
        raise UserError("a PyTorch file from before version 1.6; save it again with a newer PyTorch")
    if not zipfile.is_zipfile(path):
        raise UserError("not a PyTorch checkpoint, or cut off; accepted are files of torch.save since PyTorch 1.6")


class _TorchArchive:
    """The zip archive: one folder with ``data.pkl`` and one record of raw numbers per storage."""

    def __init__(self, archive: zipfile.ZipFile, size: int):
        """Reads the table of contents of an archive of ``size`` bytes."""
        records = archive.infolist()
        # PyTorch does not compress; others may, but weights not by much: more than this is meant to fill the memory.
        if sum(record.file_size for record in records) > 16 * size + (64 << 20):
            raise UserError("refused: it would unpack to many times its size")
        roots = [record.filename[: -len("/data.pkl")] for record in records if record.filename.endswith("/data.pkl")]
        if len(roots) != 1 or len({record.filename for record in records}) != len(records):
            raise UserError("not a PyTorch checkpoint: a zip file without exactly one 'data.pkl'")
        self._archive = archive
        self._root = roots[0]
        self._records = {record.filename: record for record in records}
        self._storages: dict[str, np.ndarray] = {}
        order = self.record("byteorder") if f"{self._root}/byteorder" in self._records else b"little"
        if order not in (b"little", b"big"):
            raise UserError(f"byte order {shown(order.decode('latin-1'))}; accepted are little, big")
        self._byte_order: Literal["<", ">"] = "<" if order == b"little" else ">"

    def record(self, name: str, size: int | None = None) -> bytes:
        """Content of a record, verified against its checksum and, where given, its size in bytes."""
        record = self._records.get(f"{self._root}/{name}")
        if record is None:
            raise UserError(f"damaged: record {shown(name)} is missing")
        if record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or record.flag_bits & 1:
            raise UserError(f"record {shown(name)} is encrypted or packed in a way PyTorch does not use")
        if size is not None and record.file_size != size:
            raise UserError(f"damaged: record {shown(name)} has {record.file_size} bytes, {size} expected")
        try:
            return self._archive.read(record)
        except zipfile.BadZipFile as error:
            raise UserError(f"damaged: record {shown(name)} has a wrong checksum or header") from error

    def storage(self, identifier: Any) -> np.ndarray:
        """The storage a persistent id ('storage', element type, key, device, elements) stands for: (elements,)."""
        kind, dtype, key, _, elements = identifier
        if kind != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str or type(elements) is not int:
            raise UserError("damaged: a storage of an unknown kind")
        if key not in self._storages:
            raw = self.record(f"data/{key}", size=elements * dtype.itemsize)
            self._storages[key] = np.frombuffer(raw, dtype.newbyteorder(self._byte_order)).astype(dtype, copy=False)
        storage = self._storages[key]
        if storage.dtype != dtype or storage.size != elements:
            raise UserError(f"damaged: storage {shown(key)} is used with two types or sizes")
        return storage


def _allowed_globals() -> dict[tuple[str, str], Any]:
    """What the files name, and what stands for it here."""
    return {
        ("collections", "OrderedDict"): Buildable(make=lambda: {}, build=lambda _, metadata: None),
        ("torch", "FloatStorage"): np.dtype(np.float32),
        ("torch", "LongStorage"): np.dtype(np.int64),
        ("torch._utils", "_rebuild_tensor_v2"): _tensor_view,
        ("torch._utils", "_rebuild_parameter"): _parameter,
    }


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> np.ndarray:
    """A tensor saved as a parameter, as in the ImageNet weights of torchvision: the tensor.

    Raises:
      UserError: it holds no tensor.
    """
    if not isinstance(data, np.ndarray):
        raise UserError("damaged: a parameter without a tensor")
    return data


def _tensor_view(
    storage: Any, offset: Any, sizes: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> np.ndarray:
    """A tensor: a view of ``sizes`` into a storage, all counted in elements.

    Raises:
      UserError: the view leaves its storage, or has more elements than it, so that no small file grows to a huge array.
    """
    if (
        not isinstance(storage, np.ndarray)
        or storage.ndim != 1
        or type(sizes) is not tuple
        or type(strides) is not tuple
    ):
        raise UserError("damaged: a tensor without a storage or a shape")
    numbers = (offset, *sizes, *strides)
    if len(sizes) != len(strides) or len(sizes) > 32 or not all(type(n) is int and n >= 0 for n in numbers):
        raise UserError("damaged: a tensor with a negative or malformed shape")
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides))
    elements = math.prod(sizes)
    if elements > storage.size or (elements > 0 and last >= storage.size) or offset > storage.size:
        raise UserError("damaged: a tensor reaches beyond its storage")
    if elements == 0:
        return np.zeros(sizes, storage.dtype)
    steps = tuple(stride * storage.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(storage[offset:], sizes, steps, writeable=False)


def _require_plain(value: Any, done: set[int] | None = None, above: tuple[int, ...] = ()) -> None:
    """Raises UserError unless ``value`` is arrays and plain data, nested but not into itself."""
    done = set() if done is None else done
    if value is None or isinstance(value, (bool, int, float, str, bytes, np.ndarray)) or id(value) in done:
        return
    if not isinstance(value, (dict, list, tuple)):
        raise UserError(f"refused: holds a {type(value).__name__}; accepted are tensors and plain data")
    if id(value) in above or len(above) >= MAX_NESTING:
        raise UserError(f"refused: nested into itself, or more than {MAX_NESTING} deep")
    for item in value.values() if isinstance(value, dict) else value:
        _require_plain(item, done, (*above, id(value)))
    done.add(id(value))


def state_dict(raw: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The network's arrays by name, wherever the file keeps them, without the ``module.`` of DataParallel.

    Args:
      raw: what ``read_pytorch`` returns: the state itself, or a dictionary with it under 'model_state_dict',
        'state_dict' or 'model'.

    Raises:
      CheckpointError: there is no such state.
    """
    state = next((raw[key] for key in MODEL_STATE_KEYS if isinstance(raw.get(key), dict)), raw)
    if not state or not all(type(k) is str and isinstance(value, np.ndarray) for k, value in state.items()):
        keys = ", ".join(shown(str(key)) for key in list(raw)[:8])
        accepted = ", ".join(MODEL_STATE_KEYS)
        raise CheckpointError(f"no state of a network: keys are {keys or 'none'}; accepted are {accepted}, or arrays")
    named = {re.sub(r"^(module\.)+", "", name): array for name, array in state.items()}
    if len(named) != len(state):
        raise CheckpointError("two arrays have the same name but for 'module.'")
    return named


def convert_layout(array: np.ndarray, *, to: Literal["ours", "pytorch"]) -> np.ndarray:
    """Kernel from PyTorch's layout to ours or back, as a view: OIHW <-> HWIO, (out, in) <-> (in, out).

    Arrays with other numbers of axes are the same in both.
    """
    if array.ndim == 4:
        return array.transpose((2, 3, 1, 0) if to == "ours" else (3, 2, 0, 1))
    return array.T if array.ndim == 2 else array


def _rename(text: str, source: str, target: str) -> str:
    """Replaces whole dotted parts that fit the template ``source`` by the template ``target``."""
    pattern = re.escape(source).replace(r"\{\}", r"(\d+)")
    numbers = iter(range(1, source.count("{}") + 1))
    replacement = re.sub(r"\{\}", lambda _: rf"\g<{next(numbers)}>", target)
    return re.sub(rf"(?<![^.]){pattern}(?![^.])", replacement, text)


def to_path(name: str, *, ndim: int) -> str | None:
    """Our path for a name of PyTorch's; None for arrays we do not keep.

    'layer2.0.downsample.0.weight' -> 'params/layer2_0/downsample_conv/kernel'. Unknown last parts stay as they are, in
    'params', so that a strict comparison names them. ``to_pytorch_name`` is the inverse but for the aliases.

    Args:
      name: PyTorch's name without 'module.'.
      ndim: number of axes, which tells a kernel from a scale.
    """
    module, _, leaf = name.rpartition(".")
    if leaf in IGNORED_LEAVES:
        return None
    only_kernels = KERNEL_ALIASES if leaf == "weight" and ndim > 1 else ()
    for pytorch, ours in only_kernels + MODULE_NAMES + MODULE_ALIASES:
        module = _rename(module, pytorch, ours)
    parts = module.split(".") if module else []
    for rule in LEAF_NAMES:
        fits = rule.one_dimensional in (None, ndim == 1) and rule.module in (None, *parts[-1:])
        if rule.pytorch == leaf and fits:
            return "/".join([rule.collection, *parts, rule.ours])
    return "/".join(["params", *parts, leaf])


def to_pytorch_name(path: str, *, pruned: bool = False) -> str:
    """PyTorch's name for one of our paths, the inverse of ``to_path``.

    'params/layer1_0/conv1/kernel' -> 'layer1.0.conv1.weight', or '.weight_orig' if ``pruned``.

    Args:
      path: our path, with its collection.
      pruned: whether the layer has a mask.

    Raises:
      ValueError: no rule for this path.
    """
    collection, _, rest = path.partition("/")
    rules = sorted(LEAF_NAMES, key=lambda rule: rule.pytorch == "weight_orig", reverse=pruned)
    for rule in rules:
        if rule.collection == collection and f"/{rest}".endswith(f"/{rule.ours}"):
            module = rest[: -len(rule.ours)].rstrip("/").replace("/", ".")
            for pytorch, ours in MODULE_NAMES:
                module = _rename(module, ours, pytorch)
            return f"{module}.{rule.pytorch}" if module else rule.pytorch
    raise ValueError(f"path {path!r}: no PyTorch name is known for it")


def _convert(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our paths and layout, not nested."""
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


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parts, leaf = path.split("/")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or leaf in node:
            raise CheckpointError(f"an array of the file is inside of another one: {shown(path)}")
        node[leaf] = value
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return rows


def convert_names(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A state of PyTorch under our names and in our layout.

    For single names and arrays, in both directions: ``to_path``, ``to_pytorch_name``, ``convert_layout``.

    Args:
      state: arrays by PyTorch's names, as ``state_dict`` returns them.

    Returns:
      {'params': nested, 'batch_stats': nested, 'quant_state': nested}; masks are float32.

    Raises:
      CheckpointError: two names stand for the same array.
    """
    flat = _convert(state)
    masks = {path: array.astype(np.float32) for path, array in flat.items() if path.endswith("/mask")}
    return {"params": {}, "batch_stats": {}, "quant_state": {}} | _nested({**flat, **masks})


def import_state(state: Mapping[str, np.ndarray], target: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a network from a state of PyTorch; nothing may be missing, left over or of another shape.

    Args:
      state: arrays by PyTorch's names.
      target: the network's variables, as arrays or ``jax.ShapeDtypeStruct``: collections of nested dictionaries.

    Returns:
      New arrays in the structure, shapes and types of ``target``.

    Raises:
      CheckpointError: the state is of another network; one line with the first differences and their numbers.
    """
    wanted = _flat(target)
    found = _with_memories(_convert(state), wanted)
    shared = [path for path in wanted if path in found]
    differences = {
        "missing in the file": [path for path in wanted if path not in found],
        "unknown to the network": [shown(path) for path in found if path not in wanted],
        "of another shape or type": [
            f"{path} {found[path].dtype}{found[path].shape} for {wanted[path].dtype}{tuple(wanted[path].shape)}"
            for path in shared
            if not _fits(path, found[path], wanted[path])
        ],
    }
    if any(differences.values()):
        parts = [f"{len(rows)} {kind} ({_first(rows)})" for kind, rows in differences.items() if rows]
        raise CheckpointError(f"checkpoint of another network: {'; '.join(parts)}")
    return _nested({path: np.array(found[path], wanted[path].dtype, order="C") for path in wanted})


def _with_memories(found: dict[str, np.ndarray], wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
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


def _fits(path: str, array: np.ndarray, leaf: Any) -> bool:
    """Same shape and kind of number; a mask may be saved in any type."""
    return array.shape == tuple(leaf.shape) and (
        path.endswith("/mask") or array.dtype.kind == np.dtype(leaf.dtype).kind
    )


def _first(rows: list[str], count: int = 3) -> str:
    return ", ".join(rows[:count]) + (", ..." if len(rows) > count else "")


def import_pytorch(path: str | os.PathLike, target: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a network from a released PyTorch checkpoint.

    Args:
      path: file of ``torch.save``.
      target: the network's variables, as arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      New arrays in the structure, shapes and types of ``target``.

    Raises:
      CheckpointError: one line that begins with the path: the file is missing, damaged, hostile or of another network.
    """
    raw = read_pytorch(path)
    with _errors_name(path):
        return import_state(state_dict(raw), target)
