import functools
import importlib.util
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bnn_jax import picture_files
from bnn_jax.data import augment
from bnn_jax.data.augment import change_light, crop_and_flip, draw_crops, prepare_eval, prepare_train
from bnn_jax.data.order import Purpose, random_bits
from bnn_jax.errors import DataError
from tests.data import makers

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)


def _images(count, size=6):
    return np.random.default_rng(0).integers(0, 256, (count, size, size + 1, 3), dtype=np.uint8)


def _pad_crop_flip(image, offset, flip, pad):
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    crop = padded[offset[0] : offset[0] + height, offset[1] : offset[1] + width]
    return crop[:, ::-1] if flip else crop


@pytest.mark.parametrize("pad", [0, 1, 2])
def test_crop_and_flip_equals_padding_cropping_and_flipping(pad):
    grid = np.arange(2 * pad + 1)
    offsets = np.array([(row, column) for row in grid for column in grid for _ in range(2)])
    flips = np.arange(len(offsets)) % 2 == 1
    images = _images(len(offsets))
    result = jax.jit(functools.partial(crop_and_flip, pad=pad))(images, jnp.asarray(offsets), jnp.asarray(flips))
    expected = [_pad_crop_flip(*case, pad) for case in zip(images, offsets, flips)]
    assert result.dtype == jnp.uint8
    np.testing.assert_array_equal(result, np.stack(expected))


@pytest.mark.parametrize("pad", [1, 3])
def test_with_repeated_edges_the_padding_is_the_border(pad):
    grid = np.arange(2 * pad + 1)
    offsets = np.array([(row, column) for row in grid for column in grid for _ in range(2)])
    flips = np.arange(len(offsets)) % 2 == 1
    images = _images(len(offsets))
    crop = jax.jit(functools.partial(crop_and_flip, pad=pad, repeat_edge=True))
    expected = []
    for image, (row, column), flip in zip(images, offsets, flips):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        cropped = padded[row : row + 6, column : column + 7]
        expected.append(cropped[:, ::-1] if flip else cropped)
    np.testing.assert_array_equal(crop(images, jnp.asarray(offsets), jnp.asarray(flips)), np.stack(expected))


def test_flipping_before_or_after_a_crop_with_repeated_edges_gives_the_same_images():
    # The release flips first. With the border repeated, that is a crop at the mirrored column, flipped afterwards.
    images, pad = _images(25), 2
    offsets = np.array([(row, column) for row in range(5) for column in range(5)])
    mirrored = np.stack([offsets[:, 0], 2 * pad - offsets[:, 1]], axis=1)
    flips = np.ones(25, bool)
    after = crop_and_flip(images, jnp.asarray(mirrored), jnp.asarray(flips), pad=pad, repeat_edge=True)
    before = crop_and_flip(images[:, :, ::-1], jnp.asarray(offsets), jnp.asarray(~flips), pad=pad, repeat_edge=True)
    np.testing.assert_array_equal(after, before)


def test_edge_crop_flip_draws_as_pad_crop_flip_does_and_repeats_the_border():
    images = np.full((64, 6, 6, 1), 255, np.uint8)
    prepare = functools.partial(prepare_train, images, jax.random.key(0), mean=(0.0,), std=(1.0,), pad=2)
    # All-white images stay white with a repeated border, and get black stripes with zeros.
    np.testing.assert_array_equal(prepare(augment="edge_crop_flip"), 1.0)
    assert (prepare(augment="pad_crop_flip") == 0).any()
    images = _images(64)
    prepare = functools.partial(prepare_train, images, jax.random.key(0), mean=(0.0,) * 3, std=(1.0,) * 3, pad=2)
    edge, zeros = (np.asarray(prepare(augment=name)) for name in ("edge_crop_flip", "pad_crop_flip"))
    inside = zeros != 0
    np.testing.assert_array_equal(edge[inside], zeros[inside])


def test_offsets_cover_the_whole_range_evenly():
    offsets, flips = draw_crops(jax.random.key(0), 9000, pad=4, flip=True)
    for axis in range(2):
        # 1000 expected of each, standard deviation 30.
        counts = np.bincount(np.asarray(offsets[:, axis]), minlength=9)
        assert counts.shape == (9,)
        assert (np.abs(counts - 1000) < 150).all()
    # Rows, columns and flips are drawn apart: correlations have standard deviation 0.011.
    drawn = np.corrcoef(np.concatenate([offsets, flips[:, None]], axis=1).T)
    assert np.abs(drawn - np.eye(3)).max() < 0.06
    assert abs(float(flips.mean()) - 0.5) < 0.03


def test_images_of_one_batch_get_their_own_crops():
    images = np.broadcast_to(_images(1), (64, 6, 7, 3))
    crops = prepare_train(images, jax.random.key(0), mean=MEAN, std=STD, augment="pad_crop_flip", pad=2)
    assert len(np.unique(np.asarray(crops), axis=0)) > 20  # of 50 possible


def test_the_key_decides_the_crops():
    prepare = functools.partial(prepare_train, _images(8), mean=MEAN, std=STD, augment="pad_crop_flip", pad=2)
    first, again, other = prepare(jax.random.key(1)), prepare(jax.random.key(1)), prepare(jax.random.key(2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_padding_is_a_black_pixel_before_normalisation():
    white = np.full((1, 4, 4, 3), 255, np.uint8)
    cropped = crop_and_flip(white, jnp.array([[0, 0]]), jnp.array([False]), pad=1)
    result = np.asarray(prepare_eval(cropped, mean=MEAN, std=STD))
    # 1e-6: float32 arithmetic on both sides.
    np.testing.assert_allclose(result[0, 0, 0], -np.array(MEAN) / STD, rtol=1e-6)
    np.testing.assert_allclose(result[0, 1, 1], (1 - np.array(MEAN)) / STD, rtol=1e-6)


def test_pad_crop_does_not_flip():
    images = np.zeros((200, 5, 5, 1), np.uint8)
    images[:, 2, 2, 0], images[:, 2, 3, 0] = 100, 200
    crops = prepare_train(images, jax.random.key(0), mean=(0.0,), std=(1 / 255,), augment="pad_crop", pad=1)
    dark, bright = (np.round(np.asarray(crops)[..., 0]) == value for value in (100, 200))
    columns = np.arange(5)
    assert ((bright * columns).sum((1, 2)) > (dark * columns).sum((1, 2))).all()


def test_none_only_normalises():
    images = _images(4)
    result = prepare_train(images, jax.random.key(0), mean=MEAN, std=STD, augment="none", pad=2)
    np.testing.assert_array_equal(result, prepare_eval(images, mean=MEAN, std=STD))
    np.testing.assert_allclose(result, (images / 255 - MEAN) / STD, atol=1e-6)  # float32 against float64
    assert result.dtype == jnp.float32


def test_images_that_were_cropped_on_the_host_are_only_flipped():
    images = _images(40)
    result = np.asarray(
        prepare_train(
            images, jax.random.key(0), mean=(0.0,) * 3, std=(1.0,) * 3, augment="random_resized_crop_flip", pad=2
        )
    )
    straight, flipped = images / np.float32(255), images[:, :, ::-1] / np.float32(255)
    is_straight = np.array([np.allclose(a, b, atol=1e-6) for a, b in zip(result, straight)])
    is_flipped = np.array([np.allclose(a, b, atol=1e-6) for a, b in zip(result, flipped)])
    assert (is_straight ^ is_flipped).all()
    # The chance that fewer than 8 of 40 fair coins show one side is 1e-4; the key is fixed.
    assert 8 <= is_flipped.sum() <= 32


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="augment 'mixup': accepted are pad_crop_flip, pad_crop, edge_crop_flip, "):
        prepare_train(_images(1), jax.random.key(0), mean=MEAN, std=STD, augment="mixup", pad=1)


def test_light_as_released_darkens_the_channels_with_a_negative_change_by_one():
    images = np.array([0, 1, 128, 255], np.uint8).reshape(1, 4, 1, 1) * np.ones((6, 1, 1, 3), np.uint8)
    draws = np.concatenate([np.eye(3), -np.eye(3)])
    result = np.asarray(change_light(images, jnp.asarray(draws), in_pixel_units=False))
    assert result.dtype == np.uint8
    # One draw along one axis: the signs of the changes are those of the axis.
    negative = np.array([[1, 1, 1], [0, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 1]])[:, None, None]
    np.testing.assert_array_equal(result, np.maximum(images.astype(int) - negative, 0))


def test_light_in_pixel_units_varies_as_the_colours_do():
    grey = np.full((4000, 1, 1, 3), 128, np.uint8)
    draws = jax.random.normal(jax.random.key(0), (4000, 3))
    change = np.asarray(change_light(grey, draws, in_pixel_units=True), np.float64)[:, 0, 0] - 128
    axes = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    expected = axes @ np.diag((25.5 * np.array([0.2175, 0.0188, 0.0045])) ** 2) @ axes.T
    # The standard error of a variance is 2.2 % of it; covariances are about as large as the variances here.
    np.testing.assert_allclose(np.cov(change.T), expected, rtol=0.1)
    assert np.abs(change.mean(axis=0)).max() < 0.2


def test_light_in_pixel_units_keeps_to_the_range_of_pixels():
    images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1) * np.ones((1, 1, 1, 3), np.uint8)
    draws = jnp.array([[100.0, 0, 0], [-100.0, 0, 0]])
    result = np.asarray(change_light(images, draws, in_pixel_units=True))
    # Along the first axis all colours go the same way: beyond black and white.
    np.testing.assert_array_equal(result[:, 0, 0, 0], [0, 255])


@pytest.mark.parametrize("augment", ["none", "pad_crop_flip"])
def test_other_light_leaves_the_crops_as_they_are(augment):
    images = np.full((64, 6, 6, 3), 128, np.uint8)
    images[:, 2:4] = 64
    prepare = functools.partial(
        prepare_train, images, jax.random.key(0), mean=(0.0,) * 3, std=(1 / 255,) * 3, augment=augment, pad=2
    )
    plain, release, paper = (np.asarray(prepare(lighting=name)) for name in ("none", "release", "paper"))
    darker = plain - release
    assert set(np.unique(np.round(darker))) == {0.0, 1.0}
    # Nothing is darker than black.
    assert not np.any(np.round(darker)[plain == 0])
    # 6 standard deviations of 3.2 levels: no pixel takes another's place.
    assert 1 < np.abs(paper - plain).max() < 20


def test_an_unknown_lighting_is_refused():
    with pytest.raises(ValueError, match="lighting 'on': accepted are none, release, paper"):
        prepare_train(_images(1), jax.random.key(0), mean=MEAN, std=STD, augment="none", pad=1, lighting="on")


def test_cropping_compiles_to_one_gather_without_a_loop():
    # A loop would be many times slower on a CPU.
    arguments = jnp.zeros((8, 32, 32, 3), jnp.uint8), jnp.zeros((8, 2), jnp.int32), jnp.zeros(8, bool)
    program = jax.jit(functools.partial(crop_and_flip, pad=4)).lower(*arguments).compile().as_text()
    assert program.count(" gather(") == 1
    assert " while(" not in program


# ---- on the host: from pictures to squares


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
    assert picture_files.covering(Image.new("RGB", (width, height)), 256, 256).size == expected[::-1]


def test_half_a_pixel_beside_the_centre_goes_to_the_even_offset():
    rows, columns = np.meshgrid(np.arange(341), np.arange(343) % 256, indexing="ij")
    pixels = np.stack([rows % 256, columns, rows // 256], axis=-1).astype(np.uint8)
    # 341 is the shorter side already, round(298 * 256 / 224): offsets of 21.5 and 22.5 pixels.
    found = picture_files.evaluation_image(makers.encoded(Image.fromarray(pixels), "PNG"), 298)
    np.testing.assert_array_equal(found, pixels[22 : 22 + 298, 22 : 22 + 298])


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
    np.testing.assert_array_equal(picture_files.evaluation_image(content, 224), expected)


def test_pixels_stored_as_ppm_are_those_of_the_picture():
    content = makers.encoded(makers.smooth_picture(70, 90, seed=0))
    pixels = makers.encoded(Image.open(io.BytesIO(content)), "PPM")
    np.testing.assert_array_equal(
        picture_files.evaluation_image(content, 24), picture_files.evaluation_image(pixels, 24)
    )
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
    assert picture_files.evaluation_image(content, 24).shape == (24, 24, 3)


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
