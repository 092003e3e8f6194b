"""What a run keeps of a folder of pictures that it is trained on."""

import json

import numpy as np
import pytest
from PIL import Image

from bnn_jax.errors import UserError
from bnn_jax.experiment.build import make_experiment
from bnn_jax.experiment.check import check_seeds
from bnn_jax.experiment.config import validate
from bnn_jax.experiment.evaluation import only_test
from bnn_jax.experiment.folder import RunFolder
from bnn_jax.experiment.load import load_images, normalization_of
from bnn_jax.experiment.training import _make_folder
from configs import quickstart


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = random.integers(0, 256, (12, 9 + number, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / split / name / f"{number}.png")
    return tmp_path / "pictures"


def _experiment(pictures, **settings):
    config = quickstart.get_config()
    config.data.update(name="folder", data_dir=str(pictures), image_size=8, **settings)
    return make_experiment(validate(config.to_dict()))


@pytest.fixture
def run(pictures, tmp_path):
    """An experiment whose first stage has begun, and its folder."""
    experiment = _experiment(pictures)
    folder, stage = RunFolder(tmp_path, experiment.stages), experiment.stages[0]
    assert normalization_of(experiment, folder, stage) is None
    _make_folder(experiment, folder, stage, load_images(experiment.config, stage.data))
    return experiment, folder


def test_the_normalisation_of_a_run_is_used_when_its_pictures_have_changed(run, pictures):
    (experiment, folder), stage = run, run[0].stages[0]
    before = load_images(experiment.config, stage.data)
    Image.new("RGB", (9, 9), "red").save(pictures / "train" / "cat" / "0.png")
    known = normalization_of(experiment, folder, stage)
    after, anew = (load_images(experiment.config, only_test(stage.data), each) for each in (known, None))
    assert (after.mean, after.std) == (before.mean, before.std) == known
    assert (anew.mean, anew.std) != known
    content = json.loads((folder.stage(stage.name) / "images.json").read_text())
    assert content["classes"] == ["cat", "dog"] and content["fingerprint"] == before.fingerprint


def test_a_stage_does_not_go_on_with_other_pictures(run, pictures):
    (experiment, folder), stage = run, run[0].stages[0]
    _make_folder(experiment, folder, stage, load_images(experiment.config, stage.data))
    (pictures / "train" / "cat" / "0.png").unlink()
    source = load_images(experiment.config, stage.data, normalization_of(experiment, folder, stage))
    with pytest.raises(UserError, match=r"00_w32a32 was begun with other pictures .* --stage=w32a32 begins it again"):
        _make_folder(experiment, folder, stage, source)


def test_a_run_of_other_classes_is_refused(run, pictures):
    experiment, folder = run
    (pictures / "train" / "dog").rename(pictures / "train" / "eel")
    with pytest.raises(UserError, match=r"trained on 2 classes, cat to dog: config.data.data_dir now .*, cat to eel"):
        normalization_of(experiment, folder, experiment.stages[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": "random_resized_crop_flip"}, "the images of folder are read while training"),
        ({"validation_fraction": 0.5}, "config.data.validation_fraction=0"),
        ({}, None),
    ],
)
def test_several_seeds_need_the_same_pictures_in_memory(pictures, settings, message):
    config = {**_experiment(pictures, **settings).config, "num_seeds": 2}
    if message is None:
        return check_seeds(make_experiment(config))
    with pytest.raises(UserError, match=message):
        check_seeds(make_experiment(config))
