"""Parts of a stage that every method takes from the shared sections of the config."""

from collections.abc import Mapping
from typing import Any

from bnn_jax.stages import DataSpec, OptimSpec, ParameterGroup, Spec, spec


def data_spec(config: Mapping[str, Any]) -> DataSpec:
    """``config.data`` as a ``DataSpec``."""
    data = config["data"]
    options = {key: data[key] for key in ("image_size", "num_classes") if data[key] is not None}
    return DataSpec(
        name=data["name"],
        num_train=data["num_train"],
        num_eval=data["num_eval"],
        validation_fraction=data["validation_fraction"],
        augment=data["augment"],
        options=tuple(sorted(options.items())),
    )


def sgd_spec(config: Mapping[str, Any], *, learning_rate: Spec, epochs: int) -> OptimSpec:
    """Stochastic gradient descent as ``config.train`` says, one group for all parameters."""
    train = config["train"]
    return OptimSpec(
        optimizer=spec("sgd", momentum=train["momentum"], nesterov=train["nesterov"]),
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=train["batch_size"],
        groups=(ParameterGroup(".*", weight_decay=train["weight_decay"]),),
        drop_last_batch=train["drop_last_batch"],
    )
