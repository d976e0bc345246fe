"""`LowRankModel`, `LossHook` and `attach`: on timm networks, in real training loops, copied, compiled and resumed."""

import copy
import pickle
import warnings

import accelerate
import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from states import same
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import timm_lowrank as tlr
from timm_lowrank import CaptureError, LossHook, LowRankConfig, LowRankError, LowRankModel, LowRankWarning, attach
from timm_lowrank.core.model import FORWARDS_BEFORE_WARNING, STEPS_BEFORE_WARNING

PLAIN = {"project_every": 4, "warmup_updates": 0, "reconstruction_weight": 1.0, "head_weight": 0.0, "scale": "unit"}


def config(branches=None, **values):
    return LowRankConfig(**{"branches": branches or {"body": 5, "pre_logits": 4}, **PLAIN, **values})


@pytest.fixture
def wrapped(small_net, digits):
    """A function that wraps a small network for digits, always with the same weights."""

    def build(branches=None, *, net=None, **values):
        torch.manual_seed(0)
        return tlr.wrap(net or small_net(), config(branches, **values), example_input=digits[0][:2]).train()

    return build


@pytest.fixture
def data(digits):
    """A function that gives batches of 16 digits and their labels."""
    images, labels = digits
    return lambda count, start=0: [
        (images[i : i + 16], labels[i : i + 16]) for i in range(start, 16 * count + start, 16)
    ]


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def train(model, optimizer, batches, update=True):
    """Plain training steps; the losses."""
    losses = []
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images), labels) + model.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update:
            model.update()
        losses.append(loss.detach())
    return losses


def scaled_step(model, optimizer, scaler, images, labels, factor=1):
    """A training step with a gradient scaler, of a model that is attached to the optimizer."""
    loss = factor * (nn.functional.cross_entropy(model(images), labels) + model.penalty())
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return model.branches["body"].updates


def assert_close_branches(model, twin, atol):
    for layer, branch in model.branches.items():
        assert torch.allclose(branch.dense_weight(), twin.branches[layer].dense_weight(), rtol=0, atol=atol)
        assert torch.allclose(branch.bias, twin.branches[layer].bias, rtol=0, atol=atol)


def state_of(module):
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def hooks(module):
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for child in module.modules() for name in names for hook in getattr(child, name).values()]


# the wrapper


@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_the_backbone_s_own(wrapped, data, training):
    model = wrapped().train(training)
    ((images, _),) = data(1)
    assert torch.equal(model(images), model.backbone(images))


def test_the_penalty_is_the_sum_of_the_branches_own(wrapped, data):
    model = wrapped(norm_weight=0.1)
    ((images, _),) = data(1)
    twin = copy.deepcopy(model)
    model(images)
    total = model.penalty()
    with twin.capture() as activations:
        twin(images)
    parts = [twin.branches[layer].penalty(value.flatten(1)) for layer, value in activations.items()]
    assert torch.equal(total, sum(parts))
    for parts in model.losses().values():
        assert set(parts) == {"reconstruction", "norm", "offset", "outside", "activation_norm"}
    assert model.losses().keys() == activations.keys() == {"body", "pre_logits"}


def test_the_penalty_trains_what_lies_before_the_layer(wrapped, data):
    model = wrapped({"body": 2})
    batches = data(2)
    train(model, sgd(model), batches[:1])
    model.zero_grad()
    model(batches[1][0])
    model.penalty().backward()
    touched = {name for name, p in model.backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {"stem.0.weight", "stem.0.bias", "body.0.weight", "body.0.bias"}


def test_training_makes_activations_low_rank(wrapped, digits):
    """The point of it all, on real images: 4 directions of the hidden layer hold more variance than without."""
    images, labels = digits
    shares = {}
    for on in (False, True):
        model = wrapped({"pre_logits": 4}, reconstruction_weight=1.0)
        optimizer = sgd(model)
        for epoch in range(10):
            model.enable(on and epoch >= 4)
            train(model, optimizer, zip(images.split(64), labels.split(64), strict=True))
        model.eval()
        with torch.no_grad(), model.capture() as seen:
            accuracy = float((model(images).argmax(1) == labels).float().mean())
        (shares[on],) = tlr.spectrum.variance_ratio(seen["pre_logits"], [4])
        assert accuracy > 0.8
    assert shares[True] > shares[False] + 0.1


def test_the_report_is_that_of_the_last_batch_and_of_w(wrapped, data):
    model = wrapped(warmup_updates=3)
    assert all(one.penalty != one.penalty and one.rank == one.updates == 0 for one in model.report().values())
    assert [str(one) for one in model.report().values()] == ["no batch yet"] * 2
    batches = data(8)
    train(model, sgd(model), batches[:7])
    twin = copy.deepcopy(model)
    model(batches[7][0])
    total = model.penalty()
    with twin.capture() as activations, torch.no_grad():
        twin(batches[7][0])
    report = model.report()
    assert sum(one.penalty for one in report.values()) == pytest.approx(float(total), rel=1e-5)
    for layer, one in report.items():
        branch = twin.branches[layer]
        weight, rows = branch.dense_weight().double(), (activations[layer].flatten(1) + branch.bias).double()
        lost = (rows @ weight - rows).square().sum() / rows.square().sum()
        assert one.outside == pytest.approx(float(lost), rel=1e-3)
        assert one.rank == torch.linalg.matrix_rank(weight, rtol=1e-6)
        assert one.updates == 7
        assert not one.warming_up
        assert str(one) == (
            f"penalty {one.penalty:.4g}, {one.outside:.1%} of the energy outside W, rank {one.rank} "
            f"(target {model.branches[layer].rank}) after 7 updates"
        )
    early = wrapped(warmup_updates=5)
    train(early, sgd(early), batches[:7])
    assert all(one.warming_up and str(one).endswith(", warming up") for one in early.report().values())


def test_scripting_the_wrapper_names_the_plain_network(wrapped):
    with pytest.raises(TypeError, match=r"script the plain network, model\.unwrap\(\)"):
        torch.jit.script(wrapped())


@pytest.mark.parametrize("training", [True, False])
def test_tracing_the_wrapper_says_what_to_trace(wrapped, training):
    model = wrapped().train(training)
    with pytest.raises(TypeError, match=r"trace the plain network, model.unwrap\(\)"):
        torch.fx.symbolic_trace(model)
    assert torch.fx.symbolic_trace(model.unwrap()).graph.nodes


@pytest.mark.parametrize("kind", ["numpy", "list", "int32", "shares"])
def test_labels_of_other_kinds(kind):
    torch.manual_seed(0)
    images, labels = torch.rand(6, 3, 32, 32), torch.arange(6) % 3
    given = {"numpy": labels.numpy(), "list": labels.tolist(), "int32": labels.int().numpy(),
             "shares": torch.nn.functional.one_hot(labels, 3).double().numpy()}[kind]  # fmt: skip
    config = LowRankConfig(branches={"layer3": 4}, warmup_updates=0, head_weight=1.0)
    model = tlr.wrap("test_resnet", config, num_classes=3, example_input=images).train()
    for _ in range(10):
        model(images)
        model.penalty(given)
        model.update()
    penalties = []
    for value in (labels, given):
        model(images)
        penalties.append(model.penalty(value).detach())
    assert torch.allclose(*penalties)
    assert model.losses()["layer3"]["head"] > 0


def test_branch_names_and_options(wrapped):
    model = wrapped(
        {"body.0": {"rank": 3, "reconstruction_weight": 0.1}, "pre_logits": {"rank": 4, "norm_weight": 0.7}},
        reconstruction_weight=2.0,
    )
    assert list(model.branches) == list(model.branches.keys()) == ["body.0", "pre_logits"]
    assert "body.0" in model.branches
    assert "body.1" not in model.branches
    (name, first), (_, second) = model.branches.items()
    assert model.branches[name] is first
    assert (first.rank, first.num_features, first.name) == (3, 8 * 4 * 4, "body.0")
    assert (first.config.reconstruction_weight, first.config.norm_weight) == (0.1, 0.0)
    assert (second.rank, second.num_features) == (4, 32)
    assert (second.config.reconstruction_weight, second.config.norm_weight) == (2.0, 0.7)


def test_attributes_of_the_backbone_are_reachable(wrapped):
    model = wrapped()
    assert model.classifier is model.backbone.classifier
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing
    assert not hasattr(LowRankModel.__new__(LowRankModel), "backbone")


# unwrapping and eval mode


def test_nothing_is_left_on_the_backbone():
    model = tlr.wrap(
        "test_resnet", config({"layer3": 8, "pre_logits": 4}), num_classes=3, example_input=torch.zeros(1, 3, 32, 32)
    )
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    train(model.train(), sgd(model), [(images, labels)] * 5)
    backbone = model.unwrap()
    plain = timm.create_model("test_resnet", num_classes=3)
    assert type(backbone) is type(plain)
    assert hooks(backbone) == []
    plain.load_state_dict(backbone.state_dict())
    assert torch.equal(plain.eval()(images), backbone.eval()(images))
    assert torch.equal(plain(images), model.eval()(images))
    prefixed = {key.removeprefix("backbone.") for key in model.state_dict() if key.startswith("backbone.")}
    assert prefixed == set(plain.state_dict())
    assert all(key.startswith(("backbone.", "branches.")) for key in model.state_dict())


@pytest.mark.parametrize("switch_off", [LowRankModel.eval, lambda model: model.enable(False)])
def test_switched_off_it_never_records(wrapped, data, switch_off, monkeypatch):
    model = wrapped()
    monkeypatch.setattr("timm_lowrank.core.model.recording", None)  # calling it would raise
    ((images, _),) = data(1)
    switch_off(model)
    assert torch.equal(model(images), model.backbone(images))


def test_switched_off_everything_is_free(wrapped, data):
    model = wrapped().enable(False)
    plain = copy.deepcopy(model.backbone)
    optimizer, twin = sgd(model), sgd(plain)
    losses = train(model, optimizer, data(5))
    assert float(model.penalty()) == 0
    for (images, labels), loss in zip(data(5), losses, strict=True):
        plain_loss = nn.functional.cross_entropy(plain(images), labels)
        assert torch.equal(loss, plain_loss)
        twin.zero_grad()
        plain_loss.backward()
        twin.step()
    assert same(state_of(model.backbone), state_of(plain))
    assert model.branches["body"].updates == 0
    assert model.enable() is model
    train(model, optimizer, data(2))
    assert model.branches["body"].updates == 2


# the wrapper as timm and torch see it


def groups_of(model, names, **options):
    """(weight decay, scale of the learning rate) of each parameter in an optimizer of timm."""
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, **options).param_groups
    return {names[id(p)]: (group["weight_decay"], group.get("lr_scale")) for group in groups for p in group["params"]}


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.7}])
@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "test_convnext", "test_nfnet", "test_efficientnet", "tnt_s_patch16_224"]
)
def test_timm_groups_the_parameters_as_those_of_the_plain_network(name, options):
    plain = timm.create_model(name, num_classes=10)
    names = {id(p): key for key, p in plain.named_parameters()}
    model = tlr.wrap(plain, LowRankConfig(branches={"pre_logits": 4}))
    assert groups_of(model, names, **options) == groups_of(plain, names, **options)
    for coarse in (False, True):
        mine, theirs = (group_parameters(m, m.group_matcher(coarse=coarse), reverse=True) for m in (model, plain))
        assert mine == {f"backbone.{key}": group for key, group in theirs.items()}


def test_a_network_without_name_based_hooks_has_none_when_wrapped(wrapped):
    assert not any(hasattr(wrapped(), hook) for hook in ("no_weight_decay", "group_matcher"))


def test_what_is_written_through_the_wrapper_is_written_to_the_network(wrapped, data):
    model = wrapped()
    backbone = model.unwrap()
    backbone.scale = nn.Parameter(torch.ones(()))
    backbone.register_buffer("steps", torch.zeros(()))
    backbone.num_classes, backbone.taps, backbone.enabled = 10, "the network's", "the network's"
    model.classifier, model.num_classes = nn.Linear(32, 5), 5
    model.scale, model.steps = nn.Parameter(torch.zeros(())), torch.ones(())
    ((images, _),) = data(1)
    assert backbone(images).shape == (16, 5) == model(images).shape
    assert backbone.num_classes == 5
    assert backbone.scale.item() == 0
    assert backbone.steps.item() == 1
    assert {key.split(".")[0] for key, _ in model.named_parameters()} == {"backbone"}
    del model.scale
    assert not hasattr(backbone, "scale")
    model.note, model._note = 1, 2
    assert not {"note", "_note"} & vars(backbone).keys(), "what the network does not have"
    model.enable(False).taps = ()
    assert (model.enabled, model.taps) == (False, ()), "the wrapper's own"
    assert backbone.taps == backbone.enabled == "the network's"


def test_a_network_with_the_names_of_the_wrapper(small_net, digits):
    net = small_net()
    net.branches, net.classes, net.lowrank_config = nn.Identity(), "classes", "configuration"
    model = tlr.wrap(net, config({"body": 3}), example_input=digits[0][:2])
    assert list(model.branches) == ["body"]
    assert isinstance(model.lowrank_config, LowRankConfig)
    assert isinstance(net.branches, nn.Identity)
    assert (net.classes, net.lowrank_config) == ("classes", "configuration")


# errors of penalty and update


def test_a_penalty_needs_a_forward_of_its_own(wrapped, data):
    model = wrapped()
    ((images, _),) = data(1)

    def used():
        model(images)
        model.penalty()

    def switched_off_since():
        model.train()(images)
        model.enable(False).enable()

    for without in (lambda: None, used, lambda: model.eval()(images), switched_off_since):
        without()
        with pytest.raises(CaptureError, match=r"needs a forward pass in train mode before each call; .* twice for"):
            model.penalty()


def test_a_frozen_part_in_front_of_the_layer_is_an_error(wrapped, data):
    model = wrapped({"body": 3})
    ((images, _),) = data(1)
    for part in (model.stem, model.body):
        part.requires_grad_(False)
    model(images)
    with pytest.raises(CaptureError, match=r"'body' carry no gradient.*frozen"):
        model.penalty()
    model.hidden.requires_grad_(False)
    with torch.no_grad():
        model(images)
        assert float(model.penalty()) > 0, "without gradients there is nothing to complain about"


def test_a_frozen_backbone_can_be_analysed(wrapped, data):
    """Then only W and b move."""
    model = wrapped()
    model.backbone.requires_grad_(False)
    losses = []
    for _ in range(6):
        for images, _ in data(4):
            model(images)
            penalty = model.penalty()
            assert not penalty.requires_grad
            model.update()
            losses.append(float(penalty))
    assert model.branches["body"].updates == 24
    assert losses[-1] < losses[0] / 2


def test_data_parallel_is_refused(wrapped):
    with pytest.raises(RuntimeError, match=r"DataParallel.*use DistributedDataParallel"):
        wrapped()._replicate_for_data_parallel()


# gradient checkpointing


@pytest.mark.parametrize(
    ("name", "branches", "options"),
    [
        ("test_resnet", {"layer3": 6, "pre_logits": 4}, {}),
        ("test_vit", {"blocks.2": 6, "pre_logits": 4}, {"img_size": 32}),
        ("test_efficientnet", {"blocks.3": 6, "pre_logits": 4}, {}),
    ],
)
def test_gradient_checkpointing_changes_neither_loss_nor_gradient(name, branches, options):
    torch.manual_seed(0)
    model = tlr.wrap(name, config(branches), num_classes=3, example_input=torch.zeros(1, 3, 32, 32), **options).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # a checkpointed block sees its batch twice
            module.momentum = 0.0
    other = copy.deepcopy(model)
    other.backbone.set_grad_checkpointing(True)
    for seed in range(3):
        torch.manual_seed(seed)
        images = torch.randn(4, 3, 32, 32)
        losses = []
        for network in (model, other):
            network.zero_grad()
            loss = network(images).square().mean() + network.penalty()
            loss.backward()
            network.update()
            losses.append(loss.detach())
        assert torch.equal(*losses)
        for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), key
    for layer, branch in model.branches.items():
        assert branch.updates == other.branches[layer].updates == 3
        assert torch.equal(branch.dense_weight(), other.branches[layer].dense_weight())


def test_reentrant_checkpointing_is_an_error(wrapped, data):
    model = wrapped({"body.0": 3})
    model.body.forward = lambda x: checkpoint(nn.Sequential.forward, model.body, x, use_reentrant=True)
    ((images, _),) = data(1)
    model(images)
    with pytest.raises(CaptureError, match=r"'body.0' carry no gradient.*use_reentrant=True"):
        model.penalty()


# copies


def test_deepcopy_and_pickle_with_a_graph_that_waits(data):
    model = tlr.wrap("test_vit", config({"blocks.1": 4, "pre_logits": 3}), num_classes=4, img_size=32).train()
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    optimizer = sgd(model)
    train(model, optimizer, [(images, labels)] * 3)
    model(images)  # activations with a graph are held now
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.penalty()
    for twin in copies:
        assert same(state_of(twin), state_of(model))
        assert torch.equal(twin(images), model(images))
        assert torch.allclose(twin.penalty(), model.penalty())
    before = state_of(model)
    train(copies[0], sgd(copies[0]), [(images, labels)] * 3)
    assert same(before, state_of(model)), "a copy shares nothing"
    with pytest.raises(CaptureError, match="needs a forward"):
        copy.deepcopy(model).penalty()


def test_a_copy_of_a_model_that_is_compiled_in_place_computes_by_itself(wrapped, data):
    model = wrapped()
    ((images, _),) = data(1)
    model.compile(backend="eager")
    model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin(images).any()
        twin.penalty()
    model.penalty()  # of its own forward


class Repeated(nn.Module):
    """Blocks in a list, which accelerate compiles one by one where it is told to."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        values = images.flatten(1)
        for block in self.blocks:
            values = block(values)
        return self.head(values)


def test_a_copy_that_accelerate_compiles_by_regions_says_what_to_do(wrapped, data):
    ((images, labels),) = data(1)
    model = wrapped({"pre_logits": 4}, net=Repeated())
    for compiled in (
        accelerate.utils.compile_regions(model, backend="eager"),
        accelerate.utils.compile_regions(nn.Sequential(model), backend="eager"),  # inside another module, such as DDP
    ):
        with pytest.raises(LowRankError, match=r"compile it as a whole, .*use_regional_compilation=False"):
            compiled(images)
        assert torch.equal(compiled.eval()(images), model.eval()(images))
        model.train()
    assert train(model, sgd(model), [(images, labels)])


def test_a_part_that_was_compiled_while_the_branches_were_off_is_named(wrapped, data):
    model = wrapped({"body": 5})
    model.unwrap().compile(backend="eager")
    ((images, _),) = data(1)
    model.enable(False)(images)
    model.enable()(images)
    with pytest.raises(CaptureError, match=r"'body' lies in a part .* compiled by itself.*torch\.compile\(model\)"):
        model.penalty()


# the loop


def test_loss_hook(wrapped, data):
    model, twin = wrapped(), wrapped()
    criterion = LossHook(nn.CrossEntropyLoss(), model)
    ((images, labels),) = data(1)
    loss = criterion(model(images), labels)
    expected = nn.functional.cross_entropy(twin(images), labels) + twin.penalty()
    assert torch.equal(loss, expected)
    plain = nn.functional.cross_entropy(model.eval()(images), labels)
    assert torch.equal(criterion(model(images), labels), plain)
    model.train().enable(False)
    assert torch.equal(criterion(model(images), labels), plain)


def test_two_criterion_calls_for_one_forward_are_told_what_to_do(wrapped, data):
    model, twin, inner = wrapped(head_weight=0.5), wrapped(head_weight=0.5), nn.CrossEntropyLoss()
    ((images, labels),) = data(1)
    hook, output = LossHook(inner, model), model(images)
    hook(output, labels)
    with pytest.raises(CaptureError, match=r"as with Mixup, .* add model\.penalty\(shares of the classes\) once"):
        hook(output, labels.flip(0))
    shares = sum(share * nn.functional.one_hot(of, 10).float() for share, of in ((0.3, labels), (0.7, labels.flip(0))))
    model.update()
    twin(images)
    twin.penalty(labels)
    twin.update()
    assert torch.equal((model(images), model.penalty(shares))[1], (twin(images), twin.penalty(shares))[1])


def test_loss_hook_leaves_the_criterion_s_own_parameters_alone(wrapped):
    model, inner = wrapped(), nn.CrossEntropyLoss(weight=torch.ones(10))
    criterion = LossHook(inner, model)
    assert list(criterion.state_dict()) == ["criterion.weight"]
    assert list(criterion.parameters()) == []
    criterion.eval()
    assert model.training


def test_attach_updates_after_each_step(wrapped, data):
    model, twin = wrapped(), wrapped()
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    losses = train(model, optimizer, data(6), update=False)
    expected = train(twin, sgd(twin), data(6))
    assert all(map(torch.equal, losses, expected))
    assert same(state_of(model), state_of(twin))
    handle.remove()
    model(data(1)[0][0])
    model.penalty()
    optimizer.step()
    assert model.branches["body"].updates == 6


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation by the interface of its authors: `step` is never called, `base_optimizer` steps."""

    def __init__(self, parameters, radius=0.05):
        super().__init__(parameters, {"radius": radius})
        self.base_optimizer = torch.optim.SGD(self.param_groups, 0.05, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["moved"] = 0.01 * parameter.grad.sign()
            parameter.add_(self.state[parameter]["moved"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(self.state[parameter]["moved"])
        self.base_optimizer.step()
        self.zero_grad()


class Holder:
    """No torch optimizer itself."""

    def __init__(self, base):
        self.base, self.param_groups = base, base.param_groups

    def step(self):
        self.base.step()

    def zero_grad(self):
        self.base.zero_grad()


@pytest.mark.parametrize(
    "build",
    [
        lambda model: create_optimizer_v2(model, "lookahead_sgd", lr=0.01),  # takes hooks and never calls them
        lambda model: Holder(sgd(model)),
        lambda model: Holder(Holder(sgd(model))),
        lambda model: Holder(SAM(model.parameters()).base_optimizer),
        lambda model: accelerate.optimizer.AcceleratedOptimizer(sgd(model)),
    ],
    ids=["lookahead", "holder", "held holder", "base", "accelerate"],
)
def test_attach_finds_the_optimizer_that_steps(wrapped, data, fresh_accelerate, build):
    accelerate.Accelerator(cpu=True)
    model = wrapped()
    optimizer = build(model)
    attach(optimizer, model)
    train(model, optimizer, data(3), update=False)
    assert model.branches["body"].updates == 3


def test_attach_counts_a_step_of_sharpness_aware_minimisation_once(wrapped, data):
    model = wrapped()
    optimizer = SAM(model.parameters())
    attach(optimizer, model)
    for images, labels in data(3):
        for part in (optimizer.first_step, optimizer.second_step):
            (nn.functional.cross_entropy(model(images), labels) + model.penalty()).backward()
            part()
    assert model.branches["body"].updates == 3


def test_attach_says_what_it_needs(wrapped):
    model = wrapped()
    for wrong in (model, []):
        with pytest.raises(TypeError, match=f"torch optimizer, not a {type(wrong).__name__}"):
            attach(wrong, model)
    with pytest.raises(TypeError, match=r"needs the LowRankModel itself, as wrap\(\) gave it, not a SmallNet"):
        attach(sgd(model), model.backbone)
    several = Holder(sgd(model))
    several.others = [sgd(model)]
    with pytest.raises(TypeError, match=r"Holder holds several optimizers \(SGD, SGD\): .* call model\.update"):
        attach(several, model)


def test_attach_twice_is_refused_until_the_first_is_gone(wrapped, data):
    model = wrapped()
    optimizer, other = sgd(model), sgd(model)
    handle = attach(optimizer, model)
    for again in (optimizer, other):
        with pytest.raises(ValueError, match=r"attached to an optimizer already.*remove\(\)"):
            attach(again, model)
    attach(sgd(twin := copy.deepcopy(model)), twin)
    handle.remove()
    attach(other, model)
    train(model, other, data(2), update=False)
    assert model.branches["body"].updates == 2
    del other, again  # an optimizer that is gone holds nobody back
    attach(optimizer, model)


def test_a_step_that_a_gradient_scaler_skips_is_no_update(wrapped, data):
    """After an overflow neither the network nor W and b may move, and no trace of it is left behind."""
    model, twin = wrapped(), wrapped()
    optimizer, twin_optimizer = sgd(model), sgd(twin)
    attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    batches = data(6)
    assert scaled_step(model, optimizer, scaler, *batches[0]) == 1
    train(twin, twin_optimizer, batches[:1])
    overflow = torch.full_like(batches[1][0], float("inf"))
    assert scaled_step(model, optimizer, scaler, overflow, batches[1][1]) == 1, "skipped"
    assert scaler.get_scale() == 2.0**9
    for i, batch in enumerate(batches[2:]):
        assert scaled_step(model, optimizer, scaler, *batch) == 2 + i
    train(twin, twin_optimizer, batches[2:])
    assert_close_branches(model, twin, 1e-4)


def test_gradients_that_overflow_leave_the_rows_for_the_next_update(wrapped, data):
    """The activations themselves were fine, and no step came between them and the next batch."""
    model, twin = wrapped(), wrapped()
    optimizer = sgd(model)
    attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-117)
    for images, labels in data(2):
        scaled_step(model, optimizer, scaler, images, labels, factor=4)  # 4 * 2**127 is infinite
        twin(images)
        twin.penalty()
    twin.update()
    assert model.branches["body"].updates == 1
    assert_close_branches(model, twin, 0)


# accelerate


@pytest.mark.parametrize("prepared", [True, False])
def test_attach_under_gradient_accumulation(wrapped, data, fresh_accelerate, prepared):
    """One update per real step of the optimizer, and four micro-batches are one batch."""
    parallel = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, twin = wrapped(bias_momentum=0.3), wrapped(bias_momentum=0.3)
    optimizer = sgd(model)
    if not prepared:
        attach(optimizer, model)
    network, ready = parallel.prepare(model, optimizer)
    if prepared:
        attach(ready, model)
    criterion = LossHook(nn.CrossEntropyLoss(), model)
    for one in (model, twin):  # b is taken from the first batch: let it be the same
        one(data(1)[0][0])
        one.penalty()
        one.update()
    twin_optimizer, updates = sgd(twin), []
    for images, labels in data(5):
        for part, target in zip(images.split(4), labels.split(4), strict=True):
            with parallel.accumulate(network):
                loss = criterion(network(part), target)
                parallel.backward(loss)
                ready.step()
                ready.zero_grad()
            updates.append(model.branches["body"].updates)
        train(twin, twin_optimizer, [(images, labels)])
    assert updates == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6]
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-5), key
    assert_close_branches(model, twin, 1e-4)


@pytest.mark.parametrize("storage", ["factored", "dense"])
@pytest.mark.parametrize("stop", [0, 2, 4, 5])
def test_a_checkpoint_of_accelerate_resumes_bit_for_bit(wrapped, data, fresh_accelerate, tmp_path, storage, stop):
    """From before the first update, in the middle of an interval between projections, and right after one."""
    batches = data(9)

    def start():
        parallel = accelerate.Accelerator(cpu=True)
        model = wrapped(storage=storage, update_rows=6)
        network, optimizer = parallel.prepare(model, sgd(model))
        return parallel, model, network, optimizer

    parallel, straight, network, optimizer = start()
    train(network, optimizer, batches[:stop])
    parallel.save_state(tmp_path / "checkpoint")
    train(network, optimizer, batches[stop:])

    parallel, resumed, network, optimizer = start()
    train(network, optimizer, batches[3:5])  # whatever was there is replaced
    parallel.load_state(tmp_path / "checkpoint")
    losses = train(network, optimizer, batches[stop:])
    assert same(state_of(resumed), state_of(straight))
    assert len(losses) == 9 - stop
    assert resumed.branches["body"].updates == 9


@pytest.mark.parametrize("kind", [ModelEma, ModelEmaV2, ModelEmaV3, AveragedModel])
def test_averages_are_those_of_the_plain_network(wrapped, data, kind):
    """The factor of W changes its size from update to update, and an average of W would not have its rank."""
    model = wrapped()
    plain = copy.deepcopy(model.backbone)
    averages = [kind(module, **({} if kind is AveragedModel else {"decay": 0.5})) for module in (model, plain)]
    optimizer = sgd(model)
    for batch in data(9):
        train(model, optimizer, [batch])
        plain.load_state_dict(model.backbone.state_dict())
        for average, source in zip(averages, (model, plain), strict=True):
            average.update_parameters(source) if kind is AveragedModel else average.update(source)
    averaged, expected = (average.ema if kind is ModelEma else average.module for average in averages)
    assert same(averaged.unwrap().state_dict(), expected.state_dict())
    assert not same(averaged.unwrap().state_dict(), model.unwrap().state_dict())
    assert any(name.startswith("branches.") for name in model.state_dict()), "left out of averages alone"


# a loop that forgets half of the branch is told so, once


def warned(action, *arguments, **options):
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action(*arguments, **options)
    return [str(w.message) for w in caught if issubclass(w.category, LowRankWarning)]


def loop(model, steps=FORWARDS_BEFORE_WARNING, *, called=None, penalty=False, update=False):
    """Training without an optimizer; `called` is what is called around the model."""
    for _ in range(steps):
        (model if called is None else called)(torch.rand(8, 1, 8, 8))
        if penalty:
            model.penalty()
        if update:
            model.update()


def test_a_penalty_that_is_never_used(wrapped):
    model = wrapped()
    assert warned(loop, model, FORWARDS_BEFORE_WARNING - 1) == []
    (message,) = warned(loop, model, 1)
    assert f"no effect: {FORWARDS_BEFORE_WARNING} training forwards passed, but penalty() was never called" in message
    assert "add model.penalty() to the loss, or use timm_lowrank.LossHook" in message
    assert warned(loop, model, 2 * FORWARDS_BEFORE_WARNING) == [], "once is enough"


def test_an_update_that_is_never_called(wrapped):
    model = wrapped()
    assert warned(loop, model, 64, penalty=True) == [], "so many batches may be accumulated"
    model.update()
    model = wrapped()
    (message,) = warned(loop, model, STEPS_BEFORE_WARNING + 50, penalty=True)
    assert f"penalty() was called {STEPS_BEFORE_WARNING} times, but update() never" in message
    assert "call model.update() after optimizer.step(), or timm_lowrank.attach(optimizer, model)" in message


def test_right_loops_and_forwards_that_are_no_training_hear_nothing(wrapped):
    assert warned(loop, wrapped(), 2 * FORWARDS_BEFORE_WARNING, penalty=True, update=True) == [], "as it should be"
    model = wrapped().enable(False)
    assert warned(loop, model) == []
    model.enable().eval()
    assert warned(loop, model) == []
    model.train()
    assert warned(loop, model, 3) == []
    assert warned(model.eval) == [], "a few forwards before an evaluation are no training"
    assert len(warned(loop, model.train(), FORWARDS_BEFORE_WARNING - 3)) == 1


def test_one_penalty_for_several_forwards(wrapped, data):
    """The last one counts, and that is said once."""
    model = wrapped()
    (first, _), (second, _) = data(2)
    model(first)
    model(second)
    (message,) = warned(model.penalty)
    assert "2 training forwards before one penalty(): only the last one's activations count" in message
    model(first)
    model(second)
    assert warned(model.penalty) == []
    alone = wrapped()
    for each in (first, second):  # as the message says
        alone(each)
        assert warned(alone.penalty) == []


def test_forwards_without_gradients_are_no_training(wrapped, data):
    model, twin = wrapped(), wrapped()
    (images, _), (others, _) = data(2)
    with torch.no_grad():
        assert warned(loop, model, 2 * FORWARDS_BEFORE_WARNING) == [], "as torch.optim.swa_utils.update_bn does"
        assert warned(model.eval) == []
    model.train()(images)
    with torch.no_grad():
        model(others)
    twin(images)
    assert torch.equal(model.penalty(), twin.penalty()), "of the forward that learns"


def test_a_frozen_teacher_hears_nothing_and_keeps_no_forward_waiting(wrapped, data, recwarn):
    model = wrapped()
    teacher = copy.deepcopy(model).requires_grad_(False)
    for images, _ in data(FORWARDS_BEFORE_WARNING + 2):
        loss = nn.functional.mse_loss(model(images), teacher(images)) + model.penalty()
        loss.backward()
        model.update()
    assert not [str(one.message) for one in recwarn]
    teacher(images)
    assert torch.isfinite(teacher.penalty())  # may be looked at
    with pytest.raises(CaptureError, match="needs a forward"):
        teacher.penalty()


def test_a_penalty_without_gradients_is_of_the_forward_there_and_uses_none_up(wrapped, data):
    model, twin = wrapped(), wrapped()
    (images, _), (others, _) = data(2)
    model(images)
    with torch.no_grad():
        model(others)
        looked_at = model.penalty()
        twin(others)
        assert torch.equal(looked_at, twin.penalty())
    twin(images)
    assert torch.equal(model.penalty(), twin.penalty())


def test_what_waits_for_an_update_is_dropped_at_switch_off(wrapped, data):
    model = wrapped(update_rows=None)
    (images, _), (others, _) = data(2)
    twin = copy.deepcopy(model)
    model(images)
    model.penalty()
    model.enable(False)
    assert not any(branch.waiting for branch in model.branches.values())
    for one in (model.enable(), twin):
        one(others)
        one.penalty()
        one.update()
    assert_close_branches(model, twin, atol=1e-6)


def test_in_inference_mode(wrapped, data):
    """As validation loops have it, Lightning's among them; and BatchNorms are calibrated in train mode there."""
    model, ((images, _),) = wrapped(), data(1)
    embedder = tlr.Embedder(train_once(model, images), "body", size=2, images=images).eval()
    with torch.no_grad():
        expected = embedder(images)
        with model.eval().capture() as activations:
            model(images)
    with torch.inference_mode():
        assert torch.equal(embedder(images), expected)
        with model.capture() as recorded:
            model(images)
        assert recorded.keys() == activations.keys()
        assert all(torch.equal(recorded[layer], activations[layer]) for layer in activations)
        assert model.train()(images).shape == (16, 10)
        assert tlr.wrap(wrapped().unwrap(), config(), example_input=images)(images).shape == (16, 10)
        assert tlr.list_layers(wrapped().unwrap(), images=images)


def train_once(model, images):
    model.train()(images)
    model.penalty()
    model.update()
    model.branches["body"].project()
    return model


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_no_name_by_which_wrappers_are_taken_off_leads_past_the_branches(wrapped, name):
    model = wrapped()
    setattr(model.backbone, name, nn.Identity())
    assert not hasattr(model, name)


def test_a_compiled_backbone_inside_the_wrapper_keeps_its_branches(digits, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    model = tlr.wrap(network, config({"layer3": 4}), example_input=digits[0][:2]).train()
    model.backbone = torch.compile(model.backbone, backend="eager")
    model(digits[0][:16])
    model.penalty()
    model.update()
    assert any("branches" in key for key in timm.utils.get_state_dict(model))
    tlr.save_pretrained(model, tmp_path / "saved")
    loaded = tlr.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.branches["layer3"].dense_weight(), model.branches["layer3"].dense_weight())


def test_torchs_checkpoints_take_the_branches_of_a_model_that_is_not_sharded(wrapped, data, tmp_path):
    model, fresh, loaded = wrapped(), wrapped(), wrapped()
    train(model, sgd(model), data(5))
    set_model_state_dict(fresh, get_model_state_dict(model))
    assert_close_branches(fresh, model, atol=0)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=tmp_path / "saved")
    state = {"model": get_model_state_dict(loaded)}
    dcp.load(state, checkpoint_id=tmp_path / "saved")
    set_model_state_dict(loaded, state["model"])
    assert_close_branches(loaded, model, atol=0)
    assert all("_extra_state" not in key for key in model.state_dict())


@pytest.mark.parametrize("name", ["values", "keys", "items", "update"])
def test_a_layer_may_have_the_name_of_a_method_of_a_dictionary(name):
    network = nn.Sequential()
    for layer, part in (("first", nn.Linear(6, 5)), (name, nn.Linear(5, 5)), ("last", nn.Linear(5, 3))):
        network.add_module(layer, part)
    model, twin = (
        tlr.wrap(copy.deepcopy(network), config({name: 2, "first": 2}), example_input=torch.rand(2, 6)).train()
        for _ in range(2)
    )
    assert list(model.branches) == [name, "first"]
    assert name in model.branches
    model(torch.rand(4, 6))
    model.penalty()
    model.update()
    twin.load_state_dict(model.state_dict())
    assert_close_branches(twin, model, atol=0)


@pytest.mark.parametrize("used", [True, False])
def test_a_compiled_network_is_told_when_training_pauses(wrapped, used):
    model = wrapped()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    steps = 3 if used else 2 * FORWARDS_BEFORE_WARNING
    for expected in (not used, False):
        assert warned(loop, model.train(), steps, called=compiled, penalty=used, update=used) == []
        messages = warned(model.eval)
        assert len(messages) == expected
        assert all("a compiled network was trained, but penalty() was never called" in text for text in messages)


# ------------------------------------------------------------------------------------------------------------ its cost


class Operations(TorchDispatchMode):
    """How many operations are dispatched, but for views and for tensors that nothing is written into."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        makes_view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        name = func.overloadpacket.__name__
        self.count += func.namespace == "aten" and not makes_view and "empty" not in name and name != "_unsafe_view"
        return func(*args, **(kwargs or {}))


def operations_of_a_step(model, batches, labelled):
    """Of the last of some training steps, without a projection."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for images, labels in batches:
        with Operations() as operations:
            loss = nn.functional.cross_entropy(model(images), labels)
            if isinstance(model, LowRankModel):
                loss = loss + model.penalty(labels if labelled else None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if isinstance(model, LowRankModel):
                model.update()
    return operations.count


@pytest.mark.parametrize("update_rows", [6, 64])
@pytest.mark.parametrize(("head_weight", "most"), [(0.0, 95), (0.3, 144)])
def test_a_branch_adds_few_operations_to_a_step(wrapped, small_net, data, update_rows, head_weight, most):
    """Each of them is a launch on a GPU, and launches are what bounds the step of a small network there."""
    values = {"scale": "reference", "update_rows": update_rows, "head_weight": head_weight}
    model = wrapped({"body": 5}, **values)
    added = operations_of_a_step(model, data(11), head_weight) - operations_of_a_step(
        small_net().train(), data(11), False
    )
    assert 0 < added <= most
