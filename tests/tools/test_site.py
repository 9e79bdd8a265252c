"""Tests of the site's builder: the same pages from several processes as from one, and nothing stale on them."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = """Page {n}
======

See :doc:`page{next}` and :func:`thing.page{n}`, the word{n} of a search.

.. code-block:: python

   x = {n}

A section {n}
-------------

.. figure:: dot.png
   :alt: a dot

   A dot, and then some.

.. autofunction:: thing.page{n}
"""
CONF = """
import sys
sys.path[:0] = [{here!r}, {extensions!r}]
project, html_theme = "Demo", "sphinx_book_theme"
extensions = ["sphinx_external_toc", "sphinx.ext.autodoc", "sphinx.ext.viewcode", *{more!r}]
autodoc_preserve_defaults = True
html_theme_options = {{"show_navbar_depth": 1}}
"""


@pytest.fixture
def site(script):
    return script("tools/site.py")


@pytest.fixture
def builder(script):
    return script("book/_ext/site_builder.py")


def test_piles_are_about_equally_heavy_and_hold_every_name_once(builder):
    weights = {f"page{n}": (n * 37) % 11 + 1 for n in range(40)}
    found = builder.piles(weights, 3)
    assert sorted(name for pile in found for name in pile) == sorted(weights)
    loads = [sum(weights[name] for name in pile) for pile in found]
    assert max(loads) - min(loads) <= max(weights.values())
    assert found == builder.piles(dict(reversed(weights.items())), 3), "the order of the pages decides"


@pytest.mark.parametrize(("count", "names"), [(4, "ab"), (2, ""), (1, "abc")])
def test_there_are_never_empty_piles(builder, count, names):
    found = builder.piles(dict.fromkeys(names, 1), count)
    assert len(found) == min(count, len(names))
    assert all(found)


def test_a_heavy_page_has_a_pile_of_its_own(builder):
    assert ["api"] in builder.piles({"api": 100, "a": 1, "b": 2, "c": 3}, 2)


def project(folder, more, wrong=""):
    """A small Sphinx project in a folder."""
    source = folder / "source"
    source.mkdir(parents=True)
    (source / "conf.py").write_text(
        CONF.format(here=str(source), extensions=str(ROOT / "book" / "_ext"), more=more), encoding="utf-8"
    )
    (source / "dot.png").write_bytes((ROOT / "book/_static/question-mixup.png").read_bytes())
    code = "\n\n".join(f"def page{n}(x=1e-{n}):\n    '''Return {n}.'''\n    return {n}" for n in range(8))
    (source / "thing.py").write_text(f"'''A thing.'''\n\n{code}\n", encoding="utf-8")
    for n in range(8):
        (source / f"page{n}.rst").write_text(PAGE.format(n=n, next=(n + 1) % 8), encoding="utf-8")
    (source / "page5.rst").open("a", encoding="utf-8").write(wrong)
    toc = "\n".join(f"  - file: page{n}" for n in range(1, 8))
    (source / "_toc.yml").write_text(f"format: jb-book\nroot: page0\nchapters:\n{toc}\n", encoding="utf-8")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-n", "--keep-going", "-j", "2", "-b", "html"]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    return subprocess.run(
        [*command, str(source), str(folder / "html")], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.site
def test_several_processes_write_the_pages_that_one_writes(tmp_path):
    for name, more in (("ours", ["site_builder"]), ("sphinx", [])):
        done = project(tmp_path / name, more)
        # Sphinx alone warns that it reads on one process: that is what is compared with.
        assert not re.search("WARNING(?!.*(parallel|serial) read)", done.stderr), done.stderr
    kinds = (".html", ".js", ".css", ".png")
    ours, theirs = (
        {path.relative_to(html): path.read_bytes() for path in html.rglob("*") if path.suffix in kinds}
        for html in (tmp_path / "ours" / "html", tmp_path / "sphinx" / "html")
    )
    assert ours.keys() == theirs.keys()
    assert len([name for name in ours if name.suffix == ".html"]) >= 12
    assert not [str(name) for name in ours if ours[name] != theirs[name]]


@pytest.mark.site
@pytest.mark.parametrize(
    ("wrong", "says"),
    [("\n.. nothing::\n", "Unknown directive"), ("\nSee :ref:`nowhere`.\n", "undefined label")],
)
def test_a_warning_in_one_of_the_processes_fails_the_build(tmp_path, wrong, says):
    done = project(tmp_path, ["site_builder"], wrong)
    assert done.returncode == 1
    assert says in done.stderr
    assert "page5.rst" in done.stderr


@pytest.fixture
def checkout(site, tmp_path, monkeypatch):
    """A checkout with a built site, and a `build` whose parts only note that they ran."""
    files = {
        "_config.yml": "title: x",
        "_toc.yml": "root: a",
        "book/intro.md": "# Intro",
        "book/mixup/mixing.ipynb": "{}",
        "book/_static/book.css": "a {}",
        "companion/__init__.py": "",
        "companion/papers/mixup/mixing.yml": "[]",
        "tools/site.py": "",
        "_build/html/index.html": "<html>",
        "_build/html/book/intro.html": "<html>",
        "_build/.doctrees/book/intro.doctree": "",
        "_build/.doctrees/book/mixup/mixing.doctree": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    ran = []

    def jupyter_book(command):
        ran.append(sorted(path.stem for path in (tmp_path / "_build").rglob("*.doctree")))
        (tmp_path / "_build/html/book").mkdir(parents=True, exist_ok=True)
        (tmp_path / "_build/html/index.html").write_text("", encoding="utf-8")
        (tmp_path / "_build/html/book/intro.html").write_text("", encoding="utf-8")
        return site.planned_status

    monkeypatch.setattr(site, "planned_status", 0, raising=False)
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "HTML", tmp_path / "_build" / "html")
    monkeypatch.setattr(site, "MARKS", tmp_path / "_build" / "marks.json")
    monkeypatch.setattr(site, "gc", types.SimpleNamespace(disable=lambda: None))
    monkeypatch.setattr(site, "jupyter_book", jupyter_book)
    monkeypatch.setattr(site.subprocess, "Popen", lambda command: types.SimpleNamespace(wait=lambda: 0))
    monkeypatch.setitem(sys.modules, "index_pages", types.SimpleNamespace(build=lambda root: {"chapters": 1}))
    assert site.build() == 0
    assert ran == [[]], "the first build is from nothing"
    ran.clear()
    for name in ("intro", "mixup/mixing"):
        (tmp_path / "_build/.doctrees/book" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"_build/.doctrees/book/{name}.doctree").write_text("", encoding="utf-8")
    return tmp_path, ran


def test_nothing_is_built_again_when_nothing_changed(site, checkout, capsys):
    root, ran = checkout
    os.utime(root / "_build/html/book/intro.html", (1, 1))
    os.utime(root / "book/intro.md")
    (root / "companion/__pycache__").mkdir()
    (root / "companion/__pycache__/x.py").write_text("", encoding="utf-8")
    assert site.build() == 0
    assert ran == []
    assert "up to date" in capsys.readouterr().out
    assert (root / "_build/html/book/intro.html").stat().st_mtime >= (root / "book/intro.md").stat().st_mtime - 1


def test_a_changed_page_alone_is_read_again_even_when_its_time_is_old(site, checkout):
    root, ran = checkout
    (root / "book/mixup/mixing.ipynb").write_text("{1}", encoding="utf-8")
    os.utime(root / "book/mixup/mixing.ipynb", (1, 1))
    assert site.build() == 0
    assert ran == [["intro"]]


@pytest.mark.parametrize(
    "name",
    ["_config.yml", "_toc.yml", "book/_static/book.css", "companion/__init__.py", "companion/papers/mixup/mixing.yml",
     "tools/site.py", "book/_ext/new.py"],
)  # fmt: skip
def test_what_shows_on_every_page_builds_from_nothing(site, checkout, name):
    root, ran = checkout
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("changed", encoding="utf-8")
    assert site.build() == 0
    assert ran == [[]]


def test_a_new_library_builds_from_nothing(site, checkout, monkeypatch, tmp_path):
    monkeypatch.setattr(site.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "sphinx-9.9.dist-info").mkdir()
    assert site.build() == 0
    assert checkout[1] == [[]]


def test_a_build_that_failed_is_followed_by_one_from_nothing(site, checkout, monkeypatch):
    root, ran = checkout
    (root / "book/intro.md").write_text("# Broken", encoding="utf-8")
    monkeypatch.setattr(site, "planned_status", 1)
    assert site.build() == 1
    assert site.build() == 1
    monkeypatch.setattr(site, "planned_status", 0)
    assert site.build() == 0
    assert ran == [["mixing"], [], []]
