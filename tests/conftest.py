"""Shared by all tests: the device fixture, one thread, and headless pictures."""

import os

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
