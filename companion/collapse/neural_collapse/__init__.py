"""Neural collapse: how far features have collapsed, where they would settle if nothing held them, and what that costs.

The mechanisms, one file each: `measures` (nc1 to nc4), `unconstrained` (free and tethered features), `hessian` (the
curvature of the loss), `language` (collapse over words), `networks` (networks to watch).
"""

from companion.collapse.neural_collapse.hessian import (
    HessianSpectrum,
    count_outliers,
    exact_hessian,
    gauss_newton,
    hessian_spectrum,
    interpolate_loss,
)
from companion.collapse.neural_collapse.language import (
    ContextModel,
    MarkovLanguage,
    cdnv,
    duality_spread,
    hyperspherical_uniformity,
    linguistic_collapse,
)
from companion.collapse.neural_collapse.measures import NearestMeanDisagreement, NeuralCollapse, neural_collapse
from companion.collapse.neural_collapse.networks import LinearFeatureNet, depthwise_spread, priced_feature_loss
from companion.collapse.neural_collapse.unconstrained import (
    FrameSolution,
    UnconstrainedFeatureModel,
    central_path_flow,
    central_path_weight,
    gof_solution,
    tethered_features,
)

__all__ = [
    "ContextModel",
    "FrameSolution",
    "HessianSpectrum",
    "LinearFeatureNet",
    "MarkovLanguage",
    "NearestMeanDisagreement",
    "NeuralCollapse",
    "UnconstrainedFeatureModel",
    "cdnv",
    "central_path_flow",
    "central_path_weight",
    "count_outliers",
    "depthwise_spread",
    "duality_spread",
    "exact_hessian",
    "gauss_newton",
    "gof_solution",
    "hessian_spectrum",
    "hyperspherical_uniformity",
    "interpolate_loss",
    "linguistic_collapse",
    "neural_collapse",
    "priced_feature_loss",
    "tethered_features",
]
