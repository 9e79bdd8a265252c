"""Fixed bases, spherical losses and subspace heads, held to closed forms and to dense or independent computations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from companion.collapse import (
    EBVHead,
    FactoredOutputLayer,
    GrassmannHead,
    RiemannianSGD,
    SphericalSoftmaxLoss,
    TaylorSoftmaxLoss,
    ZLoss,
    coherence,
    equiangular_basis,
    grassmann_distance,
    grassmann_exp,
    intra_class_variability,
    spherical_stats,
    topk_error,
    welch_bound,
)
from companion.geometry import random_orthonormal, simplex_etf

LOSSES = [ZLoss(0.7, 3.0), TaylorSoftmaxLoss(), SphericalSoftmaxLoss(1e-2)]


# --- equiangular bases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(3, 2), (6, 3), (7, 6), (10, 5)])
def test_basis_reaches_the_welch_bound_where_an_equiangular_tight_frame_exists(n, d, generator):
    basis = equiangular_basis(n, d, steps=1500, generator=generator)
    assert coherence(basis) <= welch_bound(n, d) + 0.005
    assert coherence(basis) >= welch_bound(n, d) - 1e-6


def test_basis_of_a_hundred_vectors_comes_near_the_bound(generator):
    basis = equiangular_basis(100, 32, generator=generator)
    assert welch_bound(100, 32) == pytest.approx(0.1465, abs=1e-4)
    assert welch_bound(100, 32) < coherence(basis) <= 0.20
    assert basis.norm(dim=1).allclose(torch.ones(100))


def test_signed_basis_solves_the_tammes_problem(generator):
    # in the plane the best spread is a regular polygon; eight points on a sphere make a square antiprism
    polygon = equiangular_basis(10, 2, signed=True, steps=1500, generator=generator)
    assert coherence(polygon, signed=True).item() == pytest.approx(math.cos(math.pi / 5), abs=3e-3)
    antiprism = equiangular_basis(8, 3, signed=True, steps=1500, generator=generator)
    assert coherence(antiprism, signed=True).item() == pytest.approx(0.2612, abs=5e-3)


def test_basis_is_exact_where_a_perfect_one_is_known(generator):
    assert coherence(equiangular_basis(5, 8, generator=generator)) < 1e-6
    simplex = equiangular_basis(5, 4, signed=True, generator=generator)
    assert (simplex @ simplex.T - 1.25 * torch.eye(5) + 0.25).abs().max() < 1e-6


def test_basis_repeats_with_its_generator_and_stops_at_max_cos():
    a, b = (equiangular_basis(20, 5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    loose = equiangular_basis(20, 5, max_cos=0.7, generator=torch.Generator().manual_seed(3))
    assert coherence(a) < 0.6 < coherence(loose) <= 0.7


def test_coherence_does_not_depend_on_the_chunks(monkeypatch, generator):
    v = torch.randn(50, 7, generator=generator)
    unit = F.normalize(v)
    dense = (unit @ unit.T - 2 * torch.eye(50)).abs()
    dense.fill_diagonal_(0)
    monkeypatch.setattr("companion.collapse.fixed_classifiers.basis.CHUNK", 8)
    assert torch.isclose(coherence(v), dense.max())


def test_ebv_head_gives_cosines_over_the_temperature(device):
    basis = equiangular_basis(6, 3, generator=torch.Generator().manual_seed(0), device=device)
    head, h = EBVHead(basis, 0.5).to(device), torch.randn(4, 3, device=device)
    expected = F.cosine_similarity(h[:, None], basis[None], dim=-1) / 0.5
    assert torch.allclose(head(h), expected, atol=1e-5)
    assert torch.allclose(head(7 * h), head(h), atol=1e-5)
    assert list(head.parameters()) == []
    assert "basis" in head.state_dict()


def test_the_learned_control_of_the_head_stays_a_cosine_head():
    head = EBVHead(simplex_etf(3, 2), trainable=True)
    before = head(torch.eye(2))
    with torch.no_grad():
        head.basis.mul_(5)
    assert torch.allclose(head(torch.eye(2)), before)
    head(torch.eye(2)).sum().backward()
    assert head.basis.grad is not None


@pytest.mark.parametrize(
    "call",
    [
        lambda: equiangular_basis(1, 3),
        lambda: equiangular_basis(5, 1),
        lambda: equiangular_basis(5, 2, max_cos=1.5),
        lambda: coherence([[1.0, 0.0]]),
        lambda: coherence([[1.0, 0.0], [0.0, 0.0]]),
        lambda: welch_bound(1, 3),
        lambda: EBVHead(torch.eye(3), temperature=0.0),
        lambda: EBVHead(torch.eye(3))(torch.ones(2, 4)),
    ],
)
def test_bases_refuse_what_makes_no_sense(call):
    with pytest.raises(ValueError, match="expected"):
        call()


# --- the spherical family ---------------------------------------------------------------------------------------------


def test_z_loss_matches_its_formula_and_torch_gradients(generator):
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.arange(6)
    z = ((logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True))[torch.arange(6), y]
    expected = (torch.log1p(torch.exp(2.0 * (1.5 - z))) / 2.0).mean()
    assert torch.allclose(ZLoss(2.0, 1.5)(logits, y), expected)
    assert torch.autograd.gradcheck(lambda o: ZLoss(2.0, 1.5)(o, y), logits)


def test_z_loss_ignores_shift_and_scale(generator):
    logits, y = torch.randn(5, 40, generator=generator), torch.tensor([0, 3, 9, 20, 39])
    loss = ZLoss(1.0, 3.0)
    assert torch.allclose(loss(1e-4 * logits + 1e-3, y), loss(logits, y), rtol=1e-4)
    assert torch.allclose(loss(1e6 * logits, y), loss(logits, y))
    assert torch.allclose(loss(logits + 1e3, y), loss(logits, y), rtol=1e-4)


def test_z_loss_of_constant_logits_is_finite_without_a_gradient():
    logits = torch.ones(2, 4, requires_grad=True)
    value = ZLoss(1.0, 2.0)(logits, torch.tensor([0, 1]))
    value.backward()
    assert torch.isclose(value, F.softplus(torch.tensor(2.0)))
    assert torch.equal(logits.grad, torch.zeros(2, 4))


def test_the_softmax_relatives_match_their_formulas(generator):
    o, y = torch.randn(4, 7, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 6])
    taylor, square = 1 + o + o**2 / 2, o**2 + 0.1
    for loss, p in ((TaylorSoftmaxLoss(), taylor), (SphericalSoftmaxLoss(0.1), square)):
        expected = F.nll_loss((p / p.sum(1, keepdim=True)).log(), y)
        assert torch.allclose(loss(o, y), expected)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_factored_layer_is_gradient_descent_on_the_dense_one(loss, generator):
    layer = FactoredOutputLayer(12, 60, loss, generator=generator)
    w = layer.weight.double().clone().requires_grad_()
    for step in range(60):
        h = torch.randn(8, 12, generator=generator)
        y = torch.randint(60, (8,), generator=generator)
        y[:3] = y[0]  # repeated targets meet in one row
        dense_h, h = h.double().clone().requires_grad_(), h.requires_grad_()
        dense = loss(dense_h @ w.T, y)
        dense.backward()
        value = layer(h, y)
        value.backward()
        assert value.item() == pytest.approx(dense.item(), rel=1e-5)
        assert torch.allclose(h.grad.double(), dense_h.grad, rtol=1e-4, atol=1e-6)
        layer.step(0.3)
        with torch.no_grad():
            w -= 0.3 * w.grad
        w.grad = None
        if step == 30:
            layer.rebase()
    assert torch.allclose(layer.weight.double(), w, atol=1e-5)
    assert torch.allclose(layer.logits(h).double(), h.double() @ w.T, atol=1e-4)


def test_factored_layer_does_the_same_work_for_any_number_of_classes():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for n_classes in (100, 10_000):
        layer = FactoredOutputLayer(16, n_classes)
        h, y = torch.randn(4, 16, requires_grad=True), torch.arange(4)
        with FlopCounterMode(display=False) as counter:
            layer(h, y).backward()
            layer.step(0.1)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_factored_layer_saves_and_takes_weights(device, generator):
    layer = FactoredOutputLayer(5, 9, generator=generator).to(device)
    h, y = torch.randn(3, 5, device=device), torch.tensor([1, 2, 3], device=device)
    layer(h, y).backward()
    layer.step(0.5)
    other = FactoredOutputLayer(5, 9).to(device)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(h, y), layer(h, y))
    third = FactoredOutputLayer(5, 9).to(device)
    third.set_weight(layer.weight)
    assert torch.allclose(third(h, y), layer(h, y), atol=1e-6)


def test_spherical_pieces_refuse_what_makes_no_sense():
    layer = FactoredOutputLayer(3, 4)
    with pytest.raises(RuntimeError, match="backward"):
        layer.step(0.1)
    for call in (
        lambda: layer(torch.ones(2, 4), torch.tensor([0, 1])),
        lambda: layer(torch.ones(2, 3), torch.tensor([0, 4])),
        lambda: layer.set_weight(torch.ones(3, 3)),
        lambda: ZLoss(a=0.0),
        lambda: SphericalSoftmaxLoss(0.0),
        lambda: spherical_stats(torch.ones(2, 3), [0, 3]),
        lambda: topk_error(torch.eye(3), [0, 1, 2], k=4),
        lambda: FactoredOutputLayer(3, 1),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_topk_error_counts():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(4, 1)
    assert [topk_error(logits, [0, 1, 2, 3], k).item() for k in (1, 2, 4)] == [0.75, 0.5, 0.0]


# --- subspaces --------------------------------------------------------------------------------------------------------


def test_grassmann_logits_are_projection_lengths_and_ignore_the_basis(generator):
    head, h = GrassmannHead(10, 4, k=3, generator=generator), torch.randn(5, 10, generator=generator)
    for c, s in enumerate(head.weight):
        projected = s @ torch.linalg.solve(s.T @ s, s.T) @ F.normalize(h).T
        assert torch.allclose(head(h)[:, c], 25 * projected.norm(dim=0), atol=1e-4)
    before = head(h)
    with torch.no_grad():
        head.weight.copy_(head.weight @ random_orthonormal(3, generator=generator))
    assert torch.allclose(head(h), before, atol=1e-4)
    assert bool((before <= 25).all())


@pytest.mark.parametrize("retraction", ["exp", "qr"])
def test_riemannian_sgd_keeps_the_columns_orthonormal(retraction, device):
    torch.manual_seed(0)
    head = GrassmannHead(32, 6, k=4).to(device)
    optimizer = RiemannianSGD(head.parameters(), lr=0.1, momentum=0.9, retraction=retraction)
    h, y = torch.randn(60, 32, device=device), torch.arange(60, device=device) % 6
    losses = []
    for _ in range(500):
        optimizer.zero_grad()
        loss = F.cross_entropy(head(h), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        gram = head.weight.detach().mT @ head.weight.detach()
        assert (gram - torch.eye(4, device=device)).abs().max() < 1e-6
    assert losses[-1] < losses[0] / 10
    buffer = optimizer.state[head.weight]["momentum_buffer"]
    assert (head.weight.mT @ buffer).abs().max() < 1e-5 * (1 + buffer.abs().max())


def test_one_step_is_the_projected_update():
    s = nn.Parameter(torch.linalg.qr(torch.randn(7, 2, dtype=torch.float64))[0])
    g = torch.randn(7, 2, dtype=torch.float64)
    start, tangent = s.detach().clone(), g - s.detach() @ (s.detach().T @ g)
    for retraction in ("exp", "qr"):
        with torch.no_grad():
            s.copy_(start)
        s.grad = g.clone()
        RiemannianSGD([s], lr=1e-4, retraction=retraction).step()
        # a retraction agrees with the straight step to first order
        assert (s.detach() - (start - 1e-4 * tangent)).abs().max() < 1e-6
        assert grassmann_distance(start, s.detach()).item() == pytest.approx(1e-4 * tangent.norm().item(), rel=1e-3)


def test_riemannian_sgd_finds_the_principal_subspace(generator):
    x = torch.randn(400, 8, generator=generator, dtype=torch.float64) * torch.linspace(3, 0.3, 8)
    covariance = x.T @ x / len(x)
    s = nn.Parameter(random_orthonormal(8, 3, generator=generator, dtype=torch.float64))
    optimizer = RiemannianSGD([s], lr=0.02, momentum=0.9)
    for _ in range(500):
        optimizer.zero_grad()
        (-(s.T @ covariance @ s).trace()).backward()
        optimizer.step()
    assert grassmann_distance(s.detach(), torch.linalg.eigh(covariance)[1][:, -3:]) < 1e-5


def test_euclidean_groups_are_torch_sgd(generator):
    a, b = (nn.Linear(4, 3) for _ in range(2))
    b.load_state_dict(a.state_dict())
    ours = RiemannianSGD(a.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, manifold="euclidean")
    theirs = torch.optim.SGD(b.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(10):
        x = torch.randn(5, 4, generator=generator)
        for model, optimizer in ((a, ours), (b, theirs)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert torch.allclose(a.weight, b.weight, atol=1e-7)
    assert torch.allclose(a.bias, b.bias, atol=1e-7)


def test_subspaces_and_backbone_train_together_and_the_optimizer_saves_its_state():
    head, body = GrassmannHead(6, 3, k=2), nn.Linear(4, 6)
    groups = [{"params": head.parameters()}, {"params": body.parameters(), "manifold": "euclidean", "lr": 0.5}]
    optimizer = RiemannianSGD(groups, lr=0.1, momentum=0.5)
    F.cross_entropy(head(body(torch.randn(9, 4))), torch.arange(9) % 3).backward()
    before = body.weight.detach().clone()
    optimizer.step()
    assert torch.allclose(body.weight, before - 0.5 * body.weight.grad)
    assert len(optimizer.state_dict()["state"]) == 3


def test_geodesics_have_the_length_of_their_direction(generator):
    s = random_orthonormal(9, 3, generator=generator, dtype=torch.float64)
    d = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    d = d - s @ (s.T @ d)
    d = 0.7 * d / torch.linalg.matrix_norm(d, 2)
    for t in (0.0, 0.5, 1.0):
        end = grassmann_exp(s, t * d)
        assert grassmann_distance(s, end).item() == pytest.approx(t * d.norm().item(), abs=1e-6)
    assert grassmann_distance(s, s @ random_orthonormal(3, generator=generator, dtype=torch.float64)) < 1e-6


def test_intra_class_variability_knows_its_limits(generator):
    y = torch.arange(3).repeat(50)
    rays = torch.eye(3)[y] * torch.rand(150, 1, generator=generator).add(0.1)
    assert intra_class_variability(rays, y).item() == pytest.approx(0.0, abs=1e-6)
    wide = torch.randn(150, 40, generator=generator)
    assert intra_class_variability(wide, y) > 0.95
    h, unit = wide + 2, F.normalize(wide + 2)
    direct = torch.stack([(unit[y == c] - unit[y == c].mean(0)).square().sum(1).mean() for c in range(3)]).mean()
    assert torch.isclose(intra_class_variability(h, y), direct, atol=1e-5)


def test_subspaces_refuse_what_makes_no_sense():
    plain = nn.Parameter(torch.randn(4, 2))
    good = nn.Parameter(torch.eye(4)[:, :2])
    for call in (
        lambda: GrassmannHead(4, 3, k=5),
        lambda: GrassmannHead(4, 3, k=2, gamma=0.0),
        lambda: GrassmannHead(4, 3, k=2)(torch.ones(2, 5)),
        lambda: RiemannianSGD([plain], lr=0.1),
        lambda: RiemannianSGD([nn.Parameter(torch.eye(2)[:1])], lr=0.1),
        lambda: RiemannianSGD([good], lr=-1.0),
        lambda: RiemannianSGD([good], lr=0.1, momentum=1.0),
        lambda: RiemannianSGD([good], lr=0.1, retraction="cayley"),
        lambda: RiemannianSGD([good], lr=0.1, manifold="sphere"),
        lambda: grassmann_exp(torch.eye(3), torch.eye(2)),
        lambda: grassmann_distance(torch.eye(3)[:, :1], torch.eye(3)[:, :2]),
        lambda: intra_class_variability(torch.zeros(2, 3), [0, 1]),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_a_seed_is_a_generator():
    for dim in (3, 8):  # an optimised basis, and an orthonormal one
        basis = equiangular_basis(6, dim, steps=5, generator=2)
        assert torch.equal(basis, equiangular_basis(6, dim, steps=5, generator=torch.Generator().manual_seed(2)))
    head = GrassmannHead(6, 3, 2, generator=2)
    assert torch.equal(head.weight, GrassmannHead(6, 3, 2, generator=torch.Generator().manual_seed(2)).weight)
    assert not torch.equal(head.weight[0], head.weight[1])
    layer = FactoredOutputLayer(4, 3, generator=2)
    assert torch.equal(layer.weight, FactoredOutputLayer(4, 3, generator=torch.Generator().manual_seed(2)).weight)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_basis_from_numpy_serves_features_of_any_precision(trainable):
    basis = simplex_etf(4, 3, dtype=torch.float64).numpy()
    head, features = EBVHead(basis, trainable=trainable), torch.randn(5, 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        logits = head(features.to(dtype))
        assert logits.dtype == dtype
        torch.testing.assert_close(
            logits.double(), head(features.double()), atol=1.0 if dtype == torch.bfloat16 else 1e-4, rtol=0
        )
