"""Checks of the exercises on calibration.

Public: `CHECKS`, from "<chapter>/<number>" to the function that judges an answer.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from companion.calibration import binary_calibration_error, expected_calibration_error, nll_slope, sharpening_slopes
from companion.exercises.core import Verdict, correct, not_yet

__all__ = ["CHECKS"]


def _calibrated(n: int, n_classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels drawn from their softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    return logits, logits.softmax(1).multinomial(1, generator=generator).squeeze(1)


def _temperature_by_hand(answer: Any) -> Verdict:
    wanted = 3 / math.log(9)
    value = float(answer)
    if math.isclose(value, wanted, rel_tol=5e-3):
        return correct("Odds of 9 : 1 are a logit difference of log 9, and 3 / T has to be that.")
    if math.isclose(value, 1 / wanted, rel_tol=5e-3):
        return not_yet("This is 1 / T, what the logits are multiplied by. By what are they divided?")
    if math.isclose(value, 3 / 0.9, rel_tol=5e-3):
        return not_yet("You divided by the probability. The softmax makes probabilities of odds: take their logarithm.")
    if math.isclose(value, 3 / math.log10(9), rel_tol=5e-3):
        return not_yet("The softmax uses e: take the natural logarithm.")
    if 0 < value < 1:
        return not_yet("The network says 95 in 100 and is right 90 times: its logits have to shrink, so T is above 1.")
    return not_yet("Which odds mean nine in ten, and which difference of logits gives these odds?")


def _own_temperature(answer: Any) -> Verdict:
    if not callable(answer):
        return not_yet('Pass the function itself: `check("recalibration/2", fit_temperature)`.')
    for temperature, scale, seed in ((2.0, 1.0, 11), (0.3, 1.0, 12), (1.5, 1000.0, 13), (4.0, 0.01, 14)):
        logits, labels = _calibrated(800, 6, seed)
        given = scale * temperature * logits
        before = given.clone()
        found = answer(given, labels)
        if found is None or found is Ellipsis:
            return not_yet("Your function returns nothing yet.")
        found = float(found)
        if not torch.equal(given, before):
            return not_yet("Your function changes the logits it is given: work on a copy.")
        if not math.isfinite(found) or found <= 0:
            return not_yet(f"A temperature is a positive number, yours is {found:g}.")
        slope = nll_slope(given, labels, found)
        if abs(slope) < 5e-3:
            continue
        if temperature == 2.0 and abs(nll_slope(given, labels, 1 / found)) < 5e-3:
            return not_yet("You return the inverse temperature 1 / T.")
        if scale != 1:
            return not_yet(
                f"Right for logits of ordinary size, but not for logits around {2 * scale * temperature:g}: the search "
                "stopped short, or its range is fixed. Measure the scale of the logits first."
            )
        direction = "higher" if slope < 0 else "lower"
        return not_yet(f"The slope at your temperature is {slope:.2g}, not 0: a {direction} one is better.")
    return correct("The slope vanishes where you stop, at every scale.")


def _narrow_miss(answer: Any) -> Verdict:
    if not callable(answer):
        return not_yet('Pass the function itself: `check("recalibration/3", narrow_miss)`.')
    logits, labels = _calibrated(3000, 5, 21)
    probs = logits.softmax(1)
    found = answer(probs, labels)
    if found is None or found is Ellipsis:
        return not_yet("Your function returns nothing yet.")
    found = torch.as_tensor(found)
    if found.shape != labels.shape or found.dtype != torch.bool:
        return not_yet(
            f"Return one boolean per sample, shape ({len(labels)},), not {tuple(found.shape)} {found.dtype}."
        )
    wrong = probs.argmax(1) != labels
    sharpened = sharpening_slopes(probs, labels).nll < 0
    if torch.equal(found, wrong & sharpened):
        return correct("Wrong, and p of the true class above exp(-H).")
    if torch.equal(found, sharpened):
        return not_yet("These are all predictions that likelihood sharpens. A miss is wrong, too.")
    if torch.equal(found, wrong & ~sharpened):
        return not_yet("The sign is turned around: likelihood sharpens where p of the true class is above exp(-H).")
    if bool(found[~wrong].any()):
        return not_yet("Some of yours are right predictions: compare the top class with the label.")
    return not_yet("The threshold is no fixed probability: it is exp(-H), and the entropy H differs from row to row.")


def _cancelling_groups(answer: Any) -> Verdict:
    if not isinstance(answer, tuple | list) or len(answer) != 3:
        return not_yet("Pass a tuple of three: (probs, labels, group).")
    probs, labels, group = (torch.as_tensor(part) for part in answer)
    if probs.dim() != 2 or probs.shape[1] != 2:
        return not_yet(f"Two classes: probs of shape (n, 2), yours is {tuple(probs.shape)}.")
    if len(probs) < 2000:
        return not_yet(f"At least two thousand rows, yours has {len(probs)}: with few rows the ECE is mostly noise.")
    if group.dtype != torch.bool or group.shape != labels.shape or bool(group.all()) or not bool(group.any()):
        return not_yet("The group is one boolean per row, and both groups have members.")
    total = expected_calibration_error(probs, labels).item()
    parts = [expected_calibration_error(probs[part], labels[part]).item() for part in (group, ~group)]
    if total >= 0.02:
        return not_yet(
            f"The ECE over all rows is {total:.3f}. The two errors have to cancel within each bin: give both groups "
            "the same confidence, and let one be right more often than it says, the other less."
        )
    if min(parts) <= 0.2:
        return not_yet(f"Within the groups the ECE is {parts[0]:.3f} and {parts[1]:.3f}: both have to exceed 0.2.")
    return correct("Honest on average, and about nobody.")


def _skill_by_hand(answer: Any) -> Verdict:
    value = float(answer)
    if math.isclose(value, -1 / 6, abs_tol=5e-3):
        return correct("0.28 against 0.24: saying 0.8 to everybody is worse than saying 0.6.")
    if math.isclose(value, 1 / 6, abs_tol=5e-3):
        return not_yet("The sign: the model's error is larger than the base rate's, so its skill is negative.")
    if math.isclose(value, 0.28, abs_tol=2e-3):
        return not_yet("This is the Brier score. Divide it by that of the base rate, and subtract from 1.")
    if math.isclose(value, 1 - 0.2 / 0.24, abs_tol=2e-3) or math.isclose(value, 0.2, abs_tol=1e-3):
        return not_yet("0.2 is the calibration error. The Brier score squares the error of each single answer.")
    return not_yet("Six times 0.2 squared, four times 0.8 squared, over ten: and the same for a model that says 0.6.")


def _own_calibration_error(answer: Any) -> Verdict:
    if not callable(answer):
        return not_yet('Pass the function itself: `check("measuring-calibration/2", my_ece)`.')
    generator = torch.Generator().manual_seed(31)
    smooth = torch.rand(500, generator=generator, dtype=torch.float64)
    edges = torch.arange(11, dtype=torch.float64).repeat(40) / 10
    zeros = torch.zeros(40, dtype=torch.float64)
    # outcomes that differ between an edge and what lies above it, so that the side of an edge matters
    cases = (
        (smooth, torch.rand(500, generator=generator) < smooth**2, 10, "smooth"),
        (torch.cat([zeros, zeros + 0.02]), torch.arange(80) < 40, 10, "zero"),
        (torch.cat([edges, edges[edges < 1] + 0.05]), torch.arange(840) < 440, 10, "edges"),
    )
    for confidence, outcome, n_bins, kind in cases:
        wanted = binary_calibration_error(confidence, outcome, n_bins).item()
        found = answer(confidence.clone(), outcome.clone(), n_bins)
        if found is None or found is Ellipsis:
            return not_yet("Your function returns nothing yet.")
        found = float(found)
        if math.isclose(found, wanted, abs_tol=1e-9):
            continue
        if kind == "zero":
            return not_yet("A statement of exactly 0 lies in no bin (lo, hi]: it belongs to the first one.")
        if kind == "edges":
            return not_yet(
                "Bins are (lo, hi]: a statement on an edge belongs to the bin below it, also after rounding."
            )
        if math.isclose(found, binary_calibration_error(confidence, outcome, n_bins, "max").item(), abs_tol=1e-9):
            return not_yet("This is the largest gap. The ECE is their mean, weighted by how many samples a bin holds.")
        return not_yet(
            f"On 500 random statements it should be {wanted:.4f}, yours is {found:.4f}: are the gaps weighted?"
        )
    return correct("Also at the edges, where most implementations differ.")


def _broken_bins(answer: Any) -> Verdict:
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return not_yet("Pass a tuple of two: (confidence, correct).")
    confidence, outcome = (torch.as_tensor(part).double() for part in answer)
    if len(confidence) < 1000:
        return not_yet(f"At least a thousand statements, yours has {len(confidence)}.")
    coarse, fine = (binary_calibration_error(confidence, outcome, bins).item() for bins in (10, 100))
    if coarse >= 0.01:
        return not_yet(f"With ten bins the ECE is {coarse:.3f}: in each bin the rate has to equal the mean statement.")
    if fine <= 0.2:
        return not_yet(
            f"With a hundred bins the ECE is only {fine:.3f}: within a bin, let the errors be as large as can be."
        )
    if torch.corrcoef(torch.stack([confidence, outcome]))[0, 1] >= 0:
        return not_yet("Those who hear a higher chance should be right less often.")
    return correct("Perfect in ten bins, and the wrong way round.")


def _samples_needed(answer: Any) -> Verdict:
    middle = (torch.arange(15).double() + 0.5) / 15
    root = (2 / math.pi * middle * (1 - middle) / 15).sqrt().sum().item()
    value, wanted = float(answer), (root / 0.02) ** 2
    if math.isclose(value, wanted, rel_tol=0.1):
        return correct(f"About {wanted:.0f}: the floor falls with the root of n only.")
    if math.isclose(value, root / 0.02, rel_tol=0.1):
        return not_yet("The floor falls with the root of n: square your answer.")
    if math.isclose(value, 15 / (2 * math.pi * 0.02**2), rel_tol=0.05):
        return not_yet("This is the bound, which takes every chance for one half. These are spread over [0, 1].")
    return not_yet(
        "Each bin holds n / 15 samples of about the same p. Sum the roots, set the floor to 0.02, solve for n."
    )


CHECKS: dict[str, Callable[[Any], Verdict]] = {
    "measuring-calibration/1": _skill_by_hand,
    "measuring-calibration/2": _own_calibration_error,
    "measuring-calibration/3": _broken_bins,
    "measuring-calibration/4": _samples_needed,
    "recalibration/1": _temperature_by_hand,
    "recalibration/2": _own_temperature,
    "recalibration/3": _narrow_miss,
    "recalibration/4": _cancelling_groups,
}
