"""Tests of tools/students.py on the book's own chapters."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


@pytest.fixture
def students(script):
    return script("tools/students.py")


@pytest.fixture
def pairs(script):
    return script("tools/pairs.py")


def test_solutions_go_and_everything_else_stays(students):
    cells = [
        new_markdown_cell("# A chapter"),
        new_code_cell("peek = 1", metadata={"tags": ["solution"]}),
        new_markdown_cell("## Exercises"),
        new_code_cell("answer = ...", metadata={"tags": ["exercise"]}),
        new_markdown_cell("## Solutions\n\nSeven."),
        new_code_cell("answer = 7"),
        new_markdown_cell("### Why\n\nBecause."),
        new_markdown_cell("## Summary"),
    ]
    whole = new_notebook(cells=cells)
    kept = [cell.source for cell in students.without_solutions(whole).cells]
    assert kept == ["# A chapter", "## Exercises", "answer = ...", "## Summary"]
    assert len(whole.cells) == len(cells)


def test_a_section_that_begins_and_ends_within_a_cell_goes_too(students):
    cells = [
        new_markdown_cell("### Exercise 5: open\n\nWhy?\n\n## Solutions\n\n### Solution 1\n\nSeven."),
        new_code_cell("answer = 7", metadata={"tags": ["solution"]}),
        new_markdown_cell("### Solution 2\n\n```python\n## Summary\n```\n\n## Summary\n\n- It ends."),
    ]
    kept = [cell.source for cell in students.without_solutions(new_notebook(cells=cells)).cells]
    assert kept == ["### Exercise 5: open\n\nWhy?", "## Summary\n\n- It ends."]


def test_every_chapter_has_solutions_to_take_out_and_keeps_its_exercises(students, pairs, tmp_path, capsys):
    students.main(["--to", str(tmp_path)])
    assert str(tmp_path) in capsys.readouterr().out
    for text in pairs.chapters():
        if "exercise" not in text.read_text(encoding="utf-8"):
            continue
        whole = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
        edition = nbformat.read(tmp_path / text.parent.name / f"{text.stem}.ipynb", as_version=4)
        nbformat.validate(edition)
        tags = [tag for cell in edition.cells for tag in cell.metadata.get("tags", [])]
        before = [tag for cell in whole.cells for tag in cell.metadata.get("tags", [])]
        assert "solution" in before, text
        assert "solution" not in tags, text
        prose = "\n".join(cell.source for cell in edition.cells if cell.cell_type == "markdown")
        for left in ("## Solutions", "### Solution", "**Exercise 1"):
            assert left not in prose, (text, left)
        assert "## Summary" in prose, text
        assert tags.count("exercise") == before.count("exercise") > 0, text
