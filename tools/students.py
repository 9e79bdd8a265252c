"""Write the students' edition: every chapter's notebook without its solutions, to _build/students.

python tools/students.py [chapters]
"""

import argparse
from pathlib import Path

import nbformat
import pairs


def without_solutions(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a copy without the section called Solutions and without any cell tagged so.

    A section may begin and end within a cell: the text between two code cells is one cell, whatever its headings.
    """
    kept, inside = [], False
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            if not inside and "solution" not in cell.metadata.get("tags", []):
                kept.append(cell)
            continue
        lines, fenced = [], False
        for line in cell.source.split("\n"):
            fenced ^= line.lstrip().startswith("```")
            if not fenced and line.startswith("## "):
                inside = line.strip() == "## Solutions"
            if not inside:
                lines.append(line)
        source = "\n".join(lines).strip()
        if source or not cell.source.strip():
            kept.append(nbformat.from_dict({**cell, "source": source}))
    copy = nbformat.from_dict(notebook)
    copy.cells = kept
    return copy


def main(arguments: list[str] | None = None) -> None:
    """Write the edition and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", help="texts or notebooks; none for all")
    parser.add_argument("--to", type=Path, default=pairs.ROOT / "_build/students")
    options = parser.parse_args(arguments)
    for text in pairs.named(options.chapters):
        notebook = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
        target = options.to / text.parent.name / f"{text.stem}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(without_solutions(notebook), target)
    print(f"The students' edition is in {options.to}")


if __name__ == "__main__":
    main()
