import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from bnn_jax import networks
from bnn_jax.errors import CheckpointError
from bnn_jax.experiment.start import variable_shapes
from bnn_jax.stages import QuantSpec, spec
from bnn_jax.storage.fitting import nearest_first, networks_that_fit
from bnn_jax.storage.other_files import import_file, read_arrays
from tests.storage.pytorch_test import small_state, small_target
from tests.storage.torch_writer import save, saved, write


def arrays(path) -> dict:
    return flatten_dict(import_file(path, small_target()), sep="/")


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    return arrays(save(tmp_path_factory.mktemp("expected") / "x.pth", small_state()))


def as_safetensors(path, state):
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path)


def as_npz(path, state):
    with path.open("wb") as file:
        np.savez(file, **state)


@pytest.mark.parametrize("names", ["ours", "pytorch"])
@pytest.mark.parametrize("write_file", [as_safetensors, as_npz])
def test_other_formats_give_the_arrays_of_the_pytorch_file(tmp_path, expected, write_file, names):
    # The content tells the format, not the name.
    path = tmp_path / "network"
    write_file(path, small_state() if names == "pytorch" else expected)
    found = arrays(path)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("key", ["state_dict", "model", "net", None])
@pytest.mark.parametrize("prefix", ["module.", "model.", ""])
def test_a_state_is_found_wherever_programs_put_it(tmp_path, expected, key, prefix):
    content, records = saved({f"{prefix}{name}": array for name, array in small_state().items()})
    found = arrays(write(tmp_path / "x.pth", {key: content, "acc": 91.2} if key else content, records))
    np.testing.assert_array_equal(found["params/fc/kernel"], expected["params/fc/kernel"])


def test_the_classifier_may_be_called_linear(tmp_path, expected):
    state = {name.replace("fc.", "linear."): array for name, array in small_state().items()}
    np.testing.assert_array_equal(arrays(save(tmp_path / "x.pth", state))["params/fc/bias"], expected["params/fc/bias"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(100), r"a file of HDF5 \(\.h5, \.keras\); read are files of PyTorch"),
        (b"hello\n", "in no format that is read, or cut off; read are files of PyTorch"),
        (b"", "in no format that is read, or cut off"),
    ],
)
def test_another_format_is_refused_with_those_that_are_read(tmp_path, content, reason):
    path = tmp_path / "x.h5"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{path}: {reason}"):
        read_arrays(path)


def test_the_weights_in_use_of_a_stage_are_no_network(tmp_path):
    as_npz(tmp_path / "weights.npz", {"conv/kernel": np.zeros(2), "conv/levels": np.zeros(2)})
    with pytest.raises(CheckpointError, match=r"weights\.npz: the weights in use of a stage.*name the stage's folder"):
        read_arrays(tmp_path / "weights.npz")


def test_the_nearest_names_come_first():
    rows = [f"params/layer{stage}/conv1/kernel" for stage in range(1, 7)]
    assert nearest_first(rows, ["params/layer5/conv/kernel"])[0] == "params/layer5/conv1/kernel"
    assert sorted(nearest_first(rows, [])) == rows


@pytest.mark.parametrize("name", ["standard_resnet8", "standard_resnet8_projection", "reactnet8"])
def test_the_networks_that_a_file_fits_are_named(name):
    network = networks.build(spec(name), QuantSpec(), num_classes=37)
    shapes = flatten_dict(variable_shapes(network, (32, 32, 3)), sep="/")
    assert networks_that_fit(shapes, (32, 32, 3)) == [name]
    del shapes["params/fc/bias"]
    assert networks_that_fit(shapes, (32, 32, 3)) == []
