"""`save_pretrained`: what lies in the folder, who can load it, and that a failed write costs nothing."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import timm_lowrank as tlr
from timm_lowrank import LowRankConfig, checkpoint, save_pretrained

FILES = {"config.json", "model.safetensors", "lowrank.json", "lowrank.safetensors"}


def images(size=32, count=4):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    """A wrapped network after five updates, one more than a projection."""
    config = LowRankConfig(
        branches={"layer3": {"rank": 6, "norm_weight": 0.1}, "pre_logits": 4}, project_every=4, seed=5
    )
    model = tlr.wrap("test_resnet", config, num_classes=3, example_input=images()).train()
    for seed in range(5):
        torch.manual_seed(seed)
        (model(images() + torch.randn(4, 3, 32, 32)).square().mean() + model.penalty()).backward()
        model.update()
    return model.eval()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(folder, **options):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def test_timm_loads_the_network_without_this_package_s_help(model, tmp_path):
    assert save_pretrained(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    network = loaded(tmp_path / "new" / "folder")
    assert type(network) is type(model.unwrap())
    assert torch.equal(network(images()), model(images()))
    assert network.state_dict().keys() == timm.create_model("test_resnet", num_classes=3).state_dict().keys()


def test_what_lies_in_the_folder(model, tmp_path):
    save_pretrained(model, str(tmp_path))
    assert contents(tmp_path).keys() == FILES, "nothing temporary and no pickle"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "test_resnet"
    assert config["num_classes"] == 3
    assert "num_classes" not in config.get("model_args", {})
    assert not any(key.startswith("backbone.") for key in load_file(tmp_path / "model.safetensors"))


def test_the_branches_can_be_had_back(model, tmp_path):
    save_pretrained(model, tmp_path)
    description = json.loads((tmp_path / "lowrank.json").read_text())
    assert description["format"] == checkpoint.FORMAT
    assert description["layers"] == {
        layer: {"rank": branch.rank, "num_features": branch.num_features} for layer, branch in model.branches.items()
    }
    config = LowRankConfig.from_dict(description["config"])
    assert config == model.lowrank_config
    again = tlr.wrap(loaded(tmp_path), config, example_input=images())
    again.branches.load_state_dict(load_file(tmp_path / "lowrank.safetensors"))
    for layer, branch in model.branches.items():
        assert torch.equal(again.branches[layer].dense_weight(), branch.dense_weight())
        assert torch.equal(again.branches[layer].bias, branch.bias)
        assert again.branches[layer].updates == 5
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("storage", ["factored", "dense"])
def test_branches_that_never_saw_a_batch_are_saved_too(tmp_path, storage):
    config = LowRankConfig(branches={"layer3": 3, "pre_logits": 2}, storage=storage)
    model = tlr.wrap("test_resnet", config, example_input=images(16))
    save_pretrained(model, tmp_path)
    twin = tlr.wrap("test_resnet", config, example_input=images(16))
    twin.branches.load_state_dict(load_file(tmp_path / "lowrank.safetensors"))
    assert twin.branches["layer3"].effective_rank() == 0


def test_transformers_load_it_as_well(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_pretrained(model, tmp_path)
    network = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.allclose(network(images()).logits, model(images()), atol=1e-6)


def test_labels_and_images_are_described(model, tmp_path):
    data = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    save_pretrained(model, tmp_path, label_names=["cat", "dog", "ship"], data_config=data)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"] == ["cat", "dog", "ship"]
    described = loaded(tmp_path).pretrained_cfg
    assert tuple(described["input_size"]) == (3, 32, 32)
    assert tuple(described["mean"]) == (0.1, 0.2, 0.3)
    assert tuple(described["std"]) == (0.4, 0.5, 0.6)
    assert tuple(described["label_names"]) == ("cat", "dog", "ship")


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("test_vit", {"img_size": 32}, 32),
        ("resnet10_cifar", {"channels": [8, 8, 8, 8]}, 32),
    ],
)
def test_arguments_of_the_architecture_travel_along(tmp_path, name, options, size):
    model = tlr.wrap(name, LowRankConfig(branches={"pre_logits": 3}), num_classes=3, **options).eval()
    save_pretrained(model, tmp_path)
    assert torch.equal(loaded(tmp_path)(images(size)), model(images(size)))


def test_channels_last(model, tmp_path):
    expected = model(images())
    model.to(memory_format=torch.channels_last)
    save_pretrained(model, tmp_path)
    assert torch.allclose(loaded(tmp_path)(images()), expected, atol=1e-6)
    assert model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last), "the model itself stays as it is"


def test_a_plain_network_has_two_files_and_no_branches_of_another(model, tmp_path):
    save_pretrained(model, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    network = timm.create_model("test_resnet", num_classes=7).eval()
    save_pretrained(network, tmp_path)
    assert contents(tmp_path).keys() == {"config.json", "model.safetensors", "README.md"}
    assert (tmp_path / "README.md").read_text() == "mine"
    assert torch.equal(loaded(tmp_path)(images()), network(images()))


def test_writing_twice_replaces(model, tmp_path):
    save_pretrained(model, tmp_path)
    with torch.no_grad():
        model.fc.bias += 1.0
    save_pretrained(model, tmp_path)
    assert contents(tmp_path).keys() == FILES
    assert torch.equal(loaded(tmp_path)(images()), model(images()))


def test_saving_changes_nothing(model, tmp_path):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cfg = dict(model.unwrap().pretrained_cfg)
    save_pretrained(model, tmp_path, label_names=["a", "b", "c"], data_config={"input_size": (3, 32, 32)})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert dict(model.unwrap().pretrained_cfg) == cfg


# errors


def test_a_network_that_is_not_timm_s(tmp_path, small_net):
    wrapped = tlr.wrap(small_net(), LowRankConfig(branches={"body": 2}), example_input=torch.zeros(1, 1, 8, 8))
    for network in (wrapped, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"is no timm network.*save its state_dict\(\)"):
            save_pretrained(network, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("labels", [[], ["a", "b"], ["a", "b", "c", "d"]])
def test_a_wrong_number_of_labels(model, tmp_path, labels):
    with pytest.raises(ValueError, match=f"{len(labels)} label names for 3 classes"):
        save_pretrained(model, tmp_path / "folder", label_names=labels)
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_cannot_be(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(OSError, match="file"):
            save_pretrained(model, folder)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "where", ["timm_lowrank.checkpoint.save_file", "timm.models.save_for_hf", "timm_lowrank.checkpoint._write_branches"]
)
def test_a_failed_write_leaves_the_old_files_as_they_were(model, tmp_path, monkeypatch, where):
    save_pretrained(model, tmp_path)
    before = contents(tmp_path)
    with torch.no_grad():
        model.fc.bias += 1.0

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(model, tmp_path)
    assert contents(tmp_path) == before
