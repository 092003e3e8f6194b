import sys
from typing import Any

import pytest

from bnn_jax.errors import UserError
from bnn_jax.experiment.check import PACKAGES, check_packages


@pytest.mark.parametrize(("key", "package"), PACKAGES.items())
def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch, key, package):
    (section, name), (module, extra) = key, package
    config: dict[str, Any] = {"data": {"color_jitter": 0.0}, "log": {"tensorboard": False, "wandb": False}}
    # Python takes a module that is None for one that is not there.
    monkeypatch.setitem(sys.modules, module, None)
    check_packages(config)
    config[section][name] = value = 0.2 if section == "data" else True
    with pytest.raises(UserError) as error:
        check_packages(config)
    message = str(error.value)
    assert message.startswith(f"config.{section}.{name}={value!r}: ") and module in message
    assert message.endswith(f"; `pip install 'bnn_jax[{extra}]'`") and "\n" not in message
