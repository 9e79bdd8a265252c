"""Tests of the register: complete, well formed, and in agreement with code, claims and links."""

import json

import pytest

from companion import papers

HEADER = "---\njupytext:\n  text_representation:\n    format_name: myst\n---\n"


def test_the_register_is_complete():
    assert len(papers.keys()) == 215
    assert len({entry.chapter for entry in papers.papers()}) == 34
    assert len({entry.title.lower() for entry in papers.papers()}) == 215


def test_fields_are_well_formed():
    for entry in papers.papers():
        assert entry.idea.endswith((".", "!", "?")), entry.key
        assert len(entry.idea) <= 400, entry.key
        assert "memory" not in (entry.venue or ""), entry.key
        assert "?" not in (entry.venue or ""), entry.key
        for name in entry.authors:
            assert "(" not in name, entry.key


def test_addresses_are_unique():
    addresses = [entry.url for entry in papers.papers() if entry.url]
    assert len(addresses) == len(set(addresses))


def test_labels_tell_the_papers_of_a_chapter_apart():
    for chapter in papers.chapters():
        labels = [papers.label(entry.key) for entry in papers.papers(chapter=chapter)]
        assert len(labels) == len(set(labels)), chapter


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("chidambaram2024limitations", "Chidambaram and Ge, 2024"),
        ("gilpin2021chaos", "Gilpin, 2021"),
        ("li2018measuring", "Li et al., 2018"),
        ("brebisson2016z", "de Brébisson and Vincent, 2016"),
        ("wu2024rethinking", "Wu et al., 2024a"),
        ("wu2024voco", "Wu et al., 2024b"),
    ],
)
def test_labels(key, label):
    assert papers.label(key) == label


def test_papers_without_verified_authors_go_by_their_title():
    assert papers.paper("mcgill2025contributions").authors == ()
    assert papers.label("mcgill2025contributions").startswith("Contributions to Robust")
    assert papers.url("mcgill2025contributions") is None


def test_lookups():
    assert papers.theme_of("recalibration") == "calibration"
    assert papers.theme_of("nothing") is None
    assert [p.key for p in papers.papers("calibration", "recalibration")] == [
        p.key for p in papers.papers(chapter="recalibration")
    ]
    assert papers.key_of_url("http://www.arxiv.org/pdf/2306.00740v3.pdf") == "chidambaram2024limitations"
    assert papers.key_of_url("https://example.org") is None
    for bad in (papers.paper, papers.label, papers.url, papers.state):
        with pytest.raises(KeyError, match="nobody2000"):
            bad("nobody2000")
    with pytest.raises(ValueError, match="chapter='nothing'"):
        papers.papers(chapter="nothing")
    with pytest.raises(ValueError, match="theme='mixup'"):
        papers.papers("mixup", "recalibration")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("- title: t\n  idea: i", "lacks key"),
        ("- key: a1\n  title: t", "lacks idea"),
        ("- key: a1\n  title: t\n  idea: i\n  colour: red", "does not know: colour"),
        ("- key: a1\n  title: t\n  idea: i\n  year: '2020'", "a year"),
        ("- key: a1\n  title: t\n  idea: i\n  url: http://x.org", "https"),
        ("- key: a1\n  title: t\n  idea: i\n  authors: A B", "list of names"),
        ("- key: A 1\n  title: t\n  idea: i", "lower-case"),
        ("- text", "mapping per paper"),
        ("key: a1", "list of papers"),
        ("- key: [", "not valid YAML"),
    ],
)
def test_damaged_files_name_the_file(tmp_path, row, match):
    file = tmp_path / "calibration" / "chapter.yml"
    file.parent.mkdir()
    file.write_text(row)
    with pytest.raises(ValueError, match=match) as caught:
        [papers._read(entry, "calibration", file) for entry in papers._rows(file)]
    assert "chapter.yml" in str(caught.value)


@pytest.fixture
def book(tmp_path):
    """A book of one chapter in which everything agrees, but for what a test changes."""
    folder = tmp_path / "book" / "calibration"
    folder.mkdir(parents=True)
    package = tmp_path / "companion" / "calibration"
    package.mkdir(parents=True)
    entries = papers.papers(chapter="recalibration")
    text = HEADER + "\n".join(f"See [{papers.label(p.key)}]({p.url or 'https://example.org'})." for p in entries)
    (folder / "recalibration.md").write_text(text)
    (package / "recalibration.py").write_text(
        "\n".join(f'def f{i}():\n    """Do.\n\n    Paper: {p.key}\n    """\n' for i, p in enumerate(entries))
    )
    records = [{"key": f"recalibration/{p.key}", "paper": p.key, "held": True} for p in entries]
    write_claims(folder / "recalibration.ipynb", records)
    return tmp_path


def write_claims(path, records):
    outputs = [{"output_type": "display_data", "data": {papers.CLAIM: record}} for record in records]
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "outputs": outputs}, {"cell_type": "markdown"}]}))


def disagreements(root):
    papers.code.cache_clear()
    return papers.disagreements(root / "book", root / "companion")


def test_a_book_in_agreement(book):
    assert disagreements(book) == []
    assert papers.state("huang2025h", book / "book", book / "companion") == "claimed"
    assert papers.state("sarkar2024evaluating", book / "book", book / "companion") == "planned"


def test_a_claim_that_is_gone_or_lost(book):
    write_claims(book / "book/calibration/recalibration.ipynb", [])
    found = disagreements(book)
    assert len(found) == 4
    assert "no claim is about its paper" in found[0]
    assert papers.state("huang2025h", book / "book", book / "companion") == "implemented"


def test_claims_about_strangers_twins_and_strays(book):
    entries = papers.papers(chapter="recalibration")
    records = [{"key": f"recalibration/{p.key}", "paper": p.key, "held": True} for p in entries]
    records += [
        {"key": "recalibration/x", "paper": "nobody2000", "held": True},
        {"key": "recalibration/x", "paper": "huang2025h", "held": False},
        {"key": "elsewhere/y", "paper": "huang2025h", "held": True},
    ]
    write_claims(book / "book/calibration/recalibration.ipynb", records)
    found = " | ".join(disagreements(book))
    for words in ("made 2 times", "not in the register", "does not hold", "stands in the chapter recalibration"):
        assert words in found


def test_code_and_links_that_disagree(book):
    code = book / "companion/calibration/recalibration.py"
    code.write_text(code.read_text().replace("huang2025h", "huang2025i"))
    text = book / "book/calibration/recalibration.md"
    text.write_text(
        text.read_text().replace("Chidambaram and Ge", "Chidambaram & Ge") + "[x](https://arxiv.org/abs/1.2)"
    )
    found = " | ".join(disagreements(book))
    for words in (
        "huang2025i, which is not in the register",
        "no docstring names its paper huang2025h",
        "the register says [Chidambaram and Ge, 2024]",
        "links https://arxiv.org/abs/1.2 (x)",
    ):
        assert words in found


def test_the_book_agrees_with_its_register():
    assert papers.disagreements() == []
