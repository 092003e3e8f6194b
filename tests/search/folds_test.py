import itertools

import numpy as np
import pytest

from bnn_jax.errors import DataError
from bnn_jax.search.folds import make_folds

LABELS = np.random.RandomState(0).randint(0, 7, 230)


@pytest.mark.parametrize("kind", ["contiguous", "stratified"])
def test_inside_and_outside_of_a_fold_are_all_images(kind):
    folds = make_folds(LABELS, kind=kind, count=4, batch_size=10)
    seen = []
    for index in range(4):
        inside, outside = folds.images(index), folds.others(index)
        assert sorted([*inside, *outside]) == list(range(230))
        seen += list(inside)
    assert len(seen) == len(set(seen))


def test_contiguous_folds_hold_consecutive_classes_and_leave_the_last_batches_over():
    folds = make_folds(LABELS, kind="contiguous", count=4, batch_size=10)
    classes = [LABELS[folds.images(index)] for index in range(4)]
    # 23 batches: 5 for each fold, 3 over.
    assert [len(each) for each in classes] == [50, 50, 50, 50]
    assert all(max(low) <= min(high) for low, high in itertools.pairwise(classes))
    assert np.sum(folds.fold < 0) == 30


def test_stratified_folds_hold_every_class_alike():
    folds = make_folds(LABELS, kind="stratified", count=4, batch_size=10)
    counts = np.array([np.bincount(LABELS[folds.images(index)], minlength=7) for index in range(4)])
    assert np.all(np.ptp(counts, axis=0) <= 1)
    assert counts.sum() == 230


@pytest.mark.parametrize(("kind", "count", "batch_size"), [("contiguous", 4, 100), ("stratified", 231, 1)])
def test_empty_folds_are_refused(kind, count, batch_size):
    with pytest.raises(DataError, match=f"{count} folds of 230 images"):
        make_folds(LABELS, kind=kind, count=count, batch_size=batch_size)


def test_a_single_fold_and_an_unknown_kind_are_refused():
    with pytest.raises(DataError, match="1 folds of 230"):
        make_folds(LABELS, kind="stratified", count=1, batch_size=1)
    with pytest.raises(DataError, match="kind of folds 'random': accepted are contiguous, stratified"):
        make_folds(LABELS, kind="random", count=2, batch_size=1)
