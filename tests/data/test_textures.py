"""Textures: the mask is exactly where the picture changed, and pictures are what was asked for."""

import pytest
import torch

from companion.data import DEFECTS, TEXTURES, make_textures


def _gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", TEXTURES)
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_picture_differs_from_its_normal_twin_exactly_inside_the_mask(kind, defect):
    normal = make_textures(12, kind, generator=_gen())
    broken = make_textures(12, kind, defect, generator=_gen())
    changed = (normal.images != broken.images).any(1, keepdim=True)
    assert not (changed & ~broken.masks).any()
    assert changed[broken.masks].float().mean() > 0.95
    assert broken.masks.flatten(1).any(1).all()
    assert broken.masks.float().mean() < 0.15
    assert broken.labels.tolist() == [1] * 12
    assert not normal.masks.any()
    assert normal.labels.tolist() == [0] * 12


@pytest.mark.parametrize("defect", DEFECTS)
def test_strength_fades_the_defect(defect):
    normal = make_textures(6, "weave", generator=_gen()).images
    gaps = [
        float((make_textures(6, "weave", defect, strength=s, generator=_gen()).images - normal).abs().sum())
        for s in (0.1, 0.5, 1.0)
    ]
    assert gaps[0] == pytest.approx(gaps[2] / 10, rel=0.05)
    assert gaps[1] == pytest.approx(gaps[2] / 2, rel=0.05)


@pytest.mark.parametrize("defect", DEFECTS)
def test_extent_grows_the_defect(defect):
    sizes = make_textures(3, "grid", defect, extent=torch.tensor([0.4, 1.0, 1.8]), generator=_gen()).masks.sum(
        (1, 2, 3)
    )
    assert sizes[0] < sizes[1] < sizes[2]


def test_mixed_sets_have_labels_by_place():
    textures = make_textures(400, "dots", [None, "scratch", "stain"], generator=_gen())
    assert textures.labels.unique().tolist() == [0, 1, 2]
    assert torch.equal(textures.masks.flatten(1).any(1), textures.labels > 0)
    assert textures.labels.bincount()[[0, 1, 2]].min() > 90
    area = textures.masks.float().mean((1, 2, 3))
    assert area[textures.labels == 1].mean() < area[textures.labels == 2].mean()


@pytest.mark.parametrize("kind", TEXTURES)
def test_pictures_are_images_of_one_surface(kind):
    looks = torch.stack([make_textures(20, kind, look=look, size=32, generator=_gen()).images for look in range(6)])
    assert looks.shape == (6, 20, 3, 32, 32)
    assert looks.dtype == torch.float32
    assert 0 <= looks.min() < looks.max() <= 1
    assert looks.std((3, 4)).mean() > 0.04  # there is a pattern
    assert (looks[:, 0] != looks[:, 1]).any()  # each picture is shifted and lit anew
    hues = looks.mean((3, 4))
    within = hues.std(1).mean()
    between = hues.mean(1).std(0).mean()
    assert between > 2 * within  # looks are told apart by colour alone


def test_pictures_repeat_and_do_not_depend_on_their_neighbours_defects():
    first = make_textures(5, "bricks", ["blob", "missing"], generator=_gen())
    again = make_textures(5, "bricks", ["blob", "missing"], generator=_gen())
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    alone = make_textures(5, "bricks", "missing", generator=_gen())
    same = first.labels == 2
    assert same.any()
    assert torch.equal(first.images[same], alone.images[same])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "silk"}, "kind"),
        ({"defect": "hole"}, "defects among"),
        ({"defect": []}, "a defect or None"),
        ({"look": 6}, "look"),
        ({"size": 4}, "size"),
        ({"strength": 0.0}, "strength"),
        ({"extent": [1.0, 2.0]}, "extent"),
        ({"noise": -0.1}, "noise"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_textures(3, **arguments)
