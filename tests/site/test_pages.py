"""The built site without a browser: everything is there, and every link inside it leads somewhere."""

import functools
import gzip
import re
from pathlib import Path

import pages
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = re.search(r'^Repository = "(\S+)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)[1]
pytestmark = pytest.mark.site


def listed():
    """The files of the table of contents."""
    return re.findall(r"^\s*(?:- )?(?:file|root):\s*(\S+)", (ROOT / "_toc.yml").read_text(), flags=re.M)


def test_every_page_of_the_table_of_contents_is_there(html):
    missing = [
        name for name in listed() if not (html / re.sub(r"\.(ipynb|md)$", "", name)).with_suffix(".html").exists()
    ]
    assert not missing, f"not on the site: {missing}: run `make book`"


def test_links_inside_the_site_lead_somewhere(html):
    found = pages.guard_links(html)
    assert not found, "\n".join(found[:40])


def test_images_have_alt_text(html):
    found = pages.guard_images(html)
    assert not found, "\n".join(found[:40])


def test_nothing_is_loaded_from_elsewhere(html):
    found = pages.guard_loads(html)
    assert not found, "\n".join(found[:40])


def test_no_page_weighs_more_than_a_megabyte(html):
    """What a first visit transfers, as a server compresses it."""
    found = []
    for path in pages.pages(html):
        targets = (pages.target(path, load, html) for load in pages.Page(path).loads)
        files = {path, *(target[0] for target in targets if target and target[0].is_file())}
        weight = sum(_transferred(file) for file in files)
        if weight > 1e6:
            found.append(f"{path.relative_to(html)}: {weight / 1e3:.0f} kB")
    assert not found, "\n".join(found[:40])


@functools.cache
def _transferred(file):
    content = file.read_bytes()
    return len(gzip.compress(content, 6)) if file.suffix in (".html", ".css", ".js", ".svg") else len(content)


def test_links_to_the_repository_lead_to_its_files(html):
    found = pages.guard_repository_links(html, ROOT, REPOSITORY)
    assert not found, "\n".join(found[:40])


def test_chapters_have_a_colab_button_that_names_their_notebook(html):
    for name in listed():
        if name.endswith(".ipynb"):
            page = (html / name).with_suffix(".html").read_text(encoding="utf-8")
            address = f"https://colab.research.google.com/github/{REPOSITORY.split('github.com/')[1]}/blob/main/{name}"
            assert address in page, f"{name} has no button for {address}"


def test_the_paper_index_lists_every_paper_with_theme_and_state(html):
    from companion import papers

    page = (html / "book/reference/papers.html").read_text(encoding="utf-8")
    entries = dict(re.findall(r'id="(\w+)" data-fg-entry(?:="")? data-theme="(\w+)"', page))
    assert set(entries) == set(papers.keys())
    assert all(papers.paper(key).theme == theme for key, theme in entries.items())
    states = re.findall(r'data-state="(\w+)"', page)
    assert set(states) <= {"claimed", "implemented", "planned"}


def test_the_claims_page_has_every_claim_of_the_listed_chapters(html):
    from companion import papers

    page = (html / "book/reference/claims.html").read_text(encoding="utf-8")
    shown = {f"book/{r['theme']}/{r['chapter']}.ipynb": r["key"] for r in papers.claims()}
    for notebook, key in shown.items():
        if notebook in listed():
            assert f'id="{key.replace("/", "-")}"' in page


def test_the_api_pages_link_back_to_chapters(html):
    for name in listed():
        if name.endswith(".ipynb") and len(Path(name).parts) == 3:  # the check-up belongs to no theme
            theme, chapter = Path(name).parts[-2:]
            page = (html / f"book/reference/api/{theme}.html").read_text(encoding="utf-8")
            assert f"/{chapter.removesuffix('.ipynb')}.html" in page, f"api/{theme}.html does not link {name}"


def test_the_configuration_is_strict():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["execute"]["execute_notebooks"] == "off"
    assert '"-W", "-n", "--keep-going"' in (ROOT / "tools/site.py").read_text()


PAGE = '<html><body id="top">{}</body></html>'


@pytest.mark.parametrize(
    ("guard", "body", "says"),
    [
        ("guard_links", '<a href="gone.html">x</a>', "no file of the site"),
        ("guard_links", '<a href="other.html#gone">x</a>', "no anchor"),
        ("guard_images", '<img src="a.png">', "without alt text"),
        ("guard_images", '<img src="a.png" alt=" ">', "without alt text"),
        ("guard_loads", '<script src="https://example.org/x.js"></script>', "serve it from"),
        ("guard_loads", '<link rel="stylesheet" href="//example.org/x.css">', "serve it from"),
        ("guard_loads", '<img alt="a" src="gone.png">', "is not there"),
    ],
)
def test_a_planted_page_is_found(tmp_path, guard, body, says):
    (tmp_path / "other.html").write_text(PAGE.format('<a href="#top">up</a><a href="https://example.org">out</a>'))
    assert getattr(pages, guard)(tmp_path) == []
    (tmp_path / "index.html").write_text(PAGE.format(body))
    found = getattr(pages, guard)(tmp_path)
    assert len(found) == 1
    assert says in found[0]


def test_a_planted_link_to_a_missing_file_of_the_repository_is_found(tmp_path):
    link = f'<a href="{REPOSITORY}/blob/main/{{}}">x</a>'
    (tmp_path / "index.html").write_text(PAGE.format(link.format("Makefile") + link.format("gone.py")))
    assert pages.guard_repository_links(tmp_path, ROOT, REPOSITORY) == [
        "index.html links gone.py, which is not in the repository: mend its source"
    ]
