"""Codebooks of a network as plain arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers import QuantConv
from bnn_jax.ops import codebook as ops
from bnn_jax.quantizers import QuantContext, build_weight
from bnn_jax.report.codebooks import codebook_uses
from bnn_jax.stages import spec


@pytest.fixture(params=["codebook", "pruned"])
def variables(request):
    choice = spec("codebook", tau=3)
    weight = build_weight(spec("pruned", inner=choice) if request.param == "pruned" else choice)
    conv = QuantConv(4, weight_quantizer=weight)
    inner = conv.init(jax.random.key(0), jnp.ones((1, 4, 4, 2)), QuantContext())
    return {collection: {"conv1": leaves} for collection, leaves in inner.items()}


def test_the_counts_are_those_of_the_kernels(variables):
    (use,) = codebook_uses(variables, variables).values()
    rows = ops.to_rows(variables["params"]["conv1"]["kernel"])
    assert use.counts.sum() == use.free_counts.sum() == 8 and len(use.counts) == 8
    assert use.free_counts[np.asarray(ops.codes(rows))].min() > 0
    assert not use.flipped.any()


def test_flips_are_counted_from_the_start_of_the_stage(variables):
    before = jax.tree.map(jnp.negative, variables)
    use = codebook_uses(variables, before)["conv1"]
    assert use.flipped.all()


def test_a_network_without_codebooks_has_none():
    assert codebook_uses({"params": {"conv1": {"kernel": jnp.ones((3, 3, 1, 1))}}}, {}) == {}
