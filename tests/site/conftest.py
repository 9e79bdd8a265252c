"""The built site, and a browser to look at it with."""

import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="session")
def html():
    """The folder of the built site, no older than what it is built from."""
    landing = HTML / "book" / "intro.html"
    if not landing.exists():
        pytest.fail("there is no built site: run `make book` first", pytrace=False)
    built = landing.stat().st_mtime
    sources = [
        ROOT / "_config.yml",
        ROOT / "_toc.yml",
        *(ROOT / "book").rglob("*.md"),
        *(ROOT / "book").rglob("*.ipynb"),
    ]
    newer = [p.relative_to(ROOT) for p in sources if p.stat().st_mtime > built and ".ipynb_checkpoints" not in p.parts]
    if newer:
        pytest.fail(f"the site is older than {newer[0]}: run `make book` first", pytrace=False)
    return HTML


@pytest.fixture(scope="session")
def served(html):
    """The address at which the built site is served on this machine while the tests run."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(html)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium that records its requests and its console."""
    import looking

    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        looking.missing(
            "there is no chromium with its chromedriver on this machine (Debian: chromium, chromium-driver)"
        )
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        looking.missing("selenium is not installed (pip install 'feature-geometry[browser]')")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--window-size=1280,900",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    started.set_page_load_timeout(60)
    started.set_script_timeout(60)
    yield started
    started.quit()
