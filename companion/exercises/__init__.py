"""Exercises that check themselves: `check("recalibration/2", answer)` shows a card with a hint.

One module per theme holds the checks of its chapters in a dict `CHECKS`; `core` holds what they share.
"""

from companion.exercises.core import Verdict, check, correct, judge, not_attempted, not_yet

__all__ = ["Verdict", "check", "correct", "judge", "not_attempted", "not_yet"]
