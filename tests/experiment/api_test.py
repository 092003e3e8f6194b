"""The functions of ``bnn_jax.experiment``: what a notebook needs."""

import subprocess
import sys

import pytest

from bnn_jax import experiment
from bnn_jax.errors import UserError
from tests.conftest import ROOT


def test_a_config_is_found_by_its_name_wherever_python_was_started(tmp_path):
    code = "from bnn_jax import experiment; print(experiment.load_config('quickstart:smoke').name)"
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "quickstart_smoke\n"


def test_a_config_is_found_by_its_path():
    assert experiment.load_config(str(ROOT / "configs" / "skd_resnet20.py")).name == "skd_resnet20"


def test_values_are_replaced_by_dotted_key():
    config = experiment.load_config("quickstart", {"asbq.epochs": (2,), "data.num_train": 5})
    assert (config.asbq.epochs, config.data.num_train) == ((2,), 5)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("quickstrat", {}, "config 'quickstrat': accepted are the path of a file, .*quickstart"),
        ("quickstart", {"asbq.epoch": 1}, "unknown key; did you mean config.asbq.epochs"),
        ("quickstart", {"train.batch_size": "many"}, "config.train.batch_size='many'"),
    ],
)
def test_mistakes_are_named(name, overrides, words):
    with pytest.raises(UserError, match=words):
        experiment.load_config(name, overrides)


def test_importing_the_functions_brings_no_jax():
    code = (
        "import sys; from bnn_jax import experiment; experiment.load_config('quickstart'); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_functions_stay_functions_when_their_modules_are_imported():
    from bnn_jax.experiment import jobs  # noqa: F401

    assert all(callable(getattr(experiment, name)) for name in experiment.__all__)
