"""What mixing does to features: rare ones get learned, mixtures run out along boundaries, and some land wrong.

The mechanisms, one file each: `intrusion`, `rare_features`, `channels`, and `loops` for your own training loop.
"""

from companion.mixup.mixup_geometry.channels import channel_curve, channel_projection, mixup_ufm_features
from companion.mixup.mixup_geometry.intrusion import (
    AdaMixUp,
    Paired,
    adamixup_loss,
    intrusion_rate,
    make_bands,
    pair_up,
)
from companion.mixup.mixup_geometry.loops import MixupCollate, manifold_mixup
from companion.mixup.mixup_geometry.rare_features import (
    EarlyStoppedMixup,
    FeatureNoise,
    QuadraticPatchCNN,
    make_feature_noise,
    mix_apart,
)

__all__ = [
    "AdaMixUp",
    "EarlyStoppedMixup",
    "FeatureNoise",
    "MixupCollate",
    "Paired",
    "QuadraticPatchCNN",
    "adamixup_loss",
    "channel_curve",
    "channel_projection",
    "intrusion_rate",
    "make_bands",
    "make_feature_noise",
    "manifold_mixup",
    "mix_apart",
    "mixup_ufm_features",
    "pair_up",
]
