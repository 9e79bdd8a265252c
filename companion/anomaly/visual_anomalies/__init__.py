"""Industrial image detectors behind one interface: a memory, a discriminator, a student, attention, coarse to fine.

Reading order: `backbone` (where patch features come from), `detector` (what every detector shares), `memory` (the
nearest neighbours and the Gaussian that everything has to beat), `simplenet`, `efficientad`, `correlation`, `parts`.
"""

from companion.anomaly.visual_anomalies.backbone import (
    HookedBackbone,
    TextureNet,
    check_images,
    load_backbone,
    local_patch_features,
    texture_backbone,
)
from companion.anomaly.visual_anomalies.correlation import (
    FODDetector,
    I2Correlation,
    attention_entropy,
    correlation_loss,
    rbf_target,
)
from companion.anomaly.visual_anomalies.detector import ImageDetector, upsample_map
from companion.anomaly.visual_anomalies.efficientad import (
    LOGIC_KINDS,
    EfficientADDetector,
    LogicScenes,
    PatchDescriptionNetwork,
    hard_feature_loss,
    make_logic_scenes,
    quantile_normalise,
)
from companion.anomaly.visual_anomalies.memory import PatchGaussian, PatchMemory, k_center
from companion.anomaly.visual_anomalies.parts import (
    CoarseToFine,
    Parts,
    SizeStratifiedRecall,
    SmallUNet,
    irregular_defects,
    make_parts,
)
from companion.anomaly.visual_anomalies.simplenet import (
    FeatureAdaptor,
    NoiseDiscriminator,
    SimpleNetDetector,
    truncated_l1_loss,
)

__all__ = [
    "LOGIC_KINDS",
    "CoarseToFine",
    "EfficientADDetector",
    "FODDetector",
    "FeatureAdaptor",
    "HookedBackbone",
    "I2Correlation",
    "ImageDetector",
    "LogicScenes",
    "NoiseDiscriminator",
    "Parts",
    "PatchDescriptionNetwork",
    "PatchGaussian",
    "PatchMemory",
    "SimpleNetDetector",
    "SizeStratifiedRecall",
    "SmallUNet",
    "TextureNet",
    "attention_entropy",
    "check_images",
    "correlation_loss",
    "hard_feature_loss",
    "irregular_defects",
    "k_center",
    "load_backbone",
    "local_patch_features",
    "make_logic_scenes",
    "make_parts",
    "quantile_normalise",
    "rbf_target",
    "texture_backbone",
    "truncated_l1_loss",
    "upsample_map",
]
