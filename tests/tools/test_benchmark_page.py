"""Tests of the benchmarks page and of the comparisons behind it, on planted numbers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = {
    "date": "2030-01-02",
    "machine": {
        "processor": "Abacus",
        "instructions": "beads",
        "threads": 2,
        "card": "",
        "system": "wood",
        "python": "3.11",
    },
    "missing": {"lost>=1": "no such thing"},
    "absent": {"later": "cannot import name 'Later' (somewhere)"},
    "comparisons": [
        {
            "name": "Adding, 10 x 2",
            "theme": "collapse",
            "wanted": 3,
            "limit": "fingers",
            "ms": 2.0,
            "rounds": 3,
            "peers": {"slow": {"ms": 4.0, "ratio": 2.0}, "gone": {"why": "not installed (gone)"}},
            "fastest": "slow",
            "factor": 2.0,
            "failed": [],
        }
    ],
    "growth": [{"name": "Adding", "axis": "rows", "points": [{"size": 10, "ms": 1.0, "mb": None}]}],
    "on_card": [{"name": "Adding, 1e9", "why": "not measured: no GPU"}],
    "versions": {"torch": "9.9", "gone": ""},
}


def test_the_page_says_what_was_measured_and_what_was_not(script, tmp_path):
    page = script("tools/benchmark_page.py")
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "book/reference").mkdir(parents=True)
    assert page.build(tmp_path) == 0
    written = tmp_path / "book/reference/benchmarks.md"
    assert "Nothing has been measured yet" in written.read_text()
    (tmp_path / "benchmarks/results/cpu.json").write_text(json.dumps(RECORD))
    assert page.build(tmp_path) == 1
    text = written.read_text()
    for part in ("Abacus", "2 threads", "2030-01-02", "| Adding, 10 x 2 | 2 ms | slow 4 ms | 2.0 | 3 |", "fingers",
                 "not measured: no GPU", "lost\\>=1", "Left out: later", "torch 9.9"):  # fmt: skip
        assert part in text
    pictures = sorted((tmp_path / "book/reference/benchmarks").glob("*.png"))
    assert [picture.stem for picture in pictures] == ["factors", "memory", "time"]
    times = [picture.stat().st_mtime_ns for picture in pictures]
    page.build(tmp_path)
    assert [picture.stat().st_mtime_ns for picture in pictures] == times, "drawn again without need"


@pytest.fixture
def side_by_side(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield __import__("side_by_side")
    sys.modules.pop("side_by_side", None)


def test_a_fast_wrong_answer_fails(side_by_side, capsys):
    def absent():
        raise ImportError("no module named absent")

    case = side_by_side.Comparison(
        "two", lambda: 2.0, {"right": lambda: 2.0001, "wrong": lambda: 3.0, "absent": absent}, side_by_side.close(1e-3)
    )
    record = side_by_side.compare(case, 0.0, 2)
    assert record["failed"] == ["wrong"]
    assert record["fastest"] == "right"
    assert "not installed" in record["peers"]["absent"]["why"]
    assert "ratio" not in record["peers"]["wrong"]


def test_growth_notes_time_and_memory(side_by_side, capsys):
    import torch

    curve = side_by_side.Growth("ones", "size", [10, 30_000_000], lambda n: lambda: torch.ones(n).sum())
    small, large = side_by_side.grow(curve, 1)["points"]
    assert large["ms"] > 0
    assert large["mb"] is None or large["mb"] > 50 > small["mb"]


@pytest.fixture
def apart(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield __import__("apart")
    sys.modules.pop("apart", None)


def test_a_peer_in_an_environment_of_its_own_answers_call_after_call(apart, tmp_path, monkeypatch):
    site = tmp_path / "dadapy.py"  # stands in for the library
    site.write_text(
        "class Data:\n"
        "    def __init__(self, x, maxk, verbose):\n        print('a library that talks')\n        self.x = x\n"
        "    def compute_id_2NN(self, mu_fraction):\n        return len(self.x), 0.0\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(apart, "python_of", lambda peer: python)
    run = apart.Apart("dadapy", "twonn_by_dadapy", np.zeros((300, 2)))
    assert [run(), run()] == [300.0, 300.0]
    site.write_text("raise ImportError('broken')\n")
    with pytest.raises(ImportError, match="dadapy does not run"):
        apart.Apart("dadapy", "twonn_by_dadapy", np.zeros((300, 2)))()


def test_a_peer_without_its_environment_is_missing(apart, monkeypatch, tmp_path):
    monkeypatch.setattr(apart, "HOME", tmp_path)
    assert apart.version_of("dadapy") == ""
    with pytest.raises(ImportError, match="dadapy does not run"):
        apart.Apart("dadapy", "twonn_by_dadapy", np.zeros((3, 2)))()
