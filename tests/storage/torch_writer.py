"""Writes files in the formats of ``torch.save``, from nothing, and gives our arrays PyTorch's names."""

import dataclasses
import pickle
import zipfile

import numpy as np

from bnn_jax.storage import pytorch
from bnn_jax.storage.torch_files import LEGACY_MAGIC, LEGACY_VERSION


def to_pytorch_name(path: str, *, pruned: bool = False) -> str:
    """PyTorch's name for one of our paths, the inverse of ``pytorch.to_path`` but for the aliases.

    'params/layer1_0/conv1/kernel' -> 'layer1.0.conv1.weight', or '.weight_orig' if ``pruned``.
    """
    collection, _, rest = path.partition("/")
    rules = sorted(pytorch.LEAF_NAMES, key=lambda rule: rule.pytorch == "weight_orig", reverse=pruned)
    fitting = (rule for rule in rules if rule.collection == collection and f"/{rest}".endswith(f"/{rule.ours}"))
    rule = next(fitting)
    module = rest.removesuffix(rule.ours).rstrip("/").replace("/", ".")
    for theirs, ours in pytorch.MODULE_NAMES:
        module = pytorch.rename(module, ours, theirs)
    return f"{module}.{rule.pytorch}" if module else rule.pytorch


# A small writer of the format of torch.save: its pickles are put together by hand, as PyTorch's names are not at hand.
@dataclasses.dataclass
class Global:
    module: str
    name: str


@dataclasses.dataclass
class Call:
    function: object
    arguments: object


@dataclasses.dataclass
class Build:
    target: object
    state: object


@dataclasses.dataclass
class Persistent:
    identifier: object


@dataclasses.dataclass
class Opcodes:
    code: bytes


def assemble(value) -> bytes:
    """Instructions of pickle protocol 2 that leave ``value`` on the stack."""
    match value:
        case Opcodes(code):
            return code
        case Global(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, arguments):
            return assemble(function) + assemble(arguments) + b"R"
        case Build(target, state):
            return assemble(target) + assemble(state) + b"b"
        case Persistent(identifier):
            return assemble(identifier) + b"Q"
        case dict():
            return b"}(" + b"".join(assemble(part) for pair in value.items() for part in pair) + b"u"
        case list():
            return b"](" + b"".join(map(assemble, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(assemble, value)) + b"t"
        case _:
            return pickle.dumps(value, 2)[2:-1]


ORDERED_DICT = Call(Global("collections", "OrderedDict"), ())
STORAGES = {np.dtype(np.float32): "FloatStorage", np.dtype(np.int64): "LongStorage"}


def storage(key="0", *, kind="FloatStorage", elements=6) -> Persistent:
    return Persistent(("storage", Global("torch", kind), key, "cuda:0", elements))


def tensor(source=None, *, offset=0, size=(2, 3), stride=(3, 1)) -> Call:
    arguments = (source or storage(), offset, size, stride, False, ORDERED_DICT)
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)


def parameter(data) -> Call:
    return Call(Global("torch._utils", "_rebuild_parameter"), (data, True, ORDERED_DICT))


def write(path, content, records, *, compression=zipfile.ZIP_STORED, extra=()):
    """Writes a file as torch.save does; ``records`` are the raw storages by key."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + assemble(content) + b".")
        for key, data in records.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
        for name, data in dict(extra).items():
            archive.writestr(f"archive/{name}", data)
    return path


def saved(state: dict, *, parameters: bool = False) -> tuple[object, dict[str, bytes]]:
    """Content and records of a state: an OrderedDict of tensors, or parameters, with PyTorch's version table."""
    items, records = {}, {}
    for key, (name, array) in enumerate(state.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        source = storage(str(key), kind=STORAGES[array.dtype], elements=array.size)
        items[name] = tensor(source, size=array.shape, stride=strides)
        if parameters and not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            items[name] = parameter(items[name])
        records[str(key)] = array.tobytes()
    ordered = Opcodes(assemble(ORDERED_DICT) + assemble(items)[1:])
    return Build(ordered, {"_metadata": {"": {"version": 1}}}), records


def save(path, state: dict, **options):
    content, records = saved(state)
    return write(path, {"model_state_dict": content, "epoch": 3, "lr": 0.1}, records, **options)


def write_legacy(path, content, records, *, version=LEGACY_VERSION, keys=None):
    """Writes a file as torch.save did before PyTorch 1.6; ``records`` are the raw storages by key, of floats."""
    system = {"protocol_version": version, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    pickles = [b"\x80\x02" + assemble(value) + b"." for value in (version, system, content, keys or list(records))]
    data = b"".join((len(raw) // 4).to_bytes(8, "little") + raw for raw in records.values())
    path.write_bytes(LEGACY_MAGIC + b"".join(pickles) + data)
    return path


def torchvision_state(blocks: tuple[int, ...], *, bottleneck: bool, widths=(64, 128, 256, 512), classes=1000) -> dict:
    """Names and shapes of torchvision's ResNets, with zeros that take no memory."""
    shapes = {"conv1.weight": (widths[0], 3, 7, 7)}
    inputs = widths[0]

    def norm(name: str, width: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{leaf}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("bn1", widths[0])
    for stage, (count, width) in enumerate(zip(blocks, widths), start=1):
        for index in range(count):
            name = f"layer{stage}.{index}"
            output = 4 * width if bottleneck else width
            kernels = ((width, 1), (width, 3), (output, 1)) if bottleneck else ((width, 3), (width, 3))
            previous = inputs
            for number, (features, size) in enumerate(kernels, start=1):
                shapes[f"{name}.conv{number}.weight"] = (features, previous, size, size)
                norm(f"{name}.bn{number}", features)
                previous = features
            if index == 0 and (stage > 1 or bottleneck):
                shapes[f"{name}.downsample.0.weight"] = (output, inputs, 1, 1)
                norm(f"{name}.downsample.1", output)
            inputs = output
    shapes |= {"fc.weight": (classes, inputs), "fc.bias": (classes,)}
    dtypes = {name: np.int64 if name.endswith("tracked") else np.float32 for name in shapes}
    return {name: np.broadcast_to(np.zeros((), dtypes[name]), shape) for name, shape in shapes.items()}
