"""Neighbours, intrinsic dimension and random projections, side by side."""

import numpy as np
import torch
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


def twonn_by_dadapy(x: np.ndarray) -> float:
    from dadapy import Data

    return Data(x, maxk=3, verbose=False).compute_id_2NN(mu_fraction=0.9)[0]


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
            "dadapy": lambda: twonn_by_dadapy(array),
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


def random_projection(quick: bool) -> Comparison:
    """All keep the length of the vector up to a few per cent, which is what a random projection is for."""
    d, size = 1_000, 100_000 if quick else 1_000_000
    z = draw(1, d)[0]
    parts = fastfood_draw(d, size)
    nonzero = round(size**0.5)  # a column: what Li et al. take
    rows = torch.randint(size, (d, nonzero), generator=torch.Generator().manual_seed(1)).flatten()
    columns = torch.arange(d).repeat_interleave(nonzero)
    values = torch.full((len(rows),), nonzero**-0.5)
    sparse = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (size, d)).coalesce()
    indices, values = sparse.indices(), sparse.values()

    def scipy_csr():
        from scipy.sparse import csr_array

        return csr_array((values.numpy(), indices.numpy()), shape=(size, d))

    by_scipy, by_torch = scipy_csr(), sparse.to_sparse_csr()
    return Comparison(
        f"Random projection, {d} -> {size} numbers",
        lambda: fastfood(z, size, parts),
        {"SciPy CSR": lambda: by_scipy @ z.numpy(), "torch CSR": lambda: by_torch @ z},
        lambda ours, theirs: abs(float(torch.as_tensor(theirs).norm() / torch.as_tensor(ours).norm()) - 1) < 0.15,
        6.6,
        limit="a sparse product is one pass over a million stored numbers; Fastfood makes four small matrix products of"
        " every output, near the processor's peak, and stores as much whatever the number of columns",
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


COMPARISONS = [twonn_narrow, twonn_wide, mle_narrow, mle_wide, local_pca, random_projection]
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
