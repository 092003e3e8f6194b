"""What a program does with an exported file."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bnn_jax.deploy import interchange, jobs, load, pictures
from bnn_jax.deploy.artefact import load as read
from bnn_jax.errors import UserError
from bnn_jax.stages import spec
from tests.conftest import ROOT
from tests.deploy.networks import save, tiny

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A file, normalised images, and the network's own answers."""
    program, weights, expected, images = tiny(spec("irnet"), spec("irnet"))
    path = save(tmp_path_factory.mktemp("deploy") / "x.bnn", program, weights, classes=CLASSES)
    return path, images, expected


def test_pixels_are_normalised_as_the_network_was_trained(exported) -> None:
    classifier = load(exported[0])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 3)).astype(np.uint8)
    normalised = (pixels.astype(np.float32) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(classifier.logits(pixels), classifier.logits(normalised), rtol=1e-5, atol=1e-5)


def test_the_likeliest_classes_come_first_with_their_probabilities(exported) -> None:
    path, images, expected = exported
    predictions = load(path).predict(images, top=3)
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(expected)))
    for found, row in zip(predictions, probabilities, strict=True):
        assert [name for name, _ in found] == [CLASSES[k] for k in np.argsort(-row)[:3]]
        np.testing.assert_allclose([value for _, value in found], np.sort(row)[::-1][:3], rtol=1e-3)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 17])
def test_the_number_of_threads_and_images_changes_nothing(exported, threads: int, count: int) -> None:
    path, images, _ = exported
    many = np.concatenate([images] * 4)[:count]
    alone = np.concatenate([load(path, threads=1).logits(many[i : i + 1]) for i in range(count)])
    np.testing.assert_array_equal(load(path, threads=threads).logits(many), alone)


def test_no_images_give_no_logits(exported) -> None:
    assert load(exported[0]).logits(np.zeros((0, 9, 9, 3), np.float32)).shape == (0, 7)


def test_images_of_another_shape_are_refused(exported) -> None:
    with pytest.raises(ValueError, match="images of shape 1x8x9x3: accepted are Nx9x9x3"):
        load(exported[0]).logits(np.zeros((1, 8, 9, 3)))


def test_a_backend_that_does_not_exist_is_refused(exported) -> None:
    with pytest.raises(UserError, match="backend='gpu': accepted are 'packed', 'jax'"):
        load(exported[0], backend="gpu")  # type: ignore[arg-type]


def test_layers_say_how_they_are_multiplied_and_what_they_take(exported) -> None:
    layers = load(exported[0], instruction_set="plain").layers
    assert [(row["layer"], row["product"]) for row in layers] == [
        ("conv0", "float"),
        ("conv1", "binary"),
        ("conv2", "binary"),
        ("fc", "float"),
    ]
    assert layers[1]["bytes"] == 3 * 3 * 12 * 12 // 8


def test_a_profile_names_every_group_of_operations(exported) -> None:
    path, images, _ = exported
    rows = load(path, instruction_set="plain").profile(images[:1])
    assert {"conv0 (float)", "conv1 (binary)", "conv2 (binary)", "fc (float)"} <= {name for name, _ in rows}
    assert all(seconds > 0 for _, seconds in rows)


def test_classifying_needs_no_jax(exported, tmp_path: Path) -> None:
    program = (
        "import sys, numpy\n"
        "from bnn_jax.deploy import load\n"
        f"found = load({str(exported[0])!r}).predict(numpy.zeros((1, 9, 9, 3), numpy.uint8))\n"
        "assert len(found[0]) == 5\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'jax', 'flax', 'scipy', 'absl', 'rich'}))\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert finished.stdout.strip() == "[]", finished.stderr


@pytest.mark.parametrize("size", [(9, 9), (40, 30), (5, 90), (3, 3)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_pictures_of_any_size_and_kind_can_be_read(size: tuple[int, int], mode: str, tmp_path: Path) -> None:
    Image.new(mode, size, 1).save(tmp_path / "x.png")
    for channels in (1, 3):
        assert pictures.read([tmp_path / "x.png"], {}, (9, 9, channels)).shape == (1, 9, 9, channels)


def test_a_picture_is_cut_to_its_middle(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert np.all(pictures.read([tmp_path / "x.png"], {}, (10, 10, 3)) == 255)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    with pytest.raises(UserError, match=r"x\.png: no picture that can be read"):
        pictures.read([tmp_path / "x.png"], {}, (9, 9, 3))
    with pytest.raises(UserError, match=r"absent\.png: no such file"):
        pictures.read([tmp_path / "absent.png"], {}, (9, 9, 3))
    with pytest.raises(UserError, match="no picture is given"):
        jobs.predict(None, [])  # type: ignore[arg-type]


def test_stablehlo_gives_the_same_logits_for_any_batch(exported) -> None:
    path, images, expected = exported
    found = read(path)
    program = jax.export.deserialize(bytearray(interchange.to_stablehlo(found.program, found.weights)))
    for count in (1, 5):
        np.testing.assert_allclose(program.call(images[:count]), expected[:count], rtol=1e-4, atol=1e-4)


def test_onnx_gives_the_same_logits_for_any_batch(exported) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    path, images, expected = exported
    found = read(path)
    model = interchange.to_onnx(found.program, found.weights)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        logits = session.run(None, {"images": images[:count]})[0]
        np.testing.assert_allclose(logits, expected[:count], rtol=1e-4, atol=1e-4)


def test_onnx_without_its_package_says_so(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(exported[0])
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="--format=onnx needs the package onnx"):
        interchange.to_onnx(found.program, found.weights)


def test_the_summary_of_a_file_lists_predicted_and_stored_bytes(exported, tmp_path: Path) -> None:
    program, weights, *_ = tiny(spec("irnet"), spec("irnet"))
    path = save(tmp_path / "x.bnn", program, weights, predicted_bytes={"conv1": 162})
    result = jobs.summary(path)
    row = next(row for row in result["layers"] if row["layer"] == "conv1")
    assert row["predicted_bytes"] == row["file_bytes"] == 162
    assert result["file_bytes"] == path.stat().st_size
