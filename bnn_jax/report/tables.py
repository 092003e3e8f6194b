"""Tables for the terminal: the chain before training, its results, the costs of a network. All fit 100 columns."""

import collections
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from bnn_jax.report.costs import FLOAT_BITS, Complexity, LayerComplexity
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
    # What follows on standard error must not overtake it.
    target.flush()


def new_table(
    title: str,
    columns: Sequence[str],
    *,
    left: Sequence[str] = (),
    wrapped: Sequence[str] = (),
    caption: str | None = None,
    gap: int = 2,
) -> Table:
    """An empty table in the common style.

    Args:
      title: above the table.
      columns: their headers.
      left: those that are no numbers and start at the left.
      wrapped: those whose cells may take several lines.
      caption: below the table.
      gap: blanks between columns, at least 1.
    """
    table = Table(
        title=title,
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        # The box's own column of blanks is the rest of the gap.
        padding=(0, gap - 1, 0, 0),
    )
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=name not in wrapped)
    return table


def stages_table(stages: Sequence[Stage]) -> Table:
    """The chain before training, one row a stage: bits, quantizers, epochs, learning rate, where it starts from."""
    columns = ("stage", "bits", "weights", "activations", "epochs", "learning rate", "starts from", "teacher")
    left = tuple(name for name in columns if name not in ("bits", "epochs"))
    table = new_table("Stages", columns, left=left, wrapped=columns)
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
    best = f"top-1 best\non {'/'.join(selections)}" if selections else "top-1\nbest"
    sizes = ("weights", "weights\nby levels", "whole\nmodel")
    table = new_table(
        "Results",
        ("stage", "bits", "top-1\nlast", best, *sizes, "epochs", "images/s", "time"),
        left=("stage",),
        wrapped=("stage",),
        caption=f"{RESULTS_CAPTION}{SEEDS_CAPTION if several else ''}",
        gap=1 if several else 2,
    )
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
      winners: from ``experiment.results.winners``.
    """
    names = {"fold_top1": "fold", "full_top1": "full", "tuned_top1": "bnfull", "test_top1": "test"}
    caption = _winners_caption(winners["correlation"])
    columns = ("winner", "path", *names.values())
    table = new_table("Winners", columns, left=("path",), wrapped=("path",), caption=caption)
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


def costs_table(complexity: Complexity) -> Table:
    """A row for each layer with weights, one for each kind of other module, and the total."""
    figures = ("kernel", "output", "para-\nmeters", "stored\nbits", "W\nbit", "A\nbit", "MACs", "bit\nops")
    ends = ("layer", "why 32 bit")
    table = new_table(
        complexity.title, (ends[0], *figures, ends[1]), left=ends, caption=_costs_caption(complexity), gap=1
    )
    others: dict[str, list[LayerComplexity]] = collections.defaultdict(list)
    for layer in complexity.layers:
        if layer.kernel_shape is None:
            others[layer.kind].append(layer)
            continue
        table.add_row(
            layer.path,
            "x".join(map(str, layer.kernel_shape)),
            "x".join(map(str, layer.output_shape[:-1] or layer.output_shape)),
            format_si(layer.parameters),
            format_si(layer.stored_bits),
            format_number(layer.weight_bits),
            format_number(layer.activation_bits),
            format_si(layer.macs),
            format_si(layer.bit_operations) if layer.quantized else MISSING,
            layer.full_precision_because,
        )
    for kind, layers in others.items():
        sums = (sum(layer.parameters for layer in layers), sum(layer.stored_bits for layer in layers))
        row = (*map(format_si, sums), str(FLOAT_BITS), *(MISSING,) * 3, layers[0].full_precision_because)
        table.add_row(f"{len(layers)} x {kind}", "", "", *row)
    total = complexity.total
    sums = (*map(format_si, (total.parameters, total.stored_bits)), "", "")
    table.add_section()
    table.add_row("total", "", "", *sums, format_si(total.macs), format_si(total.bit_operations), "", style="bold")
    return table


def _costs_caption(complexity: Complexity) -> str:
    total = complexity.total
    parts = {
        "quantized weights": total.quantized_bits,
        "codebooks": total.codebook_bits,
        "floats (BatchNorm statistics and scales included)": total.full_precision_bits,
    }

    def bits(value: int) -> str:
        return format_si(value, "bit", digits=4)

    sizes = " + ".join(f"{bits(value)} {name}" for name, value in parts.items() if value)
    operations = "bits of a multiplied weight x A bit x MACs of the quantized layers"
    if any(layer.quantized and layer.shared_macs != layer.macs for layer in complexity.layers):
        operations += ", patterns that filters share counted once"
    return (
        f"parameters: {total.parameters:,}\n"
        f"stored: {bits(total.stored_bits)} = {sizes}\n"
        f"MACs: {format_si(total.macs, digits=4)}\n"
        f"bit ops: {format_si(total.bit_operations, digits=4)} = {operations}"
    )


def predictions_table(predictions: Sequence[Mapping[str, Any]]) -> Table:
    """For each picture its likeliest classes and their probabilities."""
    left = ("picture", "class")
    table = new_table("Predictions", (*left, "probability"), left=left, wrapped=left)
    for row in predictions:
        for place, found in enumerate(row["classes"]):
            table.add_row("" if place else row["image"], found["name"], f"{100 * found['probability']:.2f} %")
    return table


def stored_table(result: Mapping[str, Any]) -> Table:
    """For each layer of an exported file the bytes of its weights, predicted and in the file."""
    table = new_table("Bytes of the weights", ("layer", "predicted", "in the file"), left=("layer",))
    for row in result["layers"]:
        predicted = row["predicted_bytes"]
        table.add_row(row["layer"], MISSING if predicted is None else f"{predicted:,}", f"{row['file_bytes']:,}")
    table.add_section()
    table.add_row("all", "", f"{result['weights_bytes']:,}", style="bold")
    return table


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
    if spec.name == "warmup":
        return f"{describe_schedule(options['schedule'])}, warm-up {options['warmup_epochs']:g}"
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
            return f"{value / factor:#.{digits}g}".rstrip(".") + f" {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


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
