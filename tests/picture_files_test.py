import io

import numpy as np
import pytest
from PIL import Image

from bnn_jax import picture_files
from bnn_jax.deploy import pictures


def _content(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _pixels(content, **options):
    return np.asarray(picture_files.decode(content, **options))


GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_gray_pictures_of_16_bits_keep_the_higher_eight(file_format):
    deep = GRADIENT.astype(np.uint16) * 256 + 7
    for channel in np.moveaxis(_pixels(_content(Image.fromarray(deep), file_format)), 2, 0):
        np.testing.assert_array_equal(channel, GRADIENT)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused(mode):
    with pytest.raises(ValueError, match="pixels of 32 bits: accepted are 8 and 16"):
        picture_files.decode(_content(Image.new(mode, (2, 2)), "TIFF"))


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), {}),
        (Image.new("LA", (2, 2), (10, 0)), {}),
        (Image.new("P", (2, 2)), {"transparency": 0}),
        (Image.new("RGB", (2, 2)), {"transparency": (0, 0, 0)}),
    ],
    ids=["colour", "gray", "palette", "one colour"],
)
def test_what_is_transparent_is_white(image, options):
    np.testing.assert_array_equal(_pixels(_content(image, **options)), 255)


def test_half_transparent_pixels_are_mixed_with_white():
    # (100 * 128 + 255 * 127) / 255, rounded.
    assert _pixels(_content(Image.new("RGBA", (1, 1), (100, 100, 100, 128)))).ravel().tolist() == [177] * 3


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_become_colours(mode):
    colours = Image.fromarray(np.stack([GRADIENT] * 3, axis=-1)).convert(mode)
    content = _content(colours, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    np.testing.assert_array_equal(_pixels(content), np.asarray(expected))


# The eight values of the EXIF orientation: what a viewer does to the stored pixels.
TURNS = [
    lambda a: a,
    lambda a: a[:, ::-1],
    lambda a: a[::-1, ::-1],
    lambda a: a[::-1],
    lambda a: a.swapaxes(0, 1),
    lambda a: np.rot90(a, -1),
    lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    lambda a: np.rot90(a),
]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_file_says_where_this_is_asked_for(orientation):
    stored = np.stack([GRADIENT[:5, :9]] * 3, axis=-1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = _content(Image.fromarray(stored), exif=exif)
    np.testing.assert_array_equal(_pixels(content), stored)
    np.testing.assert_array_equal(_pixels(content, upright=True), TURNS[orientation - 1](stored))


@pytest.mark.parametrize(("content", "message"), [(b"", "the file is empty"), (b"text", "cannot identify its format")])
def test_what_is_no_picture_says_so(content, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        picture_files.decode(content)


@pytest.mark.parametrize("margin", [1.0, picture_files.EVALUATION_MARGIN])
def test_an_exported_network_reads_the_pixels_that_were_evaluated(tmp_path, margin):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 61, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    path.write_bytes(_content(picture, exif=exif))
    (found,) = pictures.read([path], {"crop_margin": margin}, (24, 24, 3))
    expected = picture_files.evaluation_image(path.read_bytes(), 24, margin=margin, upright=True)
    np.testing.assert_array_equal(found, expected)
