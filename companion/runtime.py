"""Where and how code runs: the device, the base seed, and generators derived from a name.

Public: `device`, `has_fused`, `base_seed`, `seeds`, `generator`.
"""

import hashlib
import os

import torch

__all__ = ["base_seed", "device", "generator", "has_fused", "seeds"]


def device(name: str | torch.device = "auto") -> torch.device:
    """Return the device to compute on.

    `"auto"` takes `COMPANION_DEVICE` when it is set, else cuda when there is one, else the cpu. Apple's mps is never
    picked by itself, because it has no float64; name it to use it.

    Args:
        name: "auto", or anything `torch.device` accepts.

    Returns:
        A `torch.device` that exists on this machine.

    Raises:
        ValueError: the name is not a device, or asks for a cuda device that is not there.

    >>> device("cpu")
    device(type='cpu')
    """
    if isinstance(name, str) and name == "auto":
        name = os.environ.get("COMPANION_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"expected 'auto' or a torch device such as 'cpu' or 'cuda:0', got {name!r}") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"asked for {name!r}, but torch sees {torch.cuda.device_count()} cuda device(s)")
    return chosen


def has_fused(where: torch.device) -> bool:
    """Say whether torch's optimisers have a fused step on a device, which is the fastest one.

    >>> has_fused(torch.device("cpu"))
    True
    """
    return where.type in ("cpu", "cuda")


def base_seed() -> int:
    """Return the seed everything in the book derives from: `COMPANION_SEED`, or 0.

    Raises:
        ValueError: `COMPANION_SEED` is set to something that is not a whole number of at least 0.

    >>> isinstance(base_seed(), int)
    True
    """
    text = os.environ.get("COMPANION_SEED", "0").strip()
    if not text.isdecimal():
        raise ValueError(f"expected COMPANION_SEED to be a whole number of at least 0, got {text!r}")
    return int(text)


def _derived(name: str) -> int:
    digest = hashlib.sha256(f"{base_seed()}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def seeds(n: int, name: str = "seeds") -> list[int]:
    """Return n different seeds that follow from the base seed and a name.

    With the base seed 0 and the default name they are 0, 1, ..., n-1, so that the numbers on a page are easy to
    reproduce by hand; any other base seed or name gives an unrelated list.

    Args:
        n: how many, at least 1.
        name: lists with different names share no pattern.

    Raises:
        ValueError: n below 1.

    >>> len(set(seeds(5, "probe")))
    5
    """
    if n < 1:
        raise ValueError(f"expected at least one seed, got n={n}")
    if base_seed() == 0 and name == "seeds":
        return list(range(n))
    return [_derived(f"{name}/{i}") for i in range(n)]


def generator(name: str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a new generator seeded from the base seed and a name.

    The same name gives the same stream wherever it is asked for, and another `COMPANION_SEED` gives another. Data are
    drawn on the cpu and then moved, so that every device sees the same numbers; hence the default.

    Args:
        name: what the numbers are for, such as "recalibration/split".
        device: where the generator lives.

    >>> a, b = generator("weights"), generator("weights")
    >>> bool((torch.rand(3, generator=a) == torch.rand(3, generator=b)).all())
    True
    """
    return torch.Generator(device=device).manual_seed(_derived(name))
