"""Federated heads, distillation, metric labels and linear attention, held to identities and brute force."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn

from companion.collapse import (
    FedLoGe,
    KDLoss,
    KernelAttention,
    LokiHead,
    NDLoss,
    NormAwareLinearAttention,
    ProjectedStudent,
    attention_entropy,
    coherence,
    dirichlet_partition,
    embedding_metric,
    entropy_vs_norm,
    fedavg,
    frechet_predict,
    grid_metric,
    linear_attention,
    linear_weights,
    locus,
    next_class,
    norm_aware_key,
    norm_aware_query,
    positive_feature,
    realign_norms,
    softmax_weights,
    sparse_etf,
    tree_metric,
)

# --- federated heads --------------------------------------------------------------------------------------------------


def test_sparse_etf_is_sparse_and_nearly_a_simplex(generator):
    v = sparse_etf(10, 32, sparsity=0.6, generator=generator)
    assert ((v == 0).sum(1) == 19).all()
    assert torch.allclose(v.norm(dim=1), torch.ones(10))
    assert coherence(v, signed=True) < 0.02  # the simplex has -1/9, orthogonal vectors 0
    dense = sparse_etf(10, 32, sparsity=0.0, generator=generator)
    assert coherence(dense, signed=True).item() == pytest.approx(-1 / 9, abs=1e-6)
    extreme = sparse_etf(4, 8, sparsity=0.99, generator=generator)
    assert ((extreme != 0).sum(1) == 1).all()


def test_partition_covers_everything_and_alpha_sets_the_skew():
    y = torch.arange(10).repeat(200)

    def skew(alpha):
        parts = dirichlet_partition(y, 8, alpha, 5, torch.Generator().manual_seed(0))
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(2000))
        assert min(map(len, parts)) >= 5
        counts = torch.stack([y[p].bincount(minlength=10).float() for p in parts])
        return (counts / counts.sum(1, keepdim=True)).std(0).mean()

    assert skew(0.1) > 2 * skew(10.0)


def test_fedavg_is_the_weighted_mean_and_keeps_whole_numbers():
    states = [
        {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)},
        {"w": torch.tensor([5.0, 6.0]), "n": torch.tensor(9)},
    ]
    mean = fedavg(states, [1, 3])
    assert mean["w"].tolist() == [4.0, 5.0]
    assert mean["n"] == 3


def test_fedavg_of_one_gradient_step_is_one_step_on_the_pooled_loss(generator):
    # the identity that makes averaging a training method: with one full-batch step it is gradient descent
    x, y = torch.randn(30, 4, generator=generator), torch.arange(30) % 3
    start = nn.Linear(4, 3).state_dict()

    def stepped(rows):
        model = nn.Linear(4, 3)
        model.load_state_dict(start)
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
        return model.state_dict()

    parts = [torch.arange(10), torch.arange(10, 30)]
    mean, pooled = fedavg([stepped(rows) for rows in parts], [10, 20]), stepped(torch.arange(30))
    assert all(torch.allclose(mean[name], pooled[name], atol=1e-6) for name in mean)


def test_realigning_undoes_itself_and_changes_the_odds(generator):
    w, u = torch.randn(5, 8, generator=generator), torch.randn(5, 3, generator=generator)
    assert torch.allclose(realign_norms(realign_norms(w, u), u, "local"), w, atol=1e-6)
    unit = realign_norms(w, w)
    assert torch.allclose(unit.norm(dim=1), torch.ones(5))


def small_clients():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 5, generator=g)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 1).long()
    return [(x[i::3], y[i::3]) for i in range(3)], x, y


def make_fed(**settings):
    return FedLoGe(
        lambda: nn.Sequential(nn.Linear(5, 6)), n_classes=3, dim=6, rounds=4, lr=0.1, random_state=0, **settings
    )


def test_fedloge_keeps_the_estimator_contract():
    clients, x, y = small_clients()
    kept = [(a.clone(), b.clone()) for a, b in clients]
    fed = make_fed()
    assert clone(fed).get_params() == fed.get_params()
    with pytest.raises(NotFittedError):
        fed.global_model()
    first = fed.fit(clients).weight_.clone(), fed.global_model()(x)
    again = fed.fit(clients)
    assert torch.equal(again.weight_, first[0])
    assert torch.equal(again.global_model()(x), first[1])
    assert all(torch.equal(a, b) for pair, old in zip(clients, kept) for a, b in zip(pair, old))
    assert (fed.global_model()(x).argmax(1) == y).float().mean() > 0.6


@pytest.mark.parametrize("head", ["sparse_etf", "etf", "random", "cosine"])
def test_only_the_learned_head_moves(head):
    clients, x, _ = small_clients()
    fed = make_fed(head=head)
    start = fed._fixed_head(None).shape
    fed.fit(clients)
    assert fed.weight_.shape == start == (3, 6)
    assert torch.allclose(fed.weight_.norm(dim=1), torch.ones(3))
    assert fed.local_.shape == (3, 3, 6)
    assert not torch.allclose(fed.local_[0], fed.local_[1])
    if head == "etf":
        assert coherence(fed.weight_, signed=True).item() == pytest.approx(-0.5, abs=1e-5)
    model = fed.global_model()
    assert torch.allclose(model.weight * fed.auxiliary_.norm(dim=1, keepdim=True), fed.weight_, atol=1e-6)
    own = fed.local_model(1, realigned=False)
    assert torch.allclose(own(x), fed.backbone_(x) @ fed.local_[1].T, atol=1e-5)


def test_auxiliary_heads_do_not_reach_the_backbone(monkeypatch):
    clients, x, _ = small_clients()
    with_heads = make_fed().fit(clients).backbone_(x)
    true = F.cross_entropy

    def only_the_fixed_head(z, y):  # its logits are a quotient, those of the linear heads a product
        return true(z, y) if type(z.grad_fn).__name__ == "DivBackward0" else 0 * true(z, y)

    monkeypatch.setattr(F, "cross_entropy", only_the_fixed_head)
    assert torch.allclose(make_fed().fit(clients).backbone_(x), with_heads)


def test_federated_pieces_refuse_what_makes_no_sense():
    clients, _, _ = small_clients()
    for call in (
        lambda: sparse_etf(10, 5),
        lambda: sparse_etf(4, 8, sparsity=1.0),
        lambda: dirichlet_partition([0, 1], 3),
        lambda: dirichlet_partition([0, 1] * 10, 2, alpha=0.0),
        lambda: fedavg([], []),
        lambda: fedavg([{"a": torch.ones(1)}, {"b": torch.ones(1)}], [1, 1]),
        lambda: fedavg([{"a": torch.ones(1)}], [0]),
        lambda: realign_norms(torch.eye(2), torch.eye(3)),
        lambda: realign_norms(torch.eye(2), torch.zeros(2, 2)),
        lambda: realign_norms(torch.eye(2), torch.eye(2), "both"),
        lambda: make_fed(head="softmax").fit(clients),
        lambda: make_fed().fit([]),
        lambda: make_fed().fit(clients).local_model(3),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


# --- distillation -----------------------------------------------------------------------------------------------------


def test_nd_loss_has_two_regimes(device):
    torch.manual_seed(0)
    means = torch.randn(3, 10, dtype=torch.float64, device=device)
    loss, y = NDLoss(means).to(device), torch.tensor([0, 1, 2, 0], device=device)
    s = torch.randn(4, 10, dtype=torch.float64, device=device)
    e = F.normalize(means)[y]
    for length, parallel in ((10.0, True), (0.01, False)):
        t = length * F.normalize(torch.randn(4, 10, dtype=torch.float64, device=device))
        leaf = s.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(leaf, t, y), leaf)
        if parallel:  # the student is shorter: a pure pull along the class mean
            assert torch.allclose(g, -e / (4 * length), atol=1e-12)
        else:  # the student is longer: a pure rotation
            assert (g * s).sum(1).abs().max() < 1e-12
            assert g.norm() > 0.01


def test_nd_loss_is_bounded_and_zero_only_at_the_goal(generator):
    loss, y = NDLoss(torch.eye(3)), torch.tensor([0, 1, 2])
    t = torch.randn(3, 3, generator=generator)
    assert loss(t.norm(dim=1)[:, None] * torch.eye(3), t, y).abs() < 1e-6
    assert loss(-9 * torch.eye(3), t, y).item() == pytest.approx(2.0)
    assert torch.isfinite(loss(torch.zeros(3, 3), torch.zeros(3, 3), y))


def test_kd_loss_matches_torch_and_its_gradient_keeps_its_size(generator):
    s, t = (torch.randn(6, 5, generator=generator) for _ in range(2))
    expected = 9 * F.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction="batchmean")
    assert torch.allclose(KDLoss(3.0)(s, t), expected, atol=1e-6)
    leaf = s.clone().requires_grad_()
    (g,) = torch.autograd.grad(KDLoss(1e3)(leaf, t), leaf)  # the limit: centred logits are matched by least squares
    centred = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    assert torch.allclose(g, centred / (5 * 6), atol=1e-3)


def test_distillation_refuses_what_makes_no_sense():
    for call in (
        lambda: NDLoss(torch.zeros(2, 3)),
        lambda: NDLoss([[float("nan"), 1.0]]),
        lambda: NDLoss(torch.eye(3))(torch.ones(2, 4), torch.ones(2, 3), torch.tensor([0, 1])),
        lambda: KDLoss(0.0),
        lambda: ProjectedStudent(3, 0, 2, 2),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


# --- labels in a metric space -----------------------------------------------------------------------------------------


def test_frechet_mean_is_brute_force_in_any_chunk(monkeypatch, generator):
    p, d = torch.rand(30, 6, generator=generator).softmax(1), torch.rand(6, 40, generator=generator)
    expected = (p[:, :, None] * d[None] ** 2).sum(1).argmin(1)
    assert torch.equal(frechet_predict(p, d), expected)
    monkeypatch.setattr("companion.collapse.fixed_classifiers.metric_labels.CHUNK", 80)
    assert torch.equal(frechet_predict(p, d), expected)


def test_frechet_mean_knows_its_special_cases(generator):
    p = torch.rand(50, 7, generator=generator).softmax(1)
    assert torch.equal(frechet_predict(p, 1 - torch.eye(7)), p.argmax(1))
    positions = torch.arange(21.0)
    line = (positions[::20, None] - positions).abs()  # both ends of a line: the mean is where the weight says
    two = torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.04, 0.96]])
    assert frechet_predict(two, line).tolist() == [4, 10, 19]
    assert frechet_predict(two[[0, 2]], line, power=1.0).tolist() == [0, 20]  # the median stays at an end


def test_loki_head_agrees_with_the_prediction_rule_on_any_device(device, generator):
    logits = torch.randn(20, 4, generator=generator).to(device)
    d = torch.rand(4, 9, generator=generator).to(device)
    head = LokiHead(nn.Identity(), d, temperature=2.0).to(device)
    assert torch.equal(head(logits).argmax(1), frechet_predict((logits / 2).softmax(1), d))


def test_locus_of_leaves_is_their_steiner_tree():
    #        0
    #    1       2
    #  3   4   5   6
    # 7
    parents = [-1, 0, 0, 1, 1, 2, 2, 3]
    d = tree_metric(parents)
    for observed in itertools.combinations(range(8), 3):
        between = {y for a, b in itertools.combinations(observed, 2) for y in range(8) if d[a, y] + d[y, b] == d[a, b]}
        assert set(locus(d, list(observed)).nonzero().flatten().tolist()) == between


def test_tree_metric_counts_edges_with_their_lengths(generator):
    parents, lengths = [-1, 0, 1, 1, 0], [0.0, 1.0, 2.0, 4.0, 8.0]
    d = tree_metric(parents, lengths)
    assert d[2].tolist() == [3.0, 2.0, 0.0, 6.0, 11.0]
    assert torch.equal(d, d.T)


def test_locus_of_corners_is_the_whole_grid_and_of_one_label_itself():
    d = grid_metric(5, 5)
    assert locus(d, [0, 4, 20, 24]).all()
    assert locus(d, [7]).nonzero().flatten().tolist() == [7]
    # every point inside is the mean of some weights, so predictions with random weights never leave the locus
    observed = [0, 4, 11]
    w = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) ** 3
    seen = frechet_predict(w / w.sum(1, keepdim=True), d[observed]).unique()
    inside = locus(d, observed)
    assert inside[seen].all()
    assert not inside[24]


def test_next_class_adds_the_most_labels_in_a_tree():
    d = tree_metric([-1, 0, 0, 1, 1, 2, 2, 3])
    observed = [4, 5]
    sizes = [int(locus(d, [*observed, y]).sum()) if y not in observed else 0 for y in range(8)]
    assert sizes[next_class(d, observed)] == max(sizes)
    grid = grid_metric(6, 6)
    chosen = [0]
    for _ in range(3):
        chosen.append(next_class(grid, chosen))
    assert sorted(chosen) == [0, 5, 30, 35]


def test_embedding_metrics_are_metrics(generator):
    e = torch.randn(12, 5, generator=generator)
    for kind in ("euclidean", "cosine"):
        d = embedding_metric(e, kind)
        assert bool((d[:, :, None] + d[None] >= d[:, None] - 1e-5).all())
        assert not d.diagonal().any()
    assert torch.allclose(embedding_metric(e, "cosine"), embedding_metric(3 * e, "cosine"), atol=1e-6)


def test_metric_labels_refuse_what_makes_no_sense():
    d = grid_metric(2, 2)
    for call in (
        lambda: frechet_predict([[2.0, 3.0]], d[:2]),
        lambda: frechet_predict([[0.5, 0.5]], d),
        lambda: frechet_predict([[0.5, 0.5]], -d[:2]),
        lambda: frechet_predict([[0.5, 0.5]], d[:2], power=0.0),
        lambda: LokiHead(nn.Identity(), d, temperature=0.0),
        lambda: LokiHead(nn.Identity(), d)(torch.ones(1, 3)),
        lambda: locus(d[:2], [0]),
        lambda: locus(d, [0, 0]),
        lambda: locus(d, [4]),
        lambda: next_class(d, [0, 1, 2, 3]),
        lambda: tree_metric([-1, -1]),
        lambda: tree_metric([-1, 2, 1]),
        lambda: tree_metric([-1, 0], [1.0, 0.0]),
        lambda: grid_metric(),
        lambda: embedding_metric([[0.0]], "cosine"),
        lambda: embedding_metric([[1.0]], "hamming"),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


# --- attention --------------------------------------------------------------------------------------------------------


def norm_aware_weights(q, k):
    return linear_weights(q, k, norm_aware_query, norm_aware_key)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("maps", [(positive_feature, positive_feature), (norm_aware_query, norm_aware_key)])
def test_linear_attention_is_its_dense_matrix_times_the_values(maps, causal, device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 17, 6, dtype=torch.float64, device=device) for _ in range(3))
    query, key = maps[0](q), maps[1](k)
    scores = query @ key.mT
    if causal:
        scores = scores.tril()
    meets = scores.sum(-1) > 1e-3  # ReLU features of a query can be orthogonal to those of every key
    assert meets.float().mean() > 0.8
    expected = scores / scores.sum(-1, keepdim=True) @ v
    assert torch.allclose(linear_attention(query, key, v, causal)[meets], expected[meets], atol=1e-8)
    if not causal:
        assert torch.allclose((linear_weights(q, k, *maps) @ v)[meets], expected[meets], atol=1e-8)


def test_length_cancels_in_plain_linear_attention_and_not_in_the_others(generator):
    q, k = torch.randn(32, 16, generator=generator), torch.randn(64, 16, generator=generator)
    lengths = [0.5, 4.0, 16.0]
    flat = entropy_vs_norm(linear_weights, q, k, lengths)
    assert (flat - flat[0]).abs().max() < 1e-5
    softmax = entropy_vs_norm(softmax_weights, q, k, lengths)
    assert softmax[0] > 4.0
    assert softmax[2] < 0.5 * softmax[0]
    aware = entropy_vs_norm(
        lambda q, k: linear_weights(q, k, lambda q: norm_aware_query(q, reach=8.0), norm_aware_key), q, k, lengths
    )
    assert aware[0] > aware[1] > aware[2]


def test_opposite_directions_do_not_meet(generator):
    x = torch.randn(5, 8, generator=generator)
    assert (norm_aware_query(x) * norm_aware_key(-x)).sum(-1).abs().max() == 0
    assert ((norm_aware_query(x) * norm_aware_key(x)).sum(-1) > 0).all()


def test_weights_have_at_most_the_rank_of_the_features(generator):
    q, k = (
        torch.randn(40, 4, generator=generator, dtype=torch.float64),
        torch.randn(40, 4, generator=generator, dtype=torch.float64),
    )
    assert torch.linalg.matrix_rank(linear_weights(q, k), rtol=1e-8) <= 5  # one more for the floor
    assert torch.linalg.matrix_rank(norm_aware_weights(q, k), rtol=1e-8) <= 9


def test_queries_of_length_zero_are_harmless():
    q = torch.zeros(2, 4, requires_grad=True)
    k = torch.randn(3, 4)
    out = linear_attention(norm_aware_query(q), norm_aware_key(k), torch.eye(3))
    out.sum().backward()
    assert torch.allclose(out, torch.full((2, 3), 1 / 3), atol=1e-5)
    assert torch.isfinite(q.grad).all()


def test_entropy_has_its_limits():
    assert attention_entropy(torch.full((3, 8), 1 / 8)).tolist() == pytest.approx([torch.tensor(8.0).log().item()] * 3)
    assert attention_entropy(torch.eye(4)).abs().max() == 0


@pytest.mark.parametrize("kernel", ["softmax", "relu", "norm_aware"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_modules_are_alike_but_for_the_kernel(kernel, causal, device):
    torch.manual_seed(0)
    attention = KernelAttention(12, heads=3, kernel=kernel, causal=causal).to(device)
    x = torch.randn(2, 7, 12, device=device)
    out = attention(x)
    assert out.shape == x.shape
    changed = x.clone()
    changed[:, -1] += 1
    moved = (attention(changed) - out)[:, :-1].abs().max()
    assert (moved < 1e-5) == causal
    if not causal:
        v = attention.v(x).unflatten(-1, (3, 4)).transpose(1, 2)
        expected = attention.out((attention.weights(x) @ v).transpose(1, 2).flatten(2))
        assert torch.allclose(out, expected, atol=1e-5)


def test_softmax_kernel_is_torch_attention():
    torch.manual_seed(0)
    attention, x = KernelAttention(8, heads=2, kernel="softmax"), torch.randn(3, 5, 8)
    q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (attention.q, attention.k, attention.v))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.allclose(attention(x), attention.out(expected), atol=1e-6)


def test_norm_aware_attention_grows_linearly():
    from torch.utils.flop_counter import FlopCounterMode

    attention, counts = NormAwareLinearAttention(16, heads=2), []
    for n in (64, 128, 256):
        with FlopCounterMode(display=False) as counter:
            attention(torch.randn(1, n, 16))
        counts.append(counter.get_total_flops())
    assert counts[2] == pytest.approx(4 * counts[0], rel=0.05)


def test_attention_refuses_what_makes_no_sense():
    for call in (
        lambda: KernelAttention(8, heads=3),
        lambda: KernelAttention(8, kernel="gauss"),
        lambda: NormAwareLinearAttention(8, reach=0.0),
        lambda: NormAwareLinearAttention(8, power=0.5),
        lambda: attention_entropy(torch.ones(2, 2)),
        lambda: entropy_vs_norm(softmax_weights, torch.eye(2), torch.eye(2), [0.0]),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [7, 300, 3000])
def test_entropy_of_attention_in_half_precision(n, dtype):
    weights = torch.zeros(2, n, dtype=dtype).softmax(-1)
    assert attention_entropy(weights).float().sub(torch.tensor(n).log()).abs().max() < 0.05
    with pytest.raises(ValueError, match="sum to one"):
        attention_entropy(weights * 1.1)


def test_metrics_of_embeddings_in_half_precision():
    embeddings = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    metric = embedding_metric(embeddings)
    assert metric.dtype == torch.bfloat16
    assert torch.equal(metric, embedding_metric(embeddings.float()).bfloat16())


def test_a_locus_of_distances_that_are_trained():
    path = (torch.arange(5.0)[:, None] - torch.arange(5.0)).abs().requires_grad_()
    assert locus(path, [1, 3]).tolist() == [False, True, True, True, False]
    assert next_class(path, [0, 1]) == 4


def test_a_sparse_frame_where_no_gradients_are_recorded():
    usual = sparse_etf(4, 8, steps=5, generator=0)
    with torch.no_grad():
        assert torch.equal(sparse_etf(4, 8, steps=5, generator=torch.Generator().manual_seed(0)), usual)


def test_means_from_numpy_leave_the_loss_in_the_precision_of_the_student():
    loss, labels = NDLoss(torch.eye(3, dtype=torch.float64).numpy()), torch.tensor([0, 1])
    student, teacher = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(loss(student, teacher, labels), NDLoss(torch.eye(3))(student, teacher, labels))
    assert loss(torch.zeros(2, 3), torch.zeros(2, 3), labels) == 1
