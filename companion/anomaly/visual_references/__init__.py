"""References, second modalities and prompts: what to compare an image with when its own class was never trained on.

Reading order: `residuals` (a few normal references), `modalities` (a second sensor), `synthesis` (a few real
defects), `prompts` (a distribution over prompts), `inconsistency` (a caption).
"""

from companion.anomaly.visual_references.inconsistency import (
    WORDS,
    CaptionDecoder,
    TextImagePairs,
    align_embedding,
    inconsistency_map,
    make_text_image_pairs,
    word_attribution,
)
from companion.anomaly.visual_references.modalities import (
    HeightPairs,
    ModalAdaptor,
    TwoModalMemory,
    alignment_loss,
    compactness_loss,
    height_patches,
    make_height_pairs,
)
from companion.anomaly.visual_references.prompts import (
    PromptFlow,
    PromptScorer,
    PromptTask,
    ResidualCrossAttention,
    elbo,
    ensemble_map,
    fit_prompts,
    make_prompt_task,
)
from companion.anomaly.visual_references.residuals import (
    LogBarrierOCCLoss,
    ResADDetector,
    class_correlation,
    residual_features,
)
from companion.anomaly.visual_references.synthesis import (
    CONTRASTS,
    SHAPES,
    AttributeTokenGenerator,
    FactorDefects,
    decoupled_alignment_loss,
    make_factor_defects,
    mask_iou,
    synth_augment,
    train_segmenter,
)

__all__ = [
    "CONTRASTS",
    "SHAPES",
    "WORDS",
    "AttributeTokenGenerator",
    "CaptionDecoder",
    "FactorDefects",
    "HeightPairs",
    "LogBarrierOCCLoss",
    "ModalAdaptor",
    "PromptFlow",
    "PromptScorer",
    "PromptTask",
    "ResADDetector",
    "ResidualCrossAttention",
    "TextImagePairs",
    "TwoModalMemory",
    "align_embedding",
    "alignment_loss",
    "class_correlation",
    "compactness_loss",
    "decoupled_alignment_loss",
    "elbo",
    "ensemble_map",
    "fit_prompts",
    "height_patches",
    "inconsistency_map",
    "make_factor_defects",
    "make_height_pairs",
    "make_prompt_task",
    "make_text_image_pairs",
    "mask_iou",
    "residual_features",
    "synth_augment",
    "train_segmenter",
    "word_attribution",
]
