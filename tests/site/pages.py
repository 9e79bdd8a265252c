"""What can be seen of the built site without a browser: pages, links, anchors, pictures, and what they load."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADING = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}


class Page(HTMLParser):
    """Links, anchors, images and loaded addresses of one page."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.links, self.anchors, self.images, self.loads, self.words = path, [], set(), [], [], []
        self._hidden = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "img" and given.get("aria-hidden") != "true":
            self.images.append((given.get("src", ""), given.get("alt")))
        if tag in LOADING and given.get(LOADING[tag]):
            self.loads.append(given[LOADING[tag]])
        if (
            tag == "link"
            and given.get("href")
            and not set((given.get("rel") or "").split())
            & {"canonical", "index", "search", "next", "prev", "alternate", "author", "copyright"}
        ):
            self.loads.append(given["href"])
        if given.get("srcset"):
            self.loads.append(given["srcset"].split()[0])
        self.loads += re.findall(r"url\([\"']?([^)\"']+)", given.get("style") or "")


def pages(html: Path) -> list[Path]:
    """All pages of a site."""
    return sorted(p for p in html.rglob("*.html") if "_static" not in p.relative_to(html).parts)


def target(page: Path, link: str, html: Path) -> tuple[Path, str] | None:
    """The file and the anchor a link leads to; None for links to other sites."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    path = unquote(parts.path)
    file = page if not path else (html / path.lstrip("/") if path.startswith("/") else page.parent / path).resolve()
    return (file / "index.html" if file.is_dir() else file), unquote(parts.fragment)


def guard_links(html: Path) -> list[str]:
    """Links that lead nowhere inside the site: to no file, or to no anchor of it."""
    read = {path.resolve(): Page(path) for path in pages(html)}
    found = []
    for path, page in read.items():
        for link in dict.fromkeys(page.links):
            place = target(path, link, html)
            if place is None:
                continue
            file, anchor = place
            name = path.relative_to(html.resolve())
            if not file.exists():
                found.append(f"{name} links {link}, which is no file of the site: mend the link in its source")
            elif anchor and file in read and anchor not in read[file].anchors and not anchor.startswith("L"):
                found.append(
                    f"{name} links {link}, but {file.name} has no anchor {anchor}: mend the link in its source"
                )
    return found


def guard_images(html: Path) -> list[str]:
    """Images without alt text."""
    return [
        f"{path.relative_to(html)} shows {source[:60]} without alt text: say what it shows"
        for path in pages(html)
        for source, alt in Page(path).images
        if not (alt or "").strip()
    ]


def guard_loads(html: Path) -> list[str]:
    """What a page would load from another site, or from a file that is not there."""
    found = []
    for path in pages(html):
        for address in dict.fromkeys(Page(path).loads):
            if address.startswith("data:"):
                continue
            place = target(path, address, html)
            if place is None:
                found.append(f"{path.relative_to(html)} loads {address}: serve it from book/_static, or drop it")
            elif not place[0].exists():
                found.append(f"{path.relative_to(html)} loads {address}, which is not there")
    for sheet in html.rglob("*.css"):
        for address in re.findall(
            r"url\(\s*[\"']?((?:https?:)?//[^)\"']+)|@import\s+[\"']((?:https?:)?//[^\"']+)", sheet.read_text()
        ):
            found.append(f"{sheet.relative_to(html)} loads {address[0] or address[1]}: serve it from book/_static")
    return found


def guard_repository_links(html: Path, root: Path, repository: str) -> list[str]:
    """Links to files of our repository that are not in it."""
    found = []
    for path in pages(html):
        for link in dict.fromkeys(Page(path).links):
            inside = re.match(re.escape(repository) + r"/(?:blob|tree|raw|edit)/main/([^?#]+)", link)
            if inside and not (root / unquote(inside[1])).exists():
                found.append(
                    f"{path.relative_to(html)} links {inside[1]}, which is not in the repository: mend its source"
                )
    return found
