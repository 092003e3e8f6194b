import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers import QuantContext
from bnn_jax.stages import IDENTITY, Spec, spec
from bnn_jax.storage.weights import encoded_weights, put_base, save_weights
from tests.training import tiny

IMAGE_SHAPE = (tiny.SIZE, tiny.SIZE, 3)
SIGNS = spec("categorical", values=(1.0, -1.0))
FACTORS = spec("categorical", values=(1.0, 0.5), base_levels=(-1.0, 1.0), start="even")


def network(weight: Spec) -> tiny.TinyNetwork:
    return tiny.TinyNetwork(weight=weight)


def variables(weight: Spec) -> dict:
    return jax.tree.map(jnp.array, tiny.variables(network(weight)))


@pytest.mark.parametrize(
    "weight", [SIGNS, FACTORS, spec("dorefa", bits=2), tiny.PRUNED], ids=lambda weight: weight.name
)
def test_the_weights_in_use_are_those_a_layer_multiplies_with(weight):
    model, chosen = network(weight), variables(weight)
    (path,) = encoded = encoded_weights(model, chosen, IMAGE_SHAPE)
    assert path == "conv"
    kernel = encoded[path].decode()
    # The output of the convolution for a single white pixel in the middle of a layer's window is its kernel there.
    images = jnp.zeros((1, *IMAGE_SHAPE)).at[0, 2, 2, 0].set(1.0)
    _, kept = model.apply(chosen, images, QuantContext(), mutable=["taps"])
    np.testing.assert_allclose(kept["taps"]["conv"]["output"][0, 1, 1], kernel[1, 1, 0], rtol=1e-6)


def test_layers_of_real_weights_have_none():
    assert encoded_weights(network(IDENTITY), variables(IDENTITY), IMAGE_SHAPE) == {}


def test_the_weights_of_another_network_become_the_fixed_ones_and_the_choice_starts_afresh():
    before, fresh = variables(SIGNS), variables(FACTORS)
    copied = {**fresh, "params": jax.tree.map(lambda leaf: leaf + 1.0, before["params"])}
    encoded = encoded_weights(network(SIGNS), before, IMAGE_SHAPE)
    result = put_base(copied, fresh, encoded)
    np.testing.assert_array_equal(result["quant_state"]["conv"]["weight_quantizer"]["base"], encoded["conv"].decode())
    np.testing.assert_array_equal(result["params"]["conv"]["kernel"], fresh["params"]["conv"]["kernel"])
    np.testing.assert_array_equal(result["params"]["fc"]["kernel"], copied["params"]["fc"]["kernel"])
    # With an even start the factor is 1 everywhere: both networks are the same.
    images = jnp.asarray(np.random.RandomState(0).normal(size=(3, *IMAGE_SHAPE)), jnp.float32)
    other = {**before, "params": {**result["params"], "conv": before["params"]["conv"]}}
    np.testing.assert_array_equal(
        network(FACTORS).apply(result, images, QuantContext()).logits,
        network(SIGNS).apply(other, images, QuantContext()).logits,
    )


def test_a_layer_without_weights_to_take_is_refused_by_name():
    fresh = variables(FACTORS)
    with pytest.raises(
        ValueError, match=r"^fixed weights of conv: none where they are taken from, expected \(3, 3, 3, 4\)$"
    ):
        put_base(fresh, fresh, {})


def test_saved_weights_can_be_read_with_numpy_alone(tmp_path):
    weight = spec("categorical", values=(-0.3, 0.1, 0.7))
    encoded = encoded_weights(network(weight), variables(weight), IMAGE_SHAPE)
    save_weights(tmp_path / "weights.npz", encoded)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.npz"]
    with np.load(tmp_path / "weights.npz") as file:
        arrays = {name.removeprefix("conv/"): file[name] for name in file.files}
    assert set(arrays) == {"kernel", "indices", "levels", "scale"}
    assert (arrays["kernel"].shape, arrays["indices"].dtype) == ((3, 3, 3, 4), np.uint8)
    np.testing.assert_array_equal(arrays["levels"], np.float32([-0.3, 0.1, 0.7]))
    np.testing.assert_array_equal(arrays["levels"][arrays["indices"]] * arrays["scale"], arrays["kernel"])
