"""Keep each chapter's text (md) and its notebook (ipynb) one thing. The text always wins.

python tools/pairs.py sync [chapters]     write the text into the notebook, keep outputs
python tools/pairs.py check [chapters]    fail when a pair is out of step or its outputs are stale
"""

import argparse
import hashlib
import sys
from collections import Counter
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 800_000
FIX = "run `make notebooks`"
PAGES = {"checkup": "report"}  # pages of the book itself, of no theme, and the package each is about


def chapters(book: Path = ROOT / "book") -> list[Path]:
    """Return the texts of all chapters: the md files under the book that have a jupytext header."""
    return [path for path in sorted(book.rglob("*.md")) if is_chapter(path)]


def is_chapter(path: Path) -> bool:
    """Return whether a file is the text of a chapter."""
    if path.suffix != ".md" or not path.is_file() or any(part.startswith((".", "_")) for part in path.parts[-3:-1]):
        return False
    head = path.read_text(encoding="utf-8").split("\n---", 1)[0]
    return head.startswith("---\n") and "\njupytext:" in head


def named(paths: list[str], book: Path = ROOT / "book") -> list[Path]:
    """Return the texts of the chapters named on the command line, or of all.

    Args:
        paths: texts or notebooks; none for all chapters.
        book: where chapters are.

    Raises:
        SystemExit: a path is no chapter.
    """
    if not paths:
        return chapters(book)
    found = [Path(path).resolve().with_suffix(".md") for path in paths]
    for given, text in zip(paths, found):
        if not is_chapter(text):
            raise SystemExit(f"{given} is not a chapter: expected {text.name} with a jupytext header")
    return list(dict.fromkeys(found))


def modules(text: Path) -> list[Path]:
    """Return the chapter's own module: companion/<theme>/<chapter>.py, or each file of the package of that name."""
    if text.parent.name == "book" and text.stem in PAGES:
        return sorted((text.parent.parent / "companion" / PAGES[text.stem]).rglob("*.py"))
    home = text.parent.parent.parent / "companion" / text.parent.name / text.stem.replace("-", "_")
    single = home.with_suffix(".py")
    return [single] if single.exists() else sorted(home.rglob("*.py"))


def fingerprint(notebook: nbformat.NotebookNode, text: Path) -> str:
    """Return the sha256 of what outputs depend on: the code cells and the chapter's own module."""
    digest = hashlib.sha256()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            digest.update(cell.source.rstrip().encode() + b"\0")
    for path in modules(text):
        digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def paired(text: Path) -> nbformat.NotebookNode:
    """Return the notebook a text should have: cells from the text, outputs from the notebook there is."""
    notebook = jupytext.read(text)
    twin = text.with_suffix(".ipynb")
    old = _read(twin)
    if old is not None:
        before = [(cell.source, cell.get("outputs"), cell.get("execution_count")) for cell in old.cells if _ran(cell)]
        notebook = combine_inputs_with_outputs(notebook, old, fmt="md:myst")
        _only_true_outputs(notebook, before)
        if "companion" in old.metadata:
            notebook.metadata["companion"] = old.metadata["companion"]
    notebook.metadata.pop("language_info", None)
    notebook.metadata.get("jupytext", {}).pop("text_representation", None)
    if not notebook.metadata.get("jupytext", True):
        del notebook.metadata["jupytext"]
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell, name in zip(notebook.cells, cell_ids(notebook)):
        cell["id"] = name
        if cell.cell_type == "code":
            cell.setdefault("outputs", [])
            cell.setdefault("execution_count", None)
    return notebook


def _read(twin: Path) -> nbformat.NotebookNode | None:
    """The notebook there is; a damaged one counts as none, because everything but its outputs is in the text."""
    try:
        return nbformat.read(twin, as_version=4)
    except (FileNotFoundError, nbformat.reader.NotJSONError, ValueError, AttributeError, KeyError):
        return None


def _ran(cell: nbformat.NotebookNode) -> bool:
    return cell.cell_type == "code" and bool(cell.get("outputs") or cell.get("execution_count"))


def _only_true_outputs(notebook: nbformat.NotebookNode, before: list) -> None:
    """Drop the outputs of changed cells: jupytext keeps them, and a reader would take them for the new ones."""
    sources = Counter(source for source, _, _ in before)
    for cell in notebook.cells:
        if cell.cell_type == "code" and not sources[cell.source]:
            cell.outputs, cell.execution_count = [], None


def cell_ids(notebook: nbformat.NotebookNode) -> list[str]:
    """Return an id per cell that depends on its content, so that an edit elsewhere changes no other id."""
    seen: Counter[str] = Counter()
    ids = []
    for cell in notebook.cells:
        name = hashlib.sha256(f"{cell.cell_type}\0{cell.source}".encode()).hexdigest()[:12]
        seen[name] += 1
        ids.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return ids


def written(notebook: nbformat.NotebookNode) -> str:
    """Return the text of a notebook file."""
    return nbformat.writes(notebook, version=4) + "\n"


def sync(text: Path) -> bool:
    """Write a chapter's text into its notebook; return whether that changed anything."""
    twin = text.with_suffix(".ipynb")
    new = written(paired(text))
    if twin.exists() and twin.read_text(encoding="utf-8") == new:
        return False
    twin.write_text(new, encoding="utf-8")
    return True


def stale(text: Path) -> bool:
    """Return whether the outputs of a chapter's notebook are older than its code cells or its module."""
    notebook = paired(text)
    return notebook.metadata.get("companion", {}).get("sha256") != fingerprint(notebook, text)


def problems(text: Path) -> list[str]:
    """Return what is wrong with a pair, as sentences that say how to mend it."""
    twin = text.with_suffix(".ipynb")
    name = shown(twin)
    if not twin.exists():
        return [f"{name} is missing: {FIX}, then commit it"]
    if _read(twin) is None:
        return [f"{name} is damaged and cannot be read: {FIX}, then commit it"]
    notebook, current = paired(text), twin.read_text(encoding="utf-8")
    found = []
    if current != written(notebook):
        found.append(f"{name} differs from {text.name}: {FIX} (the text wins; edits made in the notebook are lost)")
    if notebook.metadata.get("companion", {}).get("sha256") != fingerprint(notebook, text):
        found.append(f"{name} shows outputs of older code cells or of an older module: {FIX}, then commit it")
    if len(current.encode()) > MAX_BYTES:
        found.append(f"{name} has {len(current.encode()) / 1000:.0f} kB, at most {MAX_BYTES / 1000:.0f} are allowed")
    return found


def shown(path: Path) -> str:
    """Return a path as people know it: from the root of the repository."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["sync", "check"])
    parser.add_argument("paths", nargs="*", help="texts or notebooks of chapters; all when none is named")
    given = parser.parse_args(arguments)
    texts = named(given.paths)
    if given.action == "sync":
        for text in texts:
            if sync(text):
                print(f"wrote {shown(text.with_suffix('.ipynb'))}")
        return 0
    found = [problem for text in texts for problem in problems(text)]
    if not given.paths:
        lonely = [path for path in sorted((ROOT / "book").rglob("*.ipynb")) if not is_chapter(path.with_suffix(".md"))]
        lonely = [path for path in lonely if ".ipynb_checkpoints" not in path.parts]
        found += [f"{shown(path)} has no text: expected {path.stem}.md with a jupytext header" for path in lonely]
    for problem in found:
        print(problem, file=sys.stderr)
    print(f"{len(texts)} pair(s), {len(found)} problem(s)")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
