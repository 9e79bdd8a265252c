"""Builds the site: `tools/site.py build` writes the generated pages, runs jupyter-book, and says how to open it."""

import functools
import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

FRONT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="0; url=book/intro.html">
<title>Feature Geometry</title>
<link rel="icon" href="_static/favicon.svg">
</head>
<body>
<p>The book begins here: <a href="book/intro.html">Feature Geometry</a></p>
</body>
</html>
"""
ICON = re.compile(r"""(?:"([\w-]+)"|(\w+)):\[\d+,\d+,\[([^\]]*)\],"[0-9a-f]+",(?:"[^"]*"|\[[^\]]*\])\],?""")
ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
MARKS = ROOT / "_build" / "marks.json"  # what the last build that passed was made of


def build() -> int:
    """Build the site and return the exit status.

    Nothing is done when nothing changed since the last build that passed. When only pages did, Sphinx reads those
    and writes all, since titles, links and words of a page show on others. Otherwise everything is built from
    nothing, as after a build that failed, so that no warning hides in an earlier build.
    """
    landing, known = HTML / "index.html", {}
    if MARKS.exists() and landing.exists():
        known = json.loads(MARKS.read_text(encoding="utf-8"))
        if known == marks(ROOT):
            (HTML / "book" / "intro.html").touch()  # its time says what the site is newer than
            print(f"Nothing changed: the site in {HTML} is up to date.")
            return 0
    MARKS.unlink(missing_ok=True)
    drawing = subprocess.Popen([sys.executable, str(ROOT / "tools" / "benchmark_page.py")])
    gc.disable()  # nothing of what is imported here goes away again
    sys.path.insert(0, str(ROOT / "tools"))
    import index_pages

    counts = index_pages.build(ROOT)
    print("generated pages: " + ", ".join(f"{count} {name}" for name, count in counts.items()), flush=True)
    if drawing.wait():
        return drawing.returncode
    now = marks(ROOT)
    forget_changed(known, now)
    status = jupyter_book(["build", str(ROOT), "-W", "-n", "--keep-going", "--quiet"])
    if status or not landing.exists():
        print(f"\nThe site did not build (exit status {status}): each warning above names the file to mend.")
        return status or 1
    keep_used_icons(HTML)
    landing.write_text(FRONT, encoding="utf-8")
    MARKS.write_text(json.dumps(now), encoding="utf-8")
    print(
        f"\nThe site is in {HTML}\nOpen {landing.as_uri()} in a browser, or run `make serve` for http://127.0.0.1:8000"
    )
    return 0


def marks(root: Path) -> dict[str, dict[str, str]]:
    """A digest of each file the site is made of, in two parts: `pages` are read one by one, `rest` shows on all."""
    everything = [root / "_config.yml", root / "_toc.yml", *(root / "benchmarks" / "results").glob("*.json")]
    for folder, kinds in (("book", "*"), ("companion", "*.py"), ("companion", "*.yml"), ("tools", "*.py")):
        everything += (path for path in (root / folder).rglob(kinds) if path.is_file())
    rest = {"python": sys.version}  # and what is installed, with its version
    rest |= {path.name: "" for path in Path(sysconfig.get_path("purelib")).glob("*.dist-info")}
    pages = {}
    for path in everything:
        name = path.relative_to(root).as_posix()
        if "__pycache__" in name or ".ipynb_checkpoints" in name:
            continue
        alone = name.startswith("book/") and not name.startswith(("book/_ext/", "book/_static/"))
        (pages if alone else rest)[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"pages": pages, "rest": rest}


def forget_changed(known: dict, now: dict) -> None:
    """Throw away what the last build left and what changed since is part of."""
    html, trees = HTML, HTML.parent / ".doctrees"
    if known.get("rest") != now["rest"]:
        shutil.rmtree(HTML.parent, ignore_errors=True)
        return
    shutil.rmtree(html)
    for name in {*known["pages"], *now["pages"]}:
        if known["pages"].get(name) != now["pages"].get(name):
            (trees / name).with_suffix(".doctree").unlink(missing_ok=True)  # Sphinx itself looks at times alone


def jupyter_book(command: list[str]) -> int:
    """Run jupyter-book in this process, where the companion is imported already, and return its exit status."""
    from jupyter_book import sphinx as book
    from jupyter_book.cli.main import main

    # jupyter-book hands Sphinx one process: more of them halve the wait
    book.build_sphinx = functools.partial(book.build_sphinx, jobs=min(os.cpu_count() or 1, 8))
    gc.freeze()  # an extension goes through all objects there are: the companion's are none of its business
    gc.enable()
    try:
        main(command, standalone_mode=False)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except RuntimeError as failed:
        print(failed)
        return 1
    return 0


def keep_used_icons(html: Path) -> int:
    """Drop the icons no page shows from the theme's script, which weighs more than a page. Returns the bytes saved."""
    script = html / "_static" / "scripts" / "fontawesome.js"
    if not script.exists():
        return 0
    readers = [path for kind in ("html", "js") for path in html.rglob(f"*.{kind}") if path != script]
    used = {name.decode() for path in readers for name in re.findall(rb"fa-([a-z0-9-]+)", path.read_bytes())}
    whole = script.read_text(encoding="utf-8")

    def kept(match: re.Match) -> str:
        names = {match[1] or match[2], *re.findall(r'"([\w-]+)"', match[3])}
        return match[0] if names & used else ""

    slim = ICON.sub(kept, whole)
    script.write_text(slim, encoding="utf-8")
    return len(whole) - len(slim)


if __name__ == "__main__":
    if sys.argv[1:] != ["build"]:
        sys.exit("usage: python tools/site.py build")
    sys.exit(build())
