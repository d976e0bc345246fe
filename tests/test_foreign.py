"""Networks of other trainers in an evaluation: checkpoints of timm's train script, exports of transformers."""

import argparse
import os
import shutil

import datasets
import pytest
import timm
import torch
import yaml
from accelerate import PartialState
from parquet_images import DIGITS, TARGET
from PIL import Image
from test_timm_train import LOWRANK, SCRIPT

import timm_lowrank as tlr
from timm_lowrank.data import load_data
from timm_lowrank.errors import EvaluationError
from timm_lowrank.evaluation.results import Kind, read_evaluation
from timm_lowrank.integrations import timm_train
from timm_lowrank.integrations.timm_train import loaded_script
from timm_lowrank.suites import Options, evaluate, plan
from timm_lowrank.suites.evaluation import images_of
from timm_lowrank.suites.foreign import Resizing
from timm_lowrank.suites.networks import load_network, random_twin

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """300 digits in colour as a folder of images, train/CLASS/*.png and val/CLASS/*.png, of two sizes."""
    root = tmp_path_factory.mktemp("photos")
    for number, (pixels, label) in enumerate(zip(DIGITS[:300], TARGET, strict=False)):
        path = root / ("val" if number % 3 == 0 else "train") / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert("RGB").resize((16 + number % 2, 16)).save(path)
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def by_timm(tmp_path_factory):
    """What timm's saver and script leave: a run with branches and EMA."""
    output = tmp_path_factory.mktemp("timm") / "low rank"
    timm_train.main([str(SCRIPT), *LOWRANK, "--output", str(output), "--epochs", "2", "--model-ema"])
    return output


@pytest.fixture(scope="module")
def plain_by_timm(tmp_path_factory):
    output = tmp_path_factory.mktemp("timm") / "plain"
    with loaded_script(SCRIPT, ["--output", str(output), "--epochs", "1"]) as script:
        script.main()
    return output


@pytest.fixture(scope="module")
def by_trainer(tmp_path_factory):
    """A function of a network that gives the folder in which `Trainer.save_model` left it, with its processor."""
    from timm_lowrank.integrations.trainer import LowRankTrainer

    def export(network, processor=None, **options):
        folder = tmp_path_factory.mktemp("trainer")
        images = torch.from_numpy(DIGITS[:32]).float()[:, None].expand(-1, 3, -1, -1) / 255
        images = torch.nn.functional.interpolate(images, 16)
        rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, TARGET, strict=False)]
        arguments = transformers.TrainingArguments(
            str(folder / "run"), max_steps=2, per_device_train_batch_size=16, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        kind = LowRankTrainer if options else transformers.Trainer
        trainer = kind(network, arguments, train_dataset=rows, processing_class=processor, **options)
        trainer.train()
        trainer.save_model(folder / "model")
        return folder / "model"

    return export


def small_vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
            patch_size=4, num_labels=10,
        )
    )  # fmt: skip


def small_timm():
    return transformers.TimmWrapperForImageClassification(
        transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=10)
    )


def measured(network, data, output, **options):
    """The evaluation of a network and those beside it on few images."""
    wanted = ("clean", "pgd-madry-20-8-255", "noise-standard-deviation-1", "spectrum")
    chosen = [one for one in plan.SUITES["quick"].measurements(plan.Extent()) if one.key in wanted]
    limits = {"limit": 20, "train_limit": 40, "chunk": 20, "spectrum_limit": 20}
    given = Options(str(network), data=str(data), output=output, measurements=chosen, pages=False, **limits, **options)
    evaluate(given, PartialState())
    return read_evaluation(output / "evaluation.json")


def clean_of(evaluation):
    return {title: value.value for title, value in evaluation.figure("clean").values.items()}


# ----------------------------------------------------------------------------------------------------- timm's train.py


def test_a_checkpoint_of_timms_script_is_the_network_that_it_validated(by_timm, plain_by_timm):
    loaded = load_network(str(by_timm))
    checkpoint = torch.load(by_timm / "model_best.pth.tar", weights_only=False)
    network = timm.create_model("test_resnet", num_classes=10)
    network.load_state_dict(checkpoint["state_dict_ema"])
    images = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    assert torch.equal(loaded.model(images), network.eval()((images - mean) / std))
    assert loaded.branches == {"layer3": 8, "pre_logits": 6}
    assert loaded.resizing == Resizing(16, network.pretrained_cfg["crop_pct"])
    twin, again = random_twin(loaded), random_twin(loaded)
    assert torch.equal(twin(images), again(images))
    assert not torch.allclose(twin(images), loaded.model(images))

    named = load_network(str(plain_by_timm / "last.pth.tar"))
    assert (named.title, named.branches, named.classes) == ("plain", {}, 10)


def test_timms_checkpoints_are_evaluated_side_by_side(by_timm, plain_by_timm, photos, cache, tmp_path):
    evaluation = measured(by_timm, photos, tmp_path / "out", against=(str(plain_by_timm),))
    assert [network.title for network in evaluation.networks] == ["2-LR", "plain"]
    resizing = load_network(str(by_timm)).resizing
    data = load_data(str(photos), image_size=16, crop_pct=resizing.crop_pct).subset(40, 20)
    assert evaluation.data.images == 20
    assert evaluation.data.image_size == (3, 16, 16)
    for title, path in [("2-LR", by_timm), ("plain", plain_by_timm)]:
        with torch.no_grad():
            right = load_network(str(path)).model(data.test_images.float() / 255).argmax(dim=1) == data.test_labels
        assert clean_of(evaluation)[title] == pytest.approx(right.double().mean().item())


class Runs:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def edited(change):
    """A function that changes the content of a checkpoint."""

    def apply(folder):
        path = folder / "last.pth.tar"
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, weights_only=True)
        torch.save(change(checkpoint), path)

    return apply


def arguments(**changes):
    def apply(folder):
        path = folder / "args.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))

    return apply


BROKEN = {
    "code": (edited(lambda checkpoint: {**checkpoint, "extra": Runs()}), "pickles can run any code, so it was not"),
    "cut": (lambda folder: os.truncate(folder / "last.pth.tar", 5000), "cannot be read"),
    "no mapping": (edited(lambda checkpoint: [1]), "holds a list"),
    "no weights": (edited(lambda checkpoint: {"args": checkpoint["args"]}), "holds no state_dict"),
    "no arguments": (
        lambda folder: [edited(lambda one: {"state_dict": one["state_dict"]})(folder), (folder / "args.yaml").unlink()],
        "put the args.yaml beside it",
    ),
    "no yaml": (lambda folder: (folder / "args.yaml").write_text("a: {"), "args.yaml cannot be read"),
    "other network": (arguments(model="test_vit"), r"the test_vit that .*args.yaml describes cannot be loaded"),
    "unknown network": (arguments(model="test_resnt"), "test_resnet"),
    "other classes": (arguments(num_classes=7), "size mismatch"),
    "not square": (arguments(input_size=[3, 16, 24], img_size=None), "16 x 24 pixels: only square ones"),
    "no checkpoint": (lambda folder: (folder / "last.pth.tar").unlink(), "name the checkpoint itself"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_with_timms_files_is_one_error(plain_by_timm, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("args.yaml", "last.pth.tar"):
        shutil.copyfile(plain_by_timm / name, folder / name)
    change(folder)
    with pytest.raises(EvaluationError, match=message):
        load_network(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_names_its_network_without_args_yaml(plain_by_timm, tmp_path):
    shutil.copyfile(plain_by_timm / "last.pth.tar", tmp_path / "last.pth.tar")
    assert load_network(str(tmp_path)).weights == load_network(str(plain_by_timm / "last.pth.tar")).weights


# -------------------------------------------------------------------------------------------------------- transformers


EXPORTS = {
    "transformers": (small_vit, {}),
    "timm": (small_timm, {}),
    "branches": (small_timm, {"lowrank": tlr.LowRankConfig(branches={"layer3": 6, "pre_logits": 4})}),
}


@pytest.mark.parametrize(("make", "options"), EXPORTS.values(), ids=EXPORTS)
def test_a_model_that_a_trainer_exported_is_evaluated(by_trainer, photos, cache, tmp_path, make, options):
    folder = by_trainer(make(), transformers.ViTImageProcessor(size={"height": 16, "width": 16}), **options)
    evaluation = measured(folder, photos, tmp_path / "out")
    (title,) = clean_of(evaluation)
    assert title == ("2-LR" if options else "plain")
    assert {Kind.CLEAN, Kind.ATTACK, Kind.NOISE, Kind.VARIANCE} <= {figure.kind for figure in evaluation.figures}
    data = load_data(str(photos), image_size=16, crop_pct=1.0).subset(40, 20)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        right = model(pixel_values=(data.test_images / 255 - 0.5) / 0.5).logits.argmax(dim=1) == data.test_labels
    assert clean_of(evaluation)[title] == pytest.approx(right.double().mean().item())


def test_weights_in_half_precision_are_evaluated_in_float32(tmp_path):
    small_timm().bfloat16().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_network(str(tmp_path)).model.parameters()} == {torch.float32}


def test_the_size_and_the_scale_are_those_of_the_image_processor(by_trainer, tmp_path):
    folder = by_trainer(small_vit())
    for processor, resizing in [
        (transformers.ViTImageProcessor(size={"height": 16, "width": 16}), Resizing(16, 1.0)),
        (transformers.ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=0.8), Resizing(16, 0.8)),
        (
            transformers.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
            Resizing(16, 0.8),
        ),
        (transformers.ViTImageProcessor(do_resize=False, image_mean=[0.1, 0.2, 0.3]), None),
        (transformers.ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False), Resizing(16, 1.0)),
    ]:
        processor.save_pretrained(folder)
        loaded = load_network(str(folder))
        assert loaded.resizing == resizing
        said = processor.to_dict()
        assert loaded.model.mean.flatten().tolist() == pytest.approx(
            said["image_mean"] if said["do_normalize"] else [0, 0, 0]
        )
    twin = random_twin(loaded)
    images = torch.rand(2, 3, 16, 16)
    assert twin(images).shape == (2, 10)
    assert not torch.allclose(twin(images), loaded.model(images))


def test_what_is_wrong_with_an_export_is_one_error(by_trainer, tmp_path):
    folder = by_trainer(small_vit())
    with pytest.raises(EvaluationError, match=r"save the image processor there, too"):
        load_network(str(folder))
    transformers.ViTImageProcessor(rescale_factor=1 / 127.5).save_pretrained(folder)
    with pytest.raises(EvaluationError, match="does not divide pixels by 255"):
        load_network(str(folder))
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(EvaluationError, match="transformers cannot load the model"):
        load_network(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(EvaluationError, match="transformers cannot load the model"):
        load_network(str(folder))


def test_images_of_many_sizes_are_brought_to_what_a_timm_network_was_made_for(photos, cache, tmp_path):
    tlr.save_pretrained(timm.create_model("test_resnet", num_classes=10), tmp_path / "model")
    options = Options(str(tmp_path / "model"), data=str(photos))
    data = images_of(options, [load_network(options.network)], train_limit=10, limit=5)
    assert (data.image_size, data.counts) == ((3, 160, 160), (10, 5))
