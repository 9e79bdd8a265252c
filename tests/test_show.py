"""Tests of companion.show: shown source is real source, numbers are rounded as promised."""

import ast
import inspect
import textwrap

import numpy as np
import pytest
import torch

import companion.runtime
import companion.show
from companion.show import fill, mean_and_sd, number, say, show, source, spread, table


@pytest.fixture
def shown(monkeypatch):
    bundles = []
    monkeypatch.setattr(companion.show, "put", bundles.append)
    return bundles


def without_docstrings(text):
    tree = ast.parse(textwrap.dedent(text))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


class Documented:
    r"""A class with \alpha in its docstring.

    And more.
    """

    @staticmethod
    def area(x):
        """Return x.

        >>> 1 + 1
        2
        """
        return x  # kept

    def bare(self):
        return 1

    def only_words(self):
        """Say nothing."""


@pytest.mark.parametrize("fn", [companion.runtime.seeds, companion.runtime.device, Documented, Documented.area])
def test_shown_source_is_the_real_source_but_for_docstrings(fn):
    text = source(fn)
    assert without_docstrings(text) == without_docstrings(inspect.getsource(fn))
    assert ">>>" not in text


def test_first_line_of_docstring_and_comments_stay():
    text = source(Documented)
    assert r'r"""A class with \alpha in its docstring."""' in text
    assert '"""Return x."""' in text
    assert "# kept" in text
    assert "And more" not in text


def test_decorated_functions_show_what_they_wrap():
    import functools

    def plain(x):
        return x

    @functools.wraps(plain)
    def wrapped(*args):
        return plain(*args)

    assert source(wrapped).startswith("def plain(x):")


@pytest.mark.parametrize("fn", [len, 3, None, torch.relu])
def test_nothing_to_show(fn):
    with pytest.raises(TypeError, match="Python source"):
        source(fn)


def test_show_links_api_page_and_file(shown):
    show(companion.runtime.seeds)
    text = shown[0]["text/markdown"]
    assert text.startswith("```python\ndef seeds(")
    assert "../reference/api/foundation.html#companion.runtime.seeds" in text
    assert "/blob/main/companion/runtime.py" in text
    with pytest.raises(TypeError, match="got nothing"):
        show()


def test_functions_from_elsewhere_have_no_links(shown):
    show(Documented)
    assert "API" not in shown[0]["text/markdown"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.500"),
        (99.96, "100"),
        (9.996, "10.0"),
        (123456.7, "123000"),
        (1e6, "1.00e+06"),
        (-0.00012, "-1.20e-04"),
        (0.0, "0"),
        (7, "7"),
        (True, "True"),
        ("adam", "adam"),
        (np.float64(1.5), "1.50"),
        (torch.tensor(2.25), "2.25"),
        (float("nan"), "nan"),
    ],
)
def test_three_significant_digits(value, text):
    assert number(value) == text


def test_spread_over_seeds():
    assert spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert spread([0.9980, 0.9981, 0.9982]) == "0.998 ± 0.0001"
    assert spread(torch.tensor([0.5, 0.5, 0.5])) == "0.500 ± 0"
    mean, sd = mean_and_sd([1.0, 2.0, 4.0])
    np.testing.assert_allclose([mean, sd], [np.mean([1, 2, 4]), np.std([1, 2, 4], ddof=1)])


def test_say_fills_fields(shown):
    say(
        "$x_{{i}}$ is **{a}**, {b:.1%}, {c}, {d:.1f}", a=torch.tensor(1.0), b=np.float32(0.25), c="w", d=[1.0, 2.0, 3.0]
    )
    assert shown[0]["text/markdown"] == "$x_{i}$ is **1.00**, 25.0%, w, 2.0 ± 1.0"


@pytest.mark.parametrize(("text", "values"), [("{a}", {}), ("a", {"a": 1}), ("{}", {}), ("{a} {b}", {"a": 1})])
def test_fields_and_values_have_to_match(text, values):
    with pytest.raises(ValueError, match="expected a"):
        fill(text, values)


def test_table_takes_rows_or_columns(shown):
    table([{"a": 1, "b": [1.0, 2.0, 3.0]}, {"b": np.array([2.0, 2.0]), "a": 2.34567}], caption="What & why")
    table({"a": [1, 2.34567], "b": [[1.0, 2.0, 3.0], [2.0, 2.0]]}, caption="What & why")
    assert shown[0] == shown[1]
    assert "<caption" in shown[0]["text/html"]
    assert "What &amp; why" in shown[0]["text/html"]
    assert "2.00 ± 1.00" in shown[0]["text/plain"]


@pytest.mark.parametrize("rows", [[], {}, {"a": [1], "b": [1, 2]}, [{"a": 1}, {"b": 1}], [1, 2]])
def test_tables_that_do_not_fit(rows):
    with pytest.raises(ValueError, match="expected"):
        table(rows)


def test_what_the_api_pages_do_not_list_is_linked_to_its_file_only():
    from companion import runtime
    from companion.show import _links

    assert len(_links(runtime.seeds)) == 2
    assert len(_links(runtime._derived)) == 1
