"""The authors' published run, recomputed from the lists in their README (HanByulKim/BASQ: README.md)."""

import collections

import numpy as np
import pytest

from bnn_jax.search.results import combined, correlation, statistics

# 2-bit MobileNet-v2 on ImageNet, ten folds: percent on the fold's 5,000 images, on the other 45,000, and there again
# after fine-tuning (best epoch).
FOLD = [67.62, 66.20, 64.86, 68.94, 55.18, 58.96, 54.82, 56.46, 53.54, 63.48]
FULL = [59.3022, 59.2933, 59.2622, 58.6778, 59.7333, 59.1578, 60.0111, 60.4533, 60.1089, 59.5333]
TUNED = [63.95, 64.02, 64.28, 63.89, 65.46, 65.10, 65.23, 65.32, 65.40, 64.49]
WINNERS = [
    (5, 3, 2, 2, 1, 1, 6, 6, 1, 2, 4, 6, 0, 3, 3, 5, 5),
    (1, 4, 5, 0, 5, 2, 3, 6, 4, 5, 6, 6, 6, 6, 3, 2, 5),
    (1, 4, 5, 0, 2, 5, 5, 2, 5, 2, 1, 1, 2, 2, 6, 4, 5),
    (1, 4, 5, 1, 1, 2, 4, 6, 2, 1, 2, 6, 4, 2, 6, 4, 5),
    (1, 4, 5, 5, 1, 5, 1, 5, 6, 5, 4, 1, 6, 4, 3, 2, 3),
    (5, 3, 2, 2, 6, 6, 5, 0, 5, 5, 6, 6, 4, 6, 5, 0, 2),
    (1, 4, 5, 1, 6, 2, 6, 4, 2, 1, 1, 6, 4, 0, 6, 4, 5),
    (5, 3, 2, 2, 1, 1, 4, 2, 1, 2, 4, 6, 0, 0, 3, 6, 5),
    (1, 4, 5, 5, 6, 5, 2, 3, 5, 6, 3, 6, 5, 2, 6, 0, 2),
    (5, 3, 2, 2, 4, 1, 4, 2, 1, 4, 6, 6, 0, 4, 3, 2, 5),
]


def test_the_published_accuracy_is_the_mean_over_the_ten_fine_tuned_winners():
    tuned = statistics(TUNED)
    assert round(tuned.mean, 2) == 64.71
    assert round(tuned.deviation, 3) == 0.649
    assert (tuned.lowest, tuned.highest) == (63.89, 65.46)


def test_the_accuracies_before_fine_tuning_have_the_published_statistics():
    fold, full = statistics(FOLD), statistics(FULL)
    assert (round(fold.mean, 3), round(fold.deviation, 3)) == (61.006, 5.845)
    assert (round(full.mean, 3), round(full.deviation, 3)) == (59.553, 0.527)


def test_fine_tuning_gains_about_five_points_for_every_winner():
    gains = np.subtract(TUNED, FULL)
    assert round(float(gains.mean()), 2) == 5.16
    np.testing.assert_allclose(gains, [4.65, 4.73, 5.02, 5.21, 5.73, 5.94, 5.22, 4.87, 5.29, 4.96], atol=0.006)


def test_an_easy_fold_lowers_the_accuracy_reported_for_its_winner():
    assert round(correlation(FOLD, TUNED), 3) == -0.985


def test_on_all_images_together_the_winners_are_within_a_point():
    together = [combined(fold, full, folds=10) for fold, full in zip(FOLD, FULL)]
    assert (round(min(together), 2), round(max(together), 2)) == (59.14, 60.13)


def test_the_accuracies_are_whole_numbers_of_images():
    for values, images in ((FOLD, 5_000), (FULL, 45_000)):
        counts = np.array(values) * images / 100
        # Four decimals of percent of 45,000 images.
        np.testing.assert_allclose(counts, np.round(counts), atol=0.03)


def test_the_winners_agree_in_their_first_layers_only():
    assert collections.Counter(winner[:3] for winner in WINNERS) == {(1, 4, 5): 6, (5, 3, 2): 4}
    counts = collections.Counter(gene for winner in WINNERS for gene in winner)
    assert [counts[choice] for choice in range(7)] == [10, 25, 31, 14, 24, 35, 31]
    assert len({winner[3:11] for winner in WINNERS}) == 10


@pytest.mark.parametrize(("first", "second"), [([1.0], [2.0]), ([1.0, 1.0], [2.0, 3.0])])
def test_there_is_no_correlation_without_variation(first, second):
    assert correlation(first, second) is None


def test_a_single_fold_has_no_deviation():
    assert statistics([3.0]).deviation == 0
