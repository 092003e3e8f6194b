"""Every quantizer and every network of the tables gives the same answers exported as it does itself."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.deploy import load, native
from bnn_jax.networks import NETWORKS
from bnn_jax.quantizers import QuantContext
from bnn_jax.stages import Spec, spec
from tests.deploy.networks import exported, images_of, save, small, tiny
from tests.quantizers.battery_test import ACTS, WEIGHTS, spec_id

SETS = tuple(kernels.name for kernels in native.instruction_sets())
BACKENDS = [("packed", name) for name in (*SETS, "numpy")] + [("jax", None)]


def check(path: Path, images: np.ndarray, expected: np.ndarray) -> None:
    """All ways of running a file agree with the network: sums are exact, scales are multiplied in another order."""
    for backend, instruction_set in BACKENDS:
        classifier = load(path, backend=backend, threads=1, instruction_set=instruction_set)  # type: ignore[arg-type]
        logits = classifier.logits(images)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=backend)
        np.testing.assert_array_equal(logits.argmax(axis=1), expected.argmax(axis=1))


@pytest.mark.parametrize("weight", [choice for choice, _ in WEIGHTS], ids=spec_id)
def test_every_weight_quantizer(weight: Spec, tmp_path: Path) -> None:
    program, weights, expected, images = tiny(weight, spec("sign"))
    check(save(tmp_path / "x.bnn", program, weights), images, expected)


@pytest.mark.parametrize("act", ACTS, ids=spec_id)
@pytest.mark.parametrize("weight", [spec("irnet"), spec("dorefa", bits=4)], ids=spec_id)
def test_every_activation_quantizer(weight: Spec, act: Spec, tmp_path: Path) -> None:
    program, weights, expected, images = tiny(weight, act)
    check(save(tmp_path / "x.bnn", program, weights), images, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(name: str, tmp_path: Path) -> None:
    network, shape = small(name)
    context = None
    if getattr(network, "branches", 1) > 1:
        context = QuantContext(choice=jnp.ones(len(network.branch_patterns), jnp.int32))
    images = images_of(shape, 3)
    program, weights, expected = exported(network, images, context)
    check(save(tmp_path / "x.bnn", program, weights, mean=[0.5] * shape[2], std=[1.0] * shape[2]), images, expected)


@pytest.mark.parametrize("block", ["release", "checkpoint"])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_blocks_of_asbq(block: str, bits: int, tmp_path: Path) -> None:
    from bnn_jax import networks
    from bnn_jax.stages import QuantSpec

    quant = QuantSpec(weight=spec("dorefa", bits=bits), act=spec("dorefa", bits=bits))
    choice = spec("resnet8", stage_sizes=(1, 2), widths=(8, 16), block=block)
    images = images_of((9, 9, 3), 3)
    program, weights, expected = exported(networks.build(choice, quant, num_classes=10), images)
    check(save(tmp_path / "x.bnn", program, weights), images, expected)


def test_a_path_of_a_supernet_is_exported_alone() -> None:
    network, shape = small("basq_resnet8_cifar")
    images = images_of(shape, 3)
    genes = len(network.branch_patterns)
    answers = [
        exported(network, images, QuantContext(choice=jnp.full(genes, branch, jnp.int32)))[2] for branch in (0, 1)
    ]
    assert not np.array_equal(*answers)


def test_an_operation_that_files_do_not_have_is_named() -> None:
    from bnn_jax.deploy.trace import trace
    from bnn_jax.networks.base import NetworkOutput
    from tests.deploy.networks import Tiny, variables_of

    class Sine(Tiny):
        def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
            output = super().__call__(x, ctx)
            return output.replace(logits=jnp.sin(output.logits))

    images = images_of((9, 9, 3), 2)
    network = Sine(spec("sign"), spec("sign"))
    with pytest.raises(ValueError, match="operation 'sin'"):
        trace(network, variables_of(network, images), (9, 9, 3))
