import pytest
import torch
from torch import nn

from companion.nets import MLP, SmallCNN, SmallResNet

CASES = [
    (lambda seed: MLP((12, 16, 8, 3), seed=seed), (5, 12)),
    (lambda seed: SmallCNN(1, 3, width=4, seed=seed), (5, 1, 9, 8)),
    (lambda seed: SmallCNN(1, 3, width=4, image_size=8, seed=seed), (5, 1, 8, 8)),
    (lambda seed: SmallResNet(3, 3, width=4, depth=2, seed=seed), (5, 3, 9, 8)),
]


@pytest.fixture(params=CASES, ids=["mlp", "cnn", "cnn-flat", "resnet"])
def case(request):
    return request.param


def test_forward_is_head_of_features(case, device):
    make, shape = case
    net, x = make(0).to(device), torch.randn(shape, device=device)
    features = net.features(x)
    assert net(x).shape == (5, 3)
    assert features.shape == (5, net.head.in_features)
    assert torch.equal(net(x), net.head(features))


def test_named_layers_run_one_after_the_other(case):
    make, shape = case
    net, x = make(0), torch.randn(shape)
    outputs = net.activations(x)
    assert list(outputs) == list(net.named_layers())
    assert list(outputs)[-1] == "head"
    assert torch.equal(outputs["head"], net(x))
    assert torch.equal(list(outputs.values())[-2], net.features(x))


def test_seed_fixes_the_weights_and_leaves_torchs_generator_alone(case):
    make, _ = case
    before = torch.get_rng_state()
    a, b, c = make(1), make(1), make(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.head.weight, c.head.weight)


def test_seed_is_the_same_as_seeding_torch():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = MLP((4, 5, 2))
    assert torch.equal(MLP((4, 5, 2), seed=3).head.weight, expected.head.weight)


def test_a_sample_does_not_depend_on_its_batch(case):
    make, shape = case
    net, x = make(0), torch.randn(shape)
    assert torch.allclose(net(x)[:1], net(x[:1]), atol=1e-6)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


def test_every_parameter_gets_a_gradient(case):
    make, shape = case
    net = make(0)
    net(torch.randn(shape)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_mlp_by_hand():
    net = MLP((2, 2, 1), activation="relu", bias=False)
    with torch.no_grad():
        net.body.layer1.linear.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        net.head.weight.fill_(1.0)
    x = torch.tensor([[3.0, 1.0], [1.0, 4.0]])
    assert net(x).flatten().tolist() == [2.0, 3.0]  # |x1 - x2|


def test_identity_mlp_is_linear():
    net = MLP((4, 6, 5, 3), activation="identity", bias=False, seed=0).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    product = net.head.weight @ net.body.layer2.linear.weight @ net.body.layer1.linear.weight
    assert torch.allclose(net(x), x @ product.T)


def test_linear_classifier_and_images():
    assert torch.equal(MLP((4, 3)).features(torch.ones(2, 1, 2, 2)), torch.ones(2, 4))
    assert isinstance(MLP((4, 3, 2), activation=nn.Softplus).body.layer1.activation, nn.Softplus)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLP((4,)),
        lambda: MLP((4, 0, 2)),
        lambda: MLP((4, 3, 2), activation="swish2"),
        lambda: SmallCNN(0),
        lambda: SmallCNN(1, image_size=3),
        lambda: SmallResNet(depth=0),
    ],
)
def test_bad_sizes(make):
    with pytest.raises(ValueError, match="expected"):
        make()
