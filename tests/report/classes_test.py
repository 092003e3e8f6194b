import csv

import matplotlib.figure
import numpy as np
import pytest
from sklearn import metrics

from bnn_jax.report import classes

NAMES = ("ant", "bee", "cow", "dog")


@pytest.fixture
def answers():
    """Logits and labels of 60 images; no image is a dog, and none is taken for one."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(60, 4)).astype(np.float32)
    logits[:, 3] = -10
    return logits, random.integers(0, 3, 60).astype(np.int32)


def test_the_numbers_are_those_of_scikit_learn(answers):
    logits, labels = answers
    results, predicted = classes.class_results(logits, labels, NAMES), logits.argmax(axis=1)
    np.testing.assert_array_equal(results.confusion, metrics.confusion_matrix(labels, predicted, labels=range(4)))
    rows = results.rows
    assert [row["class"] for row in rows] == list(NAMES)
    for name, expected in (
        ("top1", metrics.recall_score(labels, predicted, average=None)),
        ("precision", metrics.precision_score(labels, predicted, average=None)),
    ):
        np.testing.assert_allclose([row[name] for row in rows[:3]], 100 * expected[:3], rtol=1e-12)
    assert rows[3] == {"class": "dog", "images": 0, "top1": None, "precision": None, "mistaken_for": None, "times": 0}


def test_a_class_is_mostly_mistaken_for_the_largest_number_of_its_row_beside_the_diagonal():
    rows = classes.ClassResults(NAMES[:3], np.array([[9, 1, 3], [0, 4, 0], [2, 1, 0]])).rows
    assert [(row["mistaken_for"], row["times"]) for row in rows] == [("cow", 3), (None, 0), ("ant", 2)]


def test_the_surest_mistakes_come_first_and_are_25_at_most(answers):
    logits, labels = answers
    found = classes.surest_mistakes(logits, labels)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    wrong = [n for n in np.argsort(-softmax.max(axis=1)) if logits[n].argmax() != labels[n]]
    assert found.images.tolist() == wrong[:25] and len(wrong) > 25
    np.testing.assert_array_equal(found.labels, labels[found.images])
    np.testing.assert_array_equal(found.predicted, logits.argmax(axis=1)[found.images])
    np.testing.assert_allclose(found.probabilities, softmax.max(axis=1)[found.images], rtol=1e-5)


def test_the_files_of_numbers_can_be_read_again(answers, tmp_path):
    results = classes.class_results(*answers, NAMES)
    paths = classes.write_numbers(results, tmp_path)
    rows, matrix = (list(csv.reader(path.read_text().splitlines())) for path in paths)
    assert rows[0] == ["class", "images", "top1", "precision", "mistaken_for", "times"] and len(rows) == 5
    assert matrix[0] == ["true class", *NAMES]
    np.testing.assert_array_equal(np.array([row[1:] for row in matrix[1:]], int), results.confusion)


@pytest.mark.parametrize("count", [2, 37])
def test_of_many_classes_the_table_shows_the_worst(count):
    confusion = np.diag(np.arange(count)) + np.eye(count, k=1, dtype=int)
    rows = classes.ClassResults([f"class {k}" for k in range(count)], confusion).rows
    table = classes.classes_table(rows, stage="w1a1")
    assert table.row_count == min(count, 20)
    assert ("the worst 20 of 37" in str(table.title)) == (count == 37)
    assert next(iter(table.columns[0].cells)) == "class 0"


@pytest.fixture
def texts(monkeypatch):
    """The texts of the figures that are saved."""
    found, save = [], matplotlib.figure.Figure.savefig

    def saved(figure, path, **options):
        found.extend(text.get_text() for text in figure.findobj(matplotlib.text.Text))
        save(figure, path, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", saved)
    return found


def test_the_confusion_matrix_names_classes_and_numbers(texts, tmp_path):
    results = classes.ClassResults(NAMES[:2], np.array([[1234, 5], [0, 0]]))
    classes.plot_confusion(results, tmp_path / "a.png", title="the title")
    assert {"ant", "bee", "1,234", "5", "the title"} <= set(texts) and (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mistake_is_shown_with_both_names(texts, tmp_path, channels):
    mistakes = classes.Mistakes(*(np.array([value]) for value in (7, 0, 1)), np.array([0.987]))
    images = np.zeros((1, 4, 4, channels), np.uint8)
    classes.plot_mistakes(mistakes, images, ("a rather long name", "bee"), tmp_path / "a.png", title="mistakes")
    assert "a rather long...\ntaken for bee, 99%" in texts


def test_a_network_without_mistakes_gets_an_empty_picture(texts, tmp_path):
    none = classes.surest_mistakes(np.eye(3, dtype=np.float32), np.arange(3))
    classes.plot_mistakes(none, np.zeros((0, 4, 4, 3), np.uint8), NAMES, tmp_path / "a.png", title="mistakes")
    assert "mistakes: there is none" in texts
