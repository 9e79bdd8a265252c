"""Tests of tools/pairs.py, execute.py, new_chapter.py and book/conftest.py on a small book of their own."""

import copy

import nbformat
import pytest

HEADER = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
    format_version: 0.13
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A chapter

```{code-cell} ipython3
:tags: [setup, hide-cell]

x = 1
```

Words.

```{code-cell} ipython3
print(x)
```
"""


@pytest.fixture
def pairs(script):
    return script("tools/pairs.py")


@pytest.fixture
def execute(script):
    return script("tools/execute.py")


@pytest.fixture
def root(tmp_path):
    """A repository with a space in its path."""
    root = tmp_path / "a book"
    for folder in ("book/calibration", "companion/calibration", "companion/papers/calibration", "tests/calibration"):
        (root / folder).mkdir(parents=True)
    (root / "companion/calibration/__init__.py").touch()
    (root / "companion/calibration/small_chapter.py").write_text("one = 1\n")
    (root / "book/calibration/small-chapter.md").write_text(HEADER)
    (root / "book/calibration/index.md").write_text("# Calibration\n")
    return root


@pytest.fixture
def text(root):
    return root / "book/calibration/small-chapter.md"


def fake_run(pairs, text):
    """Write outputs as an execution would."""
    notebook = pairs.paired(text)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"ran {cell.source}")]
    notebook.metadata["companion"] = {"sha256": pairs.fingerprint(notebook, text)}
    text.with_suffix(".ipynb").write_text(pairs.written(notebook))


def test_chapters_are_texts_with_a_header(pairs, root, text):
    assert pairs.chapters(root / "book") == [text]
    with pytest.raises(SystemExit, match="not a chapter"):
        pairs.named([str(root / "book/calibration/index.md")])
    assert pairs.named([str(text.with_suffix(".ipynb")), str(text)]) == [text]


def test_sync_writes_once_and_keeps_tags(pairs, text):
    assert pairs.sync(text)
    assert not pairs.sync(text)
    notebook = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[1].metadata["tags"] == ["setup", "hide-cell"]


def test_a_pair_is_well_only_when_its_outputs_are_fresh(pairs, text):
    assert "is missing" in pairs.problems(text)[0]
    pairs.sync(text)
    assert "older code cells" in pairs.problems(text)[0]
    fake_run(pairs, text)
    assert pairs.problems(text) == []
    assert not pairs.stale(text)


def test_prose_does_not_make_outputs_stale_code_does(pairs, text):
    fake_run(pairs, text)
    text.write_text(text.read_text().replace("Words.", "Other words."))
    assert "differs from" in pairs.problems(text)[0]
    assert not pairs.stale(text)
    pairs.sync(text)
    assert pairs.problems(text) == []
    text.write_text(text.read_text().replace("print(x)", "print(x + 1)"))
    assert pairs.stale(text)
    pairs.sync(text)
    cells = [cell for cell in pairs.paired(text).cells if cell.cell_type == "code"]
    assert cells[0].outputs, "an unchanged cell keeps its output"
    assert cells[1].outputs == [], "a changed cell does not show an old output"


def test_the_module_makes_outputs_stale_also_as_a_package(pairs, root, text):
    fake_run(pairs, text)
    module = root / "companion/calibration/small_chapter.py"
    module.write_text("one = 2\n")
    assert pairs.stale(text)
    module.unlink()
    package = root / "companion/calibration/small_chapter"
    package.mkdir()
    (package / "__init__.py").write_text("one = 1\n")
    (package / "more.py").touch()
    assert [path.name for path in pairs.modules(text)] == ["__init__.py", "more.py"]


def test_a_page_of_the_book_itself_goes_stale_with_the_package_it_is_about(pairs, root):
    page = root / "book/checkup.md"
    page.write_text(HEADER)
    (root / "companion/report").mkdir()
    (root / "companion/report/lenses.py").write_text("one = 1\n")
    fake_run(pairs, page)
    assert not pairs.stale(page)
    (root / "companion/report/lenses.py").write_text("one = 2\n")
    assert pairs.stale(page)


def test_the_text_wins_over_the_notebook(pairs, text):
    fake_run(pairs, text)
    twin = text.with_suffix(".ipynb")
    twin.write_text(twin.read_text().replace("Words.", "Edited in the notebook."))
    assert "edits made in the notebook are lost" in pairs.problems(text)[0]
    pairs.sync(text)
    assert "Edited" not in twin.read_text()
    assert "Words." in text.read_text()


def test_cell_ids_survive_edits_elsewhere_and_are_unique(pairs, text):
    before = pairs.cell_ids(pairs.paired(text))
    text.write_text(text.read_text().replace("Words.", "New words.") + "\n```{code-cell} ipython3\nprint(x)\n```\n")
    after = pairs.cell_ids(pairs.paired(text))
    assert before[1] == after[1]
    assert before[3] == after[3]
    assert len(set(after)) == len(after)


def test_damaged_and_fat_notebooks(pairs, text):
    twin = text.with_suffix(".ipynb")
    twin.write_text("{ not json")
    assert "damaged" in pairs.problems(text)[0]
    fake_run(pairs, text)
    notebook = nbformat.read(twin, as_version=4)
    notebook.cells[1].outputs[0].text = "x" * pairs.MAX_BYTES
    twin.write_text(pairs.written(notebook))
    assert "kB" in pairs.problems(text)[-1]


def test_clean_makes_two_runs_alike(execute):
    cell = nbformat.v4.new_code_cell("x", metadata={"execution": {"iopub.status.busy": "now"}})
    stream = nbformat.v4.new_output
    cell.outputs = [
        stream("stream", name="stdout", text="a"),
        stream(
            "stream", name="stderr", text="[IPKernelApp] WARNING | Kernel is running over TCP without encryption.\n"
        ),
        stream("display_data", data={"text/plain": "p"}),
        stream("stream", name="stdout", text="b"),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_markdown_cell("w")])
    execute.clean(notebook)
    assert "execution" not in cell.metadata
    assert [(o.output_type, o.get("text")) for o in cell.outputs] == [("stream", "ab"), ("display_data", None)]


def test_budget_of_a_chapter(execute, tmp_path):
    assert execute.budget(tmp_path / "recalibration.md") == 15 + 8 * 4
    assert execute.budget(tmp_path / "mechanisms.md") == 90
    assert execute.budget(tmp_path / "unknown.md") == 15


def test_outputs_are_made_with_base_seed_0(execute, monkeypatch):
    monkeypatch.setenv("COMPANION_SEED", "7")
    with pytest.raises(SystemExit):
        execute.main([])


def test_execution_writes_outputs_and_a_failing_cell_writes_nothing(execute, pairs, text):
    result = execute.run(text)
    assert result.error == ""
    assert pairs.problems(text) == []
    twin = text.with_suffix(".ipynb")
    before = twin.read_bytes()
    assert b'"1\\n"' in before
    text.write_text(text.read_text().replace("print(x)", "1 / 0"))
    result = execute.run(text)
    assert "ZeroDivisionError" in result.error
    assert twin.read_bytes() == before


@pytest.fixture
def scaffold(script, monkeypatch, root):
    module = script("tools/new_chapter.py")
    monkeypatch.setattr(module, "ROOT", root)
    return module


def test_a_new_chapter_has_four_files_and_is_a_chapter(scaffold, pairs, root, capsys):
    assert scaffold.main(["calibration", "fresh-start"]) == 0
    for path in (
        "book/calibration/fresh-start.md",
        "companion/calibration/fresh_start.py",
        "tests/calibration/test_fresh_start.py",
        "companion/papers/calibration/fresh-start.yml",
    ):
        assert (root / path).exists(), path
    text = root / "book/calibration/fresh-start.md"
    assert text in pairs.chapters(root / "book")
    assert "<name>" not in text.read_text()
    for cell in pairs.paired(text).cells:
        if cell.cell_type == "code":
            compile(cell.source, "cell", "exec")
    assert "make notebooks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("theme", "name", "match"),
    [
        ("nothing", "fresh", "theme to be one of calibration"),
        ("calibration", "Fresh Start", "lower case"),
        ("calibration", "../evil", "lower case"),
        ("calibration", "lambda", "cannot be the name"),
        ("calibration", "index", "cannot be the name"),
        ("calibration", "small-chapter", "exists already"),
    ],
)
def test_bad_names_are_refused_and_write_nothing(scaffold, root, theme, name, match):
    before = sorted(root.rglob("*"))
    with pytest.raises(scaffold.Refused, match=match):
        scaffold.new_chapter(theme, name, root)
    assert sorted(root.rglob("*")) == before


def test_names_are_asked_for(scaffold, capsys):
    assert scaffold.main(["", ""]) == 2
    assert "make new-chapter theme=" in capsys.readouterr().err


RECORD = {"key": "a/b", "statement": "s", "mean": {"T": 2.0}, "sd": {"T": 0.1}}


@pytest.mark.parametrize(
    ("mean", "sd", "moved", "drifts"),
    [
        (2.0, 0.1, 2.19, False),
        (2.0, 0.1, 2.21, True),
        (2.0, 0.0, 2.03, False),
        (2.0, 0.0, 1.95, True),
        (0.0, 0.0, 0.0, False),
    ],
)
def test_drift_is_two_standard_deviations_or_two_percent(script, mean, sd, moved, drifts):
    guard = script("book/conftest.py")
    before, now = copy.deepcopy(RECORD), copy.deepcopy(RECORD)
    before["mean"]["T"], before["sd"]["T"], now["mean"]["T"] = mean, sd, moved
    assert bool(guard.drift({"a/b": before}, {"a/b": now})) == drifts


def test_claims_that_come_go_or_change_their_words(script):
    guard = script("book/conftest.py")
    other = {**RECORD, "statement": "t", "mean": {"U": 2.0}}
    assert "did not make it" in guard.drift({"a/b": RECORD}, {})[0]
    assert "not on the page" in guard.drift({}, {"a/b": RECORD})[0]
    assert len(guard.drift({"a/b": RECORD}, {"a/b": other})) == 2
    outputs = [{"output_type": "stream"}, {"data": {guard.CLAIM: RECORD}}]
    assert guard.records(outputs) == {"a/b": RECORD}
