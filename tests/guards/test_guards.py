"""The book passes its guards, and each guard finds what is planted."""

import json
import os
import re
import subprocess
import sys

import guards
import pytest

SETUP = re.search(
    r"^```\{code-cell\}[^\n]*\n.*?^```\n", (guards.HERE / "tools/chapter_template.md").read_text(), flags=re.S | re.M
)[0]
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
"""
CHAPTER = f"""{HEADER}
{SETUP}
## A section

Plain words with $\\lambda = 0.5$ and `alpha=0.2`.

## Exercises

### Exercise 1: by hand

### Exercise 2: in code

```{{code-cell}} ipython3
:tags: [exercise]

answer = ...
check("demo/2", answer)
```

### Exercise 3: in code

```{{code-cell}} ipython3
:tags: [exercise]

answer = ...
check("demo/3", answer)
```

### Exercise 4: open

## Solutions

```{{code-cell}} ipython3
:tags: [solution, hide-cell]

check("demo/2", 2)
check("demo/3", 3)
```
"""
MODULE = '''"""A module."""

__all__ = ["double"]


def double(x):
    """Return 2x.

    Paper: chidambaram2024limitations

    >>> double(2)
    4
    """
    return 2 * x
'''
ADDRESS = "https://github.com/some-people/some-book"


@pytest.fixture
def tree(tmp_path):
    """A small repository that no guard complains about."""
    files = {
        "pyproject.toml": f'[project]\ndynamic = ["version"]\n[project.urls]\nRepository = "{ADDRESS}"\n',
        "_config.yml": f"repository:\n  url: {ADDRESS}\n",
        "_toc.yml": "format: jb-book\nroot: book/intro\nchapters:\n  - file: book/calibration/demo.ipynb\n",
        "CHANGELOG.md": "# Changes\n\n## 1.2.0\n",
        "CITATION.cff": "version: 1.2.0\n",
        "book/intro.md": (
            f"# Intro\n\n[a chapter](calibration/demo.ipynb), [its code]({ADDRESS}/blob/main/companion/nets.py)\n"
        ),
        "book/calibration/demo.md": CHAPTER,
        "book/calibration/index.md": "# Calibration\n\n[Demo](demo.ipynb)\n",
        "companion/__init__.py": "",
        "companion/_version.py": '__version__ = "1.2.0"\n',
        "companion/nets.py": '"""Nets."""\n\nimport torch\n\n__all__ = []\n',
        "companion/calibration/__init__.py": (
            '"""A theme."""\n\nfrom companion.calibration.demo import double\n\n__all__ = ["double"]\n'
        ),
        "companion/calibration/demo.py": MODULE,
        "companion/exercises/calibration.py": 'CHECKS = {"demo/2": None, "demo/3": None}\n',
        "tests/exercises/test_calibration.py": 'KEYS = ["demo/2", "demo/3"]\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    guards.tool("pairs").sync(tmp_path / "book/calibration/demo.md")
    mark(tmp_path)
    return tmp_path


def mark(root):
    """Note in the notebook that its outputs are those of its cells, as tools/execute.py does."""
    pairs = guards.tool("pairs")
    text = root / "book/calibration/demo.md"
    notebook = pairs.paired(text)
    notebook.metadata["companion"] = {"sha256": pairs.fingerprint(notebook, text)}
    text.with_suffix(".ipynb").write_text(pairs.written(notebook), encoding="utf-8")


def edit(root, name, old, new):
    path = root / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def append(root, name, more):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text(encoding="utf-8") if path.exists() else "") + more, encoding="utf-8")


def output(root, data, source=None):
    """Give a cell of the planted notebook an output."""
    path = root / "book/calibration/demo.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cell = [c for c in notebook["cells"] if c["cell_type"] == "code"][-1]
    cell["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": data}]
    if source:
        cell["source"] = source
    path.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.mark.parametrize("name", sorted(guards.GUARDS))
def test_the_book_passes(name):
    found = guards.GUARDS[name](guards.HERE)
    assert not found, f"{len(found)} found by the guard {name}:\n" + "\n".join(found)


@pytest.mark.parametrize("name", sorted(set(guards.GUARDS) - {"register"}))
def test_the_small_tree_passes(tree, name):
    assert guards.GUARDS[name](tree) == []


DEMO, CODE = "book/calibration/demo.md", "companion/calibration/demo.py"
ALT = "A line that rises from left to right."
PLANTED = [
    # guard, what is planted, what the message must say
    ("imports", lambda r: append(r, "companion/nets.py", "from companion.calibration import double\n"), "no theme"),
    ("imports", lambda r: append(r, "companion/nets.py", "def f():\n    import companion.mixup\n"), "no theme"),
    ("imports", lambda r: append(r, CODE, "from companion import mixup\n"), "to the foundation"),
    ("imports", lambda r: append(r, CODE, "from companion.claims import claim\n"), "for notebooks"),
    ("imports", lambda r: append(r, CODE, "import torchvision\n"), "names the extra"),
    ("imports", lambda r: append(r, "companion/exercises/calibration.py", "import companion.mixup\n"), "own theme"),
    ("public_names", lambda r: edit(r, CODE, '__all__ = ["double"]', ""), "list its public names"),
    ("public_names", lambda r: edit(r, CODE, ">>> double(2)\n    4", ""), "has no example"),
    ("public_names", lambda r: edit(r, CODE, "Paper: chidambaram2024limitations", ""), "neither paper nor chapter"),
    (
        "public_names",
        lambda r: edit(r, CODE, '["double"]', '["double", "bare"]\n\n\ndef bare():\n    pass'),
        "has no docstring",
    ),
    (
        "public_names",
        lambda r: edit(r, "companion/calibration/__init__.py", '["double"]', "[]"),
        "does not export double",
    ),
    (
        "docstrings",
        lambda r: edit(r, CODE, "Return 2x.", "Return **2x.\n\n    Then:\n        - a\n      b"),
        "site does not build",
    ),
    ("pairs", lambda r: (r / "book/calibration/demo.ipynb").unlink(), "make notebooks"),
    ("pairs", lambda r: edit(r, DEMO, "Plain words", "Other words"), "differs from demo.md"),
    ("pairs", lambda r: edit(r, CODE, "return 2 * x", "return x + x"), "older module"),
    ("pairs", lambda r: append(r, "book/calibration/lonely.ipynb", "{}"), "has no text"),
    ("plain_markdown", lambda r: edit(r, DEMO, "Plain words", "See {ref}`there`"), "has a role"),
    ("plain_markdown", lambda r: edit(r, DEMO, "Plain words", "```{note}\nWords\n```\n"), "has a directive"),
    ("plain_markdown", lambda r: edit(r, DEMO, "Plain words", ":::{note}\nWords\n:::\n"), "has a directive"),
    ("plain_markdown", lambda r: edit(r, DEMO, "## A section", "(there)=\n## A section"), "a target"),
    ("plain_markdown", lambda r: edit(r, DEMO, "Plain words", "{{ words }}"), "a substitution"),
    ("decimals", lambda r: edit(r, DEMO, "Plain words", "The error is 0.13 here"), "types the number 0.13"),
    ("decimals", lambda r: edit(r, DEMO, "Plain words", "- It is right 95% of the time"), "types the number 95%"),
    (
        "decimals",
        lambda r: edit(r, DEMO, "Plain words", "Over 95.1 [here](https://example.org/x). Plain words"),
        "types the number 95.1",
    ),
    ("figures", lambda r: output(r, {"image/png": "aGk=", "text/plain": "<Figure>"}), "a bare picture"),
    (
        "figures",
        lambda r: output(r, {"text/html": "<figure><img src='x'><figcaption>It rises.</figcaption></figure>"}),
        "alt",
    ),
    ("figures", lambda r: output(r, {"text/html": f"<figure><img src='x' alt='{ALT}'></figure>"}), "without caption"),
    ("setup_cells", lambda r: edit(r, DEMO, "[setup, hide-cell]", "[hide-cell]"), "setup cell"),
    (
        "setup_cells",
        lambda r: append(
            r, "book/calibration/other.md", CHAPTER.replace("# on Colab: install", "# elsewhere: install")
        ),
        "differs from",
    ),
    ("budget", lambda r: output(r, {"text/plain": "x" * 900_000}), "at most 800 kB"),
    ("budget", lambda r: output(r, {"text/plain": "1"}, "import time\nstart = time.perf_counter()"), "measures time"),
    ("budget", lambda r: output(r, {"text/plain": "1"}, "x = 1\n" * 60), "60 lines"),
    ("exercises", lambda r: edit(r, DEMO, "### Exercise 4: open", ""), "has 3 exercises"),
    (
        "exercises",
        lambda r: edit(r, DEMO, 'answer = ...\ncheck("demo/3", answer)', "answer = ..."),
        "at least 2 must mark",
    ),
    ("exercises", lambda r: edit(r, DEMO, ":tags: [exercise]\n", ""), "tag each stub"),
    ("exercises", lambda r: edit(r, DEMO, "[solution, hide-cell]", "[solution]"), "not folded"),
    ("exercises", lambda r: edit(r, DEMO, 'check("demo/3", 3)', ""), "no solution ends in"),
    ("exercises", lambda r: edit(r, "companion/exercises/calibration.py", "demo/3", "demo/4"), "has no check demo/3"),
    ("exercises", lambda r: edit(r, "tests/exercises/test_calibration.py", "demo/3", "demo/4"), "does not test demo/3"),
    ("links", lambda r: append(r, "book/intro.md", "\n[gone](gone.md)\n"), "is no file"),
    (
        "links",
        lambda r: append(r, "book/intro.md", f"\n[gone]({ADDRESS}/blob/main/gone.py)\n"),
        "not in the repository",
    ),
    ("links", lambda r: append(r, "book/intro.md", "\n[text](calibration/demo.md)\n"), "link its .ipynb"),
    ("links", lambda r: edit(r, "_toc.yml", "book/calibration/demo.ipynb", "book/intro"), "not in _toc.yml"),
    ("identity", lambda r: edit(r, "CITATION.cff", "1.2.0", "1.1.0"), "make them one"),
    ("identity", lambda r: edit(r, "CHANGELOG.md", "1.2.0", "1.1.0"), "make them one"),
    ("identity", lambda r: append(r, "book/intro.md", "https://github.com/others/some-book"), "the repository is"),
    ("identity", lambda r: edit(r, "_config.yml", ADDRESS, ADDRESS + "-2"), "make them one"),
    ("identity", lambda r: append(r, "pyproject.toml", 'version = "1.2.0"\n'), "types a version"),
    ("addresses", lambda r: append(r, "book/intro.md", "https://py" + "pi.org/simple"), "leave registries"),
    ("addresses", lambda r: append(r, "companion/nets.py", 'PATH = "/ho' + 'me/me/data"\n'), "make it relative"),
    ("parts", lambda r: edit(r, "book/calibration/index.md", "[Demo](demo.ipynb)", "Demo"), "chapter map"),
    ("toc", lambda r: append(r, "_toc.yml", "  - file: book/calibration/demo.ipynb\n"), "twice"),
    ("toc", lambda r: edit(r, "_toc.yml", "demo.ipynb", "demo"), "without .ipynb"),
    ("toc", lambda r: append(r, "_toc.yml", "  - file: book/calibration/later.ipynb\n"), "does not exist"),
]


@pytest.mark.parametrize(("name", "plant", "says"), PLANTED, ids=[f"{p[0]}-{i}" for i, p in enumerate(PLANTED)])
def test_a_planted_violation_is_found(tree, name, plant, says):
    plant(tree)
    found = guards.GUARDS[name](tree)
    assert found
    assert any(says in message for message in found), found


def test_every_guard_has_a_planted_violation():
    assert {p[0] for p in PLANTED} | {"register"} == set(guards.GUARDS)


@pytest.mark.parametrize(
    ("chapter", "says"),
    [
        ("[Wrong label, 1999](https://arxiv.org/abs/2306.00740)", "label"),
        ("[Chidambaram and Ge, 2024](https://arxiv.org/abs/2306.00740)", "does not link its paper"),
    ],
)
def test_the_register_guard_finds_wrong_labels_and_missing_links(tree, chapter, says):
    (tree / "companion/calibration/demo.py").rename(tree / "companion/calibration/recalibration.py")
    text = CHAPTER.replace("Plain words", f"{chapter} says so. Plain words")
    append(tree, "book/calibration/recalibration.md", text)
    guards.tool("pairs").sync(tree / "book/calibration/recalibration.md")
    assert any(says in line for line in guards.GUARDS["register"](tree))


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (lambda r: edit(r, CODE, "chidambaram2024limitations", "nobody1999nothing"), "not in the register"),
        (
            lambda r: edit(r, DEMO, "Plain words", "[X](https://arxiv.org/abs/9999.99999) says. Plain words"),
            "not in the register",
        ),
    ],
)
def test_the_register_guard_finds_unknown_papers(tree, plant, says):
    assert not [line for line in guards.GUARDS["register"](tree) if says in line]
    plant(tree)
    assert any(says in line for line in guards.GUARDS["register"](tree))


def test_the_command_line_may_import_the_report_and_a_page_of_no_theme_needs_no_exercises(tree):
    append(tree, "companion/__main__.py", "from companion.report.command import main\n")
    append(tree, "book/checkup.md", HEADER)
    assert guards.GUARDS["imports"](tree) == []
    assert guards.GUARDS["exercises"](tree) == []


def test_a_quoted_number_beside_its_paper_is_fine(tree):
    linked = "[Chidambaram and Ge, 2024](https://arxiv.org/abs/2306.00740) report 95.1 there. Plain words"
    edit(tree, DEMO, "Plain words", linked)
    assert guards.GUARDS["decimals"](tree) == []


def nbval_hooks():
    """What book/conftest.py adds to nbval."""
    return guards.module(guards.HERE / "book" / "conftest.py")


def test_a_claim_that_drifted_is_found_and_one_that_did_not_is_left_alone():
    record = {"key": "demo/a", "statement": "it gains 1", "mean": {"gain": 2.0}, "sd": {"gain": 0.1}}
    near = {**record, "mean": {"gain": 2.15}}
    far = {**record, "mean": {"gain": 2.3}}
    assert nbval_hooks().drift({"demo/a": record}, {"demo/a": near}) == []
    assert any("the page says" in line for line in nbval_hooks().drift({"demo/a": record}, {"demo/a": far}))
    assert any("not on the page" in line for line in nbval_hooks().drift({}, {"demo/a": record}))
    assert any("did not make it" in line for line in nbval_hooks().drift({"demo/a": record}, {}))


def run_nbval(tree, *more):
    """Run the notebooks of a small tree as `make notebooks-test` does."""
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env", *more, "book"]
    environment = {**os.environ, "COMPANION_SEED": "0", "PYTHONPATH": str(guards.HERE)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.site
def test_a_drifted_notebook_fails_under_nbval(tree):
    """The whole way: a notebook whose committed record differs from its run fails, and says what to do."""
    folder = tree / "book/calibration"
    (tree / "book/conftest.py").write_text((guards.HERE / "book/conftest.py").read_text())
    source = (
        "from companion.claims import claim\nclaim('demo/a', paper='chidambaram2024limitations', says='it gains"
        " {gain}', at_least={'gain': 1}, gain=[2, 2.1, 2.2])"
    )
    record = {"key": "demo/a", "statement": "it gains 1", "mean": {"gain": 3.0}, "sd": {"gain": 0.1}}
    output(tree, {"text/plain": "", "application/vnd.companion.claim+json": record}, source)
    notebook = json.loads((folder / "demo.ipynb").read_text())
    notebook["cells"] = [cell for cell in notebook["cells"] if cell.get("outputs")]
    notebook["cells"][0]["execution_count"] = 1
    (folder / "demo.ipynb").write_text(json.dumps(notebook))
    done = run_nbval(tree)
    assert done.returncode == 1, done.stdout
    assert "the page is stale: run `make notebooks`" in done.stdout


def test_a_notebook_that_takes_too_long_is_found():
    over = nbval_hooks().over_budget
    assert over({"book/calibration/recalibration.ipynb": 40.0}) == []
    assert "split the chapter" in over({"book/calibration/recalibration.ipynb": 340.0})[0]


@pytest.mark.site
@pytest.mark.parametrize("more", [[], ["-n", "1", "--dist", "loadfile"]])
def test_a_slow_notebook_fails_its_run(tree, more):
    hooks = (guards.HERE / "book/conftest.py").read_text()
    (tree / "book/conftest.py").write_text(hooks.replace("SLACK = 5 ", "SLACK = 0.0001 "))
    output(tree, {"text/plain": "1"}, "import time; time.sleep(0.3)")
    notebook = json.loads((tree / "book/calibration/demo.ipynb").read_text())
    notebook["cells"] = [{**cell, "execution_count": 1} for cell in notebook["cells"] if cell.get("outputs")]
    (tree / "book/calibration/demo.ipynb").write_text(json.dumps(notebook))
    done = run_nbval(tree, *more)
    assert done.returncode == 1, done.stdout
    assert "its budget is" in done.stdout


@pytest.mark.site
def test_every_exercise_is_tested_with_its_solution_its_stub_and_two_wrong_answers(tmp_path):
    keys = []
    for text in guards.chapters(guards.HERE):
        keys += re.findall(rf"check\(\s*[\"']({re.escape(text.stem)}/[\w-]+)[\"']", text.read_text(encoding="utf-8"))
    notes = tmp_path / "verdicts.json"
    path = os.pathsep.join([str(guards.HERE / "tests/guards"), str(guards.HERE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "recorder", "-p", "no:cacheprovider", "tests/exercises"]
    environment = {**os.environ, "PYTHONPATH": path, "COMPANION_VERDICTS": str(notes)}
    done = subprocess.run(command, cwd=guards.HERE, env=environment, capture_output=True, text=True, check=False)
    assert notes.exists(), done.stdout[-3000:]
    found = guards.untested(json.loads(notes.read_text()), sorted(set(keys)))
    assert not found, "\n".join(found)


def test_an_exercise_without_planted_wrong_answers_is_found():
    whole = [("a/1", "correct", ""), ("a/1", "not attempted", ""), ("a/1", "not yet", "x"), ("a/1", "not yet", "y")]
    assert guards.untested(whole, ["a/1"]) == []
    for i, says in enumerate(["solution", "stub", "1 planted", "1 planted"]):
        assert says in guards.untested(whole[:i] + whole[i + 1 :], ["a/1"])[0]
    assert len(guards.untested([], ["a/1"])) == 3
