"""Facts of the networks, and the depths that have no row of their own."""

import subprocess
import sys

import jax
import pytest

from bnn_jax import networks
from bnn_jax.catalogue import blocks_of_depth, facts_of
from bnn_jax.experiment.start import variable_shapes
from bnn_jax.networks.resnet import ImageNetResNet
from bnn_jax.stages import QuantSpec, spec
from tests.conftest import ROOT


def test_methods_and_facts_are_read_without_jax():
    program = "import sys, bnn_jax.methods, bnn_jax.catalogue; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_initialisers_in_the_catalogue_are_known(name):
    facts = facts_of(name)
    assert {*facts.inits, facts.released_init or "uniform"} <= set(networks.KERNEL_INITS)
    assert facts.searched == (name in networks.SEARCHED_NETWORKS)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("resnet32", 5), ("hardtanh_resnet44", 7), ("standard_resnet110", 18), ("reactnet32", 10), ("resnet20", 3)],
)
def test_a_cifar_family_has_every_depth(name, sizes):
    assert name in networks.NETWORKS
    network = networks.build(spec(name), QuantSpec(), num_classes=10)
    assert (network.stage_sizes, network.widths) == ((sizes,) * 3, (16, 32, 64))


@pytest.mark.parametrize(
    ("name", "side"), [("vgg_small", 8), ("vgg_small", 13), ("resnet8", 7), ("reactnet8", 7), ("hardtanh_mlp", 5)]
)
def test_images_of_any_side_from_the_least_one_on_are_accepted(name, side):
    assert side >= facts_of(name).least_side
    shapes = variable_shapes(networks.build(spec(name), QuantSpec(), num_classes=2), (side, side, 3))
    assert all(size > 0 for leaf in jax.tree.leaves(shapes["params"]) for size in leaf.shape)


@pytest.mark.parametrize("name", [name for name in networks.NETWORKS if "_cifar" not in name])
def test_a_network_with_the_stem_for_imagenet_wants_images_that_leave_something(name):
    network = networks.build(spec(name), QuantSpec(), num_classes=2)
    of_imagenet = isinstance(network, ImageNetResNet) or getattr(network, "imagenet_stem", "mobilenet" in name)
    assert (facts_of(name).least_side == 64) == of_imagenet


@pytest.mark.parametrize(
    "name", ["resnet21", "resnet2", "vgg32", "basq_resnet32", "standard_resnet32_cifar", "resnet032"]
)
def test_other_names_are_refused(name):
    assert name not in networks.NETWORKS
    assert blocks_of_depth(name) is None
    with pytest.raises(ValueError, match=f"network '{name}': accepted are resnet8"):
        networks.build(spec(name), QuantSpec(), num_classes=10)


def test_networks_for_imagenet_come_before_depths_of_the_same_form():
    network = networks.build(spec("standard_resnet50"), QuantSpec(), num_classes=10)
    assert (network.block, network.imagenet_stem) == ("bottleneck", True)
