"""Costs of every network and every config by value. A new network, or a new config, needs a row.

The values were worked out a second time from lists of layers, without the library: kernels, output sizes and channels
of the norms as the specifications of the methods give them.
"""

import dataclasses
import functools
import importlib
import io

import pytest

from bnn_jax import data, networks
from bnn_jax.experiment.build import build_network, make_experiment
from bnn_jax.experiment.config import validate
from bnn_jax.experiment.summaries import summary
from bnn_jax.networks import NETWORKS
from bnn_jax.report import tables
from bnn_jax.report.costs import Complexity, TotalComplexity, complexity
from bnn_jax.stages import QuantSpec, Stage, spec
from tests.configs.configs_test import NAMES, run_of

CIFAR, IMAGENET = ((32, 32, 3), 10), ((224, 224, 3), 1000)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a network costs; bnn_jax/report/costs.py defines each figure."""

    parameters: int
    quantized_bits: int
    codebook_bits: int
    full_precision_bits: int
    macs: int
    bit_operations: int


def costs_of(total: TotalComplexity) -> Costs:
    return Costs(**{field.name: getattr(total, field.name) for field in dataclasses.fields(Costs)})


# ---- every network, as its method quantizes it: ASBQ at 1 bit, IR-Net, SNN at tau 5, BASQ at 2 bits; the standard ones
# are not

EXPECTED: dict[str, Costs] = {
    "resnet8": Costs(78_042, 73_728, 0, 159_744, 12_501_632, 11_796_480),
    "resnet14": Costs(175_258, 170_496, 0, 188_608, 26_657_408, 25_952_256),
    "resnet20": Costs(272_474, 267_264, 0, 217_472, 40_813_184, 40_108_032),
    "resnet26": Costs(369_690, 364_032, 0, 246_336, 54_968_960, 54_263_808),
    "resnet56": Costs(855_770, 847_872, 0, 390_656, 125_747_840, 125_042_688),
    "resnet110": Costs(1_730_714, 1_718_784, 0, 650_432, 253_149_824, 252_444_672),
    "resnet18_cifar": Costs(11_173_962, 10_985_472, 0, 6_339_392, 555_422_720, 547_356_672),
    # BatchNorm stands behind the quantizer here: the convolutions multiply 32-bit activations.
    "resnet18": Costs(11_688_616, 10_985_472, 0, 22_779_648, 1_814_073_344, 53_640_953_856),
    "resnet34": Costs(21_796_776, 21_086_208, 0, 23_255_296, 3_663_761_408, 112_830_971_904),
    # The first convolution, quantized too, reads the image at 32 bits.
    "vgg_small": Costs(4_660_106, 4_574_592, 0, 2_851_328, 607_600_640, 717_225_984),
    "hardtanh_resnet20": Costs(269_850, 267_264, 0, 152_384, 40_551_040, 40_108_032),
    "hardtanh_resnet18_cifar": Costs(11_174_986, 10_985_472, 0, 6_527_296, 555_422_720, 547_356_672),
    "hardtanh_resnet18": Costs(11_690_536, 10_985_472, 0, 23_024_896, 1_814_073_344, 1_676_279_808),
    "hardtanh_vgg_small": Costs(4_660_106, 4_571_136, 0, 3_014_976, 607_600_640, 603_979_776),
    # No scales; the first layer reads the pixels at 32 bits.
    "hardtanh_mlp": Costs(10_033_162, 9_994_240, 0, 1_638_720, 10_014_720, 59_768_832),
    "standard_resnet20": Costs(269_722, 0, 0, 8_675_136, 40_551_040, 0),
    "standard_resnet18_cifar": Costs(11_173_962, 0, 0, 357_873_984, 555_422_720, 0),
    "standard_resnet18": Costs(11_689_512, 0, 0, 374_371_584, 1_814_073_344, 0),
    "standard_resnet34": Costs(21_797_672, 0, 0, 698_070_272, 3_663_761_408, 0),
    "standard_resnet50": Costs(25_557_032, 0, 0, 819_524_864, 4_089_184_256, 0),
    "standard_vgg_small": Costs(4_660_106, 0, 0, 149_238_080, 607_600_640, 0),
    "reactnet18": Costs(11_709_032, 6_103_040, 4_608, 23_436_544, 1_814_073_344, 501_358_592),
    "reactnet34": Costs(21_836_648, 11_714_560, 9_216, 24_505_600, 3_663_761_408, 965_386_240),
    "reactnet18_cifar": Costs(11_193_482, 6_103_040, 4_608, 6_938_944, 555_422_720, 163_708_928),
    "reactnet8": Costs(80_618, 40_960, 1_728, 193_856, 12_501_632, 10_223_616),
    "reactnet20": Costs(280_298, 148_480, 5_184, 322_880, 40_813_184, 34_340_864),
    # Supernets, with the BatchNorms of all seven branches; bit operations are 4 for each MAC of a quantized layer.
    "basq_mobilenet_v2": Costs(3_853_151, 4_377_792, 0, 64_667_616, 300_774_272, 4 * 288_656_256),
    "basq_mobilenet_v1": Costs(4_468_163, 6_368_448, 0, 48_833_632, 568_740_352, 2_227_513_344),
    "basq_mobilenet_v2_cifar": Costs(2_584_961, 4_377_792, 0, 24_085_536, 87_976_448, 348_315_648),
    "basq_resnet8_cifar": Costs(83_844, 147_456, 0, 604_288, 12_239_488, 47_185_920),
    "basq_resnet18": Costs(11_666_968, 21_970_944, 0, 26_772_224, 1_794_805_760, 6_705_119_232),
    "basq_resnet20_cifar": Costs(296_728, 534_528, 0, 1_825_536, 40_551_040, 160_432_128),
}
IMAGENET_NETWORKS = (
    *("resnet18", "resnet34", "hardtanh_resnet18", "standard_resnet18", "standard_resnet34", "standard_resnet50"),
    *("reactnet18", "reactnet34", "basq_mobilenet_v2", "basq_mobilenet_v1", "basq_resnet18"),
)


def sub_bit(tau: int) -> QuantSpec:
    return QuantSpec(weight=spec("codebook", tau=tau), act=spec("approx_sign"))


def quantizers_of(name: str) -> QuantSpec:
    """How the network's method quantizes it."""
    kind = name.partition("_")[0]
    if kind == "standard":
        return QuantSpec()
    if kind.startswith("reactnet"):
        return sub_bit(5)
    if kind == "basq":
        return QuantSpec(weight=spec("lsq", bits=2), act=spec("lsq", bits=2), searched=spec("branch_clip", bits=2))
    if kind == "hardtanh":
        binary = spec("sign" if name == "hardtanh_mlp" else "irnet")
        return QuantSpec(weight=binary, act=binary)
    weight = spec("pruned", inner=spec("dorefa", bits=1))
    return QuantSpec(weight=weight, act=spec("dorefa", bits=1), first=weight if kind == "vgg" else QuantSpec().first)


@functools.cache
def of_network(name: str, quant: QuantSpec | None = None) -> Complexity:
    image_shape, num_classes = IMAGENET if name in IMAGENET_NETWORKS else CIFAR
    if name == "hardtanh_mlp":
        image_shape, quant = (28, 28, 1), QuantSpec(weight=spec("sign"), act=spec("sign"))
    network = networks.build(spec(name), quant or quantizers_of(name), num_classes=num_classes)
    return complexity(network, image_shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str) -> None:
    assert name in EXPECTED, f"add the costs of network {name} to EXPECTED of {__file__}"
    assert costs_of(of_network(name).total) == EXPECTED[name]


def test_no_row_is_of_a_network_that_is_gone() -> None:
    assert set(EXPECTED) == set(NETWORKS)


# ---- the last stage of every config


def with_scales(costs: Costs, filters: int) -> Costs:
    """The costs where the scales of so many filters are parameters; stored they are either way."""
    return dataclasses.replace(costs, parameters=costs.parameters + filters)


EXPECTED_OF_CONFIGS: dict[str, tuple[str, Costs]] = {
    "asbq_resnet18": ("w1a1", EXPECTED["resnet18"]),
    "asbq_resnet20": ("w1a1", EXPECTED["resnet20"]),
    # The first convolution of a block reads 32-bit activations: 18,874,368 of the 40,108,032 products.
    "asbq_resnet20_from_w4a4": ("w1a1", dataclasses.replace(EXPECTED["resnet20"], bit_operations=625_213_440)),
    # 100 instead of 10 classes: 90 * 65 parameters more.
    "asbq_resnet20_cifar100": ("w1a1", Costs(278_324, 267_264, 0, 404_672, 40_818_944, 40_108_032)),
    "asbq_skd_resnet20": ("w1a1", EXPECTED["resnet20"]),
    "asbq_vgg_small": ("w1a1", EXPECTED["vgg_small"]),
    **{
        name: ("finetune_9", EXPECTED[name])
        for name in (
            *("basq_mobilenet_v2", "basq_mobilenet_v1", "basq_resnet18"),
            *("basq_mobilenet_v2_cifar", "basq_resnet20_cifar"),
        )
    },
    "irnet_resnet20": ("train", EXPECTED["hardtanh_resnet20"]),
    # The digits have 16x16 pixels.
    "quickstart": ("w1a1", Costs(78_042, 73_728, 0, 159_744, 3_125_888, 2_949_120)),
    # The networks of IR-Net; the scales of the filters (3,840, 672 and 1,664) are trained.
    "recu_resnet18": ("train", with_scales(EXPECTED["hardtanh_resnet18_cifar"], 3_840)),
    "recu_resnet20": ("train", with_scales(EXPECTED["hardtanh_resnet20"], 672)),
    "recu_vgg_small": ("train", with_scales(EXPECTED["hardtanh_vgg_small"], 1_664)),
    "skd_mnist_mlp": ("train", EXPECTED["hardtanh_mlp"]),
    "skd_resnet18": ("train", EXPECTED["hardtanh_resnet18_cifar"]),
    "skd_resnet18_imagenet": ("train_2", EXPECTED["hardtanh_resnet18"]),
    "skd_resnet20": ("train", EXPECTED["hardtanh_resnet20"]),
    "skd_vgg_small": ("train", EXPECTED["hardtanh_vgg_small"]),
    "snn_resnet18": ("sub_bit", EXPECTED["reactnet18"]),
    "snn_resnet18_cifar": ("sub_bit", EXPECTED["reactnet18_cifar"]),
    "snn_resnet20": ("sub_bit", EXPECTED["reactnet20"]),
    "snn_skd_resnet20": ("sub_bit", EXPECTED["reactnet20"]),
    # Five codebooks of 32 patterns.
    "snn_vgg_small": ("sub_bit", Costs(4_661_546, 2_539_520, 1_440, 3_014_976, 607_600_640, 113_770_496)),
    # Four logits for each of 11,157,504, 267,264 and 4,571,136 weights, two bits each; activations are floats.
    "weight_search_resnet18": (
        "search",
        Costs(45_162_024, 22_315_008, 0, 17_331_456, 1_814_073_344, 108_515_033_088),
    ),
    "weight_search_resnet20": ("search", Costs(1_071_514, 534_528, 0, 122_688, 40_551_040, 2_566_914_048)),
    "weight_search_vgg_small": ("search", Costs(18_373_514, 9_142_272, 0, 2_961_728, 607_600_640, 38_654_705_664)),
    "weight_search_w1a1_resnet20": ("search", Costs(537_114, 267_264, 0, 130_880, 40_551_040, 40_108_032)),
}


def of_stage(stage: Stage) -> Complexity:
    image_shape, num_classes = data.describe(stage.data)
    return complexity(build_network(stage, num_classes), image_shape)


@pytest.mark.parametrize("name", NAMES)
def test_last_stage_of_config(name: str) -> None:
    assert name in EXPECTED_OF_CONFIGS, f"add the costs of configs/{name}.py to EXPECTED_OF_CONFIGS of {__file__}"
    run = run_of(name)
    found = (run.stages[-1].name, costs_of(of_stage(run.stages[-1]).total))
    assert found == EXPECTED_OF_CONFIGS[name]


def test_no_row_is_of_a_config_that_is_gone() -> None:
    assert set(EXPECTED_OF_CONFIGS) == set(NAMES)


def test_the_rungs_of_a_chain_cost_their_bits() -> None:
    run = run_of("asbq_resnet20")
    totals = {stage.name: of_stage(stage).total for stage in run.stages}
    # 36,864 and so on times the bits of the weights, and 40,108,032 times both.
    assert {name: (total.quantized_bits, total.bit_operations) for name, total in totals.items()} == {
        "w32a32": (0, 0),
        "w8a8": (2_138_112, 2_566_914_048),
        "w4a4": (1_069_056, 641_728_512),
        "w2a2": (534_528, 160_432_128),
        "w1a1": (267_264, 40_108_032),
    }


# ---- the published figures of SNN (ImageNet, ResNet-18), as printed in its README


@pytest.mark.parametrize(
    ("tau", "size", "bit_operations", "codebook_bits"),
    [
        (9, "10.99 Mbit", 1.677e9, 0),
        (6, "7.324 Mbit", 0.883e9, 9_216),
        (5, "6.103 Mbit", 0.501e9, 4_608),
        (4, "4.882 Mbit", 0.297e9, 2_304),
    ],
)
def test_published_sizes_and_costs_of_snn(tau: int, size: str, bit_operations: float, codebook_bits: int) -> None:
    config = importlib.import_module("configs.snn_resnet18").get_config()
    config.snn.tau = tau
    run = make_experiment(validate(config.to_dict()))
    total = summary(run).total
    assert total.quantized_bits == tau * 1_220_608
    assert tables.format_si(total.quantized_bits, "bit", digits=4) == size
    # Printed with three decimals of a thousand million, one of them cut off instead of rounded.
    assert total.bit_operations == pytest.approx(bit_operations, abs=1e6)
    assert total.codebook_bits == codebook_bits


def test_the_summary_of_snn_shows_the_published_figures() -> None:
    file = io.StringIO()
    tables.show(tables.costs_table(summary(run_of("snn_resnet18"))), file=file)
    text = " ".join(file.getvalue().split())
    assert text.startswith("Stage sub_bit: reactnet18, images of 224x224x3 (other stages: --stage=binary_activations)")
    assert "stored: 29.54 Mbit = 6.103 Mbit quantized weights + 4.608 kbit codebooks + 23.44 Mbit floats" in text
    assert "MACs: 1.814 G bit ops: 501.4 M" in text
    assert "…" not in text


def test_the_whole_model_of_snn_is_mostly_floats() -> None:
    # Section 6 of the specification: codes and codebooks, real parameters, BatchNorm statistics, a scale a filter.
    total = of_network("reactnet18", sub_bit(5)).total
    assert total.stored_bits == 6_103_040 + 4_608 + 32 * (718_952 + 9_600 + 3_840)
    assert tables.format_si(total.stored_bits, "bit", digits=4) == "29.54 Mbit"


@pytest.mark.parametrize(("tau", "parameters"), [(4, 11_706_728), (5, 11_709_032), (6, 11_713_640), (9, 11_778_152)])
def test_parameters_of_snn_with_its_codebooks(tau: int, parameters: int) -> None:
    assert of_network("reactnet18", sub_bit(tau)).total.parameters == parameters


def test_the_first_step_of_snn_has_real_weights() -> None:
    cost = of_network("reactnet18", QuantSpec(act=spec("approx_sign")))
    assert cost.total.parameters == 11_704_424
    assert cost.total.quantized_bits == cost.total.bit_operations == 0
    inner = [layer for layer in cost.layers if layer.path.startswith("layer") and layer.kind == "conv"]
    reasons = {layer.full_precision_because for layer in inner}
    assert reasons == {"no quantizer", "shortcut"}


def test_what_stays_full_precision_in_snn_and_why() -> None:
    weights: dict[str, int] = {}
    for layer in of_network("reactnet18").layers:
        if not layer.quantized:
            weights[layer.full_precision_because] = weights.get(layer.full_precision_because, 0) + layer.parameters
    # Shifts and slopes around the activations have no kernel.
    assert weights == {
        "first layer": 9_408,
        "shortcut": 172_032,
        "classifier": 513_000,
        "batch norm": 9_600,
        "no kernel": 3_392 + 3 * 3_840,
    }
