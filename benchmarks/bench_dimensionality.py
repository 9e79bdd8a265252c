"""Neighbours, intrinsic dimension and random projections, side by side."""

import numpy as np
import torch
from apart import Apart
from side_by_side import Comparison, Growth, OnCard, close
from torch import nn

from companion.dimensionality import LocalPCA, RandomSubspace, fastfood, fastfood_draw, mle_dimension, twonn
from companion.neighbors import knn

FUSED = (
    "faiss selects while it multiplies, in compiled code, and stays in float32; here what is selected from written"
    " products is measured again in float64, and that and the selection take as long as the products"
)


def draw(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def two_nn_of(distances: np.ndarray) -> float:
    """The fit of Facco et al. to the distances of the two nearest neighbours, in NumPy."""
    log_ratio = np.sort(np.log(distances[:, 1].astype(np.float64) / distances[:, 0]))
    n = len(log_ratio)
    kept = int(n * 0.9)
    y = -np.log(1 - np.arange(1, kept + 1) / n)
    return float(log_ratio[:kept] @ y / (log_ratio[:kept] @ log_ratio[:kept]))


def mle_of(distances: np.ndarray) -> float:
    """The estimate of Levina and Bickel, combined as MacKay and Ghahramani say, in NumPy."""
    logs = np.log(distances[:, -1:].astype(np.float64) / distances[:, :-1])
    return float(1 / logs.mean(1).mean())


def by_sklearn(x: np.ndarray, k: int) -> np.ndarray:
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=k).fit(x).kneighbors()[0]


def by_faiss(x: np.ndarray, k: int) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatL2(x.shape[1])
    index.add(x)
    return np.sqrt(np.maximum(index.search(x, k + 1)[0][:, 1:], 1e-30))


def twonn_by_skdim(x: np.ndarray) -> float:
    import skdim

    return skdim.id.TwoNN(discard_fraction=0.1).fit(x).dimension_


def mle_by_skdim(x: np.ndarray, k: int) -> float:
    import skdim

    return skdim.id.MLE().fit(x, n_neighbors=k, comb="mle").dimension_


def lpca_by_skdim(x: np.ndarray, k: int) -> float:
    import skdim

    return float(np.mean(skdim.id.lPCA(ver="FO", verbose=False).fit_pw(x, n_neighbors=k, n_jobs=1).dimension_pw_))


def _twonn(n: int, d: int, wanted: float) -> Comparison:
    x = draw(n, d)
    array = x.numpy()
    return Comparison(
        f"TwoNN, {n} x {d}",
        lambda: twonn(x),
        {
            "scikit-learn": lambda: two_nn_of(by_sklearn(array, 2)),
            "scikit-dimension": lambda: twonn_by_skdim(array),
            "dadapy": Apart("dadapy", "twonn_by_dadapy", array),
            "faiss": lambda: two_nn_of(by_faiss(array, 2)),
        },
        close(1e-3),
        wanted,
        limit=FUSED,
    )


def twonn_narrow(quick: bool) -> Comparison:
    return _twonn(2_000 if quick else 10_000, 64, 2.1)


def twonn_wide(quick: bool) -> Comparison:
    return _twonn(2_000 if quick else 20_000, 256, 2.2)


def _mle(n: int, d: int, wanted: float) -> Comparison:
    x = draw(n, d)
    array = x.numpy()
    return Comparison(
        f"MLE of the dimension, k = 20, {n} x {d}",
        lambda: mle_dimension(x, 20),
        {
            "scikit-learn": lambda: mle_of(by_sklearn(array, 20)),
            "scikit-dimension": lambda: mle_by_skdim(array, 20),
            "faiss": lambda: mle_of(by_faiss(array, 20)),
        },
        close(1e-3),
        wanted,
        limit=FUSED,
    )


def mle_narrow(quick: bool) -> Comparison:
    return _mle(2_000 if quick else 10_000, 64, 1.6)


def mle_wide(quick: bool) -> Comparison:
    return _mle(2_000 if quick else 20_000, 256, 1.8)


def local_pca(quick: bool) -> Comparison:
    n = 300 if quick else 2_000
    x = draw(n, 32)
    array = x.numpy()
    return Comparison(
        f"Local PCA of every point, {n} x 32, k = 100",
        lambda: LocalPCA(n_neighbors=100, n_bootstrap=0).fit(x).dimension_,
        {"scikit-dimension": lambda: lpca_by_skdim(array, 100)},
        close(5e-2),
        12,
        limit="most of it is an eigenvalue problem for every point, solved by LAPACK here and there",
    )


class Numbers(nn.Module):
    """A module that is nothing but n parameters."""

    def __init__(self, n: int):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(n))


def by_scipy(kind: str, coo: torch.Tensor):
    import scipy.sparse

    return getattr(scipy.sparse, kind)((coo.values().numpy(), coo.indices().numpy()), shape=coo.shape)


def sparse_projection(quick: bool) -> Comparison:
    """The same matrix for everybody, about sqrt(D) signs a column."""
    d, size = 1_000, 100_000 if quick else 1_000_000
    z = draw(1, d)[0]
    subspace = RandomSubspace(Numbers(size), d, "sparse")
    with torch.no_grad():
        coo = torch.stack([subspace.project(e).to_sparse() for e in torch.eye(d)], 1).coalesce()
    by_rows, by_columns, by_torch = by_scipy("csr_array", coo), by_scipy("csc_array", coo), coo.to_sparse_csr()

    def ours():
        with torch.no_grad():
            return subspace.project(z)

    return Comparison(
        f"Random projection, sparse, {d} -> {size} numbers",
        ours,
        {
            "SciPy CSR": lambda: by_rows @ z.numpy(),
            "SciPy CSC": lambda: by_columns @ z.numpy(),
            "torch CSR": lambda: by_torch @ z,
        },
        lambda ours, theirs: torch.allclose(ours, torch.as_tensor(theirs), atol=1e-4),
        6.6,
        limit="SciPy by columns runs the same loop; here it goes by slices of rows, which stay in the cache and are"
        " shared out over the cores",
    )


def fastfood_projection(quick: bool) -> Comparison:
    """All keep the length of the vector up to a few per cent, which is what a random projection is for."""
    d, size = 1_000, 100_000 if quick else 1_000_000
    z = draw(1, d)[0]
    parts = fastfood_draw(d, size)
    each = round(d**0.5)  # signs a row: the density that scikit-learn's SparseRandomProjection takes by itself
    g = torch.Generator().manual_seed(1)
    columns = torch.rand(10_000, d, generator=g).argsort(1)[:, :each].sort(1).values.repeat(size // 10_000, 1)
    signs = torch.randint(2, (size * each,), generator=g).mul(2).sub(1) * (d / each / size) ** 0.5
    csr = torch.sparse_csr_tensor(torch.arange(size + 1) * each, columns.flatten(), signs, (size, d))
    scipy = by_scipy("csr_array", csr.to_sparse_coo().coalesce())
    return Comparison(
        f"Random projection, Fastfood, {d} -> {size} numbers",
        lambda: fastfood(z, size, parts),
        {"SciPy CSR": lambda: scipy @ z.numpy(), "torch CSR": lambda: csr @ z},
        lambda ours, theirs: abs(float(torch.as_tensor(theirs).norm() / torch.as_tensor(ours).norm()) - 1) < 0.15,
        6.6,
        limit="four small matrix products of every output, near the processor's peak; the peers hold as many signs as"
        " scikit-learn's SparseRandomProjection draws, and what may be sparser still is the row above",
    )


def _knn_curve(axis: str, sizes: list[int], shape) -> Growth:
    def prepare(size):
        x = draw(*shape(size))
        return lambda: knn(x, k=10)

    return Growth("Nearest neighbours, k = 10", axis, sizes, prepare)


def knn_rows(quick: bool) -> Growth:
    sizes = [1_000, 2_000] if quick else [2_500, 5_000, 10_000, 20_000, 40_000]
    return _knn_curve("rows, 64 columns", sizes, lambda n: (n, 64))


def knn_columns(quick: bool) -> Growth:
    sizes = [16, 64] if quick else [16, 64, 256, 1_024]
    return _knn_curve("columns, 10 000 rows", sizes, lambda d: (1_000 if quick else 10_000, d))


def twonn_rows(quick: bool) -> Growth:
    def prepare(n):
        x = draw(n, 64)
        return lambda: twonn(x)

    return Growth("TwoNN", "rows, 64 columns", [1_000, 2_000] if quick else [2_500, 5_000, 10_000, 20_000], prepare)


def twonn_columns(quick: bool) -> Growth:
    def prepare(d):
        x = draw(1_000 if quick else 10_000, d)
        return lambda: twonn(x)

    return Growth("TwoNN", "columns, 10 000 rows", [16, 64] if quick else [16, 64, 256, 1_024], prepare)


def _subspace(projection: str, quick: bool) -> Growth:
    def prepare(width):
        net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        x = draw(128, 64)
        subspace = RandomSubspace(net, 100, projection)

        def step():
            subspace.zero_grad()
            subspace(x).square().mean().backward()

        return step

    sizes = [64, 256] if quick else [64, 256, 1_024, 4_096, 16_384]
    return Growth(f"RandomSubspace, {projection}, d = 100", "hidden units of a 64-h-10 network", sizes, prepare)


def subspace_dense(quick: bool) -> Growth:
    return _subspace("dense", quick)


def subspace_sparse(quick: bool) -> Growth:
    return _subspace("sparse", quick)


def subspace_fastfood(quick: bool) -> Growth:
    return _subspace("fastfood", quick)


def million_neighbors() -> OnCard:
    n, d = 1_000_000, 256

    def prepare():
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).cuda()
        return lambda: knn(x, k=10, memory="8GB")

    return OnCard(f"Nearest neighbours, k = 10, {n} x {d}", prepare, flops=2.0 * n * n * d)


COMPARISONS = [twonn_narrow, twonn_wide, mle_narrow, mle_wide, local_pca, sparse_projection, fastfood_projection]
GROWTH = [
    knn_rows,
    knn_columns,
    twonn_rows,
    twonn_columns,
    subspace_dense,
    subspace_sparse,
    subspace_fastfood,
]
ON_CARD = [million_neighbors]
