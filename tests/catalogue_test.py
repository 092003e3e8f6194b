"""Facts of the networks, and the depths that have no row of their own."""

import subprocess
import sys

import pytest

from bnn_jax import networks
from bnn_jax.catalogue import blocks_of_depth, facts_of
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
