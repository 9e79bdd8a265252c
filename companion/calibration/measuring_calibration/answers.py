"""A language model's answers: how sure it was, whether the answer passed, and a map from one to the other.

Public: `sequence_confidence`, `PlattScaler`; `Answers`, `read_answers`, `write_answers`, `make_answers` and
`sample_answers`, a small file that the generator made; `Arithmetic`, sums as strings, with `complete`, which lets small
character models answer them.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from companion.calibration.measuring_calibration.errors import check_confidence, check_outcome
from companion.checks import as_tensor, check_generator, check_in_range, check_positive_int

__all__ = [
    "Answers",
    "Arithmetic",
    "PlattScaler",
    "complete",
    "make_answers",
    "make_arithmetic",
    "read_answers",
    "sample_answers",
    "sequence_confidence",
    "write_answers",
]

_HOW = ("mean", "product", "geometric", "min")
_STEPS = 100


class Answers(NamedTuple):
    """Answers of a language model.

    Attributes:
        task_id: a name for each.
        token_logprobs: for each, the natural logarithms of the probabilities of its tokens, a tensor (tokens,).
        passed: (n,) bool, whether it was right.
        reflective_score: (n,) what the model said of itself when asked, in [0, 1]; NaN where it was not asked.
    """

    task_id: list[str]
    token_logprobs: list[Tensor]
    passed: Tensor
    reflective_score: Tensor


def _check_logprobs(values: Any, name: str) -> Tensor:
    x = as_tensor(values, name)
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    if x.dim() != 1 or x.numel() == 0:
        raise ValueError(f"expected {name} to be a list of at least one number, got shape {tuple(x.shape)}")
    if bool(torch.isnan(x).any()):
        raise ValueError(f"expected {name} without NaN")
    if x.max() > 0:
        hint = "looks like probabilities: pass their logarithms" if x.min() >= 0 and x.max() <= 1 else "logits, perhaps"
        raise ValueError(f"expected {name} to be at most 0, got {x.max().item():.4g}: {hint}")
    return x


def sequence_confidence(token_logprobs: Any, how: str = "mean") -> Tensor:
    r"""Return one confidence per answer from the probabilities of its tokens.

    With $p_t$ the probability of token t of T: "mean" is $\frac1T \sum_t p_t$, "product" is $\prod_t p_t$, the
    probability of the whole answer (and therefore small when the answer is long), "geometric" is its T-th root,
    "min" the smallest $p_t$.

    Args:
        token_logprobs: for each answer, the natural logarithms of its token probabilities: lists of any length.
        how: "mean", "product", "geometric" or "min".

    Returns:
        (n,) float64 in [0, 1].

    Raises:
        ValueError: an answer without tokens, NaN, values above 0 (probabilities instead of logarithms), unknown how.

    >>> sequence_confidence([[-0.1, -0.2], [-1.0]], how="product").exp().log().round(decimals=3)
    tensor([0.7410, 0.3680], dtype=torch.float64)

    Paper: spiess2024calibration

    Chapter: calibration/measuring-calibration
    """
    if how not in _HOW:
        raise ValueError(f"expected how to be one of {_HOW}, got {how!r}")
    if not len(token_logprobs):
        raise ValueError("expected at least one answer, got none")
    reduce: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda x: x.exp().mean(),
        "product": lambda x: x.sum().exp(),
        "geometric": lambda x: x.mean().exp(),
        "min": lambda x: x.min().exp(),
    }
    rows = [_check_logprobs(row, f"token_logprobs[{i}]").double() for i, row in enumerate(token_logprobs)]
    return torch.stack([reduce[how](row) for row in rows]).clamp(max=1)


class PlattScaler(BaseEstimator):
    r"""Turn confidences into chances by a logistic curve with two parameters, fitted on answers known right or wrong.

    $$\hat p = \sigma\big(a\, \mathrm{logit}(c) + b\big), \qquad
    (a, b) = \arg\min -\sum_i \big[t_i \log \hat p_i + (1 - t_i) \log(1 - \hat p_i)\big]$$

    with Platt's targets $t = (n_+ + 1) / (n_+ + 2)$ for right answers and $1 / (n_- + 2)$ for wrong ones, which keep
    the minimum finite where a threshold would separate them. The loss is convex; Newton's method finds its minimum.
    Confidences that say nothing give $a \approx 0$: everybody gets the base rate, and the calibration error vanishes
    all the same. Look at `brier_skill_score` beside it.

    Args:
        eps: confidences are moved this far from 0 and 1, where the logit is infinite.

    Attributes:
        slope_: a. Negative where higher confidence goes with more mistakes.
        intercept_: b.

    >>> scaler = PlattScaler().fit([0.9, 0.9, 0.9, 0.9, 0.6, 0.6], [1, 1, 0, 0, 0, 0])
    >>> scaler.transform([0.9, 0.6]).round(decimals=2)
    tensor([0.4600, 0.1700], dtype=torch.float64)

    Paper: spiess2024calibration

    Chapter: calibration/measuring-calibration
    """

    def __init__(self, eps: float = 1e-6):
        self.eps = eps

    def _logit(self, confidence: Any) -> Tensor:
        eps = check_in_range(self.eps, "eps", 0, 0.5, inclusive="neither")
        return check_confidence(confidence).detach().double().clamp(eps, 1 - eps).logit()

    def fit(self, confidence: Any, correct: Any) -> "PlattScaler":
        """Fit on confidences (n,) in [0, 1] and outcomes (n,), both kinds present; return self."""
        z = self._logit(confidence)
        o = check_outcome(correct, z.shape[0], z.device)
        right = int(o.sum())
        wrong = len(o) - right
        if 0 in (right, wrong):
            raise ValueError(f"expected outcomes of both kinds, got {len(o)} times {int(right > 0)}")
        t = torch.where(o, (right + 1) / (right + 2), 1 / (wrong + 2)).double()
        scale = z.std(correction=0)
        if scale < 1e-12:  # nothing to tell answers apart by: the rate for all
            self.slope_, self.intercept_ = 0.0, float(t.mean().logit())
            return self
        center = z.mean()
        u = torch.stack([(z - center) / scale, torch.ones_like(z)], dim=1)  # (n, 2)
        w = torch.stack([torch.zeros_like(center), t.mean().logit()])

        def loss(w: Tensor) -> Tensor:
            return torch.nn.functional.binary_cross_entropy_with_logits(u @ w, t)

        value = loss(w)
        for _ in range(_STEPS):
            p = torch.sigmoid(u @ w)
            gradient = u.T @ (p - t) / len(t)
            if gradient.abs().max() < 1e-12:
                break
            hessian = (u.T * (p * (1 - p)).clamp(min=1e-12)) @ u / len(t)
            step, size = torch.linalg.solve(hessian, gradient), 1.0
            while (new := loss(w - size * step)) > value and size > 1e-8:
                size /= 2
            w, value = w - size * step, new
        self.slope_ = (w[0] / scale).item()
        self.intercept_ = (w[1] - w[0] * center / scale).item()
        return self

    def transform(self, confidence: Any) -> Tensor:
        """Return the chances (n,), float64, for confidences (n,)."""
        check_is_fitted(self)
        return torch.sigmoid(self.slope_ * self._logit(confidence) + self.intercept_)

    def predict_proba(self, confidence: Any) -> Tensor:
        """Return (n, 2): the chances of being wrong and of being right."""
        p = self.transform(confidence)
        return torch.stack([1 - p, p], dim=1)


def make_answers(
    n: int,
    *,
    pass_rate: float = 0.3,
    signal: float = 1.5,
    overconfidence: float = 2.0,
    noise: float = 0.8,
    tokens: tuple[int, int] = (3, 12),
    generator: torch.Generator | int | None = None,
) -> Answers:
    r"""Simulate the answers of a language model that is too sure of itself.

    $$o \sim \mathrm{Bernoulli}(\text{pass rate}), \qquad
    c = \sigma(\text{overconfidence} + \text{signal} \cdot o + \text{noise} \cdot \epsilon)$$

    The mean token probability of each answer is its c: token probabilities scatter around it and are shifted to have
    that mean. With signal 0 the confidence says nothing about the outcome.

    Args:
        n: answers.
        pass_rate: how many pass, in (0, 1).
        signal: how much higher the logit of the confidence is for answers that pass.
        overconfidence: the logit of the confidence for answers that fail.
        noise: standard deviation of that logit.
        tokens: fewest and most tokens of an answer.
        generator: a cpu generator or a seed (None: torch's default generator).

    Returns:
        `Answers`; a third of them, drawn at random, have no reflective score.

    Raises:
        ValueError: n below 1, a rate outside (0, 1), token counts out of order.

    >>> answers = make_answers(200, generator=0)
    >>> bool(answers.passed.double().mean() < 0.45 and sequence_confidence(answers.token_logprobs).mean() > 0.8)
    True

    Paper: spiess2024calibration

    Chapter: calibration/measuring-calibration
    """
    n = check_positive_int(n, "n")
    rate = check_in_range(pass_rate, "pass_rate", 0, 1, inclusive="neither")
    noise, generator = check_in_range(noise, "noise", 0), check_generator(generator)
    fewest, most = (check_positive_int(v, "tokens") for v in tokens)
    if fewest > most:
        raise ValueError(f"expected tokens as (fewest, most), got {tokens}")
    passed = torch.rand(n, generator=generator) < rate
    logit = overconfidence + signal * passed + noise * torch.randn(n, generator=generator)
    confidence = torch.sigmoid(logit.double())
    lengths = torch.randint(fewest, most + 1, (n,), generator=generator).tolist()
    logprobs = []
    for c, length in zip(confidence, lengths):
        scatter = torch.randn(length, generator=generator, dtype=torch.float64)
        scatter -= scatter.mean()
        # as wide as it can be without leaving (0, 1], so that the mean stays c
        room = torch.minimum((1 - c) / scatter.max().clamp(min=1e-9), (c - 1e-6) / (-scatter.min()).clamp(min=1e-9))
        logprobs.append((c + 0.9 * room * scatter).clamp(1e-9, 1).log())
    asked = torch.rand(n, generator=generator) < 2 / 3
    rating = torch.sigmoid(1 + 0.5 * signal * passed + torch.randn(n, generator=generator)).double()
    reflective = torch.where(asked, (10 * rating).round() / 10, torch.nan)
    return Answers([f"task/{i}" for i in range(n)], logprobs, passed, reflective)


def write_answers(path: Any, answers: Answers) -> None:
    """Write answers as JSON lines, one object per answer, four decimals.

    Args:
        path: where to; an existing file is replaced.
        answers: what to write.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_answers(f"{folder}/answers.jsonl", make_answers(3, generator=0))
    ...     read_answers(f"{folder}/answers.jsonl").task_id
    ['task/0', 'task/1', 'task/2']

    Paper: spiess2024calibration

    Chapter: calibration/measuring-calibration
    """
    lines = []
    for name, logprobs, passed, score in zip(*answers):
        row = {"task_id": name, "token_logprobs": [round(v, 4) for v in logprobs.tolist()], "passed": bool(passed)}
        if not math.isnan(score):
            row["reflective_score"] = round(float(score), 4)
        lines.append(json.dumps(row))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_answers(path: Any) -> Answers:
    """Read a file of JSON lines: `{"task_id": ..., "token_logprobs": [...], "passed": true}` per answer.

    `reflective_score` may be there or not; other fields are ignored, and so are empty lines.

    Args:
        path: of the file.

    Returns:
        `Answers`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no JSON object, lacks a field, or holds something else in it; the line is named.

    >>> answers = read_answers(sample_answers())
    >>> len(answers.passed), answers.task_id[0]
    (400, 'task/0')

    Paper: spiess2024calibration

    Chapter: calibration/measuring-calibration
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of JSON lines at {path}, found none")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(_answer(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error
    if not rows:
        raise ValueError(f"expected at least one answer in {path.name}, got none")
    names, logprobs, passed, scores = zip(*rows)
    return Answers(list(names), list(logprobs), torch.tensor(passed), torch.tensor(scores, dtype=torch.float64))


def _answer(row: Any) -> tuple[str, Tensor, bool, float]:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    if missing := [name for name in ("task_id", "token_logprobs", "passed") if name not in row]:
        raise ValueError(f"expected the fields task_id, token_logprobs and passed, missing: {', '.join(missing)}")
    if row["passed"] not in (True, False):
        raise ValueError(f"expected passed to be true or false, got {row['passed']!r}")
    score = row.get("reflective_score")
    score = math.nan if score is None else check_in_range(score, "reflective_score", 0, 1)
    logprobs = _check_logprobs(row["token_logprobs"], "token_logprobs").double()
    return str(row["task_id"]), logprobs, bool(row["passed"]), score


def sample_answers() -> Path:
    """Return the path of a small file of answers that `make_answers(400, generator=0)` made.

    >>> sample_answers().name
    'sample_answers.jsonl'

    Paper: spiess2024calibration

    Chapter: calibration/measuring-calibration
    """
    return Path(__file__).with_name("sample_answers.jsonl")


class Arithmetic(NamedTuple):
    """Sums as strings of fixed width, ready for a model that sees the last characters and guesses the next.

    Attributes:
        prompts: (n, 6) codes of the characters of "12+07=".
        answers: (n, 3) codes of the characters of "019".
        alphabet: the characters in the order of their codes.
        context: how many characters the model sees.
    """

    prompts: Tensor
    answers: Tensor
    alphabet: str
    context: int

    def windows(self) -> tuple[Tensor, Tensor]:
        """Return training pairs: the last `context` characters, one-hot (3 n, context * A), and the next (3 n,)."""
        text = torch.cat([self.prompts, self.answers], dim=1)
        start = self.prompts.shape[1]
        parts = [one_hot_context(text[:, :t], self.alphabet, self.context) for t in range(start, text.shape[1])]
        return torch.cat(parts), torch.cat([text[:, t] for t in range(start, text.shape[1])])


def one_hot_context(codes: Tensor, alphabet: str, context: int) -> Tensor:
    """Return the last `context` characters of (..., t) codes, one-hot and flat; what lies before the start is 0."""
    codes = codes[..., -context:]
    hot = torch.nn.functional.one_hot(codes, len(alphabet)).to(torch.get_default_dtype())
    pad = hot.new_zeros(*codes.shape[:-1], context - codes.shape[-1], len(alphabet))
    return torch.cat([pad, hot], dim=-2).flatten(-2)


def make_arithmetic(n: int, *, generator: torch.Generator | int | None = None) -> Arithmetic:
    """Draw n different sums of two numbers below a hundred, as strings: "12+07=" and "019".

    Args:
        n: at most 10,000.
        generator: a cpu generator or a seed (None: torch's default generator).

    Returns:
        `Arithmetic`.

    Raises:
        ValueError: n out of range.

    >>> sums = make_arithmetic(5, generator=0)
    >>> sums.prompts.shape, sums.answers.shape
    (torch.Size([5, 6]), torch.Size([5, 3]))

    Paper: spiess2024calibration

    Chapter: calibration/measuring-calibration
    """
    n = int(check_in_range(check_positive_int(n, "n"), "n", 1, 10_000))
    chosen = torch.randperm(10_000, generator=check_generator(generator))[:n]
    a, b = chosen // 100, chosen % 100
    plus, equals = torch.full_like(a, 10), torch.full_like(a, 11)
    prompts = torch.stack([a // 10, a % 10, plus, b // 10, b % 10, equals], dim=1)
    total = a + b
    return Arithmetic(prompts, torch.stack([total // 100, total // 10 % 10, total % 10], dim=1), "0123456789+=", 8)


def complete(models: Callable[[Tensor], Tensor], sums: Arithmetic) -> tuple[Tensor, Tensor]:
    """Let m models write the answers, one most likely character at a time.

    Args:
        models: takes inputs (m, n, context * A) and returns logits (m, n, A), such as `companion.training.ManyModels`;
            shared inputs (n, ...) come first, for the first character.
        sums: the prompts.

    Returns:
        (characters (m, n, 3), their log-probabilities (m, n, 3)).

    >>> sums = make_arithmetic(5, generator=0)
    >>> characters, logprobs = complete(lambda x: torch.zeros(2, 5, 12), sums)  # two models that know nothing
    >>> characters.shape, logprobs.exp().mean().item()
    (torch.Size([2, 5, 3]), 0.0833...)

    Paper: spiess2024calibration

    Chapter: calibration/measuring-calibration
    """
    text = None
    logprobs: list[Tensor] = []
    for _ in range(sums.answers.shape[1]):
        codes = sums.prompts if text is None else text
        scores = models(one_hot_context(codes, sums.alphabet, sums.context)).log_softmax(-1)  # (m, n, A)
        best, character = scores.max(-1)
        if text is None:
            text = sums.prompts.expand(len(scores), *sums.prompts.shape)
        text = torch.cat([text, character[..., None].cpu()], dim=-1)
        logprobs.append(best.cpu())
    return text[..., sums.prompts.shape[1] :], torch.stack(logprobs, dim=-1)
