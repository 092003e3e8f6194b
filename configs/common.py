"""What configs are made of: sections with their defaults, and the smoke variant of any config.

``python launch.py --help-config`` lists all keys with their defaults, what they mean and what is accepted.
"""

import functools

import ml_collections

from bnn_jax.experiment.config import defaults

# A method's own section with its defaults; the keys are defined in bnn_jax/methods/<method>.py.
asbq = functools.partial(defaults, "asbq")
basq = functools.partial(defaults, "basq")
skd = functools.partial(defaults, "skd")
snn = functools.partial(defaults, "snn")
weight_search = functools.partial(defaults, "weight_search")


def base() -> ml_collections.ConfigDict:
    """What every config shares, with its defaults: the keys are defined in bnn_jax/experiment/config.py."""
    config = defaults("")
    config.data = defaults("data")
    config.train = defaults("train")
    config.log = defaults("log")
    return config


SMOKE = ("smoke", "smoke_real")


def imagenet(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """ImageNet as published programs see it: random resized crops of 224 pixels, the centre of 256 in evaluation."""
    config.data.name = (
        "imagenet2012"  # 'imagenet2012_resized' reads what `python -m bnn_jax.data.prepare imagenet` wrote
    )
    config.data.augment = "random_resized_crop_flip"
    return config


def smoke(config: ml_collections.ConfigDict, *, image_size: int, num_classes: int) -> ml_collections.ConfigDict:
    """Two steps per epoch on generated images of the real size: shows that a config runs, needs no data set."""
    smoke_real(config)
    config.name = config.name.removesuffix("_real")
    config.data.name = "synthetic"
    config.data.image_size = image_size
    config.data.num_classes = num_classes
    if config.data.augment == "random_resized_crop_flip":
        config.data.augment = "pad_crop_flip"  # generated images lie in memory
    return config


def smoke_real(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Two steps per epoch on the first images of the config's own data set."""
    config.name = f"{config.name}_smoke_real"
    config.data.num_train = 16
    config.data.num_eval = 8
    config.train.batch_size = 8
    config.train.eval_batch_size = 8
    return config


def variant(config: ml_collections.ConfigDict, argument: str, **smoke_options: int) -> ml_collections.ConfigDict:
    """The config for what stands behind the colon of ``--config=FILE:ARGUMENT``: nothing, or one of ``SMOKE``.

    Raises:
      ValueError: another argument.
    """
    if argument not in ("", *SMOKE):
        raise ValueError(f"--config=...:{argument}: accepted behind the colon is 'smoke' or 'smoke_real'")
    if argument == "smoke_real":
        return smoke_real(config)
    return smoke(config, **smoke_options) if argument == "smoke" else config


def snn_variant(config: ml_collections.ConfigDict, argument: str, **smoke_options: int) -> ml_collections.ConfigDict:
    """``variant`` of an SNN config; the smoke form trains a teacher of its own and refines every second step.

    Raises:
      ValueError: another argument.
    """
    config = variant(config, argument, **smoke_options)
    if argument in SMOKE:
        config.snn.teacher = "stage"
        config.snn.teacher_epochs = 1
        config.snn.epochs = (2,)  # the learning rate of the last epoch is 0
        config.snn.refine_interval = 2
    return config


def basq_variant(config: ml_collections.ConfigDict, argument: str, **smoke_options: int) -> ml_collections.ConfigDict:
    """``variant`` of a BASQ config; the smoke form trains a teacher of its own and searches two folds for a moment.

    Raises:
      ValueError: another argument.
    """
    config = variant(config, argument, **smoke_options)
    if argument in SMOKE:
        # Where the search looks at images held out, 4 of 20 are: two batches of 8 are left.
        config.data.num_train = 20 if config.data.validation_fraction else 16
        config.data.validation_fraction = 0.2 if config.data.validation_fraction else 0.0
        config.basq.teacher = "stage"
        config.basq.teacher_epochs = 1
        config.basq.epochs = (1,)
        config.basq.schedule_steps = None
        config.basq.folds = 2
        config.basq.fold_batch = 4
        config.basq.population, config.basq.mutations, config.basq.crossovers = 4, 1, 1
        config.basq.parents, config.basq.generations = 2, 1
        config.basq.finetune_epochs = 1
    return config
