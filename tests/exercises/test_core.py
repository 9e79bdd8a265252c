"""Tests of companion.exercises.core: three cards, and never an exception in a reader's notebook."""

import sys
from types import ModuleType

import pytest

from companion.exercises import check, core, correct, judge, not_attempted, not_yet


def half(answer):
    if answer == "surprise":
        return None
    if answer > 1:
        return not_yet("A probability is at most `1`.")
    return correct("Right: <half>.") if answer == 0.5 else not_yet("Think of a coin.")


@pytest.fixture
def coin(monkeypatch):
    module = ModuleType("companion.exercises.calibration")
    module.CHECKS = {"recalibration/2": half}
    monkeypatch.setitem(sys.modules, "companion.exercises.calibration", module)
    monkeypatch.setattr(core, "find_spec", lambda name: name)
    bundles = []
    monkeypatch.setattr(core, "put", bundles.append)
    return bundles


@pytest.mark.parametrize("stub", [None, ...])
def test_a_stub_is_not_attempted(coin, stub):
    assert judge("recalibration/2", stub) == not_attempted()
    check("recalibration/2", stub)
    assert "Not attempted yet" in coin[0]["text/html"]


def test_right_and_wrong_answers(coin):
    assert judge("recalibration/2", 0.5)
    assert judge("recalibration/2", 0.4).message == "Think of a coin."
    assert judge("recalibration/2", 2.0).message == "A probability is at most `1`."
    check("recalibration/2", 0.5)
    check("recalibration/2", 2.0)
    assert "&lt;half&gt;" in coin[0]["text/html"]
    assert "<code>1</code>" in coin[1]["text/html"]
    assert coin[1]["text/plain"].startswith("Not yet: ")


def test_an_exception_in_the_check_becomes_a_hint(coin):
    verdict = judge("recalibration/2", "text")
    assert verdict.state == "not yet"
    assert "TypeError" in verdict.message
    assert judge("recalibration/2", "surprise").state == "not yet"


@pytest.mark.parametrize("key", ["recalibration/99", "recalibratoin/2", "nothing", "", None, 3])
def test_check_never_raises(coin, key):
    assert check(key, 0.5) is None
    assert "could not be checked" in coin[0]["text/plain"]


def test_unknown_keys_name_what_is_near(coin):
    with pytest.raises(KeyError, match="near: recalibration"):
        judge("recalibratoin/2", 1)
    with pytest.raises(KeyError, match="has: recalibration/2"):
        judge("recalibration/99", 1)


def test_a_hint_says_something():
    with pytest.raises(ValueError, match="hint"):
        not_yet(" ")
