"""A claim that fails the build when it stops being true.

Public: `claim`, which a notebook calls, `evaluate`, which decides, `Claim`, its result, and `ClaimError`.
"""

import difflib
import html
import math
import numbers
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from companion import papers
from companion.runtime import base_seed
from companion.show import mean_and_sd, put, spread

__all__ = ["MEDIA_TYPE", "Claim", "ClaimError", "claim", "evaluate"]

MEDIA_TYPE = "application/vnd.companion.claim+json"
MIN_SEEDS = 3
MARGIN = 2.0  # standard deviations over seeds between a mean and its bound


class ClaimError(AssertionError):
    """A claim of the book does not hold."""


@dataclass(frozen=True)
class Claim:
    """A claim with what was measured; `held` says whether it holds, `problems` why not.

    In a notebook it renders as a card and carries its record under `MEDIA_TYPE`.
    """

    key: str
    paper: str
    statement: str
    at_least: dict[str, float]
    at_most: dict[str, float]
    values: dict[str, list[float]]
    mean: dict[str, float]
    sd: dict[str, float]
    base_seed: int
    problems: tuple[str, ...]

    @property
    def held(self) -> bool:
        """Whether every mean keeps two standard deviations from its bounds."""
        return not self.problems

    @property
    def seeds(self) -> int:
        """How many seeds were measured."""
        return len(next(iter(self.values.values())))

    def record(self) -> dict[str, Any]:
        """Return what the output of a notebook stores: plain data, six significant digits."""
        return {
            "key": self.key,
            "paper": self.paper,
            "statement": self.statement,
            "bounds": {"at_least": self.at_least, "at_most": self.at_most},
            "values": {name: [_stored(value) for value in values] for name, values in self.values.items()},
            "mean": {name: _stored(value) for name, value in self.mean.items()},
            "sd": {name: _stored(value) for name, value in self.sd.items()},
            "seeds": self.seeds,
            "base_seed": self.base_seed,
            "held": self.held,
        }

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/plain": str(self), "text/html": self._card(), MEDIA_TYPE: self.record()}

    def __str__(self) -> str:
        lines = [f"{'Holds' if self.held else 'BROKEN'}: {self.statement}"]
        lines += [f"  {name}: {shown}{bound and f' ({bound})'}" for name, shown, bound in self._rows()]
        lines += [f"  {problem}" for problem in self.problems]
        lines += [f"  {self.seeds} seeds · {_label(self.paper)} · {self.key}"]
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str, str]]:
        rows = []
        for name, values in self.values.items():
            bounds = [f"at least {_bound(self.at_least[name])}"] if name in self.at_least else []
            bounds += [f"at most {_bound(self.at_most[name])}"] if name in self.at_most else []
            rows.append((name, spread(values), ", ".join(bounds)))
        return rows

    def _card(self) -> str:
        state, mark, word = ("held", "✓", "Holds.") if self.held else ("broken", "✗", "Broken.")
        color = "#009e73" if self.held else "#d55e00"
        cell = "padding:.1em 1em .1em 0;text-align:left;border:0;background:none"
        rows = "".join(
            f'<tr style="background:none"><td style="{cell}"><code>{html.escape(name)}</code></td>'
            f'<td style="{cell}">{shown}</td><td style="{cell};opacity:.85">{bound}</td></tr>'
            for name, shown, bound in self._rows()
        )
        problems = "".join(f'<p style="margin:.3em 0">{html.escape(problem)}</p>' for problem in self.problems)
        label, url = html.escape(_label(self.paper)), _url(self.paper)
        paper = f'<a href="{html.escape(url)}">{label}</a>' if url else label
        return (
            f'<div class="companion-claim companion-{state}" id="claim-{self.key.replace("/", "-")}" role="note" '
            f'style="border-left:4px solid {color};padding:.5em 1em;margin:.5em 0;'
            f'background:rgba(127,127,127,.1);color:inherit">\n'
            f'<p class="companion-statement" style="margin:.2em 0"><strong>'
            f'<span aria-hidden="true" style="color:{color}">{mark}</span> {word}</strong> '
            f"{html.escape(self.statement)}</p>\n{problems}"
            f'<table style="margin:.3em 0;border:0;border-collapse:collapse;font-size:.95em;color:inherit">'
            f"<tbody>{rows}</tbody></table>\n"
            f'<p class="companion-source" style="margin:.2em 0;font-size:.85em;opacity:.85">'
            f"mean ± standard deviation over {self.seeds} seeds · {paper} · <code>{self.key}</code></p>\n</div>"
        )


def evaluate(
    key: str,
    *,
    paper: str,
    says: str,
    at_least: Mapping[str, float] | None = None,
    at_most: Mapping[str, float] | None = None,
    **values: Any,
) -> Claim:
    """Decide whether a claim holds, without showing it.

    A bound holds when the mean over seeds stays at least two standard deviations on the right side of it:
    mean - 2 sd >= at_least, mean + 2 sd <= at_most.

    Args:
        key: "<chapter>/<slug>".
        paper: the key of the paper in the register.
        says: the sentence, a `str.format` template over the bounds. A name bounded on both sides is written
            `{at_least[name]}` and `{at_most[name]}`.
        at_least: lower bounds by name.
        at_most: upper bounds by name.
        **values: what was measured, one number per seed, for each bounded name and others worth showing.

    Returns:
        The claim, held or not.

    Raises:
        ValueError: the claim is not well posed: fewer than three seeds, NaN or infinite values, no bound, a bound
            without values, unknown names in the sentence, a key or paper that is none.
        TypeError: a value is not a list of numbers, or a bound not a number.

    >>> evaluate("demo/gain", paper="li2018measuring", says="the gain is at least {gain}", at_least={"gain": 0.5},
    ...          gain=[0.9, 1.0, 1.1]).held
    True
    """
    if not isinstance(key, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*/[a-z0-9]+(-[a-z0-9]+)*", key):
        raise ValueError(f'expected a key "chapter/slug" in lower case with hyphens, got {key!r}')
    lower = {name: _checked_bound(name, bound) for name, bound in (at_least or {}).items()}
    upper = {name: _checked_bound(name, bound) for name, bound in (at_most or {}).items()}
    if not lower and not upper:
        raise ValueError(f"{key}: expected at least one bound: a claim without one cannot fail")
    if missing := sorted((lower.keys() | upper.keys()) - values.keys()):
        given = ", ".join(values) or "none"
        raise ValueError(f"{key}: expected values for each bound, missing: {', '.join(missing)} (given: {given})")
    measured = {name: _checked_values(key, name, value) for name, value in values.items()}
    if len({len(value) for value in measured.values()}) > 1:
        lengths = {name: len(value) for name, value in measured.items()}
        raise ValueError(f"{key}: expected one number per seed and the same seeds for each value, got {lengths}")
    for name in lower.keys() & upper.keys():
        if lower[name] >= upper[name]:
            raise ValueError(f"{key}: expected at_least < at_most for {name}, got {lower[name]} and {upper[name]}")

    moments = {name: mean_and_sd(value) for name, value in measured.items()}
    problems = []
    for name, (mean, sd) in moments.items():
        if name in lower and not mean - MARGIN * sd >= lower[name]:
            problems.append(_problem(name, measured[name], "at least", lower[name], mean >= lower[name]))
        if name in upper and not mean + MARGIN * sd <= upper[name]:
            problems.append(_problem(name, measured[name], "at most", upper[name], mean <= upper[name]))
    return Claim(
        key=key,
        paper=_checked_paper(key, paper),
        statement=_sentence(key, says, lower, upper),
        at_least=lower,
        at_most=upper,
        values=measured,
        mean={name: mean for name, (mean, _) in moments.items()},
        sd={name: sd for name, (_, sd) in moments.items()},
        base_seed=base_seed(),
        problems=tuple(problems),
    )


def claim(
    key: str,
    *,
    paper: str,
    says: str,
    at_least: Mapping[str, float] | None = None,
    at_most: Mapping[str, float] | None = None,
    **values: Any,
) -> None:
    """Show a claim as a card and raise when it does not hold.

    The card states what is claimed, shows mean and spread over seeds and links the paper; its record stays in the
    output, where the claims page and the drift check find it. Arguments are those of `evaluate`.

    Raises:
        ClaimError: a bound is broken, or nearer than two standard deviations.
        ValueError: the claim is not well posed.
    """
    result = evaluate(key, paper=paper, says=says, at_least=at_least, at_most=at_most, **values)
    put(result._repr_mimebundle_())
    if not result.held:
        raise ClaimError(f"{key}: {'; '.join(result.problems)}")


def _checked_bound(name: str, bound: Any) -> float:
    if isinstance(bound, bool) or not isinstance(bound, numbers.Real):
        raise TypeError(f"expected the bound of {name} to be a number, got {bound!r}")
    if not math.isfinite(bound):
        raise ValueError(f"expected the bound of {name} to be finite, got {bound}: such a claim cannot fail")
    return int(bound) if isinstance(bound, numbers.Integral) else float(bound)


def _checked_values(key: str, name: str, value: Any) -> list[float]:
    if hasattr(value, "tolist"):
        value = value.tolist()  # tensors and arrays
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        raise TypeError(f"{key}: expected {name} to be a list with one number per seed, got {value!r}")
    try:
        plain = [v.item() if hasattr(v, "item") else v for v in value]
    except (RuntimeError, ValueError) as error:
        raise TypeError(f"{key}: expected one number per seed in {name}, got an array in its place") from error
    if not all(isinstance(v, numbers.Real) for v in plain):
        raise TypeError(f"{key}: expected numbers in {name}, got {plain!r}")
    if len(plain) < MIN_SEEDS:
        raise ValueError(f"{key}: expected at least {MIN_SEEDS} seeds, got {len(plain)} for {name}")
    if bad := [i for i, v in enumerate(plain) if not math.isfinite(v)]:
        raise ValueError(f"{key}: expected finite values, got {plain[bad[0]]} for {name} at seed number {bad[0]}")
    return [float(v) for v in plain]


def _checked_paper(key: str, paper: str) -> str:
    known = papers.keys()
    if paper not in known:
        near = difflib.get_close_matches(str(paper), known, n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"{key}: expected the key of a paper in the register, got {paper!r}{hint}")
    return paper


def _sentence(key: str, says: str, lower: Mapping[str, float], upper: Mapping[str, float]) -> str:
    both = lower.keys() & upper.keys()
    bounds = {name: _Bound(value) for name, value in {**lower, **upper}.items()}
    sides = {
        "at_least": {name: _Bound(value) for name, value in lower.items()},
        "at_most": {name: _Bound(value) for name, value in upper.items()},
    }
    if not isinstance(says, str) or not says.strip():
        raise ValueError(f"{key}: expected a sentence, got {says!r}")
    for _, field, _, _ in string.Formatter().parse(says):
        if field is None:
            continue
        if field in both:
            raise ValueError(
                f"{key}: {field} has a bound on either side: write {{at_least[{field}]}} and {{at_most[{field}]}}"
            )
        side = re.fullmatch(r"(at_least|at_most)\[(\w+)\]", field)
        if not (field in bounds or (side and side[2] in sides[side[1]])):
            known = ", ".join(sorted(bounds))
            raise ValueError(f"{key}: the sentence speaks of {{{field}}}, which is not a bound (bounds: {known})")
    return says.format(**{**bounds, **sides})


class _Bound(float):
    """A bound inside a sentence: whole numbers without a point, everything else as typed."""

    def __format__(self, form: str) -> str:
        return format(float(self), form) if form else _bound(float(self))


def _bound(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


def _problem(name: str, values: list[float], side: str, bound: float, near: bool) -> str:
    why = f"within {MARGIN:g} standard deviations of its bound" if near else "on the wrong side of its bound"
    return f"{name} is {spread(values)}, {why} ({side} {_bound(bound)})"


def _stored(value: float) -> float:
    return float(f"{value:.6g}")


def _label(paper: str) -> str:
    return papers.label(paper)


def _url(paper: str) -> str | None:
    return papers.url(paper)
