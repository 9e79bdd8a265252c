"""The check-up itself: reads what is there, goes through it once, asks every lens.

Public: `checkup`, `Checkup`.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from companion import runtime
from companion._version import __version__
from companion.checks import as_tensor, check_features, check_positive_int
from companion.data.files import load_features
from companion.report import rendering
from companion.report.findings import Finding, Skipped
from companion.report.lenses import LENSES
from companion.report.reading import Extracted, Rows, extract, is_path, read_groups, read_labels, read_rows, split_key
from companion.report.rendering import Table
from companion.report.streaming import Processes, Summary, covariance_of, summarise

__all__ = ["Checkup", "checkup"]


@dataclass(frozen=True, repr=False)
class Checkup:
    """What a check-up found. In a notebook it shows its table.

    Attributes:
        findings: one `Finding` per figure, in the order of the book's questions.
        skipped: what could not be computed, each with the reason.
        about: what was looked at: rows, columns, classes, sample, device, processes, version.
        curves: small arrays that the figure draws.

    >>> labels = torch.arange(300) % 3
    >>> found = checkup(torch.eye(3)[labels] + 0.1 * torch.randn(300, 3), labels)
    >>> found["nc1"].verdict
    'ok'
    >>> "weight" in found.why_not("nc3")
    True
    """

    findings: tuple[Finding, ...]
    skipped: tuple[Skipped, ...]
    about: dict[str, Any]
    curves: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, key: str) -> Finding:
        for finding in self.findings:
            if finding.key == key:
                return finding
        raise KeyError(f"no figure {key!r}; there are {', '.join(f.key for f in self.findings)}")

    def __contains__(self, key: str) -> bool:
        return any(finding.key == key for finding in self.findings)

    def why_not(self, key: str) -> str:
        """Return why a figure is missing, or an empty text."""
        names = {key, key.split("/")[0]}
        reasons = [s.reason for s in self.skipped if names & {*re.findall(r"[\w/.-]+", s.what), s.what}]
        return "; ".join(dict.fromkeys(reasons))

    def verdicts(self) -> dict[str, str]:
        """Return the verdict of every figure, by key."""
        return {finding.key: finding.verdict for finding in self.findings}

    def table(self) -> Table:
        """Return the rows as a list of dictionaries that shows itself as a table."""
        return Table(self)

    def figure(self) -> Any:
        """Return one page of pictures, a matplotlib figure."""
        return rendering.figure(self)

    def to_html(self, path: str | os.PathLike) -> Path:
        """Write one self-contained page, which asks nothing of the network; return its path."""
        return rendering.write(path, rendering.page(self))

    def to_json(self, path: str | os.PathLike) -> Path:
        """Write everything as JSON, for a dashboard or a gate; return its path."""
        return rendering.write(path, rendering.as_json(self))

    def __str__(self) -> str:
        return rendering.as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return rendering.as_table(self)


def checkup(
    features: Any = None,
    labels: Any = None,
    *,
    logits: Any = None,
    probs: Any = None,
    weight: Any = None,
    bias: Any = None,
    groups: Any = None,
    outliers: Any = None,
    model: nn.Module | None = None,
    loader: Iterable | None = None,
    layer: str | None = None,
    key: str | None = None,
    sample: int = 5000,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool | None = None,
) -> Checkup:
    """Ask the book's questions of your own model: whatever the data at hand allow.

    Everything is read piece by piece, once; what is quadratic looks at a random sample of rows. In an initialised
    process group each process reads its share of the rows and all return the same answer.

    Args:
        features: (n, d), what the last layer reads: a tensor, array, list, file (.npy, .npz, .safetensors; a name after
            a colon picks an array), or folder of such files.
        labels: (n,) true classes, or a file of them.
        logits: (n, C), before the softmax, or files.
        probs: (n, C) instead of logits.
        weight: of the last layer, (C, d); without logits it also makes them.
        bias: of the last layer, (C,).
        groups: what should not matter: a mapping or data frame of columns, one column, or a .csv file.
        outliers: features (m, d) of what the model was not made for; with a model, a loader of such inputs.
        model: with `loader`, instead of features and logits: see `extract`.
        loader: gives batches of inputs or of (inputs, labels). In a process group each process brings its own.
        layer: of the model, whose output is looked at; None: what its last linear layer reads.
        key: which array of files that hold several, where the path does not say.
        sample: how many rows the quadratic figures look at.
        seed: of the sample and of resampling.
        device: where to compute, see `companion.runtime.device`.
        progress: bars on stderr; None shows them where someone watches.

    Returns:
        `Checkup`.

    Raises:
        ValueError: shapes, lengths, values that do not fit; a damaged file.
        TypeError: something that holds no numbers.
        FileNotFoundError: a file is missing.

    >>> generator = torch.Generator().manual_seed(0)
    >>> logits = torch.randn(2000, 4, generator=generator)
    >>> labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    >>> checkup(torch.randn(2000, 8, generator=generator), labels, logits=logits)["ece"].verdict
    'ok'
    >>> checkup(torch.randn(2000, 8, generator=generator), labels, logits=5 * logits)["ece"].verdict
    'alarm'
    """
    sample, where = check_positive_int(sample, "sample"), runtime.device(device)
    seed = check_positive_int(seed, "seed", minimum=0)
    watch = _bars(progress)
    with ExitStack() as stack:
        if model is not None or loader is not None:
            given = {"features": features, "labels": labels, "logits": logits, "probs": probs, "weight": weight}
            if extra := [name for name, value in given.items() if value is not None and name != "labels"]:
                raise ValueError(f"expected a model with its loader or {extra[0]}, got both")
            if model is None or loader is None:
                raise ValueError("expected a model together with a loader, got one of them")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found = _extracted(model, loader, folder / "own", layer, where, watch)
            x, z, kind = _own_rows(found.features, "features"), None, None
            if found.logits is not None:
                z, kind = _own_rows(found.logits, "logits"), "logits"
            weight, bias = found.weight, found.bias
            labels = _own_labels(labels, found.labels, x)
            if outliers is not None and not is_path(outliers) and not hasattr(outliers, "__array__"):
                strange = _extracted(model, outliers, folder / "outliers", layer, where, watch)
                outliers = _own_rows(strange.features, "outliers")
        else:
            if features is None:
                raise ValueError("expected features, or a model together with a loader")
            x = read_rows(features, "features", key)
            z, kind = _outputs(logits, probs, x.n, key)
            labels = None if labels is None else read_labels(labels, x.n, key=key)
            weight, bias = _head(weight, bias, x.dim, key)
        if outliers is not None and not isinstance(outliers, Rows):
            outliers = read_rows(outliers, "outliers", key)
        columns = {} if groups is None else read_groups(groups, x.n)
        _fitting(labels, z, weight)
        summary = summarise(
            x, labels, z, kind, columns, outliers, weight, bias,
            size=sample, seed=seed, device=where, progress=watch,
        )  # fmt: skip
        world = Processes().world
    rows = [row for lens in watch(LENSES, len(LENSES), "questions") for row in lens(summary, seed)]
    about = {
        "rows": x.n,
        "columns": x.dim,
        "classes": summary.classes,
        "sample": len(summary.sample.index),
        "outliers": 0 if outliers is None else outliers.n,
        "seed": seed,
        "device": str(where),
        "processes": world,
        "version": __version__,
    }
    return Checkup(
        tuple(row for row in rows if isinstance(row, Finding)),
        tuple(row for row in rows if isinstance(row, Skipped)),
        about,
        _curves(summary),
    )


def _bars(progress: bool | None):
    from companion.training import _someone_watches

    show = (_someone_watches() if progress is None else progress) and Processes().rank == 0

    def watch(items: Iterable, total: int | None = None, what: str = "rows") -> Iterable:
        return tqdm(items, total=total, desc=what, disable=not show, file=sys.stderr, leave=False, delay=0.5)

    return watch


def _extracted(model: nn.Module, loader: Iterable, folder: Path, layer: str | None, device, watch) -> Extracted:
    folder.mkdir(parents=True)
    total = len(loader) if hasattr(loader, "__len__") else None
    return extract(model, loader, folder, layer, device, lambda batches: watch(batches, total, "batches"))


def _own_rows(path: Path, name: str) -> Rows:
    """Rows that this process made itself: they follow those of the processes before it."""
    rows, team = read_rows(path, name), Processes()
    sizes = [int(n) for n in team.each(torch.tensor(rows.n))]
    offset, read = sum(sizes[: team.rank]), rows.read
    shifted = lambda start, stop: read(start - offset, stop - offset)  # noqa: E731
    return Rows(shifted, sum(sizes), rows.dim, name, share=(offset, offset + rows.n))


def _own_labels(labels: Any, path: Path | None, x: Rows) -> Tensor | None:
    if labels is not None:
        return read_labels(labels, x.n)
    if path is None:
        return None
    begin, end = x.share
    return Processes().rows(read_labels(path, end - begin))


def _outputs(logits: Any, probs: Any, n: int, key: str | None) -> tuple[Rows | None, str | None]:
    if logits is not None and probs is not None:
        raise ValueError("expected logits or probs, got both")
    kind = "logits" if logits is not None else "probs" if probs is not None else None
    if kind is None:
        return None, None
    rows = read_rows(logits if probs is None else probs, kind, key)
    if rows.n != n:
        raise ValueError(f"expected {n} rows of {kind}, as in features, got {rows.n}")
    if rows.dim < 2:
        raise ValueError(f"expected {kind} of at least two classes, got {rows.dim} column")
    return rows, kind


def _head(weight: Any, bias: Any, dim: int, key: str | None) -> tuple[Tensor | None, Tensor | None]:
    if weight is None:
        if bias is not None:
            raise ValueError("expected a weight together with the bias, got the bias alone")
        return None, None
    if is_path(weight):
        path, inner = split_key(weight)
        weight = load_features(path, inner or key)
    weight = check_features(weight, "weight").detach().cpu()
    if weight.shape[1] != dim or len(weight) < 2:
        raise ValueError(f"expected weight (C, {dim}) with at least two classes, got {tuple(weight.shape)}")
    if bias is None:
        return weight, None
    if is_path(bias):
        from companion.data.files import _read_array

        path, inner = split_key(bias)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        bias = _read_array(path, inner or key)
    bias = as_tensor(bias, "bias").detach().cpu()
    if bias.shape != weight.shape[:1] or not bool(torch.isfinite(bias).all()):
        raise ValueError(f"expected a finite bias ({len(weight)},), got shape {tuple(bias.shape)}")
    return weight, bias


def _fitting(labels: Tensor | None, z: Rows | None, weight: Tensor | None) -> None:
    if z is not None and weight is not None and z.dim != len(weight):
        raise ValueError(f"expected as many columns of {z.name} as rows of weight, got {z.dim} and {len(weight)}")
    classes = z.dim if z is not None else None if weight is None else len(weight)
    if labels is not None and classes is not None and int(labels.max()) >= classes:
        raise ValueError(f"expected labels in 0..{classes - 1}, got values up to {int(labels.max())}")


def _curves(summary: Summary) -> Mapping[str, Any]:
    """The few numbers behind the pictures."""
    spectrum = torch.linalg.eigvalsh(covariance_of(summary.whole())).flip(0).clamp_min(0)
    curves: dict[str, Any] = {"spectrum": (spectrum / spectrum.sum().clamp_min(1e-300)).tolist()}
    if summary.bins is not None:
        curves["bins"] = summary.bins.tolist()
        curves["seen"], curves["right"] = summary.seen.tolist(), summary.right.tolist()
    return curves
