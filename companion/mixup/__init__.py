"""Mixup: what does mixing examples do?"""

from companion.mixing import Mixed, cutmix, mixup, mixup_loss
from companion.mixup.mixup_geometry import (
    AdaMixUp,
    EarlyStoppedMixup,
    FeatureNoise,
    MixupCollate,
    Paired,
    QuadraticPatchCNN,
    adamixup_loss,
    channel_curve,
    channel_projection,
    intrusion_rate,
    make_bands,
    make_feature_noise,
    manifold_mixup,
    mix_apart,
    mixup_ufm_features,
    pair_up,
)
from companion.ranking import roc_convex_hull

__all__ = [
    "AdaMixUp",
    "EarlyStoppedMixup",
    "FeatureNoise",
    "Mixed",
    "MixupCollate",
    "Paired",
    "QuadraticPatchCNN",
    "adamixup_loss",
    "channel_curve",
    "channel_projection",
    "cutmix",
    "intrusion_rate",
    "make_bands",
    "make_feature_noise",
    "manifold_mixup",
    "mix_apart",
    "mixup",
    "mixup_loss",
    "mixup_ufm_features",
    "pair_up",
    "roc_convex_hull",
]
