"""What every network of the table has to satisfy. A new table entry needs a row in EXPECTED."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bnn_jax import networks
from bnn_jax.experiment import start
from bnn_jax.layers.conv import fan_in_uniform
from bnn_jax.networks import NETWORKS
from bnn_jax.networks.base import he_fan_out_normal, xavier_normal
from bnn_jax.quantizers import QuantContext
from bnn_jax.stages import QuantSpec, Spec, spec


@dataclasses.dataclass(frozen=True)
class Expected:
    """Facts about a network (specifications: ASBQ, sections 2.6 and 7; SKD-BNN, section 5; weight search, section 2.6).

    Attributes:
      parameters: trainable numbers at ``num_classes`` classes.
      num_classes: classes of the published network.
      image_size: pixels per side.
      features: length of the classifier's input.
      quantized: quantized convolutions, and numbers in their kernels.
      norms: BatchNorm layers.
      channels: of the images.
    """

    parameters: int
    num_classes: int
    image_size: int
    features: int
    quantized: tuple[int, int]
    norms: int
    channels: int = 3


def cifar_resnet(parameters: int, blocks: int) -> Expected:
    """Depth 6 * blocks + 2: the counts of kernels and norms follow from it."""
    per_block = sum(2 * 9 * width * width for width in (16, 32, 64))
    # The first block of the second and third stage reads half as many channels.
    less = 9 * 32 * 16 + 9 * 64 * 32
    return Expected(parameters, 10, 32, 64, (6 * blocks, blocks * per_block - less), 6 * blocks + 3)


EXPECTED = {
    "resnet8": cifar_resnet(78_042, 1),
    "resnet14": cifar_resnet(175_258, 2),
    "resnet20": cifar_resnet(272_474, 3),
    "resnet26": cifar_resnet(369_690, 4),
    "resnet56": cifar_resnet(855_770, 9),
    # Not in the specification: 97,216 per further block of each stage, as between the others.
    "resnet110": cifar_resnet(272_474 + 15 * 97_216, 18),
    "resnet18_cifar": Expected(11_173_962, 10, 32, 512, (16, 10_985_472), 20),
    "resnet18": Expected(11_688_616, 1000, 224, 512, (16, 10_985_472), 20),
    "resnet34": Expected(21_796_776, 1000, 224, 512, (32, 21_086_208), 36),
    "vgg_small": Expected(4_660_106, 10, 32, 8192, (6, 4_574_592), 6),
    "hardtanh_resnet20": Expected(269_850, 10, 32, 64, (18, 267_264), 20),
    "hardtanh_resnet18_cifar": Expected(11_174_986, 10, 32, 512, (16, 10_985_472), 21),
    "hardtanh_resnet18": Expected(11_690_536, 1000, 224, 512, (16, 10_985_472), 21),
    "hardtanh_vgg_small": Expected(4_660_106, 10, 32, 8192, (5, 4_571_136), 6),
    # Kernels and biases of 784 to 2,048 to 2,048 to 2,048 to 10, and three norms; no convolution.
    "hardtanh_mlp": Expected(10_033_162, 10, 28, 2048, (0, 0), 3, channels=1),
    # Weight search specification, section 2.6; the 1x1 shortcuts are not among the quantized convolutions here.
    "standard_resnet20": Expected(269_722, 10, 32, 64, (18, 267_264), 19),
    "standard_resnet18_cifar": Expected(11_173_962, 10, 32, 512, (16, 10_985_472), 20),
    "standard_resnet18": Expected(11_689_512, 1000, 224, 512, (16, 11_157_504 - 172_032), 20),
    "standard_resnet34": Expected(21_797_672, 1000, 224, 512, (32, 21_258_240 - 172_032), 36),
    "standard_resnet50": Expected(25_557_032, 1000, 224, 2048, (48, 23_445_504 - 2_768_896), 53),
    "standard_vgg_small": Expected(4_660_106, 10, 32, 8192, (5, 4_571_136), 6),
    # SNN specification, section 5.
    "reactnet18": Expected(11_704_424, 1000, 224, 512, (16, 10_985_472), 20),
    # 9 w^2 + 6 w more for each of the 2, 4, 8 and 2 further blocks.
    "reactnet34": Expected(11_704_424 + 10_123_008, 1000, 224, 512, (32, 21_086_208), 36),
    # Stem 3x3 instead of 7x7, 10 classes.
    "reactnet18_cifar": Expected(11_704_424 - 3 * 40 * 64 - 990 * 513, 10, 32, 512, (16, 10_985_472), 20),
    "reactnet20": Expected(275_114, 10, 32, 64, (18, 267_264), 21),
    "reactnet8": Expected(78_890, 10, 32, 64, (6, 73_728), 9),
    # BASQ specification, section 5, without steps and clip values: weights, stem, classifier, BatchNorms of 7 branches.
    "basq_mobilenet_v2": Expected(
        2_188_896 + 864 + 1_281_000 + 299_712 + 56_896, 1000, 224, 1280, (51, 2_188_896), 154
    ),
    # By analogy: counted a second time from the rows of the networks, without the library.
    "basq_mobilenet_v1": Expected(4_452_200, 1000, 224, 1024, (26, 3_184_224), 79),
    "basq_mobilenet_v2_cifar": Expected(2_559_178, 10, 32, 1280, (51, 2_188_896), 154),
    "basq_resnet8_cifar": Expected(83_578, 10, 32, 64, (6, 73_728), 19),
    "basq_resnet18": Expected(11_663_016, 1000, 224, 512, (16, 10_985_472), 49),
    "basq_resnet20_cifar": Expected(295_930, 10, 32, 64, (18, 267_264), 55),
}

PRUNED = spec("pruned")
each_network = pytest.mark.parametrize("name", EXPECTED)


@functools.cache
def shapes_of(name: str):
    """Output and variables of a network, as shapes; quantized convolutions are those with a mask."""
    expected = EXPECTED[name]
    quant = QuantSpec(weight=PRUNED, first=PRUNED if name == "vgg_small" else QuantSpec().first)
    if name == "hardtanh_mlp":
        # Pruning knows kernels of convolutions only.
        quant = QuantSpec()
    network = networks.build(spec(name), quant, num_classes=expected.num_classes)
    images = jax.ShapeDtypeStruct((2, expected.image_size, expected.image_size, expected.channels), jnp.float32)
    keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
    return jax.eval_shape(lambda x: network.init_with_output(keys, x, QuantContext(train=True)), images)


def test_every_table_entry_has_its_facts() -> None:
    missing = sorted(set(NETWORKS) - set(EXPECTED))
    assert not missing, f"networks {missing}: add a row to EXPECTED of {__file__}"


@each_network
def test_number_of_parameters(name: str) -> None:
    _, variables = shapes_of(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == EXPECTED[name].parameters


@each_network
def test_shapes_of_the_output(name: str) -> None:
    output, _ = shapes_of(name)
    expected = EXPECTED[name]
    assert (output.logits.shape, output.logits.dtype) == ((2, expected.num_classes), jnp.float32)
    assert (output.features.shape, output.features.dtype) == ((2, expected.features), jnp.float32)


@each_network
def test_quantized_convolutions_and_their_weights(name: str) -> None:
    _, variables = shapes_of(name)
    masks = jax.tree.leaves(variables.get("quant_state", {}))
    assert (len(masks), sum(mask.size for mask in masks)) == EXPECTED[name].quantized


@each_network
def test_number_of_norms(name: str) -> None:
    _, variables = shapes_of(name)
    assert sum(path[-1] == "var" for path in flatten_dict(variables["batch_stats"])) == EXPECTED[name].norms


@each_network
def test_collections_are_parameters_statistics_and_quantizer_state_only(name: str) -> None:
    # What the real stream reads is collected within a step and never stored.
    assert set(shapes_of(name)[1]) == {"params", "batch_stats"} | (
        {"quant_state"} if EXPECTED[name].quantized[0] else set()
    )


# Small enough to run: two stages, so that every kind of block and shortcut occurs.
SMALL = {
    "release": spec("resnet8", stage_sizes=(2, 1), widths=(4, 6)),
    "checkpoint": spec("resnet8", stage_sizes=(2, 1), widths=(4, 6), block="checkpoint"),
    "imagenet": spec("resnet18", stage_sizes=(2, 1), widths=(4, 6)),
    "vgg_small": spec("vgg_small", widths=(4, 4, 6, 6, 8, 8)),
    "double_skip_padded": spec("hardtanh_resnet20", stage_sizes=(2, 1), widths=(4, 8)),
    "double_skip": spec("hardtanh_resnet18", stage_sizes=(2, 1), widths=(4, 8)),
    "single_skip": spec("hardtanh_resnet18_cifar", stage_sizes=(2, 1), widths=(4, 8)),
    "hardtanh_vgg_small": spec("hardtanh_vgg_small", widths=(4, 4, 6, 6, 8, 8)),
    "reactnet": spec("reactnet20", stage_sizes=(2, 1), widths=(4, 8)),
    "reactnet_imagenet": spec("reactnet18", stage_sizes=(2, 1), widths=(4, 8)),
    # Without dropout: its draws depend on the shape of the batch.
    "hardtanh_mlp": spec("hardtanh_mlp", hidden=12, dropout=0.0),
    "post_activation_padded": spec("standard_resnet20", stage_sizes=(2, 1), widths=(4, 8)),
    "post_activation": spec("standard_resnet18", stage_sizes=(2, 1), widths=(4, 8)),
    "bottleneck": spec("standard_resnet50", stage_sizes=(2, 1), widths=(4, 8)),
    "standard_vgg_small": spec("standard_vgg_small", widths=(4, 4, 6, 6, 8, 8)),
    # Without dropout, as above.
    "basq_mobilenet": spec(
        "basq_mobilenet_v2_cifar",
        rows=((1, 4, 1, 1), (2, 6, 2, 2)),
        head_width=12,
        stem_width=4,
        branches=3,
        dropout=0.0,
    ),
    "basq_resnet": spec("basq_resnet20_cifar", stage_sizes=(2, 1), widths=(4, 8), stem_width=4, branches=3),
    "basq_resnet_imagenet": spec("basq_resnet18", stage_sizes=(1, 1), widths=(4, 8), stem_width=4, branches=3),
}
each_small = pytest.mark.parametrize("kind", SMALL)
REAL = QuantSpec()
FOUR_BITS = QuantSpec(weight=spec("dorefa", bits=4), act=spec("dorefa", bits=4))


def images_of(rows: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).normal(size=(rows, 8, 8, 3)), jnp.float32)


@functools.cache
def small_network(kind: str, quant: QuantSpec):
    """A small network and random variables; drawing them with numpy needs no compilation."""
    network = networks.build(SMALL[kind], quant, num_classes=3)
    random = np.random.RandomState(1)
    shapes = start.variable_shapes(network, (8, 8, 3))

    def draw(path, leaf) -> np.ndarray:
        value = random.normal(0, 0.3, leaf.shape).astype(np.float32)
        return 1 + np.abs(value) if path[-1].key in ("scale", "var") else value

    return network, jax.tree_util.tree_map_with_path(draw, shapes)


@each_small
def test_unused_parameters_are_exactly_those_without_a_gradient(kind: str) -> None:
    network, variables = small_network(kind, REAL)

    @jax.jit
    def gradients(params):
        def loss(params):
            ctx = QuantContext(train=True)
            output, _ = network.apply({**variables, "params": params}, images_of(4), ctx, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(jnp.arange(12.0)).reshape(4, 3) * output.logits)

        return jax.grad(loss)(params)

    flat = flatten_dict(gradients(variables["params"]), sep="/")
    without = {path for path, gradient in flat.items() if not np.any(gradient)}
    unused = {path for path in flat if any(re.search(pattern, path) for pattern in network.unused_parameters)}
    assert without == unused
    assert bool(unused) == (kind == "checkpoint")


@each_small
def test_every_network_hands_out_features_to_compare(kind: str) -> None:
    network, variables = small_network(kind, REAL)
    collect = ["batch_stats", "block_features"]
    ctx = QuantContext(train=True)
    _, kept = jax.eval_shape(lambda x: network.apply(variables, x, ctx, mutable=collect), images_of(2))
    features = jax.tree.leaves(kept["block_features"])
    assert features
    assert {(feature.shape[0], feature.dtype.name) for feature in features} == {(2, "float32")}


@each_small
def test_evaluation_of_a_row_does_not_depend_on_the_other_rows(kind: str) -> None:
    network, variables = small_network(kind, FOUR_BITS)
    images = images_of(3)
    padded = jnp.concatenate([images, 100 * images_of(2, seed=1)])
    forward = jax.jit(lambda x, mask: network.apply(variables, x, QuantContext(mask=mask)).logits)
    expected = forward(images, jnp.ones(3, bool))
    # Convolutions of another batch size may add in another order: a few ulps, no value near a rounding threshold here.
    np.testing.assert_allclose(forward(padded, jnp.arange(5) < 3)[:3], expected, atol=1e-5)


@each_small
def test_training_on_a_padded_batch_equals_the_batch_without_padding(kind: str) -> None:
    # At 32 bits, so that a last bit of difference cannot flip a rounding.
    network, variables = small_network(kind, REAL)
    images = images_of(4)
    padded = jnp.concatenate([images, 100 * images_of(2, seed=1)])

    @jax.jit
    def forward(x, mask):
        output, updates = network.apply(variables, x, QuantContext(train=True, mask=mask), mutable=["batch_stats"])
        return output.logits[:4], updates

    padded_result = forward(padded, jnp.arange(6) < 4)
    # Sums over the batch run in another order: float32 rounding through at most eight layers.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        padded_result,
        forward(images, jnp.ones(4, bool)),
    )


@each_small
def test_training_changes_every_running_statistic(kind: str) -> None:
    network, variables = small_network(kind, REAL)
    _, updates = jax.jit(lambda x: network.apply(variables, x, QuantContext(train=True), mutable=["batch_stats"]))(
        images_of(4)
    )
    old, new = (flatten_dict(stats, sep="/") for stats in (variables["batch_stats"], updates["batch_stats"]))
    assert [path for path in old if np.array_equal(old[path], new[path])] == []


def loss_of(network: Any, variables: dict[str, Any]) -> Callable[[Any], jax.Array]:
    """A function of the parameters, in training mode."""

    def loss(params: Any) -> jax.Array:
        outputs, _ = network.apply(
            {**variables, "params": params}, images_of(4), QuantContext(train=True), mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(jnp.arange(12.0)).reshape(4, 3) * outputs.logits)

    return loss


@each_small
def test_blocks_computed_twice_keep_less_for_the_backward_pass(kind: str) -> None:
    network, variables = small_network(kind, REAL)
    if not getattr(network, "has_blocks", False):
        with pytest.raises(ValueError, match=r"remat with network .*: accepted with networks that are made of blocks"):
            networks.build(SMALL[kind], REAL, num_classes=3, remat=True)
        return
    again = networks.build(SMALL[kind], REAL, num_classes=3, remat=True)
    params, losses = variables["params"], [loss_of(each, variables) for each in (network, again)]

    def kept_bytes(loss: Callable[[Any], jax.Array]) -> int:
        # What a pullback holds is what the forward pass keeps for the backward pass.
        kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)

    # Behind the stem for ImageNet little is left of these images: parameters are most of what is kept.
    assert kept_bytes(losses[1]) < 0.9 * kept_bytes(losses[0])


@pytest.mark.parametrize("kind", ["release", "basq_mobilenet"])
def test_blocks_computed_twice_have_the_same_gradients(kind: str) -> None:
    network, variables = small_network(kind, REAL)
    again = networks.build(SMALL[kind], REAL, num_classes=3, remat=True)
    gradients, of_again = (
        jax.jit(jax.grad(loss_of(each, variables)))(variables["params"]) for each in (network, again)
    )
    # Other programs, so rounding; gradients through BatchNorm lose a few digits.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), of_again, gradients)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (spec("resnet9"), "network 'resnet9': accepted are resnet8"),
        (spec("resnet8", block="nosuch"), "block 'nosuch': accepted are release"),
        (spec("resnet8", depth=3), "network 'resnet8' has no option 'depth'"),
        (spec("hardtanh_mlp", block="release"), "network 'hardtanh_mlp' has no option 'block'"),
        (spec("resnet8", kernel_init="nosuch"), "kernel_init 'nosuch': accepted are uniform, he_normal"),
    ],
)
def test_unknown_names_are_refused_with_the_accepted_ones(choice, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        networks.build(choice, QuantSpec(), num_classes=3)


def initialisers_of(choice: Spec) -> dict[str, Callable]:
    """Initialiser of the kernel of every layer, by path."""
    network, found = networks.build(choice, REAL, num_classes=10), {}

    def record(call, arguments, options, context):
        if hasattr(context.module, "kernel_init"):
            found["/".join(context.module.path)] = context.module.kernel_init
        return call(*arguments, **options)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda x: network.init(jax.random.key(0), x, QuantContext()), images_of(1))
    return found


@pytest.mark.parametrize(("name", "inner"), [("uniform", fan_in_uniform), ("he_normal", he_fan_out_normal)])
@pytest.mark.parametrize("kind", ["release", "imagenet"])
def test_only_quantized_convolutions_take_the_chosen_initialiser(kind: str, name: str, inner: Callable) -> None:
    options = SMALL[kind].kwargs
    found = initialisers_of(spec(SMALL[kind].name, kernel_init=name, **options))
    assert found.pop("fc") is {"release": fan_in_uniform, "imagenet": xavier_normal}[kind]
    assert found.pop("conv1") is he_fan_out_normal
    assert found.pop("layer2_0/downsample_conv") is he_fan_out_normal
    assert len(found) == 6
    assert set(found.values()) == {inner}


def test_normal_initialisers_have_their_standard_deviations() -> None:
    # 36,864 and 40,000 draws: the estimates are within 1.5 %, four standard errors of a normal law.
    kernel = he_fan_out_normal(jax.random.key(0), (3, 3, 64, 64))
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.015)
    assert np.std(xavier_normal(jax.random.key(0), (400, 100))) == pytest.approx(np.sqrt(2 / 500), rel=0.015)
