"""Recalibration: make a trained network's probabilities honest, after training or during it.

Public, in reading order: `TemperatureScaler` and `nll_slope`; `make_overlap_mixture`; `h_calibration_loss`,
`running_gap`, `HCalibrator` and its maps; `correctness_aware_loss`, `sharpening_slopes`, `shifted_views`,
`CorrectnessCalibrator`; `ProgressiveTargets` and `progressive_gradient_ratio`.
"""

from companion.calibration.recalibration.correctness import (
    CorrectnessCalibrator,
    SharpeningSlopes,
    ViewTemperature,
    correctness_aware_loss,
    rotate,
    sharpening_slopes,
    shifted_views,
)
from companion.calibration.recalibration.overlap import OverlapMixture, make_overlap_mixture
from companion.calibration.recalibration.selfdistillation import ProgressiveTargets, progressive_gradient_ratio
from companion.calibration.recalibration.temperature import TemperatureScaler, nll_slope
from companion.calibration.recalibration.windows import (
    GlobalTemperature,
    HCalibrator,
    MarginTemperature,
    MonotoneLogitMap,
    VectorScaling,
    h_calibration_loss,
    running_gap,
)

__all__ = [
    "CorrectnessCalibrator",
    "GlobalTemperature",
    "HCalibrator",
    "MarginTemperature",
    "MonotoneLogitMap",
    "OverlapMixture",
    "ProgressiveTargets",
    "SharpeningSlopes",
    "TemperatureScaler",
    "VectorScaling",
    "ViewTemperature",
    "correctness_aware_loss",
    "h_calibration_loss",
    "make_overlap_mixture",
    "nll_slope",
    "progressive_gradient_ratio",
    "rotate",
    "running_gap",
    "sharpening_slopes",
    "shifted_views",
]
