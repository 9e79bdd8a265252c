"""Long tails, label noise and splits: sizes, rates and shares against what was asked for."""

import pytest
import torch

from companion.data import long_tailed, noisy_labels, stratified_split, transition_matrix


def _gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_exponential_tail():
    labels = torch.arange(5).repeat_interleave(1000)
    kept = long_tailed(labels, ratio=16, n_max=800, generator=_gen())
    assert labels[kept].bincount().tolist() == [800, 400, 200, 100, 50]
    assert len(kept.unique()) == len(kept)
    assert not torch.equal(kept, kept.sort().values)


def test_step_tail_and_limits():
    labels = torch.arange(4).repeat_interleave(100)
    assert labels[long_tailed(labels, 10, "step")].bincount().tolist() == [100, 100, 10, 10]
    assert labels[long_tailed(labels, 1)].bincount().tolist() == [100] * 4
    assert labels[long_tailed(labels, 1e6)].bincount().min() == 1


def test_tail_takes_what_every_class_can_supply():
    labels = torch.tensor([0] * 100 + [1] * 10)
    assert labels[long_tailed(labels, 2)].bincount().tolist() == [20, 10]
    with pytest.raises(ValueError, match="there are"):
        long_tailed(labels, 2, n_max=50)
    with pytest.raises(ValueError, match="ratio"):
        long_tailed(labels, 0.5)
    with pytest.raises(ValueError, match="kind"):
        long_tailed(labels, 2, "linear")


@pytest.mark.parametrize("kind", ["uniform", "pair"])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_noise_follows_its_transition_matrix(kind, rate):
    labels = torch.arange(4).repeat(25_000)
    noisy, flipped = noisy_labels(labels, rate, kind, generator=_gen())
    assert torch.equal(flipped, noisy != labels)
    table = torch.zeros(4, 4, dtype=torch.float64)
    table.index_put_((labels, noisy), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    expected = transition_matrix(4, rate, kind)
    assert torch.allclose(table / 25_000, expected, atol=0.015)
    assert torch.equal(table > 0, expected > 0)
    assert torch.allclose(expected.sum(1), torch.ones(4, dtype=torch.float64))


def test_noise_leaves_its_input_alone_and_repeats():
    labels = torch.arange(3).repeat(50)
    before = labels.clone()
    first = noisy_labels(labels, 0.4, generator=_gen())[0]
    assert torch.equal(labels, before)
    assert torch.equal(first, noisy_labels(labels, 0.4, generator=_gen())[0])


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.6, 1.0])
def test_instance_noise_has_its_rate(rate):
    x = torch.randn(4000, 10, generator=_gen())
    labels = torch.arange(4).repeat(1000)
    flipped = noisy_labels(labels, rate, "instance", features=x, generator=_gen(5))[1]
    assert float(flipped.double().mean()) == pytest.approx(rate, abs=0.03)


def test_instance_noise_hits_the_same_inputs_again():
    # each input twice in a row: its two copies share their fate more often than chance
    x = torch.randn(5000, 10, generator=_gen()).repeat(2, 1)
    labels = torch.arange(4).repeat(1250).repeat(2)
    flipped = noisy_labels(labels, 0.3, "instance", features=x, generator=_gen(1))[1].double().view(2, -1)
    assert float(torch.corrcoef(flipped)[0, 1]) > 0.1
    uniform = noisy_labels(labels, 0.3, generator=_gen(1))[1].double().view(2, -1)
    assert abs(float(torch.corrcoef(uniform)[0, 1])) < 0.06


def test_noise_bad_input():
    with pytest.raises(ValueError, match="features"):
        noisy_labels([0, 1], 0.1, "instance")
    with pytest.raises(ValueError, match="one row"):
        noisy_labels([0, 1], 0.1, "instance", features=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="rate"):
        noisy_labels([0, 1], 1.5)
    with pytest.raises(ValueError, match="below"):
        noisy_labels([0, 1, 2], 0.5, n_classes=2)
    with pytest.raises(ValueError, match="n_classes"):
        noisy_labels([0, 0], 0.5)
    with pytest.raises(ValueError, match="kind"):
        noisy_labels([0, 1], 0.5, "odd")


def test_split_shares_sizes_and_disjointness():
    labels = torch.randint(7, (1001,), generator=_gen())
    parts = stratified_split(labels, (0.5, 0.3, 0.2), _gen())
    everything = torch.cat(parts)
    assert torch.equal(everything.sort().values, torch.arange(1001))
    counts = labels.bincount()
    for part, share in zip(parts, (0.5, 0.3, 0.2)):
        assert abs(len(part) - share * 1001) <= 1
        assert ((labels[part].bincount(minlength=7) - share * counts).abs() < 2).all()
    train, test = stratified_split(labels, (0.7, 0.3), _gen())
    assert ((labels[train].bincount(minlength=7) - 0.7 * counts).abs() < 1).all()
    assert len(test) == 300


def test_split_of_tiny_classes_and_partial_split():
    labels = torch.arange(10).repeat(2)
    train, test = stratified_split(labels, generator=_gen())
    assert labels[train].bincount().tolist() == [1] * 10
    assert labels[test].bincount().tolist() == [1] * 10
    (some,) = stratified_split(labels, (0.5,), _gen())
    assert len(some) == 10
    with pytest.raises(ValueError, match="fractions"):
        stratified_split(labels, (0.8, 0.4))
    with pytest.raises(ValueError, match="fractions"):
        stratified_split(labels, ())
