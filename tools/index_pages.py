"""Writes the pages of the reference part that follow from the code, the register and the notebooks.

API pages (one per theme, one for the foundation), the paper index, the claims page and the bibliography go to
`book/reference/`, are ignored by git, and are made again at every build: nothing on them is typed twice.
"""

import html
import importlib
import inspect
import json
import pkgutil
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

THEMES = {
    "dimensionality": "Dimensionality",
    "collapse": "Collapse",
    "mixup": "Mixup",
    "calibration": "Calibration",
    "shortcuts": "Shortcuts",
    "anomaly": "Anomaly detection",
    "gallery": "Gallery",
}
CLAIM = "application/vnd.companion.claim+json"
GROUP = "<span data-fg-group></span>\n\n"  # book.js hides a section whose entries are all filtered out
MADE = "<!-- Made by tools/index_pages.py at every build: change the docstrings, the register or the chapters. -->\n"

API_HEAD = """# API reference

Everything the book shows lives in the package `companion`, one module a chapter. Functions take tensors or
arrays; what they compute stands on these pages, and why in the chapters.

"""
PAPERS_HEAD = """# Papers

Every paper of the book: its idea in a sentence, the section that explains it, the code that implements it and
the claims about it that hold on every run. A paper is *implemented* when a docstring of the companion names
it, and *claimed* when an experiment of its own passes.

"""
CLAIMS_HEAD = """# Claims

Each statement below is computed by a cell of the book from its own bounds, measured over several seeds, and
would have stopped the build had it not held. Means are given with their standard deviation over seeds; every
mean stays at least two of those away from its bound.

"""


# --- what is there ------------------------------------------------------------------------------------------------


def toc_files(root: Path = ROOT) -> list[str]:
    """Every file of the table of contents, in reading order, as it is written there."""

    def walk(node):
        if isinstance(node, dict):
            if "root" in node:
                yield str(node["root"])
            if "file" in node:
                yield str(node["file"])
            for name in ("parts", "chapters", "sections"):
                yield from walk(node.get(name) or [])
        elif isinstance(node, list):
            for item in node:
                yield from walk(item)

    return list(walk(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))))


def chapters(root: Path = ROOT) -> dict[str, dict]:
    """The chapters on the site: `theme/name` -> its title, its text, its notebook and the headings of its text."""
    found = {}
    for name in toc_files(root):
        path = root / name
        if path.suffix == ".ipynb" and path.exists():  # the build itself names a missing one
            text = path.with_suffix(".md").read_text(encoding="utf-8")
            key = f"{path.parent.name}/{path.stem}"
            short = title_of(text).split(":")[0]
            found[key] = {"title": short, "text": text, "notebook": path, "theme": path.parent.name}
    return found


def title_of(text: str) -> str:
    """The first heading of a Markdown text, without its front matter."""
    match = re.search(r"^# (.+)$", without_code(text), flags=re.M)
    return match[1].strip() if match else "Untitled"


def without_code(text: str) -> str:
    """Markdown without front matter and without fenced blocks, line numbers kept."""
    text = re.sub(r"\A---\n.*?\n---\n", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    return re.sub(r"^(`{3,}|~{3,})[^\n]*\n.*?^\1`*\s*$", lambda m: "\n" * m[0].count("\n"), text, flags=re.S | re.M)


def claims_of(notebook: Path) -> list[dict]:
    """The claim records in the outputs of a notebook, in order."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [
        output["data"][CLAIM]
        for cell in cells
        for output in cell.get("outputs", [])
        if CLAIM in (output.get("data") or {})
    ]


def register() -> list[dict]:
    """The papers of the register as plain dictionaries with `theme`, `chapter`, `label` and `url`."""
    from companion import papers

    rows = []
    for paper in papers.papers():
        row = dict(vars(paper))
        row["label"], row["url"] = papers.label(row["key"]), papers.url(row["key"])
        rows.append(row)
    return rows


def modules_of(theme: str) -> dict[str, object]:
    """The chapters' modules of a theme by chapter name (underscores become hyphens)."""
    try:
        package = importlib.import_module(f"companion.{theme}")
    except ImportError:
        return {}
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    return {n.replace("_", "-"): importlib.import_module(f"companion.{theme}.{n}") for n in names}


def foundation() -> dict[str, object]:
    """The modules directly under `companion/` that are neither themes nor private."""
    import companion

    names = [m.name for m in pkgutil.iter_modules(companion.__path__) if not m.name.startswith("_")]
    reading_order = [n for n in companion.FOUNDATION if n in names]
    rest = [n for n in names if n not in reading_order and n not in THEMES]
    return {n: importlib.import_module(f"companion.{n}") for n in reading_order + rest}


def public_names(module) -> list[tuple[str, object]]:
    """The names of a module's `__all__` with what they stand for; submodules are left out."""
    pairs = [(name, getattr(module, name)) for name in getattr(module, "__all__", ()) if hasattr(module, name)]
    return [(name, obj) for name, obj in pairs if not inspect.ismodule(obj)]


def papers_in(obj) -> list[str]:
    """The keys of the `Paper: key` lines of a docstring."""
    lines = re.findall(r"^\s*Papers?:\s*(.+)$", obj.__doc__ or "", flags=re.M)
    return [key for line in lines for key in re.findall(r"[\w-]+", line)]


# --- writing ------------------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """Plain words as Markdown: mathematics in dollars is left alone, everything else is taken literally."""
    parts = re.split(r"(\$[^$]+\$|`[^`]+`)", str(text).strip())
    return "".join(p if i % 2 else re.sub(r"([\\*_\[\]<>#^~|])", r"\\\1", p) for i, p in enumerate(parts))


def slug(heading: str) -> str:
    """The anchor docutils gives a heading."""
    from docutils.nodes import make_id

    return make_id(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("$", "").replace("`", ""))


def section_of(text: str, url: str) -> str:
    """The anchor of the section whose text links an address first; empty when it is not linked below a heading."""
    plain, heading = without_code(text), ""
    place = plain.find(f"]({url})")
    for match in re.finditer(r"^#{2,3} (.+)$", plain, flags=re.M):
        if match.start() > place:
            break
        heading = match[1]
    return slug(heading) if place >= 0 and heading else ""


def write(path: Path, text: str) -> None:
    """Write a page, and leave its time alone when nothing changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def dotted(module, name: str, obj) -> str:
    """Where a public name is defined: the anchor of its entry, which `show` links to."""
    obj = inspect.unwrap(obj) if callable(obj) else obj  # a cached function is still that function
    if (inspect.isclass(obj) or inspect.isfunction(obj)) and obj.__module__.split(".")[0] == "companion":
        return f"{obj.__module__}.{obj.__qualname__}"
    return f"{module.__name__}.{name}"


def api_entry(module, name: str, obj) -> str:
    """The autodoc directive for one public name."""
    if not callable(obj):
        value = repr(obj)
        shown = f"   :value: {value}\n" if len(value) < 100 else ""
        return f".. py:data:: {module.__name__}.{name}\n{shown}\n"
    kind = "autoclass" if inspect.isclass(obj) else "autofunction"
    options = (
        "   :members:\n   :special-members: __call__\n   :show-inheritance:\n"
        if kind == "autoclass" and not issubclass(obj, tuple)
        else ""
    )
    return f".. {kind}:: {dotted(module, name, obj)}\n{options}\n"


def api_block(module) -> str:
    """All entries of a module as one block of reStructuredText; what is defined elsewhere is documented there."""
    pairs = public_names(module)
    own = [api_entry(module, n, o) for n, o in pairs if dotted(module, n, o).startswith(module.__name__ + ".")]
    return "```{eval-rst}\n" + "".join(own) + "```\n\n" if own else ""


def first_sentence(text: str | None) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


def api_pages(root: Path, known: dict[str, dict]) -> None:
    """One page per theme and one for the foundation, with an overview of all of them."""
    overview = [MADE, API_HEAD]
    for theme, title in list(THEMES.items())[:6]:
        package = importlib.import_module(f"companion.{theme}")
        page = [MADE, f"# {title}: API\n\n", f"```python\nfrom companion.{theme} import ...\n```\n\n"]
        overview.append(f"## [{title}]({theme}.md)\n\n{escape_docstring(first_sentence(package.__doc__))}\n\n")
        rows = []
        for chapter, module in modules_of(theme).items():
            pairs = public_names(module)
            if not pairs:
                continue
            key = f"{theme}/{chapter}"
            heading = known[key]["title"] if key in known else chapter.replace("-", " ").capitalize()
            page.append(f"## {heading}\n\n{escape_docstring(first_sentence(module.__doc__))}\n\n")
            if key in known:
                page.append(f"Explained in the chapter [{heading}](../../{key}.ipynb).\n\n")
            page.append(api_block(module))
            rows.append(f"- {heading}: " + ", ".join(f"`{n}`" for n, _ in pairs) + "\n")
        overview += rows or ["Nothing yet: its chapters are being written.\n"]
        overview.append("\n")
        if len(page) == 3:
            page.append("Nothing yet: the chapters of this theme are being written.\n")
        write(root / f"book/reference/api/{theme}.md", "".join(page))
    page = [MADE, "# Foundation: API\n\n", "What several themes share, directly under `companion`.\n\n"]
    overview.append("## [Foundation](foundation.md)\n\nWhat several themes share.\n\n")
    for name, module in foundation().items():
        pairs = public_names(module)
        if pairs:
            page.append(f"## `companion.{name}`\n\n{escape_docstring(first_sentence(module.__doc__))}\n\n")
            page.append(api_block(module))
            overview.append(f"- `companion.{name}`: " + ", ".join(f"`{n}`" for n, _ in pairs) + "\n")
    write(root / "book/reference/api/foundation.md", "".join(page))
    write(root / "book/reference/api/index.md", "".join(overview))


def escape_docstring(text: str) -> str:
    """A sentence of a docstring as Markdown: backticks and mathematics stay."""
    return escape(text)


def implementations() -> dict[str, list[tuple[str, str]]]:
    """Paper key -> (page, public dotted name) of everything whose docstring names it."""
    found: dict[str, list[tuple[str, str]]] = {}
    places = [(t, m) for t in list(THEMES)[:6] for m in modules_of(t).values()]
    places += [("foundation", m) for m in foundation().values()]
    for page, module in places:
        for name, obj in public_names(module):
            name = dotted(module, name, obj)
            for key in papers_in(obj):
                if (page, name) not in found.setdefault(key, []) and name.startswith(module.__name__ + "."):
                    found[key].append((page, name))
    return found


def all_claims(known: dict[str, dict]) -> list[dict]:
    """Every claim record on the site with the chapter it is made in."""
    return [{**record, "in": key} for key, chapter in known.items() for record in claims_of(chapter["notebook"])]


def anchor(key: str) -> str:
    """The anchor of a claim or a paper on its generated page."""
    return re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")


def state_of(key: str, implemented: dict, claimed: set[str]) -> str:
    """Planned, implemented or claimed: read from the docstrings and the records, never typed."""
    return "claimed" if key in claimed else "implemented" if key in implemented else "planned"


def filter_form(states: tuple[str, ...], noun: str) -> str:
    """The filter at the head of a generated page; without scripts everything is shown."""
    themes = "".join(f'<option value="{t}">{html.escape(n)}</option>' for t, n in THEMES.items())
    state = "".join(f'<option value="{s}">{s}</option>' for s in states)
    parts = ['<form class="fg-filter" role="search">']
    parts.append(f'<label>Theme<select name="theme"><option value="">all themes</option>{themes}</select></label>')
    if states:
        parts.append(f'<label>State<select name="state"><option value="">any state</option>{state}</select></label>')
    parts.append('<label>Words<input name="words" type="search" placeholder="title, author, idea"></label>')
    parts.append(f'<output aria-live="polite">{noun}</output></form>\n\n')
    return "".join(parts)


def reference_line(row: dict) -> str:
    """Authors, year and venue as far as the register knows them."""
    authors = row.get("authors") or []
    names = ", ".join(authors[:6]) + (" and others" if len(authors) > 6 else "")
    return ". ".join(escape(str(part)) for part in (names, row.get("year"), row.get("venue")) if part)


def paper_index(root: Path, known: dict[str, dict], rows: list[dict], implemented: dict, claims: list[dict]) -> None:
    """Every paper with its idea and where it lives: section, code, claim; what is still to come stands apart."""
    claimed = {record["paper"] for record in claims if record["held"]}
    page = [MADE, PAPERS_HEAD]
    page.append(filter_form(("claimed", "implemented", "planned"), f"{len(rows)} papers"))
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(f"{row['theme']}/{row['chapter']}", []).append(row)
    here = [g for g in known if g in groups]
    coming = sorted((g for g in groups if g not in known), key=lambda g: list(THEMES).index(g.split("/")[0]))
    for group in here:
        page.append(f"## {THEMES[known[group]['theme']]}: {known[group]['title']}\n\n{GROUP}")
        page += [paper_entry(row, known, implemented, claims, claimed) for row in groups[group]]
    if coming:
        page.append(f"## What comes next\n\nThe chapters of these papers are not on the site yet.\n\n{GROUP}")
    for group in coming:
        theme, _, name = group.partition("/")
        page.append(f"### {THEMES[theme]}: {name.replace('-', ' ')}\n\n{GROUP}")
        page += [paper_entry(row, known, implemented, claims, claimed) for row in groups[group]]
    write(root / "book/reference/papers.md", "".join(page))


def paper_entry(row: dict, known: dict, implemented: dict, claims: list[dict], claimed: set[str]) -> str:
    """One paper of the index."""
    key, group = row["key"], f"{row['theme']}/{row['chapter']}"
    state = state_of(key, implemented, claimed)
    links = []
    if group in known:
        where = section_of(known[group]["text"], row["url"]) if row["url"] else ""
        page = f"../{group}.html" + (f"#{where}" if where else "")
        links.append(f'<a href="{page}">{"section" if where else "chapter"}</a>')
    for place, name in implemented.get(key, []):
        links.append(f'<a href="api/{place}.html#{name}"><code>{html.escape(name.rsplit(".", 1)[1])}</code></a>')
    links += [
        f'<a href="claims.html#{anchor(r["key"])}">claim: {html.escape(r["key"].split("/")[-1].replace("-", " "))}</a>'
        for r in claims
        if r.get("paper") == key
    ]
    title = f"[{escape(row['title'])}]({row['url']})" if row["url"] else escape(row["title"])
    return (
        f'<div class="fg-paper" id="{key}" data-fg-entry data-theme="{row["theme"]}" data-state="{state}">\n\n'
        f"**{title}**\n\n"
        f"{reference_line(row)}\n\n"
        f"{escape(row.get('idea') or '')}\n\n"
        f'<p class="fg-meta"><span class="fg-chip fg-{state}">{state}</span> {" · ".join(links)}</p>\n\n</div>\n\n'
    )


def measured(record: dict) -> str:
    """The measured means and spreads of a claim as one line of HTML."""
    from companion.show import spread

    shown = []
    for name, values in (record.get("values") or {}).items():
        limits = record.get("bounds") or {}
        bounds = [f"{kind.replace('_', ' ')} {limits[kind][name]}" for kind in limits if name in limits[kind]]
        must = f", must be {' and '.join(bounds)}" if bounds else ""
        shown.append(f"<code>{html.escape(name)}</code> {spread(values)}{must}")
    return "; ".join(shown) + f" ({record.get('seeds')} seeds)"


def claims_page(root: Path, known: dict[str, dict], rows: list[dict], claims: list[dict]) -> None:
    """What is claimed, the numbers behind it, and where."""
    by_key = {row["key"]: row for row in rows}
    page = [MADE, CLAIMS_HEAD]
    nothing = "No chapter with claims is on the site yet.\n\n"
    page.append(filter_form((), f"{len(claims)} claims") if claims else nothing)
    for key, chapter in known.items():
        mine = [record for record in claims if record["in"] == key]
        if not mine:
            continue
        page.append(f"## {THEMES[chapter['theme']]}: {chapter['title']}\n\n{GROUP}")
        for record in mine:
            paper = by_key.get(record.get("paper"))
            where = section_of(chapter["text"], paper["url"]) if paper else ""
            says = html.escape(str(record.get("statement") or record.get("says") or record["key"]))
            card = f"claim-{record['key'].replace('/', '-')}"
            links = [f'<a href="../{key}.html#{card}">card</a>']
            links += [f'<a href="../{key}.html#{where}">section</a>'] if where else []
            if paper:
                links.append(f'<a href="papers.html#{paper["key"]}">{html.escape(paper["label"])}</a>')
            page.append(
                f'<div class="fg-claim" id="{anchor(record["key"])}" data-fg-entry data-theme="{chapter["theme"]}">\n'
                f"<p>{says}</p>\n"
                f'<p class="fg-meta">{measured(record)}</p>\n'
                f'<p class="fg-meta">{" · ".join(links)}</p>\n</div>\n\n'
            )
    write(root / "book/reference/claims.md", "".join(page))


def bibtex(row: dict) -> str:
    """One paper as a BibTeX entry, with the fields that the register could confirm and its key of the register."""
    fields = {
        "title": f"{{{row['title']}}}",  # a second pair of braces keeps its capitals
        "author": " and ".join(row.get("authors") or []),
        "year": row.get("year"),
        "note": row.get("venue"),
        "url": row.get("url"),
    }
    plain = {name: str(value) for name, value in fields.items() if value}
    for name in plain.keys() - {"url"}:
        plain[name] = re.sub(r"([&%#_$])", r"\\\1", plain[name]).replace("^", r"\^{}")
    return f"@misc{{{row['key']},\n" + "".join(f"  {name} = {{{value}}},\n" for name, value in plain.items()) + "}\n"


def bibliography(root: Path, rows: list[dict]) -> None:
    """All papers by first author, and the same as a file for BibTeX."""
    write(
        root / "book/reference/references.bib", "\n".join(bibtex(row) for row in sorted(rows, key=lambda r: r["key"]))
    )
    page = [MADE, "# Bibliography\n\n", f"The {len(rows)} papers of the register by first author. "]
    page.append("A field that could not be confirmed is left out. The ideas stand in the [paper index](papers.md). ")
    page.append("For your own bibliography: {download}`all of them as BibTeX <references.bib>`.\n\n")
    for row in sorted(rows, key=lambda r: (r["label"].lower(), r["title"].lower())):
        title = f"[{escape(row['title'])}]({row['url']})" if row["url"] else escape(row["title"])
        page.append(f"- **{escape(row['label'])}.** {title}. {reference_line(row)}.\n")
    write(root / "book/reference/bibliography.md", "".join(page))


def build(root: Path = ROOT) -> dict[str, int]:
    """Write all generated pages and return how much is on them."""
    known, rows = chapters(root), register()
    implemented, claims = implementations(), all_claims(known)
    api_pages(root, known)
    paper_index(root, known, rows, implemented, claims)
    claims_page(root, known, rows, claims)
    bibliography(root, rows)
    return {"chapters": len(known), "papers": len(rows), "claims": len(claims)}


if __name__ == "__main__":
    print(", ".join(f"{count} {name}" for name, count in build().items()))
