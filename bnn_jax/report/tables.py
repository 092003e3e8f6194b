"""Tables for the terminal: the chain before training, its results, and what other tables need. All fit 100 columns."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from bnn_jax.stages import IDENTITY, Inherit, Spec, Stage, Teacher, parse_reference

WIDTH = 100
MISSING = "-"
SHAPES = {"cosine": "cosine", "cosine_by_step": "cosine", "cosine_by_epoch": "cosine", "linear_by_epoch": "linear"}
RESULTS_CAPTION = (
    "top-1 last: test images, after the last epoch. top-1 best: the images named above, which also chose the epoch "
    "(@, from 1). weights: the quantized ones, at their nominal bits, and by levels at ceil(log2(levels in use)) of "
    "the layer with the most. whole model: nominal bits and all floats."
)
SEEDS_CAPTION = " With several seeds top-1 is their mean, ± the standard deviation (n - 1)."


def show(table: Table, *, file: TextIO | None = None) -> None:
    """Prints a table to ``file`` (standard output by default), 100 columns wide where that is no terminal."""
    target: TextIO = sys.stdout if file is None else file
    Console(file=target, width=None if target.isatty() else WIDTH, highlight=False).print(table)


def new_table(title: str, caption: str | None = None, *, gap: int = 2) -> Table:
    """An empty table in the common style.

    Args:
      title: above the table.
      caption: below the table.
      gap: blanks between columns, at least 1.
    """
    return Table(
        title=title,
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        # The box's own column of blanks is the rest of the gap.
        padding=(0, gap - 1, 0, 0),
    )


def stages_table(stages: Sequence[Stage]) -> Table:
    """The chain before training, one row a stage: bits, quantizers, epochs, learning rate, where it starts from."""
    table = new_table("Stages")
    for name in ("stage", "bits", "weights", "activations", "epochs", "learning rate", "starts from", "teacher"):
        table.add_column(name, justify="right" if name in ("bits", "epochs") else "left")
    for stage in stages:
        table.add_row(
            stage.name,
            format_number(stage.bits),
            describe_quantizer(stage.quant.weight),
            describe_quantizer(stage.quant.act),
            str(stage.optim.epochs) if stage.kind == "train" else MISSING,
            describe_schedule(stage.optim.learning_rate) if stage.kind == "train" else MISSING,
            describe_reference(stage.inherit),
            describe_reference(stage.teacher),
        )
    return table


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """The rungs of a chain after training; a value a result does not have is shown as '-'.

    Args:
      results: contents of the stages' ``result.json``.
    """
    selections = sorted({str(result["selection"]) for result in results if result.get("selection")})
    several = any("num_seeds" in result for result in results)
    caption = f"{RESULTS_CAPTION}{SEEDS_CAPTION if several else ''}"
    table = new_table("Results", caption=caption, gap=1 if several else 2)
    sizes = ("weights", "weights\nby levels", "whole\nmodel")
    best = f"top-1 best\non {'/'.join(selections)}" if selections else "top-1\nbest"
    headers = ("top-1\nlast", best, *sizes, "epochs", "images/s", "time")
    for header in ("stage", "bits", *headers):
        table.add_column(header, justify="left" if header == "stage" else "right", no_wrap=header != "stage")
    for result in results:
        rate = result.get("images_per_second")
        table.add_row(
            str(result.get("stage", MISSING)),
            format_number(result.get("bits")),
            _percent(result.get("last_top1"), result.get("last_top1_sd")),
            _best(result),
            format_si(result.get("quantized_weight_bits") or None, "bit"),
            format_si(_bits_by_levels(result), "bit"),
            format_si(result.get("stored_bits"), "bit"),
            format_number(result.get("epochs")),
            MISSING if rate is None else f"{rate:,.0f}",
            format_duration(result.get("seconds")),
        )
    return table


def winners_table(winners: Mapping[str, Any]) -> Table:
    """The winners of a search's folds, and mean and standard deviation over them.

    Args:
      winners: from ``experiment.pipeline.winners``.
    """
    table = new_table("Winners", caption=_winners_caption(winners["correlation"]))
    names = {"fold_top1": "fold", "full_top1": "full", "tuned_top1": "bnfull", "test_top1": "test"}
    for header in ("winner", "path", *names.values()):
        table.add_column(header, justify="left" if header == "path" else "right", no_wrap=header != "path")
    for row in winners["rows"]:
        accuracies = [f"{row[name]:.2f}" for name in names]
        table.add_row(str(row["fold"]), " ".join(map(str, row["path"])), *accuracies)
    for title, key in (("mean", "mean"), ("sd", "deviation")):
        table.add_row(title, "", *(f"{winners['statistics'][name][key]:.2f}" for name in names))
    return table


def _winners_caption(correlation: float | None) -> str:
    said = "" if correlation is None else f" Correlation of fold and bnfull: {correlation:.3f}."
    return (
        "top-1 in %: on the fold that chose the path, on the images outside of it, there after fine-tuning, and on all "
        "test images after the last epoch. The first three are of other images in each row; only the last column "
        f"compares winners.{said}"
    )


def describe_quantizer(spec: Spec) -> str:
    """A quantizer in a few words: 'dorefa 4', 'codebook 5' (tau), 'categorical po2-2b', '-' for the identity."""
    options = spec.kwargs
    inner = options.get("inner")
    if isinstance(inner, Spec):
        return spec.name if inner == IDENTITY else f"{describe_quantizer(inner)} + {spec.name}"
    if spec == IDENTITY:
        return MISSING
    if "values" in options:
        return f"{spec.name} {_describe_values(options['values'])}"
    number = options.get("bits", options.get("tau"))
    return spec.name if number is None else f"{spec.name} {format_number(number)}"


def _describe_values(values: str | Sequence[float]) -> str:
    """The name of a list of values, or the list itself if it is short."""
    if isinstance(values, str):
        return values
    return ", ".join(f"{value:g}" for value in values) if len(values) <= 4 else f"of {len(values)} values"


def describe_schedule(spec: Spec) -> str:
    """A schedule in a few words: '0.1', '0.1 to 0.001, 3 steps', '0.1 to 0, cosine'."""
    options = spec.kwargs
    if spec.name == "constant":
        return format_number(options["value"])
    if spec.name == "piecewise":
        values = options["values"]
        return f"{values[0]:g} to {values[-1]:g}, {len(values)} steps" if len(values) > 1 else f"{values[0]:g}"
    shape = SHAPES.get(spec.name)
    if shape:
        return f"{options['initial']:g} to {options.get('final', 0):g}, {shape}"
    return spec.name


def describe_reference(record: Inherit | Teacher | None) -> str:
    """Where variables come from: 'w8a8', 'w8a8 (best)', a file's name, or '-'."""
    if record is None:
        return MISSING
    reference = parse_reference(record.source)
    if reference.kind == "file":
        return os.path.basename(reference.target)
    return f"{reference.target} (best)" if reference.which == "best" else reference.target


def format_number(value: float | None) -> str:
    """A number without needless zeros ('4', '0.556', '0.001'), or '-'."""
    return MISSING if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def format_si(value: float | None, unit: str = "", *, digits: int = 3) -> str:
    """A count in units of a thousand, a million, ...: '1.07 Mbit', '40.1 M', '640'; '-' for None.

    Args:
      value: the count.
      unit: what is counted.
      digits: significant digits from a thousand on, at least 3.
    """
    if value is None:
        return MISSING
    # The next unit from 999.5 on, where three digits would show 1000.
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= (1 - 0.5 * 10**-digits) * factor:
            return f"{_with_digits(value / factor, digits)} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def _with_digits(value: float, digits: int) -> str:
    """A value from 1 to 1000 with this many significant digits."""
    whole = 3 if value >= 100 - 0.5 * 10 ** (3 - digits) else 2 if value >= 10 - 0.5 * 10 ** (2 - digits) else 1
    return f"{value:.{digits - whole}f}"


def format_duration(seconds: float | None) -> str:
    """'12 s', '3:05' (minutes), '1:02:03' (hours), or '-'."""
    if seconds is None:
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _percent(value: float | None, deviation: float | None = None) -> str:
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    return MISSING if value is None else f"{value:.2f}{spread} %"


def _best(result: Mapping[str, Any]) -> str:
    """Best top-1 with its epoch, counted from 1."""
    epoch = result.get("best_epoch")
    return _percent(result.get("best_top1")) + ("" if epoch is None else f" @{epoch + 1}")


def _bits_by_levels(result: Mapping[str, Any]) -> float | None:
    """Size if every weight is an index into its layer's levels in use; the widest index is taken for all layers."""
    bits, nominal, used = result.get("bits"), result.get("quantized_weight_bits"), result.get("level_bits")
    return nominal / bits * used if bits and nominal and used is not None else None
