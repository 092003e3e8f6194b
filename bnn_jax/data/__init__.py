"""Data sources: a table of loaders, and one function that turns a ``DataSpec`` into images in memory.

Reading order: ``base`` (what a source is, order of images), ``tfds_source``, ``digits``, ``synthetic`` (where images
come from), ``augment`` (what happens to them inside the training step), ``prepare`` (from downloads to a TFDS folder).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from bnn_jax.data import digits, synthetic, tfds_source
from bnn_jax.data.base import (
    AUGMENTATIONS,
    LIGHTINGS,
    LoadedImages,
    LoadRequest,
    Purpose,
    ImageSource,
    Split,
    fingerprint,
    index_plan,
    sequential_plan,
    stratified_choice,
)
from bnn_jax.errors import DataError
from bnn_jax.stages import DataSpec

__all__ = [
    "SOURCES",
    "ImageSource",
    "SourceEntry",
    "Split",
    "build",
    "class_names",
    "describe",
    "index_plan",
    "sequential_plan",
]


@dataclasses.dataclass(frozen=True)
class SourceEntry:
    """A row of the table of sources.

    Attributes:
      load: ``load(request, **options) -> LoadedImages``.
      shape: (H, W, C) and number of classes; the options 'image_size' and 'num_classes' replace theirs.
      options: the source's options and their defaults, all of them integers.
    """

    load: Callable[..., LoadedImages]
    shape: tuple[tuple[int, int, int], int] = ((32, 32, 3), 10)
    options: Mapping[str, int] = dataclasses.field(default_factory=dict)


def _tfds_entry(name: str) -> SourceEntry:
    known = tfds_source.TFDS_SETS[name]
    return SourceEntry(functools.partial(tfds_source.load, name), (known.image_shape, known.num_classes))


def _no_imagenet(request: LoadRequest) -> LoadedImages:
    raise DataError(
        "config.data.name='imagenet2012': this version reads no ImageNet; --config=...:smoke runs on generated images"
    )


SOURCES: dict[str, SourceEntry] = {
    **{name: _tfds_entry(name) for name in tfds_source.TFDS_SETS},
    "imagenet2012": SourceEntry(_no_imagenet, ((224, 224, 3), 1000)),
    "digits": SourceEntry(digits.load, options={"image_size": 16, "seed": 0}),
    "synthetic": SourceEntry(
        synthetic.load, options={"image_size": 32, "num_classes": 10, "num_train": 512, "num_test": 256, "seed": 0}
    ),
}


def describe(spec: DataSpec) -> tuple[tuple[int, int, int], int]:
    """Image shape (H, W, C) and number of classes of a ``DataSpec``, without reading any image.

    Raises:
      DataError: an unknown name or option.
    """
    entry = _entry(spec)
    options = _merge_options(spec, entry.options)
    (height, width, channels), num_classes = entry.shape
    side = options.get("image_size")
    return (side or height, side or width, channels), options.get("num_classes", num_classes)


def class_names(spec: DataSpec, *, data_dir: str | None) -> tuple[str, ...]:
    """Names of the classes of a ``DataSpec``: those stored with the prepared images if there are any, else numbers.

    Raises:
      DataError: an unknown name or option.
    """
    _, num_classes = describe(spec)
    known = tfds_source.class_names(spec.name, data_dir) if spec.name in tfds_source.TFDS_SETS else None
    return known or tuple(str(label) for label in range(num_classes))


def _entry(spec: DataSpec) -> SourceEntry:
    if spec.name not in SOURCES:
        raise DataError(f"data.name is {spec.name!r}: accepted are {', '.join(SOURCES)}")
    return SOURCES[spec.name]


def build(spec: DataSpec, *, data_dir: str | None, seed: int = 0, progress: bool = False) -> ImageSource:
    """Loads the images of a ``DataSpec`` into memory.

    Args:
      spec: which images; ``num_train`` counts training and held-out images together.
      data_dir: folder of prepared data sets; None is TFDS's own ($TFDS_DATA_DIR, then ~/tensorflow_datasets).
      seed: seed of the held-out split; the same seed holds out the same images.
      progress: whether a progress bar is shown on stderr.

    Raises:
      DataError: an unknown name or option, a number out of range, or images that are not prepared or are damaged.
    """
    entry = SOURCES.get(spec.name)
    if entry is None:
        raise DataError(f"config.data.name={spec.name!r}: accepted are {', '.join(SOURCES)}")
    if spec.augment not in AUGMENTATIONS:
        raise DataError(f"config.data.augment={spec.augment!r}: accepted are {', '.join(AUGMENTATIONS)}")
    if spec.lighting not in LIGHTINGS:
        raise DataError(f"config.data.lighting={spec.lighting!r}: accepted are {', '.join(LIGHTINGS)}")
    if not 0 <= spec.validation_fraction < 1:
        raise DataError(
            f"config.data.validation_fraction={spec.validation_fraction}: accepted is 0 or more and less than 1"
        )
    options = _merge_options(spec, entry.options)
    loaded = entry.load(LoadRequest(spec.num_train, spec.num_eval, data_dir, progress), **options)
    train, validation = _hold_out(loaded.train, fraction=spec.validation_fraction, seed=seed)
    if spec.lighting != "none" and train.images.shape[3] != 3:
        raise DataError(f"config.data.lighting={spec.lighting!r}: accepted with images of one channel is 'none'")
    return ImageSource(
        name=spec.name,
        num_classes=loaded.num_classes,
        image_shape=tuple(train.images.shape[1:]),
        train=train,
        test=loaded.test,
        validation=validation,
        mean=loaded.mean if spec.normalize else (0.0,) * len(loaded.mean),
        std=loaded.std if spec.normalize else (1.0,) * len(loaded.std),
        augment=spec.augment,
        # An eighth of the side: the usual 4 pixels at 32x32, in proportion at other sizes.
        pad=train.images.shape[1] // 8,
        fingerprint=fingerprint(train, loaded.test, validation),
    )


def _merge_options(spec: DataSpec, defaults: Mapping[str, int]) -> dict[str, Any]:
    options = dict(defaults)
    for key, value in spec.options:
        if key not in defaults:
            accepted = ", ".join(defaults) or "none"
            raise DataError(f"config.data.{key}={value!r}: {spec.name} has no such option; accepted are {accepted}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise DataError(f"config.data.{key}={value!r}: accepted is an integer of 0 or more")
        options[key] = value
    return options


def _hold_out(train: Split, *, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """Training images without, and with only, the held-out ones; both keep the stored order."""
    if fraction == 0:
        return train, None
    count = round(fraction * len(train))
    if not 0 < count < len(train):
        raise DataError(
            f"config.data.validation_fraction={fraction}: it holds out {count} of {len(train)} training images; "
            "both parts need at least one"
        )
    held_out = stratified_choice(train.labels, count=count, seed=seed, purpose=Purpose.VALIDATION)
    return train.take(~held_out), train.take(held_out)
