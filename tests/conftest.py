"""Shared by all tests: the device fixture, one thread, and headless pictures."""

import os
from collections import Counter

os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every device there is: a test that takes it runs on each of them."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no cuda device on this machine")
    return torch.device(request.param)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    """Each reason for a skip once, with its count: hundreds of cuda tests share one."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
