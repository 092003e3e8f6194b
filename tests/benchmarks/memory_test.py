import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import memory
from bnn_jax.ops.categorical import hard_choice


def test_the_plain_formula_is_the_same_function_with_the_same_gradient():
    random, values = np.random.RandomState(0), (-1.0, -0.5, 0.5, 1.0)
    logits = jnp.asarray(random.normal(size=(4, 3, 3, 5, 6)), jnp.float32)
    cotangent = jnp.asarray(random.normal(size=(3, 3, 5, 6)), jnp.float32)
    found = []
    for choose in (hard_choice, memory.plain_choice):
        weights, pullback = jax.vjp(lambda a, f=choose: f(a, values, jnp.float32(0.5)), logits)
        found.append((weights, pullback(cotangent)[0]))
    (ours, our_gradient), (plain, plain_gradient) = found
    # One-hot minus p plus p is exact in the golden files; here within an ulp.
    np.testing.assert_allclose(ours, plain, atol=1.2e-7)
    np.testing.assert_allclose(our_gradient, plain_gradient, atol=1e-6)


def test_ours_needs_no_temporary_with_the_axis_of_the_values():
    # Two tensors of the kernel's size, whatever the number of values; a few bytes for scalars.
    kernel = 9 * 64 * 64 * 4
    for count in (2, 8):
        assert memory.measure(hard_choice, count, 64).temporaries < 2.1 * kernel


@pytest.mark.parametrize(("least", "status"), [("2", 0), ("1000", 1)])
def test_the_last_line_is_the_ratio_and_the_status_tells_whether_it_is_enough(least, status, capsys):
    assert memory.main(["--counts=2,4", "--channels=32", f"--least={least}"]) == status
    *_, row, last = capsys.readouterr().out.splitlines()
    assert last == f"temporaries, plain over ours, for K = 4: {row.split()[-1]}"
    assert row.split()[0] == "4"
