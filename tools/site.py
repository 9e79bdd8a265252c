"""Builds the site: `tools/site.py build` writes the generated pages, runs jupyter-book, and says how to open it."""

import os
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
    start = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", start, "build", ".", "-W", "-n", "--keep-going", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    landing = HTML / "index.html"
    if done.returncode or not landing.exists():
        print(f"\nThe site did not build (exit status {done.returncode}): each warning above names the file to mend.")
        return done.returncode or 1
    landing.write_text(FRONT, encoding="utf-8")
    print(
        f"\nThe site is in {HTML}\nOpen {landing.as_uri()} in a browser, or run `make serve` for http://127.0.0.1:8000"
    )
    return 0


if __name__ == "__main__":
    if sys.argv[1:] != ["build"]:
        sys.exit("usage: python tools/site.py build")
    sys.exit(build())
