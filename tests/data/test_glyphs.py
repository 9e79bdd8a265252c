"""Digits on coloured backgrounds: how strongly colour and class go together, and groups."""

import pytest
import torch
from sklearn import datasets

from companion.data import PALETTE, color_digits, load_digits_images, make_color_digits


def _gen(seed=0):
    return torch.Generator().manual_seed(seed)


def _cramers_v(a, b, levels):
    table = torch.zeros(levels, levels, dtype=torch.float64)
    table.index_put_((a, b), torch.ones(len(a), dtype=torch.float64), accumulate=True)
    expected = table.sum(1, keepdim=True) * table.sum(0) / len(a)
    return float(((table - expected).square() / expected).sum().div(len(a) * (levels - 1)).sqrt())


def test_images_are_the_originals_and_resampled_ones_keep_their_ink():
    images, labels = load_digits_images()
    assert torch.equal(images.flatten(1) * 16, torch.tensor(datasets.load_digits().data, dtype=torch.float32))
    assert torch.equal(labels, torch.tensor(datasets.load_digits().target))
    large, _ = load_digits_images(32)
    assert large.shape == (1797, 1, 32, 32)
    assert 0 <= large.min() <= large.max() <= 1
    assert torch.allclose(large.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=0.03)
    assert load_digits_images(4)[0].shape[-1] == 4


def test_classes_are_relabelled_in_the_order_given():
    _, original = load_digits_images()
    _, labels = load_digits_images(classes=(8, 3))
    assert torch.equal(labels, (original[(original == 3) | (original == 8)] == 3).long())


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9, 1.0])
def test_correlation_is_cramers_v_and_its_share(correlation):
    labels = torch.arange(5).repeat(8000)
    digits = color_digits(torch.zeros(40_000, 1, 1, 1), labels, correlation, generator=_gen())
    assert _cramers_v(digits.labels, digits.colors, 5) == pytest.approx(correlation, abs=0.02)
    share = (digits.colors == labels).double().mean()
    assert float(share) == pytest.approx(correlation + (1 - correlation) / 5, abs=0.01)


def test_background_and_ink():
    images, labels = load_digits_images(16)
    on_ground = color_digits(images, labels, 0.5, generator=_gen())
    empty = images < 1e-6
    painted = on_ground.images.movedim(1, -1)[empty[:, 0]]
    wanted = PALETTE[on_ground.colors][:, None, None].expand(-1, 16, 16, -1)[empty[:, 0]]
    assert torch.allclose(painted, wanted, atol=1e-5)
    ink = color_digits(images, labels, 0.5, cue="ink", noise=0.1, generator=_gen())
    assert torch.equal(ink.colors, on_ground.colors)
    assert 0 <= ink.images.min() <= ink.images.max() <= 1


def test_groups_name_class_and_colour():
    images, labels = load_digits_images(classes=range(4))
    digits = color_digits(images, labels, 0.5, n_colors=3, generator=_gen())
    assert torch.equal(digits.groups // 3, digits.labels)
    assert torch.equal(digits.groups % 3, digits.colors)
    assert digits.groups.unique().tolist() == list(range(12))


def test_train_is_spurious_and_test_is_not():
    train, test = make_color_digits(0.95, classes=(0, 1, 2), generator=_gen())
    assert train.images.shape[1:] == (3, 16, 16)
    assert _cramers_v(train.labels, train.colors, 3) > 0.9
    assert _cramers_v(test.labels, test.colors, 3) < 0.2
    assert abs(len(test.labels) / (len(train.labels) + len(test.labels)) - 0.4) < 0.01
    again, _ = make_color_digits(0.95, classes=(0, 1, 2), generator=_gen())
    assert torch.equal(train.images, again.images)


def test_bad_input():
    images, labels = load_digits_images()
    with pytest.raises(ValueError, match="correlation"):
        color_digits(images, labels, 1.1)
    with pytest.raises(ValueError, match="colours"):
        color_digits(images, labels, n_colors=11)
    with pytest.raises(ValueError, match="cue"):
        color_digits(images, labels, cue="frame")
    with pytest.raises(ValueError, match="images"):
        color_digits(images[:5], labels)
    with pytest.raises(ValueError, match="distinct digits"):
        load_digits_images(classes=(1, 1))
    with pytest.raises(ValueError, match="size"):
        load_digits_images(0)
