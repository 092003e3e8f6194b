import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.ops import codebook

TABLE = np.asarray(codebook.all_patterns())


def reversed_bits(number: int) -> int:
    return int(f"{number:09b}"[::-1], 2)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).normal(size=shape), jnp.float32)


def patterns(count: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(TABLE[np.random.RandomState(seed).permutation(512)[:count]])


# ---- patterns and codes


def test_the_table_has_all_512_patterns_from_all_minus_1_to_all_plus_1():
    assert TABLE.shape == (512, 9) and TABLE.dtype == np.float32
    assert len(np.unique(TABLE, axis=0)) == 512 and set(TABLE.ravel()) == {-1.0, 1.0}
    assert (TABLE[0] == -1).all() and (TABLE[511] == 1).all()
    # Position 0 is the most significant bit of the row's number.
    np.testing.assert_array_equal(TABLE[256], [1] + 8 * [-1])


def test_the_code_of_a_row_of_the_table_is_its_number_with_the_bits_reversed():
    found = np.asarray(codebook.codes(jnp.asarray(TABLE)))
    np.testing.assert_array_equal(found, [reversed_bits(m) for m in range(512)])
    assert sorted(found) == list(range(512)) and found[0] == 0 and found[511] == 511


def test_codes_look_at_signs_only_and_take_0_for_minus_1():
    row = jnp.array([0.3, -2.0, 0.0, -0.0, 1e-30, 5.0, -1e-30, 1.0, 0.0])
    assert int(codebook.codes(row)) == 2**0 + 2**4 + 2**5 + 2**7
    assert codebook.codes(normal(4, 5, 9)).shape == (4, 5)


@pytest.mark.parametrize("count", [2, 16, 32, 512])
def test_random_patterns_are_different(count):
    rows = np.asarray(codebook.random_patterns(jax.random.key(1), count))
    assert rows.shape == (count,) and len(set(rows)) == count and rows.min() >= 0 and rows.max() < 512
    assert (rows != np.asarray(codebook.random_patterns(jax.random.key(2), count))).any()


def test_every_pattern_is_equally_likely_to_be_drawn():
    draws = jax.vmap(lambda key: codebook.random_patterns(key, 16))(jax.random.split(jax.random.key(0), 3200))
    counts = np.bincount(np.asarray(draws).ravel(), minlength=512)
    # Binomial with mean 100 and standard deviation 10: beyond 6 of them once in 10**6 runs, and the seed is fixed.
    assert np.abs(counts - 100).max() < 60


def test_rows_of_a_kernel_are_output_major_and_each_runs_row_by_row():
    kernel = normal(3, 3, 5, 4)
    rows = codebook.to_rows(kernel)
    np.testing.assert_array_equal(rows[2 * 5 + 3], np.asarray(kernel)[:, :, 3, 2].ravel())
    np.testing.assert_array_equal(codebook.from_rows(rows, kernel.shape), kernel)


# ---- memory


@pytest.mark.parametrize(
    ("value", "before", "after"),
    [
        (0.9e-3, -1, -1),
        (-0.9e-3, 1, 1),
        (-0.0005, 1, 1),
        # The border belongs to the outside.
        (-0.001, 1, -1),
        (0.001, -1, 1),
        (0.01, -1, 1),
        (-3.0, 1, -1),
        (0.0, -1, -1),
    ],
)
def test_the_memory_changes_only_outside_the_dead_zone(value, before, after):
    found = codebook.remember(jnp.full((2, 9), value), jnp.full((2, 9), float(before)), 1e-3)
    np.testing.assert_array_equal(found, np.full((2, 9), float(after)))


def test_without_a_dead_zone_only_an_exact_0_keeps_its_sign():
    found = codebook.remember(jnp.array([[1e-9, -1e-9, 0.0]]), jnp.array([[-1.0, 1.0, -1.0]]), 0.0)
    np.testing.assert_array_equal(found, [[1.0, -1.0, -1.0]])


def test_the_memory_has_no_gradient():
    gradient = jax.grad(lambda p: codebook.remember(p, jnp.ones((2, 9)), 1e-3).sum())(normal(2, 9))
    np.testing.assert_array_equal(gradient, 0)


# ---- assignment


@pytest.mark.parametrize("count", [2, 16, 64, 512])
def test_the_nearest_pattern_is_that_of_least_distance(count):
    rows, table = normal(200, 9), patterns(count)
    distances = np.linalg.norm(np.asarray(rows, np.float64)[:, None] - np.asarray(table, np.float64)[None], axis=-1)
    np.testing.assert_array_equal(codebook.nearest(rows, table), distances.argmin(axis=1))


def test_the_first_of_equally_near_patterns_is_taken():
    table = jnp.asarray(TABLE[[7, 5, 7, 5, 0]])
    np.testing.assert_array_equal(codebook.nearest(jnp.asarray(TABLE[[5, 7]]), table), [1, 0])
    # A kernel of zeros is as near to any.
    np.testing.assert_array_equal(codebook.nearest(jnp.zeros((1, 9)), table), [0])


def test_with_all_patterns_a_kernel_becomes_its_sign():
    rows = normal(500, 9)
    table = patterns(512)
    np.testing.assert_array_equal(table[codebook.nearest(rows, table)], np.sign(rows))


def test_assignment_ignores_the_size_of_a_kernel_and_the_order_of_the_patterns_and_is_idempotent():
    rows, table = normal(300, 9), patterns(16)
    assigned = table[codebook.nearest(rows, table)]
    for scale in (2.0**-10, 4.0):
        np.testing.assert_array_equal(codebook.nearest(scale * rows, table), codebook.nearest(rows, table))
    shuffled = table[np.random.RandomState(3).permutation(16)]
    np.testing.assert_array_equal(shuffled[codebook.nearest(rows, shuffled)], assigned)
    np.testing.assert_array_equal(table[codebook.nearest(assigned, table)], assigned)


def test_no_array_of_rows_times_patterns_times_positions_is_made():
    # A norm of differences would need 302 MB for 512 x 512 kernels and 32 patterns.
    rows, table = jax.ShapeDtypeStruct((1000, 9), jnp.float32), jax.ShapeDtypeStruct((32, 9), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.grad(lambda r, p: codebook.assign(r, p, p, jnp.ones(())).sum(), argnums=(0, 1)))
    sizes = [variable.aval.size for variable in jax.tree.leaves(_all_outputs(jaxpr(rows, table).jaxpr))]
    assert max(sizes) == 1000 * 32


def _all_outputs(jaxpr) -> list:
    """Results of every operation of a program, inner ones too."""
    inner = [p for equation in jaxpr.eqns for p in jax.tree.leaves(equation.params, is_leaf=lambda x: x is not None)]
    subs = [getattr(p, "jaxpr", p) for p in inner if hasattr(getattr(p, "jaxpr", p), "eqns")]
    return [v for equation in jaxpr.eqns for v in equation.outvars] + [v for sub in subs for v in _all_outputs(sub)]


# ---- gradient of the assignment


def gradients(rows, p, cotangent, refine):
    pulled = jax.vjp(lambda rows, p: codebook.assign(rows, p, jnp.sign(p), refine), rows, p)[1](cotangent)
    return tuple(np.asarray(g) for g in pulled)


def test_kernels_get_the_gradient_of_their_pattern_up_to_size_1():
    rows = normal(40, 9).at[0, :4].set(jnp.array([1.0, -1.0, 1.0001, -1.5]))
    cotangent = normal(40, 9, seed=1)
    d_rows, _ = gradients(rows, normal(16, 9, seed=2), cotangent, 0.0)
    np.testing.assert_array_equal(d_rows, np.where(np.abs(rows) <= 1, cotangent, 0))
    assert (d_rows[0, :2] != 0).all() and (d_rows[0, 2:4] == 0).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pattern_gets_the_sum_of_the_gradients_of_its_kernels(compiled):
    rows, p, cotangent = 3 * normal(40, 9), 0.1 * normal(16, 9, seed=2), normal(40, 9, seed=1)

    def product(p: jax.Array) -> jax.Array:
        return jnp.sum(codebook.assign(rows, p, jnp.sign(p), jnp.ones(())) * cotangent)

    d_p = np.asarray((jax.jit(jax.grad(product)) if compiled else jax.grad(product))(p))
    indices = np.asarray(codebook.nearest(rows, jnp.sign(p)))
    expected = np.zeros((16, 9))
    np.add.at(expected, indices, np.asarray(cotangent, np.float64))
    # Sums of up to 40 float32 numbers of size 1.
    np.testing.assert_allclose(d_p, expected, atol=1e-5)
    assert set(range(16)) - set(indices), "the example should have a pattern without kernels"
    np.testing.assert_allclose(d_p.sum(axis=0), np.asarray(cotangent).sum(axis=0), atol=1e-5)


def test_without_refinement_patterns_get_no_gradient():
    _, d_p = gradients(normal(40, 9), normal(16, 9, seed=2), normal(40, 9, seed=1), 0.0)
    np.testing.assert_array_equal(d_p, 0)


def test_values_are_exactly_minus_1_and_plus_1():
    value = codebook.assign(normal(100, 9), normal(16, 9, seed=2), patterns(16), jnp.ones(()))
    assert set(np.asarray(value).ravel()) == {-1.0, 1.0}


# ---- duplicates


def with_duplicates() -> tuple[jax.Array, list[bool]]:
    """Rows 0 to 7; 2 and 5 repeat row 0 with other sizes, 6 repeats row 1 with a 0 for a -1."""
    p = np.array(patterns(8, seed=4)) * np.linspace(0.2, 5, 72).reshape(8, 9)
    p[2], p[5] = 0.5 * p[0], 2 * p[0]
    p[6] = np.where(p[1] < 0, 0.0, p[1])
    return jnp.asarray(p, jnp.float32), [False, False, True, False, False, True, True, False]


def candidates(count: int, seed: int = 5) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).permutation(512)[:count], jnp.int32)


def test_a_duplicate_is_a_row_whose_signs_an_earlier_one_has():
    p, expected = with_duplicates()
    np.testing.assert_array_equal(codebook.duplicates(p), expected)
    assert not codebook.duplicates(patterns(512)).any()


def test_new_patterns_take_the_places_of_the_duplicates_in_the_order_of_the_candidates():
    p, twice = with_duplicates()
    # The first and third candidate are in the codebook already.
    rows = np.array(candidates(8))
    numbers = {int(c): m for m, c in enumerate(np.asarray(codebook.codes(jnp.asarray(TABLE))))}
    rows[0], rows[2] = (numbers[int(codebook.codes(p[i]))] for i in (3, 0))
    replaced, new = codebook.replace_duplicates(p, jnp.asarray(rows))
    np.testing.assert_array_equal(new, twice)
    np.testing.assert_array_equal(replaced[~np.array(twice)], p[~np.array(twice)])
    np.testing.assert_array_equal(replaced[np.array(twice)], TABLE[rows[[1, 3, 4]]])


def test_in_the_order_of_the_release_kept_rows_move_up_and_new_ones_follow():
    p, twice = with_duplicates()
    rows = candidates(8)
    refilled = codebook.refill_as_released(p, rows)
    np.testing.assert_array_equal(refilled[:5], p[~np.array(twice)])
    np.testing.assert_array_equal(refilled[5:], codebook.replace_duplicates(p, rows)[0][np.array(twice)])


@pytest.mark.parametrize("refill", [codebook.refill_as_released, lambda p, c: codebook.replace_duplicates(p, c)[0]])
@pytest.mark.parametrize("count", [2, 16, 512])
def test_n_candidates_always_suffice(refill, count):
    worst = jnp.broadcast_to(patterns(1), (count, 9))
    for seed in range(5):
        refilled = jax.jit(refill)(worst, candidates(count, seed))
        assert len(np.unique(codebook.codes(refilled))) == count


def test_a_codebook_without_duplicates_stays_as_it_is():
    p = 0.5 * patterns(32)
    np.testing.assert_array_equal(codebook.refill_as_released(p, candidates(32)), p)
    np.testing.assert_array_equal(codebook.replace_duplicates(p, candidates(32))[0], p)
