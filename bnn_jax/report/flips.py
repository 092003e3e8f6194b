"""Picture of the flip rates of a stage: by layer, the share of weights that changed their sign in each epoch."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnn_jax.report import plots

PREFIX = "flip_rate/"
MOST_NAMED_LAYERS = 24


def has_flip_rates(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a stage has recorded some; one without quantized weights has none."""
    return bool(records) and any(name.startswith(PREFIX) for name in records[0])


def plot_flip_rates(records: Sequence[Mapping[str, Any]], path: str | os.PathLike, *, title: str) -> None:
    """Draws a line for each layer over the epochs, from the first layer (dark) to the last (light).

    Args:
      records: of ``metrics.jsonl``, with flip rates.
      path: PNG file to write.
      title: of the picture.

    Raises:
      UserError: matplotlib is not installed.
    """
    # Of several seeds the mean; what they scatter by has a name of its own.
    names = [name for name in records[0] if name.startswith(PREFIX) and not name.endswith("_sd")]
    figure = plots.new_figure(width=9.0, height=4.8)
    axis, epochs = figure.subplots(), 1 + np.arange(len(records))
    for name, colour in zip(names, plots.ordered_colours(len(names))):
        # An epoch without a flip has no place on a logarithmic axis: a gap.
        rates = np.array([record[name] or np.nan for record in records], float)
        axis.plot(epochs, rates, color=colour, label=name.removeprefix(PREFIX), **plots.curve(len(records)))
    axis.set_yscale("log")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.set_title(title, fontsize=10, color=plots.INK)
    plots.style_axis(axis, x_label="epoch", y_label="share of weights with another sign than an epoch before")
    if len(names) <= MOST_NAMED_LAYERS:
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=plots.DOTS_PER_INCH)
