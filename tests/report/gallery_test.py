"""Quantizers can be drawn without being told how; the notebook quantizer_gallery draws all of them."""

import numpy as np

from bnn_jax.report import gallery
from bnn_jax.report.plots import new_figure


def test_the_gradient_is_that_of_the_value_itself():
    forward, gradient = new_figure(width=4, height=2).subplots(1, 2)
    gallery.draw("dorefa", forward, gradient)
    [levels], [gradients] = forward.get_lines(), gradient.get_lines()
    assert len(np.unique(levels.get_ydata())) == 4
    np.testing.assert_allclose(gradients.get_ydata(), 1 - np.tanh(gradients.get_xdata()) ** 2, atol=1e-6)


def test_of_logits_one_candidate_is_drawn():
    logits, chosen, gradients = gallery.weight_response("categorical")
    # Ties go to the first candidate, -1; the last one is 1.
    assert set(chosen[logits > 0]) == {1} and set(chosen[logits < 0]) == {-1}
    assert gradients.min() > 0


def test_the_range_of_activations_reaches_beyond_the_highest_level():
    x, q, gradients = gallery.activation_response("branch_clip")
    assert q[-1] == q.max() < x[-1] and np.all(np.diff(x) > 0)
    assert set(gradients) == {0, 1}
