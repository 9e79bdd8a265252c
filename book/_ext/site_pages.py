"""What this site needs of Sphinx beyond its configuration.

Drops the scripts that would ask other servers for something, and turns the few conventions of our docstrings
(`$...$`, `Paper: key`, `Chapter: theme/chapter`) into mathematics and links.
"""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
REGISTER = ROOT / "companion" / "papers"


def _registered() -> dict:
    """Every paper of the register by its key."""
    rows = {}
    for file in sorted(REGISTER.glob("*/*.yml")):
        loaded = yaml.safe_load(file.read_text(encoding="utf-8")) or []
        for row in loaded if isinstance(loaded, list) else loaded.get("papers", []):
            rows[row["key"]] = row
    return rows


def drop_remote_scripts(app, pagename, templatename, context, doctree):
    """Thebe's loader names a script on another server, and is added twice."""
    if "script_files" in context:
        context["script_files"] = [s for s in context["script_files"] if "thebe" not in _text(s)]
    if "css_files" in context:
        context["css_files"] = [s for s in context["css_files"] if "thebe" not in _text(s)]


def _text(asset) -> str:
    attributes = getattr(asset, "attributes", {}) or {}
    return f"{getattr(asset, 'filename', '')} {attributes.get('body', '')} {asset if isinstance(asset, str) else ''}"


def conventions_to_rst(app, what, name, obj, options, lines):
    """Rewrite mathematics, papers and chapters of one docstring, in place."""
    if not hasattr(app, "companion_register"):
        app.companion_register = _registered()
    out = []
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        paper = re.fullmatch(r"\s*Papers?:\s*(\S.*)", line)
        chapter = re.fullmatch(r"\s*Chapters?:\s*`*([\w-]+/[\w-]+)`*\.?\s*", line)
        if paper:
            links = [_paper_link(key, app.companion_register) for key in re.findall(r"[\w-]+", paper[1])]
            out += ["", f"{indent}:Paper: {', '.join(links)}"]
        elif chapter:
            out += ["", f"{indent}:Chapter: {_chapter_link(app, chapter[1])}"]
        elif line.lstrip().startswith(">>>") or line.lstrip().startswith("..."):
            out.append(line)
        else:
            out.append(_mathematics(line))
    lines[:] = out


def _mathematics(line: str) -> str:
    return re.sub(r"(?<![\\$\w])\$([^$\n]+?)\$(?![\w$])", lambda m: f":math:`{m[1].strip()}`", line)


def _paper_link(key: str, register: dict) -> str:
    row = register.get(key)
    return f"`{row['title'].strip()} <{row['url']}>`__" if row and row.get("url") else f"``{key}``"


def _chapter_link(app, chapter: str) -> str:
    document = f"book/{chapter}"
    return f":doc:`/{document}`" if document in app.env.found_docs else f"``{chapter}``"


def setup(app):
    """Connect the two hooks."""
    app.connect("html-page-context", drop_remote_scripts, priority=900)
    app.connect("autodoc-process-docstring", conventions_to_rst, priority=400)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
