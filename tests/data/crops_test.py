import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

from bnn_jax.data import augment
from bnn_jax.data.order import Purpose, random_bits
from bnn_jax.errors import DataError
from tests.data import makers


def _bits(item, seed=0):
    return random_bits(seed, 0, purpose=Purpose.CROP, count=augment.NUM_DRAWS, item=item)


def _boxes(height, width, count):
    return np.array([augment.random_resized_crop_box(height, width, _bits(item)) for item in range(count)])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64)])
def test_boxes_keep_to_the_picture_and_to_the_ranges_of_area_and_aspect(height, width):
    top, left, box_height, box_width = _boxes(height, width, 2000).T
    assert (top >= 0).all() and (top + box_height <= height).all()
    assert (left >= 0).all() and (left + box_width <= width).all()
    # Both sides are rounded by up to half a pixel.
    slack = 0.5 / min(box_height.min(), box_width.min())
    aspect = box_width / box_height
    assert 3 / 4 * (1 - 2 * slack) <= aspect.min() < 0.8 and 1.25 < aspect.max() <= 4 / 3 * (1 + 2 * slack)
    area = box_height * box_width / (height * width)
    assert 0.08 * (1 - 2 * slack) <= area.min() < 0.1 and 0.85 < area.max() <= 1


def test_boxes_have_the_mean_area_and_the_log_uniform_aspect_of_their_definition():
    # In a square of 1000 pixels a draw up to an area of 3/4 always fits, so that half of the range can be judged.
    _, _, height, width = _boxes(1000, 1000, 4000).T
    aspect, area = np.log(width / height), height * width / 1e6
    small = area < 0.75
    # Uniform numbers: the mean of about 2900 is within 4 standard errors of the middle of their range.
    assert abs(area[small].mean() - (0.08 + 0.75) / 2) < 4 * (0.67 / 12**0.5) / small.sum() ** 0.5
    assert abs(aspect[small].mean()) < 4 * (2 * np.log(4 / 3) / 12**0.5) / small.sum() ** 0.5
    np.testing.assert_allclose(
        np.quantile(aspect[small], [0.25, 0.75]), np.log(4 / 3) * np.array([-0.5, 0.5]), atol=0.02
    )


def test_boxes_reach_every_edge():
    top, left, height, width = _boxes(40, 50, 2000).T
    assert (top == 0).any() and (left == 0).any() and (top + height == 40).any() and (left + width == 50).any()


def _published_draw(uniform):
    area, aspect = 300 * 400 * (0.08 + 0.92 * uniform[0]), (3 / 4) * (16 / 9) ** uniform[1]
    width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    return int(uniform[2] * (301 - height)), int(uniform[3] * (401 - width)), height, width


def test_a_box_is_the_first_draw_of_the_published_formula_that_fits():
    attempts = []
    for item in range(50):
        bits = _bits(item)
        draws = [_published_draw([int(word >> np.uint64(11)) / 2**53 for word in row]) for row in bits.reshape(10, 4)]
        fits = [height <= 300 and width <= 400 for _, _, height, width in draws]
        assert augment.random_resized_crop_box(300, 400, bits) == draws[fits.index(True)]
        attempts.append(fits.index(True))
    assert set(attempts) >= {0, 1}


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13)), (3, 3, (0, 0, 3, 3))],
)
def test_without_a_fitting_draw_the_largest_central_part_is_taken(height, width, expected):
    # All ones: the whole area at an aspect ratio of 4/3, which fits none of these.
    assert augment.random_resized_crop_box(height, width, np.full(augment.NUM_DRAWS, 2**64 - 1, np.uint64)) == expected


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(375, 500, (256, 341)), (500, 375, (341, 256)), (256, 256, (256, 256)), (100, 301, (256, 770))],
)
def test_the_longer_side_is_cut_off_to_an_integer(height, width, expected):
    assert augment.shorter_side_size(height, width, 256) == expected


def test_the_centre_is_the_one_of_the_published_programs():
    assert augment.evaluation_side(224) == 256
    assert augment.evaluation_side(32) == 37
    # Offsets of 58.5 and 59.5 pixels: Python rounds both to an even number.
    assert augment.central_box(341, 343, 224) == (58, 60, 224, 224)


def _plain_evaluation(image, size, side):
    """As the published programs evaluate, written down once more."""
    image = image.convert("RGB")
    width, height = image.size
    if width <= height:
        image = image.resize((side, int(side * height / width)), Image.BILINEAR)
    else:
        image = image.resize((int(side * width / height), side), Image.BILINEAR)
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return np.asarray(image)[top : top + size, left : left + size]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 331), (60, 47), (256, 300), (700, 256)])
def test_an_evaluated_image_has_the_pixels_of_pillow(height, width):
    content = makers.encoded(makers.smooth_picture(height, width, seed=height))
    expected = _plain_evaluation(Image.open(io.BytesIO(content)), 224, 256)
    np.testing.assert_array_equal(augment.evaluation_image(content, 224), expected)


def test_pixels_stored_as_ppm_are_those_of_the_picture():
    content = makers.encoded(makers.smooth_picture(70, 90, seed=0))
    pixels = makers.encoded(Image.open(io.BytesIO(content)), "PPM")
    np.testing.assert_array_equal(augment.evaluation_image(content, 24), augment.evaluation_image(pixels, 24))
    for decoder in ("pillow", "opencv") if importlib.util.find_spec("cv2") else ("pillow",):
        ours, theirs = (augment.training_image(kind, 24, _bits(0), decoder=decoder) for kind in (content, pixels))
        np.testing.assert_array_equal(ours, theirs)


def test_a_training_image_is_the_crop_resized_with_nothing_from_outside_of_it():
    picture = makers.smooth_picture(80, 100, seed=1)
    for bits in map(_bits, range(5)):
        top, left, height, width = augment.random_resized_crop_box(80, 100, bits)
        alone = Image.fromarray(np.asarray(picture)[top : top + height, left : left + width])
        expected = np.asarray(alone.resize((32, 32), Image.BILINEAR))
        content = makers.encoded(picture, "PNG")
        np.testing.assert_array_equal(augment.training_image(content, 32, bits, decoder="pillow"), expected)


KINDS = [
    ("gray JPEG", "L", "JPEG", {}),
    ("CMYK JPEG", "CMYK", "JPEG", {"quality": 95}),
    ("palette PNG", "P", "PNG", {}),
    ("PNG with alpha", "RGBA", "PNG", {}),
]


@pytest.mark.parametrize("decoder", ["pillow", "opencv"])
@pytest.mark.parametrize(("mode", "file_format", "options"), [kind[1:] for kind in KINDS], ids=[k[0] for k in KINDS])
def test_other_kinds_of_pictures_become_rgb(mode, file_format, options, decoder):
    if decoder == "opencv":
        pytest.importorskip("cv2", reason="OpenCV is not installed")
    picture = makers.smooth_picture(60, 80, seed=2).convert(mode)
    content = makers.encoded(picture, file_format, **options)
    expected = np.asarray(picture.convert("RGB").resize((24, 24), Image.BILINEAR)).astype(int)
    whole = np.full(augment.NUM_DRAWS, 2**64 - 1, np.uint64)  # the whole picture: 4/3 is its aspect ratio
    image = augment.training_image(content, 24, whole, decoder=decoder)
    assert image.shape == (24, 24, 3)
    # JPEG changes colours by a few levels, CMYK most.
    assert np.abs(image - expected).mean() < 4
    assert augment.evaluation_image(content, 24).shape == (24, 24, 3)


def test_both_decoders_give_nearly_the_same_training_images():
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    contents = [makers.encoded(makers.smooth_picture(150, 200, seed=seed)) for seed in range(4)]
    for size in (32, 224):  # crops shrink and grow
        for item, content in enumerate(contents):
            pillow, opencv = (
                augment.training_image(content, size, _bits(item), decoder=decoder).astype(int)
                for decoder in ("pillow", "opencv")
            )
            # Smooth pictures: an average over an area and an antialiased triangle differ by rounding and a little more.
            assert np.abs(pillow - opencv).mean() < 1.0
            assert np.abs(pillow - opencv).max() <= 8


def test_opencv_does_not_turn_a_picture():
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright
    content = makers.encoded(makers.smooth_picture(60, 80, seed=3), exif=exif)
    whole = np.full(augment.NUM_DRAWS, 2**64 - 1, np.uint64)
    images = [
        augment.training_image(content, 24, whole, decoder=decoder).astype(int) for decoder in ("pillow", "opencv")
    ]
    assert np.abs(images[0] - images[1]).mean() < 1.0


def test_without_opencv_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(augment.importlib.util, "find_spec", lambda name: None)
    augment.opencv.cache_clear()
    with pytest.raises(
        DataError, match=r"^config\.data\.decoder='opencv': .*`pip install 'bnn_jax\[fast\]'`"
    ) as raised:
        augment.opencv()
    assert "\n" not in str(raised.value)
