"""Training goes on from an exported network: its variables compute what the file computes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.deploy import artefact
from bnn_jax.deploy.restart import FOLDED, arrays_of, modules_of
from bnn_jax.experiment import adapt
from bnn_jax.layers.conv import QuantConv, QuantDense
from bnn_jax.layers.norm import BatchNorm
from bnn_jax.networks.base import NetworkOutput
from bnn_jax.ops.ste import hard_tanh
from bnn_jax.quantizers import build_act, build_weight
from bnn_jax.quantizers.base import QuantContext, evaluation_context
from bnn_jax.stages import spec
from tests.deploy.networks import Tiny, exported, images_of, save


class Chain(nn.Module):
    """Binary convolutions, between which only a sign reads what a BatchNorm gives."""

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        quantizers = {"weight_quantizer": build_weight(spec("irnet")), "act_quantizer": build_act(spec("sign"))}
        x = QuantConv(12, name="conv0", **quantizers)(x, ctx)
        x = QuantConv(12, name="conv1", **quantizers)(hard_tanh(BatchNorm(name="bn0")(x, ctx)), ctx)
        features = jnp.mean(BatchNorm(name="bn1")(x, ctx), axis=(1, 2))
        return NetworkOutput(logits=QuantDense(7, name="fc")(features, ctx), features=features)


NETWORKS = {
    "real": (Tiny(spec("identity"), spec("identity")), (9, 9, 3)),
    "thresholds": (Chain(), (9, 9, 3)),
}


def restarted(name: str, path: Any) -> tuple[Any, dict[str, Any], np.ndarray, np.ndarray]:
    """Network, variables made of its file, images, and what it answered before it was exported."""
    network, shape = NETWORKS[name]
    images = images_of(shape)
    program, weights, answer = exported(network, images)
    found = arrays_of(artefact.load(save(path / "x.bnn", program, weights, **modules_of(program))))
    assert any(found[path].any() for path in found if path.startswith(FOLDED)) == (name == "thresholds")
    fresh = jax.jit(lambda x: network.init(jax.random.key(1), x, QuantContext()))(jnp.asarray(images))
    target = adapt.flat_arrays(fresh)
    assert set(target) == {path for path in found if not path.startswith(FOLDED)}
    plan = adapt.Plan(tuple(target), frozenset(), "", ())
    variables = adapt.adapted(plan, found, fresh)
    return network, adapt.calibrated(network, variables, jnp.asarray(images), found), images, answer


@pytest.mark.parametrize("name", NETWORKS)
def test_the_variables_of_a_file_compute_what_it_computes(tmp_path, name):
    network, variables, images, answer = restarted(name, tmp_path)
    logits = jax.jit(lambda v, x: network.apply(v, x, evaluation_context(v)).logits)(variables, images)
    # Factors and summands were folded in float32 twice.
    np.testing.assert_allclose(logits, answer, rtol=1e-4, atol=1e-4)


def test_the_statistics_are_those_of_the_images_so_that_training_sees_the_same_values(tmp_path):
    network, variables, images, answer = restarted("real", tmp_path)
    training = QuantContext(train=True)
    logits = jax.jit(lambda v, x: network.apply(v, x, training, mutable=["batch_stats"])[0].logits)(variables, images)
    np.testing.assert_allclose(logits, answer, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("modules", [[1], {"bn1": -1}, {"bn1": 10**6}, {"bn1": "x"}])
def test_facts_about_operations_that_there_are_not_are_refused(tmp_path, modules):
    network, shape = NETWORKS["real"]
    program, weights, _ = exported(network, images_of(shape))
    with pytest.raises(artefact.ArtefactError, match="facts: modules: "):
        arrays_of(artefact.load(save(tmp_path / "x.bnn", program, weights, modules=modules)))
