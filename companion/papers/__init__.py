"""The register of papers: bibliography and idea per paper, and what the book did with each.

One YAML file per chapter, `<theme>/<chapter>.yml`, is package data. Public: `paper`, `papers`, `label`, `url`, `keys`,
`chapters`, `theme_of`, `Paper`; and, in a checkout of the book, `claims`, `code`, `links`, `state`, `disagreements`.
"""

import ast
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

__all__ = [
    "Code",
    "Paper",
    "chapters",
    "claims",
    "code",
    "disagreements",
    "key_of_url",
    "keys",
    "label",
    "links",
    "paper",
    "papers",
    "state",
    "theme_of",
    "url",
]

_HERE = Path(__file__).resolve().parent
_PACKAGE = _HERE.parent
_BOOK = _PACKAGE.parent / "book"
_THEMES = ("dimensionality", "collapse", "mixup", "calibration", "shortcuts", "anomaly", "gallery")
_FIELDS = ("key", "title", "authors", "year", "venue", "url", "idea")
CLAIM = "application/vnd.companion.claim+json"


@dataclass(frozen=True)
class Paper:
    """A paper of the register. Fields nobody could verify are empty or None."""

    key: str
    title: str
    theme: str
    chapter: str
    idea: str
    authors: tuple[str, ...] = ()
    year: int | None = None
    venue: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class Code:
    """A public function or class whose docstring names a paper."""

    name: str
    module: str
    line: int


@lru_cache(maxsize=1)
def _register() -> dict[str, Paper]:
    found: dict[str, Paper] = {}
    for theme in _THEMES:
        for file in sorted((_HERE / theme).glob("*.yml")):
            for row in _rows(file):
                entry = _read(row, theme, file)
                if entry.key in found:
                    raise ValueError(f"{file}: {entry.key} is already in {found[entry.key].chapter}")
                found[entry.key] = entry
    return found


def _rows(file: Path) -> list[Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        rows = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if rows is None:
        return []
    if not isinstance(rows, list):
        raise ValueError(f"{file}: expected a list of papers, got {type(rows).__name__}")
    return rows


def _read(row: Any, theme: str, file: Path) -> Paper:
    if not isinstance(row, dict):
        raise ValueError(f"{file}: expected a mapping per paper, got {row!r}")
    where = f"{file.parent.name}/{file.name}: {row.get('key', 'a paper without key')}"
    if unknown := sorted(set(row) - set(_FIELDS)):
        raise ValueError(f"{where} has fields that the register does not know: {', '.join(map(str, unknown))}")
    if missing := [field for field in ("key", "title", "idea") if not row.get(field)]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    authors = row.get("authors") or []
    if not isinstance(authors, list) or not all(isinstance(name, str) and name for name in authors):
        raise ValueError(f"{where}: expected authors to be a list of names, got {authors!r}")
    if "year" in row and not (isinstance(row["year"], int) and 1900 < row["year"] < 2100):
        raise ValueError(f"{where}: expected a year, got {row['year']!r}")
    if "url" in row and not str(row["url"]).startswith("https://"):
        raise ValueError(f"{where}: expected an https address, got {row['url']!r}")
    if not re.fullmatch(r"[a-z0-9]+", str(row["key"])):
        raise ValueError(f"{where}: expected a key of lower-case letters and digits")
    return Paper(**{**row, "authors": tuple(authors)}, theme=theme, chapter=file.stem)


def keys() -> tuple[str, ...]:
    """Return the keys of all papers, in the order of the register.

    >>> len(keys())
    215
    """
    return tuple(_register())


def paper(key: str) -> Paper:
    """Return one paper.

    Raises:
        KeyError: the register has no such key.

    >>> paper("chidambaram2024limitations").chapter
    'recalibration'
    """
    try:
        return _register()[key]
    except KeyError:
        raise KeyError(f"no paper {key!r} in the register (companion/papers)") from None


def papers(theme: str | None = None, chapter: str | None = None) -> tuple[Paper, ...]:
    """Return the papers of a theme, of a chapter, or all.

    Raises:
        ValueError: there is no such theme or chapter.

    >>> len(papers(chapter="recalibration"))
    4
    """
    found = tuple(
        entry
        for entry in _register().values()
        if (theme is None or entry.theme == theme) and (chapter is None or entry.chapter == chapter)
    )
    if not found:
        raise ValueError(f"expected a theme and chapter of the register, got theme={theme!r}, chapter={chapter!r}")
    return found


def chapters(theme: str | None = None) -> tuple[str, ...]:
    """Return the names of the chapters that have papers, in the order of the register.

    >>> chapters("calibration")
    ('calibration-under-shift', 'measuring-calibration', 'recalibration')
    """
    return tuple(dict.fromkeys(entry.chapter for entry in papers(theme)))


def theme_of(chapter: str) -> str | None:
    """Return the theme of a chapter, or None where the register has no such chapter.

    >>> theme_of("recalibration")
    'calibration'
    """
    return next((entry.theme for entry in _register().values() if entry.chapter == chapter), None)


def label(key: str) -> str:
    """Return how the book names a paper: authors and year, or a short title where the authors are not verified.

    Two papers of one chapter with the same authors and year get a letter, as in "Wu et al., 2024a".

    Raises:
        KeyError: the register has no such key.

    >>> label("chidambaram2024limitations")
    'Chidambaram and Ge, 2024'
    """
    return _labels()[paper(key).key]


def url(key: str) -> str | None:
    """Return the address of a paper, or None where none is verified.

    Raises:
        KeyError: the register has no such key.

    >>> url("chidambaram2024limitations")
    'https://arxiv.org/abs/2306.00740'
    """
    return paper(key).url


def key_of_url(address: str) -> str | None:
    """Return the key of the paper at an address, whatever its version, or None.

    >>> key_of_url("https://arxiv.org/abs/2306.00740v2")
    'chidambaram2024limitations'
    """
    return _addresses().get(_bare(address))


@lru_cache(maxsize=1)
def _addresses() -> dict[str, str]:
    return {_bare(entry.url): entry.key for entry in _register().values() if entry.url}


def _bare(address: str) -> str:
    address = re.sub(r"^https?://(www\.)?", "", address.strip()).rstrip("/")
    return re.sub(r"^arxiv\.org/(abs|pdf)/(\d{4}\.\d{4,5})(v\d+)?(\.pdf)?$", r"arxiv.org/abs/\2", address)


@lru_cache(maxsize=1)
def _labels() -> dict[str, str]:
    plain = {entry.key: _plain_label(entry) for entry in _register().values()}
    same: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key, text in plain.items():
        same[_register()[key].chapter, text].append(key)
    for group in same.values():
        if len(group) > 1:
            plain.update({key: f"{plain[key]}{letter}" for key, letter in zip(group, "abcdefgh")})
    return plain


def _plain_label(entry: Paper) -> str:
    names = [_surname(name) for name in entry.authors]
    if not names:
        head = entry.title.split(":")[0]
        words = head.split()
        who = head if len(words) <= 8 else " ".join(words[:8]) + " …"
    elif len(names) <= 2:
        who = " and ".join(names)
    else:
        who = f"{names[0]} et al."
    return f"{who}, {entry.year}" if entry.year else who


def _surname(name: str) -> str:
    """The family name with its particles: "Anton van den Hengel" is "van den Hengel"."""
    words = name.split()
    start = len(words) - 1
    particles = {
        "van",
        "von",
        "de",
        "den",
        "der",
        "di",
        "da",
        "del",
        "della",
        "le",
        "la",
        "ter",
        "ten",
        "dos",
        "el",
        "al",
    }
    while start > 1 and words[start - 1].lower() in particles:
        start -= 1
    return " ".join(words[start:])


# What the book did with a paper: read from docstrings and notebooks, never typed.


@lru_cache(maxsize=8)
def code(package: Path = _PACKAGE) -> dict[str, tuple[Code, ...]]:
    """Return, by key, the functions and classes whose docstrings say `Paper: key`.

    Args:
        package: the folder of the package; the installed companion by default.

    >>> isinstance(code(), dict)
    True
    """
    found: dict[str, list[Code]] = defaultdict(list)
    for file in sorted(Path(package).rglob("*.py")):
        relative = file.relative_to(Path(package).parent).with_suffix("")
        module = ".".join(relative.parts).removesuffix(".__init__")
        for name, node in _definitions(ast.parse(file.read_text(encoding="utf-8"), str(file))):
            for key in re.findall(r"^\s*Papers?: *([a-z0-9, ]+?)\.?\s*$", ast.get_docstring(node) or "", flags=re.M):
                for one in re.split(r"[ ,]+", key.strip()):
                    found[one].append(Code(name, module, getattr(node, "lineno", 1)))
    return {key: tuple(entries) for key, entries in found.items()}


def _definitions(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    found: list[tuple[str, ast.AST]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append((node.name, node))
        if isinstance(node, ast.ClassDef):
            found += [(f"{node.name}.{inner.name}", inner) for inner in node.body if isinstance(inner, ast.FunctionDef)]
    return found


def claims(book: Path = _BOOK) -> list[dict[str, Any]]:
    """Return the records of all claims in the notebooks of a book, each with theme and chapter.

    Args:
        book: the folder with `<theme>/<chapter>.ipynb`.

    >>> isinstance(claims(), list)
    True
    """
    found = []
    for file in sorted(Path(book).glob("*/*.ipynb")):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            for output in cell.get("outputs", []):
                record = output.get("data", {}).get(CLAIM)
                if record is not None:
                    found.append({**record, "theme": file.parent.name, "chapter": file.stem})
    return found


def links(book: Path = _BOOK) -> dict[str, list[tuple[str, str]]]:
    """Return, by "theme/chapter", the links (label, address) in the prose of each chapter's text.

    Args:
        book: the folder with `<theme>/<chapter>.md`.

    >>> isinstance(links(), dict)
    True
    """
    found = {}
    for file in _chapter_files(Path(book)):
        prose = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.S)
        pairs = re.findall(r"(?<!!)\[([^\]]+)\]\((https?://[^)\s]+)\)", prose)
        found[f"{file.parent.name}/{file.stem}"] = [(" ".join(text.split()), address) for text, address in pairs]
    return found


def _chapter_files(book: Path) -> list[Path]:
    return [
        file for file in sorted(book.glob("*/*.md")) if file.read_text(encoding="utf-8").startswith("---\njupytext:")
    ]


def state(key: str, book: Path = _BOOK, package: Path = _PACKAGE) -> str:
    """Return how far the book is with a paper: "planned", "implemented" (code names it) or "claimed" (a claim holds).

    Args:
        key: of the paper.
        book: the folder with the notebooks.
        package: the folder of the package.

    Raises:
        KeyError: the register has no such key.

    >>> state("chidambaram2024limitations") in ("planned", "implemented", "claimed")
    True
    """
    paper(key)
    if key not in code(package):
        return "planned"
    return "claimed" if any(c["paper"] == key and c["held"] for c in claims(book)) else "implemented"


def disagreements(book: Path = _BOOK, package: Path = _PACKAGE) -> list[str]:
    """Return every way in which register, code, chapters and claims disagree, as sentences; none when all is well.

    - each paper of a finished chapter (its text and its executed notebook exist) has code, a link and a claim;
    - each key in a docstring and in a claim is in the register;
    - each link to a paper of the register carries the register's label and address;
    - claim keys begin with their chapter and are unique.

    Args:
        book: the folder with texts and notebooks.
        package: the folder of the package.

    >>> disagreements(Path("no book"), Path("no package"))
    []
    """
    found = []
    named, records = code(package), claims(book)
    for key in sorted(set(named) - set(keys())):
        where = ", ".join(f"{entry.module}.{entry.name}" for entry in named[key])
        found.append(f"{where} names the paper {key}, which is not in the register")
    for key, times in Counter(record["key"] for record in records).items():
        if times > 1:
            found.append(f"the claim {key} is made {times} times")
    for record in records:
        if record["paper"] not in keys():
            found.append(f"the claim {record['key']} is about {record['paper']}, which is not in the register")
        if record["key"].partition("/")[0] != record["chapter"]:
            found.append(f"the claim {record['key']} stands in the chapter {record['chapter']}")
        if not record["held"]:
            found.append(f"the claim {record['key']} does not hold")
    for place, pairs in links(book).items():
        found += _link_disagreements(place, pairs)
        theme, _, chapter = place.partition("/")
        if theme_of(chapter) != theme or not (Path(book) / f"{place}.ipynb").exists():
            continue
        linked = {key_of_url(address) for _, address in pairs}
        text = (Path(book) / f"{place}.md").read_text(encoding="utf-8")
        for entry in papers(chapter=chapter):
            if entry.key not in named:
                found.append(f"{place} exists, but no docstring names its paper {entry.key}")
            if entry.key not in linked and (entry.url or label(entry.key) not in text):
                found.append(f"{place} does not link its paper [{label(entry.key)}]({entry.url})")
            if not any(record["paper"] == entry.key for record in records):
                found.append(f"{place} exists, but no claim is about its paper {entry.key}")
    return found


def _link_disagreements(place: str, pairs: list[tuple[str, str]]) -> list[str]:
    found = []
    for text, address in pairs:
        key = key_of_url(address)
        if key is None:
            if "arxiv.org/" in address:
                found.append(f"{place} links {address} ({text}), which is not in the register")
        elif (text, address) != (label(key), url(key)):
            found.append(f"{place} links [{text}]({address}), the register says [{label(key)}]({url(key)})")
    return found
