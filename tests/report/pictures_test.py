"""Which pictures the objectives offer, and what they are drawn from."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import PIL.Image
import pytest

from bnn_jax import objectives, quantizers
from bnn_jax.layers import QuantConv
from bnn_jax.objectives import OBJECTIVES
from bnn_jax.ops import codebook as ops
from bnn_jax.report import pictures, plots
from bnn_jax.stages import spec


def build(*names: Any) -> tuple[objectives.Objective, ...]:
    return tuple(objectives.build(name if not isinstance(name, str) else spec(name)) for name in names)


def test_only_known_pictures_are_offered():
    for objective in build(*OBJECTIVES):
        assert objective.pictures <= set(pictures.PICTURES)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cross_entropy",), ()),
        (("cross_entropy", "distillation", "feature_swap"), ()),
        (("cross_entropy", "cluster"), ("features",)),
        (("cross_entropy", "label_bank"), ("label_bank", "features")),
        (("cluster", "label_bank"), ("label_bank", "features")),
        # A bank that is cleared at the end of every epoch has nothing to show.
        ((spec("label_bank", reset_each_epoch=True),), ("features",)),
    ],
)
def test_a_stage_offers_what_its_terms_offer(names, expected):
    assert pictures.offered(build(*names)) == expected


@pytest.mark.parametrize("choice", [spec("identity"), spec("irnet"), spec("codebook", tau=4)])
def test_quantizers_offer_known_pictures_through_pruning_too(choice):
    def offered(weight):
        return quantizers.build_weight(weight)(parent=None).pictures

    assert offered(choice) <= set(pictures.PICTURES)
    assert offered(spec("pruned", inner=choice)) == offered(choice)
    assert bool(offered(choice)) == (choice.name == "codebook")


@dataclasses.dataclass
class Drawn:
    """What the plots were called with."""

    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@pytest.fixture
def drawn(monkeypatch) -> Drawn:
    found = Drawn()

    def remember(*arguments: Any, **options: Any) -> None:
        found.arguments, found.options = arguments, options

    monkeypatch.setattr(plots, "plot_label_bank", remember)
    monkeypatch.setattr(plots, "plot_features", remember)
    return found


def stage(**bank: Any) -> pictures.FinishedStage:
    state = {"bank": np.arange(4.0).reshape(2, 2), "known": np.array([True, False])}
    return pictures.FinishedStage(
        name="w1a1",
        objectives=build("cross_entropy", spec("label_bank", **bank)),
        objective_state={"label_bank": state},
        features=lambda: (np.ones((3, 2)), np.array([0, 1, 0])),
        class_names=("cat", "dog"),
        variables=lambda: ({}, {}),
    )


def test_rows_of_classes_never_right_are_blank(drawn):
    pictures.PICTURES["label_bank"](stage(), Path("bank.png"))
    bank, names, path = drawn.arguments
    np.testing.assert_array_equal(bank, [[0.0, 1.0], [np.nan, np.nan]])
    assert (names, path) == (("cat", "dog"), Path("bank.png"))
    assert drawn.options == {"title": "label bank of stage w1a1 after the last epoch", "quantity": "mean logit"}


def test_a_bank_of_log_probabilities_is_named_so(drawn):
    pictures.PICTURES["label_bank"](stage(log_softmax=True), Path("bank.png"))
    assert drawn.options["quantity"] == "mean log-probability"


def test_features_are_those_of_the_stage(drawn):
    pictures.PICTURES["features"](stage(), Path("features.png"))
    features, labels, names, path = drawn.arguments
    np.testing.assert_array_equal(features, np.ones((3, 2)))
    np.testing.assert_array_equal(labels, [0, 1, 0])
    assert (names, path) == (("cat", "dog"), Path("features.png"))


# ---- codebooks


@pytest.fixture(params=["codebook", "pruned"])
def variables(request) -> dict[str, Any]:
    choice = spec("codebook", tau=3)
    weight = spec("pruned", inner=choice) if request.param == "pruned" else choice
    conv = QuantConv(4, weight_quantizer=quantizers.build_weight(weight))
    inner = conv.init(jax.random.key(0), jnp.ones((1, 4, 4, 2)), quantizers.QuantContext())
    return {collection: {"conv1": leaves} for collection, leaves in inner.items()}


def test_the_counts_are_those_of_the_kernels(variables):
    (book,) = pictures.codebooks_of(variables, variables).values()
    rows = ops.to_rows(variables["params"]["conv1"]["kernel"])
    nearest = np.asarray(ops.nearest(rows, jnp.asarray(book.patterns, jnp.float32)))
    assert book.counts.tolist() == np.bincount(nearest, minlength=8).tolist()
    assert sorted(book.free_counts) == sorted(np.unique(np.asarray(ops.codes(rows)), return_counts=True)[1])
    assert not book.flipped.any()


def test_flips_are_counted_from_the_start_of_the_stage(variables):
    assert pictures.codebooks_of(jax.tree.map(jnp.negative, variables), variables)["conv1"].flipped.all()


def test_a_network_without_codebooks_has_none_and_no_picture(tmp_path: Path):
    variables = {"params": {"conv1": {"kernel": jnp.ones((3, 3, 1, 1))}}}
    assert pictures.codebooks_of({}, variables) == {}
    with pytest.raises(ValueError, match="no layer has a codebook"):
        pictures.draw_pattern_use(stage_with({}, variables), tmp_path / "use.png")


def stage_with(initial: dict[str, Any], last: dict[str, Any]) -> pictures.FinishedStage:
    return dataclasses.replace(stage(), variables=lambda: (initial, last))


@pytest.fixture
def books(monkeypatch) -> dict[str, pictures.Codebook]:
    """What the pictures show: two layers with a codebook of four patterns, of which the first layer's has moved."""
    initial = np.array([[1] * 9, [-1] * 9, [1, -1, 1] * 3, [-1, 1, -1] * 3])
    values = initial * 1.5
    values[0, 4] = -0.5
    moved = pictures.Codebook(np.where(values > 0, 1, -1), np.array([1, 7, 0, 2]), np.array([5, 3, 2]), values, initial)
    found = {"conv1": moved, "conv2": dataclasses.replace(moved, patterns=initial)}
    monkeypatch.setattr(pictures, "codebooks_of", lambda *_: found)
    return found


@pytest.fixture
def figures(monkeypatch) -> list[Any]:
    made, make = [], plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda **size: made.append(make(**size)) or made[-1])
    return made


def test_the_use_is_drawn_from_the_most_used_pattern_on(books, figures, tmp_path: Path):
    pictures.draw_pattern_use(stage(), tmp_path / "use.png")
    curve, tiles = figures[0].axes[:2]
    free, codebook = (line.get_ydata().tolist() for line in curve.get_lines())
    assert free == [50.0, 30.0, 20.0] and codebook == [70.0, 20.0, 10.0]
    assert tiles.get_title(loc="left") == "the 4 most used of 4: 100% of the kernels; 3 in use"
    # The second pattern (all -1) is used most, so its tile comes first.
    assert (tiles.images[0].get_array()[:3, :3] == 0).all()
    assert figures[0].get_suptitle().startswith("use of the codebooks of stage w1a1 after the last epoch\n")
    with PIL.Image.open(tmp_path / "use.png") as picture:
        assert min(picture.size) > 400


def test_the_motion_counts_the_changed_patterns(books, figures, tmp_path: Path):
    assert np.argwhere(books["conv1"].flipped).tolist() == [[0, 4]]
    pictures.draw_pattern_motion(stage(), tmp_path / "motion.png")
    titles = [axis.get_title(loc="left") for axis in figures[0].axes]
    first, second = "1 of 4 patterns changed, 2.8% of the signs; all of them:", "no pattern changed"
    assert titles == ["conv1", first, "conv2", second]
    assert (tmp_path / "motion.png").stat().st_size > 0


def test_a_tile_shows_a_pattern_row_by_row():
    axis = matplotlib.figure.Figure().subplots()
    pattern = np.array([[1, 1, -1, -1, -1, -1, -1, -1, 1]])
    assert pictures.draw_tiles(axis, pattern, np.zeros((1, 9), bool)) == 1
    assert np.asarray(axis.images[0].get_array())[:3, :3].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
