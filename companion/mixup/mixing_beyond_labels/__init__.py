"""Mixing beyond labels: pairs, minorities, augmentation policies, two kinds of embeddings, and generated samples.

The mechanisms, one file each: `metric` (pairs that are the same to a degree), `minority` (points between rare
neighbours), `augment` (augmentation as a constraint), `gap` (texts for sounds), `diverse` (variety in generated data).
"""

from companion.mixup.mixing_beyond_labels.augment import (
    AffineFamily,
    PrimalDualAugment,
    Transformed,
    TransformSampler,
    fit_constrained,
)
from companion.mixup.mixing_beyond_labels.diverse import (
    DiverseGenerator,
    Generated,
    SpriteSource,
    coverage,
    energy_gap,
    energy_score,
    similarity_filter,
)
from companion.mixup.mixing_beyond_labels.gap import (
    Captions,
    CaptionSpace,
    ModalityGap,
    TextOnlyDecoder,
    close_gap,
    embedding_noise,
    instance_replacement,
    memory_projection,
    modality_gap,
    retrieve_tags,
)
from companion.mixup.mixing_beyond_labels.metric import (
    MetrixLoss,
    generic_metric_loss,
    metrix_loss,
    mix_labels,
    recall_at,
    utilization,
)
from companion.mixup.mixing_beyond_labels.minority import (
    SMOTE,
    JointHull,
    SyntheticPoints,
    joint_roc_hull,
    replicate,
    smote_points,
    under_sample,
)

__all__ = [
    "SMOTE",
    "AffineFamily",
    "CaptionSpace",
    "Captions",
    "DiverseGenerator",
    "Generated",
    "JointHull",
    "MetrixLoss",
    "ModalityGap",
    "PrimalDualAugment",
    "SpriteSource",
    "SyntheticPoints",
    "TextOnlyDecoder",
    "TransformSampler",
    "Transformed",
    "close_gap",
    "coverage",
    "embedding_noise",
    "energy_gap",
    "energy_score",
    "fit_constrained",
    "generic_metric_loss",
    "instance_replacement",
    "joint_roc_hull",
    "memory_projection",
    "metrix_loss",
    "mix_labels",
    "modality_gap",
    "recall_at",
    "replicate",
    "retrieve_tags",
    "similarity_filter",
    "smote_points",
    "under_sample",
    "utilization",
]
