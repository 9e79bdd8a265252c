"""What this site needs of Sphinx beyond its configuration.

Drops the scripts that would ask other servers for something, leads a report's links to chapters to their pages,
and turns the few conventions of our docstrings (`$...$`, `Paper: key`, `Chapter: theme/chapter`) into mathematics
and links.
"""

import re

DOCTEST = re.compile(r"\s*(>>>|\.\.\.)")
PAPER = re.compile(r"(\s*)Papers?:\s*([\w-]+(?:[\s,]+[\w-]+)*)\.?\s*")
CHAPTER = re.compile(r"(\s*)Chapters?:\s*`*([\w-]+/[\w-]+)`*\.?\s*")


def drop_remote_scripts(app, pagename, templatename, context, doctree):
    """Thebe's loader names a script on another server, and is added twice."""
    for kind in ("script_files", "css_files"):
        if kind in context:
            context[kind] = [asset for asset in context[kind] if "thebe" not in _text(asset)]


def chapters_on_the_site(app, pagename, templatename, context, doctree):
    """A report names the notebook in the repository, which is right anywhere else: here the chapter is at hand."""
    book = re.escape(app.config.html_theme_options.get("repository_url", "")) + r"/blob/\w+/(book/[\w/-]+)\.ipynb"

    def lead(link: re.Match) -> str:
        known = link[1] in app.env.found_docs
        return f'<a href="{context["pathto"](link[1])}"' if known else link[0]

    if "body" in context:
        context["body"] = re.sub(rf'<a href="{book}"', lead, context["body"])


def _text(asset) -> str:
    attributes = getattr(asset, "attributes", None) or {}
    return f"{getattr(asset, 'filename', '')} {attributes.get('body', '')} {asset if isinstance(asset, str) else ''}"


def to_rst(lines: list[str], paper_link=None, chapter_link=None) -> list[str]:
    """Return the lines of a docstring with mathematics, papers and chapters written as Sphinx reads them.

    Args:
        lines: of the docstring, its Google sections read already.
        paper_link: from a key to reStructuredText.
        chapter_link: from `theme/chapter` to reStructuredText.
    """
    paper_link = paper_link or (lambda key: f"``{key}``")
    chapter_link = chapter_link or (lambda name: f"``{name}``")
    out: list[str] = []
    block: list[str] = []

    def flush():
        if block:
            out.extend(_prose("\n".join(block)).split("\n"))
            block.clear()

    example = False
    for line in lines:
        example = bool(DOCTEST.match(line)) or (example and bool(line.strip()))
        paper, chapter = PAPER.fullmatch(line), CHAPTER.fullmatch(line)
        if example or not line.strip():
            flush()
            out.append(line)
        elif paper:
            flush()
            links = [paper_link(key) for key in re.findall(r"[\w-]+", paper[2])]
            out.extend(["", f"{paper[1]}:Paper: {', '.join(links)}", ""])
        elif chapter:
            flush()
            out.extend(["", f"{chapter[1]}:Chapter: {chapter_link(chapter[2])}", ""])
        else:
            block.append(line)
    flush()
    return out


def _prose(text: str) -> str:
    """Mathematics between dollars as roles; bars and underscores outside code as themselves."""
    parts = re.split(
        r"(``.+?``|:[\w:+-]+:`[^`]+`|`[^`\n]+`_{0,2}|\$\$.+?\$\$|(?<![\\\w$])\$[^$]+?\$(?![\w$]))", text, flags=re.S
    )
    for i, part in enumerate(parts):
        if i % 2 and part.startswith("$"):
            parts[i] = f":math:`{' '.join(part.strip('$').split())}`"
        elif not i % 2:
            # "d: C." would begin a list.
            part = re.sub(r"^(\s*:\w+ [^:\n]+:\s+)([A-Za-z]\.)(?=\s|$)", r"\1\\\2", part, flags=re.M)
            part = re.sub(r"(?<=\w)_(?=[\s.,;:)\]]|$)", r"\\_", part)
            part = "".join(
                piece if j % 2 else re.sub(r"(?<!\\)\*", r"\\*", piece)
                for j, piece in enumerate(
                    re.split(r"(\*\*[^*\s][^*\n]*\*\*|(?<![\w*])\*[^*\s][^*\n]*\*(?![\w*])|^\s*\* )", part)
                )
            )
            parts[i] = re.sub(r"(?<!\\)\|(?=\S)|(?<=\S)(?<!\\)\|", r"\\|", part)
    return "".join(parts)


def conventions(app, what, name, obj, options, lines):
    """Rewrite one docstring in place, after its Google sections were read."""
    from companion import papers

    known = {paper.key: paper for paper in papers.papers()}

    def paper_link(key):
        paper = known.get(key)
        return f"`{paper.title.strip()} <{paper.url}>`__" if paper and paper.url else f"``{key}``"

    def chapter_link(chapter):
        document = f"book/{chapter}"
        return f":doc:`/{document}`" if document in app.env.found_docs else f"``{chapter}``"

    lines[:] = to_rst(lines, paper_link, chapter_link)


def skip_inherited(app, what, name, obj, skip, options):
    """scikit-learn writes its routing methods into every estimator; its own pages explain them."""
    if name == "__call__":
        return False  # chapters show it, and link it
    return True if re.fullmatch(r"set_\w+_request|get_metadata_routing", name) else None


def public_bases(app, name, obj, options, bases):
    """A private base class says nothing to a reader: its own bases stand in for it."""
    shown = []
    for base in bases:
        while getattr(base, "__name__", "").startswith("_") and getattr(base, "__bases__", ()):
            base = base.__bases__[0]
        shown.append(base)
    bases[:] = shown


def setup(app):
    """Connect the hooks."""
    app.connect("html-page-context", drop_remote_scripts, priority=900)
    app.connect("html-page-context", chapters_on_the_site)
    app.connect("autodoc-process-docstring", conventions, priority=600)
    app.connect("autodoc-skip-member", skip_inherited)
    app.connect("autodoc-process-bases", public_bases)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
