"""What people have, as rows that can be read piece by piece: tensors, arrays, files, folders of shards, models.

Public: `Rows`, `read_rows`, `read_labels`, `read_groups`; `extract` and what it
returns, `Extracted`. Nothing is unpickled.
"""

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from companion.checks import as_tensor, check_labels, is_missing
from companion.data.files import FeatureShards, load_labels
from companion.layers import precision, read_layers

__all__ = ["Extracted", "Rows", "extract", "read_groups", "read_labels", "read_rows"]

CHUNK_BYTES = 32_000_000  # of one piece, counted in float32
SUFFIXES = (".npy", ".npz", ".safetensors")


@dataclass
class Rows:
    """A matrix that is read piece by piece.

    Attributes:
        read: from (start, stop) to a tensor (stop - start, dim).
        n: rows, of all processes together.
        dim: columns.
        name: what the caller calls it, for errors.
        share: which rows this process reads, when that is not simply its part of all; None otherwise.

    >>> rows = read_rows(torch.zeros(10, 3), "features")
    >>> [(start, len(part)) for start, part in rows.chunks(4)]
    [(0, 4), (4, 4), (8, 2)]
    """

    read: Callable[[int, int], Tensor]
    n: int
    dim: int
    name: str
    share: tuple[int, int] | None = None

    def part(self, rank: int, world: int) -> tuple[int, int]:
        """Return the first row of a process and the one after its last."""
        return self.share or (rank * self.n // world, (rank + 1) * self.n // world)

    def chunks(self, size: int | None = None, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Go through the rows of a process: (number of the first row, rows)."""
        size = size or max(256, CHUNK_BYTES // (4 * self.dim))
        begin, end = self.part(rank, world)
        for start in range(begin, end, size):
            yield start, self.read(start, min(start + size, end))


def split_key(path: str | os.PathLike) -> tuple[Path, str | None]:
    """Return the file and the array in it that `file.npz:name` means.

    >>> split_key("run.npz:logits")
    (PosixPath('run.npz'), 'logits')
    """
    text = os.fspath(path)
    head, colon, key = text.rpartition(":")
    if colon and not Path(text).exists() and Path(head).suffix in SUFFIXES:
        return Path(head), key
    return Path(text), None


def is_path(x: Any) -> bool:
    """Whether something names a file."""
    return isinstance(x, str | os.PathLike)


def read_rows(x: Any, name: str, key: str | None = None) -> Rows:
    """Return a matrix (n, d) as `Rows`.

    Args:
        x: a tensor, array or list; a path (`file.npz:array` names an array in a file); `FeatureShards`.
        name: what the caller calls it, for errors.
        key: which array of a file, when the path does not say.

    Raises:
        ValueError: another shape, or a damaged file.
        TypeError: not numbers.
        FileNotFoundError: there is no such file.

    >>> read_rows([[1.0, 2.0]], "features").dim
    2
    """
    if is_path(x):
        path, inner = split_key(x)
        x = FeatureShards(path, inner or key)
    if isinstance(x, FeatureShards):
        return Rows(x.rows, len(x), x.dim, name)
    tensor = as_tensor(x, name).detach()
    if tensor.dim() != 2 or not tensor.shape[1]:
        raise ValueError(f"expected {name} of shape (n, d), got {tuple(tensor.shape)}")
    if not len(tensor):
        raise ValueError(f"expected {name} with at least one row, got none")
    return Rows(lambda start, stop: tensor[start:stop], len(tensor), tensor.shape[1], name)


def read_labels(x: Any, n: int, name: str = "labels", key: str | None = None) -> Tensor:
    """Return n labels, int64, on the cpu.

    Args:
        x: a tensor, array, list, file or folder of files.
        n: how many there have to be.
        name: for errors.
        key: which array of a file, when the path does not say.

    Raises:
        ValueError: another number, negative ones, a damaged file.
        TypeError: not whole numbers.
        FileNotFoundError: there is no such file.

    >>> read_labels([0, 2, 1], n=3)
    tensor([0, 2, 1])
    """
    if is_path(x):
        path, inner = split_key(x)
        if path.is_dir():
            from companion.data.files import _shards

            x = torch.cat([load_labels(file, inner or key) for file in _shards(path)])
        else:
            x = load_labels(path, inner or key)
    return check_labels(x, n=n, name=name).cpu()


def read_groups(groups: Any, n: int) -> dict[str, tuple[Tensor, list[str]]]:
    """Return each group column as (codes (n,), the names of its values).

    Args:
        groups: a mapping or data frame of columns, one column (n,), a matrix of columns (n, k), or a file: .csv with a
            line of names, or .npy, .npz, .safetensors.
        n: how many rows there have to be.

    Raises:
        ValueError: no columns, another number of rows, a damaged file.
        FileNotFoundError: there is no such file.

    >>> read_groups({"site": ["b", "a", "b"]}, n=3)
    {'site': (tensor([1, 0, 1]), ['a', 'b'])}
    """
    if is_path(groups):
        groups = _group_file(*split_key(groups))
    if hasattr(groups, "columns"):
        groups = {str(name): groups[name].tolist() for name in groups.columns}
    if not isinstance(groups, Mapping):
        array = groups if isinstance(groups, np.ndarray) else np.asarray(groups)
        if array.ndim not in (1, 2):
            raise ValueError(f"expected groups as columns of {n} rows, got shape {array.shape}")
        groups = {"group": array} if array.ndim == 1 else {f"group{i}": array[:, i] for i in range(array.shape[1])}
    if not groups:
        raise ValueError("expected at least one column of groups, got none")
    return {str(name): _codes(column, n, str(name)) for name, column in groups.items()}


def _group_file(path: Path, key: str | None) -> dict[str, Any]:
    if path.suffix != ".csv":
        if path.suffix == ".npz" and key is None and path.exists():
            try:
                with np.load(path, allow_pickle=False) as archive:
                    return {name: archive[name] for name in archive.files}
            except Exception as error:
                raise ValueError(f"{path} is not a readable .npz file: {error}") from error
        return {key or "group": load_labels(path, key)}
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a readable .csv file: {error}") from error
    if len(lines) < 2:
        raise ValueError(f"{path}: expected a line of names and rows below it, got {len(lines)} line(s)")
    head, *body = lines
    if len(set(head)) != len(head) or any(len(row) != len(head) for row in body):
        raise ValueError(f"{path}: expected distinct column names and {len(head)} values in each row")
    return {name: [row[i] for row in body] for i, name in enumerate(head)}


def _codes(column: Any, n: int, name: str) -> tuple[Tensor, list[str]]:
    values = column.tolist() if hasattr(column, "tolist") else list(column)
    if len(values) != n:
        raise ValueError(f"expected {n} values in the group column {name!r}, one per row, got {len(values)}")
    if any(is_missing(v) for v in values):
        raise ValueError(f"expected a value in each row of the group column {name!r}, got missing ones")
    try:
        kinds = sorted(set(values))
    except TypeError:
        kinds = sorted(set(values), key=str)
    place = {value: i for i, value in enumerate(kinds)}
    return torch.tensor([place[value] for value in values]), [str(value) for value in kinds]


@dataclass
class Extracted:
    """What a model and a loader gave: files in a folder, and the last layer where it reads these features."""

    features: Path
    logits: Path | None
    labels: Path | None
    weight: Tensor | None = None
    bias: Tensor | None = None


def extract(
    model: nn.Module,
    loader: Iterable,
    folder: str | os.PathLike,
    layer: str | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[Iterable], Iterable] = iter,
) -> Extracted:
    """Run a model over a loader and write features, logits and labels to files, batch by batch.

    Args:
        model: any module; meanwhile it is in eval mode and on the device.
        loader: gives batches: inputs, or (inputs, labels, ...). Floats are brought to the precision of the model.
        folder: where the files go.
        layer: whose output is taken, by its name in `model.named_modules()`. None: what the last `nn.Linear` reads.
            An output of more than two dimensions is averaged over all but the first two (images to channels).
        device: where the model runs.
        progress: wraps the loader, to show how far it is.

    Returns:
        `Extracted`, with paths for `read_rows` and `read_labels`; memory holds one batch.

    Raises:
        ValueError: no such layer, a layer that was not used, no batches.
        TypeError: a batch that is neither a tensor nor a sequence of tensors.

    >>> import tempfile
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = extract(model, [torch.zeros(5, 4)], folder)
    ...     print(read_rows(found.features, "features").dim, tuple(found.weight.shape))
    3 (2, 3)
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if layer is None and not linear:
        raise ValueError("expected layer= for a model without an nn.Linear: name one of its modules")
    folder, head, wanted = Path(folder), linear[-1:], [""] if layer is None else ["", layer]  # "" is the model itself
    same = bool(head)  # whether the features are what the head reads
    home = next((p.device for p in model.parameters()), None)
    dtype = precision(model)
    writers = {"features": _Writer(folder / "features"), "logits": _Writer(folder / "logits")}
    labels: list[Tensor] = []
    try:
        model.to(device)
        with torch.no_grad():
            for batch in progress(loader):
                x, y = _unpacked(batch)
                x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
                outputs, inputs = read_layers(model, x, outputs_of=wanted, inputs_of=head)
                z, read = outputs[""], inputs.get(head[0]) if head else None
                h = _matrix(read if layer is None else outputs.get(layer), layer)
                same = same and isinstance(read, Tensor) and h.shape == read.shape and torch.equal(h, read)
                writers["features"].add(h)
                if isinstance(z, Tensor) and z.dim() == 2 and z.shape[1] > 1:
                    writers["logits"].add(z)
                if y is not None:
                    labels.append(torch.as_tensor(y).cpu())
    finally:
        if home is not None:
            model.to(home)
    paths = {name: writer.close() for name, writer in writers.items()}
    if paths["features"] is None:
        raise ValueError("expected a loader with at least one batch, got none")
    where = None
    if labels:
        where = folder / "labels.npy"
        np.save(where, check_labels(torch.cat(labels)).numpy())
    last = model.get_submodule(head[0]) if same else None
    weight = None if last is None else last.weight.detach().cpu().clone()
    bias = None if last is None or last.bias is None else last.bias.detach().cpu().clone()
    return Extracted(paths["features"], paths["logits"], where, weight, bias)


def _unpacked(batch: Any) -> tuple[Tensor, Any]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return batch[0], batch[1] if len(batch) > 1 else None
    raise TypeError(f"expected batches of inputs or of (inputs, labels), got {type(batch).__name__}")


def _matrix(h: Any, layer: str | None) -> Tensor:
    if not isinstance(h, Tensor):
        where = "the last nn.Linear" if layer is None else f"the layer {layer!r}"
        raise ValueError(f"expected {where} to be used and to give a tensor, got {type(h).__name__}")
    return h.flatten(2).mean(2) if h.dim() > 2 else h


class _Writer:
    """Writes batches as shards of some ten megabytes."""

    SHARD = 32_000_000

    def __init__(self, folder: Path):
        self.folder, self.waiting, self.size, self.count = folder, [], 0, 0

    def add(self, x: Tensor) -> None:
        x = x.detach().cpu()
        self.waiting.append(x.float() if x.dtype == torch.bfloat16 else x)
        self.size += self.waiting[-1].nbytes
        if self.size >= self.SHARD:
            self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(self.folder / f"part{self.count}.npy", torch.cat(self.waiting).numpy())
        self.waiting, self.size, self.count = [], 0, self.count + 1

    def close(self) -> Path | None:
        if self.waiting:
            self._write()
        return self.folder if self.count else None
