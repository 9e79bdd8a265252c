"""How a check-up is shown: text, table, pictures, one self-contained page, JSON.

Public: `Table`. The other functions are what the methods of `Checkup` call.
"""

import base64
import html
import io
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion._style import lent_style
from companion.report.findings import Finding
from companion.show import number

if TYPE_CHECKING:
    from companion.report.examination import Checkup

__all__ = ["Table"]

QUESTIONS = {
    "dimensionality": "How many numbers do its features need?",
    "collapse": "What shape do its classes have?",
    "calibration": "Can you believe its probabilities?",
    "shortcuts": "Who pays for its mistakes?",
    "anomaly": "Does it notice what it has never seen?",
}
MARKS = {"ok": "✓", "watch": "?", "alarm": "!", "note": "·"}
WORDS = {"ok": "normal", "watch": "unclear", "alarm": "alarm", "note": "for information"}
SCHEMA = 1
RULE = (
    "Normal means that the value lies in its normal range; alarm that the whole 95 % interval lies outside; unclear is "
    "everything in between. The ranges are derived or conventional, as each row says: a report draws attention, it "
    "does not decide."
)


class Table(list):
    """The rows of a check-up as dictionaries; in a notebook and when printed it is a table.

    >>> from companion import checkup
    >>> checkup([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).table()[0]["figure"]
    'Directions that carry variance'
    """

    def __init__(self, found: "Checkup"):
        self.found = found
        super().__init__(
            {
                "question": QUESTIONS[f.theme],
                "figure": f.name,
                "key": f.key,
                "value": f.value,
                "interval": None if f.low is None else (f.low, f.high),
                "normal": f.normal,
                "verdict": f.verdict,
                "meaning": f.meaning,
                "rows": f.rows,
                "chapter": f.link,
            }
            for f in found.findings
        )

    def __str__(self) -> str:
        return as_text(self.found)

    def _repr_html_(self) -> str:
        return as_table(self.found)


def headline(found: "Checkup") -> str:
    """Return what was looked at and how many rows are normal, in a sentence or two."""
    about = found.about
    classes = f", {about['classes']} classes" if about["classes"] else ""
    states = [f.verdict for f in found.findings]
    names = [f.name for f in found.findings if f.verdict == "alarm"]
    alarms = f"{len(names)} alarm{'s' * (len(names) != 1)}" + (f": {'; '.join(names)}" if names else "")
    return (
        f"{about['rows']:,} rows, {about['columns']} columns{classes}. "
        f"{states.count('ok')} normal, {states.count('watch')} unclear, {alarms}."
    )


def as_text(found: "Checkup") -> str:
    """Return the check-up as plain text, at most 100 characters wide where names allow."""
    lines, theme = [headline(found)], None
    width = max((len(f.key) for f in found.findings), default=0)
    for f in found.findings:
        if f.theme != theme:
            theme = f.theme
            lines += ["", QUESTIONS[theme]]
        lines.append(f"  {MARKS[f.verdict]} {f.key.ljust(width)}  {f.shown().ljust(24)}  {f.normal}")
        lines.append(f"    {'':{width}}  {f.meaning}")
    if found.skipped:
        lines += ["", "Not computed"]
        lines += [f"    {what}: {reason}" for what, reason in found.skipped]
    return "\n".join(lines)


def as_table(found: "Checkup") -> str:
    """Return the check-up as an HTML table for a notebook, where colours come from the page around it."""
    cell = 'style="text-align:left;vertical-align:top;padding:.3em 1em .3em 0"'
    names = ("", "figure", "value [95 % interval]", "what is normal", "what it means")
    head = "".join(f'<th scope="col" {cell}>{name}</th>' for name in names)
    body = []
    for f in found.findings:
        link = f'<a href="{html.escape(f.link)}">{html.escape(f.name)}</a>'
        color = COLORS[f.verdict]
        mark = (
            f'<strong style="color:{color}" title="{WORDS[f.verdict]}">{MARKS[f.verdict]} {WORDS[f.verdict]}</strong>'
        )
        parts = (mark, link, html.escape(f.shown()), html.escape(f.normal), html.escape(f.meaning))
        body.append("<tr>" + "".join(f"<td {cell}>{part}</td>" for part in parts) + "</tr>")
    missing = "".join(f"<li>{html.escape(what)}: {html.escape(why)}</li>" for what, why in found.skipped)
    rest = f"<p>Not computed:</p><ul>{missing}</ul>" if missing else ""
    return (
        f'<p>{html.escape(headline(found))}</p><table class="companion-table"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>{rest}"
    )


def as_json(found: "Checkup") -> str:
    """Return the check-up as JSON: `schema`, `about`, `findings`, `skipped`, `verdicts`."""
    record = {
        "schema": SCHEMA,
        "about": found.about,
        "verdicts": found.verdicts(),
        "findings": [f.record() for f in found.findings],
        "skipped": [s._asdict() for s in found.skipped],
    }
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write(path: str | os.PathLike, text: str) -> Path:
    """Write a text file whole or not at all, and return its path."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


COLORS = {"ok": "#00855f", "watch": "#b06d00", "alarm": "#c8500a", "note": "#6b7280"}


def figure(found: "Checkup") -> Any:
    """Return one page of pictures: verdicts, spectrum, reliability, accuracy by class."""
    with lent_style() as figures:
        return _page(found, figures)


def _page(found: "Checkup", figures: Any) -> Any:
    rows = len(found.findings)
    height = 3.2 + 0.27 * rows
    panels = ["spectrum"] + [name for name in ("bins", "seen") if name in found.curves]
    fig = figures.plt.figure(figsize=(figures.WIDTH, height), facecolor=figures.BACKGROUND)
    above, below = fig.subfigures(2, 1, height_ratios=[0.27 * rows + 0.5, 2.4])  # two, so that labels do not align
    _strip(above.add_subplot(), found.findings)
    draw = {"spectrum": _spectrum, "bins": _reliability, "seen": _by_class}
    for place, name in enumerate(panels):
        draw[name](below.add_subplot(1, len(panels), place + 1), found.curves)
    return fig


def _strip(ax: Any, findings: tuple[Finding, ...]) -> None:
    """One line a figure: its normal range is the grey band from 0 to 1, whatever its unit."""
    ax.axvspan(0, 1, color="#00855f", alpha=0.12, lw=0)
    for i, f in enumerate(findings):
        at = [_placed(f, v) for v in (f.value, f.low, f.high)]
        if at[1] is not None:
            ax.plot(at[1:], [i, i], color=COLORS[f.verdict], lw=2.2, solid_capstyle="butt")
        ax.plot([at[0]], [i], "o", color=COLORS[f.verdict], ms=5)
        ax.text(2.2, i, f.shown(), va="center", fontsize=8)
    names = [f.name if len(f.name) <= 48 else f.name[:47] + "…" for f in findings]
    ax.set(ylim=(len(findings) - 0.4, -0.6), xlim=(-1.1, 3.6), xticks=[0, 1], xticklabels=["normal from", "to"])
    ax.set_yticks(range(len(findings)), names, fontsize=8, parse_math=False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", alpha=0.5)


def _placed(f: Finding, value: float | None) -> float | None:
    """Where a value goes when its normal range is drawn from 0 to 1, squeezed so that everything fits."""
    if value is None:
        return None
    low, high = f.normal_low, f.normal_high
    if low is None and high is None:
        return 0.5
    if low is not None and high is not None:
        x = (value - low) / max(high - low, 1e-9)
    else:  # open on one side: that side lies infinitely far away and is drawn at the end of the band
        bound = high if low is None else low
        inside = (bound - value if low is None else value - bound) / max(abs(bound), 1e-9)
        depth = 1 - math.exp(-inside) if inside > 0 else inside
        x = 1 - depth if low is None else depth
    outside = x - 1 if x > 1 else min(x, 0.0)
    return min(max(x, 0.0), 1.0) + math.tanh(outside) * 1.05


def _spectrum(ax: Any, curves: dict) -> None:
    share = curves["spectrum"]
    ax.plot(range(1, len(share) + 1), [max(s, 1e-9) for s in share])
    ax.set(xscale="log", yscale="log", xlabel="direction", ylabel="share of variance", title="spectrum")


def _reliability(ax: Any, curves: dict) -> None:
    ax.plot([0, 1], [0, 1], color="#888888", lw=1, ls="--")
    for i, (count, gap, _, _) in enumerate(curves["bins"]):
        if count:
            middle = (i + 0.5) / len(curves["bins"])
            ax.bar(middle, middle - gap / count, width=0.9 / len(curves["bins"]), color=COLORS["ok"], alpha=0.75)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title="reliability")


def _by_class(ax: Any, curves: dict) -> None:
    pairs = [(r / s, i) for i, (s, r) in enumerate(zip(curves["seen"], curves["right"])) if s]
    pairs.sort()
    if len(pairs) <= 20:
        ax.bar([str(i) for _, i in pairs], [a for a, _ in pairs], color=COLORS["ok"], alpha=0.75)
    else:
        ax.plot(range(len(pairs)), [a for a, _ in pairs])
    ax.set(ylim=(0, 1), xlabel="class, worst first", ylabel="accuracy", title="by class")
    ax.tick_params(axis="x", labelsize=7)


STYLE = """
:root{color-scheme:light dark;--bg:#fdfcf9;--fg:#1f2328;--soft:#5b6470;--card:#fff;--line:#dcdcd4;--band:#00855f33;
--ok:#00734f;--watch:#8f5800;--alarm:#b03a00;--note:#5b6470}
@media (prefers-color-scheme:dark){:root{--bg:#16191d;--fg:#e7e9ec;--soft:#a5adb8;--card:#1e2227;--line:#363c44;
--band:#35c79a44;--ok:#4fd3a8;--watch:#f0b04e;--alarm:#ff8a5c;--note:#a5adb8}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.5 "Segoe UI",Seravek,"Helvetica Neue",Arial,sans-serif}
main{max-width:64rem;margin:0 auto;padding:1.2rem 1rem 3rem}h1{font-size:1.7rem;margin:.2rem 0}
h2{font-size:1.15rem;margin:2rem 0 .6rem}p{margin:.35rem 0}.soft,footer{color:var(--soft);font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:.8rem}
article{background:var(--card);border:1px solid var(--line);border-left:5px solid var(--state);border-radius:8px;
padding:.7rem .9rem;overflow-wrap:anywhere}
article h3{font-size:1rem;margin:0 0 .2rem}.state{color:var(--state);font-weight:700;font-size:.9rem}
.value{font-size:1.25rem;font-weight:600;font-variant-numeric:tabular-nums}
.value small{font-size:.85rem;font-weight:400}
.ok{--state:var(--ok)}.watch{--state:var(--watch)}.alarm{--state:var(--alarm)}.note{--state:var(--note)}
svg{display:block;width:100%;height:26px;margin:.3rem 0}a{color:inherit;text-decoration-thickness:1px}
img{max-width:100%;height:auto;border-radius:8px}code{font-size:.9em}li{margin:.2rem 0}
"""


def page(found: "Checkup") -> str:
    """Return the check-up as one page: styles, pictures and all."""
    import matplotlib.pyplot as plt

    sections = []
    for theme, question in QUESTIONS.items():
        cards = "".join(_card(f) for f in found.findings if f.theme == theme)
        if cards:
            sections.append(f'<section><h2>{question}</h2><div class="cards">{cards}</div></section>')
    fig, picture = figure(found), io.BytesIO()
    try:
        fig.savefig(picture, format="png", dpi=160)
    finally:
        plt.close(fig)
    data = base64.b64encode(picture.getvalue()).decode()
    alt = f"All figures with their intervals beside what is normal, and the curves behind them. {headline(found)}"
    skipped = "".join(f"<li><code>{html.escape(w)}</code>: {html.escape(r)}</li>" for w, r in found.skipped)
    missing = f"<section><h2>Not computed</h2><ul>{skipped}</ul></section>" if skipped else ""
    about = ", ".join(f"{name} {value}" for name, value in found.about.items() if value is not None)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Check-up</title>'
        f"<style>{STYLE}</style></head>\n<body><main><h1>Check-up</h1>\n<p>{html.escape(headline(found))}</p>"
        f'<p class="soft">{RULE}</p>\n{"".join(sections)}\n{missing}\n<section><h2>On one page</h2>'
        f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}"></section>\n'
        f"<footer><p>{html.escape(about)}</p></footer></main></body></html>\n"
    )


def _card(f: Finding) -> str:
    interval = "" if f.low is None else f" <small>[{number(f.low)}, {number(f.high)}]</small>"
    return (
        f'<article class="{f.verdict}" id="{html.escape(f.key)}"><h3>{html.escape(f.name)}</h3>'
        f'<p class="state">{MARKS[f.verdict]} {WORDS[f.verdict]}</p>'
        f'<p class="value">{number(f.value)}{interval}</p>{_gauge(f)}<p>{html.escape(f.meaning)}</p>'
        f'<p class="soft">Normal: {html.escape(f.normal)}. From {f.rows:,} rows. '
        f'<a href="{html.escape(f.link)}">The chapter</a> · <code>{html.escape(f.key)}</code></p></article>\n'
    )


def _gauge(f: Finding) -> str:
    """A line with the normal range as a band, the interval as a bar and the value as a dot."""

    def x(value: float) -> float:
        return round(100 * (value + 1.1) / 3.2, 2)

    value, low, high = (_placed(f, v) for v in (f.value, f.low, f.high))
    bar = ""
    if low is not None and high is not None:
        bar = f'<line x1="{x(low)}%" x2="{x(high)}%" y1="13" y2="13" stroke="var(--state)" stroke-width="4"/>'
    band = ""
    if f.normal_low is not None or f.normal_high is not None:
        band = f'<rect x="{x(0)}%" width="{x(1) - x(0):.2f}%" y="3" height="20" fill="var(--band)"/>'
    return (
        '<svg aria-hidden="true" focusable="false"><line x1="0" x2="100%" y1="13" y2="13" stroke="var(--line)"/>'
        f'{band}{bar}<circle cx="{x(value)}%" cy="13" r="5.5" fill="var(--state)"/></svg>'
    )
