import copy
import io
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from companion.nets import MLP, SmallCNN, SmallResNet
from companion.training import ManyModels, fit, fit_many, per_model

SEEDS = [3, 1, 4]


def blobs(n=50, d=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return (torch.randn(n, d, generator=g, dtype=dtype) + 2 * F.one_hot(y, d)), y


def make64(seed, dims=(3, 8, 8, 3)):
    return MLP(dims, activation="tanh", seed=seed).double()


def order(seed):
    return torch.Generator().manual_seed(seed)


def assert_same(many, models, tolerance=1e-6):
    for stacked, single in zip(many.models(), models, strict=True):
        for (name, p), (_, q) in zip(stacked.named_parameters(), single.named_parameters(), strict=True):
            assert torch.allclose(p, q, atol=tolerance, rtol=0), name


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam"},
        {"optimizer": "adam", "weight_decay": 0.1},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "sgd", "lr": 0.1},
        {"optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "weight_decay": 0.01},
        {"optimizer": "adam", "schedule": "cosine"},
        {"optimizer": "sgd", "schedule": lambda t: 1 - t},
        {"optimizer": "sgd", "penalty": lambda p: 0.1 * p["head.weight"].square().sum()},
        {"optimizer": "adam", "batch_size": None, "epochs": 20},
    ],
    ids=lambda s: "-".join(s),
)
def test_many_equal_the_loop(settings):
    x, y = blobs()
    settings = {"epochs": 5, "batch_size": 13, "lr": 0.01, **settings}  # 4 batches, so 20 steps
    many = fit_many(make64, SEEDS, x, y, device="cpu", **settings)
    models, losses = [make64(seed) for seed in SEEDS], []
    for model, seed in zip(models, SEEDS):
        losses.append(fit(model, x, y, generator=order(seed), device="cpu", **settings).loss)
    assert_same(many, models)
    assert torch.allclose(many.history.loss, torch.tensor(losses, dtype=torch.float64).T, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adam", partial(torch.optim.Adam, weight_decay=0.05)),
        ("adamw", partial(torch.optim.AdamW, weight_decay=0.05)),
        ("sgd", partial(torch.optim.SGD, momentum=0.9, weight_decay=0.05)),
    ],
)
def test_many_equal_torch_optim_written_out(name, make):
    x, y = blobs()
    many = fit_many(
        make64, SEEDS, x, y, epochs=5, batch_size=13, lr=0.02, optimizer=name, weight_decay=0.05, device="cpu"
    )
    models = [make64(seed) for seed in SEEDS]
    for model, seed in zip(models, SEEDS):
        optimizer, g = make(model.parameters(), lr=0.02), order(seed)
        for _ in range(5):
            for rows in torch.randperm(len(x), generator=g).split(13):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
    assert_same(many, models)


def test_settings_per_model():
    x, y = blobs()
    rates, decays = [0.001, 0.01, 0.1], [0.0, 0.1, 0.5]
    many = fit_many(make64, SEEDS, x, y, epochs=2, lr=rates, weight_decay=torch.tensor(decays), device="cpu")
    models = [make64(seed) for seed in SEEDS]
    for model, seed, lr, decay in zip(models, SEEDS, rates, decays):
        fit(model, x, y, epochs=2, lr=lr, weight_decay=decay, generator=order(seed), device="cpu")
    assert_same(many, models)


def test_data_per_model():
    x, y = blobs()
    xs, ys = torch.stack([x, -x, 2 * x]), torch.stack([y, (y + 1) % 3, y])
    settings = {"epochs": 3, "batch_size": 20, "device": "cpu"}
    for data_x, data_y in ((xs, ys), (x, ys), (xs, y)):
        many = fit_many(make64, SEEDS, data_x, data_y, **settings)
        models = [make64(seed) for seed in SEEDS]
        for i, (model, seed) in enumerate(zip(models, SEEDS)):
            x_i, y_i = data_x[i] if data_x is xs else x, data_y[i] if data_y is ys else y
            fit(model, x_i, y_i, generator=order(seed), **settings)
        assert_same(many, models)
    assert torch.equal(many(xs)[1], many(xs[1])[1])
    assert many.accuracy(xs, y).shape == (3,)


def test_shapes_that_fit_both_ways():
    x = torch.randn(3, 3)
    many = fit_many(lambda: MLP((3, 2)), SEEDS, x, x[:, :2], loss=F.mse_loss, device="cpu")
    assert many(x).shape == (3, 3, 2)
    x = torch.randn(3, 3, 3)
    many = fit_many(lambda: MLP((3, 1)), SEEDS, x, torch.randn(3, 3, 1), loss=F.mse_loss, device="cpu")
    assert many(x).shape == (3, 3, 1)
    many = fit_many(lambda: MLP((9, 3)), SEEDS, x, torch.randn(3, 3), loss=F.mse_loss, stacked=False, device="cpu")
    assert many(x).shape == (3, 3, 3)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def doubled(linear):
    return nn.utils.parametrize.register_parametrization(linear, "weight", Double())


class Twice(MLP):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLP((3, 4, 3), bias=False).double(),
        lambda: Twice((3, 4, 3)).double(),
        lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)).double(),
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double(),
        lambda: nn.Sequential(doubled(nn.Linear(3, 3)), nn.Linear(3, 3)).double(),
    ],
)
@pytest.mark.parametrize("targets", ["labels", "ignored", "soft"])
def test_other_networks_and_targets_equal_the_loop(make, targets):
    x, y = blobs()
    if targets == "ignored":
        y = torch.where(torch.arange(len(y)) % 5 == 0, -100, y)
    if targets == "soft":
        y = F.one_hot(y, 3).double() * 0.8 + 0.2 / 3
    settings = {"epochs": 2, "batch_size": 13, "lr": 0.01, "device": "cpu"}
    many = fit_many(make, SEEDS, x, y, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(SEEDS[2])
        model = make()
    fit(model, x, y, generator=order(SEEDS[2]), **settings)
    assert torch.allclose(many(x)[2], model(x), atol=1e-6)


def test_regression_targets_and_sample_weights():
    x, _ = blobs()
    target, weights = x @ torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64), torch.ones(len(x)).double()
    weights[::2] = 0

    def weighted(outputs, targets):
        wanted, weight = targets
        return (weight[:, None] * (outputs - wanted).square()).mean()

    make = partial(make64, dims=(3, 1))
    settings = {"loss": weighted, "epochs": 30, "lr": 0.1, "optimizer": "sgd", "batch_size": None, "device": "cpu"}
    spoiled = target.clone()
    spoiled[::2] = 100.0  # weight zero
    many = fit_many(make, SEEDS, x, (target, weights), **settings)
    other = fit_many(make, SEEDS, x, (spoiled, weights), **settings)
    assert torch.equal(many(x), other(x))
    model = make(SEEDS[0])
    fit(model, x, (target, weights), **settings)
    assert torch.allclose(many(x)[0], model(x), atol=1e-9)


def test_frozen_parameters_stay():
    x, y = blobs()

    def make(seed):
        net = make64(seed)
        net.head.weight.requires_grad_(False)
        return net

    many = fit_many(make, SEEDS, x, y, epochs=2, device="cpu")
    model = make(SEEDS[0])
    fit(model, x, y, epochs=2, generator=order(SEEDS[0]), device="cpu")
    assert torch.equal(many.params["head.weight"][0], make(SEEDS[0]).head.weight)
    assert_same(many, [model, *many.models()[1:]])
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="require a gradient"):
        fit(model, x, y, device="cpu")


@pytest.mark.parametrize(
    "make", [lambda seed: SmallCNN(1, 3, width=4, seed=seed), lambda seed: SmallResNet(1, 3, width=4, seed=seed)]
)
def test_images(make, generator):
    x, y = torch.randn(12, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(12) % 3
    settings = {"epochs": 2, "batch_size": 5, "lr": 0.01, "optimizer": "sgd", "device": "cpu"}
    many = fit_many(lambda seed: make(seed).double(), SEEDS, x, y, **settings)
    model = make(SEEDS[1]).double()
    fit(model, x, y, generator=order(SEEDS[1]), **settings)
    assert torch.allclose(many(x)[1], model(x), atol=1e-6)
    assert torch.allclose(many.features(x)[1], model.features(x), atol=1e-6)


def test_evaluation_in_chunks_features_and_activations():
    x, y = blobs()
    many = fit_many(make64, SEEDS, x, y, epochs=1, device="cpu")
    assert torch.allclose(many(x, batch_size=7), many(x), atol=1e-12)
    assert many.features(x).shape == (3, 50, 8)
    layers = many.call("activations", x, batch_size=7)
    assert torch.allclose(layers["layer2"], many.features(x), atol=1e-12)
    for i, model in enumerate(many.models()):
        assert not model.training
        assert torch.allclose(model(x), many(x)[i], atol=1e-12)
        assert many.accuracy(x, y)[i] == (model(x).argmax(1) == y).float().mean()
    assert not many(x).requires_grad
    assert many(x.clone().requires_grad_()).requires_grad
    with pytest.raises(ValueError, match="method"):
        many.call("nothing", x)


def test_sequences_and_images_through_linear_layers(generator):
    x, y = torch.randn(20, 4, 3, generator=generator), torch.randn(20, 4, 2, generator=generator)
    settings = {"loss": F.mse_loss, "epochs": 2, "batch_size": 7, "device": "cpu"}
    many = fit_many(lambda: nn.Sequential(nn.Linear(3, 2)), SEEDS, x, y, **settings)
    assert many(x).shape == (3, 20, 4, 2)
    images, labels = x[:, None], torch.arange(20) % 2
    many = fit_many(lambda: MLP((12, 4, 2)), SEEDS, images, labels, epochs=2, batch_size=7, device="cpu")
    model = MLP((12, 4, 2), seed=SEEDS[0])
    fit(model, images, labels, epochs=2, batch_size=7, generator=order(SEEDS[0]), device="cpu")
    assert torch.allclose(many(images)[0], model(images), atol=1e-5)


def test_models_are_copies():
    x, y = blobs()
    many = fit_many(make64, SEEDS, x, y, epochs=1, device="cpu")
    before = many(x)
    single = many.models()[0]
    with torch.no_grad():
        single.head.weight.zero_()
    assert torch.equal(many(x), before)
    again = ManyModels(many.models())
    assert torch.equal(again(x), before)


def test_callbacks_see_every_epoch_in_eval_mode_and_can_stop():
    x, y = blobs()
    seen = []

    def watch(epoch, many):
        seen.append((epoch, many.accuracy(x, y).tolist(), len(many.history.loss)))
        return epoch == 2

    many = fit_many(make64, SEEDS, x, y, epochs=10, callback=watch, device="cpu")
    assert [s[0] for s in seen] == [0, 1, 2]
    assert [s[2] for s in seen] == [1, 2, 3]
    assert many.history.loss.shape == (3, 3)
    modes = []
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).double()
    history = fit(model, x, y, epochs=4, callback=lambda epoch, m: modes.append(m.training), device="cpu")
    assert modes == [False] * 4
    assert not model.training
    assert len(history.loss) == 4


def test_dropout_follows_the_generator_and_leaves_torchs_alone():
    x, y = blobs()

    def make(seed):
        return nn.Sequential(nn.Linear(3, 16), nn.Dropout(), nn.Linear(16, 3)).double()

    before = torch.get_rng_state()
    a, b = (fit_many(make, SEEDS, x, y, epochs=2, device="cpu") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a(x), b(x))
    assert torch.equal(a(x), a(x))


def test_torchs_generator_is_left_alone():
    x, y = blobs()
    before = torch.get_rng_state()
    fit_many(lambda: MLP((3, 4, 3)), SEEDS, x.float(), y, epochs=1, device="cpu")
    fit(MLP((3, 4, 3), seed=0), x.float(), y, epochs=1, generator=order(0), device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_make_model_with_and_without_seed():
    x, y = blobs(dtype=torch.float32)
    makers = (
        lambda: MLP((3, 3)),
        lambda s: MLP((3, 3), seed=s),
        partial(MLP, (3, 3)),
        lambda seed=None: MLP((3, 3), seed=seed),
    )
    runs = [fit_many(make, SEEDS, x, y, epochs=1, device="cpu").params["head.weight"] for make in makers]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_batch_transform_per_model():
    x, y = blobs()
    shapes = []

    def flip(x, y, generator):
        shapes.append(tuple(x.shape))
        signs = torch.randint(2, (len(x), 1), generator=generator) * 2 - 1
        return x * signs, (y, signs[:, 0])

    def loss(outputs, targets):
        labels, signs = targets
        return (F.cross_entropy(outputs, labels, reduction="none") * signs.abs()).mean()

    settings = {"epochs": 2, "batch_size": 25, "device": "cpu", "loss": loss}
    many = fit_many(make64, SEEDS, x, y, batch_transform=per_model(flip), **settings)
    again = fit_many(make64, SEEDS, x, y, batch_transform=per_model(flip), **settings)
    assert set(shapes) == {(25, 3)}
    assert torch.equal(many(x), again(x))
    fit(make64(0), x, y, batch_transform=flip, generator=order(0), **settings)


def test_fit_learns_and_reports_the_mean_loss(device):
    x, y = blobs(n=300, dtype=torch.float32)
    model = MLP((3, 16, 3), seed=0)
    start = F.cross_entropy(model(x), y).item()
    history = fit(model, x.numpy(), y.numpy(), epochs=30, lr=0.01, device=device, generator=order(0))
    x, y = x.to(device), y.to(device)
    assert F.cross_entropy(model(x), y).item() < history.loss[0] < start + 0.1
    assert (model(x).argmax(1) == y).float().mean() > 0.8
    many = fit_many(lambda: MLP((3, 16, 3)), SEEDS, x, y, epochs=30, lr=0.01, device=device)
    assert many(x).device.type == device.type
    assert (many.accuracy(x, y) > 0.8).all()


def test_first_loss_is_the_mean_over_samples_of_uneven_batches():
    x, y = blobs(n=10)
    model = make64(0)
    expected = F.cross_entropy(model(x), y).item()
    history = fit(copy.deepcopy(model), x, y, epochs=1, batch_size=4, lr=0.0, device="cpu")
    assert math.isclose(history.loss[0], expected, rel_tol=1e-12)


def test_batchnorm_with_running_averages_is_refused():
    with pytest.raises(ValueError, match="GroupNorm"):
        ManyModels([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))])


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"optimizer": "lbfgs"},
        {"lr": -1.0},
        {"weight_decay": float("nan")},
        {"schedule": "linear"},
        {"momentum": -0.1},
    ],
    ids=str,
)
def test_bad_settings(settings):
    x, y = blobs()
    with pytest.raises(ValueError, match="expected"):
        fit(make64(0), x, y, device="cpu", **settings)
    with pytest.raises(ValueError, match="expected"):
        fit_many(make64, SEEDS, x, y, device="cpu", **settings)


def test_bad_data():
    x, y = blobs()
    for bad_x, bad_y in ((x, y[:-1]), (x[:0], y[:0])):
        with pytest.raises(ValueError, match="expected inputs and targets"):
            fit(make64(0), bad_x, bad_y, device="cpu")
        with pytest.raises(ValueError, match="expected inputs and targets"):
            fit_many(make64, SEEDS, bad_x, bad_y, device="cpu")
    with pytest.raises(ValueError, match="at least one seed"):
        fit_many(make64, [], x, y, device="cpu")
    with pytest.raises(ValueError, match="one per model"):
        fit_many(make64, SEEDS, x, y, lr=[0.1, 0.2], device="cpu")
    with pytest.raises(ValueError, match="same parameter names"):
        ManyModels([MLP((2, 2)), MLP((2, 3))])
    with pytest.raises(ValueError, match="m=3"):
        fit_many(make64, SEEDS, x, y, epochs=1, device="cpu")(x[None])


def test_progress_only_where_someone_watches(monkeypatch):
    x, y = blobs()
    bars = {}
    for setting in ("0", "1"):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("COMPANION_PROGRESS", setting)
        monkeypatch.setattr("companion.training.DELAY", 0.0)
        fit(make64(0), x, y, epochs=3, device="cpu")
        bars[setting] = stream.getvalue()
    assert bars["0"] == ""
    assert "epoch" in bars["1"]


def test_silent_when_nobody_watches():
    code = (
        "import torch; import companion.training as t; t.DELAY = 0.0\n"
        "t.fit(torch.nn.Linear(2, 2), torch.randn(9, 2), torch.zeros(9).long(), epochs=2, device='cpu')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": ""})
    assert (done.stdout, done.stderr) == ("", "")


def test_gradients_are_recorded_where_the_caller_records_none():
    x = torch.linspace(-1, 1, 32)[:, None]
    y = (x[:, 0] > 0).long()

    def train():
        model = MLP((1, 8, 2), seed=0)
        fit(model, x, y, epochs=3, batch_size=8, lr=0.01, generator=torch.Generator().manual_seed(1), device="cpu")
        many = fit_many(lambda: MLP((1, 8, 2)), [0, 1], x, y, epochs=3, lr=0.01, device="cpu")
        return model(x).detach(), many(x)

    usual = train()
    with torch.no_grad():
        again = train()
        assert not torch.is_grad_enabled()
    for one, other in zip(usual, again):
        assert torch.equal(one, other)


def test_a_seed_is_a_generator():
    x, y = torch.randn(16, 2), torch.arange(16) % 2
    settings = {"epochs": 2, "batch_size": 4, "device": "cpu"}
    models = [MLP((2, 4, 2), seed=0) for _ in range(2)]
    for model, generator in zip(models, (7, torch.Generator().manual_seed(7))):
        fit(model, x, y, generator=generator, **settings)
    assert torch.equal(models[0](x), models[1](x))
