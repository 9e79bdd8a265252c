"""Tests of companion.claims: a claim fails when it should, and its card and record say the same."""

import json

import numpy as np
import pytest
import torch

import companion.claims
from companion.claims import MEDIA_TYPE, ClaimError, claim, evaluate

GOOD = {"paper": "kim2021self", "says": "T is above {T}", "at_least": {"T": 1.5}}


@pytest.fixture
def cards(monkeypatch):
    bundles = []
    monkeypatch.setattr(companion.claims, "put", bundles.append)
    return bundles


@pytest.mark.parametrize("values", [[2.0, 2.1, 2.2], np.array([2.0, 2.1, 2.2]), torch.tensor([2.0, 2.1, 2.2])])
def test_a_claim_that_holds(values):
    result = evaluate("recalibration/t", **GOOD, T=values)
    assert result.held
    assert result.statement == "T is above 1.5"
    assert result.mean["T"] == pytest.approx(2.1, abs=1e-6)
    assert result.sd["T"] == pytest.approx(0.1, abs=1e-6)


def test_the_mean_keeps_two_standard_deviations_from_a_lower_bound():
    # mean 2, sd 1: the bound 0 is exactly two away, anything above is nearer
    assert evaluate("a/b", paper="kim2021self", says="x", at_least={"x": 0}, x=[1, 2, 3]).held
    near = evaluate("a/b", paper="kim2021self", says="x", at_least={"x": 0.01}, x=[1, 2, 3])
    assert not near.held
    assert "within 2 standard deviations" in near.problems[0]


def test_the_mean_keeps_two_standard_deviations_from_an_upper_bound():
    assert evaluate("a/b", paper="kim2021self", says="x", at_most={"x": 4}, x=[1, 2, 3]).held
    assert not evaluate("a/b", paper="kim2021self", says="x", at_most={"x": 3.99}, x=[1, 2, 3]).held
    wrong = evaluate("a/b", paper="kim2021self", says="x", at_most={"x": 1}, x=[1, 2, 3])
    assert "wrong side" in wrong.problems[0]


def test_bounds_on_both_sides():
    words = "between {at_least[x]} and {at_most[x]}"
    result = evaluate("a/b", paper="kim2021self", says=words, at_least={"x": 0.5}, at_most={"x": 2}, x=[1, 1.1, 1.2])
    assert result.held
    assert result.statement == "between 0.5 and 2"
    with pytest.raises(ValueError, match="either side"):
        evaluate("a/b", paper="kim2021self", says="{x}", at_least={"x": 0.5}, at_most={"x": 2}, x=[1, 1.1, 1.2])
    with pytest.raises(ValueError, match="at_least < at_most"):
        evaluate("a/b", paper="kim2021self", says="x", at_least={"x": 2}, at_most={"x": 1}, x=[1, 1.1, 1.2])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"T": [2.0, 2.1]}, ValueError, "at least 3 seeds"),
        ({"T": 2.0}, TypeError, "one number per seed"),
        ({"T": "222"}, TypeError, "one number per seed"),
        ({"T": [2.0, float("nan"), 2.0]}, ValueError, "seed number 1"),
        ({"T": [2.0, float("inf"), 2.0]}, ValueError, "finite"),
        ({"T": [2.0, "3", 2.0]}, TypeError, "numbers"),
        ({"T": [[2.0, 1], [3.0, 1], [1.0, 2]]}, TypeError, "numbers"),
        ({"T": [torch.ones(2)] * 3}, TypeError, "one number per seed"),
        ({"T": [2.0, 2.1, 2.2], "other": [1.0, 2.0, 3.0, 4.0]}, ValueError, "same seeds"),
        ({}, ValueError, "missing: T"),
        ({"T": [2.0, 2.1, 2.2], "says": "T is above {t}"}, ValueError, "not a bound"),
        ({"T": [2.0, 2.1, 2.2], "says": "T is above {0}"}, ValueError, "not a bound"),
        ({"T": [2.0, 2.1, 2.2], "says": " "}, ValueError, "sentence"),
        ({"T": [2.0, 2.1, 2.2], "at_least": {}}, ValueError, "cannot fail"),
        ({"T": [2.0, 2.1, 2.2], "at_least": {"T": float("-inf")}}, ValueError, "cannot fail"),
        ({"T": [2.0, 2.1, 2.2], "at_least": {"T": "1"}}, TypeError, "a number"),
        ({"T": [2.0, 2.1, 2.2], "paper": "kim2021sel"}, ValueError, "near: kim2021self"),
    ],
)
def test_claims_that_are_not_well_posed(change, error, match):
    with pytest.raises(error, match=match):
        evaluate("recalibration/t", **{**GOOD, **change})


@pytest.mark.parametrize("key", ["t", "recalibration/", "Recalibration/t", "recalibration/t t", "a/b/c", None])
def test_keys_name_chapter_and_slug(key):
    with pytest.raises(ValueError, match="chapter/slug"):
        evaluate(key, **GOOD, T=[2.0, 2.1, 2.2])


def test_the_card_is_shown_before_a_broken_claim_raises(cards):
    with pytest.raises(ClaimError, match="recalibration/t: T is 1\\.10"):
        claim("recalibration/t", **GOOD, T=[1.0, 1.1, 1.2])
    assert "Broken" in cards[0]["text/html"]
    assert cards[0][MEDIA_TYPE]["held"] is False


def test_card_and_record(cards, monkeypatch):
    monkeypatch.setenv("COMPANION_SEED", "7")
    returned = claim("recalibration/t", **GOOD, T=[2.0, 2.1, 2.2000001], accuracy=[0.91, 0.92, 0.93])
    assert returned is None
    bundle = cards[0]
    assert set(bundle) == {"text/plain", "text/html", MEDIA_TYPE}
    record = json.loads(json.dumps(bundle[MEDIA_TYPE], allow_nan=False))
    assert record["base_seed"] == 7
    assert record["seeds"] == 3
    assert record["bounds"] == {"at_least": {"T": 1.5}, "at_most": {}}
    assert record["values"]["T"] == [2.0, 2.1, 2.2]
    assert record["mean"]["accuracy"] == pytest.approx(0.92)
    assert "2.10 ± 0.10" in bundle["text/html"]
    assert "T is above 1.5" in bundle["text/html"]
    assert "Kim et al., 2021" in bundle["text/html"]
    assert "3 seeds" in bundle["text/plain"]


def test_the_card_links_the_paper_and_escapes_the_sentence():
    result = evaluate("a/b", paper="chidambaram2024limitations", says="x > {x} & y", at_least={"x": 1}, x=[2, 2, 2])
    card = result._repr_mimebundle_()["text/html"]
    assert '<a href="https://arxiv.org/abs/2306.00740">Chidambaram and Ge, 2024</a>' in card
    assert "x &gt; 1 &amp; y" in card
