"""What every public function asks of its input: shapes, kinds and values, with errors that say what came instead.

Public: `as_tensor`, `check_features`, `check_probs`, `check_logits`, `check_labels`, `check_scores`, `check_binary`,
`check_same_length`, `check_positive_int`, `check_in_range`, `check_generator`, `is_missing`.

All accept what `torch.as_tensor` accepts (tensors, arrays, lists, data frames), keep device and dtype, and repair
nothing: whole numbers become floats where a measurement is expected (float64 where torch's default float would round
them), and that is all.
"""

import math
import numbers
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "as_tensor",
    "check_binary",
    "check_features",
    "check_generator",
    "check_in_range",
    "check_labels",
    "check_logits",
    "check_positive_int",
    "check_probs",
    "check_same_length",
    "check_scores",
    "is_missing",
]

# Rows of probabilities may miss one by this much: rounding of a softmax over a thousand classes stays below it.
_SUM_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 2e-2}


def as_tensor(x: Any, name: str = "x", device: torch.device | str | None = None) -> Tensor:
    """Return x as a tensor, without a copy where there is none to make.

    Args:
        x: a tensor, array, data frame, number or nested list of numbers.
        name: what the caller calls it, for the error.
        device: where x has to be. What has no device yet (arrays, lists) is put there.

    Raises:
        TypeError: x holds something else than numbers, or complex ones.
        ValueError: x is a ragged list, or a tensor on another device.

    >>> as_tensor([1, 2]).dtype
    torch.int64
    """
    if isinstance(x, Tensor):
        # "cuda" names any cuda device, "cuda:1" only that one
        wanted = torch.device(device) if device is not None else x.device
        if wanted.type != x.device.type or wanted.index not in (None, x.device.index):
            raise ValueError(f"expected {name} on {wanted}, got it on {x.device}: move it with .to({str(wanted)!r})")
    elif x is None or isinstance(x, str | bytes | dict | set):
        raise TypeError(f"expected {name} to be a tensor, an array or a list of numbers, got {type(x).__name__}")
    else:
        x = _from_outside(x, name, device)
    if x.is_complex():
        raise TypeError(f"expected {name} to hold real numbers, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"expected {name} to be a dense tensor, got layout {x.layout}: pass {name}.to_dense()")
    return x


def _from_outside(x: Any, name: str, device: torch.device | str | None) -> Tensor:
    if hasattr(x, "toarray"):
        raise TypeError(f"expected {name} to be dense, got sparse data ({type(x).__name__}): pass {name}.toarray()")
    if hasattr(x, "__array__"):
        x = np.asarray(x)
        if x.dtype.kind not in "biufc":
            raise TypeError(f"expected {name} to hold numbers, got an array of dtype {x.dtype}")
        if x.dtype.itemsize > 8 and x.dtype.kind == "f":
            raise TypeError(f"expected {name} to hold at most float64, got {x.dtype}")
        # torch shares memory only with arrays of positive strides in the machine's byte order
        if any(stride < 0 for stride in x.strides) or not x.dtype.isnative:
            x = x.astype(x.dtype.newbyteorder("="), order="C", copy=True)
        if not x.flags.writeable:
            with warnings.catch_warnings():  # a memory-mapped file is read here, never written
                warnings.filterwarnings("ignore", message=".*not writable.*")
                return torch.as_tensor(x, device=device)
    elif isinstance(x, list | tuple) and len(x) and all(isinstance(row, np.ndarray | np.generic) for row in x):
        try:
            return _from_outside(np.asarray(x), name, device)
        except ValueError as error:
            raise ValueError(f"expected {name} to have rows of one length: {error}") from error
    elif isinstance(x, list | tuple) and len(x) and all(isinstance(row, Tensor) for row in x):
        try:
            return as_tensor(torch.stack(list(x)), name, device)
        except RuntimeError as error:
            raise ValueError(f"expected {name} to have rows of one length: {error}") from error
    try:
        return torch.as_tensor(x, device=device)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"expected {name} to be a tensor, an array or a list of numbers: {error}") from error
    except ValueError as error:
        if "str" in str(error):
            raise TypeError(f"expected {name} to be a list of numbers, got text in it") from error
        raise ValueError(f"expected {name} to be a rectangular list of numbers: {error}") from error


def _as_float(x: Any, name: str, device: torch.device | str | None = None) -> Tensor:
    x = as_tensor(x, name, device)
    if x.is_floating_point():
        return x
    wanted = torch.get_default_dtype()
    if x.element_size() > 2 and x.numel() and x.device.type != "mps":
        largest = max(abs(int(v)) for v in torch.aminmax(x.to(torch.int64)))
        if largest * torch.finfo(wanted).eps > 2:  # beyond, neighbouring whole numbers become equal
            wanted = torch.float64
    return x.to(wanted)


def _is_finite(x: Tensor) -> bool:
    # NaN and inf never leave a sum again, so one pass without a temporary settles the usual case.
    return math.isfinite(x.detach().sum().item()) or bool(torch.isfinite(x).all())


def _check_finite(x: Tensor, name: str) -> None:
    if not _is_finite(x):
        nan, inf = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
        raise ValueError(f"expected {name} to be finite, got {nan} NaN and {inf} infinite of {x.numel()} values")


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def check_features(
    x: Any, name: str = "x", min_samples: int = 1, *, device: torch.device | str | None = None
) -> Tensor:
    """Return x as a finite float tensor of shape (n, d), d at least 1.

    Args:
        x: features, one row per sample.
        name: what the caller calls it, for the error.
        min_samples: how many rows the caller needs.
        device: where x has to be (None: wherever it is).

    Raises:
        ValueError: another shape, too few rows, no columns, NaN or infinity.
        TypeError: not numbers.

    >>> check_features([[1, 2], [3, 4]])
    tensor([[1., 2.],
            [3., 4.]])
    """
    x = _as_float(x, name, device)
    if x.dim() != 2:
        raise ValueError(
            f"expected {name} of shape (n, d), one row per sample, got shape {_shape(x)}."
            + (f" Reshape your data: {name}.reshape(-1, 1) if it has a single feature." if x.dim() == 1 else "")
            + (f" Flatten it first: {name}.flatten(1)." if x.dim() > 2 else "")
        )
    if x.shape[0] < min_samples:
        raise ValueError(f"expected {name} to have at least {min_samples} sample(s), got shape {_shape(x)}")
    if x.shape[1] == 0:
        raise ValueError(f"expected {name} to have at least 1 feature, got 0 feature(s) (shape {_shape(x)})")
    _check_finite(x, name)
    return x


def _check_classes(x: Tensor, name: str, integral: bool) -> None:
    if x.dim() == 1 and integral:
        raise ValueError(f"expected {name} of shape (n, C), got whole numbers of shape {_shape(x)}: looks like labels")
    if x.dim() != 2:
        raise ValueError(f"expected {name} of shape (n, C), one column per class, got shape {_shape(x)}")
    if x.shape[0] == 0:
        raise ValueError(f"expected {name} to have at least 1 sample, got shape {_shape(x)}")
    if x.shape[1] < 2:
        raise ValueError(f"expected {name} to have at least 2 classes (columns), got shape {_shape(x)}")


def _sum_to_one(rows: Tensor, dtype: torch.dtype) -> bool:
    tolerance = _SUM_TOLERANCE.get(dtype, 1e-4)
    return all(abs(total.item() - 1) <= tolerance for total in torch.aminmax(rows))  # NaN is near nothing


def check_probs(p: Any, name: str = "probs", *, device: torch.device | str | None = None) -> Tensor:
    """Return p as a float tensor of shape (n, C) whose rows are probabilities.

    Args:
        p: probabilities, one row per sample and one column per class, C at least 2.
        name: what the caller calls it, for the error.
        device: where p has to be (None: wherever it is).

    Raises:
        ValueError: another shape, empty, NaN or infinity, or rows that are not probabilities (logits, labels).
        TypeError: not numbers.

    >>> check_probs([[0.2, 0.8]]).shape
    torch.Size([1, 2])
    """
    tensor = as_tensor(p, name, device)
    integral = not tensor.is_floating_point()
    p = _as_float(tensor, name)
    _check_classes(p, name, integral)
    rows = p.detach().sum(1, dtype=torch.float32 if p.dtype in _SUM_TOLERANCE else None)
    smallest = p.detach().amin()
    if smallest >= 0 and _sum_to_one(rows, p.dtype):
        return p
    _check_finite(p, name)
    low, high = (total.item() for total in torch.aminmax(rows))
    problem = f"rows that sum to between {low:.4g} and {high:.4g}"
    kind = f"logits: pass softmax({name}, dim=1)"
    if smallest < 0:
        problem = f"a smallest value of {smallest.item():.4g}"
    elif low > 0.95 and high < 1.05:  # a softmax of these would hide all that they say
        kind = f"rounded probabilities: pass {name} / {name}.sum(1, keepdims=True)"
    elif low > 95 and high < 105:
        kind = f"percentages: pass {name} / 100"
    raise ValueError(
        f"expected {name} to be probabilities (at least 0, rows summing to one), got {problem}: looks like {kind}"
    )


def check_logits(z: Any, name: str = "logits", *, device: torch.device | str | None = None) -> Tensor:
    """Return z as a finite float tensor of shape (n, C) of logits.

    Rows that are all at least 0 and sum to one are taken for probabilities and refused, unless they hold whole numbers
    only; pass their logarithm instead. (Logits that really look like this mean the same after any shift.)

    Args:
        z: logits, one row per sample and one column per class, C at least 2.
        name: what the caller calls it, for the error.
        device: where z has to be (None: wherever it is).

    Raises:
        ValueError: another shape, empty, NaN or infinity, probabilities or labels.
        TypeError: not numbers.

    >>> check_logits([[2.0, -1.0]]).shape
    torch.Size([1, 2])
    """
    tensor = as_tensor(z, name, device)
    integral = not tensor.is_floating_point()
    z = _as_float(tensor, name)
    _check_classes(z, name, integral)
    _check_finite(z, name)
    low, high = torch.aminmax(z.detach())
    if low >= 0 and high <= 1 and not integral:
        rows = z.detach().sum(1, dtype=torch.float32 if z.dtype in _SUM_TOLERANCE else None)
        if _sum_to_one(rows, z.dtype) and bool((z != z.round()).any()):
            raise ValueError(
                f"expected {name} to be logits (before the softmax), got rows at least 0 that sum to one: "
                f"looks like probabilities: pass log({name})"
            )
    return z


def check_labels(
    y: Any,
    n: int | None = None,
    n_classes: int | None = None,
    name: str = "labels",
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return y as an int64 tensor of shape (n,) with values in 0..C-1.

    Args:
        y: class labels, whole numbers or booleans.
        n: how many there have to be (None: at least one).
        n_classes: C (None: no upper bound).
        name: what the caller calls it, for the error.
        device: where y has to be (None: wherever it is).

    Raises:
        ValueError: another shape, another number of labels, empty, or labels outside 0..C-1.
        TypeError: not whole numbers (probabilities and logits, among others).

    >>> check_labels([0, 2, 1], n=3, n_classes=3)
    tensor([0, 2, 1])
    """
    y = as_tensor(y, name, device)
    if y.is_floating_point() and y.numel():
        hint = f": pass {name}.long() if they are class numbers"
        if y.dim() == 2:
            hint = f": looks like probabilities, logits or one-hot rows: pass {name}.argmax(1)"
        raise TypeError(f"expected {name} to be whole numbers of shape (n,), got {y.dtype} of shape {_shape(y)}{hint}")
    if y.dim() != 1:
        raise ValueError(f"expected {name} of shape (n,), one whole number per sample, got shape {_shape(y)}")
    if n is not None and y.shape[0] != n:
        raise ValueError(f"expected {n} {name}, one per sample, got {y.shape[0]}")
    if y.shape[0] == 0:
        raise ValueError(f"expected at least 1 of {name}, got none")
    y = y.to(torch.int64)
    low, high = (int(v) for v in torch.aminmax(y))
    if low < 0 or (n_classes is not None and high >= n_classes):
        upper = "C-1" if n_classes is None else n_classes - 1
        raise ValueError(f"expected {name} in 0..{upper}, got values from {low} to {high}")
    return y


def check_scores(
    scores: Any, name: str = "scores", min_samples: int = 1, *, device: torch.device | str | None = None
) -> Tensor:
    """Return scores as a float tensor of shape (n,) without NaN; infinities are ranks like any other.

    Args:
        scores: one number per sample.
        name: what the caller calls it, for the error.
        min_samples: how many the caller needs.
        device: where they have to be (None: wherever they are).

    Raises:
        ValueError: another shape, too few, or NaN.
        TypeError: not numbers.

    >>> check_scores([0.1, 0.7]).shape
    torch.Size([2])
    """
    scores = _as_float(scores, name, device)
    if scores.dim() != 1:
        raise ValueError(f"expected {name} of shape (n,), one number per sample, got shape {_shape(scores)}")
    if scores.shape[0] < min_samples:
        raise ValueError(f"expected {name} of at least {min_samples} sample(s), got {scores.shape[0]}")
    if scores.numel() and not math.isfinite(scores.detach().sum().item()) and bool(torch.isnan(scores).any()):
        raise ValueError(f"expected {name} without NaN, got {int(torch.isnan(scores).sum())} of {scores.numel()}")
    return scores


def check_binary(
    y: Any, n: int | None = None, name: str = "labels", *, device: torch.device | str | None = None
) -> Tensor:
    """Return y as a bool tensor of shape (n,) from booleans or from numbers that are all 0 or 1.

    Args:
        y: one 0 or 1 (or False or True) per sample; floats that are exactly 0.0 or 1.0 will do.
        n: how many there have to be (None: at least one).
        name: what the caller calls it, for the error.
        device: where they have to be (None: wherever they are).

    Raises:
        ValueError: another shape, another number, empty, or values other than 0 and 1.

    >>> check_binary([1, 0, 1])
    tensor([ True, False,  True])
    """
    y = as_tensor(y, name, device)
    if y.dim() != 1:
        raise ValueError(f"expected {name} of shape (n,), one 0 or 1 per sample, got shape {_shape(y)}")
    if n is not None and y.shape[0] != n:
        raise ValueError(f"expected {n} {name}, one per sample, got {y.shape[0]}")
    if y.shape[0] == 0:
        raise ValueError(f"expected at least 1 of {name}, got none")
    if y.dtype == torch.bool:
        return y
    positive = y == 1
    if not bool((positive | (y == 0)).all()):
        raise ValueError(f"expected {name} to be 0 or 1, got values from {y.min().item()} to {y.max().item()}")
    return positive


def check_same_length(**arrays: Any) -> int:
    """Return the common length of the named arrays.

    Args:
        **arrays: the arrays by the names the caller gives them; None is skipped.

    Raises:
        ValueError: their lengths differ, or one of them is a single number.

    >>> check_same_length(x=[1, 2, 3], weights=None, y=[0, 1, 0])
    3
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    for name, array in given.items():
        if getattr(array, "ndim", 1) == 0:
            raise ValueError(f"expected {name} to have a length, got a single number")
    lengths = {name: len(array) for name, array in given.items()}
    if len(set(lengths.values())) != 1:
        came = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"expected {', '.join(lengths)} to have one length, got: {came}")
    return next(iter(lengths.values()))


def check_positive_int(value: Any, name: str, minimum: int = 1) -> int:
    """Return value as an int of at least `minimum`.

    Raises:
        TypeError: not a whole number (a bool and 3.0 are not).
        ValueError: below the minimum.

    >>> check_positive_int(3, "k")
    3
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"expected {name} to be a whole number of at least {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"expected {name} to be at least {minimum}, got {value}")
    return int(value)


def check_in_range(
    value: Any, name: str, low: float = -math.inf, high: float = math.inf, inclusive: str = "both"
) -> float:
    """Return value as a finite float between low and high.

    Args:
        value: a real number.
        name: what the caller calls it, for the error.
        low: lower bound.
        high: upper bound.
        inclusive: which bounds may be met: "both", "low", "high" or "neither".

    Raises:
        TypeError: not a real number.
        ValueError: outside the range, NaN or infinite.

    >>> check_in_range(0.5, "level", 0, 1, inclusive="neither")
    0.5
    """
    if inclusive not in ("both", "low", "high", "neither"):
        raise ValueError(f"expected inclusive to be 'both', 'low', 'high' or 'neither', got {inclusive!r}")
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    above = value >= low if inclusive in ("both", "low") else value > low
    below = value <= high if inclusive in ("both", "high") else value < high
    if not (above and below and math.isfinite(value)):
        left = "[" if inclusive in ("both", "low") and math.isfinite(low) else "("
        right = "]" if inclusive in ("both", "high") and math.isfinite(high) else ")"
        raise ValueError(f"expected {name} in {left}{low:g}, {high:g}{right}, got {value}")
    return float(value)


def check_generator(
    random_state: Any = None, name: str = "generator", device: torch.device | str = "cpu"
) -> torch.Generator | None:
    """Return a `torch.Generator` from what people pass as `generator` or `random_state`.

    Args:
        random_state: None (stays None: torch's default generator is used), a `torch.Generator` (returned as it is),
            a whole number (a new generator with that seed), or a NumPy `RandomState` or `Generator`, from which one
            seed is drawn.
        name: what the caller calls it, for the error.
        device: where a new generator lives.

    Raises:
        TypeError: something else.
        ValueError: a negative seed.

    >>> check_generator(3).initial_seed()
    3
    """
    if random_state is None or isinstance(random_state, torch.Generator):
        return random_state
    if isinstance(random_state, np.random.RandomState):
        random_state = random_state.randint(2**31 - 1)
    elif isinstance(random_state, np.random.Generator):
        random_state = random_state.integers(2**31 - 1)
    if isinstance(random_state, bool) or not isinstance(random_state, numbers.Integral):
        kind = type(random_state).__name__
        raise TypeError(f"expected {name} to be None, a whole number or a torch.Generator, got {kind}")
    if random_state < 0:
        raise ValueError(f"expected {name} to be a seed of at least 0, got {random_state}")
    return torch.Generator(device=device).manual_seed(int(random_state))


def is_missing(value: Any) -> bool:
    """Say whether a value is None, NaN of whatever type (it differs from itself), or pandas' NA (which cannot say).

    >>> [is_missing(value) for value in (None, float("nan"), "nan", 0)]
    [True, True, False, False]
    """
    try:
        return value is None or bool(value != value)
    except TypeError:
        return True
