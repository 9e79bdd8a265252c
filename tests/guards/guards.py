"""What keeps the book true: each guard looks at a tree and returns sentences that say what is wrong and what to do.

A guard takes the root of a repository, so that `test_guards.py` can plant a violation in a small tree and see it found.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
THEMES = ("dimensionality", "collapse", "mixup", "calibration", "shortcuts", "anomaly", "gallery")
NOTEBOOK_ONLY = ("claims", "exercises", "show", "papers")
CORE = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "torchmetrics", "tqdm", "yaml", "safetensors", "PIL"}
MAX_BYTES = 800_000


def module(path):
    """A script or extension of the repository as a module."""
    name = f"repository_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def tool(name):
    """A script of `tools/`."""
    return module(HERE / "tools" / f"{name}.py")


def tracked(root):
    """The files git knows below a root; all files where there is no repository."""
    if (root / ".git").exists():
        names = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, check=True).stdout
        return [root / name for name in names.decode().split("\0") if name and (root / name).is_file()]
    return [path for path in sorted(root.rglob("*")) if path.is_file()]


def read(path):
    """The text of a file, or nothing when it is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def chapters(root):
    """The texts of all chapters."""
    return tool("pairs").chapters(root / "book")


def notebooks(root):
    """The notebooks of all chapters that have one, with their cells."""
    for text in chapters(root):
        twin = text.with_suffix(".ipynb")
        if twin.exists():
            yield twin, json.loads(twin.read_text(encoding="utf-8"))["cells"]


def prose(text):
    """A chapter's text without front matter and code, so that line numbers stay."""

    def blank(match):
        return "\n" * match[0].count("\n")

    text = re.sub(r"\A---\n.*?\n---\n", blank, text, flags=re.S)
    return re.sub(r"^(`{3,}|~{3,})[^\n]*\n.*?^\1`*[ \t]*$", blank, text, flags=re.S | re.M)


def short(path, root):
    """A path as people know it."""
    return path.relative_to(root).as_posix()


# --- code -------------------------------------------------------------------------------------------------------------


def _imports(path, root):
    """Everything a module imports from, as dotted names, with line number and whether that is at import time."""
    package = list(path.relative_to(root).with_suffix("").parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            top -= {id(node) for node in ast.walk(function)}
        if isinstance(function, ast.If) and "TYPE_CHECKING" in ast.unparse(function.test):
            top -= {id(node) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno, id(node) in top


def guard_imports(root):
    """Who may import whom: the foundation no theme, a theme no other theme and nothing that serves notebooks."""
    found = []
    for path in sorted((root / "companion").rglob("*.py")):
        parts = path.relative_to(root / "companion").with_suffix("").parts
        if parts in (("__init__",), ("__main__",)) or parts[0] == "report":
            continue
        for name, line, at_import in _imports(path, root):
            where = f"{short(path, root)}:{line}"
            head, *rest = name.split(".")
            if head != "companion":
                if at_import and head not in CORE and head not in sys.stdlib_module_names:
                    found.append(
                        f"{where} imports {head}, which is not a requirement: import it inside the function that uses"
                        " it, with an error that names the extra"
                    )
                continue
            target = rest[0] if rest else ""
            if parts[0] in THEMES:
                if target in THEMES and target != parts[0]:
                    found.append(
                        f"{where} imports the theme {target} from the theme {parts[0]}: move what both need to the "
                        "foundation, and let the themes re-export it"
                    )
                if target in (*NOTEBOOK_ONLY, "report"):
                    found.append(
                        f"{where} imports companion.{target}, which is for notebooks: take it out of the theme"
                    )
            elif parts[0] == "exercises":
                if target in THEMES and target != parts[-1]:
                    found.append(
                        f"{where} imports the theme {target}: exercises/{parts[-1]}.py may import its own theme only"
                    )
            elif target in THEMES or target == "report":
                found.append(
                    f"{where} imports companion.{target}: the foundation imports no theme, turn the import round"
                )
    return found


def _exported(path):
    """The names in `__all__` of a module and the line it stands on; None when there is none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            try:
                return list(ast.literal_eval(node.value))
            except ValueError:
                return None
    return None


def _defined(path):
    """Functions and classes at the top of a module by name."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name: node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, kinds)}


def _is_record(node):
    """Named tuples, dataclasses and exceptions need a sentence, but no example of their own."""
    if not isinstance(node, ast.ClassDef):
        return False
    words = " ".join(ast.unparse(part) for part in (*node.bases, *node.decorator_list))
    return any(
        word in words for word in ("NamedTuple", "dataclass", "Error", "Exception", "Warning", "Protocol", "Enum")
    )


def _examples(node):
    """All docstrings of a definition together: a class may show its example in a method."""
    inner = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return "\n".join(ast.get_docstring(n) or "" for n in inner)


def guard_public_names(root):
    """Public names stand in `__all__`, are documented with an example, and a theme exports those of its chapters."""
    found = []
    for path in sorted((root / "companion").rglob("*.py")):
        parts = path.relative_to(root / "companion").with_suffix("").parts
        if any(part.startswith("_") and part != "__init__" for part in parts) or parts == ("__init__",):
            continue
        where, names, defined = short(path, root), _exported(path), _defined(path)
        is_theme = parts[0] in THEMES
        if parts[0] == "exercises" and parts[-1] in THEMES:
            continue  # checks: a dict, read by name
        if names is None:
            if is_theme and len(parts) == 2 and parts[1] == "__init__" and not defined:
                continue  # a theme whose chapters are still to come
            found.append(f"{where} has no literal __all__: list its public names in reading order")
            continue
        for name in names:
            node = defined.get(name)
            if node is None:
                continue  # re-exported or a constant: documented where it is defined
            text = ast.get_docstring(node) or ""
            if not text:
                found.append(
                    f"{where}:{node.lineno} {name} has no docstring: say what it computes, its formula and an example"
                )
            elif ">>>" not in _examples(node) and not _needs_none(node, text, parts, name):
                found.append(f"{where}:{node.lineno} {name} has no example: add two lines with >>> that doctest runs")
            if (
                is_theme
                and text
                and not _is_record(node)
                and not re.search(r"^\s*(Papers?|Chapter):\s*\S", text, flags=re.M)
            ):
                found.append(
                    f"{where}:{node.lineno} {name} names neither paper nor chapter: add `Paper: key` (or `Chapter:"
                    " theme/name`)"
                )
    for theme in THEMES:
        init = root / "companion" / theme / "__init__.py"
        if not init.exists():
            continue
        exported = set(_exported(init) or [])
        for module in sorted(init.parent.iterdir()):
            file = module / "__init__.py" if module.is_dir() else module
            if module.name.startswith("_") or file.suffix != ".py" or not file.exists():
                continue
            for name in _exported(file) or []:
                if name not in exported:
                    found.append(
                        f"{short(init, root)} does not export {name} of {short(file, root)}: import it there and list"
                        " it in __all__"
                    )
    return found


def _needs_none(node, text, parts, name):
    """Records, readers of files that are not there, and functions that only display something in a notebook."""
    if _is_record(node) or "FileNotFoundError" in text:
        return True
    return parts[0] in ("show", "figures", "claims", "exercises") and name in (
        "show",
        "animate",
        "claim",
        "check",
        "put",
    )


def guard_docstrings(root):
    """Docstrings are valid reStructuredText once their Google sections are read, so that the API pages build."""
    from docutils import nodes
    from docutils.core import publish_doctree
    from docutils.parsers.rst import roles
    from sphinx.ext.napoleon import Config, GoogleDocstring

    to_rst = module(HERE / "book" / "_ext" / "site_pages.py").to_rst
    for name in ("math", "doc"):
        roles.register_local_role(name, lambda role, raw, text, *rest, **more: ([nodes.literal("", text)], []))
    settings = {"report_level": 5, "halt_level": 6, "warning_stream": False}
    found = []
    for path in sorted((root / "companion").rglob("*.py")):
        for name, node in _defined(path).items():
            inner = (
                [node, *(n for n in node.body if isinstance(n, ast.FunctionDef))]
                if isinstance(node, ast.ClassDef)
                else [node]
            )
            for part in inner:
                text = ast.get_docstring(part)
                if not text or name.startswith("_") or (part is not node and part.name.startswith("_")):
                    continue
                try:
                    plain = str(GoogleDocstring(text, Config(napoleon_use_param=True, napoleon_use_rtype=False)))
                except Exception as error:
                    found.append(f"{short(path, root)}:{part.lineno} {part.name}: {error}")
                    continue
                plain = ".. default-role:: literal\n\n" + "\n".join(to_rst(plain.splitlines()))
                tree = publish_doctree(plain, settings_overrides=settings)
                for message in tree.findall(nodes.system_message):
                    if message["level"] >= 2 and "nknown" not in message.astext():
                        found.append(
                            f"{short(path, root)}:{part.lineno} the docstring of {part.name} is not valid"
                            f" reStructuredText, mend it or the site does not build: {message.astext().splitlines()[0]}"
                        )
    return found


# --- the register ----------------------------------------------------------------------------------------------------


def guard_register(root):
    """Register, docstrings, claims and links agree in both directions."""
    from companion import papers

    papers.code.cache_clear()  # it remembers a folder, and a test changes it
    found = papers.disagreements(root / "book", root / "companion")
    return [f"{line}: mend companion/papers, the docstring or the chapter" for line in found]


# --- chapters --------------------------------------------------------------------------------------------------------


def guard_pairs(root):
    """Each text has its notebook, in step with it, with outputs of the code it shows, small enough."""
    pairs = tool("pairs")
    found = [problem for text in chapters(root) for problem in pairs.problems(text)]
    texts = set(chapters(root))
    for notebook in sorted((root / "book").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in notebook.parts and notebook.with_suffix(".md") not in texts:
            found.append(f"{short(notebook, root)} has no text: run `make new-chapter`, or remove it")
    return found


ROLE = re.compile(r"\{[a-zA-Z][\w:+.-]*\}`")
DIRECTIVE = re.compile(r"^(`{3,}|~{3,}|:{3,})\s*\{(?!code-cell\})", flags=re.M)
OTHER_MYST = (
    (re.compile(r"^\([\w-]+\)=\s*$", flags=re.M), "a target `(name)=`"),
    (re.compile(r"\{\{.*?\}\}"), "a substitution"),
    (re.compile(r"^%.*$", flags=re.M), "a MyST comment"),
    (re.compile(r"(?<=[)\]`])\{[.#][\w-]+[^}]*\}|(?<=\))\{\w+="), "an attribute list"),
    (re.compile(r"\]\(#[\w-]+\)"), "a link to an anchor of the page"),
)


def guard_plain_markdown(root):
    """Chapters read the same on Colab, in Jupyter and on GitHub: no roles, directives or other MyST."""
    found = []
    for path in chapters(root):
        raw = path.read_text(encoding="utf-8")
        for match in DIRECTIVE.finditer(raw):
            found.append(
                f"{short(path, root)}:{_line(raw, match)} has a directive: write a block quote that opens with a bold"
                " word"
            )
        text = re.sub(r"``.*?``", "", prose(raw))
        for match in ROLE.finditer(text):
            found.append(
                f"{short(path, root)}:{_line(text, match)} has a role {match[0]}: write plain Markdown or $...$"
            )
        text = re.sub(r"`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        for pattern, what in OTHER_MYST:
            for match in pattern.finditer(text):
                found.append(
                    f"{short(path, root)}:{_line(text, match)} has {what} ({match[0][:30]}): Colab shows it raw,"
                    " remove it"
                )
    return found


def _line(text, match):
    return text.count("\n", 0, match.start()) + 1


def guard_decimals(root):
    """A decimal or percentage in prose stands in mathematics or code type, or in a sentence that links its paper."""
    from companion import papers

    found = []
    for path in chapters(root):
        text = prose(path.read_text(encoding="utf-8"))
        text = re.sub(r"<!--.*?-->", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        text = re.sub(r"\$\$.*?\$\$|`[^`]*`|\$[^$]*\$", lambda m: "x" + "\n" * m[0].count("\n"), text, flags=re.S)
        start = 0
        for block in re.split(r"(\n\s*\n|\n(?=\s*(?:[-*|>#]|\d+\. )))", text):
            for sentence in re.split(r"(?<=[.!?:;])\s+(?=[A-Z*\[(\"'])", block):
                linked = any(
                    papers.key_of_url(address) for address in re.findall(r"\]\((https?://[^)\s]+)\)", sentence)
                )
                plain = re.sub(r"\]\([^)]*\)|https?://\S+", "]", sentence)
                number = re.search(
                    r"(?<![\w.])\d+\.\d+(?![\w.]*\w)|(?<![\w.])\d+(\.\d+)?\s?(%|per cent|percent)", plain
                )
                if number and not linked:
                    line = text.count("\n", 0, start + max(block.find(number[0]), 0)) + 1
                    found.append(
                        f"{short(path, root)}:{line} types the number {number[0]} into prose: a measured number comes"
                        " from a cell (say, table, claim), a setting goes into `code` or $...$, a quoted one into a"
                        " sentence that links its paper"
                    )
            start += len(block)
    return found


class _Images(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.figures, self.captions, self.inside, self.words = [], 0, [], False, ""

    def handle_starttag(self, tag, attrs):
        if tag == "img" and dict(attrs).get("aria-hidden") != "true":
            self.images.append(dict(attrs).get("alt"))
        self.figures += tag == "figure"
        if tag == "figcaption":
            self.inside, self.words = True, ""

    def handle_endtag(self, tag):
        if tag == "figcaption":
            self.captions.append(self.words.strip())
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.words += data


def guard_figures(root):
    """Every picture of a notebook has alt text and a caption."""
    found = []
    for path, cells in notebooks(root):
        for number, cell in enumerate(cells):
            where = f"{short(path, root)} cell {number}"
            if cell["cell_type"] == "markdown":
                text = re.sub(r"`[^`]*`", "", "".join(cell["source"]))
                if re.search(r"!\[\s*\]\(", text):
                    found.append(f"{where} has an image without alt text: ![say what it shows](...)")
                continue
            for output in cell.get("outputs", []):
                data = output.get("data") or {}
                page = "".join(data.get("text/html", ""))
                if any(kind.startswith("image/") for kind in data) and "<img" not in page:
                    found.append(f"{where} shows a bare picture: use figures.show(fig, alt=..., caption=...)")
                seen = _Images()
                seen.feed(page)
                for alt in seen.images:
                    if not alt or len(alt.split()) < 4:
                        found.append(f"{where} has a picture with alt text {alt!r}: say in a sentence what it shows")
                if seen.figures and (len(seen.captions) < seen.figures or not all(seen.captions)):
                    found.append(f"{where} has a figure without caption: state the finding in one")
    return found


def guard_setup_cells(root):
    """The cell that installs the package on Colab is the same in all chapters, but for the extras it names."""
    found, seen = [], {}
    for path in chapters(root):
        text = path.read_text(encoding="utf-8")
        cells = re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```", text, flags=re.S | re.M)
        first = cells[0] if cells else ""
        if not re.search(r":tags: \[.*\bsetup\b", first):
            found.append(
                f"{short(path, root)}: the first code cell must be the setup cell of tools/chapter_template.md"
            )
            continue
        seen.setdefault(re.sub(r"feature-geometry(\[[\w,-]+\])? @", "feature-geometry @", first).strip(), []).append(
            path
        )
    if len(seen) > 1:
        usual = max(seen.values(), key=len)[0]
        for paths in sorted(seen.values(), key=len)[:-1]:
            found += [
                f"{short(p, root)}: its setup cell differs from that of {short(usual, root)}: copy that one"
                for p in paths
            ]
    return found


def guard_budget(root):
    """A notebook is at most 800 kB, asks for no wall-clock time, and its chapter is not too large for its papers."""
    found = []
    for path, cells in notebooks(root):
        size = path.stat().st_size
        if size > MAX_BYTES:
            found.append(
                f"{short(path, root)} has {size / 1000:.0f} kB: lower the dpi or rasterise, at most 800 kB are allowed"
            )
        for number, cell in enumerate(cells):
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and re.search(r"%%?time|perf_counter|time\.time\(|timeit", source):
                found.append(
                    f"{short(path, root)} cell {number} measures time: count operations, or move it to benchmarks/"
                )
            if cell["cell_type"] == "code" and "setup" not in (cell.get("metadata", {}).get("tags") or []):
                lines = [line for line in source.splitlines() if line.strip()]
                if len(lines) > 40:
                    found.append(
                        f"{short(path, root)} cell {number} has {len(lines)} lines: move mathematics to companion, at"
                        " most 40"
                    )
    return found


def guard_exercises(root):
    """At least four exercises, two that mark themselves; stubs tagged, solutions last, checks and their tests there."""
    found = []
    for path in chapters(root):
        if path.parent == root / "book":
            continue  # a page of the book itself, of no theme: it teaches no method that could be exercised
        text, name, theme = path.read_text(encoding="utf-8"), path.stem, path.parent.name
        where = short(path, root)
        plain = prose(text)
        exercises = [m.start() for m in re.finditer(r"^### Exercise \d+", plain, flags=re.M)]
        if len(exercises) < 4:
            found.append(f"{where} has {len(exercises)} exercises (### Exercise n: ...), at least 4 are needed")
        cells = [(m.start(), m[1]) for m in re.finditer(r"^```\{code-cell\}[^\n]*\n(.*?)^```", text, flags=re.S | re.M)]
        stubs = "\n".join(body for _, body in cells if not _tagged(body, "solution"))
        keys = sorted(set(re.findall(rf"check\(\s*[\"']({re.escape(name)}/[\w-]+)[\"']", stubs)))
        if len(keys) < 2:
            found.append(
                f'{where} has {len(keys)} exercises with check("{name}/n", answer), at least 2 must mark themselves'
            )
        tagged = {tag: [at for at, body in cells if _tagged(body, tag)] for tag in ("exercise", "solution")}
        if len(tagged["exercise"]) < len(keys):
            found.append(f"{where} has fewer cells tagged exercise than checks: tag each stub")
        if not tagged["solution"]:
            found.append(f"{where} has no cell tagged solution: each exercise in code needs one, after all exercises")
        elif tagged["exercise"] and min(tagged["solution"]) < max(tagged["exercise"]):
            found.append(f"{where} shows a solution before the last exercise: move solutions behind them")
        for at, body in cells:
            if _tagged(body, "solution") and not _tagged(body, "hide-cell"):
                found.append(
                    f"{where}:{text.count(chr(10), 0, at) + 1} a solution is not folded: tag it solution, hide-cell"
                )
        solved = "\n".join(body for _, body in cells if _tagged(body, "solution"))
        checks = root / "companion" / "exercises" / f"{theme}.py"
        tests = root / "tests" / "exercises" / f"test_{theme}.py"
        known = set(re.findall(r"[\"']([\w-]+/[\w-]+)[\"']", read(checks))) if checks.exists() else set()
        tested = read(tests) if tests.exists() else ""
        for key in keys:
            if key not in solved:
                found.append(f'{where}: no solution ends in check("{key}", ...): add it')
            if key not in known:
                found.append(
                    f"{short(checks, root) if checks.exists() else checks.name} has no check {key}: add it to CHECKS"
                )
            if key not in tested and f"{name}/{{" not in tested:
                found.append(
                    f"tests/exercises/test_{theme}.py does not test {key}: solution correct, stub not, two planted"
                    " wrong answers"
                )
    return found


def untested(verdicts, keys):
    """Exercises whose tests lack a correct solution, an untouched stub, or two wrong answers with different hints.

    Args:
        verdicts: (key, state, message) of every answer that the tests judged.
        keys: of the exercises that mark themselves.
    """
    found = []
    for key in keys:
        seen = {(state, message) for name, state, message in verdicts if name == key}
        count = {state: len([1 for s, _ in seen if s == state]) for state in ("correct", "not attempted", "not yet")}
        if not count["correct"]:
            found.append(f"no test shows that the solution of {key} is correct: add it to tests/exercises")
        if not count["not attempted"]:
            found.append(f"no test shows that the stub of {key} is not attempted: add it to tests/exercises")
        if count["not yet"] < 2:
            found.append(f"{key} has {count['not yet']} planted wrong answers with hints of their own: test at least 2")
    return found


def _tagged(body, tag):
    match = re.search(r"^:tags: \[(.*?)\]", body, flags=re.M)
    return bool(match) and tag in [part.strip() for part in match[1].split(",")]


# --- links and identity ----------------------------------------------------------------------------------------------


def guard_links(root):
    """Relative links of texts and pages lead to files; links to our repository lead to files that are in it."""
    found = []
    address = repository(root)
    listed = set(re.findall(r"file:\s*(\S+)", read(root / "_toc.yml"))) if (root / "_toc.yml").exists() else set()
    generated = (
        re.findall(r"^book/\S+", read(root / ".gitignore"), flags=re.M) if (root / ".gitignore").exists() else []
    )
    pages = [p for p in tracked(root) if p.suffix == ".md" and not short(p, root).startswith(("tests/", "tools/"))]
    for path in pages:
        text = re.sub(r"`[^`\n]*`", "", prose(read(path)))
        for target in re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", text):
            where = f"{short(path, root)} links {target}"
            if address and target.startswith(address):
                inside = re.match(r"/(?:blob|tree|raw)/main/([^?#]*)", target[len(address) :])
                if inside and not (root / inside[1]).exists():
                    found.append(f"{where}, but {inside[1]} is not in the repository: mend the path or add the file")
            elif not re.match(r"[a-z][a-z0-9+.-]*:|#", target):
                file = (path.parent / target.split("#")[0].split("?")[0]).resolve()
                inside = file.relative_to(root.resolve()).as_posix() if file.is_relative_to(root.resolve()) else ""
                made = any(inside == g.rstrip("/") or inside.startswith(g.rstrip("/") + "/") for g in generated)
                if not file.exists() and not made:
                    found.append(f"{where}, which is no file: mend the path")
                elif file.suffix == ".ipynb" and inside not in listed and short(path, root).startswith("book/"):
                    found.append(f"{where}, which is not in _toc.yml: link chapters only once they are listed")
                elif file.suffix == ".md" and tool("pairs").is_chapter(file):
                    found.append(f"{where}, the text of a chapter: link its .ipynb, which is the page")
    return found


def repository(root):
    """The one address of the repository: what pyproject.toml says."""
    match = re.search(r"^Repository\s*=\s*[\"'](\S+?)[\"']", read(root / "pyproject.toml"), flags=re.M)
    return match[1].rstrip("/") if match else ""


def guard_identity(root):
    """One version and one repository address, wherever they stand."""
    found = []
    address = repository(root)
    if not address:
        return ["pyproject.toml has no Repository under [project.urls]: it is where the address is set"]
    owner, name = address.rstrip("/").split("/")[-2:]
    pattern = re.compile(
        rf"https?://(?:www\.)?github\.com/([\w.-]+)/{re.escape(name)}(?![\w-])|github/([\w.-]+)/{re.escape(name)}(?![\w-])"
    )
    version = re.search(r"__version__\s*=\s*[\"']([^\"']+)", read(root / "companion" / "_version.py"))
    if not version:
        found.append("companion/_version.py sets no __version__: it is the one place of the version")
    for path in tracked(root):
        if (
            path.suffix in (".ipynb", ".md", ".py", ".toml", ".yml", ".yaml", ".cff", ".cfg", ".txt", ".html", ".svg")
            or path.name == "run"
        ):
            for match in pattern.finditer(read(path)):
                if (match[1] or match[2]) != owner:
                    found.append(
                        f"{short(path, root)} names {match[0]}: the repository is {address} (pyproject.toml says so)"
                    )
    if version:
        for file, regex in (
            ("CITATION.cff", r"^version:\s*[\"']?([\w.+-]+)"),
            ("CHANGELOG.md", r"^## \[?v?(\d[\w.+-]*)"),
        ):
            stated = re.search(regex, read(root / file), flags=re.M) if (root / file).exists() else None
            if stated and stated[1] != version[1]:
                found.append(f"{file} says version {stated[1]}, companion/_version.py says {version[1]}: make them one")
        typed = re.search(r"^version\s*=\s*[\"']", read(root / "pyproject.toml"), flags=re.M)
        if typed:
            found.append("pyproject.toml types a version: it is read from companion/_version.py (dynamic)")
    config = (
        re.search(r"^\s*url:\s*(https://\S+)", read(root / "_config.yml"), flags=re.M)
        if (root / "_config.yml").exists()
        else None
    )
    if config and config[1].rstrip("/") != address:
        found.append(f"_config.yml says the repository is {config[1]}, pyproject.toml says {address}: make them one")
    return found


# Put together here, so that this file does not name them itself.
REGISTRIES = (
    "py" + "pi.org",
    "python" + "hosted.org",
    "registry.npm" + "js",
    "download.py" + "torch.org",
    "conda.ana" + "conda",
    "arti" + "factory",
)
MACHINES = re.compile(r"(?<![\w./:~-])/(?:home|Users|root|tmp|work|mnt)/\w[\w/.-]*")


def guard_addresses(root):
    """Nothing committed names a package registry or a path of somebody's machine."""
    found = []
    for path in tracked(root):
        if path.name.startswith("LICENSE") or "_static/mathjax" in path.as_posix():
            continue
        text = read(path)
        if path.suffix == ".ipynb":
            text = re.sub(r"\"image/png\": \"[^\"]*\"|base64,[A-Za-z0-9+/=\\n]*", "", text)
        for word in REGISTRIES:
            if word in text:
                found.append(
                    f"{short(path, root)} names {word.strip()}: leave registries to the reader's own pip settings"
                )
        if match := MACHINES.search(text):
            found.append(f"{short(path, root)} names {match[0]}, a path of one machine: make it relative")
    return found


def guard_toc(root):
    """Each finished chapter is in the table of contents once, with its extension, below its theme."""
    listed = re.findall(r"file:\s*(\S+)", read(root / "_toc.yml"))
    found = [f"_toc.yml lists {name} twice: remove one" for name in sorted({n for n in listed if listed.count(n) > 1})]
    for path in chapters(root):
        name = short(path, root).removesuffix(".md")
        if name in listed or f"{name}.md" in listed:
            found.append(
                f"_toc.yml lists {name} without .ipynb: chapters are named with it, or the build finds two files"
            )
    for name in listed:
        if name.endswith(".ipynb") and not (root / name).exists():
            found.append(f"_toc.yml lists {name}, which does not exist: commit the chapter first")
    return found


def guard_parts(root):
    """Each listed chapter is in the map of its theme's page."""
    found = []
    for name in re.findall(r"file:\s*(\S+\.ipynb)", read(root / "_toc.yml")):
        index = (root / name).parent / "index.md"
        if index.exists() and f"]({Path(name).name})" not in read(index):
            found.append(f"{short(index, root)} does not link {Path(name).name}: add the link to its chapter map")
    return found


GUARDS = {name.removeprefix("guard_"): value for name, value in list(globals().items()) if name.startswith("guard_")}
