"""Tables for the terminal: the chain before training, its results, the cost of a network. All fit 100 columns."""

import collections
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table

from bnn_jax.report.complexity import FLOAT_BITS, Complexity, LayerComplexity
from bnn_jax.stages import Spec, Stage, parse_reference

WIDTH = 100
MISSING = "-"


def show(table: Table, *, file: IO[str] | None = None) -> None:
    """Prints a table to ``file`` (standard output by default), 100 columns wide where that is no terminal."""
    file = file or sys.stdout
    Console(file=file, width=None if file.isatty() else WIDTH, highlight=False).print(table)


def stages_table(stages: Sequence[Stage]) -> Table:
    """The chain before training, one row a stage: bits, quantizers, epochs, learning rate, where it starts from."""
    table = _table("Stages")
    for name in ("stage", "bits", "weights", "activations", "epochs", "learning rate", "starts from", "teacher"):
        table.add_column(name, justify="right" if name in ("bits", "epochs") else "left")
    for stage in stages:
        table.add_row(
            stage.name,
            format_number(stage.bits),
            describe_quantizer(stage.quant.weight),
            describe_quantizer(stage.quant.act),
            str(stage.optim.epochs),
            describe_schedule(stage.optim.learning_rate),
            describe_reference(stage.init_from),
            describe_reference(stage.teacher),
        )
    return table


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """The rungs of a chain after training; a value a result does not have is shown as '-'.

    Args:
      results: contents of the stages' ``result.json``.
    """
    table = _table("Results", caption=_results_caption(results))
    headers = ("top-1\nlast", "top-1\nbest", "size", "size by\nlevels in use", "epochs", "images/s", "time")
    for header in ("stage", "bits", *headers):
        table.add_column(header, justify="left" if header == "stage" else "right", no_wrap=header != "stage")
    for result in results:
        rate = result.get("images_per_second")
        table.add_row(
            str(result.get("stage", MISSING)),
            format_number(result.get("bits")),
            _percent(result.get("last_top1")),
            _best(result),
            format_si(result.get("quantized_weight_bits") or None, "bit"),
            _size_by_levels(result),
            format_number(result.get("epochs")),
            MISSING if rate is None else f"{rate:,.0f}",
            format_duration(result.get("seconds")),
        )
    return table


def complexity_table(complexity: Complexity) -> Table:
    """Cost of a network: a row for each layer with weights, one for each kind of other module, and the total."""
    table = _table("Complexity", caption=_complexity_caption(complexity))
    table.add_column("layer", no_wrap=True)
    for name in ("kernel", "output", "parameters", "W\nbit", "A\nbit", "MACs", "bit\nops"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why 32 bit", no_wrap=True)
    others: dict[str, list[LayerComplexity]] = collections.defaultdict(list)
    for layer in complexity.layers:
        if layer.kernel_shape is None:
            others[layer.kind].append(layer)
            continue
        table.add_row(
            layer.path,
            "x".join(map(str, layer.kernel_shape)),
            "x".join(map(str, layer.output_shape[:-1] or layer.output_shape)),
            f"{layer.parameters:,}",
            format_number(layer.weight_bits),
            format_number(layer.activation_bits),
            format_si(layer.macs),
            format_si(layer.bit_operations) if layer.quantized else MISSING,
            layer.full_precision_because,
        )
    for kind, layers in others.items():
        parameters, why = sum(layer.parameters for layer in layers), layers[0].full_precision_because
        name = f"{len(layers)} x {kind}"
        table.add_row(name, "", "", f"{parameters:,}", str(FLOAT_BITS), MISSING, MISSING, MISSING, why)
    total = complexity.total
    sums = (f"{total.parameters:,}", "", "", format_si(total.macs), format_si(total.bit_operations), "")
    table.add_section()
    table.add_row("total", "", "", *sums, style="bold")
    return table


def describe_quantizer(spec: Spec) -> str:
    """A quantizer in a few words: 'dorefa 4', 'dorefa 4 + pruned', '-' for the identity."""
    options = spec.kwargs
    inner = options.get("inner")
    if isinstance(inner, Spec):
        return f"{describe_quantizer(inner)} + {spec.name}"
    if spec.name == "identity":
        return MISSING
    return f"{spec.name} {format_number(options['bits'])}" if "bits" in options else spec.name


def describe_schedule(spec: Spec) -> str:
    """A schedule in a few words: '0.1', '0.1 to 0.001, 3 steps', '0.1 to 0, cosine'."""
    options = spec.kwargs
    if spec.name == "constant":
        return format_number(options["value"])
    if spec.name == "piecewise":
        values = options["values"]
        return f"{values[0]:g} to {values[-1]:g}, {len(values)} steps" if len(values) > 1 else f"{values[0]:g}"
    if spec.name == "cosine":
        return f"{options['initial']:g} to {options.get('final', 0):g}, cosine"
    return spec.name


def describe_reference(text: str | None) -> str:
    """Where variables come from: 'w8a8', 'w8a8 (best)', a file's name, or '-'."""
    if text is None:
        return MISSING
    reference = parse_reference(text)
    if reference.kind == "file":
        return os.path.basename(reference.target)
    return f"{reference.target} (best)" if reference.which == "best" else reference.target


def format_number(value: float | None) -> str:
    """A number without needless zeros ('4', '0.556', '0.001'), or '-'."""
    return MISSING if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def format_si(value: float | None, unit: str = "") -> str:
    """A count in units of a thousand, a million, ...: '1.07 Mbit', '40.1 M', '640'; '-' for None."""
    if value is None:
        return MISSING
    # The next unit from 999.5 on, where three digits would show 1000.
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{_three_digits(value / factor)} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def format_duration(seconds: float | None) -> str:
    """'12 s', '3:05' (minutes), '1:02:03' (hours), or '-'."""
    if seconds is None:
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _table(title: str, caption: str | None = None) -> Table:
    return Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f} %"


def _best(result: Mapping[str, Any]) -> str:
    """Best top-1 with the split that chose it and the epoch, counted from 1."""
    if result.get("best_top1") is None:
        return MISSING
    text = f"{_percent(result['best_top1'])} {result.get('selection') or ''}".rstrip()
    return text if result.get("best_epoch") is None else f"{text} @{result['best_epoch'] + 1}"


def _size_by_levels(result: Mapping[str, Any]) -> str:
    """Size if every weight is an index into its layer's levels in use; the widest index is taken for all layers."""
    bits, nominal, used = result.get("bits"), result.get("quantized_weight_bits"), result.get("level_bits")
    if not bits or not nominal or used is None:
        return MISSING
    return f"{format_si(nominal / bits * used, 'bit')} ({format_number(used)}/w)"


def _results_caption(results: Iterable[Mapping[str, Any]]) -> str:
    chosen = sorted({str(result["selection"]) for result in results if result.get("selection")})
    text = "top-1 last: test images, after the last epoch."
    if chosen:
        text += f" top-1 best: the split it names, which also chose the epoch (@, from 1): {', '.join(chosen)}."
    return text + " size: all quantized weights, at the nominal bits and at ceil(log2(levels in use))."


def _complexity_caption(complexity: Complexity) -> str:
    total = complexity.total
    codebooks = f" + {format_si(total.codebook_bits, 'bit')} codebooks" if total.codebook_bits else ""
    return (
        f"stored: {format_si(total.stored_bits, 'bit')} = {format_si(total.quantized_bits, 'bit')} quantized weights"
        f"{codebooks} + {format_si(total.full_precision_bits, 'bit')} floats (BatchNorm statistics included). "
        "bit ops: W bit x A bit x MACs of the quantized layers."
    )
