"""What a chapter shows besides figures: real source, sentences with computed numbers, tables.

Public: `show`, `say`, `table`; and what the other displays of the book use: `source`, `number`, `spread`, `put`.
"""

import ast
import html
import inspect
import math
import string
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["number", "put", "say", "show", "source", "spread", "table"]

REPOSITORY = "https://github.com/feature-geometry/feature-geometry"
_THEMES = ("dimensionality", "collapse", "mixup", "calibration", "shortcuts", "anomaly")


def put(bundle: dict[str, Any]) -> None:
    """Display one output that carries several forms of the same thing, by mime type.

    Outside a notebook the plain text is printed.

    >>> put({"text/plain": "a card"})
    a card
    """
    if "IPython" in sys.modules:
        from IPython import get_ipython
        from IPython.display import display

        if get_ipython() is not None:
            display(bundle, raw=True)
            return
    print(bundle["text/plain"])


def number(value: Any) -> str:
    """Write a number with three significant digits, without an exponent between 0.001 and a million.

    >>> number(0.12345), number(1234.5), number(7), number(1.5e-7)
    ('0.123', '1230', '7', '1.50e-07')
    """
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if math.isnan(value) or math.isinf(value):
        return str(value)
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    if not 1e-3 <= abs(rounded) < 1e6:
        return f"{value:.2e}"
    return f"{rounded:.{_decimals(rounded)}f}"


def spread(values: Sequence[Any]) -> str:
    """Write values over seeds as mean ± standard deviation, with as many decimals as the mean deserves.

    >>> spread([0.912, 0.905, 0.921])
    '0.913 ± 0.008'
    >>> spread([3, 3, 3])
    '3.00 ± 0'
    """
    mean, sd = mean_and_sd([float(_plain(value)) for value in values])
    text = number(mean)
    if sd == 0 or math.isnan(sd):
        return f"{text} ± {number(sd)}"
    decimals = len(text.partition(".")[2])
    around = f"{sd:.{decimals}f}"
    if "e" in text or float(around) == 0:
        around = f"{float(f'{sd:.1g}'):g}"
    return f"{text} ± {around}"


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation over seeds (divided by n - 1; 0 for one value).

    >>> mean_and_sd([1.0, 3.0])
    (2.0, 1.4142135623730951)
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1 or all(value == values[0] for value in values):
        return (values[0], 0.0)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))


def source(fn: Callable | type) -> str:
    """Return the source of a function or class, each docstring cut to its first line so that the code stands out.

    Args:
        fn: a function, method or class written in Python.

    Raises:
        TypeError: there is no Python source to show, for an instance or a function written in C.

    >>> print(source(mean_and_sd).splitlines()[1])
        \"\"\"Return the mean and the standard deviation over seeds (divided by n - 1; 0 for one value).\"\"\"
    """
    fn = inspect.unwrap(fn) if callable(fn) else fn
    try:
        text = textwrap.dedent(inspect.getsource(fn))
    except (TypeError, OSError) as error:
        raise TypeError(f"expected a function or class with Python source, got {fn!r}") from error
    lines = text.splitlines()
    for node in reversed(list(_documented(ast.parse(text)))):
        literal = node.body[0]
        first = inspect.cleandoc(node.body[0].value.value).splitlines()[0]
        # The literal keeps its own quotes: an r-prefix stays where the first line has a backslash.
        prefix = "r" if "\\" in first else ""
        lines[literal.lineno - 1 : literal.end_lineno] = [" " * literal.col_offset + f'{prefix}"""{first}"""']
    return "\n".join(lines)


def show(*fns: Callable | type) -> None:
    """Display the real source of companion functions, with links to the API page and to the file.

    Args:
        *fns: functions or classes of the companion.

    Raises:
        TypeError: there is nothing to show, or no Python source.
    """
    if not fns:
        raise TypeError("expected a function or class to show, got nothing")
    for fn in fns:
        text, fn = source(fn), inspect.unwrap(fn)
        name = f"{fn.__module__}.{fn.__qualname__}"
        links = _links(fn)
        markdown = f"```python\n{text}\n```\n"
        if links:
            markdown += f'\n<p class="companion-source"><code>{html.escape(name)}</code> · {" · ".join(links)}</p>\n'
        put({"text/markdown": markdown, "text/plain": f"# {name}\n{text}"})


def say(text: str, **values: Any) -> None:
    """Display a Markdown sentence with computed numbers, so that no measured number is ever typed.

    Fields are filled as `str.format` does; a field without a format shows three significant digits, a list over seeds
    shows mean ± standard deviation. Braces of mathematics are doubled: `$x_{{i}}$`.

    Args:
        text: Markdown with fields such as `{T}` or `{T:.2f}`.
        **values: what fills them: numbers, one-element tensors, lists over seeds, strings.

    Raises:
        ValueError: a field has no value, or a value no field.

    >>> say("The temperature is {T}, the error {e:.1%}.", T=1.2345, e=0.0321)
    The temperature is 1.23, the error 3.2%.
    """
    sentence = fill(text, values)
    put({"text/markdown": sentence, "text/plain": sentence})


def fill(text: str, values: Mapping[str, Any]) -> str:
    """Return the text with its fields filled as `say` fills them.

    >>> fill("{a} of {b}", {"a": 1, "b": 2.0})
    '1 of 2.00'
    """
    fields = {name.split(".")[0].split("[")[0] for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    if missing := sorted(fields - set(values)):
        raise ValueError(f"expected a value for each field of the sentence, missing: {', '.join(missing) or 'a name'}")
    if unused := sorted(set(values) - fields):
        raise ValueError(f"expected a field for each value, the sentence does not use: {', '.join(unused)}")
    return text.format(**{name: _Shown(value) for name, value in values.items()})


def table(rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]], caption: str | None = None) -> None:
    """Display a table: numbers with three significant digits, lists over seeds as mean ± standard deviation.

    Args:
        rows: one mapping per row, all with the same keys, or one sequence per column, all of the same length.
        caption: a sentence that says what the table shows.

    Raises:
        ValueError: there are no rows, or they do not fit together.

    >>> table([{"method": "none", "ECE": [0.11, 0.12, 0.13]}, {"method": "one temperature", "ECE": 0.02}])
    method           ECE
    none             0.120 ± 0.010
    one temperature  0.0200
    """
    names, body = _cells(rows)
    widths = [max(len(row[i]) for row in [names, *body]) for i in range(len(names))]
    plain = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [names, *body]]
    style = 'style="text-align:left;padding:.2em 1.2em .2em 0"'
    head = "".join(f'<th scope="col" {style}>{html.escape(name)}</th>' for name in names)
    lines = ['<table class="companion-table">']
    if caption:
        plain.insert(0, caption)
        lines.append(f'<caption style="text-align:left">{html.escape(caption)}</caption>')
    lines.append(f"<thead><tr>{head}</tr></thead>\n<tbody>")
    for row in body:
        data = "".join(f"<td {style}>{html.escape(cell)}</td>" for cell in row)
        lines.append(f"<tr>{data}</tr>")
    put({"text/html": "\n".join([*lines, "</tbody></table>"]), "text/plain": "\n".join(plain)})


def _cells(rows: Any) -> tuple[list[str], list[list[str]]]:
    if isinstance(rows, Mapping):
        columns = {str(name): list(column) for name, column in rows.items()}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"expected columns of the same length, got {lengths}")
        names = list(columns)
        body = [list(row) for row in zip(*columns.values())]
    else:
        rows = list(rows)
        if not all(isinstance(row, Mapping) for row in rows):
            raise ValueError("expected one mapping of column to value per row")
        names = [str(name) for name in rows[0]] if rows else []
        for i, row in enumerate(rows):
            if set(map(str, row)) != set(names):
                raise ValueError(f"expected the columns {names} in each row, got {list(row)} in row {i}")
        body = [[{str(k): v for k, v in row.items()}[name] for name in names] for row in rows]
    if not body:
        raise ValueError("expected at least one row, got none")
    return names, [[_shown(value) for value in row] for row in body]


def _plain(value: Any) -> Any:
    """A Python number where there is one: torch and numpy scalars print as constructors otherwise."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def _shown(value: Any) -> str:
    value = _plain(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple) and value and all(isinstance(_plain(v), int | float) for v in value):
        return spread(value)
    return number(value)


class _Shown:
    """A value inside a sentence: with a format it is formatted, without one it is shown as in a table."""

    def __init__(self, value: Any):
        self.value = _plain(value)

    def __format__(self, form: str) -> str:
        if not form:
            return _shown(self.value)
        if hasattr(self.value, "__len__") and not isinstance(self.value, str):
            mean, sd = mean_and_sd([float(_plain(v)) for v in self.value])
            return f"{mean:{form}} ± {sd:{form}}"
        return format(self.value, form)

    def __getitem__(self, key: Any) -> "_Shown":
        return _Shown(self.value[key])


def _documented(tree: ast.Module) -> list[ast.AST]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node, clean=False)]
    return sorted(nodes, key=lambda node: node.body[0].lineno)


def _decimals(value: float) -> int:
    return max(0, 2 - math.floor(math.log10(abs(value))))


def _links(fn: Callable | type) -> list[str]:
    """Links to the API page of a companion function, when it has an entry there, and to its file."""
    parts = fn.__module__.split(".")
    if parts[0] != "companion":
        return []
    page = parts[1] if len(parts) > 1 and parts[1] in _THEMES else "foundation"
    path = Path(inspect.getsourcefile(fn)).resolve().relative_to(Path(__file__).resolve().parent.parent).as_posix()
    name = f"{fn.__module__}.{fn.__qualname__}"
    file = f'<a href="{REPOSITORY}/blob/main/{path}">{path}</a>'
    if not _is_documented(fn, parts):
        return [file]
    return [f'<a class="companion-api" href="../reference/api/{page}.html#{name}">API</a>', file]


def _is_documented(fn: Callable | type, module: list[str]) -> bool:
    """Whether the API pages list it: they show what a theme, or a module of the foundation, exports."""
    first, *rest = fn.__qualname__.split(".")
    home = import_module(".".join(module[:2]))
    return first in getattr(home, "__all__", []) and not any(
        name.startswith("_") and not name.endswith("__") for name in rest
    )
