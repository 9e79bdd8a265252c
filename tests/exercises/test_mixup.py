"""The checks of the mixup exercises: solutions pass, stubs wait, known mistakes get their hint."""

import pytest

from companion.exercises.core import judge


class TestMixupGeometry:
    @pytest.mark.parametrize(("key", "answer"), [("1", (0.35, 0.65))])
    def test_solutions_are_correct(self, key, answer):
        assert judge(f"mixup-geometry/{key}", answer).state == "correct"

    @pytest.mark.parametrize("key", ["1"])
    def test_stubs_are_not_attempted(self, key):
        assert judge(f"mixup-geometry/{key}", ...).state == "not attempted"

    @pytest.mark.parametrize(
        ("key", "answer", "hint"),
        [
            ("1", (0.4, 0.6), "2/3"),
            ("1", (0.65, 0.35), "smaller end first"),
            ("1", 0.5, "pair"),
        ],
    )
    def test_mistakes_get_their_hint(self, key, answer, hint):
        verdict = judge(f"mixup-geometry/{key}", answer)
        assert verdict.state == "not yet"
        assert hint in verdict.message
