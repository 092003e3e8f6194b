import json

import pytest

from benchmarks import input as input_benchmark
from tests.data import makers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pictures = makers.small_pictures(6, seed=5)
    return makers.write_imagenet(tmp_path_factory.mktemp("sets"), pictures, pictures[:2])


def test_every_pipeline_has_its_speed_beside_that_of_pillow_alone(folder, tmp_path, capsys):
    small = ["--per_round=6", "--batch_size=2", "--image_size=24", "--workers=0", "--rounds=1"]
    assert input_benchmark.main([f"--data_dir={folder}", *small, f"--json={tmp_path / 'found.json'}"]) == 0
    result = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["mode"], row["pipeline"].rsplit(", ", 1)[0]): row for row in result["rows"]}
    expected = {("train", "pillow alone"), ("train", "jpeg, pillow"), ("train", "resized, pillow")}
    expected |= {(mode, name) for mode, name in (("eval", name) for _, name in expected)}
    assert rows.keys() >= expected
    for row in rows.values():
        assert row["images_per_second"] > 0
    for mode in ("train", "eval"):
        assert rows[mode, "pillow alone"]["over_pillow_alone"] == 1
    assert result["versions"]["jax"] and result["per_round"] == 6 and "data_dir" not in result
    assert "pillow alone" in capsys.readouterr().out


def test_a_missing_folder_is_one_line(tmp_path, capsys):
    assert input_benchmark.main([f"--data_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: imagenet2012 is not prepared in") and error.count("\n") == 1
