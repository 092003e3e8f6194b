"""Pictures of any size and format as the pixels a network reads."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnn_jax.errors import UserError
from bnn_jax.picture_files import central_part, decode


def read(paths: Sequence[Path | str], facts: Mapping[str, Any], image_shape: tuple[int, int, int]) -> np.ndarray:
    """The pictures as uint8 (N, H, W, C): resized so that the shorter side fits, and cut to their middle.

    Args:
      paths: files in any format of Pillow's.
      facts: of the exported network; 'crop_margin' says how much larger pictures are before they are cut (1.14 where
        224 pixels are cut from 256).
      image_shape: (H, W, C), C is 1 or 3.

    Raises:
      UserError: a file is missing or no picture, or the network reads no pictures.
    """
    if image_shape[2] not in (1, 3):
        raise UserError(f"images of {image_shape[2]} channels: accepted are pictures, of 1 or 3")
    margin = facts.get("crop_margin", 1.0)
    return np.stack([_read_one(Path(path), image_shape, float(margin)) for path in paths])


def _read_one(path: Path, shape: tuple[int, int, int], margin: float) -> np.ndarray:
    from PIL import Image

    height, width, channels = shape
    try:
        with warnings.catch_warnings():
            # A picture of so many pixels that Pillow takes it for an attack.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = decode(path.read_bytes(), upright=True, mode="RGB" if channels == 3 else "L")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # Pillow's readers raise many kinds; all mean the same here
        raise UserError(f"{path}: no picture that can be read ({' '.join(str(error).split())})"[:300]) from None
    return central_part(image, height, width, margin=margin).reshape(shape)
