"""The shared validation: what passes is untouched, what does not is told what it looks like."""

import math

import numpy as np
import pytest
import torch

from companion.checks import (
    as_tensor,
    check_binary,
    check_features,
    check_generator,
    check_in_range,
    check_labels,
    check_logits,
    check_positive_int,
    check_probs,
    check_same_length,
    check_scores,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_right_comes_back_as_it_is(device, dtype):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for check, value in [
        (check_features, x),
        (check_logits, x),
        (check_probs, x.float().softmax(1).to(dtype)),
        (check_scores, x[:, 0]),
    ]:
        assert check(value) is value


def test_labels_become_int64_on_their_device(device):
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool):
        y = check_labels(torch.tensor([0, 1, 1], dtype=dtype, device=device), n=3, n_classes=2)
        assert y.dtype == torch.int64
        assert y.device.type == device.type


def test_gradients_pass_through():
    x = torch.randn(5, 3, requires_grad=True)
    check_features(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(5, 3))
    assert check_probs(x.softmax(1)).requires_grad


def test_lists_arrays_and_frames():
    pandas = pytest.importorskip("pandas")
    assert check_features([[1, 2], [3, 4]]).dtype == torch.get_default_dtype()
    assert check_features([[1.0, 2.0]]).dtype == torch.get_default_dtype()
    assert check_features(np.ones((2, 3))).dtype == torch.float64
    assert check_features(pandas.DataFrame({"a": [1.0, 2.0], "b": [0.5, 1.5]})).shape == (2, 2)
    assert check_features([np.ones(3), np.zeros(3)]).shape == (2, 3)
    assert check_features([torch.ones(3), torch.zeros(3)]).shape == (2, 3)
    assert check_labels(pandas.Series([1, 0])).tolist() == [1, 0]


def test_arrays_torch_alone_does_not_take():
    x = np.arange(6.0).reshape(3, 2)
    assert check_features(x[::-1]).tolist() == x[::-1].tolist()
    assert check_features(x.astype(">f8")).tolist() == x.tolist()
    x.flags.writeable = False
    assert check_features(x).tolist() == x.tolist()


def test_half_precision_probabilities_of_a_thousand_classes():
    p = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).softmax(1)
    for dtype in DTYPES:
        assert check_probs(p.to(dtype)).dtype == dtype


def test_features_whose_sum_overflows_are_still_finite():
    assert check_features(torch.full((4, 2), 60000.0, dtype=torch.float16)).shape == (4, 2)
    assert check_features(torch.full((4, 2), 3e38)).shape == (4, 2)


@pytest.mark.parametrize(
    ("check", "value", "says"),
    [
        (check_features, [1.0, 2.0], r"shape \(n, d\).*got shape \(2,\).*reshape"),
        (check_features, torch.zeros(2, 3, 4), r"got shape \(2, 3, 4\).*flatten"),
        (check_features, torch.zeros(0, 3), r"at least 1 sample\(s\), got shape \(0, 3\)"),
        (check_features, torch.zeros(3, 0), "0 feature"),
        (check_features, [[math.nan, 1.0]], "1 NaN and 0 infinite of 2"),
        (check_features, [[math.inf, -math.inf]], "0 NaN and 2 infinite"),
        (check_features, [[1.0, 2.0], [3.0]], "rectangular"),
        (check_probs, torch.zeros(0, 3), "at least 1 sample"),
        (check_probs, [[2.0, -1.0]], r"looks like logits: pass softmax\(probs, dim=1\)"),
        (check_probs, [[0.9, 0.9]], "sum to between 1.8 and 1.8.*looks like logits"),
        (check_probs, [0, 1, 2], "looks like labels"),
        (check_probs, [0.1, 0.9], r"got shape \(2,\)"),
        (check_probs, [[1.0], [1.0]], "at least 2 classes"),
        (check_probs, [[math.nan, 1.0]], "1 NaN"),
        (check_probs, [[math.inf, 0.0]], "1 infinite"),
        (check_logits, [[0.3, 0.7], [0.5, 0.5]], r"looks like probabilities: pass log\(logits\)"),
        (check_logits, [0, 1, 2], "looks like labels"),
        (check_logits, [[math.nan, 1.0]], "1 NaN"),
        (check_logits, [[-math.inf, 1.0]], "1 infinite"),
        (check_labels, [[0, 1]], r"got shape \(1, 2\)"),
        (check_labels, [], "at least 1 of labels"),
        (check_labels, [-1, 1], "from -1 to 1"),
        (check_scores, [[0.1]], r"got shape \(1, 1\)"),
        (check_scores, [0.1, math.nan], "1 of 2"),
        (check_scores, [], "at least 1 sample"),
        (check_binary, [0, 2], "got values from 0 to 2"),
        (check_binary, [[0, 1]], "shape"),
        (check_binary, [], "at least 1"),
    ],
)
def test_wrong_values_are_named(check, value, says):
    with pytest.raises(ValueError, match=says):
        check(value)


@pytest.mark.parametrize(
    ("check", "value", "says"),
    [
        (check_features, None, "NoneType"),
        (check_features, "abc", "str"),
        (check_features, [["a", "b"]], "list of numbers"),
        (check_features, np.array([["a"]]), "dtype <U1"),
        (check_features, np.array([[object()]]), "dtype object"),
        (check_features, torch.zeros(2, 2, dtype=torch.complex64), "real numbers"),
        (check_features, torch.eye(2).to_sparse(), "dense"),
        (check_labels, [0.0, 1.0], r"labels.long\(\)"),
        (check_labels, [[0.2, 0.8]], r"looks like probabilities, logits or one-hot rows: pass labels.argmax\(1\)"),
    ],
)
def test_wrong_kinds_are_named(check, value, says):
    with pytest.raises(TypeError, match=says):
        check(value)


def test_sparse_arrays_are_refused():
    from scipy.sparse import csr_matrix

    with pytest.raises(TypeError, match="toarray"):
        check_features(csr_matrix(np.eye(2)))


def test_one_hot_logits_are_not_taken_for_probabilities():
    assert check_logits([[1.0, 0.0], [0.0, 1.0]]).shape == (2, 2)
    assert check_probs([[1, 0], [0, 1]]).shape == (2, 2)


def test_labels_in_range_and_number():
    with pytest.raises(ValueError, match=r"in 0\.\.2, got values from 0 to 3"):
        check_labels([0, 3], n_classes=3)
    with pytest.raises(ValueError, match="expected 3 targets, one per sample, got 2"):
        check_labels([0, 1], n=3, name="targets")


def test_device_is_asked_for_not_repaired(device):
    assert check_labels([0, 1], device=device).device.type == device.type
    if device.type == "cuda":
        assert as_tensor(torch.zeros(2, device=device), device="cuda").device.type == "cuda"
        with pytest.raises(ValueError, match=r"expected x on cuda.*got it on cpu"):
            as_tensor(torch.zeros(2), device=device)


def test_scores_may_be_infinite():
    assert check_scores([-math.inf, 0.0, math.inf]).isinf().sum() == 2


def test_binary_takes_bools_ints_and_exact_floats():
    for y in ([True, False], [1, 0], [1.0, 0.0], np.array([1, 0], dtype=np.uint8)):
        assert check_binary(y, n=2).tolist() == [True, False]


def test_same_length():
    assert check_same_length(x=torch.zeros(3, 2), y=[1, 2, 3]) == 3
    with pytest.raises(ValueError, match="x has 3, y has 2"):
        check_same_length(x=torch.zeros(3, 2), y=[1, 2])


def test_positive_int():
    assert check_positive_int(np.int64(4), "k") == 4
    assert check_positive_int(0, "k", minimum=0) == 0
    for value in (1.0, True, "3", None):
        with pytest.raises(TypeError, match="expected k to be a whole number"):
            check_positive_int(value, "k")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        check_positive_int(0, "k")


def test_in_range():
    assert check_in_range(1, "alpha", 0, 1) == 1.0
    assert check_in_range(torch.tensor(0.5), "alpha", 0, 1) == 0.5
    for value, inclusive in [(1, "low"), (0, "high"), (0, "neither"), (2, "both"), (math.nan, "both")]:
        with pytest.raises(ValueError, match="expected alpha in"):
            check_in_range(value, "alpha", 0, 1, inclusive=inclusive)
    with pytest.raises(ValueError, match=r"in \(0, inf\), got inf"):
        check_in_range(math.inf, "alpha", 0, inclusive="neither")
    with pytest.raises(TypeError, match="to be a number"):
        check_in_range("1", "alpha")
    with pytest.raises(ValueError, match="inclusive"):
        check_in_range(1, "alpha", inclusive="left")


def test_generators():
    given = torch.Generator()
    assert check_generator(given) is given
    assert check_generator(None) is None
    assert torch.equal(torch.rand(3, generator=check_generator(7)), torch.rand(3, generator=check_generator(7)))
    a, b = (check_generator(np.random.RandomState(1)).initial_seed() for _ in range(2))
    assert a == b
    assert isinstance(check_generator(np.random.default_rng(0)), torch.Generator)
    with pytest.raises(TypeError, match=r"torch\.Generator, got str"):
        check_generator("0")
    with pytest.raises(ValueError, match="at least 0"):
        check_generator(-1)


def test_large_whole_numbers_stay_apart():
    large = 2**24
    assert check_features([[large + 1], [large]]).dtype == torch.float64
    assert check_scores(torch.tensor([-large - 1, 0])).tolist() == [-large - 1, 0]
    assert check_scores([large, 0]).dtype == torch.get_default_dtype()
    assert check_features(np.array([[1], [255]], dtype=np.uint8)).dtype == torch.get_default_dtype()


def test_a_single_number_has_no_length():
    with pytest.raises(ValueError, match="expected y to have a length, got a single number"):
        check_same_length(x=[1], y=torch.tensor(1.0))


@pytest.mark.parametrize(
    ("rows", "hint"),
    [
        ([[0.333, 0.333, 0.333]], r"rounded probabilities: pass p / p\.sum\(1, keepdims=True\)"),
        ([[33.3, 33.3, 33.3]], "percentages: pass p / 100"),
        ([[3.0, 0.5, 0.1]], "logits: pass softmax"),
        ([[-0.1, 0.6, 0.5]], "logits: pass softmax"),
    ],
)
def test_what_improbable_probabilities_look_like(rows, hint):
    with pytest.raises(ValueError, match=hint):
        check_probs(rows, "p")
