"""Data sources: a table of loaders, and one function that turns a ``DataSpec`` into images.

Reading order: ``order`` (in which order images are visited), ``augment`` (what happens to them on the host and on the
device), ``stream`` (images that are read while training), ``memory`` (images that lie in memory, and what every source
has), ``tfds``, ``folder`` and ``folder_images`` (where images come from), ``archives`` and ``prepare`` (from downloads
to a TFDS folder).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from bnn_jax.data import folder, folder_images, memory, tfds
from bnn_jax.data.augment import AUGMENTATIONS, RANDOM_CROPS
from bnn_jax.data.memory import ImageSource, Normalization, Split, fingerprint
from bnn_jax.data.order import Purpose, index_plan, sequential_plan, stratified_choice
from bnn_jax.data.stream import StreamedSplit
from bnn_jax.errors import DataError
from bnn_jax.stages import DataSpec

__all__ = [
    "SOURCES",
    "ImageSource",
    "Normalization",
    "SourceEntry",
    "Split",
    "StreamedSplit",
    "build",
    "class_names",
    "describe",
    "index_plan",
    "reads_while_training",
    "sequential_plan",
]


@dataclasses.dataclass(frozen=True)
class SourceEntry:
    """A row of the table of sources.

    Attributes:
      load: ``load(spec, data_dir, progress=..., **options) -> ImageSource``.
      shape: (H, W, C) and number of classes; the options 'image_size' and 'num_classes' replace theirs. None: the
        number of classes is that of the folder of images.
      options: the source's options and their defaults.
      streamed: whether its images are read while training, whatever their number.
    """

    load: Callable[..., ImageSource]
    shape: tuple[tuple[int, int, int], int | None] = ((32, 32, 3), 10)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    streamed: bool = False


# What may happen to training images that are read while training, where they are cropped already.
STREAMED_AUGMENTATIONS = (RANDOM_CROPS, "none")

SOURCES: dict[str, SourceEntry] = {
    **{
        name: SourceEntry(
            tfds.load,
            (known.image_shape, known.num_classes),
            {"image_size": known.image_shape[0]} if known.streamed else {},
            streamed=known.streamed,
        )
        for name, known in tfds.TFDS_SETS.items()
    },
    "folder": SourceEntry(folder_images.load, ((224, 224, 3), None), {"image_size": 224, "test_fraction": 0.0}),
    "digits": SourceEntry(memory.digits, options={"image_size": 16}),
    "synthetic": SourceEntry(memory.synthetic, options={"image_size": 32, "num_classes": 10}),
}


def describe(spec: DataSpec, *, data_dir: str | None = None) -> tuple[tuple[int, int, int], int]:
    """Image shape (H, W, C) and number of classes of a ``DataSpec``, without reading any image.

    Args:
      spec: which images.
      data_dir: where they lie; only a folder of images is looked into.

    Raises:
      DataError: an unknown name or option, or the folder of images is not there.
    """
    entry, options = _entry(spec)
    (height, width, channels), num_classes = entry.shape
    side = options.get("image_size")
    if num_classes is None:
        num_classes = len(folder.class_names(data_dir, test_fraction=options["test_fraction"]))
    return (side or height, side or width, channels), options.get("num_classes", num_classes)


def class_names(spec: DataSpec, *, data_dir: str | None) -> tuple[str, ...]:
    """Names of the classes of a ``DataSpec``: those stored with the images if there are any, else numbers.

    Raises:
      DataError: an unknown name or option, or the folder of images is not there.
    """
    _, num_classes = describe(spec, data_dir=data_dir)
    known = None
    if spec.name == "folder":
        known = folder.class_names(data_dir, test_fraction=_entry(spec)[1]["test_fraction"])
    elif spec.name in tfds.TFDS_SETS:
        known = tfds.class_names(spec.name, data_dir)
    return known or tuple(str(label) for label in range(num_classes))


def reads_while_training(spec: DataSpec, *, data_dir: str | None, seed: int = 0) -> bool:
    """Whether the images are read while training: always, or because those of a folder are too many for the memory.

    Raises:
      DataError: an unknown name or option, or the folder of images is not there.
    """
    entry, options = _entry(spec)
    if spec.name != "folder":
        return entry.streamed
    found = folder.find(data_dir, test_fraction=options["test_fraction"], seed=seed)
    return folder_images.reads_while_training(spec, found, options["image_size"])


def _entry(spec: DataSpec) -> tuple[SourceEntry, dict[str, Any]]:
    """The row of the table and the options, the defaults for those that are not given."""
    if spec.name not in SOURCES:
        raise DataError(f"config.data.name={spec.name!r}: accepted are {', '.join(SOURCES)}")
    entry = SOURCES[spec.name]
    for key, value in spec.options:
        if key not in entry.options:
            accepted = ", ".join(entry.options) or "none"
            raise DataError(f"config.data.{key}={value!r}: {spec.name} has no such option; accepted are {accepted}")
    return entry, {**entry.options, **dict(spec.options)}


def build(
    spec: DataSpec,
    *,
    data_dir: str | None,
    seed: int = 0,
    progress: bool = False,
    normalization: Normalization | None = None,
) -> ImageSource:
    """The images of a ``DataSpec``: loaded into memory, or ready to be read while training.

    Args:
      spec: which images; ``num_train`` counts training and held-out images together.
      data_dir: folder of prepared data sets; None is TFDS's own ($TFDS_DATA_DIR, then ~/tensorflow_datasets).
      seed: seed of the held-out splits; the same seed holds out the same images.
      progress: whether a progress bar is shown on stderr.
      normalization: that of a folder's channels, where it was computed before.

    Raises:
      DataError: an unknown name or option, a number out of range, or images that are not prepared or are damaged.
    """
    entry, options = _entry(spec)
    if spec.name == "folder":
        options |= {"seed": seed, "normalization": normalization}
    loaded = _normalised(spec, entry.load(spec, data_dir, progress=progress, **options))
    _check_augmentation(spec, loaded.train)
    train, validation = _hold_out(loaded.train, fraction=spec.validation_fraction, seed=seed)
    return dataclasses.replace(
        loaded,
        train=train,
        validation=validation,
        augment=spec.augment,
        # An eighth of the side: the usual 4 pixels at 32x32, in proportion at other sizes.
        pad=train.image_shape[0] // 8,
        fingerprint=fingerprint(train, loaded.test, validation),
    )


def _normalised(spec: DataSpec, source: ImageSource) -> ImageSource:
    """The source with the statistics that the spec asks for: its own, those given, or none.

    Raises:
      DataError: those given are not one for each channel.
    """
    channels = source.image_shape[2]
    if not spec.normalize:
        return dataclasses.replace(source, mean=(0.0,) * channels, std=(1.0,) * channels)
    if not spec.mean:
        return source
    if len(spec.mean) != channels:
        raise DataError(f"config.data.mean={spec.mean!r}: accepted with {spec.name} are {channels} numbers, as for std")
    return dataclasses.replace(source, mean=spec.mean, std=spec.std)


def _check_augmentation(spec: DataSpec, train: Split | StreamedSplit) -> None:
    """Raises a DataError if the images cannot be changed in the way that is asked for."""
    if spec.name == "folder" and not isinstance(train, Split):
        accepted = AUGMENTATIONS
    elif isinstance(train, StreamedSplit):
        accepted = STREAMED_AUGMENTATIONS
    else:
        accepted = tuple(name for name in AUGMENTATIONS if name != RANDOM_CROPS)
        if spec.decoder != "pillow":
            raise DataError(f"config.data.decoder={spec.decoder!r}: {spec.name} is decoded once, by 'pillow'")
    if spec.augment not in accepted:
        raise DataError(f"config.data.augment={spec.augment!r}: accepted with {spec.name} are {', '.join(accepted)}")
    if spec.lighting != "none" and train.image_shape[2] != 3:
        raise DataError(f"config.data.lighting={spec.lighting!r}: accepted with images of one channel is 'none'")


def _hold_out(
    train: Split | StreamedSplit, *, fraction: float, seed: int
) -> tuple[Split | StreamedSplit, Split | StreamedSplit | None]:
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
