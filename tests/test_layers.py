import pytest
import torch
from torch import nn

from companion.layers import read_layers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.turn = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.turn(self.linear(x)))


class Net(nn.Module):
    """Nested names, a block of two names that runs twice, a tuple, a layer that never runs, an input by keyword."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.block = Block()
        self.again = self.block
        self.pair = nn.LSTM(3, 4, batch_first=True)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = self.again(self.block(self.norm(self.stem(x))))
        states, _ = self.pair(h[:, None])
        return self.head(input=states[:, 0])


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))

    def forward(self, x):
        self.first(x)
        raise RuntimeError("broken")


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.fixture
def net(device):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(device)


@pytest.fixture
def x(generator, device):
    return torch.randn(6, 3, generator=generator).to(device)


def test_outputs_and_inputs_are_those_of_the_forward_pass(net, x):
    outputs, inputs = read_layers(net, x, outputs_of=["stem", "norm", "head", ""], inputs_of=["norm", "head"])
    net.eval()
    assert torch.equal(outputs["stem"], net.stem(x))
    assert torch.equal(inputs["norm"], outputs["stem"])
    assert torch.equal(outputs["norm"], net.norm(outputs["stem"]))
    assert torch.equal(outputs[""], net(x))
    assert torch.equal(outputs["head"], outputs[""])
    assert torch.equal(net.head(inputs["head"]), outputs["head"]), "an input by keyword"
    assert not hooks(net)


def test_nested_names_are_read_before_they_are_written_over(net, x):
    outputs, _ = read_layers(net, x, outputs_of=["block.linear", "block.turn"])
    assert outputs["block.linear"].min() < 0, "what the ReLU after it left"
    assert torch.equal(outputs["block.linear"].relu(), outputs["block.turn"])


def test_the_last_time_counts_under_each_name(net, x):
    outputs, inputs = read_layers(net, x, outputs_of=["block", "again", "norm"], inputs_of=["block", "pair"])
    net.eval()
    once = net.block(outputs["norm"])
    assert torch.equal(inputs["block"], once)
    assert torch.equal(outputs["block"], net.block(once))
    assert torch.equal(outputs["again"], outputs["block"])
    assert torch.equal(inputs["pair"][:, 0], outputs["block"])


def test_a_tuple_comes_as_it_is_and_an_unused_layer_not_at_all(net, x):
    outputs, inputs = read_layers(net, x, outputs_of=["pair", "unused"], inputs_of=["unused"])
    states, (last, _) = outputs["pair"]
    assert states.shape == (6, 1, 4)
    assert torch.equal(last[0], states[:, 0])
    assert "unused" not in outputs
    assert not inputs


def test_a_missing_layer_is_named_beside_those_there_are(net, x):
    for wanted in ({"outputs_of": ["stem", "layer4"]}, {"inputs_of": ["layer4"]}):
        with pytest.raises(ValueError, match=r"expected layers among \['stem', 'norm', 'block', .*got 'layer4'"):
            read_layers(net, x, **wanted)
    assert not hooks(net)


@pytest.mark.parametrize("training", [True, False])
def test_each_part_goes_back_to_its_own_mode(net, x, training):
    net.train(training)
    net.norm.train(not training)
    before = {m: m.training for m in net.modules()}
    mean = net.norm.running_mean.clone()
    first, second = (read_layers(net, x, outputs_of=[""])[0][""] for _ in range(2))
    assert torch.equal(first, second), "dropout was on"
    assert torch.equal(net.norm.running_mean, mean)
    assert {m: m.training for m in net.modules()} == before


def test_nothing_is_left_behind_after_an_error(x):
    model = Broken()
    model.first[1].eval()
    with pytest.raises(RuntimeError, match="broken"):
        read_layers(model, x.cpu(), outputs_of=["first.0"], inputs_of=["first"])
    assert model.training
    assert model.first[0].training
    assert not model.first[1].training
    assert not hooks(model)


def test_a_model_that_does_more_than_set_a_flag(x):
    class Merged(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merged(3, 3))
    read_layers(model, x.cpu(), outputs_of=["0"])
    assert model[0].training
    assert not model[0].merged


def test_hooks_of_the_owner_stay_and_what_they_change_is_seen(net, x):
    handle = net.stem.register_forward_hook(lambda module, args, out: out + 1)
    outputs, inputs = read_layers(net, x, outputs_of=["stem"], inputs_of=["norm"])
    assert torch.equal(outputs["stem"], inputs["norm"])
    assert hooks(net) == [net.stem]
    handle.remove()


def test_gradients_are_recorded_unless_they_are_switched_off(net, x):
    x.requires_grad_(True)
    outputs, _ = read_layers(net, x, outputs_of=["block.linear"])
    outputs["block.linear"].sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        assert not read_layers(net, x, outputs_of=["stem"])[0]["stem"].requires_grad
    with torch.inference_mode():
        assert read_layers(net, x, outputs_of=["block.linear"])[0]["block.linear"].min() < 0


def test_several_arguments_and_no_layers():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    assert read_layers(Sum(), torch.ones(2), torch.ones(2), outputs_of=[""])[0][""].tolist() == [2, 2]
    assert read_layers(Sum(), torch.ones(2), torch.ones(2)) == ({}, {})
