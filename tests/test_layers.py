"""Layers by name on many families of networks: presets, widths, the table of the command line, and every wrong name."""

import json
import re

import pytest
import timm
import torch
from torch import nn

import timm_lowrank as tlr
from timm_lowrank import CaptureError, LowRankConfig, list_layers
from timm_lowrank.__main__ import main

# name, keyword arguments, image size, layer and width of the input of the last stage, width before the classifier
FAMILIES = [
    ("test_resnet", {}, 32, "layer3", 192 * 2 * 2, 96),
    ("test_vit", {"img_size": 32}, 32, "blocks.4", 64, 64),
    ("test_convnext", {}, 64, "stages.2", 48 * 4 * 4, 64),
    ("test_efficientnet", {}, 32, "blocks.3", 48 * 2 * 2, 256),
    ("mobilenetv3_small_050", {}, 32, "blocks.3", 24 * 2 * 2, 1024),
    ("densenet121", {"growth_rate": 8, "block_config": (2, 2, 2, 2)}, 32, "features.denseblock3", 32 * 2 * 2, 32),
]


def images(size, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def branch_on(layer, rank=3):
    return LowRankConfig(branches={layer: rank}, warmup_updates=0)


@pytest.mark.parametrize(("name", "options", "size", "stage", "stage_width", "width"), FAMILIES)
def test_presets(name, options, size, stage, stage_width, width, recwarn):
    model = tlr.wrap(name, LowRankConfig(branches="2-LR"), example_input=images(size), num_classes=3, **options).train()
    sizes = {layer: (branch.num_features, branch.rank) for layer, branch in model.branches.items()}
    assert list(sizes) == [stage, "pre_logits"]
    rank = min(500, stage_width // 4) if model.branches[stage].view.kind == "token" else min(500, stage_width)
    assert sizes[stage] == (stage_width, rank)
    assert sizes["pre_logits"] == (width, min(100, width))
    short = [layer for layer, rank in ((stage, rank), ("pre_logits", 100)) if sizes[layer][0] <= rank]
    messages = [str(w.message) for w in recwarn if "capped" in str(w.message)]
    assert len(messages) == bool(short)
    assert all(repr(layer) in messages[0] for layer in short)
    # What the branch sees in training is what enters the last stage and the classifier.
    batch = images(size, 4)
    output = model(batch)
    assert output.shape == (4, 3)
    (output.square().mean() + model.penalty()).backward()
    model.update()
    assert all(branch.updates == 1 for branch in model.branches.values())
    assert torch.equal(model.eval()(batch), model.unwrap()(batch))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit"])
def test_pre_logits_is_the_input_of_the_classifier(name):
    options = {"img_size": 64} if "vit" in name else {}
    model = tlr.wrap(name, branch_on("pre_logits"), example_input=images(64), num_classes=3, **options).eval()
    with model.capture() as seen, torch.no_grad():
        logits = model(images(64))
    assert torch.allclose(model.get_classifier()(seen["pre_logits"]), logits)


def test_of_several_classifiers_the_first_counts():
    """A distilled network has one for the labels and one for the teacher."""
    options = {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 2, "num_classes": 3}
    model = tlr.wrap("deit_tiny_distilled_patch16_224", branch_on("pre_logits"), **options)
    assert isinstance(model.get_classifier(), tuple)
    assert [tap.path for tap in model.taps] == ["head"]
    model.train()(images(32))
    assert float(model.penalty().detach()) > 0


@pytest.mark.parametrize(
    ("name", "view", "example", "options", "width"),
    [
        ("test_resnet", None, 32, {}, 192 * 2 * 2),
        ("test_resnet", None, 64, {}, 192 * 4 * 4),
        ("test_resnet", None, None, {}, 192 * 10 * 10),  # 160 px, of the pretrained_cfg
        ("test_vit", None, None, {"img_size": 32, "in_chans": 1}, 64),  # a token is a sample
        ("test_vit", "flatten", None, {"img_size": (32, 64)}, 9 * 64),
    ],
)
def test_example_inputs_decide_the_width(name, view, example, options, width):
    layer = "layer3" if name == "test_resnet" else "blocks.1"
    config = LowRankConfig(branches={layer: {"rank": 3, "view": view}})
    model = tlr.wrap(name, config, example_input=images(example, 1) if example else None, **options)
    assert model.branches[layer].num_features == width


def test_a_network_of_another_size_than_its_configuration_says():
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2)
    with pytest.raises(ValueError, match=r"does not take an image of \(3, 224, 224\).*pass example_input=images"):
        tlr.wrap(network, branch_on("blocks.0"))
    model = tlr.wrap(network, branch_on("blocks.0"), example_input=images(32))
    assert model.branches["blocks.0"].num_features == 24


def test_finding_layers_changes_nothing():
    network = timm.create_model("test_resnet", num_classes=3, drop_rate=0.5).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    stream = torch.get_rng_state()
    for training in (True, False):
        network.train(training)
        model = tlr.wrap(network, LowRankConfig(branches={"layer3": 3, "pre_logits": 3}), example_input=images(32))
        list_layers(network, images=images(32))
        assert model.unwrap() is network
        assert model.training == network.training == training
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


# Hugging Face transformers


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}


@pytest.mark.parametrize(
    ("family", "options", "layer", "width", "classifier_width"),
    [
        ("ResNet", RESNET, "resnet.encoder.stages.0", 8 * 8 * 8, 16),
        ("ViT", {**VIT, "patch_size": 8}, "vit.embeddings", 24, 24),
    ],
)
def test_transformers(family, options, layer, width, classifier_width):
    transformers = pytest.importorskip("transformers")
    configuration = getattr(transformers, f"{family}Config")(num_labels=3, **options)
    network = getattr(transformers, f"{family}ForImageClassification")(configuration)
    config = LowRankConfig(branches={layer: 5, "pre_logits": 4}, project_every=2)
    model = tlr.wrap(network.train(), config, example_input=images(32))
    assert model.branches[layer].num_features == width
    assert model.branches["pre_logits"].num_features == classifier_width
    labels = torch.tensor([0, 2, 1, 1])
    for _ in range(4):
        output = model(pixel_values=images(32, 4), labels=labels)
        (output.loss + model.penalty()).backward()
        model.update()
    assert output.logits.shape == (4, 3)
    assert all(branch.updates == 4 for branch in model.branches.values())
    with model.eval().capture() as seen, torch.no_grad():
        logits = model(images(32)).logits
    classifier = network.classifier if isinstance(network.classifier, nn.Linear) else network.classifier[-1]
    assert torch.allclose(classifier(seen["pre_logits"]), logits)
    assert {"pre_logits", layer} <= {info.name for info in list_layers(network, images=images(32))}


# lists


def test_list_layers():
    listed = list_layers("resnet18", images=images(32))
    by_name = {info.name: info for info in listed}
    assert len(by_name) == len(listed)
    assert by_name["layer3"] == tlr.LayerInfo("layer3", "Sequential", (256, 2, 2), 1024, "flatten")
    assert by_name["layer4.1.conv2"].kind == "Conv2d"
    assert by_name["fc"].shape == (1000,)
    assert listed[-1] == tlr.LayerInfo("pre_logits", "input of fc", (512,), 512, "flatten")
    order = list(by_name)
    assert order.index("conv1") < order.index("layer1.0.conv1") < order.index("layer3") < order.index("fc")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_branch_can_sit_on_every_layer_that_is_listed(name):
    options = {"img_size": 32} if "vit" in name else {}
    network = timm.create_model(name, **options).train()
    listed = list_layers(network, images=images(32))
    assert len(listed) > 25
    config = LowRankConfig(branches={info.name: 1 for info in listed})
    model = tlr.wrap(network, config, example_input=images(32))
    assert {layer: branch.num_features for layer, branch in model.branches.items()} == {i.name: i.width for i in listed}


def test_layers_of_a_module_that_is_not_timm_s(small_net):
    listed = list_layers(small_net(), images=torch.zeros(2, 1, 8, 8))
    names = [info.name for info in listed if "." not in info.name]
    assert names == ["stem", "body", "hidden", "act", "classifier", "pre_logits"]
    with pytest.raises(ValueError, match="input size of a SmallNet is not known; pass images=images"):
        list_layers(small_net())


def test_layers_that_give_no_activations_are_not_listed():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)
            self.twice, self.spare, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.twice(self.twice(self.lstm(x)[0][:, -1])))

    network, x = Odd(), torch.zeros(3, 5, 4)
    assert [info.name for info in list_layers(network, images=x)] == ["head", "pre_logits"]
    for layer, message in {"lstm": "gives a tuple", "twice": "ran 2 times", "spare": "did not run"}.items():
        with pytest.raises(CaptureError, match=f"'{layer}' {message}"):
            tlr.wrap(network, LowRankConfig(branches={layer: 1}), example_input=x)


# the command line


def test_the_table_of_the_command_line(capsys):
    assert main(["layers", "resnet18", "--model-args", '{"in_chans": 1}']) == 0
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    lines = [line.split() for line in table]
    assert lines[0] == ["layer", "kind", "shape", "view", "width"]
    assert ["layer3", "Sequential", "256", "x", "14", "x", "14", "flatten", "50,176"] in lines
    assert lines[-1] == ["pre_logits", "input", "of", "fc", "512", "flatten", "512"]
    assert len({len(line) for line in table}) == 1, "columns are aligned"


def test_options_of_the_table(capsys):
    counts = []
    for depth in ("1", "2", "0"):
        assert main(["layers", "test_vit", "--depth", depth, "--model-args", json.dumps({"img_size": 32})]) == 0
        printed = capsys.readouterr().out
        assert ("5 x 64" in printed) or depth == "1"
        counts.append(len(printed.splitlines()))
    assert counts[0] < counts[1] < counts[2]
    with pytest.raises(SystemExit) as caught:
        main(["layers", "resnet18", "--model-args", "{not json"])
    assert caught.value.code == 2


# wrong names


@pytest.mark.parametrize("name", ["resnet19", "resnt18.a1_in1k"])
def test_an_unknown_timm_name_lists_the_nearest(name):
    with pytest.raises(ValueError, match=rf"has no model '{re.escape(name)}'\. Did you mean: .*resnet18"):
        tlr.wrap(name)


def test_all_unknown_layers_are_named_with_the_nearest():
    each = [r"ResNet has no layer 'layer33'\. Did you mean: layer3.*", r"'prelogits'\. Did you mean: pre_logits.*"]
    with pytest.raises(ValueError, match="; .*".join([*each, "'stem.conv'"])) as caught:
        tlr.wrap("test_resnet", LowRankConfig(branches={"layer33": 5, "layer3": 5, "prelogits": 3, "stem.conv": 2}))
    assert "no layer 'layer3'" not in str(caught.value)


def test_a_layer_that_a_dropout_overwrites_in_training_is_named_before():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.inner = nn.AdaptiveAvgPool2d(4), nn.Linear(48, 12)
            self.classifier = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(12, 3))

        def forward(self, x):
            return self.classifier(self.inner(self.pool(x).flatten(1)))

    state = torch.get_rng_state()
    with pytest.raises(CaptureError, match="'inner' was overwritten in place"):
        tlr.wrap(Dropping(), branch_on("inner"), example_input=images(32))
    torch.set_rng_state(state)
    network = Dropping()
    state = torch.get_rng_state()
    model = tlr.wrap(network, branch_on("classifier.0"), example_input=images(32))
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    model.train()(images(32))
    model.penalty(torch.tensor([0, 1]))


def test_a_module_of_two_names_can_be_named_by_either():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = timm.create_model("test_resnet", num_classes=3)
            self.features = nn.Sequential(*list(self.base.children())[:-2])

        def forward(self, x):
            return self.base.fc(self.features(x).mean(dim=(2, 3)))

    network = Doubled()
    number = [module is network.base.layer3 for module in network.features].index(True)
    one, two = (
        tlr.wrap(network, branch_on(layer), example_input=images(32)).train()
        for layer in ("base.layer3", f"features.{number}")
    )
    penalties = []
    for model in (one, two):
        model(images(32))
        penalties.append(model.penalty(torch.tensor([0, 1])))
    assert torch.equal(*penalties)


def test_a_layer_may_have_a_slash_in_its_name(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.ModuleDict({"conv1/3x3_s2": nn.Conv2d(3, 4, 3, stride=2)})
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.stem["conv1/3x3_s2"](x).mean(dim=(2, 3)))

    layer, labels = "stem.conv1/3x3_s2", torch.tensor([0, 1])
    model = tlr.wrap(Named(), branch_on(layer), example_input=images(8)).train()
    for _ in range(10):
        model(images(8))
        model.penalty(labels)
        model.update()
    assert list(model.branches) == list(model.report()) == [layer]
    assert len(tlr.Embedder(model, layer)(images(8))) == 2
    again = tlr.wrap(Named(), branch_on(layer), example_input=images(8))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.branches[layer].bias, model.branches[layer].bias)


def test_a_module_that_is_called_pre_logits_is_not_what_the_name_means():
    layers = list_layers("vgg19_bn_cifar", width=0.1, hidden_size=24, images=images(32))
    (listed,) = [layer for layer in layers if layer.name == "pre_logits"]
    assert (listed.kind, listed.shape) == ("input of head.fc", (24,))


def test_a_rank_that_is_larger_than_the_layer():
    wide = {"pre_logits": 65, "blocks.1": 1000}
    each = [f"rank {rank} is larger than the 64 features of layer '{layer}'; " for layer, rank in wide.items()]
    with pytest.raises(ValueError, match="".join(["^", *each, "a branch needs"])):
        tlr.wrap("test_vit", LowRankConfig(branches={"blocks.2": 5, **wide}), img_size=32)


def test_a_network_without_a_classifier_has_no_pre_logits():
    """The error names a layer that can be used; listing the layers works without a classifier."""
    network = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(ValueError, match=r"has no classifier \(an encoder, .*name a layer.*branches=\{'layer4': 50\}"):
        tlr.wrap(network, example_input=images(32))
    assert {info.name for info in list_layers(network, images=images(32))} & {"layer4", "pre_logits"} == {"layer4"}
    assert list(tlr.wrap(network, branch_on("layer4"), example_input=images(32)).branches) == ["layer4"]


class Squeeze(nn.Module):
    """A squeeze-and-excitation layer."""

    def __init__(self, channels, squeezed=4):
        super().__init__()
        self.reduce, self.expand = nn.Linear(channels, squeezed), nn.Linear(squeezed, channels)

    def forward(self, maps):
        return maps * self.expand(self.reduce(maps.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


class Classified(nn.Module):
    """Three convolutions with a squeeze layer between them, and a head."""

    def __init__(self, head, after=lambda logits: logits):
        super().__init__()
        self.conv, self.squeeze, self.deep = nn.Conv2d(3, 10, 3, 2), Squeeze(10), nn.Conv2d(10, 16, 3, 2)
        self.head, self.after = head, after

    def forward(self, maps):
        return self.after(self.head(self.deep(self.squeeze(self.conv(maps)))))


class LastSqueeze(Classified):
    """A classifier whose logits are gated by an auxiliary layer that runs after it, with as many features."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)))
        self.auxiliary = nn.Linear(10, 10)

    def forward(self, maps):
        logits = super().forward(maps)
        self.auxiliary(logits)
        return logits


def pooled(maps):
    return maps.mean((2, 3))


@pytest.mark.parametrize(
    ("network", "path", "width"),
    [
        (lambda: Classified(nn.Conv2d(16, 10, 1), pooled), "head", 16 * 49),
        (lambda: Classified(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 10, 1), nn.Flatten())), "head.1", 16),
        (
            lambda: Classified(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), lambda x: x.softmax(1)),
            "head.1",
            784,
        ),
        (lambda: Classified(nn.Conv2d(16, 10, 1), lambda maps: {"logits": pooled(maps)}), "head", 16 * 49),
        (lambda: Classified(nn.Conv2d(16, 10, 1), lambda maps: (pooled(maps), maps)), "head", 16 * 49),
        (LastSqueeze, "head.2", 16),
    ],
    ids=["convolution", "pooled", "softmax", "dictionary", "tuple", "a layer that runs after it"],
)
@pytest.mark.parametrize("pretrained_cfg", [False, True])
def test_pre_logits_of_a_network_that_is_not_timms_is_the_input_of_what_gives_the_logits(
    network, path, width, pretrained_cfg
):
    network = network()
    if pretrained_cfg:  # a network of one's own that says what images it takes
        network.pretrained_cfg = {"input_size": (3, 32, 32)}
    model = tlr.wrap(network, branch_on("pre_logits", 3), example_input=None if pretrained_cfg else images(32))
    assert [tap.path for tap in model.taps] == [path]
    assert model.branches["pre_logits"].num_features == width


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()),
            r"gives 144 logits, and no linear layer or convolution of its own gives them",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), r"gives no logits \(batch, classes\)"),
    ],
)
def test_what_cannot_be_told_is_asked_for(network, message):
    with pytest.raises(ValueError, match=message + r".*name a layer instead, for example branches=\{'0': 1\}"):
        tlr.wrap(network(), example_input=images(8))
    with pytest.raises(ValueError, match=r'"2-LR" needs timm.*branches=\{"[01]": 500'):
        tlr.wrap(network(), LowRankConfig(branches="2-LR"), example_input=images(8))


class CosineHead(nn.Module):
    """A classifier that is no layer, and a squeeze layer with as many features as there are classes."""

    def __init__(self):
        super().__init__()
        self.stem, self.squeeze, self.gate = nn.Conv2d(3, 16, 3, stride=4), nn.Linear(16, 10), nn.Linear(10, 16)
        self.weight = nn.Parameter(torch.randn(10, 16))

    def forward(self, maps):
        features = self.stem(maps).mean((2, 3))
        features = features * torch.sigmoid(self.gate(self.squeeze(features)))
        return nn.functional.linear(nn.functional.normalize(features), nn.functional.normalize(self.weight))


def test_a_squeeze_layer_is_not_taken_for_a_classifier_that_is_no_layer():
    with pytest.raises(ValueError, match=r"no linear layer or convolution of its own gives them.*name a layer instead"):
        tlr.wrap(CosineHead(), {"pre_logits": 4}, example_input=images(32))


class Handing(nn.Module):
    """A wrapper that hands on what it does not have, as a PeftModel does."""

    def __init__(self, network):
        super().__init__()
        self.model = network

    def forward(self, maps):
        return self.model(maps)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


@pytest.mark.filterwarnings("ignore:.*capped there", "ignore:.*more than half of the")
def test_a_wrapper_around_a_timm_network_has_its_stages():
    network = timm.create_model("test_resnet", num_classes=10)
    model = tlr.wrap(Handing(network), LowRankConfig(branches="2-LR"), example_input=images(32))
    assert list(model.branches) == ["model.layer3", "pre_logits"]


@pytest.mark.filterwarnings("ignore:.*capped there")
def test_a_peft_model_of_a_timm_network_has_its_stages():
    peft = pytest.importorskip("peft")
    network = timm.create_model("test_resnet", num_classes=10)
    adapted = peft.get_peft_model(network, peft.LoraConfig(target_modules=["conv2"], modules_to_save=["fc"]))
    model = tlr.wrap(adapted, LowRankConfig(branches="2-LR"), example_input=images(32))
    assert list(model.branches) == ["base_model.model.layer3", "pre_logits"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: 18, {}, r"a timm name or an nn\.Module is needed, not a int"),
        (lambda: timm.create_model("test_vit"), {"num_classes": 3}, r"num_classes: .* but the model exists already"),
        (lambda: tlr.wrap("test_vit", branch_on("blocks.1")), {}, r"wrapped already; wrap model\.unwrap\(\)"),
        (
            lambda: torch.compile(timm.create_model("test_vit"), backend="eager"),
            {},
            r"wrap .* first, and then torch\.compile",
        ),
        (
            lambda: nn.DataParallel(timm.create_model("test_vit")),
            {},
            r"nn\.DataParallel, .* model\.module, and use",
        ),
        (lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 3))), {}, r"a ScriptModule, .* wrap the network that"),
    ],
)
def test_wrong_models(model, options, message):
    with pytest.raises(TypeError, match=message):
        tlr.wrap(model(), **options)


@pytest.mark.filterwarnings("ignore:.*capped there")
def test_branches_by_themselves_stand_for_a_configuration():
    expected = tlr.wrap("test_resnet", LowRankConfig(branches="2-LR")).lowrank_config
    assert tlr.wrap("test_resnet", "2-LR").lowrank_config == expected
    assert tlr.wrap("test_resnet", {"layer3": 5}).lowrank_config == LowRankConfig(branches={"layer3": 5})
    with pytest.raises(TypeError, match=r"keywords alone: LowRankConfig\(branches='2-LR'\)"):
        LowRankConfig("2-LR")
    with pytest.raises(ValueError, match=r"branches=\['layer3'\] must name .* and its rank, such as \{'layer3': 500\}"):
        tlr.wrap("test_resnet", LowRankConfig(branches=["layer3"]))


def test_images_of_another_size_than_those_that_the_model_was_wrapped_with():
    model = tlr.wrap("test_resnet", LowRankConfig(branches={"layer3": 5}, head_weight=0.0)).train()
    model(images(32))
    with pytest.raises(ValueError, match=r"another image size\? .*example_input=images"):
        model.penalty()


def test_a_size_that_is_not_known():
    with pytest.raises(ValueError, match="input size of a Linear is not known"):
        tlr.wrap(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("name", "other", "inside"),
    [
        ("test_resnet", "global_pool", "layer3"),
        ("test_vit", "fc_norm", "blocks.1"),
        ("test_efficientnet", "global_pool", "blocks.3"),
    ],
)
def test_one_tensor_has_one_weight_whatever_it_is_called(name, other, inside, tmp_path):
    network = timm.create_model(name, num_classes=10)
    model = tlr.wrap(network, tlr.LowRankConfig(branches={other: 4, "pre_logits": 4, inside: 4}))
    weights = {layer: branch.config.reconstruction_weight for layer, branch in model.branches.items()}
    assert weights[other] == weights["pre_logits"] != weights[inside]
    tlr.save_pretrained(model, tmp_path)
    restored = tlr.from_pretrained(tmp_path)
    assert {layer: branch.config.reconstruction_weight for layer, branch in restored.branches.items()} == weights
