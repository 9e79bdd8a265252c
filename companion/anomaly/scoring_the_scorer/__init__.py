"""Scores of scores: what each number on a leaderboard rewards, and what it cannot see.

Reading order: `maps` (where is the defect?), `paired` (is one detector better?), `orderings` (AUROC or average
precision?), `discovery` (which candidates to try?), `sets` (are generated samples like real ones?), `transport` (are
two surfaces the same?).
"""

from companion.anomaly.scoring_the_scorer.discovery import (
    Candidates,
    DiscoveryReport,
    cumulative_precision,
    discovery_report,
    make_candidates,
    rolling_error,
)
from companion.anomaly.scoring_the_scorer.maps import AUPIMO, PimoCurves, aupro, pimo_curves
from companion.anomaly.scoring_the_scorer.orderings import (
    Mistakes,
    Repairs,
    atomic_mistakes,
    auprc_as_expectation,
    auroc_as_expectation,
    repair_greedily,
)
from companion.anomaly.scoring_the_scorer.paired import CategoryComparison, PairedComparison, compare_paired
from companion.anomaly.scoring_the_scorer.sets import (
    PRDC,
    FrechetDistance,
    auth_pct,
    ct_score,
    frechet_at_infinity,
    frechet_distance,
    gaussian_frechet,
    kernel_distance,
    prdc,
)
from companion.anomaly.scoring_the_scorer.transport import (
    FlowDeform,
    PointMeasure,
    chamfer,
    hausdorff,
    sliced_wasserstein,
    surface_measure,
)

__all__ = [
    "AUPIMO",
    "PRDC",
    "Candidates",
    "CategoryComparison",
    "DiscoveryReport",
    "FlowDeform",
    "FrechetDistance",
    "Mistakes",
    "PairedComparison",
    "PimoCurves",
    "PointMeasure",
    "Repairs",
    "atomic_mistakes",
    "auprc_as_expectation",
    "aupro",
    "auroc_as_expectation",
    "auth_pct",
    "chamfer",
    "compare_paired",
    "ct_score",
    "cumulative_precision",
    "discovery_report",
    "frechet_at_infinity",
    "frechet_distance",
    "gaussian_frechet",
    "hausdorff",
    "kernel_distance",
    "make_candidates",
    "pimo_curves",
    "prdc",
    "repair_greedily",
    "rolling_error",
    "sliced_wasserstein",
    "surface_measure",
]
