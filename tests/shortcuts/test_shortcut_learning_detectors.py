"""Shortcut learning: bags of instances and spectra against identities, limits and bad input."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from companion.shortcuts.shortcut_learning import (
    MHIM,
    GatedAttentionMIL,
    SpectrumDetector,
    Upsampler,
    make_bags,
    make_random_fields,
    mask_instances,
    match_spectrum,
    radial_power_spectrum,
    spectral_decay_fit,
)

# --- bags -------------------------------------------------------------------------------------------------------------


def test_bags_hold_what_was_asked(generator):
    bags = make_bags(40, size=30, easy=2, hard=3, noise=0.0, generator=generator)
    assert bags.y.sum() == 20
    assert ((bags.kind == 2).sum(1) == 2 * bags.y).all()
    assert ((bags.kind == 1).sum(1) == 3 * bags.y).all()
    torch.testing.assert_close(bags.x[..., 0], 4.0 * (bags.kind == 2))
    torch.testing.assert_close(bags.x[..., 1], 2.0 * (bags.kind == 1))
    assert bags.x[..., 2:].abs().max() == 0


def test_attention_is_a_distribution_and_ignores_order_and_padding(device, generator):
    model = GatedAttentionMIL(8, seed=0).to(device)
    bags = torch.randn(3, 10, 8, generator=generator).to(device)
    attention = model.attention(bags)
    torch.testing.assert_close(attention.sum(1), torch.ones(3, device=device))
    order = torch.randperm(10, generator=generator).to(device)
    torch.testing.assert_close(model(bags[:, order]), model(bags))
    padded = torch.cat([bags, 100 * torch.ones(3, 5, 8, device=device)], 1)
    mask = torch.arange(15, device=device).expand(3, -1) < 10
    torch.testing.assert_close(model(padded, mask), model(bags))
    assert (model.attention(padded, mask)[:, 10:] == 0).all()


def test_attention_is_the_formula_of_the_gate(generator):
    model, bag = GatedAttentionMIL(4, hidden=6, seed=0), torch.randn(1, 5, 4, generator=generator)
    h = (bag[0] @ model.embed[0].weight.T + model.embed[0].bias).relu()
    gate = torch.tanh(h @ model.value.weight.T + model.value.bias)
    gate = gate / (1 + torch.exp(-(h @ model.gate.weight.T + model.gate.bias)))
    score = (gate @ model.score.weight.T)[:, 0]
    expected = score.exp() / score.exp().sum()
    torch.testing.assert_close(model.attention(bag)[0], expected)
    torch.testing.assert_close(model(bag)[0], (expected @ h) @ model.head.weight.T + model.head.bias)


def test_a_bag_of_one_is_its_instance(generator):
    model, bag = GatedAttentionMIL(4, seed=0), torch.randn(2, 1, 4, generator=generator)
    torch.testing.assert_close(model(bag), model.head(model.embed(bag[:, 0])))


def test_masking_hides_the_most_attended_and_leaves_something():
    attention = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    assert mask_instances(attention, 0.25).tolist() == [[False, True, True, True]]
    assert mask_instances(attention, 0.3).tolist() == [[False, False, True, True]]  # rounded up
    assert mask_instances(attention, 0.25, "low-high", low_ratio=0.25).tolist() == [[False, True, True, False]]
    assert mask_instances(attention, 0.99).tolist() == [[False, False, False, True]]
    assert mask_instances(attention, 0.0).all()
    assert mask_instances(attention, 0.5, rate=0.0).all()


def test_masking_counts_real_instances_only():
    attention = torch.tensor([[0.6, 0.4, 0.0, 0.0]])
    real = torch.tensor([[True, True, False, False]])
    assert mask_instances(attention, 0.5, mask=real).tolist() == [[False, True, False, False]]


def test_random_masking_hides_as_many_wherever_attention_lies(generator):
    attention = torch.softmax(torch.randn(400, 20, generator=generator), 1)
    visible = mask_instances(attention, 0.2, "random", generator=generator)
    assert ((~visible).sum(1) == 4).all()
    first = attention.argmax(1, keepdim=True)
    assert abs((~visible).gather(1, first).double().mean().item() - 0.2) < 0.06


def test_rate_is_the_share_of_candidates_that_are_hidden(generator):
    attention = torch.softmax(torch.randn(2000, 20, generator=generator), 1)
    hidden = ~mask_instances(attention, 0.2, rate=0.7, generator=generator)
    assert abs(hidden.sum().item() / (2000 * 4) - 0.7) < 0.02


def test_teacher_is_the_exponential_average_of_the_student():
    mhim = MHIM(GatedAttentionMIL(4, seed=0), momentum=0.9)
    start = mhim.student.head.weight.detach().clone()
    expected = start.clone()
    for step in range(5):
        with torch.no_grad():
            mhim.student.head.weight.copy_(start + step)
        mhim.update()
        expected = 0.9 * expected + 0.1 * (start + step)
    torch.testing.assert_close(mhim.teacher.head.weight, expected)
    assert mhim.updates == 5


def test_mhim_without_masking_and_consistency_is_plain_training(generator):
    bags = make_bags(8, size=12, generator=generator)
    model = GatedAttentionMIL(16, seed=0)
    plain = F.cross_entropy(model(bags.x), bags.y)
    assert torch.equal(MHIM(model, mask_ratio=0.0, consistency=0.0).loss(bags.x, bags.y), plain)
    warm = MHIM(model, mask_ratio=0.5, consistency=0.0, warm_up=3)
    assert torch.equal(warm.loss(bags.x, bags.y), plain)
    for _ in range(3):
        warm.update()
    assert not torch.equal(warm.loss(bags.x, bags.y, generator=generator), plain)


def test_consistency_adds_the_cross_entropy_of_embeddings(generator):
    bags, model = make_bags(8, size=12, generator=generator), GatedAttentionMIL(16, seed=0)
    without = MHIM(model, mask_ratio=0.0, consistency=0.0).loss(bags.x, bags.y)
    with_it = MHIM(model, mask_ratio=0.0, consistency=0.3, temperature=1.0).loss(bags.x, bags.y)
    embedding, _ = model.pool(bags.x)
    entropy = torch.distributions.Categorical(logits=embedding).entropy().mean()  # teacher and student still agree
    torch.testing.assert_close(with_it - without, 0.3 * entropy)


def test_only_the_student_learns(generator):
    mhim, bags = MHIM(GatedAttentionMIL(16, seed=0)), make_bags(8, generator=generator)
    mhim.loss(bags.x, bags.y, generator=generator).backward()
    assert all(p.grad is None for p in mhim.teacher.parameters())
    assert all(p.grad is not None for p in mhim.student.parameters())
    again = MHIM(GatedAttentionMIL(16, seed=1))
    again.load_state_dict(mhim.state_dict())
    torch.testing.assert_close(again(bags.x), mhim(bags.x))


def test_bags_refuse_bad_input(generator):
    with pytest.raises(ValueError, match="at most size"):
        make_bags(4, size=3, easy=2, hard=2)
    with pytest.raises(ValueError, match="bags"):
        GatedAttentionMIL(4)(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="leaves an instance"):
        GatedAttentionMIL(4)(torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="strategy"):
        mask_instances([[0.5, 0.5]], 0.5, "top")
    with pytest.raises(ValueError, match="strategy"):
        MHIM(GatedAttentionMIL(4), strategy="top")
    with pytest.raises(ValueError, match="ratio"):
        mask_instances([[0.5, 0.5]], 1.0)
    with pytest.raises(ValueError, match="attention"):
        mask_instances([0.5, 0.5], 0.5)


# --- spectra ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("periods", [1, 3, 7])
@pytest.mark.parametrize("across", [False, True])
def test_a_wave_has_its_power_in_its_ring(periods, across, device):
    wave = torch.cos(2 * math.pi * periods * torch.arange(16, device=device) / 16).expand(1, 1, 16, 16)
    power = radial_power_spectrum(wave.transpose(2, 3) if across else wave, window="none", log=False)[0]
    assert power.argmax().item() + 1 == periods
    assert power[periods - 1] > 1e6 * power.sum().sub(power[periods - 1]).abs()


def test_rings_keep_all_power_of_a_picture_but_its_mean(generator):
    """Parseval: what lies in the rings, corners included, is the variance."""
    x = torch.randn(3, 1, 12, 12, generator=generator, dtype=torch.float64) + 5
    mean = radial_power_spectrum(x, window="none", corners=True, log=False)
    u = np.fft.fftfreq(12) * 12
    count = np.bincount(np.rint(np.hypot(u[:, None], u)).astype(int).ravel())[1:]
    total = mean @ torch.from_numpy(count).double()
    expected = (x - x.mean((2, 3), keepdim=True)).square().sum((1, 2, 3))
    torch.testing.assert_close(total, expected)


def test_spectra_agree_with_a_loop_over_frequencies(generator):
    x = torch.randn(2, 3, 10, 14, generator=generator, dtype=torch.float64)
    window = torch.outer(torch.from_numpy(np.hanning(10)), torch.from_numpy(np.hanning(14))).numpy()
    rings = [[] for _ in range(20)]
    centred = (x - x.mean((2, 3), keepdim=True)).numpy() * window
    power = (np.abs(np.fft.fft2(centred)) ** 2).mean(1) / 140
    for i, u in enumerate(np.fft.fftfreq(10) * 10):
        for j, v in enumerate(np.fft.fftfreq(14) * 10):
            rings[round(math.hypot(u, v))].append(power[:, i, j])
    expected = np.stack([np.mean(rings[r], axis=0) for r in range(1, 6)], axis=1)
    torch.testing.assert_close(radial_power_spectrum(x, log=False), torch.from_numpy(expected))


def test_spectra_ignore_brightness_and_follow_contrast(generator):
    x = torch.rand(4, 3, 16, 16, generator=generator)
    s = radial_power_spectrum(x)
    torch.testing.assert_close(radial_power_spectrum(x + 3), s, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(radial_power_spectrum(2 * x), s + 2 * math.log(2))
    torch.testing.assert_close(radial_power_spectrum(x.transpose(2, 3)), s)
    torch.testing.assert_close(radial_power_spectrum(x[:, 0]), radial_power_spectrum(x[:, :1]))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_fields_fall_off_as_asked(exponent, generator):
    fields = make_random_fields(300, 64, exponent, generator=generator)
    torch.testing.assert_close(fields.std((2, 3)), torch.ones(300, 1))
    spectrum = radial_power_spectrum(fields, window="none", log=False).mean(0, keepdim=True).log()
    assert spectral_decay_fit(spectrum, 2).slope.item() == pytest.approx(-2 * exponent, abs=0.1)


def test_decay_fit_is_least_squares(generator):
    s = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    slope, intercept = spectral_decay_fit(s, 3, 9)
    for row, a, b in zip(s.numpy(), slope, intercept):
        expected = np.polyfit(np.log(np.arange(3, 10)), row[2:9], 1)
        np.testing.assert_allclose([a, b], expected)


@pytest.mark.parametrize("kind", ["zero", "nearest", "bilinear"])
def test_upsampling_with_its_own_kernel_is_interpolation(kind, generator):
    coarse = torch.randn(2, 1, 6, 6, generator=generator)
    up = Upsampler(kind, in_channels=1, kernel_size=3)
    with torch.no_grad():
        up.kernel.zero_()[0, 0, 1, 1] = 1
    made = up(coarse)
    if kind == "zero":
        assert torch.equal(made[..., ::2, ::2], coarse[:, :1])
        assert made[..., 1::2, :].abs().max() == 0
    else:
        torch.testing.assert_close(made, F.interpolate(coarse, scale_factor=2, mode=kind))


def test_zero_insertion_repeats_the_coarse_spectrum(generator):
    """Why the high frequencies flip up: after inserting zeros the spectrum is periodic, with period half the side."""
    up = Upsampler("zero", in_channels=1, kernel_size=1)
    with torch.no_grad():
        up.kernel.fill_(1)
    coarse = torch.randn(1, 1, 8, 8, generator=generator)
    fine = torch.fft.fft2(up(coarse))[0, 0]
    torch.testing.assert_close(fine, torch.fft.fft2(coarse)[0, 0].repeat(2, 2))


def test_zero_insertion_is_a_transposed_convolution(generator):
    up, coarse = Upsampler("zero", in_channels=2, kernel_size=4, seed=0), torch.randn(2, 2, 8, 8, generator=generator)
    expected = F.conv_transpose2d(coarse, up.kernel.flip(2, 3).transpose(0, 1), stride=2, padding=2, output_padding=1)
    torch.testing.assert_close(up(coarse)[..., 3:-3, 3:-3], expected[..., 3:15, 3:15][..., :10, :10])


def test_matching_a_spectrum_the_layer_can_make_succeeds(generator):
    coarse = torch.randn(32, 1, 8, 8, generator=generator)
    truth, start = Upsampler("zero", 1, 3, seed=1), Upsampler("zero", 1, 3, seed=2)
    with torch.no_grad():
        target = radial_power_spectrum(truth(coarse), log=False).mean(0)
    losses = match_spectrum(start, coarse, target, steps=100)
    assert losses[-1] < 0.05 * losses[0]


def test_matching_coarse_rings_only_leaves_the_tail_alone(generator):
    real, other = (make_random_fields(64, 32, generator=generator) for _ in range(2))
    coarse = F.avg_pool2d(other, 2)
    target = radial_power_spectrum(real, log=False).mean(0)
    layer = Upsampler("zero", 1, 5, seed=0)
    losses = match_spectrum(layer, coarse, target, last=6)
    with torch.no_grad():
        off = (radial_power_spectrum(layer(coarse), log=False).mean(0).log() - target.log()).abs()
    assert losses[-1] < 0.05
    assert off[:6].max() < 0.5 < off[10:].max()


def test_detector_keeps_the_contract(generator):
    real = make_random_fields(60, 16, 1.5, generator=generator)
    fake = make_random_fields(60, 16, 0.7, generator=generator)
    images, labels = torch.cat([real, fake]), [0] * 60 + [1] * 60
    before = images.clone()
    detector = SpectrumDetector(C=0.5)
    with pytest.raises(NotFittedError):
        detector.predict(images)
    assert detector.fit(images, labels) is detector
    assert torch.equal(images, before)
    assert clone(detector).get_params() == {"C": 0.5, "window": "hann"}
    assert detector.predict_proba(images).shape == (120, 2)
    np.testing.assert_allclose(detector.predict_proba(images).sum(1), 1)
    np.testing.assert_array_equal(detector.predict(images), (detector.predict_proba(images)[:, 1] > 0.5).astype(int))
    assert detector.score(images, labels) > 0.95
    np.testing.assert_allclose(
        detector.decision_function(images.numpy()), detector.decision_function(images), rtol=1e-6
    )
    again = detector.fit(images.flip(0), labels)  # refit forgets
    assert again.score(images, labels) < 0.05


def test_detector_is_blind_to_everything_with_the_same_spectrum(generator):
    """Random phases keep the power: the picture is gone, the score is the same."""
    x = make_random_fields(40, 16, 1.5, generator=generator)
    y = make_random_fields(40, 16, 0.7, generator=generator)
    detector = SpectrumDetector(window="none").fit(torch.cat([x, y]), [0] * 40 + [1] * 40)
    phase = torch.fft.fft2(torch.randn(x.shape, generator=generator))
    scrambled = torch.fft.ifft2(torch.fft.fft2(x).abs() * phase / phase.abs()).real
    assert (scrambled - x).abs().mean() > 0.3
    np.testing.assert_allclose(detector.decision_function(scrambled), detector.decision_function(x), atol=1e-3)


def test_spectra_refuse_bad_input(generator):
    with pytest.raises(ValueError, match="images"):
        radial_power_spectrum(torch.zeros(5, 5))
    with pytest.raises(ValueError, match="NaN"):
        radial_power_spectrum(torch.full((1, 8, 8), float("nan")))
    with pytest.raises(ValueError, match="window"):
        radial_power_spectrum(torch.zeros(1, 8, 8), window="box")
    with pytest.raises(ValueError, match="first < last"):
        spectral_decay_fit(torch.zeros(1, 5), 5)
    with pytest.raises(ValueError, match="only 0"):
        SpectrumDetector().fit(torch.zeros(3, 8, 8), [0, 0, 0])
    detector = SpectrumDetector().fit(make_random_fields(8, 16, generator=generator), [0, 1] * 4)
    with pytest.raises(ValueError, match="as in fit"):
        detector.predict(torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="kind"):
        Upsampler("cubic")
    with pytest.raises(ValueError, match="rings"):
        match_spectrum(Upsampler("zero", 1, seed=0), torch.zeros(1, 1, 8, 8), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_spectra_of_half_precision_are_computed_in_float32(dtype):
    images = make_random_fields(3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    spectra = radial_power_spectrum(images)
    assert spectra.dtype == dtype
    assert torch.equal(spectra, radial_power_spectrum(images.float()).to(dtype))
