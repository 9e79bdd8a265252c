"""The bundled sets: sizes, scaling from the training part only, splits that repeat."""

import pytest
import torch
from sklearn import datasets

from companion.data import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_iris,
    load_photos,
    load_wine,
    photo_crops,
)

SETS = {
    load_digits: (1797, 64, 10),
    load_wine: (178, 13, 3),
    load_breast_cancer: (569, 30, 2),
    load_iris: (150, 4, 3),
    load_diabetes: (442, 10, None),
}


@pytest.mark.parametrize("load", SETS, ids=lambda f: f.__name__)
def test_sizes_types_and_repetition(load):
    n, d, classes = SETS[load]
    x_train, y_train, x_test, y_test = load(0.3, torch.Generator().manual_seed(0))
    assert len(x_train) + len(x_test) == n
    assert abs(len(x_test) - 0.3 * n) <= 1
    assert x_train.shape[1:] == x_test.shape[1:] == (d,)
    assert x_train.dtype == torch.float32
    if classes:
        assert y_train.dtype == torch.int64
        assert y_train.unique().tolist() == list(range(classes))
        shares = y_train.bincount() / len(y_train) - y_test.bincount() / len(y_test)
        assert shares.abs().max() < 0.05
    again = load(0.3, torch.Generator().manual_seed(0))
    assert torch.equal(x_test, again.x_test)
    assert not torch.equal(y_test, load(0.3, torch.Generator().manual_seed(1)).y_test)


@pytest.mark.parametrize("load", [load_wine, load_breast_cancer, load_iris, load_diabetes])
def test_standardised_by_the_training_part(load):
    split = load(0.5, torch.Generator().manual_seed(0))
    assert split.x_train.mean(0).abs().max() < 1e-5
    assert torch.allclose(split.x_train.std(0, correction=0), torch.ones(split.x_train.shape[1]), atol=1e-5)
    assert split.x_test.mean(0).abs().max() > 1e-3


def test_digits_are_the_originals():
    split = load_digits(0.5, torch.Generator().manual_seed(0), images=True)
    assert split.x_train.shape[1:] == (1, 8, 8)
    together = torch.cat([split.x_train, split.x_test]).flatten(1) * 16
    original = torch.tensor(datasets.load_digits().data, dtype=torch.float32)
    assert torch.equal(together.sum(1).sort().values, original.sum(1).sort().values)


def test_photos_and_crops():
    photos = load_photos()
    assert photos.shape == (2, 3, 427, 640)
    assert 0 <= photos.min() < photos.max() <= 1
    crops, photo = photo_crops(20, 9, torch.Generator().manual_seed(0))
    assert crops.shape == (20, 3, 9, 9)
    windows = photos[photo[0]].unfold(1, 9, 1).unfold(2, 9, 1)  # every possible crop of that photograph
    assert (windows == crops[0][:, None, None]).all(-1).all(-1).all(0).any()
    whole, _ = photo_crops(1, 427, torch.Generator().manual_seed(0))
    assert whole.shape == (1, 3, 427, 427)
    with pytest.raises(ValueError, match="at most 427"):
        photo_crops(1, 428)


def test_bad_fraction():
    with pytest.raises(ValueError, match="test_fraction"):
        load_iris(1.0)
