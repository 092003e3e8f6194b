import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bnn_jax import networks
from bnn_jax.experiment import start
from bnn_jax.networks.searched import extract
from bnn_jax.quantizers import QuantContext
from bnn_jax.stages import QuantSpec, spec

BRANCHES = 3
QUANT = QuantSpec(weight=spec("lsq", bits=2), act=spec("lsq", bits=2), searched=spec("branch_clip", bits=2))
SMALL = {
    "mobilenet": spec(
        "basq_mobilenet_v2_cifar",
        rows=((1, 4, 1, 1), (2, 6, 2, 2)),
        head_width=12,
        stem_width=4,
        branches=BRANCHES,
        dropout=0.0,
    ),
    "resnet": spec("basq_resnet20_cifar", stage_sizes=(1, 1), widths=(4, 8), stem_width=4, branches=BRANCHES),
}
GENES = {"mobilenet": 3, "resnet": 4}
each_kind = pytest.mark.parametrize("kind", SMALL)


@functools.cache
def supernet(kind):
    """A small supernet and variables in which every branch differs."""
    network = networks.build(SMALL[kind], QUANT, num_classes=5)
    random = np.random.RandomState(0)

    def draw(path, leaf):
        name, value = path[-1].key, random.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(value if name != "kernel" else value - 1, jnp.float32)

    return network, jax.tree_util.tree_map_with_path(draw, start.variable_shapes(network, (8, 8, 3)))


@functools.cache
def compiled(kind):
    network, _ = supernet(kind)
    return jax.jit(lambda variables, x, path: network.apply(variables, x, QuantContext(choice=path)).logits)


def images(rows=2):
    return jnp.asarray(np.random.RandomState(1).normal(size=(rows, 8, 8, 3)), jnp.float32)


def random_paths(kind, count):
    return np.random.RandomState(2).randint(BRANCHES, size=(count, GENES[kind])).astype(np.int32)


@each_kind
def test_two_hundred_paths_are_evaluated_by_one_program_and_differ(kind):
    run, (_, variables) = compiled(kind), supernet(kind)
    paths = random_paths(kind, 200)
    logits = {tuple(path): np.asarray(run(variables, images(), path)).tobytes() for path in paths}
    assert run._cache_size() == 1
    assert len(logits) == len(set(logits.values())) > 20


@each_kind
def test_an_extracted_path_has_the_logits_of_the_supernet_and_no_branch_axes(kind):
    network, variables = supernet(kind)
    for path in random_paths(kind, 3):
        single, own = extract(network, variables, path)
        shapes, expected = (
            {path: leaf.shape for path, leaf in flatten_dict(tree).items()}
            for tree in (own, start.variable_shapes(single, (8, 8, 3)))
        )
        assert shapes == expected
        logits = jax.jit(lambda v, x: single.apply(v, x, QuantContext()).logits)(own, images())  # noqa: B023
        np.testing.assert_array_equal(logits, compiled(kind)(variables, images(), path))


@each_kind
def test_only_clip_values_and_norms_of_searched_layers_have_branches(kind):
    network, variables = supernet(kind)
    single = start.variable_shapes(network.clone(branches=1), (8, 8, 3))
    ours, theirs = flatten_dict(variables, sep="/"), flatten_dict(single, sep="/")
    branched = {path for path in ours if ours[path].shape != theirs[path].shape}
    # Three norms with two parameters and two statistics each, and a clip value, for each searched layer.
    assert len(branched) == 13 * GENES[kind]
    assert all(ours[path].shape == (BRANCHES, *theirs[path].shape) for path in branched)


@each_kind
def test_paths_that_differ_in_a_gene_agree_before_its_layer_and_not_behind(kind):
    network, variables = supernet(kind)

    @jax.jit
    def outputs_of_units(path):
        ctx = QuantContext(choice=path)
        _, kept = network.apply(variables, images(), ctx, mutable=["intermediates"], capture_intermediates=True)
        flat = flatten_dict(kept["intermediates"], sep="/")
        return [flat[f"{unit}/__call__"][0] for unit in network.searched_units]

    rest = [0] * (GENES[kind] - 2)
    first, second = (outputs_of_units(jnp.array([1, gene, *rest])) for gene in (0, 2))
    same = [np.array_equal(a, b) for a, b in zip(first, second)]
    assert same == [True] + [False] * (GENES[kind] - 1)


@pytest.mark.parametrize("path", [(0, 1), (0, 1, 3), (0, -1, 2)])
def test_a_path_that_does_not_fit_is_refused(path):
    with pytest.raises(ValueError, match="accepted are 3 branches of 0 to 2"):
        extract(*supernet("mobilenet"), path)


def test_stems_of_mobile_networks_and_their_strides():
    sizes = {"basq_mobilenet_v2": 7, "basq_mobilenet_v1": 7, "basq_mobilenet_v2_cifar": 4}
    for name, expected in sizes.items():
        network = networks.build(spec(name), QuantSpec(), num_classes=10)
        side = 32 if name.endswith("cifar") else 224
        strides = [row[3] for row in network.rows]
        assert side // (network.stem_stride * int(np.prod(strides))) == expected
