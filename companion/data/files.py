"""Data from files: features, MNIST and CIFAR in their original formats, and MVTec-style image folders.

Nothing is downloaded and nothing is unpickled. A missing or damaged file raises an error that names it, says what is
wrong, and where the set comes from.

Public: `FeatureShards`, `ImageFolderAD`, `load_features`, `load_labels`, `read_cifar_binary`, `read_idx`,
`read_mnist_idx`.
"""

import gzip
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from companion.data.textures import Textures

__all__ = [
    "FeatureShards",
    "ImageFolderAD",
    "load_features",
    "load_labels",
    "read_cifar_binary",
    "read_idx",
    "read_mnist_idx",
]

_MNIST = "the set is at https://yann.lecun.com/exdb/mnist (mirror: https://ossci-datasets.s3.amazonaws.com/mnist)"
_CIFAR = "the binary version is at https://www.cs.toronto.edu/~kriz/cifar.html"
_MVTEC = "MVTec AD is at https://www.mvtec.com/company/research/datasets/mvtec-ad"
_SUFFIXES = (".npy", ".npz", ".safetensors")

PathLike = str | os.PathLike[str]


def _existing(path: PathLike, hint: str = "") -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist" + (f"; {hint}" if hint else ""))
    return path


def _numeric(array: np.ndarray, path: Path) -> Tensor:
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ValueError(f"{path}: expected numbers, got dtype {array.dtype}")
    return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))


def _pick(names: list[str], key: str | None, path: Path) -> str:
    if key is None and len(names) == 1:
        return names[0]
    if key in names:
        return str(key)
    wanted = "more than one array: pass key=" if key is None else f"no array {key!r}"
    raise ValueError(f"{path}: {wanted}; it holds {', '.join(names) or 'nothing'}")


def _read_array(path: Path, key: str | None) -> Tensor:
    """Return one array of a file; of .npy and .safetensors memory-mapped, copied only where written to."""
    if path.suffix == ".npy":
        try:
            return _numeric(np.lib.format.open_memmap(path, mode="c"), path)
        except (ValueError, EOFError, OSError, SyntaxError) as error:
            raise ValueError(f"{path} is not a readable .npy file: {error}") from error
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                return _numeric(archive[_pick(archive.files, key, path)], path)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, AttributeError) as error:
            raise ValueError(f"{path} is not a readable .npz file: {error}") from error
        except ValueError as error:
            if str(error).startswith(str(path)):
                raise
            raise ValueError(f"{path} is not a readable .npz file: {error}") from error
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as archive:
                return archive.get_tensor(_pick(list(archive.keys()), key, path))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable .safetensors file: {error}") from error
    raise ValueError(f"{path}: expected a file ending in {', '.join(_SUFFIXES)}")


class FeatureShards:
    """Features in one file or in a folder of files, read piece by piece.

    A folder's files of one kind (.npy, .npz or .safetensors) are taken in the order of their names (numbers in them
    compare as numbers) and count as one long matrix. `.npy` and `.safetensors` are memory-mapped: only the rows in
    use are in memory. `.npz` files are decompressed one at a time.

    Args:
        path: a file, or a folder of shards.
        key: which array of an .npz or .safetensors file; needed only if it holds several.

    Attributes:
        dim: columns.
        dtype: of the stored numbers, as a torch dtype.

    Raises:
        FileNotFoundError: there is no such file, or no shard in the folder.
        ValueError: a damaged file, other than two dimensions, or shards that do not fit together.

    >>> import numpy, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> for i in range(3):
    ...     numpy.save(f"{folder.name}/part{i}.npy", numpy.full((10, 4), float(i)))
    >>> shards = FeatureShards(folder.name)
    >>> len(shards), shards.dim, [len(chunk) for chunk in shards.chunks(8)]
    (30, 4, [8, 8, 8, 6])
    >>> folder.cleanup()
    """

    def __init__(self, path: PathLike, key: str | None = None) -> None:
        self.path, self.key = _existing(path), key
        self.files = _shards(self.path) if self.path.is_dir() else [self.path]
        self._lengths = []
        self._open: tuple[int, Tensor] | None = None
        for i, file in enumerate(self.files):
            part = self._part(i)
            if part.ndim != 2 or not part.shape[1]:
                raise ValueError(f"{file}: expected features of shape (n, d), got {tuple(part.shape)}")
            if i and (part.shape[1], part.dtype) != (self.dim, self.dtype):
                raise ValueError(
                    f"{file}: expected {self.dim} columns of {self.dtype} as in {self.files[0].name}, "
                    f"got {part.shape[1]} of {part.dtype}"
                )
            self.dim, self.dtype = part.shape[1], part.dtype
            self._lengths.append(len(part))
        if not len(self):
            raise ValueError(f"{self.path}: expected at least one row, got none")

    def _part(self, i: int) -> Tensor:
        if self._open is None or self._open[0] != i:
            self._open = (i, _read_array(self.files[i], self.key))
        return self._open[1]

    def __len__(self) -> int:
        return sum(self._lengths)

    def __repr__(self) -> str:
        return f"FeatureShards({str(self.path)!r}: {len(self)} x {self.dim}, {self.dtype}, {len(self.files)} file(s))"

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows start to stop, in memory."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"expected 0 <= start <= stop <= {len(self)}, got {start} and {stop}")
        out = torch.empty(stop - start, self.dim, dtype=self.dtype)
        offset = 0
        for i, length in enumerate(self._lengths):
            low, high = max(start, offset), min(stop, offset + length)
            if low < high:
                out[low - start : high - start] = self._part(i)[low - offset : high - offset]
            offset += length
        return out

    def chunks(self, size: int = 65536, rank: int = 0, world: int = 1) -> Iterator[Tensor]:
        """Go through the rows in order, at most `size` at a time.

        Args:
            size: rows of a chunk; the last one may be shorter.
            rank: which of `world` processes this is: it gets its own contiguous share of the rows.
            world: how many processes share the work; their shares cover every row once and differ by at most one.

        Yields:
            (at most size, dim), copied to memory.
        """
        if size < 1 or not 0 <= rank < world:
            raise ValueError(f"expected size >= 1 and 0 <= rank < world, got size={size}, rank={rank}, world={world}")
        begin, end = rank * len(self) // world, (rank + 1) * len(self) // world
        for start in range(begin, end, size):
            yield self.rows(start, min(start + size, end))


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Return a key that sorts part10 after part9."""
    pieces: list[tuple[int, int, str]] = []
    text = path.name
    while text:
        digits = len(text) - len(text.lstrip("0123456789"))
        if digits:
            pieces.append((0, int(text[:digits]), ""))
            text = text[digits:]
        else:
            pieces.append((1, 0, text[0]))
            text = text[1:]
    return pieces


def _shards(folder: Path) -> list[Path]:
    for suffix in _SUFFIXES:
        found = sorted(folder.glob(f"*{suffix}"), key=_natural)
        if found:
            others = [p.name for s in _SUFFIXES if s != suffix for p in folder.glob(f"*{s}")]
            if others:
                raise ValueError(f"{folder}: expected shards of one kind, got {found[0].name} and {others[0]}")
            return found
    raise FileNotFoundError(f"{folder} holds no {', '.join(_SUFFIXES)} file")


def load_features(path: PathLike, key: str | None = None) -> Tensor:
    """Return a feature matrix from a file or a folder of shards.

    A single .npy file stays memory-mapped: pages are read when used, and writing to the tensor never changes the
    file. What does not fit in memory is for `FeatureShards`, which goes through it in chunks.

    Args:
        path: an .npy, .npz or .safetensors file, or a folder of them.
        key: which array of an .npz or .safetensors file; needed only if it holds several.

    Returns:
        (n, d) floats; whole numbers become torch's default dtype.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, pickled objects, or an array that is not (n, d).

    >>> import numpy, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     numpy.save(f"{folder}/x.npy", numpy.zeros((5, 2), "float32"))
    ...     print(tuple(load_features(f"{folder}/x.npy").shape))
    (5, 2)
    """
    shards = FeatureShards(path, key)
    x = shards._part(0) if len(shards.files) == 1 else shards.rows(0, len(shards))
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def load_labels(path: PathLike, key: str | None = None) -> Tensor:
    """Return labels from an .npy, .npz or .safetensors file.

    Args:
        path: the file.
        key: which array of an .npz or .safetensors file; needed only if it holds several.

    Returns:
        (n,) int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or anything but whole numbers of shape (n,).
    """
    file = _existing(path)
    labels = _read_array(file, key)
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"{file}: expected integer labels of shape (n,), got {tuple(labels.shape)} of {labels.dtype}")
    return labels.long()


_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: PathLike, hint: str = _MNIST) -> Tensor:
    """Read one IDX file, the format of MNIST and its relatives; gzipped or not.

    Args:
        path: the file.
        hint: where to get it, for the error.

    Returns:
        The array, in its own dtype.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a wrong magic number or length, or damaged compression.
    """
    file = _existing(path, hint)
    data = file.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file} is damaged or cut off ({error}); {hint}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{file} is not an IDX file: it begins with {data[:4].hex(' ') or 'nothing'}; {hint}")
    dtype, dims = np.dtype(_IDX_TYPES[data[2]]), data[3]
    shape = [int(v) for v in np.frombuffer(data, ">u4", dims, 4)]
    expected = 4 + 4 * dims + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise ValueError(f"{file}: its header says shape {tuple(shape)}, {expected} bytes, got {len(data)}; {hint}")
    array = np.frombuffer(data, dtype, offset=4 + 4 * dims).reshape(shape)
    return torch.from_numpy(array.astype(dtype.newbyteorder("=")))


def read_mnist_idx(folder: PathLike, split: str = "train") -> tuple[Tensor, Tensor]:
    """Read MNIST, or a set in its format (Fashion-MNIST, KMNIST), from the original files.

    Args:
        folder: holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the `t10k` ones, with or without `.gz`.
        split: "train" or "test".

    Returns:
        (images (n, 1, h, w) in [0, 1], labels (n,) int64).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a damaged file, or images and labels of different lengths.
    """
    if split not in {"train", "test"}:
        raise ValueError(f"expected split 'train' or 'test', got {split!r}")
    root = _existing(folder, _MNIST)
    prefix = "train" if split == "train" else "t10k"

    def find(kind: str, dims: int) -> Path:
        stems = [f"{prefix}-{kind}-idx{dims}-ubyte", f"{prefix}-{kind}.idx{dims}-ubyte"]
        for stem in stems:
            for name in (stem, stem + ".gz"):
                if (root / name).exists():
                    return root / name
        raise FileNotFoundError(f"{root / stems[0]} (or .gz) does not exist; {_MNIST}")

    image_file, label_file = find("images", 3), find("labels", 1)
    images, labels = read_idx(image_file), read_idx(label_file)
    for file, array, dims in ((image_file, images, 3), (label_file, labels, 1)):
        if array.ndim != dims or array.dtype != torch.uint8:
            raise ValueError(
                f"{file}: expected {dims} dimensions of bytes, got {array.ndim} of {array.dtype}; {_MNIST}"
            )
    if len(images) != len(labels):
        raise ValueError(f"{image_file} holds {len(images)} images, {label_file} {len(labels)} labels; {_MNIST}")
    return images.unsqueeze(1).to(torch.get_default_dtype()) / 255, labels.long()


def read_cifar_binary(folder: PathLike, split: str = "train", coarse: bool = False) -> tuple[Tensor, Tensor]:
    """Read CIFAR-10 or CIFAR-100 from the binary version of the set; which of them, the file names tell.

    Args:
        folder: holds `data_batch_1.bin` ... `test_batch.bin` (CIFAR-10) or `train.bin`, `test.bin` (CIFAR-100).
        split: "train" or "test".
        coarse: CIFAR-100's 20 superclasses instead of its 100 classes.

    Returns:
        (images (n, 3, 32, 32) in [0, 1], labels (n,) int64).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a damaged file, or superclasses asked of CIFAR-10.
    """
    if split not in {"train", "test"}:
        raise ValueError(f"expected split 'train' or 'test', got {split!r}")
    root = _existing(folder, _CIFAR)
    hundred = (root / "train.bin").exists() or (root / "test.bin").exists()
    if hundred:
        files = [root / f"{split}.bin"]
    elif coarse:
        raise ValueError(f"{root}: only CIFAR-100 has superclasses, and it has no train.bin or test.bin; {_CIFAR}")
    else:
        files = [root / f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else [root / "test_batch.bin"]
    header = 2 if hundred else 1
    classes = (20 if coarse else 100) if hundred else 10
    images, labels = [], []
    for file in files:
        data = np.frombuffer(_existing(file, _CIFAR).read_bytes(), np.uint8)
        if not len(data) or len(data) % (header + 3072):
            raise ValueError(
                f"{file}: expected a multiple of {header + 3072} bytes (one record), got {len(data)}: cut off or "
                f"not the binary version; {_CIFAR}"
            )
        records = data.reshape(-1, header + 3072)
        label = records[:, 0 if coarse or not hundred else 1]
        if label.max() >= classes:
            raise ValueError(f"{file}: expected labels below {classes}, got {label.max()}: damaged; {_CIFAR}")
        labels.append(torch.from_numpy(label.astype(np.int64)))
        images.append(torch.from_numpy(records[:, header:].reshape(-1, 3, 32, 32).copy()))
    return torch.cat(images).to(torch.get_default_dtype()) / 255, torch.cat(labels)


class _TestItem(NamedTuple):
    image: Path
    mask: Path | None
    label: int


class ImageFolderAD:
    """An anomaly detection set in the layout of MVTec AD, one category.

    `train/good/*.png`, `test/good/*.png`, `test/<defect>/*.png` and `ground_truth/<defect>/<name>_mask.png`.
    Needs Pillow, which comes with matplotlib.

    Args:
        root: the folder of the category, such as `mvtec_anomaly_detection/bottle`.
        size: side to which images are resampled (antialiased); masks keep every pixel that is touched.

    Attributes:
        defects: names of the kinds of defect, in the order of the labels: label 1 is `defects[0]`.
        train_files: the normal training images.
        test_files: (image, mask or None, label) of every test image.

    Raises:
        FileNotFoundError: the folder, its training images or a mask is missing.
    """

    def __init__(self, root: PathLike, size: int = 256) -> None:
        if size < 1:
            raise ValueError(f"expected a size of at least 1, got {size}")
        self.root, self.size = _existing(root, _MVTEC), size
        self.train_files = _images(self.root / "train" / "good")
        test = _existing(self.root / "test", _MVTEC)
        self.defects = sorted(p.name for p in test.iterdir() if p.is_dir() and p.name != "good")
        self.test_files: list[_TestItem] = []
        if (test / "good").exists():
            self.test_files += [_TestItem(image, None, 0) for image in _images(test / "good")]
        for label, defect in enumerate(self.defects, 1):
            self.test_files += [_TestItem(image, self._mask(image, defect), label) for image in _images(test / defect)]

    def _mask(self, image: Path, defect: str) -> Path:
        folder = self.root / "ground_truth" / defect
        for name in (f"{image.stem}_mask.png", f"{image.stem}.png"):
            if (folder / name).exists():
                return folder / name
        raise FileNotFoundError(f"{folder / (image.stem + '_mask.png')}, the mask of {image}, does not exist; {_MVTEC}")

    def train(self) -> Tensor:
        """Return the normal training images: (n, 3, size, size) in [0, 1]."""
        return torch.stack([_read_image(file, self.size) for file in self.train_files])

    def test(self) -> Textures:
        """Return every test image: `Textures(images, masks, labels)`, as `make_textures` does."""
        batches = list(self.test_batches(64))
        if not batches:
            raise FileNotFoundError(f"{self.root / 'test'} holds no image; {_MVTEC}")
        return Textures(*(torch.cat(parts) for parts in zip(*batches)))

    def test_batches(self, batch_size: int = 32) -> Iterator[Textures]:
        """Go through the test images in order, `batch_size` at a time."""
        for start in range(0, len(self.test_files), batch_size):
            items = self.test_files[start : start + batch_size]
            images = torch.stack([_read_image(item.image, self.size) for item in items])
            masks = torch.stack([_read_mask(item.mask, self.size) for item in items])
            yield Textures(images, masks, torch.tensor([item.label for item in items]))


def _images(folder: Path) -> list[Path]:
    endings = {".png", ".jpg", ".jpeg", ".bmp"}
    found = sorted((p for p in _existing(folder, _MVTEC).iterdir() if p.suffix.lower() in endings), key=_natural)
    if not found:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(sorted(endings))}); {_MVTEC}")
    return found


def _pixels(file: Path, mode: str) -> Tensor:
    """Return (c, h, w) bytes."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading image files needs Pillow: pip install pillow") from error
    try:
        with Image.open(file) as image:
            array = np.array(image.convert(mode))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} is not a readable image, or is cut off: {error}") from error
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).movedim(2, 0)


def _read_image(file: Path, size: int) -> Tensor:
    image = _pixels(file, "RGB").unsqueeze(0).to(torch.get_default_dtype()) / 255
    if image.shape[2:] != (size, size):
        image = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return image.squeeze(0)


def _read_mask(file: Path | None, size: int) -> Tensor:
    if file is None:
        return torch.zeros(1, size, size, dtype=torch.bool)
    mask = (_pixels(file, "L") > 0).to(torch.get_default_dtype()).unsqueeze(0)
    if mask.shape[2:] != (size, size):  # the largest value keeps defects smaller than a pixel
        mask = torch.nn.functional.adaptive_max_pool2d(mask, (size, size))
    return mask.squeeze(0) > 0
