"""Shortcut learning: the two-cue task, sprites, complexity and representation against closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from torch import nn
from torch.func import functional_call, jacrev, vmap

from companion import geometry
from companion.nets import MLP
from companion.shortcuts.shortcut_learning import (
    CUES,
    GlyphNet,
    bayes_reliance,
    cka,
    cue_preference,
    feature_complexity,
    linear_reliance,
    loss_around,
    make_boolean_features,
    make_factor_sprites,
    make_footprint_sprites,
    make_glyph_pairs,
    make_two_feature_task,
    ntk_rule,
    readability,
    reliance,
    relu_ntk,
    shortcut_bias,
    v_information,
    variance_explained,
)
from companion.training import ManyModels

# --- two cues ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rho_s", "rho_c"), [(0.6, 0.9), (0.85, 0.9), (0.8, 0.8), (0.95, 0.7)])
def test_each_cue_alone_is_right_as_often_as_asked(rho_s, rho_c, generator):
    task = make_two_feature_task(40_000, rho_s, rho_c, 7.0, generator=generator)
    right = ((task.z > 0) == task.y[:, None]).double().mean(0)
    torch.testing.assert_close(right, torch.tensor([rho_s, rho_c]).double(), atol=0.01, rtol=0)
    assert task.y.sum() == 20_000
    torch.testing.assert_close(task.x, task.z * torch.tensor([7.0, 1.0]))


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.3, 1.0), (1.0, 1.0), (1.0, 0.4), (1.0, 0.0)])
def test_reliance_of_linear_rules_matches_its_closed_form(weights):
    measured = reliance(lambda z: z @ torch.tensor(weights), n_probe=400)
    assert measured.item() == pytest.approx(linear_reliance(*weights), abs=3e-3)


@pytest.mark.parametrize(("rho_s", "rho_c"), [(0.6, 0.9), (0.85, 0.9), (0.9, 0.75)])
def test_bayes_reliance_matches_the_best_rule_found_by_simulation(rho_s, rho_c, generator):
    task = make_two_feature_task(100_000, rho_s, rho_c, generator=generator)
    sign = 2 * task.y.float() - 1
    best = torch.linalg.solve(torch.cov(task.z.T), (sign[:, None] * task.z).mean(0))  # Fisher's discriminant
    assert reliance(lambda z: z @ best).item() == pytest.approx(bayes_reliance(rho_s, rho_c), abs=0.01)
    accuracy = ((task.z @ best > 0) == task.y).double().mean()
    assert accuracy.item() == pytest.approx(_bayes_accuracy(rho_s, rho_c), abs=0.005)


def _bayes_accuracy(rho_s, rho_c):
    normal = torch.distributions.Normal(0.0, 1.0)
    shift = normal.icdf(torch.tensor([rho_s, rho_c]))
    return normal.cdf(shift.norm()).item()


def test_bayes_reliance_does_not_depend_on_scale_and_turns_round_with_the_cues():
    assert bayes_reliance(0.8, 0.8) == 0
    assert bayes_reliance(0.7, 0.9) == pytest.approx(-bayes_reliance(0.9, 0.7))
    assert bayes_reliance(0.7, 0.9) < bayes_reliance(0.8, 0.9) < 0


def test_reliance_reads_logits_of_many_models_and_ignores_the_scale_of_scores():
    many = ManyModels([MLP((2, 8, 2), seed=seed) for seed in range(3)])
    one_by_one = [reliance(model) for model in many.models()]
    torch.testing.assert_close(reliance(many), torch.stack(one_by_one))
    rule = many.models()[0]
    assert reliance(lambda z: 100 * rule(z)) == reliance(rule)


def test_swapping_the_cues_changes_the_sign_of_reliance(generator):
    net = MLP((2, 16, 2), seed=1)
    assert reliance(lambda z: net(z.flip(1))).item() == pytest.approx(-reliance(net).item())


def test_nesting_hides_a_cue_from_linear_readers_without_losing_it(generator):
    task = make_two_feature_task(4000, nesting_c=3, dim=4, generator=generator)
    assert task.x.shape == (4000, 4)
    core = task.x[:, 2:]
    order = task.z[:, 1].argsort()
    steps = core[order].diff(dim=0).norm(dim=1)
    assert (steps > 0).all(), "an injective map never stands still"
    assert readability(task.x[:, :2], task.z[:, 0]) > 0.999 > readability(core, task.z[:, 1])


def test_first_gradient_step_of_a_linear_model_has_the_reliance_of_squared_amplification(generator):
    task = make_two_feature_task(50_000, 0.85, 0.9, 3.0, generator=generator)
    shift = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([0.85, 0.9]))
    expected = linear_reliance(9 * shift[0].item(), shift[1].item())
    rule = ntk_rule(task.x[:4000], task.y[:4000], depth=0, ridge=math.inf)
    assert reliance(rule, task.embed, n_probe=40).item() == pytest.approx(expected, abs=0.02)


def test_converged_linear_rule_is_blind_to_amplification(generator):
    plain = make_two_feature_task(400, alpha_s=1.0, generator=torch.Generator().manual_seed(3))
    loud = make_two_feature_task(400, alpha_s=10.0, generator=torch.Generator().manual_seed(3))
    biases = [shortcut_bias(ntk_rule(t.x, t.y, depth=0, ridge=1e-12), t, n_probe=40) for t in (plain, loud)]
    assert biases[0].item() == pytest.approx(biases[1].item(), abs=1e-3)


@pytest.mark.parametrize(("depth", "bias"), [(1, 0.0), (2, 0.0), (2, 0.5)])
def test_ntk_matches_the_gradients_of_a_wide_network(depth, bias, generator):
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    width, kernels = 512, []
    for _ in range(16):
        params, n_in = {}, 3
        for layer in range(depth + 1):
            n_out = width if layer < depth else 1
            params[f"w{layer}"] = torch.randn(n_out, n_in, generator=generator, dtype=torch.float64)
            params[f"b{layer}"] = torch.randn(n_out, generator=generator, dtype=torch.float64)
            n_in = n_out

        def net(params, one):
            h = one @ params["w0"].T + bias * params["b0"]
            for layer in range(1, depth + 1):
                h = h.relu() * math.sqrt(2 / width) @ params[f"w{layer}"].T + bias * params[f"b{layer}"]
            return h[0]

        rows = vmap(jacrev(net), (None, 0))(params, x)
        flat = torch.cat([row.flatten(1) for row in rows.values()], 1)
        kernels.append(flat @ flat.T)
    mean, exact = torch.stack(kernels).mean(0), relu_ntk(x, depth=depth, bias=bias)
    scale = exact.diagonal().sqrt()
    difference = (mean - exact) / (scale[:, None] * scale)
    assert difference.abs().max() < 0.06


def test_ntk_limits():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(relu_ntk(x, depth=0), x @ x.T)
    for depth in (1, 2, 5):
        kernel = relu_ntk(x.double(), depth=depth)
        torch.testing.assert_close(kernel.diagonal(), (depth + 1) * x.double().square().sum(1))
        assert torch.linalg.eigvalsh(kernel).min() > -1e-9
        torch.testing.assert_close(relu_ntk(3 * x.double(), x.double(), depth), 3 * kernel)
    assert relu_ntk(torch.zeros(1, 2), depth=2).item() == 0


def test_ntk_rule_interpolates_without_ridge(generator):
    x, y = torch.randn(30, 3, generator=generator), torch.randint(2, (30,), generator=generator)
    scores = ntk_rule(x.double(), y, depth=2, ridge=1e-12)(x.double())
    torch.testing.assert_close(scores, 2.0 * y.double() - 1, atol=1e-4, rtol=0)


@pytest.mark.parametrize("footprint", [1, 5])
def test_footprint_changes_the_picture_and_not_the_odds(footprint):
    train = make_footprint_sprites(8000, footprint, noise=0.0, generator=torch.Generator().manual_seed(0))
    right_s, right_c = train.shortcut == train.labels, train.core == train.labels
    assert right_s.double().mean().item() == pytest.approx(0.85, abs=0.015)
    assert right_c.double().mean().item() == pytest.approx(0.95, abs=0.015)
    assert (right_s & right_c).double().mean().item() == pytest.approx(0.85 * 0.95, abs=0.02)
    colored = (train.images.amax(1) - train.images.amin(1)) > 0.5
    assert (colored.sum((1, 2)) == footprint**2).all()
    redder = train.images[:, 0, 0, 0] > train.images[:, 1, 0, 0]
    assert (redder == (train.shortcut == 0)).all()


def test_two_cues_refuse_bad_input():
    with pytest.raises(ValueError, match="footprint"):
        make_footprint_sprites(4, 17)
    with pytest.raises(ValueError, match="rho_s"):
        make_two_feature_task(10, rho_s=1.0)
    with pytest.raises(ValueError, match="at least 4 with nesting"):
        make_two_feature_task(10, nesting_s=1)
    with pytest.raises(ValueError, match="two zero weights"):
        linear_reliance(0, 0)
    with pytest.raises(ValueError, match="even n_probe"):
        reliance(lambda z: z[:, 0], n_probe=11)
    with pytest.raises(ValueError, match="logits"):
        reliance(lambda z: z[:5, 0])
    with pytest.raises(ValueError, match="same dimension"):
        relu_ntk([[1.0, 2.0]], [[1.0]])
    with pytest.raises(ValueError, match="ridge"):
        ntk_rule([[0.0], [1.0]], [0, 1], ridge=0)


# --- sprites ----------------------------------------------------------------------------------------------------------


def test_diagonal_free_and_conflicting_factors(generator):
    train = make_factor_sprites(300, generator=generator)
    assert all((train.factors[cue] == train.labels).all() for cue in CUES)
    free = make_factor_sprites(3000, tied=("shape",), generator=generator)
    assert (free.factors["shape"] == free.labels).all()
    assert abs((free.factors["color"] == free.labels).double().mean().item() - 1 / 3) < 0.05
    test = make_factor_sprites(600, conflict=True, generator=generator)
    votes = torch.stack([test.factors[cue] for cue in CUES], 1)
    assert (votes.sort(1).values == torch.arange(3)).all()
    assert len({tuple(row) for row in votes.tolist()}) == 6


def test_shape_says_nothing_about_area(generator):
    sprites = make_factor_sprites(900, tied=("shape",), noise=0.0, generator=generator)
    area = (sprites.images.amax(1) > 0.3).double().sum((1, 2))
    for size in range(3):
        rows = sprites.factors["size"] == size
        means = [area[rows & (sprites.labels == shape)].mean() for shape in range(3)]
        assert max(means) / min(means) < 1.1


def test_cue_preference_adds_up_and_takes_many_models(generator):
    test = make_factor_sprites(200, conflict=True, generator=generator)
    predictions = torch.randint(3, (4, 200), generator=generator)
    shares = cue_preference(predictions, test.factors)
    torch.testing.assert_close(sum(shares.values()), torch.ones(4, dtype=torch.float64))
    assert cue_preference(test.factors["size"], test.factors)["size"] == 1
    alone = cue_preference(predictions[2].numpy(), {cue: f.numpy() for cue, f in test.factors.items()})
    assert alone["color"] == shares["color"][2]


def test_cues_refuse_bad_input():
    with pytest.raises(ValueError, match="argmax"):
        cue_preference(torch.zeros(3), {"color": [0, 1, 2]})
    with pytest.raises(ValueError, match="at least one cue"):
        cue_preference([0, 1], {})
    with pytest.raises(ValueError, match="color"):
        cue_preference([0, 1], {"color": [0, 1, 2]})
    with pytest.raises(ValueError, match="tied"):
        make_factor_sprites(5, tied=("weight",))
    with pytest.raises(ValueError, match="radius"):
        loss_around(nn.Linear(2, 2), torch.zeros(1, 2), torch.tensor([0]), [])


def test_filter_normalised_directions_do_not_see_a_rescaling_of_relu_layers():
    x, y = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 2
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    twin = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    twin.load_state_dict({"0.weight": 5 * net[0].weight, "2.weight": net[2].weight / 5})
    curves = [
        loss_around(model, x, y, [0.0, 0.5, 1.0], n_directions=4, generator=torch.Generator().manual_seed(1))
        for model in (net, twin)
    ]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-4, atol=1e-5)
    assert curves[0][0].std() == 0
    assert curves[0][0, 0].item() == pytest.approx(F.cross_entropy(net(x), y).item())


# --- complexity -------------------------------------------------------------------------------------------------------


def test_readability_agrees_with_scikit_learn_where_the_penalty_does_not_matter(generator):
    h = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    z = h @ torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    z = z + torch.randn(300, generator=generator, dtype=torch.float64)
    fold, predicted = np.arange(300) % 3, np.empty(300)
    for k in range(3):
        model = Ridge(alpha=1e-6).fit(h[fold != k], z[fold != k])
        predicted[fold == k] = model.predict(h[fold == k])
    assert readability(h, z).item() == pytest.approx(r2_score(z, predicted), abs=2e-3)


def test_readability_does_not_read_noise(generator):
    assert readability(torch.randn(120, 100, generator=generator), torch.randn(120, generator=generator)) < 0.05


@pytest.mark.parametrize("signal", [0.5, 1.0, 3.0])
def test_v_information_of_a_gaussian_channel_is_its_capacity(signal, generator):
    z = torch.randn(40_000, generator=generator)
    h = signal * z + torch.randn(40_000, generator=generator)
    assert v_information(h[:, None], z).item() == pytest.approx(0.5 * math.log(1 + signal**2), abs=0.02)


def test_v_information_is_invariant_under_invertible_linear_maps(generator):
    h = torch.randn(2000, 3, generator=generator)
    z = h[:, 0] + 0.5 * torch.randn(2000, generator=generator)
    mixed = h @ torch.randn(3, 3, generator=generator) + 4
    assert v_information(mixed, z).item() == pytest.approx(v_information(h, z).item(), abs=5e-3)


def test_v_information_grows_with_computation_as_mutual_information_cannot(generator):
    x = 2.0 * torch.randint(2, (2000, 2), generator=generator) - 1
    parity = x.prod(1)
    assert v_information(x, parity) < 0.01
    assert readability(torch.cat([x, parity[:, None]], 1), parity) > 0.99


def test_complexity_counts_the_layers_in_which_a_feature_is_missing(generator):
    easy, hard, noise = torch.randn(3, 900, generator=generator)
    layers = {f"layer{i}": torch.stack([easy, hard if i == 3 else noise], 1) for i in range(4)}
    never = torch.randn(900, generator=generator)
    complexity = feature_complexity(layers, torch.stack([easy, hard, never], 1))
    torch.testing.assert_close(complexity, torch.tensor([0.0, 0.75, 1.0]).double(), atol=0.02, rtol=0)


def test_glyph_pairs_show_what_they_say(generator):
    pairs = make_glyph_pairs(200, noise=0.0, generator=generator)
    lit = pairs.images.amax(1) > 0
    left, right = lit[:, :, :8].sum((1, 2)), lit[:, :, 8:].sum((1, 2))
    assert (left == 9).all()
    assert (right == 9).all()
    red = pairs.images[:, 0].sum((1, 2)) > pairs.images[:, 1].sum((1, 2))
    assert (red == (pairs.factors[:, 0] == 0)).all()


@pytest.mark.parametrize(("tap", "sees"), [("stem", 3), ("block1", 8), ("block2", 16)])
def test_what_a_tap_of_the_glyph_net_can_see(tap, sees):
    net, x = GlyphNet(seed=0), torch.zeros(1, 3, 16, 16, requires_grad=True)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.abs() + 0.1)  # no cancellation, no dead unit
    h = net.stem(x + 1)
    for name, branch in net.branches.items():
        if tap == "stem":
            break
        h = h + branch(h)
        h = F.avg_pool2d(h, 2)  # max-pooling would pick one of the four
        if name == tap:
            break
    middle = h[0, 0, h.shape[2] // 2, h.shape[3] // 2]
    (gradient,) = torch.autograd.grad(middle, x)
    columns = (gradient[0].abs().sum((0, 1)) > 0).sum().item()
    assert columns <= sees
    assert columns >= min(sees, 16) - 3


def test_glyph_net_without_all_branches_is_its_skip_path(generator):
    net = GlyphNet(seed=0)
    x = torch.randn(3, 3, 16, 16, generator=generator)
    taps = net.activations(x, without=list(net.branches))
    torch.testing.assert_close(taps["block4"], F.max_pool2d(net.stem(x), 4))
    with pytest.raises(ValueError, match="block9"):
        net.activations(x, without=["block9"])


def test_complexity_refuses_bad_input():
    with pytest.raises(ValueError, match="constant"):
        readability(torch.randn(9, 2), torch.ones(9))
    with pytest.raises(ValueError, match="target"):
        readability(torch.randn(9, 2), torch.randn(8))
    with pytest.raises(ValueError, match="at least one layer"):
        feature_complexity({}, torch.randn(8))


# --- representation ---------------------------------------------------------------------------------------------------


def test_variance_explained_of_known_mixtures_adds_up():
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    h = signs * torch.tensor([3.0, 2.0, 1.0])
    shares = variance_explained(h, signs)
    torch.testing.assert_close(shares, torch.tensor([9.0, 4.0, 1.0]) / 14)
    rotated = h @ geometry.random_orthonormal(3, generator=torch.Generator().manual_seed(0)) + 5
    torch.testing.assert_close(variance_explained(rotated, 2 * signs - 7), shares)


def test_variance_explained_is_the_mean_regression_r2_weighted_by_variance(generator):
    h, f = torch.randn(50, 4, generator=generator).double(), torch.randn(50, generator=generator).double()
    h[:, 1] += f
    correlation = torch.corrcoef(torch.cat([h, f[:, None]], 1).T)[-1, :-1]
    weight = h.var(0)
    expected = (correlation.square() * weight).sum() / weight.sum()
    torch.testing.assert_close(variance_explained(h, f), expected)
    torch.testing.assert_close(variance_explained(torch.stack([h, 2 * h]), f), expected.expand(2))


def test_boolean_features_are_balanced_and_independent(generator):
    data = make_boolean_features(20_000, parity=3, prevalence=0.2, generator=generator)
    assert abs((data.easy > 0).double().mean().item() - 0.2) < 0.01
    assert abs(data.hard.mean().item()) < 0.03
    assert abs((data.easy * data.hard).mean().item() - data.easy.mean().item() * data.hard.mean().item()) < 0.03


def test_cka_is_the_one_of_the_foundation():
    assert cka is geometry.cka


def test_representation_refuses_bad_input():
    with pytest.raises(ValueError, match="constant"):
        variance_explained(torch.ones(5, 2), torch.randn(5))
    with pytest.raises(ValueError, match="target"):
        variance_explained(torch.randn(5, 2), torch.randn(4))
    with pytest.raises(ValueError, match="dim"):
        make_boolean_features(5, dim=3, parity=3)


def test_devices_agree(device, generator):
    x = torch.randn(20, 3, generator=generator)
    y = torch.randint(2, (20,), generator=generator)
    z = torch.randn(20, generator=generator)
    torch.testing.assert_close(relu_ntk(x.to(device), depth=2).cpu(), relu_ntk(x, depth=2))
    torch.testing.assert_close(ntk_rule(x.to(device), y.to(device))(x.to(device)).cpu(), ntk_rule(x, y)(x))
    torch.testing.assert_close(readability(x.to(device), z.to(device)).cpu(), readability(x, z))
    torch.testing.assert_close(variance_explained(x.to(device), z.to(device)).cpu(), variance_explained(x, z))
    net = GlyphNet(seed=0).to(device)
    image = torch.randn(2, 3, 16, 16, generator=generator)
    torch.testing.assert_close(net(image.to(device)).cpu(), GlyphNet(seed=0)(image), rtol=1e-3, atol=1e-3)
    assert functional_call(net, dict(net.named_parameters()), (image.to(device),)).shape == (2, 3)


def test_glyphs_where_double_precision_is_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        assert make_glyph_pairs(4, generator=torch.Generator().manual_seed(0)).images.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
