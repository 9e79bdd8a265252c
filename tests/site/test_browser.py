"""Every page in a real browser: it asks no other site, nothing fails, mathematics is set, 360 px are enough."""

import json
import time
from pathlib import Path

import looking
import pages
import pytest

pytestmark = pytest.mark.browser

HERE = Path(__file__).parent
LOOK = (HERE / "look.js").read_text()
WIDE = (HERE / "wide.js").read_text()


def size(browser, width, height=900):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )


def visit(browser, address, own):
    """Open a page; return what it asked of others, what its console says, and what one look at it shows."""
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(address)
    look = browser.execute_async_script(LOOK)
    asked = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    elsewhere = sorted(url for url in asked if not url.startswith((own, "data:", "blob:", "about:", "chrome")))
    console = [e["message"] for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
    return elsewhere, console, look


def complaints(name, elsewhere, console, look):
    found = [f"{name} asks {url}" for url in elsewhere]
    found += [f"{name}: the console says {line[:200]}" for line in console]
    if "error" in look:
        return [*found, f"{name}: {look['error']}"]
    found += [f"{name}: mathematics is not set: {text}" for text in look["unset"] + look["wrong"]]
    found += [f"{name}: a formula in a line has a scrollbar: {text}" for text in look["scrolls"]]
    found += [f"{name}: mathematics or a role shows raw: {text}" for text in look["raw"]]
    found += [f"{name}: an image has no alt text: {src}" for src in look["images"]]
    found += [f"{name}: an image does not load: {src}" for src in look["broken"]]
    return found


def names(html):
    """All pages; of the pages of source code a sample, since one template makes them all."""
    every = [path.relative_to(html).as_posix() for path in pages.pages(html)]
    code = [name for name in every if name.startswith("_modules/")]
    return [name for name in every if name not in code] + code[:2]


def test_every_page_served(browser, html, served):
    found, maths = [], 0
    for name in names(html):
        size(browser, 1280)
        elsewhere, console, look = visit(browser, f"{served}/{name}", served)
        found += complaints(name, elsewhere, console, look)
        maths += look.get("maths", 0)
        size(browser, 360, 740)
        found += [f"{name} is wider than 360 px: {what}" for what in browser.execute_script(WIDE, 360)]
    assert not found, "\n".join(found[:60])
    assert maths > 20, "hardly any page has mathematics: is MathJax still found?"


def test_every_page_from_a_folder(browser, html):
    size(browser, 1280)
    found = []
    for name in names(html):
        elsewhere, console, look = visit(browser, (html / name).as_uri(), html.as_uri())
        found += complaints(name, elsewhere, console, look)
    assert not found, "\n".join(found[:60])


def results(browser, address, own):
    """Search, and wait for the list to stop growing."""
    browser.get_log("performance")
    browser.get(address)
    seen, until = -1, time.monotonic() + 20
    while time.monotonic() < until:
        now = browser.execute_script("return document.querySelectorAll('#search-results ul.search li a').length")
        if now and now == seen:
            break
        seen = now
        time.sleep(0.3)
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith((own, "data:", "blob:", "about:", "chrome")) for url in urls)
    return browser.execute_script(
        "return [...document.querySelectorAll('#search-results ul.search li a')].map((a) => a.href)"
    )


@pytest.mark.parametrize("words", ["temperature", "simplex", "knn"])
def test_search_finds_something_without_a_network(browser, html, served, words):
    size(browser, 1280)
    assert results(browser, f"{served}/search.html?q={words}", served)
    assert results(browser, f"{(html / 'search.html').as_uri()}?q={words}", html.as_uri())


def test_the_paper_index_filters(browser, html, served):
    size(browser, 1280)
    browser.get(f"{served}/book/reference/papers.html?theme=calibration")
    shown = "return [...document.querySelectorAll('[data-fg-entry]:not([hidden])')].map((e) => e.dataset.theme)"
    themes = browser.execute_script(shown)
    assert set(themes) == {"calibration"}
    browser.execute_script(
        "const f = document.querySelector('.fg-filter [name=words]'); f.value = 'temperature scaling';"
        "f.dispatchEvent(new Event('input', { bubbles: true }))"
    )
    assert 0 < len(browser.execute_script(shown)) < len(themes)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(browser, html, served, scheme):
    """The contrast of body text, links and code with what lies behind them is at least 4.5 (WCAG AA)."""
    size(browser, 1280)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(f"{served}/book/reference/notation.html")
    browser.execute_script(
        "localStorage.setItem('mode', arguments[0]); localStorage.setItem('theme', arguments[0])", scheme
    )
    for name in ("book/intro.html", "book/reference/notation.html", "book/reference/api/foundation.html"):
        browser.get(f"{served}/{name}")
        assert browser.execute_script("return document.documentElement.dataset.theme") == scheme
        low = browser.execute_script((HERE / "contrast.js").read_text())
        assert not low, f"{name}, {scheme}: {low[:5]}"
    browser.execute_script("localStorage.clear()")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


PLANTED = {
    "asks": '<script src="http://127.0.0.1:9/other.js"></script>',
    "the console says": "<script>console.error('planted')</script>",
    "mathematics is not set": '<span class="math notranslate">\\(x\\)</span>',
    "shows raw": '<article class="bd-article"><p>Words with $x^2$ in them.</p></article>',
    "no alt text": '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">',
    "does not load": '<img alt="a picture" src="gone.png">',
}


@pytest.mark.parametrize("says", PLANTED)
def test_a_planted_page_is_found(browser, tmp_path, says):
    page = tmp_path / "page.html"
    page.write_text(f"<!DOCTYPE html><html><head><meta charset='utf-8'></head><body>{PLANTED[says]}</body></html>")
    found = complaints("page", *visit(browser, page.as_uri(), tmp_path.as_uri()))
    assert any(says in line for line in found), found


def test_a_planted_wide_page_is_found(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<!DOCTYPE html><meta name='viewport' content='width=device-width'><div class='bd-main'><p style='width:"
        " 500px'>wide</p></div>"
    )
    size(browser, 360, 740)
    browser.get(page.as_uri())
    assert browser.execute_script(WIDE, 360)


@pytest.mark.parametrize(("required", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_a_browser_tests_skip_with_a_reason_unless_one_is_required(monkeypatch, required, outcome):
    monkeypatch.setenv("COMPANION_REQUIRE_BROWSER", required)
    with pytest.raises(outcome, match="no chromium"):
        looking.missing("there is no chromium")
