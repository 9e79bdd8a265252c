"""Sprites: areas in closed form, factors that are independent or exactly as set, and masks."""

import math

import pytest
import torch

from companion.data import SHAPES, make_sprites


def _gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_the_area_of_its_disc_and_its_centre(shape):
    sprites = make_sprites(
        20, shapes=[shape], colors=["white"], sizes=[0.2], image_size=96, x=0.5, y=0.45, angle=None, generator=_gen()
    )
    coverage = sprites.images[:, 0]
    area = coverage.mean((1, 2))
    assert area.mean() == pytest.approx(math.pi * 0.2**2, rel=0.01)
    grid = (torch.arange(96) + 0.5) / 96
    assert ((coverage.mean(1) @ grid / 96) / area - 0.5).abs().mean() < 0.003
    assert ((coverage.mean(2) @ grid / 96) / area - 0.45).abs().mean() < 0.003


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_stays_inside_the_picture(shape):
    sprites = make_sprites(300, shapes=[shape], colors=["white"], angle=None, generator=_gen())
    area = sprites.images[:, 0].sum((1, 2))
    expected = math.pi * (32 * torch.tensor([0.10, 0.14, 0.18])[sprites.size]).square()
    assert ((area - expected).abs() < 4).all()


def test_shapes_differ():
    sprites = make_sprites(12, shapes=SHAPES, shape=torch.arange(12), color=0, size=2, x=0.5, y=0.5)
    apart = (sprites.images[:, None] - sprites.images[None]).square().sum((2, 3, 4))
    assert (apart + 99 * torch.eye(12)).min() > 1


def test_drawn_factors_are_uniform_and_independent():
    sprites = make_sprites(20_000, image_size=4, generator=_gen(), background=None, backgrounds=("black", "white"))
    for factor, levels in (("shape", 3), ("color", 3), ("size", 3), ("background", 2)):
        counts = getattr(sprites, factor).bincount()
        assert len(counts) == levels
        assert torch.allclose(counts / 20_000, torch.full((levels,), 1 / levels), atol=0.015)
    columns = [sprites.shape, sprites.color, sprites.size, sprites.x, sprites.y, sprites.background]
    correlation = torch.corrcoef(torch.stack([c.double() for c in columns]))
    assert (correlation - torch.eye(6)).abs().max() < 0.03
    joint = torch.zeros(3, 3)
    joint.index_put_((sprites.shape, sprites.color), torch.ones(20_000), accumulate=True)
    assert (joint / 20_000 - 1 / 9).abs().max() < 0.01
    # position is independent of size and shape: the range is the same for all
    for s in range(3):
        assert sprites.x[sprites.size == s].min() == pytest.approx(float(sprites.x.min()), abs=0.01)


def test_set_factors_are_used_and_leave_the_others_as_they_were():
    y = torch.arange(90) % 3
    free = make_sprites(90, generator=_gen())
    conflict = make_sprites(90, shape=y, color=(y + 1) % 3, generator=_gen())
    assert torch.equal(conflict.shape, y)
    assert torch.equal(conflict.color, (y + 1) % 3)
    for factor in ("size", "x", "y"):
        assert torch.equal(getattr(free, factor), getattr(conflict, factor))


def test_colour_place_and_mask_are_those_of_the_picture():
    sprites = make_sprites(50, colors=("red", (0.0, 0.0, 1.0)), backgrounds=("white",), generator=_gen())
    inside = sprites.masks.expand(-1, 3, -1, -1)
    means = (sprites.images * inside).sum((2, 3)) / inside.sum((2, 3))
    assert torch.equal(means[:, 2] > means[:, 0], sprites.color == 1)
    assert (sprites.images.amin(1, keepdim=True) < 1)[sprites.masks].all()
    column = (sprites.masks.sum((1, 2)) * (torch.arange(32) + 0.5)).sum(1) / sprites.masks.sum((1, 2, 3)) / 32
    assert torch.allclose(column, sprites.x, atol=0.03)


def test_rotation_turns_the_picture():
    quarter = make_sprites(1, shapes=["ell"], x=0.5, y=0.5, angle=math.pi / 2, color=0, size=0).images
    upright = make_sprites(1, shapes=["ell"], x=0.5, y=0.5, angle=0.0, color=0, size=0).images
    assert torch.allclose(quarter, upright.rot90(-1, (2, 3)), atol=1e-4)


def test_anti_aliasing_follows_small_shifts():
    left = make_sprites(1, x=0.5, y=0.5, shape=1, color=0, size=1).images
    right = make_sprites(1, x=0.5 + 0.25 / 32, y=0.5, shape=1, color=0, size=1).images
    assert 0 < (left - right).abs().max() < 0.5


def test_outlines_are_thinner_and_scenes_stack():
    whole = make_sprites(10, filled=True, generator=_gen())
    outline = make_sprites(10, filled=False, generator=_gen())
    assert (outline.images.sum((1, 2, 3)) < whole.images.sum((1, 2, 3))).all()
    scene = make_sprites(10, backgrounds=whole.images, x=0.2, y=0.2, size=0, generator=_gen(1))
    untouched = ~scene.masks & (scene.images == whole.images).all(1, keepdim=True)
    assert untouched.float().mean() > 0.9


def test_textured_backgrounds_and_noise():
    sprites = make_sprites(8, backgrounds=("gray", "weave"), background=[0, 1] * 4, noise=0.05, generator=_gen())
    assert 0 <= sprites.images.min() <= sprites.images.max() <= 1
    clean = make_sprites(8, backgrounds=("gray", "weave"), background=[0, 1] * 4, generator=_gen())
    corner = clean.images[:, :, :4, :4].var((1, 2, 3))
    assert (corner[1::2] > corner[::2]).all()


def test_global_state_is_untouched():
    before = torch.get_rng_state()
    make_sprites(3, backgrounds=("weave",), generator=_gen())
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(3)
    first = make_sprites(3).images
    torch.manual_seed(3)
    assert torch.equal(first, make_sprites(3).images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shapes": ["blob"]}, "shapes among"),
        ({"colors": ["mauve"]}, "colors among"),
        ({"backgrounds": ["mauve"]}, "backgrounds"),
        ({"shape": 3}, r"0\.\.2"),
        ({"color": [0, 1]}, "one number or 5"),
        ({"color": [0.5] * 5}, "whole numbers"),
        ({"sizes": [0.4]}, "does not fit"),
        ({"sizes": [0.0]}, "positive sizes"),
        ({"x": float("nan")}, "x"),
        ({"backgrounds": torch.zeros(5, 3, 8, 8)}, "background pictures"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_sprites(5, **arguments)


def test_a_name_where_a_number_is_expected():
    with pytest.raises(TypeError, match=r"expected shape to be .* numbers, got str"):
        make_sprites(3, shape="disc")
