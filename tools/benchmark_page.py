"""Draws the page `book/reference/benchmarks.md` from what `make bench` left in `benchmarks/results/`.

Nothing is measured here: building the site reads the committed numbers.
"""

import hashlib
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

MADE = "<!-- Made by tools/benchmark_page.py at every build from benchmarks/results/: run `make bench`. -->\n"
HEAD = """# Benchmarks

How fast the companion is next to the libraries people would otherwise pick, measured side by side on one machine:
the results are compared first (a fast wrong answer fails), runs are interleaved, and a factor is the median over
rounds of the other library's time divided by ours. Above one, the companion is faster. `make bench` repeats all of
it on your machine; the libraries live in an environment of their own.

"""
THEMES = {
    "dimensionality": "Dimensionality",
    "collapse": "Collapse",
    "calibration": "Calibration",
    "anomaly": "Anomaly detection",
    "mixup": "Mixup",
    "training": "Training many small networks",
}
LATER = "Attacks (FGSM, PGD, Carlini and Wagner) wait for their chapter."


def build(root: Path = ROOT) -> int:
    """Write the page and its pictures; return how many operations are on it."""
    results = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((root / "benchmarks" / "results").glob("*.json"))
    }
    mark = hashlib.sha256(json.dumps(results).encode() + Path(__file__).read_bytes()).hexdigest()
    path = root / "book/reference/benchmarks.md"
    drawn = path.exists() and mark in path.read_text(encoding="utf-8")
    page = [MADE, f"<!-- {mark} -->\n", HEAD]
    main = results.get("cpu") or results.get("cuda")
    if main is None:
        page.append("Nothing has been measured yet.\n")
    elif not drawn or len(list(path.with_suffix("").glob("*.png"))) < 3:
        pictures = root / "book" / "reference" / "benchmarks"
        pictures.mkdir(parents=True, exist_ok=True)
        page += _machine(main) + _factors(main, pictures) + _growth(main, pictures)
        page += _card(results.get("cuda"), main) + _left_out(main) + _versions(main)
    else:
        return len(main["comparisons"])
    path.write_text("".join(page), encoding="utf-8")
    return len(main["comparisons"]) if main else 0


def _machine(record: dict) -> list[str]:
    machine = record["machine"]
    card = machine["card"] or "none"
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    return [
        "## The machine\n\n",
        f"Measured on {record['date']}: {machine['processor']} ({machine['instructions']}), {threads}, "
        f"graphics card: {card}, {machine['system']}, Python {machine['python']}.\n\n",
    ]


def _factors(record: dict, pictures: Path) -> list[str]:
    rows = record["comparisons"]
    measured = [row for row in rows if row["factor"]]
    _draw_factors(measured, pictures / "factors.png")
    page = [
        "## Next to others\n\n",
        _figure(
            "factors.png",
            f"Dot plot with a row for each of {len(measured)} operations on a logarithmic axis: one dot a library at "
            "how many times slower than the companion it is, a large dot for the fastest, a bar where we aimed.",
            "How many times slower than the companion each library is; the large dot is the fastest of them, the "
            "short bar what we aimed at. Left of the line at one, the library is faster.",
        ),
    ]
    for theme, title in THEMES.items():
        here = [row for row in rows if row["theme"] == theme]
        if not here:
            continue
        page += [f"### {title}\n\n", "| operation | companion | fastest other | factor | aimed at |\n"]
        page.append("| --- | ---: | ---: | ---: | ---: |\n")
        for row in here:
            fastest = row["fastest"]
            other = f"{fastest} {_time(row['peers'][fastest]['ms'])}" if fastest else "none ran"
            factor = f"{row['factor']:.1f}" if row["factor"] else ""
            page.append(f"| {row['name']} | {_time(row['ms'])} | {other} | {factor} | {row['wanted'] or ''} |\n")
        page.append("\n")
        page += [_others(row) for row in here]
        page.append("\n")
    return page


def _others(row: dict) -> str:
    parts = []
    for name, entry in row["peers"].items():
        said = entry.get("why") or f"{_time(entry['ms'])}, {entry['ratio']:.1f} times ours"
        parts.append(f"{name}: {said}" + (f" ({entry['note']})" if entry.get("note") else ""))
    limit = f" *Below the aim:* {row['limit']}." if row.get("limit") and _short_of(row) else ""
    return f"- **{row['name']}.** {_escape('; '.join(parts))}.{limit}\n"


def _short_of(row: dict) -> bool:
    return bool(row["wanted"] and row["factor"] and row["factor"] < 0.95 * row["wanted"])


def _escape(text: str) -> str:
    for sign in ("<", ">", "|", "$", "*", "_", "`"):
        text = text.replace(sign, "\\" + sign)
    return text


def _time(ms: float) -> str:
    if ms >= 1e4:
        return f"{ms / 1e3:.1f} s"
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def _growth(record: dict, pictures: Path) -> list[str]:
    curves = record["growth"]
    if not curves:
        return []
    _draw_growth(curves, "ms", "milliseconds", pictures / "time.png")
    _draw_growth(curves, "mb", "megabytes", pictures / "memory.png")
    names = ", ".join(dict.fromkeys(curve["name"].split(",")[0] for curve in curves))
    return [
        "## How time and memory grow\n\n",
        _figure(
            "time.png",
            f"Small log-log plots of time against size for {names}; most lines have slope one or two.",
            "Time against size, both axes logarithmic. The dotted line grows in proportion to size.",
        ),
        _figure(
            "memory.png",
            f"Small log-log plots of peak memory against size for {names}; neighbour searches stay below their limit.",
            "Peak memory beyond the input. The search for neighbours stays within the memory it is given, 256 MB, "
            "where the matrix of all distances would grow with the square.",
        ),
    ]


def _card(record: dict | None, main: dict) -> list[str]:
    page = ["## On a graphics card\n\n"]
    if record is None:
        page.append(
            "These sizes are for a graphics card. The machine above has none, so they wait: `make bench` on a machine "
            "with one fills them in.\n\n"
        )
    rows = (record or main)["on_card"]
    page.append("| operation | time | rate | share of the card's own |\n| --- | ---: | ---: | ---: |\n")
    for row in rows:
        if "why" in row:
            page.append(f"| {row['name']} | {row['why']} | | |\n")
            continue
        rate = f"{row['tflops']:.1f} TFLOP/s" if "tflops" in row else f"{row['gb_per_s']:.0f} GB/s"
        page.append(f"| {row['name']} | {_time(row['ms'])} | {rate} | {row['share']:.0%} |\n")
    return [*page, "\n"]


def _left_out(record: dict) -> list[str]:
    page = ["## What is not here\n\n", f"- {LATER}\n"]
    page += [f"- Not installed: {_escape(line)} ({_escape(why)}).\n" for line, why in record["missing"].items()]
    absent = {name: why.split(" (")[0] for name, why in record["absent"].items()}
    page += [f"- Left out: {_escape(name)} ({_escape(why)}).\n" for name, why in absent.items()]
    return [*page, "\n"]


def _versions(record: dict) -> list[str]:
    known = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    return ["## Versions\n\n", f"{known}.\n"]


def _figure(name: str, alt: str, caption: str) -> str:
    return f":::{{figure}} benchmarks/{name}\n:alt: {alt}\n\n{caption}\n:::\n\n"


def _draw_factors(rows: list[dict], path: Path) -> None:
    from companion import figures

    fig, ax = figures.subplots(height=1.2 + 0.28 * len(rows))
    for y, row in enumerate(reversed(rows)):
        ratios = [entry["ratio"] for entry in row["peers"].values() if "ratio" in entry]
        ax.plot(ratios, [y] * len(ratios), "o", ms=4, color=figures.COLORS[5], alpha=0.9)
        ax.plot(row["factor"], y, "o", ms=8, color=figures.COLORS[0])
        if row["wanted"]:
            ax.plot([row["wanted"]] * 2, [y - 0.35, y + 0.35], color=figures.COLORS[1])
    ax.axvline(1, color="#444444", lw=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)], fontsize=8)
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.set_xlabel("times slower than the companion")
    _save(fig, path)


def _draw_growth(curves: list[dict], what: str, unit: str, path: Path) -> None:
    from matplotlib.ticker import LogLocator

    from companion import figures

    panels: dict[tuple[str, str], list[dict]] = {}
    for curve in curves:
        panels.setdefault((curve["name"].split(",")[0], curve["axis"]), []).append(curve)
    rows = -(-len(panels) // 3)
    inches = 2.2 * rows
    fig, axes = figures.subplots(rows, 3, height=inches, layout="none")  # finding a layout is half of the drawing
    fig.subplots_adjust(
        left=0.6 / 7, right=1 - 0.1 / 7, wspace=0.4, bottom=0.42 / inches, top=1 - 0.27 / inches, hspace=0.5
    )
    flat = list(axes.flat)
    for ax, ((name, axis), lines) in zip(flat, panels.items()):
        for curve in lines:
            points = [(p["size"], p[what]) for p in curve["points"] if p[what]]
            if not points:
                continue
            label = curve["name"].split(", ")[1] if len(lines) > 1 else None
            ax.plot(*zip(*points), "o-", ms=4, lw=1.4, label=label)
        sizes = [p["size"] for p in lines[0]["points"]]
        if lines[0]["points"][0][what]:
            start = lines[0]["points"][0][what]
            ax.plot(sizes, [start * size / sizes[0] for size in sizes], ":", color="#777777", lw=1)
        ax.set_xscale("log")
        ax.set_yscale("log")
        # A tick for each size that was measured; the dozens of small ones between them ran into each other.
        ax.set_xticks(sizes, [_size(size) for size in sizes])
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.set_title(name, fontsize=8)
        ax.set_xlabel(axis, fontsize=7)
        ax.set_ylabel(unit, fontsize=7)
        ax.tick_params(labelsize=7)
        if len(lines) > 1:
            ax.legend(fontsize=6)
    for ax in flat[len(panels) :]:
        ax.remove()
    _save(fig, path)


def _size(size: float) -> str:
    """A size as a tick names it: 2500, 40k, 1M."""
    if size >= 1e6 and size % 1e6 == 0:
        return f"{size / 1e6:g}M"
    return f"{size / 1e3:g}k" if size >= 1e4 and size % 1e3 == 0 else f"{size:g}"


def _save(fig, path: Path) -> None:
    import matplotlib.pyplot as plt
    from PIL import Image

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=200, pil_kwargs={"compress_level": 1})
    plt.close(fig)
    Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    print(f"{build()} operations")
