import colorsys

import jax
import numpy as np
import pytest

from bnn_jax.data.color import jitter

pytest.importorskip("dm_pix", reason="dm-pix is not installed: pip install 'bnn_jax[augment]'")

STRENGTH = 0.4
IMAGES = np.random.RandomState(0).randint(0, 256, (4, 5, 5, 3)).astype(np.uint8)


def expected(image: np.ndarray, key: jax.Array) -> np.ndarray:
    keys = jax.random.split(key, 3)
    shift = float(jax.random.uniform(keys[0], (), minval=-STRENGTH, maxval=STRENGTH))
    contrast, saturation = (
        float(jax.random.uniform(k, (), minval=1 - STRENGTH, maxval=1 + STRENGTH)) for k in keys[1:]
    )
    x = np.clip(image / 255 + shift, 0, 1)
    mean = x.mean(axis=(0, 1))
    x = np.clip(contrast * (x - mean) + mean, 0, 1)
    for place in np.ndindex(x.shape[:2]):
        hue, found, value = colorsys.rgb_to_hsv(*x[place])
        x[place] = colorsys.hsv_to_rgb(hue, min(saturation * found, 1.0), value)
    return 255 * x


def test_an_image_changes_in_brightness_contrast_and_saturation():
    key = jax.random.key(1)
    found = jax.jit(jitter, static_argnums=2)(IMAGES, key, STRENGTH)
    # float32 against float64, of values up to 255; hues near a corner of the cube are quotients of small differences.
    for image, own, result in zip(IMAGES, jax.random.split(key, len(IMAGES)), found, strict=True):
        np.testing.assert_allclose(result, expected(image, own), atol=2e-3)


def test_grey_images_keep_their_one_channel():
    found = jitter(IMAGES[..., :1], jax.random.key(0), STRENGTH)
    assert found.shape == (4, 5, 5, 1) and (np.asarray(found) != IMAGES[..., :1]).mean() > 0.5
