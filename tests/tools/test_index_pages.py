"""Tests of what tools/index_pages.py writes and no page test of the built site sees."""

import re

import pytest


@pytest.fixture
def index_pages(script):
    return script("tools/index_pages.py")


def test_bibtex_keeps_what_is_known_and_escapes_what_tex_would_read(index_pages):
    row = {
        "key": "doe2020cost",
        "title": "Cost & 5% of x^2",
        "authors": ["Ann Doe", "Bo Li"],
        "url": "https://a.org/b_c",
    }
    assert index_pages.bibtex(row) == (
        "@misc{doe2020cost,\n"
        "  title = {{Cost \\& 5\\% of x\\^{}2}},\n"
        "  author = {Ann Doe and Bo Li},\n"
        "  url = {https://a.org/b_c},\n"
        "}\n"
    )


def test_every_paper_is_one_balanced_entry_under_its_key(index_pages, tmp_path):
    rows = index_pages.register()
    index_pages.bibliography(tmp_path, rows)
    text = (tmp_path / "book/reference/references.bib").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^@misc\{(.+),$", text, re.M)) == sorted(row["key"] for row in rows)
    for entry in text.split("\n\n"):
        assert entry.count("{") == entry.count("}")
    assert "references.bib" in (tmp_path / "book/reference/bibliography.md").read_text(encoding="utf-8")
