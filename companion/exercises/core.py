"""What an exercise answers: correct, not yet, or not attempted; and `check`, which shows it.

Public: `Verdict`, `correct`, `not_yet`, `not_attempted`, `judge`, `check`.
"""

import difflib
import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from companion import papers
from companion.show import put

__all__ = ["Verdict", "check", "correct", "judge", "not_attempted", "not_yet"]

_CARDS = {
    "correct": ("✓", "Correct", "#009e73"),
    "not yet": ("↻", "Not yet", "#d55e00"),
    "not attempted": ("…", "Not attempted yet", "#56b4e9"),
}


@dataclass(frozen=True)
class Verdict:
    """What a check found: the state, and a sentence that helps."""

    state: Literal["correct", "not yet", "not attempted"]
    message: str

    def __bool__(self) -> bool:
        return self.state == "correct"

    def __str__(self) -> str:
        return f"{_CARDS[self.state][1]}: {self.message}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        mark, title, color = _CARDS[self.state]
        message = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(self.message))
        card = (
            f'<div class="companion-exercise companion-{self.state.replace(" ", "-")}" role="status" '
            f'style="border-left:4px solid {color};padding:.5em 1em;margin:.5em 0;'
            f'background:rgba(127,127,127,.1);color:inherit">'
            f'<p style="margin:.2em 0"><strong><span aria-hidden="true" style="color:{color}">{mark}</span> '
            f"{title}.</strong> {message}</p></div>"
        )
        return {"text/plain": str(self), "text/html": card}


def correct(message: str = "Well done.") -> Verdict:
    """Return the verdict of a right answer.

    >>> print(correct("The temperature is the reciprocal."))
    Correct: The temperature is the reciprocal.
    """
    return Verdict("correct", message)


def not_yet(hint: str) -> Verdict:
    """Return the verdict of a wrong answer, with a hint about what is wrong.

    Raises:
        ValueError: the hint is empty.

    >>> bool(not_yet("The rows do not sum to one."))
    False
    """
    if not hint or not hint.strip():
        raise ValueError("expected a hint about what is wrong, got none")
    return Verdict("not yet", hint)


def not_attempted() -> Verdict:
    """Return the verdict of a stub: `None` or `...` where the answer belongs.

    >>> print(not_attempted())
    Not attempted yet: Replace the `...` above by your answer, then run this cell again.
    """
    return Verdict("not attempted", "Replace the `...` above by your answer, then run this cell again.")


def judge(key: str, answer: Any) -> Verdict:
    """Return the verdict on an answer, without showing it.

    Args:
        key: "<chapter>/<number>", such as "recalibration/2".
        answer: what the exercise asks for; `None` or `...` counts as not attempted.

    Returns:
        A verdict, whatever the answer is: an exception inside the check becomes a hint.

    Raises:
        KeyError: there is no such exercise.

    >>> judge("recalibration/1", ...).state
    'not attempted'
    """
    fn = _checker(key)
    if answer is None or answer is Ellipsis:
        return not_attempted()
    try:
        verdict = fn(answer)
    except Exception as error:
        return not_yet(f"Checking your answer raised {type(error).__name__}: {_short(error)}")
    if not isinstance(verdict, Verdict):
        return not_yet(f"The check of {key} gave no verdict; please report this.")
    return verdict


def check(key: str, answer: Any) -> None:
    """Check an answer and show one of three cards: correct, not yet with a hint, not attempted yet.

    It never raises: a reader's notebook runs on.

    Args:
        key: "<chapter>/<number>", such as "recalibration/2".
        answer: a value, or the function the exercise asks for.
    """
    try:
        verdict = judge(key, answer)
    except Exception as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        verdict = not_yet(f"The answer could not be checked: {reason}")
    put(verdict._repr_mimebundle_())


def _checker(key: str) -> Callable[[Any], Verdict]:
    chapter = str(key).partition("/")[0]
    theme = papers.theme_of(chapter)
    if theme is None:
        near = difflib.get_close_matches(chapter, papers.chapters(), n=3)
        raise KeyError(
            f"no chapter {chapter!r} for the exercise {key!r}" + (f"; near: {', '.join(near)}" if near else "")
        )
    name = f"companion.exercises.{theme}"
    checks = import_module(name).CHECKS if find_spec(name) else {}
    if key not in checks:
        known = ", ".join(k for k in checks if k.startswith(f"{chapter}/")) or "none"
        raise KeyError(f"no check {key!r}; this chapter has: {known}")
    return checks[key]


def _short(error: Exception, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if len(text) <= limit else text[: limit - 1] + "…"
