"""Builds the site: `tools/site.py build` writes the generated pages, runs jupyter-book, and says how to open it."""

import os
import re
import shutil
import subprocess
import sys
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


def build() -> int:
    """Build everything from nothing, so that no warning hides in an earlier build. Returns the exit status."""
    sys.path.insert(0, str(ROOT / "tools"))
    import benchmark_page
    import index_pages

    counts = index_pages.build(ROOT) | {"benchmarks": benchmark_page.build(ROOT)}
    print("generated pages: " + ", ".join(f"{count} {name}" for name, count in counts.items()), flush=True)
    shutil.rmtree(ROOT / "_build", ignore_errors=True)
    start = (  # jupyter-book hands Sphinx one process: more of them halve the wait
        "import functools, jupyter_book.sphinx as book; from jupyter_book.cli.main import main;"
        f" book.build_sphinx = functools.partial(book.build_sphinx, jobs={min(os.cpu_count() or 1, 8)}); main()"
    )
    command = [sys.executable, "-c", start, "build", ".", "-W", "-n", "--keep-going", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    landing = HTML / "index.html"
    if done.returncode or not landing.exists():
        print(f"\nThe site did not build (exit status {done.returncode}): each warning above names the file to mend.")
        return done.returncode or 1
    keep_used_icons(HTML)
    landing.write_text(FRONT, encoding="utf-8")
    print(
        f"\nThe site is in {HTML}\nOpen {landing.as_uri()} in a browser, or run `make serve` for http://127.0.0.1:8000"
    )
    return 0


def keep_used_icons(html: Path) -> int:
    """Drop the icons no page shows from the theme's script, which weighs more than a page. Returns the bytes saved."""
    script = html / "_static" / "scripts" / "fontawesome.js"
    if not script.exists():
        return 0
    readers = [path for kind in ("html", "js") for path in html.rglob(f"*.{kind}") if path != script]
    used: set[str] = set()
    for path in readers:
        used.update(re.findall(r"\bfa-([a-z0-9-]+)", path.read_text(encoding="utf-8", errors="ignore")))
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
