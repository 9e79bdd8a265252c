"""Shortcut learning: which of several cues a network takes, and why it is the easy one.

Public, in reading order: `make_factor_sprites`, `cue_preference`, `loss_around`; `make_two_feature_task`, `reliance`,
`bayes_reliance`, `linear_reliance`, `shortcut_bias`, `relu_ntk`, `ntk_rule`, `make_footprint_sprites`;
`make_glyph_pairs`, `GlyphNet`, `readability`, `v_information`, `feature_complexity`; `make_boolean_features`,
`variance_explained`, `cka`; `make_bags`, `GatedAttentionMIL`, `mask_instances`, `MHIM`; `radial_power_spectrum`,
`spectral_decay_fit`, `SpectrumDetector`, `make_random_fields`, `Upsampler`, `match_spectrum`.
"""

from companion.geometry import cka
from companion.shortcuts.shortcut_learning.availability import (
    FootprintSprites,
    TwoFeatureTask,
    bayes_reliance,
    linear_reliance,
    make_footprint_sprites,
    make_two_feature_task,
    ntk_rule,
    reliance,
    relu_ntk,
    shortcut_bias,
)
from companion.shortcuts.shortcut_learning.complexity import (
    GlyphNet,
    GlyphPairs,
    feature_complexity,
    make_glyph_pairs,
    readability,
    v_information,
)
from companion.shortcuts.shortcut_learning.cues import (
    CUES,
    FactorSprites,
    cue_preference,
    loss_around,
    make_factor_sprites,
)
from companion.shortcuts.shortcut_learning.instances import MHIM, Bags, GatedAttentionMIL, make_bags, mask_instances
from companion.shortcuts.shortcut_learning.representation import (
    BooleanFeatures,
    make_boolean_features,
    variance_explained,
)
from companion.shortcuts.shortcut_learning.spectra import (
    SpectralDecay,
    SpectrumDetector,
    Upsampler,
    make_random_fields,
    match_spectrum,
    radial_power_spectrum,
    spectral_decay_fit,
)

__all__ = [
    "CUES",
    "MHIM",
    "Bags",
    "BooleanFeatures",
    "FactorSprites",
    "FootprintSprites",
    "GatedAttentionMIL",
    "GlyphNet",
    "GlyphPairs",
    "SpectralDecay",
    "SpectrumDetector",
    "TwoFeatureTask",
    "Upsampler",
    "bayes_reliance",
    "cka",
    "cue_preference",
    "feature_complexity",
    "linear_reliance",
    "loss_around",
    "make_bags",
    "make_boolean_features",
    "make_factor_sprites",
    "make_footprint_sprites",
    "make_glyph_pairs",
    "make_random_fields",
    "make_two_feature_task",
    "mask_instances",
    "match_spectrum",
    "ntk_rule",
    "radial_power_spectrum",
    "readability",
    "reliance",
    "relu_ntk",
    "shortcut_bias",
    "spectral_decay_fit",
    "v_information",
    "variance_explained",
]
