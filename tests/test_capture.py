"""Recording activations: what a tap sees, that no hook outlives the block, and one clear error for everything else."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_lowrank import CaptureError
from timm_lowrank.core.capture import Tap, evaluating, recording


def hooks(module):
    """All hooks on a module and its children."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return [hook for child in module.modules() for name in names for hook in getattr(child, name).values()]


class Net(nn.Module):
    """A body of plain nn.Sequentials with an in-place activation, and a forward pass that a test may replace."""

    def __init__(self, run=None):
        super().__init__()
        self.body = nn.Sequential(
            nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))
        )
        self.spare = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.run = run or (lambda net, x: net.head(net.body(x)))

    def forward(self, x):
        return self.run(self, x)


def record_one(net, tap, x=None):
    with recording(net, [tap]) as record:
        net(torch.randn(2, 4) if x is None else x)
    return record.activation(tap)


def expect_error(net, layer, *parts):
    with pytest.raises(CaptureError) as caught:
        record_one(net, Tap.at(layer, layer, net))
    for part in (repr(layer), *parts):
        assert part in str(caught.value)
    assert hooks(net) == []


def test_taps_move_into_plain_sequentials():
    """Gradient checkpointing calls the children of a Sequential directly: a hook on the container would never fire."""
    net = Net()
    assert Tap.at("body", "body", net).path == "body.1.1"
    assert Tap.at("body", "body", net, takes_input=True).path == "body.0.0"
    assert Tap.at("body.0", "body.0", net) == Tap("body.0", "body.0.1")
    assert Tap.at("head", "head", net).path == "head"

    class Own(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    net.body = Own(*net.body)
    assert Tap.at("body", "body", net).path == "body", "a subclass may do more than call its children"
    net.body = nn.Sequential()
    assert Tap.at("body", "body", net).path == "body", "an empty one has no children"


def test_output_and_input():
    net, x = Net(), torch.randn(2, 4)
    assert torch.equal(record_one(net, Tap.at("body", "body", net), x), net.body(x))
    assert torch.equal(record_one(net, Tap.at("p", "head", net, takes_input=True), x), net.body(x))
    assert torch.equal(record_one(net, Tap.at("p", "body", net, takes_input=True), x), x)
    assert torch.equal(record_one(net, Tap.at("body.1.1", "body.1.1", net), x), net.body(x)), "works in place"


def test_the_tensor_itself_is_stored_with_its_graph():
    net = Net()
    value = record_one(net, Tap.at("body.0", "body.0", net))
    value.sum().backward()
    assert net.body[0][0].weight.grad is not None
    assert net.head.weight.grad is None


def test_hooks_live_only_inside_the_block():
    def fail(net, x):
        raise KeyError("in the middle of the forward pass")

    net = Net(fail)
    taps = [Tap.at("body", "body", net), Tap.at("p", "head", net, takes_input=True)]
    with recording(net, taps):
        assert len(hooks(net)) == 2
    with pytest.raises(KeyError, match="in the middle"), recording(net, taps):
        net(torch.randn(2, 4))
    assert hooks(net) == []
    with pytest.raises(AttributeError), recording(net, [taps[0], Tap("gone", "gone")]):
        pass
    assert hooks(net) == []


def test_blocks_may_be_nested_and_taps_may_share_a_module():
    net, x = Net(), torch.randn(2, 4)
    taps = [Tap.at("body", "body", net), Tap.at("body.1", "body.1", net)]
    assert taps[0].path == taps[1].path
    with recording(net, taps) as outer:
        with recording(net, taps[:1]) as inner:
            net(x)
        assert outer.values["body"] is outer.values["body.1"] is inner.values["body"]
        net(x)
    assert outer.counts == {"body": 2, "body.1": 2}
    assert inner.counts == {"body": 1}
    assert hooks(net) == []


def test_hooks_of_others_stay():
    net = Net()
    net.head.register_forward_hook(lambda *_: None)
    record_one(net, Tap.at("head", "head", net))
    assert len(hooks(net)) == 1


def test_hooks_that_a_network_registers_in_its_forward_stay():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(3, 2), []

        def forward(self, rows):
            self.handle = self.layer.register_forward_hook(lambda *_: self.calls.append(1))
            return self.layer(rows)

    network = Network()
    with recording(network, [Tap("layer", "layer")]):
        network(torch.ones(1, 3))
    network.layer(torch.ones(1, 3))
    network.handle.remove()
    assert len(network.calls) == 2
    assert not network.layer._forward_hooks


@pytest.mark.parametrize(
    ("run", "layer", "parts"),
    [
        (None, "spare", ("did not run", "every training forward")),
        (lambda net, x: net.head(net.spare(net.spare(net.body(x)))), "spare", ("ran 2 times", "runs once")),
        # The ReLU behind it works in place: what the hook saw is not what the network goes on with.
        (None, "body.1.0", ("overwritten in place", "choose the layer that overwrites it")),
    ],
)
def test_layers_without_activations_of_their_own(run, layer, parts):
    expect_error(Net(run), layer, *parts)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x: (x, x), "gives a tuple, not a tensor"),
        (lambda x: {"x": x}, "gives a dict, not a tensor"),
        (lambda x: None, "gives a NoneType, not a tensor"),
        (lambda x: x.argmax(1, keepdim=True), "shape (2, 1) and type torch.int64"),
        (lambda x: x.mean(), "shape () and type torch.float32"),
        (lambda x: x.mean(1), "shape (2,)"),
        (lambda x: x.to(torch.complex64), "torch.complex64"),
    ],
)
def test_a_layer_that_gives_no_float_activations(value, message):
    def run(net, x):
        net.spare(net.body(x))
        return net.head(net.body(x))

    net = Net(run)
    net.spare.forward = value
    expect_error(net, "spare", message)


def test_an_input_by_keyword_is_no_input():
    net = Net(lambda net, x: net.head(input=net.body(x)))
    with pytest.raises(CaptureError, match="gives a NoneType"):
        record_one(net, Tap.at("p", "head", net, takes_input=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_hooks_are_gone_when_a_checkpointed_block_runs_again(reentrant):
    """A hook inside a checkpointed block would fire in backward once more and store a second tensor."""
    net = Net(lambda net, x: net.head(checkpoint(net.body, x, use_reentrant=reentrant)))
    with recording(net, [Tap.at("body.0", "body.0", net)]) as record:
        output = net(torch.randn(2, 4, requires_grad=True))
    seen = record.values["body.0"]
    output.sum().backward()
    assert net.body[0][0].weight.grad is not None
    assert record.counts == {"body.0": 1}
    assert record.values["body.0"] is seen
    assert seen.requires_grad == (not reentrant), "reentrant checkpointing hands over a tensor without a graph"


def test_a_child_that_has_other_places_is_not_the_end_of_its_sequential():
    activation = nn.Tanh()
    net = Net()
    net.body = nn.Sequential(nn.Linear(4, 6), activation, nn.Sequential(nn.Linear(6, 6), activation))
    assert Tap.at("body", "body", net).path == "body.2", "the activation runs twice, what ends in it once"
    x = torch.randn(2, 4)
    assert torch.equal(record_one(net, Tap.at("body", "body", net), x), net.body(x))
    net.again = net.body  # two names for one layer are one place
    assert Tap.at("again", "again", net).path == "again.2"


def test_a_layer_that_gives_more_than_a_tensor_in_eval_mode_alone():
    class Block(nn.Linear):
        def forward(self, x):
            output = super().forward(x)
            return output if self.training else (output, None)

    block = Block(4, 3)
    for mode in (False, True):
        seen = record_one(block.train(mode), Tap("block", "", item=0))
        assert seen.shape == (2, 3), "not the features of the first sample"


class LoRALinear(nn.Linear):
    """Adapters that are part of the weights in eval mode, as in the package of the paper."""

    def __init__(self):
        super().__init__(4, 3)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.up.data @ self.down.data
            self.merged = not mode
        return self

    def forward(self, x):
        output = super().forward(x)
        return output if self.merged else output + x @ self.down.T @ self.up.T


def test_what_eval_mode_changes_in_a_module_is_undone():
    net = nn.Sequential(LoRALinear(), nn.Sequential(LoRALinear().eval()))
    frozen, before = net[1][0], [parameter.clone() for parameter in net.parameters()]
    for _ in range(2):
        with evaluating(net):
            assert (net[0].merged, frozen.merged) == (True, True)
        assert (net[0].merged, frozen.merged) == (False, True)
        assert (net[0].training, frozen.training) == (True, False)
    for parameter, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old)
    net[0](torch.randn(2, 4)).sum().backward()
    assert net[0].down.grad is not None


def test_evaluating_restores_every_mode():
    net = Net().train()
    net.body[0].eval()
    modes = [module.training for module in net.modules()]
    with evaluating(net):
        assert not any(module.training for module in net.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in net.modules()] == modes
    with pytest.raises(KeyError), evaluating(net):
        raise KeyError
    assert [module.training for module in net.modules()] == modes
    assert torch.is_grad_enabled()
