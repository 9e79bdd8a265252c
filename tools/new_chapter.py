"""Start a chapter: text, module, test, and register file where there is none.

    python tools/new_chapter.py calibration recalibration

Nothing is overwritten. The text is `tools/chapter_template.md` with the names filled in.
"""

import keyword
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).resolve().parent / "chapter_template.md"

MODULE = '''"""{title}.

Chapter: {theme}/{name}
"""

__all__: list[str] = []
'''

TEST = '''"""Tests of companion.{theme}.{module}: known mathematics, an independent implementation, bad input."""

from companion.{theme} import {module}


def test_public_names_exist():
    for name in {module}.__all__:
        assert getattr({module}, name).__doc__, f"{{name}} has no docstring"
'''

REGISTER = """# Papers of {theme}/{name}. Leave a field out rather than guess it.
# - key: name2024word
#   title: "..."
#   authors:
#     - First Author
#   year: 2024
#   venue: "..."
#   url: https://arxiv.org/abs/....
#   idea: >-
#     One sentence in your own words.
"""


class Refused(Exception):
    """The chapter cannot be made; the message says why."""


def themes(root: Path = ROOT) -> list[str]:
    """Return the themes of the book: folders that the package and the book share."""
    packages = {path.parent.name for path in (root / "companion").glob("*/__init__.py")}
    texts = {path.name for path in (root / "book").iterdir() if path.is_dir()} if (root / "book").is_dir() else set()
    return sorted(packages & texts)


def new_chapter(theme: str, name: str, root: Path = ROOT) -> list[Path]:
    """Write the files of a chapter and return them.

    Args:
        theme: one of the themes.
        name: lower case, words joined by hyphens, not a Python keyword or a file that exists.
        root: of the repository.

    Raises:
        Refused: the names do not do, or the chapter exists.
    """
    if theme not in themes(root):
        raise Refused(f"expected theme to be one of {', '.join(themes(root))}, got {theme!r}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise Refused(f"expected name in lower case with hyphens between words, such as neural-collapse, got {name!r}")
    module = name.replace("-", "_")
    if keyword.iskeyword(module) or name in ("index", "conftest"):
        raise Refused(f"{name!r} cannot be the name of a chapter: Python or the book use it for something else")
    taken = [path for path in (root / "book").glob(f"*/{name}.md") if path.parent.name != theme]
    if taken:
        raise Refused(f"{name!r} is already a chapter of {taken[0].parent.name}; names are unique across themes")
    text = root / "book" / theme / f"{name}.md"
    package = root / "companion" / theme / module
    test = root / "tests" / theme / f"test_{module}.py"
    register = root / "companion" / "papers" / theme / f"{name}.yml"
    code = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    for path in (text, code, test):
        if path.exists():
            raise Refused(f"{path.relative_to(root)} exists already; nothing was written")

    title = name.replace("-", " ").capitalize()
    fill = {"theme": theme, "name": name, "module": module, "title": title}
    body = TEMPLATE.read_text(encoding="utf-8")
    for field, value in fill.items():
        body = body.replace(f"<{field}>", value)
    files = {text: body, code: MODULE.format(**fill), test: TEST.format(**fill)}
    if not register.exists():
        files[register] = REGISTER.format(**fill)
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return list(files)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 2 or not all(given):
        print("usage: make new-chapter theme=calibration name=some-name", file=sys.stderr)
        return 2
    theme, name = given
    try:
        files = new_chapter(theme, name, ROOT)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    module = name.replace("-", "_")
    print("\n".join(f"wrote {path.relative_to(ROOT)}" for path in files))
    print(
        f"\nNext:\n"
        f"  1. write companion/{theme}/{module}.py and its tests, export its names in companion/{theme}/__init__.py\n"
        f"  2. put the papers in companion/papers/{theme}/{name}.yml; name them in docstrings with `Paper: key`\n"
        f"  3. write book/{theme}/{name}.md: every section ends in a claim, exercises check themselves\n"
        f"     (checks go to companion/exercises/{theme}.py)\n"
        f"  4. run `make notebooks`, then list book/{theme}/{name}.ipynb in _toc.yml under its theme\n"
        f"  5. run `make check` and `make notebooks-test`, with COMPANION_SEED=7 too"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
