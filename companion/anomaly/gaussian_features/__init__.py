"""Gaussians on the features of a frozen network: how far from normal, which class, and how many samples it takes.

Reading order: `frozen` (where features come from), `mahalanobis` (one Gaussian), `confidence` (one per class),
`hierarchical` (several per class), `naive_bayes` (how few samples are enough), `moments` (what a mean cannot see).
"""

from companion.anomaly.gaussian_features.confidence import LayerSum, MahalanobisOOD, sharpen_input, tied_covariance
from companion.anomaly.gaussian_features.frozen import FrozenFeatures, few_shot_accuracy, retrieval_map
from companion.anomaly.gaussian_features.hierarchical import (
    HierarchicalGMM,
    MixturePrototypes,
    aggregate_mahalanobis,
    mixture_prototype_loss,
)
from companion.anomaly.gaussian_features.mahalanobis import (
    ComponentAuroc,
    MVGDetector,
    mahalanobis,
    variance_ranked_auroc,
)
from companion.anomaly.gaussian_features.moments import LinearProbe, MomentProbe, cross_covariance, oriented_noise
from companion.anomaly.gaussian_features.naive_bayes import (
    PooledNaiveBayes,
    excess_error_curve,
    samples_to_excess,
    two_regimes_crossing,
)

__all__ = [
    "ComponentAuroc",
    "FrozenFeatures",
    "HierarchicalGMM",
    "LayerSum",
    "LinearProbe",
    "MVGDetector",
    "MahalanobisOOD",
    "MixturePrototypes",
    "MomentProbe",
    "PooledNaiveBayes",
    "aggregate_mahalanobis",
    "cross_covariance",
    "excess_error_curve",
    "few_shot_accuracy",
    "mahalanobis",
    "mixture_prototype_loss",
    "oriented_noise",
    "retrieval_map",
    "samples_to_excess",
    "sharpen_input",
    "tied_covariance",
    "two_regimes_crossing",
    "variance_ranked_auroc",
]
