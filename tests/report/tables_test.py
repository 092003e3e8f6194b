"""Tables say what the results say, leave gaps where values are missing, and fit 100 columns."""

import io

import pytest

from bnn_jax import networks
from bnn_jax.report import tables
from bnn_jax.report.costs import complexity
from bnn_jax.stages import DataSpec, Inherit, OptimSpec, QuantSpec, Stage, spec

RESULT = {
    "stage": "w1a1",
    "bits": 1,
    "last_top1": 81.254,
    "best_top1": 82.5,
    "best_epoch": 9,
    "selection": "validation",
    "quantized_weight_bits": 267_264,
    "level_bits": 2,
    "stored_bits": 384_000,
    "epochs": 12,
    "images_per_second": 12_345.6,
    "seconds": 3723.0,
}


def rendered(table) -> str:
    file = io.StringIO()
    tables.show(table, file=file)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= tables.WIDTH
    return text


def row_of(text: str, start: str) -> list[str]:
    return next(line for line in text.splitlines() if line.strip().startswith(start)).split()


def test_a_result_row_shows_last_before_best_and_all_sizes() -> None:
    text = rendered(tables.results_table([RESULT]))
    assert " ".join(row_of(text, "w1a1")) == ("w1a1 1 81.25 % 82.50 % @10 267 kbit 535 kbit 384 kbit 12 12,346 1:02:03")
    assert "on validation" in text


def test_sub_bit_weights_by_levels_keep_their_fraction() -> None:
    sub_bit = {"bits": 5 / 9, "quantized_weight_bits": 6_103_040, "level_bits": 4 / 9}
    row = row_of(rendered(tables.results_table([{**RESULT, **sub_bit}])), "w1a1")
    assert " ".join(row[7:11]) == "6.10 Mbit 4.88 Mbit"
    assert row[1] == "0.556"


def test_a_mean_over_seeds_stands_with_its_standard_deviation() -> None:
    several = {**RESULT, "stage": "w32a32", "num_seeds": 5, "last_top1_sd": 10.254, "best_top1_sd": 9.0}
    text = rendered(tables.results_table([{**several, "best_epoch": 239}]))
    assert " ".join(row_of(text, "w32a32")[:8]) == "w32a32 1 81.25 ± 10.25 % 82.50 %"
    assert "± the standard" in text
    assert "±" not in rendered(tables.results_table([RESULT]))


def test_missing_values_of_a_result_are_dashes() -> None:
    assert row_of(rendered(tables.results_table([{"stage": "w1a1"}])), "w1a1") == ["w1a1"] + ["-"] * 9


def test_a_stage_row_shows_quantizers_schedule_and_origin() -> None:
    stage = Stage(
        name="w4a4",
        network=spec("resnet20"),
        quant=QuantSpec(weight=spec("pruned", inner=spec("dorefa", bits=4)), act=spec("dorefa", bits=2)),
        data=DataSpec("cifar10"),
        objectives=(),
        optim=OptimSpec(spec("sgd"), spec("constant", value=0.05), epochs=3, batch_size=8),
        inherit=Inherit("stage:w8a8@best"),
        bits=4,
    )
    row = " ".join(row_of(rendered(tables.stages_table([stage])), "w4a4"))
    assert row == "w4a4 4 dorefa 4 + pruned dorefa 2 3 0.05 w8a8 (best) -"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ("po2-3b", "categorical po2-3b"),
        ((-1.0, 0.0, 1.0), "categorical -1, 0, 1"),
        (tuple(map(float, range(9))), "categorical of 9 values"),
    ],
)
def test_lists_of_values_in_a_few_words(values, text) -> None:
    assert tables.describe_quantizer(spec("categorical", values=values)) == text


@pytest.mark.parametrize(
    ("quantizer", "text"),
    [
        (spec("identity"), "-"),
        (spec("sign"), "sign"),
        (spec("codebook", tau=5), "codebook 5"),
        (spec("pruned", inner=spec("dorefa", bits=4)), "dorefa 4 + pruned"),
    ],
)
def test_quantizers_in_a_few_words(quantizer, text) -> None:
    assert tables.describe_quantizer(quantizer) == text


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (spec("constant", value=0.1), "0.1"),
        (spec("piecewise", boundaries=(1, 2), values=(0.1, 0.01, 0.001)), "0.1 to 0.001, 3 steps"),
        (spec("piecewise", boundaries=(), values=(0.1,)), "0.1"),
        (spec("cosine", initial=0.2), "0.2 to 0, cosine"),
        (spec("cosine_by_epoch", initial=0.2, final=1e-5, warmup_epochs=3), "0.2 to 1e-05, cosine"),
        (spec("linear_by_epoch", initial=0.001), "0.001 to 0, linear"),
        (spec("every", interval=25), "every"),
        (spec("warmup", schedule=spec("cosine", initial=0.2), warmup_epochs=2.5), "0.2 to 0, cosine, warm-up 2.5"),
    ],
)
def test_schedules_in_a_few_words(schedule, text) -> None:
    assert tables.describe_schedule(schedule) == text


def test_the_widest_network_fits_with_every_reason_in_full() -> None:
    quant = QuantSpec(weight=spec("dorefa", bits=1), act=spec("dorefa", bits=1))
    network = networks.build(spec("resnet18"), quant, num_classes=1000)
    text = rendered(tables.costs_table(complexity(network, (224, 224, 3))))
    assert row_of(text, "layer4_0/downsample_conv")[1:] == [
        "1x1x256x512",
        "7x7",
        "131",
        "k",
        "4.19",
        "M",
        "32",
        "32",
        "6.42",
        "M",
        "-",
        "shortcut",
    ]
    assert row_of(text, "total")[1:] == ["11.7", "M", "33.8", "M", "1.81", "G", "53.6", "G"]
    assert row_of(text, "20 x batch_norm")[-2:] == ["batch", "norm"]
    for line in ("parameters: 11,688,616", "10.99 Mbit quantized weights", "MACs: 1.814 G", "bit ops: 53.64 G"):
        assert line in text
    assert "codebooks" not in text and "share" not in text
    assert "…" not in text


def test_the_widest_kernels_fit() -> None:
    network = networks.build(spec("standard_resnet50"), QuantSpec(weight=spec("dorefa", bits=1)), num_classes=1000)
    text = rendered(tables.costs_table(complexity(network, (224, 224, 3))))
    assert row_of(text, "layer4_0/downsample_conv")[1] == "1x1x1024x2048"
    assert "…" not in text


def test_a_table_of_codebooks_shows_them_and_what_is_shared() -> None:
    network = networks.build(
        spec("standard_resnet20"), QuantSpec(weight=spec("codebook", tau=4), act=spec("sign")), num_classes=10
    )
    text = " ".join(rendered(tables.costs_table(complexity(network, (32, 32, 3)))).split())
    assert "118.8 kbit quantized weights + 2.592 kbit codebooks" in text
    assert "MACs: 40.55 M bit ops: 25.33 M" in text
    assert "patterns that filters share counted once" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0 bit"),
        (640, "640 bit"),
        (999.6e3, "1.00 Mbit"),
        (40_108_032, "40.1 Mbit"),
        (1.6763e9, "1.68 Gbit"),
    ],
)
def test_counts_in_units(value, text) -> None:
    assert tables.format_si(value, "bit") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (6_103_040, "6.103 M"),
        (10_985_472, "10.99 M"),
        (883.94e6, "883.9 M"),
        (999_949, "999.9 k"),
        (999_951, "1.000 M"),
    ],
)
def test_counts_with_more_digits(value, text) -> None:
    assert tables.format_si(value, digits=4) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (1.23, "1.2 s"), (59.4, "59 s"), (59.6, "1:00"), (3599.6, "1:00:00")]
)
def test_durations(seconds, text) -> None:
    assert tables.format_duration(seconds) == text
