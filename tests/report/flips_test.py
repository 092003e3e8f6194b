import pathlib

import numpy as np
import PIL.Image

from bnn_jax.report import plots
from bnn_jax.report.flips import has_flip_rates, plot_flip_rates

RECORDS = [
    {"test_top1": 50.0, "flip_rate/conv1": 0.1, "flip_rate/conv2": 0.2, "flip_rate/conv2_sd": 0.01},
    {"test_top1": 60.0, "flip_rate/conv1": 0.01, "flip_rate/conv2": 0.0, "flip_rate/conv2_sd": 0.0},
]


def test_every_layer_has_a_line_with_a_gap_where_nothing_flipped(tmp_path: pathlib.Path, monkeypatch) -> None:
    figures, make = [], plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda **size: figures.append(make(**size)) or figures[-1])
    plot_flip_rates(RECORDS, tmp_path / "flips.png", title="flip rates of stage train")
    lines = figures[0].axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["conv1", "conv2"]
    np.testing.assert_array_equal(lines[1].get_ydata(), [0.2, np.nan])
    with PIL.Image.open(tmp_path / "flips.png") as image:
        assert image.size == (1440, 768)


def test_a_stage_without_quantized_weights_has_none() -> None:
    assert has_flip_rates(RECORDS)
    assert not has_flip_rates([{"test_top1": 50.0}]) and not has_flip_rates([])
