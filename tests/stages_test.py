import dataclasses
import json

import pytest

from bnn_jax.stages import (
    DataSpec,
    Inherit,
    OptimSpec,
    ParameterGroup,
    QuantSpec,
    Reference,
    Spec,
    Stage,
    Teacher,
    differing_keys,
    fingerprint,
    parse_choice,
    parse_reference,
    spec,
    to_json,
)

OPTIM = OptimSpec(spec("sgd", momentum=0.9), spec("constant", value=0.1), epochs=2, batch_size=8)


def stage(name: str, **options) -> Stage:
    return Stage(
        name, spec("resnet8"), QuantSpec(), DataSpec("digits"), (spec("cross_entropy"),), **{"optim": OPTIM, **options}
    )


FIRST = stage("w32a32")
SECOND = stage("w1a1", inherit=Inherit("stage:w32a32@best"), teacher=Teacher("stage:w32a32"))


def test_equal_choices_compare_and_hash_equal_whatever_the_order_of_their_options():
    one, other = spec("pruned", amount=0.1, inner=spec("dorefa")), spec("pruned", inner=spec("dorefa"), amount=0.1)
    assert one == other and hash(one) == hash(other)
    assert one.kwargs == {"amount": 0.1, "inner": Spec("dorefa")}


def test_a_stage_can_be_written_as_json():
    value = json.loads(json.dumps(to_json(dataclasses.replace(FIRST, knobs=(("t", spec("constant", value=1.0)),)))))
    assert value["optim"]["optimizer"] == {"name": "sgd", "momentum": 0.9}
    assert value["knobs"] == [["t", {"name": "constant", "value": 1.0}]]
    assert value["quant"]["weight"] == {"name": "identity"}
    assert value["teacher"] is None


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("stage:w4a4", Reference("stage", "w4a4", "last")),
        ("stage:w4a4@last", Reference("stage", "w4a4", "last")),
        ("stage:w4a4@best", Reference("stage", "w4a4", "best")),
        ("file:/data/net:1@best.pth", Reference("file", "/data/net:1@best.pth", "last")),
    ],
)
def test_references(text, reference):
    assert parse_reference(text) == reference


@pytest.mark.parametrize("text", ["", "w4a4", "stage:", "stage:@best", "stage:w4a4@first", "file:", "net:w4a4"])
def test_other_references_are_refused_with_the_accepted_forms(text):
    with pytest.raises(ValueError, match="accepted are 'stage:NAME', 'stage:NAME@best' and 'file:PATH'"):
        parse_reference(text)


def test_equal_stages_have_equal_fingerprints():
    chain = (FIRST, SECOND)
    copy = (stage("w32a32"), dataclasses.replace(SECOND, seed=0))
    assert [fingerprint(s, chain) for s in chain] == [fingerprint(s, copy) for s in copy]
    assert fingerprint(FIRST, chain) != fingerprint(SECOND, chain)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"compute_dtype": "bfloat16"},
        {"network": spec("resnet8", block="checkpoint")},
        {"optim": dataclasses.replace(OPTIM, epochs=3)},
        {"data": DataSpec("digits", num_train=5)},
        {"projections": (spec("refill_codebooks"),)},
        {"teacher": Teacher("file:net.pth")},
        {"inherit": Inherit("file:net.pth")},
        {"optim": dataclasses.replace(OPTIM, groups=(ParameterGroup(".*", gradient_knob="refine"),))},
        {"optim": dataclasses.replace(OPTIM, groups=(ParameterGroup(".*", without_gradient="skip"),))},
    ],
)
def test_a_change_anywhere_up_the_chain_changes_the_fingerprint(change):
    changed = dataclasses.replace(FIRST, **change)
    assert fingerprint(changed, (changed, SECOND)) != fingerprint(FIRST, (FIRST, SECOND))
    assert fingerprint(SECOND, (changed, SECOND)) != fingerprint(SECOND, (FIRST, SECOND))


def test_every_field_of_a_stage_is_written_out_whether_it_has_its_default_or_not():
    group = ParameterGroup(".*", without_gradient="skip")
    used = dataclasses.replace(
        FIRST, projections=(spec("refill", limit=3.0),), optim=dataclasses.replace(OPTIM, groups=(group,))
    )
    value = to_json(used)
    assert set(value) == {field.name for field in dataclasses.fields(used) if "added" not in field.metadata}
    assert value["projections"] == [{"name": "refill", "limit": 3.0}]
    assert value["inherit"] is None
    (written,) = value["optim"]["groups"]
    assert (written["gradient_knob"], written["without_gradient"]) == (None, "skip")


def test_a_stage_that_refers_to_nothing_ignores_the_rest_of_the_chain():
    assert fingerprint(FIRST, (FIRST, SECOND)) == fingerprint(FIRST, (FIRST, stage("w8a8")))


def test_nothing_differs_between_equal_values():
    assert differing_keys({"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}) == []


@pytest.mark.parametrize(
    ("old", "new", "rows"),
    [
        ({"a": 1}, {"a": 2}, ["a: 1 -> 2"]),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ["a.c: 2 -> 3"]),
        ({"a": 1}, {}, ["a: 1 -> absent"]),
        ({}, {"a": None}, ["a: absent -> null"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a[1]: 2 -> 3"]),
        ({"a": [1, 2]}, {"a": [1]}, ["a: [1, 2] -> [1]"]),
        ({"a": {"b": 1}}, {"a": 5}, ['a: {"b": 1} -> 5']),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, ["a: 1 -> 2", "b: 1 -> 2"]),
    ],
)
def test_differing_keys_are_named_with_both_values(old, new, rows):
    assert differing_keys(old, new) == rows


@pytest.mark.parametrize("text", ["uniform", "search:a", "search:#1", "stage:a#1", "search:a#x"])
def test_another_form_of_a_winner_is_refused(text):
    with pytest.raises(ValueError, match="accepted are 'uniform' and 'search:NAME#FOLD'"):
        parse_choice(text)


def test_a_winner_is_named_by_search_and_fold():
    assert parse_choice("search:evolution#12") == ("evolution", 12)


def test_a_field_that_came_later_is_in_the_record_where_it_says_something():
    assert "mixup" not in to_json(DataSpec("digits"))
    assert to_json(DataSpec("digits", mixup=0.2))["mixup"] == 0.2
