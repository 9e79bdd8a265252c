"""Intrinsic dimension: how many coordinates a cloud of features has, who counts them wrong, and what they cost.

One file per mechanism: `ratios` and `estimators` (counting), `spectra` (the linear count, exact and cheap),
`sharpness` (what dimension does to learning), `search` (to search), `density` (to density estimates), `diffusion` (to
what a sampler can reach), `chaos` (sets whose dimension is known and not whole).
"""

from companion.dimensionality.intrinsic_dimension.chaos import (
    FLOWS,
    Flow,
    RandomFeatureForecaster,
    flow_period,
    forecast_horizon,
    integrate_flows,
    lyapunov_exponents,
)
from companion.dimensionality.intrinsic_dimension.density import (
    Thresholds,
    best_bandwidth,
    effective_points,
    log_kde,
    rem_thresholds,
)
from companion.dimensionality.intrinsic_dimension.diffusion import (
    edm_denoise,
    edm_sample,
    edm_transform,
    gaussian_twin,
    moment_probe,
    norm_tail_ratio,
)
from companion.dimensionality.intrinsic_dimension.estimators import (
    MLE,
    CorrelationDimension,
    DimensionEnsemble,
    LocalPCA,
    TwoNN,
)
from companion.dimensionality.intrinsic_dimension.ratios import (
    Decimation,
    decimation,
    mle_dimension,
    neighbor_distances,
    twonn,
)
from companion.dimensionality.intrinsic_dimension.search import (
    HNSWIndex,
    nested_mixture,
    recall_at_k,
    spanned_vectors,
)
from companion.dimensionality.intrinsic_dimension.sharpness import (
    PowerLaw,
    fit_power_law,
    label_sharpness,
    nearest_neighbor_error,
)
from companion.dimensionality.intrinsic_dimension.spectra import (
    MatrixNuclearNorm,
    column_norm,
    matrix_entropy,
    matrix_nuclear_norm,
    nuclear_norm,
)
from companion.geometry import effective_rank, participation_ratio

__all__ = [
    "FLOWS",
    "MLE",
    "CorrelationDimension",
    "Decimation",
    "DimensionEnsemble",
    "Flow",
    "HNSWIndex",
    "LocalPCA",
    "MatrixNuclearNorm",
    "PowerLaw",
    "RandomFeatureForecaster",
    "Thresholds",
    "TwoNN",
    "best_bandwidth",
    "column_norm",
    "decimation",
    "edm_denoise",
    "edm_sample",
    "edm_transform",
    "effective_points",
    "effective_rank",
    "fit_power_law",
    "flow_period",
    "forecast_horizon",
    "gaussian_twin",
    "integrate_flows",
    "label_sharpness",
    "log_kde",
    "lyapunov_exponents",
    "matrix_entropy",
    "matrix_nuclear_norm",
    "mle_dimension",
    "moment_probe",
    "nearest_neighbor_error",
    "neighbor_distances",
    "nested_mixture",
    "norm_tail_ratio",
    "nuclear_norm",
    "participation_ratio",
    "recall_at_k",
    "rem_thresholds",
    "spanned_vectors",
    "twonn",
]
