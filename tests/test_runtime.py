import subprocess
import sys

import pytest
import torch

from companion import runtime


def test_auto_is_cpu_or_cuda(monkeypatch):
    monkeypatch.delenv("COMPANION_DEVICE", raising=False)
    assert runtime.device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_environment_overrides_auto_but_not_a_name(monkeypatch):
    monkeypatch.setenv("COMPANION_DEVICE", "meta")
    assert runtime.device().type == "meta"
    assert runtime.device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cpu:x", "cuda:99"])
def test_impossible_devices_are_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        runtime.device(name)


def test_base_seed_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("COMPANION_SEED", raising=False)
    assert runtime.base_seed() == 0
    monkeypatch.setenv("COMPANION_SEED", "7")
    assert runtime.base_seed() == 7


@pytest.mark.parametrize("text", ["-1", "1.5", "seven", ""])
def test_a_bad_base_seed_is_refused(monkeypatch, text):
    monkeypatch.setenv("COMPANION_SEED", text)
    with pytest.raises(ValueError, match="COMPANION_SEED"):
        runtime.base_seed()


def test_seeds_are_distinct_and_move_with_the_base_seed_and_the_name(monkeypatch):
    monkeypatch.setenv("COMPANION_SEED", "0")
    assert runtime.seeds(5) == [0, 1, 2, 3, 4]
    named = runtime.seeds(1000, "a")
    assert len(set(named)) == 1000
    assert not set(named) & set(runtime.seeds(1000, "b"))
    assert runtime.seeds(3, "a") == named[:3]
    monkeypatch.setenv("COMPANION_SEED", "7")
    assert not set(named) & set(runtime.seeds(1000, "a"))
    assert runtime.seeds(5) != [0, 1, 2, 3, 4]


def test_seeds_needs_at_least_one():
    with pytest.raises(ValueError, match="n=0"):
        runtime.seeds(0)


def test_generators_repeat_by_name_and_leave_the_global_state_alone(monkeypatch):
    before = torch.get_rng_state()
    first = torch.randn(4, generator=runtime.generator("x"))
    assert torch.equal(first, torch.randn(4, generator=runtime.generator("x")))
    assert not torch.equal(first, torch.randn(4, generator=runtime.generator("y")))
    monkeypatch.setenv("COMPANION_SEED", "3")
    assert not torch.equal(first, torch.randn(4, generator=runtime.generator("x")))
    assert torch.equal(before, torch.get_rng_state())


def test_importing_the_package_is_light():
    code = (
        "import sys, companion; "
        "heavy = {'torch', 'torchmetrics', 'sklearn', 'matplotlib', 'scipy'} & set(sys.modules); "
        "assert not heavy, heavy; assert companion.runtime.base_seed() >= 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_attribute_is_an_attribute_error():
    import companion

    with pytest.raises(AttributeError, match="nonsense"):
        companion.nonsense  # noqa: B018
    assert "calibration" in dir(companion)
