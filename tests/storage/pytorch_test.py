import random
import zipfile

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bnn_jax import networks
from bnn_jax.errors import CheckpointError
from bnn_jax.experiment.start import variable_shapes
from bnn_jax.quantizers import QuantContext
from bnn_jax.stages import QuantSpec, spec
from bnn_jax.storage import pytorch
from bnn_jax.storage.other_files import import_file
from bnn_jax.storage.torch_files import read_pytorch
from tests.conftest import ROOT
from tests.storage.torch_writer import (
    ORDERED_DICT,
    Build,
    Call,
    Global,
    Opcodes,
    Persistent,
    assemble,
    parameter,
    save,
    saved,
    storage,
    tensor,
    to_pytorch_name,
    torchvision_state,
    write,
    write_legacy,
)

RELEASED = ROOT.parent / "shared" / "checkpoints"
W4A4 = RELEASED / "asbq_resnet20_cifar10_w4a4.pth.tar"
W1A1 = RELEASED / "skd_resnet20_cifar10_w1a1.th"
LEGACY = RELEASED / "float_resnet20_cifar10_legacy_format.th"
needs_released = pytest.mark.skipif(not RELEASED.is_dir(), reason="../shared/checkpoints is absent")


def random_array(*shape) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def small_state() -> dict[str, np.ndarray]:
    """A network of one quantized convolution, one shortcut and a classifier, in PyTorch's names and layout."""
    state = {"conv1.weight": random_array(4, 3, 3, 2)}
    for norm in ("layer2.0.bn1", "layer2.0.downsample.1"):
        for index, leaf in enumerate(("weight", "bias", "running_mean", "running_var")):
            state[f"{norm}.{leaf}"] = random_array(4) + np.float32(index)
        state[f"{norm}.num_batches_tracked"] = np.int64(7) * np.ones((), np.int64)
    state["layer2.0.conv1.weight_orig"] = random_array(5, 4, 3, 3)
    state["layer2.0.conv1.weight_mask"] = np.repeat(np.float32([1, 0, 1, 1, 1]), 36).reshape(5, 4, 3, 3)
    state["layer2.0.downsample.0.weight"] = random_array(5, 4, 1, 1)
    return state | {"fc.weight": random_array(10, 5), "fc.bias": random_array(10)}


NORM_PARAMETERS = {"scale": jax.ShapeDtypeStruct((4,), np.float32), "bias": jax.ShapeDtypeStruct((4,), np.float32)}
NORM_STATISTICS = {"mean": jax.ShapeDtypeStruct((4,), np.float32), "var": jax.ShapeDtypeStruct((4,), np.float32)}


def small_target() -> dict:
    """The same network in our structure."""

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, np.float32)

    return {
        "params": {
            "conv1": {"kernel": leaf(3, 2, 3, 4)},
            "layer2_0": {
                "bn1": NORM_PARAMETERS,
                "conv1": {"kernel": leaf(3, 3, 4, 5)},
                "downsample_conv": {"kernel": leaf(1, 1, 4, 5)},
                "downsample_bn": NORM_PARAMETERS,
            },
            "fc": {"kernel": leaf(5, 10), "bias": leaf(10)},
        },
        "batch_stats": {"layer2_0": {"bn1": NORM_STATISTICS, "downsample_bn": NORM_STATISTICS}},
        "quant_state": {"layer2_0": {"conv1": {"weight_quantizer": {"mask": leaf(3, 3, 4, 5)}}}},
    }


def assert_refused(path, reason=None):
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_pytorch(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_saved_state_is_read_back(tmp_path, compression):
    raw = read_pytorch(save(tmp_path / "x.pth", small_state(), compression=compression))
    assert {key: raw[key] for key in ("epoch", "lr")} == {"epoch": 3, "lr": 0.1}
    assert list(raw["model_state_dict"]) == list(small_state())
    for name, array in small_state().items():
        assert raw["model_state_dict"][name].dtype == array.dtype
        np.testing.assert_array_equal(raw["model_state_dict"][name], array)


def test_a_strided_view_with_an_offset_is_read(tmp_path):
    content = {"x": tensor(storage(elements=8), offset=1, size=(3, 2), stride=(1, 3))}
    raw = read_pytorch(write(tmp_path / "x.pth", content, {"0": np.arange(8, dtype=np.float32).tobytes()}))
    np.testing.assert_array_equal(raw["x"], [[1, 4], [2, 5], [3, 6]])


def test_two_tensors_may_share_a_storage(tmp_path):
    content = {"x": tensor(), "y": tensor(size=(6,), stride=(1,))}
    raw = read_pytorch(write(tmp_path / "x.pth", content, {"0": np.arange(6, dtype=np.float32).tobytes()}))
    assert np.shares_memory(raw["x"], raw["y"])


def test_a_file_from_before_version_1_6_is_read(tmp_path):
    content = {"x": tensor(), "y": tensor(storage("7", elements=2), size=(2,), stride=(1,))}
    numbers = np.arange(8, dtype=np.float32)
    path = write_legacy(tmp_path / "x.th", content, {"0": numbers[:6].tobytes(), "7": numbers[6:].tobytes()})
    raw = read_pytorch(path)
    np.testing.assert_array_equal(raw["x"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(raw["y"], [6, 7])
    assert not raw["x"].flags.writeable


def test_a_cut_off_file_from_before_version_1_6_is_an_error_at_every_length(tmp_path):
    path = write_legacy(tmp_path / "x.th", {"x": tensor()}, {"0": bytes(24)})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert_refused(path)


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        ({"x": tensor(storage(elements=1 << 40))}, {}, "larger than the file"),
        ({"x": tensor(storage("1"))}, {}, "other tensors than it lists"),
        ({"x": tensor()}, {"keys": ["0", "0"]}, "other tensors than it lists"),
        ({"x": tensor()}, {"keys": 3}, "other tensors than it lists"),
        ({"x": tensor(storage(elements=5), size=(5,), stride=(1,))}, {}, "of another length"),
        ({"x": Call(Global("os", "system"), ("true",))}, {}, r"os\.system"),
    ],
)
def test_a_damaged_or_hostile_file_from_before_version_1_6_is_refused(tmp_path, content, options, reason):
    assert_refused(write_legacy(tmp_path / "x.th", content, {"0": bytes(24)}, **options), reason)


def test_an_empty_tensor_is_read(tmp_path):
    content = {"x": tensor(storage(elements=0), size=(0, 3), stride=(3, 1))}
    assert read_pytorch(write(tmp_path / "x.pth", content, {"0": b""}))["x"].shape == (0, 3)


def test_big_endian_storages_are_read(tmp_path):
    records = {"0": np.arange(6).astype(">f4").tobytes()}
    raw = read_pytorch(write(tmp_path / "x.pth", {"x": tensor()}, records, extra={"byteorder": b"big"}))
    np.testing.assert_array_equal(raw["x"], np.float32([[0, 1, 2], [3, 4, 5]]))


def test_an_unknown_byte_order_is_refused(tmp_path):
    path = write(tmp_path / "x.pth", {"x": tensor()}, {"0": bytes(24)}, extra={"byteorder": b"middle"})
    assert_refused(path, "byte order middle; accepted are little, big")


def touch(marker) -> tuple:
    return (f"touch {marker}",)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda m: Call(Global("os", "system"), touch(m)), r"os\.system"),
        (lambda m: Call(Global("builtins", "eval"), (f"open({str(m)!r}, 'w')",)), r"builtins\.eval"),
        (lambda m: Opcodes(b"\x8c\x02os\x94\x8c\x06system\x94\x93" + assemble(touch(m)) + b"R"), r"os\.system"),
        (lambda m: Opcodes(f"(S'touch {m}'\nios\nsystem\n".encode()), "STRING"),
        (lambda m: Opcodes(b"(" + assemble(f"touch {m}") + b"ios\nsystem\n"), "INST"),
        (lambda m: Opcodes(b"(cos\nsystem\n" + assemble(f"touch {m}") + b"o"), r"os\.system"),
        (lambda m: Opcodes(b"\x82\x01"), "EXT1"),
        (lambda m: Opcodes(assemble(Global("torch", "FloatStorage")) + b")\x81"), "NEWOBJ"),
        (lambda m: Call(Global("torch", "FloatStorage"), (1 << 40,)), "TypeError"),
        (lambda m: Call(Global("collections", "OrderedDict"), ([["a", 1]],)), "TypeError"),
        (lambda m: Call(Global("torch._utils", "_rebuild_tensor_v2"), ()), "TypeError"),
        (lambda m: Call(Global("torch._utils", "_rebuild_parameter"), (tensor(),)), "TypeError"),
        (lambda m: parameter(3), "a parameter without a tensor"),
        (lambda m: Build(Global("torch._utils", "_rebuild_tensor_v2"), {"__call__": 1}), "changes an object"),
        (lambda m: Build(Global("collections", "OrderedDict"), {"make": 1}), "changes an object"),
        (lambda m: Build(Global("torch", "FloatStorage"), {"type": 1}), "changes an object"),
        (lambda m: Build(tensor(), {"shape": (1,)}), "changes an object of type ndarray"),
        (lambda m: Persistent(Persistent(("storage", 1))), "damaged"),
        (lambda m: Persistent(("module", Global("torch", "FloatStorage"), "0", "cpu", 6)), "unknown kind"),
        (lambda m: Persistent(("storage", "FloatStorage", "0", "cpu", 6)), "unknown kind"),
        (
            lambda m: Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", 6, ("0", 0, 6))),
            "unknown kind",
        ),
        (lambda m: storage("../../version"), r"record data/\.\./\.\./version is missing"),
        (lambda m: storage("7"), "record data/7 is missing"),
        (lambda m: storage(elements=-6), "unknown kind"),
        (lambda m: storage(elements=1 << 60), "has 24 bytes"),
        (lambda m: storage(kind="LongStorage", elements=6), "has 24 bytes, 48 expected"),
        (lambda m: [storage(), storage(kind="LongStorage", elements=3)], "two types or sizes"),
        (lambda m: Opcodes(b"(" * 100000), "IndexError|dict is expected"),
    ],
)
def test_hostile_content_is_refused_and_not_run(tmp_path, make, reason):
    marker = tmp_path / "marker"
    path = write(tmp_path / "x.pth", {"before": ORDERED_DICT, "x": make(marker)}, {"0": bytes(24)})
    assert_refused(path, reason)
    assert not marker.exists()


@pytest.mark.parametrize(
    "view",
    [
        {"size": (2, 4)},
        {"size": (2, 3), "stride": (4, 1)},
        {"offset": 1},
        {"offset": 7, "size": (0,), "stride": (1,)},
        {"offset": -1},
        {"size": (-2, -3)},
        {"stride": (-3, 1)},
        {"size": (6,), "stride": (1, 1)},
        {"size": (1 << 62, 1 << 62), "stride": (0, 0)},
        {"size": (1 << 40,), "stride": (0,)},
        {"size": (2, 2), "stride": ((1 << 62), 1)},
        {"size": (1, 0, 1 << 62), "stride": (1, 1, 1)},
        {"size": (2.0, 3)},
        {"size": (True, 3)},
        {"size": [2, 3]},
        {"size": (1,) * 80, "stride": (1,) * 80},
        {"source": "storage"},
    ],
    ids=str,
)
def test_views_outside_of_their_storage_are_refused(tmp_path, view):
    path = write(tmp_path / "x.pth", {"x": tensor(**view)}, {"0": bytes(24)})
    assert_refused(path, "damaged")


def test_a_wrong_checksum_is_an_error(tmp_path):
    path = save(tmp_path / "x.pth", small_state())
    data = bytearray(path.read_bytes())
    data[data.index(small_state()["fc.bias"].tobytes()) + 5] ^= 1
    path.write_bytes(data)
    assert_refused(path, "record data/.* has a wrong checksum")


def test_a_file_that_declares_many_times_its_size_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + assemble({"x": tensor(storage(elements=1 << 28))}) + b".")
        archive.writestr("archive/data/0", bytes(24))
        # The table of contents, written when the archive is closed, then says one gigabyte.
        archive.getinfo("archive/data/0").file_size = 1 << 30
    assert_refused(path, "many times its size")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, compression):
    assert_refused(save(tmp_path / "x.pth", small_state(), compression=compression), "packed in a way that is not read")


def test_a_missing_record_is_named(tmp_path):
    content, records = saved(small_state())
    del records["3"]
    assert_refused(write(tmp_path / "x.pth", content, records), "record data/3 is missing")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_stored_twice_is_refused(tmp_path):
    path = save(tmp_path / "x.pth", small_state(), extra={"data/0": bytes(24)})
    assert_refused(path, "not a PyTorch checkpoint")


def not_there(tmp_path):
    return tmp_path / "none.pth"


def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def text_file(tmp_path):
    (tmp_path / "notes.txt").write_text("no checkpoint\n")
    return tmp_path / "notes.txt"


def empty_file(tmp_path):
    (tmp_path / "empty.pth").touch()
    return tmp_path / "empty.pth"


def other_zip(tmp_path):
    np.savez(tmp_path / "arrays.npz", x=np.zeros(3))
    return tmp_path / "arrays.npz"


def legacy_file(tmp_path):
    return write_legacy(tmp_path / "old.pth", {}, {}, version=1002)


def list_file(tmp_path):
    return write(tmp_path / "list.pth", [1, 2], {})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (not_there, "no such file"),
        (folder, "not a file"),
        (text_file, "not a PyTorch checkpoint"),
        (empty_file, "not a PyTorch checkpoint"),
        (other_zip, r"without exactly one 'data\.pkl'"),
        (legacy_file, "an unknown version"),
        (list_file, "holds a list"),
    ],
)
def test_what_is_no_checkpoint_is_a_kind_error(tmp_path, make, reason):
    assert_refused(make(tmp_path), reason)


def test_an_unreadable_file_is_an_error(tmp_path, monkeypatch):
    path = save(tmp_path / "x.pth", small_state())

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(zipfile, "ZipFile", fail)
    assert_refused(path, "cannot be read: Permission denied")


def test_a_truncated_file_is_an_error_at_every_length(tmp_path):
    data = save(tmp_path / "x.pth", small_state()).read_bytes()
    for length in range(0, len(data), 23):
        path = tmp_path / "cut.pth"
        path.write_bytes(data[:length])
        assert_refused(path)


def test_a_changed_byte_is_an_error_or_changes_nothing(tmp_path):
    """Everything that is read has a checksum; what has none (dates, permissions, the version) does not matter."""
    data = save(tmp_path / "x.pth", small_state()).read_bytes()
    path = tmp_path / "changed.pth"
    refused = 0
    for position in range(0, len(data), 11):
        path.write_bytes(data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :])
        try:
            state = read_pytorch(path)["model_state_dict"]
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert list(state) == list(small_state())
        for name, array in small_state().items():
            np.testing.assert_array_equal(state[name], array)
    assert refused > 300


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
def test_a_changed_pickle_with_a_right_checksum_raises_nothing_but_checkpoint_errors(tmp_path):
    content, records = saved({"fc.weight": random_array(2, 3), "fc.bias": random_array(2)})
    source = assemble({"state_dict": content, "epoch": 3})
    target = {"params": {"fc": {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}}
    generator = random.Random(0)
    refused = 0
    for _ in range(600):
        code = bytearray(source)
        for _ in range(generator.randint(1, 2)):
            code[generator.randrange(len(code))] = generator.randrange(256)
        path = write(tmp_path / "x.pth", Opcodes(bytes(code)), records)
        try:
            variables = import_file(path, target)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert variables["params"]["fc"]["kernel"].shape == (3, 2)
    assert refused > 300


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model"])
def test_the_state_is_found_and_its_prefix_stripped(key):
    array = np.zeros(2)
    raw = {"epoch": 3, key: {"module.fc.bias": array, "module.module.bn.bias": array, "my.module.x": array}}
    assert list(pytorch.state_dict(raw)) == ["fc.bias", "bn.bias", "my.module.x"]


def test_the_file_may_be_the_state_itself():
    array = np.zeros(2)
    assert pytorch.state_dict({"module.fc.bias": array}) == {"fc.bias": array}


@pytest.mark.parametrize("raw", [{}, {"epoch": 3}, {"state_dict": {}}, {"state_dict": {"a": 1}}, {1: np.zeros(2)}])
def test_a_file_without_a_state_is_an_error(raw):
    with pytest.raises(CheckpointError, match=r"no state of a network: keys are .*; accepted are model_state_dict"):
        pytorch.state_dict(raw)


def test_names_that_differ_by_the_prefix_only_are_an_error():
    with pytest.raises(CheckpointError, match="same name"):
        pytorch.state_dict({"module.a": np.zeros(2), "a": np.zeros(2)})


NAMES = [
    ("conv1.weight", 4, "params/conv1/kernel"),
    ("bn.weight", 1, "params/bn/scale"),
    ("bn.running_var", 1, "batch_stats/bn/var"),
    ("layer1.0.bn1.bias", 1, "params/layer1_0/bn1/bias"),
    ("layer1.0.bn1.running_mean", 1, "batch_stats/layer1_0/bn1/mean"),
    ("layer12.34.conv1.weight_orig", 4, "params/layer12_34/conv1/kernel"),
    ("layer1.0.conv2.weight_mask", 4, "quant_state/layer1_0/conv2/weight_quantizer/mask"),
    ("layer2.0.downsample.0.weight", 4, "params/layer2_0/downsample_conv/kernel"),
    ("layer2.0.downsample.1.weight", 1, "params/layer2_0/downsample_bn/scale"),
    ("layer2.0.downsample.1.running_var", 1, "batch_stats/layer2_0/downsample_bn/var"),
    ("conv0.weight_orig", 4, "params/conv0/kernel"),
    ("fc.weight", 2, "params/fc/kernel"),
    ("fc.bias", 1, "params/fc/bias"),
    ("fc3.weight", 2, "params/fc3/kernel"),
    ("fc3.bias", 1, "params/fc3/bias"),
    ("layer1.0.move0.bias", 4, "params/layer1_0/sign_shift/bias"),
    ("layer1.0.move1.bias", 4, "params/layer1_0/rprelu/input_shift/bias"),
    ("layer1.0.prelu.weight", 1, "params/layer1_0/rprelu/prelu/slope"),
    ("layer1.0.move2.bias", 4, "params/layer1_0/rprelu/output_shift/bias"),
]

ALIASES = [
    ("linear.weight", 2, "params/fc/kernel"),
    ("linear.bias", 1, "params/fc/bias"),
    ("layer2.0.shortcut.0.weight", 4, "params/layer2_0/downsample_conv/kernel"),
    ("layer2.0.shortcut.1.weight", 1, "params/layer2_0/downsample_bn/scale"),
    ("layer2.0.shortcut.1.running_mean", 1, "batch_stats/layer2_0/downsample_bn/mean"),
    ("layer1.0.binary_conv.weight", 4, "params/layer1_0/conv1/kernel"),
    ("layer1.0.binary_conv.binarize.patterns", 2, "params/layer1_0/conv1/weight_quantizer/codebook"),
    ("layer2.0.downsample.1.weight", 4, "params/layer2_0/downsample_conv/kernel"),
    ("layer2.0.downsample.2.weight", 1, "params/layer2_0/downsample_bn/scale"),
    ("layer2.0.downsample.2.running_var", 1, "batch_stats/layer2_0/downsample_bn/var"),
]


@pytest.mark.parametrize(("name", "ndim", "path"), NAMES)
def test_names_convert_in_both_directions(name, ndim, path):
    assert pytorch.to_path(name, ndim=ndim) == path
    assert to_pytorch_name(path, pruned=name.endswith("weight_orig")) == name


@pytest.mark.parametrize(("name", "ndim", "path"), ALIASES)
def test_other_names_of_the_same_modules_are_read(name, ndim, path):
    assert pytorch.to_path(name, ndim=ndim) == path


def test_an_array_under_two_names_of_its_module_is_an_error():
    with pytest.raises(CheckpointError, match="two arrays of the file belong to params/fc/bias"):
        pytorch.convert_names({"linear.bias": np.zeros(2), "fc.bias": np.zeros(2)})


def test_similar_names_of_modules_stay():
    assert pytorch.to_path("linear2.shortcut.bias", ndim=1) == "params/linear2/shortcut/bias"
    assert pytorch.to_path("player1.0.downsample.01.bias", ndim=1) == "params/player1/0/downsample/01/bias"


def test_batch_counters_are_dropped():
    assert pytorch.to_path("layer1.0.bn1.num_batches_tracked", ndim=0) is None


def test_convolution_kernels_change_their_layout():
    array = random_array(2, 3, 4, 5)
    ours = pytorch.convert_layout(array, to="ours")
    assert ours.shape == (4, 5, 3, 2) and ours[3, 1, 2, 0] == array[0, 2, 3, 1]
    np.testing.assert_array_equal(pytorch.convert_layout(ours, to="pytorch"), array)


def test_shifts_lose_the_axes_of_the_activations():
    tree = pytorch.convert_names({"move0.bias": np.arange(3.0).reshape(1, 3, 1, 1)})
    np.testing.assert_array_equal(tree["params/sign_shift/bias"], [0.0, 1.0, 2.0])


def test_codebooks_keep_their_layout():
    codebook = random_array(16, 9)
    tree = pytorch.convert_names({"binary_conv.binarize.patterns": codebook})
    np.testing.assert_array_equal(tree["params/conv1/weight_quantizer/codebook"], codebook)


def test_a_memory_the_file_leaves_out_is_the_sign_of_its_codebook():
    codebook = np.array([[0.5, -0.5], [-2.0, 1e-4]], np.float32)
    place = {"conv1": {"weight_quantizer": {"codebook": codebook}}}
    target = {"params": place, "quant_state": {"conv1": {"weight_quantizer": {"memory": codebook}}}}
    found = pytorch.import_state({"binary_conv.binarize.patterns": codebook}, target)
    np.testing.assert_array_equal(found["params"]["conv1"]["weight_quantizer"]["codebook"], codebook)
    memory = found["quant_state"]["conv1"]["weight_quantizer"]["memory"]
    np.testing.assert_array_equal(memory, [[1.0, -1.0], [-1.0, 1.0]])
    assert memory.dtype == np.float32
    with pytest.raises(CheckpointError, match="memory"):
        pytorch.import_state({"fc.bias": codebook[0]}, target)


def test_dense_kernels_change_their_layout():
    array = random_array(2, 3)
    ours = pytorch.convert_layout(array, to="ours")
    assert ours[2, 1] == array[1, 2]
    np.testing.assert_array_equal(pytorch.convert_layout(ours, to="pytorch"), array)


def test_converted_names_fill_the_three_collections():
    found = {path: array.shape for path, array in pytorch.convert_names(small_state()).items()}
    assert found == {path: leaf.shape for path, leaf in flatten_dict(small_target(), sep="/").items()}


def test_arrays_in_the_same_place_are_an_error():
    with pytest.raises(CheckpointError, match="of the file"):
        pytorch.convert_names({name: np.zeros((2, 2)) for name in ("a.weight", "a.weight_orig")})


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_import_fills_the_target(tmp_path, dtype):
    state = small_state()
    state["layer2.0.conv1.weight_mask"] = state["layer2.0.conv1.weight_mask"].astype(dtype)
    state = {f"module.{name}": array for name, array in state.items()}
    variables = import_file(save(tmp_path / "x.pth", state), small_target())
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), small_target()
    )
    kernel = variables["params"]["layer2_0"]["conv1"]["kernel"]
    assert kernel[2, 1, 3, 4] == small_state()["layer2.0.conv1.weight_orig"][4, 3, 2, 1]
    np.testing.assert_array_equal(variables["params"]["fc"]["kernel"], small_state()["fc.weight"].T)
    statistics = variables["batch_stats"]["layer2_0"]["downsample_bn"]
    np.testing.assert_array_equal(statistics["var"], small_state()["layer2.0.downsample.1.running_var"])
    mask = variables["quant_state"]["layer2_0"]["conv1"]["weight_quantizer"]["mask"]
    np.testing.assert_array_equal(mask.max(axis=(0, 1, 2)), [1, 0, 1, 1, 1])


def without(name):
    return {key: array for key, array in small_state().items() if key != name}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (without("fc.bias"), r"1 missing in the file \(params/fc/bias\)$"),
        (without("layer2.0.conv1.weight_mask"), r"1 missing .*quant_state/layer2_0/conv1/weight_quantizer/mask\)$"),
        (small_state() | {"fc2.alpha": np.zeros(2, np.float32)}, r"1 unknown to the network \(params/fc2/alpha\)$"),
        (
            small_state() | {"fc.weight": random_array(100, 5)},
            r"1 of another shape or type \(params/fc/kernel float32\(5, 100\) for float32\(5, 10\)\)$",
        ),
        (small_state() | {"fc.bias": np.zeros(10, np.int64)}, r"fc/bias int64\(10,\) for float32\(10,\)"),
        ({"fc.bias": random_array(10)}, r"13 missing in the file \(\S+, \S+, \S+, \.\.\.\)$"),
    ],
    ids=["missing", "mask", "unknown", "shape", "type", "many"],
)
def test_a_checkpoint_of_another_network_is_refused(tmp_path, state, reason):
    path = save(tmp_path / "x.pth", state)
    with pytest.raises(CheckpointError, match=rf"^checkpoint of another network: .*{reason}"):
        import_file(path, small_target())


# ---- ImageNet weights of torchvision


# Number of arrays, and of numbers, of torchvision's files, without the counters of batches.
@pytest.mark.parametrize(
    ("name", "blocks", "arrays", "numbers"),
    [
        ("standard_resnet18", (2, 2, 2, 2), 102, 11_699_112),
        ("standard_resnet34", (3, 4, 6, 3), 182, 21_814_696),
        ("standard_resnet50", (3, 4, 6, 3), 267, 25_610_152),
    ],
)
def test_the_imagenet_weights_of_torchvision_fit_leaf_by_leaf(name, blocks, arrays, numbers):
    state = torchvision_state(blocks, bottleneck=name == "standard_resnet50")
    target = variable_shapes(networks.build(spec(name), QuantSpec(), num_classes=1000), (224, 224, 3))
    # A missing, unknown or misshapen array would be an error.
    leaves = jax.tree.leaves(pytorch.import_state(state, target))
    assert len(leaves) == len([key for key in state if not key.endswith("tracked")]) == arrays
    assert sum(leaf.size for leaf in leaves) == numbers


@pytest.mark.parametrize("name", ["standard_resnet18", "standard_resnet50"])
def test_logits_survive_a_round_trip_through_a_file_of_parameters(tmp_path, name):
    widths, generator = (4, 8), np.random.default_rng(0)
    network = networks.build(spec(name, stage_sizes=(1, 2), widths=widths), QuantSpec(), num_classes=7)
    state = torchvision_state((1, 2), bottleneck=name == "standard_resnet50", widths=widths, classes=7)
    for key, array in state.items():
        low = 0.5 if key.endswith("running_var") else -0.5
        state[key] = generator.uniform(low, 1.0, array.shape).astype(array.dtype)
    content, records = saved(state, parameters=True)
    path = write(tmp_path / "weights.pth", content, records)
    variables = import_file(path, variable_shapes(network, (16, 16, 3)))
    # Every array is where its name says: the way back gives the state that was written.
    back = {
        to_pytorch_name("/".join((collection, *names))): np.ascontiguousarray(
            pytorch.convert_layout(leaf, to="pytorch")
        )
        for collection in ("params", "batch_stats")
        for names, leaf in flatten_dict(variables[collection]).items()
    }
    assert set(back) == {key for key in state if not key.endswith("tracked")}
    for key, array in back.items():
        np.testing.assert_array_equal(array, state[key])
    again = import_file(save(tmp_path / "again.pth", back), variable_shapes(network, (16, 16, 3)))
    images = generator.standard_normal((2, 16, 16, 3)).astype(np.float32)
    logits = [network.apply(tree, images, QuantContext()).logits for tree in (variables, again)]
    np.testing.assert_array_equal(*logits)
    assert np.all(np.isfinite(logits[0])) and np.ptp(logits[0]) > 0


@pytest.fixture(scope="module")
def w4a4_target():
    dorefa = spec("dorefa", bits=4)
    quant = QuantSpec(weight=spec("pruned", inner=dorefa), act=dorefa)
    network = networks.build(spec("resnet20", block="checkpoint"), quant, num_classes=10)
    images = np.zeros((1, 32, 32, 3), np.float32)
    return jax.eval_shape(lambda: network.init(jax.random.key(0), images, QuantContext()))


@needs_released
def test_the_released_w4a4_file_imports_strictly_with_36_masked_filters(w4a4_target):
    variables = import_file(W4A4, w4a4_target)
    assert jax.tree.structure(variables) == jax.tree.structure(w4a4_target)
    masks = jax.tree.leaves(variables["quant_state"])
    assert all(set(np.unique(mask)) <= {0.0, 1.0} for mask in masks)
    assert sum(int(np.sum(mask.max(axis=(0, 1, 2)) == 0)) for mask in masks) == 36


@needs_released
def test_the_released_w4a4_arrays_equal_those_pytorch_read(golden_dir):
    recorded = golden_dir / "asbq" / "checkpoint_state.npz"
    if not recorded.is_file():
        pytest.skip(f"{recorded} is absent")
    state = pytorch.state_dict(read_pytorch(W4A4))
    with np.load(recorded) as arrays:
        assert set(arrays) == set(state)
        for name in arrays:
            np.testing.assert_array_equal(state[name], arrays[name])


@needs_released
def test_the_released_w1a1_file_is_read():
    raw = read_pytorch(W1A1)
    assert raw["epoch"] == 698 and float(raw["best_prec1"]) == pytest.approx(87.149, abs=1e-3)
    state = pytorch.state_dict(raw)
    assert len(state) == 121 and state["conv1.weight"].shape == (16, 3, 3, 3)


@needs_released
def test_the_released_legacy_file_imports_strictly():
    network = networks.build(spec("standard_resnet20"), QuantSpec(), num_classes=10)
    variables = import_file(LEGACY, variable_shapes(network, (32, 32, 3)))
    kernel = variables["params"]["conv1"]["kernel"]
    assert kernel.shape == (3, 3, 3, 16) and np.all(np.isfinite(kernel)) and np.ptp(kernel) > 0.5
    assert read_pytorch(LEGACY)["best_prec1"] == pytest.approx(91.78, abs=1e-3)


@needs_released
def test_the_w1a1_file_does_not_import_into_the_w4a4_network(w4a4_target):
    with pytest.raises(CheckpointError, match=r"another network: \d+ missing .*; \d+ unknown .*; 8 of another shape"):
        import_file(W1A1, w4a4_target)
