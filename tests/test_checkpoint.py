"""`save_pretrained`, `from_pretrained` and the branches in files: who can load them, and what is refused."""

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from states import same
from torch import nn

import timm_lowrank as tlr
from timm_lowrank import CheckpointError, LowRankConfig, LowRankModel, checkpoint, from_pretrained, save_pretrained
from timm_lowrank.checkpoint.files import CHECKPOINT_FILES, checked_name, remove_abandoned, staged
from timm_lowrank.errors import CheckpointDamagedError, CheckpointWriteError
from timm_lowrank.files import sha256_of

FILES = {"config.json", "model.safetensors", "lowrank.json", "lowrank.safetensors"}


def images(size=32, seed=0):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    """A wrapped network after five updates, one more than a projection."""
    config = LowRankConfig(
        branches={"layer3": {"rank": 6, "norm_weight": 0.1}, "pre_logits": 4}, project_every=4, seed=5
    )
    model = tlr.wrap("test_resnet", config, num_classes=3, example_input=images()).train()
    for seed in range(5):
        train_step(model, seed)
    return model.eval()


def train_step(model, seed):
    """One step of SGD and the branches, on data that depends on the seed alone."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    (model(images(seed=seed)).square().mean() + model.penalty()).backward()
    optimizer.step()
    model.update()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(folder, **options):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def read(folder, name="lowrank.json"):
    return json.loads((folder / name).read_text())


def rewrite(path, **changes):
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(source, match, **options):
    with pytest.raises(CheckpointError, match=match):
        from_pretrained(source, **options)


@pytest.fixture
def folder(model, tmp_path):
    """A saved `model`, and nothing else."""
    return save_pretrained(model, tmp_path / "checkpoint")


def test_what_lies_in_the_folder(model, tmp_path):
    folder = tmp_path / "new" / "folder"
    assert save_pretrained(model, str(folder)) == folder
    assert contents(folder).keys() == FILES, "nothing temporary and no pickle"
    config = read(folder, "config.json")
    assert (config["architecture"], config["num_classes"]) == ("test_resnet", 3)
    assert "num_classes" not in config.get("model_args", {})
    assert same(load_file(folder / "model.safetensors"), model.unwrap().state_dict())
    description = read(folder)
    assert description["format"] == 1
    assert LowRankConfig.from_dict(description["config"]) == model.lowrank_config
    assert description["layers"] == {
        "layer3": {"rank": 6, "num_features": 768, "view": "flatten", "channel_dim": 1, "updates": 5},
        "pre_logits": {"rank": 4, "num_features": 96, "view": "flatten", "channel_dim": -1, "updates": 5},
    }
    assert same(load_file(folder / "lowrank.safetensors"), model.branches.state_dict())
    assert torch.equal(loaded(folder)(images()), model(images()))


def test_arguments_of_the_architecture_travel_along(tmp_path):
    config = LowRankConfig(branches={"pre_logits": 3})
    model = tlr.wrap("resnet10_cifar", config, num_classes=3, channels=[8, 8, 8, 8]).eval()
    save_pretrained(model, tmp_path)
    assert torch.equal(loaded(tmp_path)(images()), model(images()))


def test_rates_of_dropout_and_stochastic_depth_are_kept(tmp_path):
    rates = {"drop_rate": 0.3, "drop_path_rate": 0.2, "attn_drop_rate": 0.1}
    model = tlr.wrap("test_vit", LowRankConfig(branches={"pre_logits": 3}), num_classes=3, img_size=32, **rates)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    for network in (model, again, timm.create_model(f"local-dir:{tmp_path}", pretrained=True)):
        block = network.blocks[-1]
        assert (network.head_drop.p, block.attn.attn_drop.p) == (0.3, 0.1)
        assert block.drop_path1.drop_prob == pytest.approx(0.2)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, drop_rate=0.0).head_drop.p == 0


def test_channels_last(model, tmp_path):
    model.to(memory_format=torch.channels_last)
    save_pretrained(model, tmp_path)
    assert same(loaded(tmp_path).state_dict(), model.unwrap().state_dict())
    assert model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last), "the model itself stays as it is"


def test_writing_again_replaces_and_a_plain_network_leaves_no_branches_of_another(model, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save_pretrained(model, tmp_path)
    with torch.no_grad():
        model.fc.bias += 1.0
    save_pretrained(model, tmp_path)
    assert contents(tmp_path).keys() == {*FILES, "README.md"}
    assert torch.equal(loaded(tmp_path)(images()), model(images()))
    network = timm.create_model("test_resnet", num_classes=7).eval()
    save_pretrained(network, tmp_path)
    assert contents(tmp_path).keys() == {"config.json", "model.safetensors", "README.md"}
    assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.warns(UserWarning, match=r"holds no lowrank.json: loaded as a plain network.*wrap"):
        again = from_pretrained(tmp_path)
    assert (type(again), again.training) == (type(network), False)
    assert torch.equal(again(images()), network(images()))


def test_saving_changes_nothing(model, tmp_path):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cfg = dict(model.unwrap().pretrained_cfg)
    save_pretrained(model, tmp_path, label_names=["a", "b", "c"], data_config={"input_size": (3, 32, 32)})
    assert same(before, model.state_dict())
    assert dict(model.unwrap().pretrained_cfg) == cfg


# errors


def test_what_cannot_be_saved(model, tmp_path, small_net):
    wrapped = tlr.wrap(small_net(), LowRankConfig(branches={"body": 2}), example_input=torch.zeros(1, 1, 8, 8))
    for network in (wrapped, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"is no timm network.*save its state_dict\(\)"):
            save_pretrained(network, tmp_path / "folder")
    for labels in ([], ["a", "b"], ["a", "b", "c", "d"]):
        with pytest.raises(ValueError, match=f"{len(labels)} label names for 3 classes"):
            save_pretrained(model, tmp_path / "folder", label_names=labels)
    with pytest.raises(CheckpointError, match=r"made with act_layer as Python objects.* act_layer=.silu."):
        save_pretrained(timm.create_model("test_resnet", act_layer=nn.SiLU), tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"FeatureListNet has no num_classes.* features_only=True makes"):
        save_pretrained(timm.create_model("test_resnet", features_only=True), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(OSError, match="file"):
            save_pretrained(model, folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_of_the_home_folder_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert tlr.save_pretrained(timm.create_model("test_resnet"), "~/saved") == tmp_path / "home" / "saved"
    tlr.from_pretrained("~/saved", lowrank=False)


@pytest.mark.parametrize("names", ["abc", {0: "a", 1: "b", 2: "c"}, [0, 1, 2], ["a", "b", None]])
def test_names_of_classes_are_a_list_of_strings(names, tmp_path):
    network = timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(CheckpointError, match="label_names must be a list of strings"):
        tlr.save_pretrained(network, tmp_path / "saved", label_names=names)
    assert not (tmp_path / "saved").exists()


def test_a_network_without_numbers_is_not_saved(tmp_path):
    with torch.device("meta"):
        network = timm.create_model("test_resnet")
    with pytest.raises(CheckpointError, match=r"on the meta device.*load weights into it first"):
        tlr.save_pretrained(network, tmp_path)


@pytest.mark.parametrize(
    "where",
    ["timm_lowrank.checkpoint.branches.save_file", "timm.models.save_for_hf", "os.replace", "os.fsync"],
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


def other(model):
    """The network with other weights and names."""
    with torch.no_grad():
        model.fc.bias += 1.0
    return model


TRANSITIONS = {
    "to nothing": (None, lambda model: model),
    "again": (lambda model: model, other),
    "without branches": (lambda model: model, lambda model: other(model).unwrap()),
    "with branches": (lambda model: model.unwrap(), other),
}
OPERATIONS = ("replace", "symlink", "link", "unlink", "mkdir", "rmdir", "rename")


def write(folder, files):
    with staged(folder, CHECKPOINT_FILES) as aside:
        for name, content in files.items():
            (aside / name).write_bytes(content)


def killed_before(number, folder, files):
    """Writes `files` into a folder in a process that is killed before its file operation `number`; whether it was."""
    child = os.fork()
    if not child:
        count = 0

        def counted(operation):
            def run(*args, **kwargs):
                nonlocal count
                count += 1
                if count > number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*args, **kwargs)

            return run

        for name in OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        write(folder, files)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def readable(folder):
    """The files as whoever opens them by their names sees them."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(
    ("first", "second", "links"),
    [*((*transition, True) for transition in TRANSITIONS.values()), (*TRANSITIONS["again"], False)],
    ids=[*TRANSITIONS, "again, no hard links"],
)
def test_a_kill_at_any_moment_leaves_the_old_files_or_the_new_ones(model, tmp_path, monkeypatch, first, second, links):
    old = {} if first is None else contents(save_pretrained(first(model), tmp_path / "old"))
    new = contents(save_pretrained(second(model), tmp_path / "new"))
    monkeypatch.setattr(os, "fsync", lambda *_: None)  # a kill loses nothing that was written
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    seen = []
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in {**old, "README.md": b"mine"}.items():
            (folder / name).write_bytes(content)
        killed = killed_before(number, folder, new)
        assert readable(folder) in (old, new), f"mixed before operation {number}"
        seen.append(readable(folder) == new)
        if seen[-1] and seen.count(True) == 1:
            assert any(path.is_symlink() for path in folder.iterdir())
            assert torch.equal(loaded(folder)(images()), loaded(tmp_path / "new")(images()))
        remove_abandoned(folder)
        assert readable(folder) == (new if seen[-1] else old)
        write(folder, old)  # the next save leaves no trace of it
        assert contents(folder) == {**old, "README.md": b"mine"}
        assert not any(path.is_symlink() for path in folder.iterdir())
        if not killed:
            break
    assert seen == sorted(seen)
    assert 5 < seen.index(True) < len(seen) - 1


def test_where_there_are_no_symbolic_links_nothing_mixed_loads(model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "symlink", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
    save_pretrained(model, tmp_path / "new")
    assert contents(save_pretrained(model, tmp_path / "old")) == contents(tmp_path / "new")
    assert contents(save_pretrained(model.unwrap(), tmp_path / "old")).keys() == {"config.json", "model.safetensors"}


def test_a_full_disk(model, tmp_path):
    """A real write that fails in the middle of model.safetensors."""
    save_pretrained(model, tmp_path)
    before = contents(tmp_path)
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointWriteError, match=r"could not write .* free some space") as caught:
            save_pretrained(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(caught.value, OSError)
    assert contents(tmp_path) == before


# from_pretrained


def test_everything_comes_back_bit_for_bit(model, folder):
    again = from_pretrained(folder)
    assert isinstance(again, LowRankModel)
    assert not any(module.training for module in again.modules())
    assert torch.equal(again(images()), model(images()))
    assert (again.lowrank_config, again.taps) == (model.lowrank_config, model.taps)
    assert same(again.state_dict(), model.state_dict())
    for layer, branch in model.branches.items():
        assert (again.branches[layer].rank, again.branches[layer].name, branch.updates) == (branch.rank, layer, 5)
        assert torch.equal(again.branches[layer].dense_weight(), branch.dense_weight())


@pytest.mark.parametrize("storage", ["factored", "dense"])
def test_branches_that_never_saw_a_batch_and_are_off(tmp_path, storage):
    config = LowRankConfig(branches={"layer3": 3, "pre_logits": 2}, storage=storage)
    model = tlr.wrap("test_resnet", config, example_input=images(16)).enable(False)
    again = from_pretrained(save_pretrained(model, tmp_path))
    assert (again.enabled, again.branches["layer3"].effective_rank()) == (False, 0)


def test_a_layer_that_gives_several_tensors(tmp_path):
    """CrossViT's blocks give one for each of two sizes of patches."""
    model = tlr.wrap("crossvit_9_240", LowRankConfig(branches={"blocks.1": 4}), num_classes=3)
    assert model.taps[0].item == 0
    assert from_pretrained(save_pretrained(model, tmp_path)).taps == model.taps


@pytest.mark.parametrize("options", [{}, {"storage": "dense"}, {"projection": "nystrom"}, {"scale": "paper"}], ids=str)
def test_training_goes_on_as_if_it_had_never_stopped(tmp_path, options):
    config = LowRankConfig(
        branches={"layer3": 6, "pre_logits": 4}, project_every=3, warmup_updates=1, nystrom_columns=12, **options
    )
    model = tlr.wrap("test_resnet", config, num_classes=3, example_input=images()).train()
    for seed in range(4):
        train_step(model, seed)
    again = from_pretrained(save_pretrained(model, tmp_path)).train()
    for seed in range(4, 7):  # the sixth update projects
        train_step(model, seed)
        train_step(again, seed)
        assert same(model.state_dict(), again.state_dict()), f"step {seed}"


def test_the_description_of_images_and_labels_survives_saving_again(model, tmp_path):
    data = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 1.0}
    save_pretrained(model, tmp_path / "1", label_names=["cat", "dog", "ship"], data_config=data)
    assert read(tmp_path / "1", "config.json")["label_names"] == ["cat", "dog", "ship"]
    save_pretrained(from_pretrained(tmp_path / "1"), tmp_path / "2")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    for network in (loaded(tmp_path / "1"), from_pretrained(tmp_path / "2")):
        cfg = dict(network.pretrained_cfg)
        assert {key: tuple(cfg[key]) for key in list(data)[:3]} == {key: data[key] for key in list(data)[:3]}
        assert tuple(cfg["label_names"]) == ("cat", "dog", "ship")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(model, tmp_path, dtype):
    model.to(dtype)
    again = from_pretrained(save_pretrained(model, tmp_path))
    assert torch.equal(again(images().to(dtype)), model(images().to(dtype)))
    assert again.branches["layer3"].bias.dtype == torch.float32


def test_a_device(folder):
    again = from_pretrained(folder, device="meta")
    assert {tensor.device.type for tensor in (*again.parameters(), again.branches["layer3"].bias)} == {"meta"}


def test_ways_to_name_a_folder(model, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = [str(folder), "checkpoint", "./checkpoint", "~/checkpoint", f"local-dir:{folder}", Path("checkpoint")]
    for source in sources:
        assert torch.equal(from_pretrained(source)(images()), model(images()))
    (tmp_path / "config.yaml").write_text("name: run")  # the folder of a run
    refused(tmp_path, r"has not come to its end.*--resume auto")
    folder.rename(tmp_path / "model")
    assert torch.equal(from_pretrained(tmp_path)(images()), model(images()))


def test_without_the_branches(model, folder):
    for damage in (lambda: None, lambda: rewrite(folder / "lowrank.json", format=99, config=None)):
        damage()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            network = from_pretrained(folder, lowrank=False)
        assert type(network) is type(model.unwrap())
        assert torch.equal(network(images()), model(images()))


def test_files_of_before_the_checksums_are_read(model, folder):
    description = read(folder)
    del description["sha256"], description["enabled"]
    (folder / "lowrank.json").write_text(json.dumps(description))
    assert same(from_pretrained(folder).state_dict(), model.state_dict())


def test_a_given_checksum(folder):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert sha256_of(folder / "model.safetensors") == digest
    assert read(folder)["sha256"]["model.safetensors"] == digest
    checkpoint.verify(folder, sha256=digest.upper())
    assert isinstance(from_pretrained(folder, sha256=digest), LowRankModel)
    with pytest.raises(CheckpointDamagedError, match=f"its sha256 is {digest}, and it should be 0000"):
        from_pretrained(folder, sha256="0" * 64)


@pytest.mark.parametrize("where", ["lowrank.json", "its config", "pretrained_cfg"])
def test_fields_of_a_newer_version_are_named_and_left_out(model, folder, where):
    description, config = read(folder), read(folder, "config.json")
    target = {"lowrank.json": description, "its config": description["config"]}.get(where, config["pretrained_cfg"])
    target["colour"] = "red"
    rewrite(folder / "lowrank.json", **description)
    rewrite(folder / "config.json", **config)
    with pytest.warns(UserWarning, match=r"colour.*[Ll]eft out"):
        again = from_pretrained(folder)
    assert same(again.state_dict(), model.state_dict())


# the branches of one model in another


def viewed(view, rank=3, **options):
    """A ViT with a branch on all features, on tokens, or on means over tokens, after one update."""
    torch.manual_seed(0)
    config = LowRankConfig(branches={"blocks.1": {"rank": rank, "view": view, **options}}, warmup_updates=0)
    model = tlr.wrap("test_vit", config, img_size=32, num_classes=3).train()
    train_step(model, 0)
    return model


@pytest.mark.parametrize("view", ["flatten", "token", "pool"])
def test_branches_are_written_and_loaded_by_themselves(tmp_path, view):
    model, other = viewed(view).enable(False), viewed(view)
    train_step(other, 1)
    checkpoint.write_branches(model, tmp_path / "new")
    checkpoint.load_branches(other, tmp_path / "new")
    assert contents(tmp_path / "new").keys() == {"lowrank.json", "lowrank.safetensors"}
    assert same(model.branches.state_dict(), other.branches.state_dict())
    assert not other.enabled
    assert checkpoint.read_description(tmp_path / "new").layers["blocks.1"].view == view
    assert checkpoint.read_description(tmp_path) is None


def test_a_classifier_that_was_reset_and_not_trained_with_its_branches_is_saved_and_loaded(tmp_path):
    def build():
        config = LowRankConfig(branches={"layer3": 4}, warmup_updates=0, project_every=2)
        return tlr.wrap("test_resnet", config, num_classes=3, example_input=torch.rand(2, 3, 32, 32)).train()

    model = build()
    for _ in range(4):
        model(torch.rand(6, 3, 32, 32))
        model.penalty(torch.tensor([0, 1, 2, 0, 1, 2]))
        model.update()
    model.enable(False).reset_classifier(5)
    state = copy.deepcopy(model).state_dict()
    save_pretrained(model, tmp_path)
    loaded, other = from_pretrained(tmp_path), build()
    other.reset_classifier(5)
    other.load_state_dict(state)
    for one in (loaded, other):
        assert one.branches["layer3"].head.classes == 5
        assert torch.equal(one.branches["layer3"].dense_weight(), model.branches["layer3"].dense_weight())


@pytest.mark.parametrize("storage", ["factored", "dense"])
def test_branches_on_a_layer_with_the_name_of_a_method_of_a_dictionary(tmp_path, storage):
    def build():
        network = nn.Sequential()
        for name in ("keys", "values", "last"):
            network.add_module(name, nn.Linear(5, 5))
        config = tlr.LowRankConfig(branches={"values": 2}, storage=storage)
        return tlr.wrap(network, config, example_input=torch.rand(2, 5)).train()

    model, other = build(), build()
    model(torch.rand(4, 5))
    model.penalty()
    model.update()
    checkpoint.write_branches(model, tmp_path)
    checkpoint.load_branches(other, tmp_path)
    assert same(model.branches.state_dict(), other.branches.state_dict())


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ({"view": "pool"}, r"blocks\.1 \(rank 3 of 64, view pool, channel_dim -1\)"),
        ({"view": "token", "channel_dim": 1}, r"blocks\.1 \(rank 3 of 5, view token, channel_dim 1\)"),
        ({"view": "token", "rank": 4}, r"blocks\.1 \(rank 4 of 64, view token, channel_dim -1\)"),
        ({"view": "flatten"}, r"blocks\.1 \(rank 3 of 320\)"),
    ],
)
def test_branches_of_another_kind_are_refused_with_both(tmp_path, other, shown):
    checkpoint.write_branches(viewed("token"), tmp_path)
    saved = r"blocks\.1 \(rank 3 of 64, view token, channel_dim -1\)"
    with pytest.raises(CheckpointError, match=f"are {saved}, and those of this model {shown}: go on with"):
        checkpoint.load_branches(viewed(**other), tmp_path)


def without_views(folder, **config):
    """Make of lowrank.json what LowRankTrainer wrote before views were written down."""
    description = read(folder)
    layers = {
        layer: {key: size[key] for key in ("rank", "num_features")} for layer, size in description["layers"].items()
    }
    rewrite(folder / "lowrank.json", layers=layers, config={**description["config"], **config})


def test_branches_without_a_view_take_that_of_the_model(tmp_path):
    model, other = viewed("token"), viewed("token")
    model.branches["blocks.1"].bias += 1
    checkpoint.write_branches(model, tmp_path)
    without_views(tmp_path, branches={"blocks.1": 3})
    checkpoint.load_branches(other, tmp_path)
    assert same(model.branches.state_dict(), other.branches.state_dict())
    with pytest.raises(CheckpointError, match=r"are blocks\.1 \(rank 3 of 64\), and those of this model .*of 320\)"):
        checkpoint.load_branches(viewed("flatten"), tmp_path)
    checkpoint.write_branches(model, tmp_path)
    without_views(tmp_path)  # but the configuration names one
    with pytest.raises(CheckpointError, match=r"rank 3 of 64, view token\), and those .*rank 3 of 64, view pool"):
        checkpoint.load_branches(viewed("pool"), tmp_path)


MISFITS = {
    "scalar": lambda tensor: tensor.flatten()[:1].sum(),
    "a dimension more": lambda tensor: tensor[None].clone(),
    "empty": lambda tensor: tensor.flatten()[:0].clone(),
    "too long": lambda tensor: torch.cat([tensor.flatten(), tensor.flatten()[:1]]),
    "boolean": lambda tensor: tensor.bool(),
    "complex": lambda tensor: tensor.to(torch.complex64),
}


@pytest.mark.parametrize("storage", ["factored", "dense"])
@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_tensors_of_a_branch_of_another_shape_or_type_are_one_error(tmp_path, storage, misfit):
    config = LowRankConfig(branches={"layer3": 4}, storage=storage, head_weight=0.0)
    model = tlr.wrap("test_resnet", config, num_classes=3, example_input=images()).train()
    for seed in range(2):
        train_step(model, seed)
    folder = save_pretrained(model, tmp_path)
    rewrite(folder / "lowrank.json", sha256={})
    # Copies: earlier versions of safetensors map the file into memory, and it is written over below.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "lowrank.safetensors").items()}
    before = model.branches.state_dict()
    for name, tensor in tensors.items():
        if name.endswith(("counters", "factored")) and misfit is MISFITS["too long"]:  # a newer version may add some
            continue
        if name.endswith("reference_norm") and misfit is MISFITS["scalar"]:
            continue
        if misfit(tensor).shape == tensor.shape and misfit(tensor).dtype == tensor.dtype:
            continue
        try:
            save_file({**tensors, name: misfit(tensor)}, folder / "lowrank.safetensors")
        except KeyError:  # earlier versions of safetensors write no complex numbers
            assert misfit is MISFITS["complex"]
            return
        with pytest.raises(CheckpointError, match=r"lowrank\.safetensors|cannot be restored|branch"):
            checkpoint.load_branches(model, folder)
        assert same(model.branches.state_dict(), before), name


def test_branches_that_are_damaged_or_not_there(tmp_path):
    model = viewed("token")
    with pytest.raises(CheckpointError, match=r"holds no lowrank\.json and lowrank\.safetensors, so no branches"):
        checkpoint.load_branches(model, tmp_path)
    checkpoint.write_branches(model, tmp_path)
    weights = tmp_path / "lowrank.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointDamagedError, match="damaged or exchanged"):
        checkpoint.load_branches(model, tmp_path)
    (tmp_path / "lowrank.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError, match="must hold config and layers"):
        checkpoint.load_branches(model, tmp_path)


# What is refused


def test_what_is_no_checkpoint(folder, tmp_path):
    refused(str(tmp_path / "nowhere"), "does not exist")
    refused(folder / "config.json", "is a file")
    refused(tmp_path, r"holds no config\.json, so it is no checkpoint: give the folder")
    refused("resnet18", "'resnet18' is no repository: .*USER/NAME; there is no folder 'resnet18' either")
    refused(folder, "is a folder: revision='main' is for repositories", revision="main")
    (folder / "model.safetensors").unlink()
    refused(folder, r"holds no model\.safetensors: the checkpoint is not complete")


def test_pickles_are_not_opened(model, folder):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(folder / "opened"),)

    torch.save({"weight": Trap()}, folder / "pytorch_model.bin")
    assert isinstance(from_pretrained(folder), LowRankModel), "beside the safetensors it is left alone"
    (folder / "model.safetensors").unlink()
    refused(folder, r"only pytorch_model\.bin: pickled weights can run any code")
    assert not (folder / "opened").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "lowrank.safetensors"])
def test_a_file_that_was_cut_off_or_changed(folder, name):
    whole = (folder / name).read_bytes()
    for damaged in (whole[:-1000], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        (folder / name).write_bytes(damaged)
        refused(folder, f"{name} was damaged or exchanged")
    rewrite(folder / "lowrank.json", sha256={})
    for damaged in (whole[:-1000], whole[:5], b"", b"\xff" * 100):
        (folder / name).write_bytes(damaged)
        refused(folder, f"{name} cannot be read as safetensors.*cut off or damaged")


def test_weights_of_a_network_that_was_changed_after_timm_had_built_it(tmp_path, monkeypatch):
    monkeypatch.setattr("timm_lowrank.checkpoint.saving._check_rebuilt", lambda *_: None)  # as earlier versions saved
    network = timm.create_model("test_resnet", num_classes=3)
    network.conv1[0] = nn.Conv2d(3, 16, 5, padding=2, bias=False)
    save_pretrained(network, tmp_path)
    refused(tmp_path, "was changed after timm had built it, in a way that no argument .* says", lowrank=False)


def test_weights_that_timm_would_resample(tmp_path):
    config = LowRankConfig(branches={"pre_logits": 3})
    save_pretrained(tlr.wrap("test_vit", config, num_classes=3, img_size=32), tmp_path)
    args = read(tmp_path, "config.json")["model_args"]
    rewrite(tmp_path / "config.json", model_args={**args, "img_size": 64})
    refused(tmp_path, r"the weights in .* do not fit the network that config\.json describes")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_classes": 5}, "do not belong together"),
        ({"num_classes": 10**12}, r"describes a network of 97,000,\d*,\d*,\d* numbers, and model.safetensors holds"),
        ({"architecture": "test_vit"}, "cannot build 'test_vit'"),
        (
            {"architecture": "resnet18_cifra"},
            "no architecture 'resnet18_cifra' in timm .*pip install -U timm.*import that package first "
            r"\(import timm_lowrank for the \*_cifar networks\).*resnet18_cifar",
        ),
        ({"architecture": None}, "names no architecture"),
        (
            {"model_args": {"flux_capacitor": True}},
            "cannot build 'test_resnet' as .*flux_capacitor.*newer version.*pip install -U timm",
        ),
    ],
)
def test_a_config_json_of_another_network(folder, changes, match):
    rewrite(folder / "config.json", **changes)
    refused(folder, match)


def test_a_network_that_computes_its_sizes_is_no_larger_than_its_weights(tmp_path, monkeypatch):
    """Before memory is taken nothing is drawn or filled, but what a constructor computes with tensors holds."""
    entrypoints, channels = timm.models._registry._model_entrypoints, []
    build = entrypoints["test_resnet"]

    def computed(*args, **options):
        channels.append(int(torch.full((), 10**9, device="cpu").fill_(1).add_(2)))
        return build(*args, **{**options, "in_chans": channels[-1]})

    monkeypatch.setitem(entrypoints, "test_resnet", computed)
    save_pretrained(timm.create_model("test_resnet", num_classes=3), tmp_path)
    assert from_pretrained(tmp_path, lowrank=False).num_classes == 3
    assert channels == [3] * 5, "one at first, and whatever is built from files is described before"


@pytest.mark.parametrize("name", ["config.json", "lowrank.json"])
def test_json_that_is_none(folder, name):
    refusals = {"{": "is not valid JSON", "[1]": "must hold a JSON object", "[" * 100_000: "not valid JSON"}
    for text, match in refusals.items():
        (folder / name).write_text(text)
        refused(folder, f"{name}.*{match}")
    (folder / name).write_bytes(b"\xff\xfe")
    refused(folder, "is not valid JSON")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": 2}, "has format 2, and this version of timm_lowrank reads up to 1: pip install -U timm_lowrank"),
        ({"format": None}, "names no format"),
        ({"format": True}, "names no format"),
        ({"layers": {}}, "must hold config and layers"),
        ({"config": "1-LR"}, "must hold config and layers"),
        ({"config": {"step_size": -1}}, "cannot be restored: .*step_size=-1"),
        ({"layers": {"layer3": {"rank": 6}}}, "layer 'layer3' must have rank and num_features"),
        ({"layers": {"layer3": {"rank": 6, "num_features": 10**15}}}, "does not fit lowrank.json at layer 'layer3'"),
        ({"layers": {"layer9": {"rank": 6, "num_features": 8}}}, "does not fit lowrank.json at layer 'layer9'"),
        ({"layers": {"pre_logits": {"rank": 0, "num_features": 96}}}, "cannot be restored"),
        ({"sha256": {"../../secret": "0"}}, r"'\.\./\.\./secret' is no name of a file inside"),
        ({"sha256": {"/etc/passwd": "0"}}, "'/etc/passwd' is no name of a file inside"),
        ({"sha256": {"other.safetensors": "0"}}, "not complete: other.safetensors is missing"),
        ({"sha256": ["0"]}, "sha256 must name a digest"),
    ],
)
def test_a_lowrank_json_that_makes_no_sense(folder, changes, match):
    rewrite(folder / "lowrank.json", **changes)
    refused(folder, match)


def test_dense_matrices_that_are_not_in_the_file_are_not_made(folder):
    config = read(folder)["config"]
    rewrite(folder / "lowrank.json", config={**config, "storage": "dense"})
    refused(folder, r"holds no W of \d+ x \d+ numbers for layer 'layer3', as storage=\"dense\"")


@pytest.mark.parametrize("name", ["config.json", "lowrank.json"])
def test_a_description_of_millions_of_lists_is_not_parsed(folder, name):
    (folder / name).write_text('{"a": [' + "[]," * 6_000_000 + "0]}")
    refused(folder, rf"{name} has 18,\d*,\d* bytes, and no such file has more than 16,777,216")


def test_branches_on_layers_that_are_not_there(model, folder):
    tensors = {key.replace("layer3", "layer9"): value for key, value in model.branches.state_dict().items()}
    save_file(tensors, folder / "lowrank.safetensors")
    layers = {layer.replace("layer3", "layer9"): size for layer, size in read(folder)["layers"].items()}
    rewrite(folder / "lowrank.json", layers=layers, sha256={})
    refused(folder, r"branches on layers that ResNet does not have: layer9\. Did you mean: .*layer3")


def test_half_of_the_branches(folder):
    (folder / "lowrank.safetensors").unlink()
    refused(folder, r"not complete: lowrank\.safetensors is missing; fetch or copy")
    rewrite(folder / "lowrank.json", sha256={})
    refused(folder, r"not complete: lowrank\.safetensors is missing; .*lowrank=False")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a//b", "a/", "C:/x", "a\\b", ".git/config", "a\0b", None, 3],
)
def test_names_that_climb_out_of_a_folder(name):
    with pytest.raises(CheckpointError, match="is no name of a file inside a repository"):
        checked_name(name)


@pytest.mark.parametrize("name", ["README.md", "plots/spectrum.png", "..x", "a..b/c", ".gitattributes"])
def test_names_that_stay(name):
    assert checked_name(name) == name


# Without this package

CIFAR_SIZED = {
    "resnet18": ("2-LR", {"output_stride": 8, "channels": [8, 16, 32, 64]}),
    "vit_tiny_patch16_224": ("2-LR", {"img_size": 32, "patch_size": 4, "depth": 3}),
    "convnext_atto": ("1-LR", {"patch_size": 1, "depths": [1, 1, 2, 1]}),
}
ELSEWHERE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "timm_lowrank":
            raise ImportError("timm_lowrank is not installed here")

sys.meta_path.insert(0, Blocker())
import timm, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    data = load_file(f"{folder}.safetensors")
    expected = load_file(f"{folder}/model.safetensors")
    with torch.no_grad():
        network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(network(data["images"]), data["logits"]), folder
        other = AutoModelForImageClassification.from_pretrained(folder).eval()
        for one in (network.state_dict(), other.state_dict()):
            one = {key.removeprefix("timm_model."): value for key, value in one.items()}
            assert one.keys() == expected.keys(), folder
            assert all(torch.equal(one[key], value) for key, value in expected.items()), folder
        torch.testing.assert_close(other(data["images"]).logits, data["logits"], rtol=1e-5, atol=1e-5)
        print("equal")
assert "timm_lowrank" not in sys.modules
"""


@pytest.mark.filterwarnings("ignore:.*more than half of the", "ignore:.*capped")
def test_cifar_sized_networks_load_where_this_package_is_not(tmp_path):
    """Trained one step, then loaded by timm and by transformers in a process of their own."""
    pytest.importorskip("transformers")
    folders = []
    for name, (preset, arguments) in CIFAR_SIZED.items():
        torch.manual_seed(0)
        model = tlr.wrap(
            name,
            LowRankConfig(branches=preset, warmup_updates=0),
            num_classes=10,
            example_input=images(),
            pretrained_cfg_overlay={"input_size": (3, 32, 32)},
            **arguments,
        ).train()
        assert len(model.branches) == int(preset[0])
        train_step(model, 0)
        folders.append(tmp_path / name)
        save_pretrained(model, folders[-1])
        with torch.no_grad():
            save_file({"images": images(), "logits": model.eval()(images())}, f"{folders[-1]}.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, folders)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal"] * len(CIFAR_SIZED)


def swap_activations(network):
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())


FOLD = r"comparators.fold\(network\) leaves plain weights"
CHANGED = {
    "no pooling": (lambda n: setattr(n, "maxpool", nn.Identity()), "with other logits"),
    "activations": (swap_activations, "with other logits"),
    "stride": (lambda n: setattr(n.layer2[0].conv1, "stride", (1, 1)) or setattr(n.layer2[0], "downsample", None), ""),
    "stem": (lambda n: setattr(n, "conv1", nn.Conv2d(3, 16, 5, padding=2)), "could not load"),
    "weight norm": (lambda n: nn.utils.parametrizations.weight_norm(n.conv1[0]), FOLD),
    "old weight norm": (lambda n: nn.utils.weight_norm(n.layer1[0].conv1), "could not load"),
    "spectral norm": (lambda n: nn.utils.parametrizations.spectral_norm(n.fc), FOLD),
    "narrower": (lambda n: n.fc.register_parameter("bias", None), "could not load"),
    "head": (lambda n: setattr(n, "fc", nn.Sequential(nn.Dropout(), nn.Linear(n.num_features, 10))), "could not load"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED)
def test_a_network_that_timm_would_not_build_again_is_not_saved(change, message, tmp_path):
    network = timm.create_model("test_resnet", num_classes=10)
    tlr.save_pretrained(network, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change(network)
    with pytest.raises(tlr.CheckpointError, match=message if message == FOLD else f"{message}.*Save its state_dict"):
        tlr.save_pretrained(network, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_network_that_was_folded_together_is_not_saved(tmp_path):
    network = timm.create_model("repvgg_a0", num_classes=3)
    save_pretrained(network, tmp_path / "before")
    network = timm.utils.reparameterize_model(network)
    with pytest.raises(CheckpointError, match=r"timm could not load this .* again"):
        save_pretrained(network, tmp_path / "after")
    assert not list((tmp_path / "after").iterdir())


def test_a_network_with_adapters_is_saved_when_they_are_merged(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(timm.create_model("test_vit", num_classes=3), config)
    model = tlr.wrap(adapted, LowRankConfig(branches={"pre_logits": 3}), example_input=torch.rand(1, 3, 160, 160))
    with pytest.raises(CheckpointError, match=r"timm could not load this .* again|no timm network"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
    pixels = torch.rand(2, 3, 160, 160)
    expected = model.eval()(pixels)
    merged = adapted.merge_and_unload()
    save_pretrained(merged, tmp_path)
    assert torch.allclose(loaded(tmp_path)(pixels), expected, atol=1e-5)


def tie(network):
    """One tensor by two names."""
    network.layer1[0].conv2.weight = network.layer1[0].conv1.weight


def view(network):
    """Two tensors in one piece of memory."""
    whole = torch.cat([network.bn1.weight.detach(), network.bn1.bias.detach()])
    network.bn1.weight.data, network.bn1.bias.data = whole.chunk(2)


@pytest.mark.parametrize("share", [tie, view])
def test_weights_that_share_memory_are_saved_apart(tmp_path, share):
    network = timm.create_model("test_resnet", num_classes=3).eval()
    share(network)
    model = tlr.wrap(network, LowRankConfig(branches={"pre_logits": 3}))
    save_pretrained(model, tmp_path)
    restored = from_pretrained(tmp_path)
    assert torch.equal(restored(images()), model(images()))
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == network.state_dict().keys()
    assert same(tensors, network.state_dict())


@pytest.mark.parametrize("finish", [LowRankModel.unwrap, lambda model: save_pretrained(model, "saved")])
@pytest.mark.parametrize(("updates", "weightless"), [(0, False), (1, True), (4, True), (5, False)])
def test_a_penalty_that_never_had_weight_is_said_once(tmp_path, monkeypatch, finish, updates, weightless):
    """Of the updates 0, 1, 2, ... with a warm-up of 3 the penalty before number 4 is the first with weight."""
    monkeypatch.chdir(tmp_path)
    config = LowRankConfig(branches={"layer3": 4}, warmup_updates=3, head_weight=0.0)
    model = tlr.wrap("test_resnet", config, num_classes=3, example_input=images()).train()
    weights = []
    for seed in range(updates):
        model(images(seed=seed))
        weights.append(float(model.penalty().detach()))
        model.update()
    assert any(weights) == (updates == 5)
    for times in (weightless, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            finish(model)
        assert [str(one.message)[:45] for one in caught] == ["the penalty of the branches has had no weight"] * times
    description = checkpoint.read_description(save_pretrained(model, tmp_path / "last"))
    assert description.never_had_weight == (updates < 5)


def test_a_compiled_network_is_saved_as_it_is(tmp_path):
    model = tlr.wrap("test_resnet", tlr.LowRankConfig(branches={"layer3": 4}))
    tlr.save_pretrained(torch.compile(model, backend="eager"), tmp_path)
    restored = tlr.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 64, 64)
    assert list(restored.branches) == ["layer3"]
    assert torch.equal(restored(images), model.eval()(images))
