"""The wrapper in a LightningModule, by the three lines of docs/integrations.md: accumulation, resuming, averages."""

import warnings

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from states import same
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import timm_lowrank as tlr

lightning = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        network = timm.create_model("resnet10_cifar", in_chans=1, num_classes=10, channels=[8, 8, 16, 16])
        config = tlr.LowRankConfig(branches={"layer3": 6, "pre_logits": 4}, warmup_updates=2, project_every=3)
        self.model = tlr.wrap(network, config, example_input=torch.zeros(2, 1, 8, 8))
        self.evaluated = []

    def training_step(self, batch, _):
        images, labels = batch
        return cross_entropy(self.model(images), labels) + self.model.penalty(labels)

    def validation_step(self, batch, _):
        self.evaluated.append(self.model.training)
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.model.update()


def fit(folder, epochs, *more, module=None, resume=None, **options):
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    data = TensorDataset(images[:240], torch.tensor(digits.target[:240]))
    trainer = lightning.Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callbacks.ModelCheckpoint(folder, save_last=True), *more], **options,
    )  # fmt: skip
    module = module or Digits()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "(?s).*(does not have many workers|logging interval|exists and is not empty).*"
        )
        trainer.fit(module, DataLoader(data, 32), DataLoader(data, 120), ckpt_path=resume)
    return module, trainer


def test_a_resumed_training_ends_as_the_whole_one(tmp_path):
    whole, _ = fit(tmp_path / "whole", 3)
    fit(tmp_path / "cut", 1)
    resumed, _ = fit(tmp_path / "resumed", 3, resume=str(tmp_path / "cut" / "last.ckpt"))
    assert {branch.updates for branch in whole.model.branches.values()} == {3 * 8}
    assert set(whole.evaluated) == {False}
    assert same(whole.model.state_dict(), resumed.model.state_dict())


def test_the_update_step_is_made_once_for_batches_that_are_accumulated(tmp_path):
    module, trainer = fit(tmp_path, 2, accumulate_grad_batches=4)
    assert trainer.global_step == 2 * 2
    assert {branch.updates for branch in module.model.branches.values()} == {2 * 2}


def test_an_average_is_of_the_network_alone_and_a_checkpoint_holds_both(tmp_path):
    module, _ = fit(tmp_path / "averaged", 2, callbacks.EMAWeightAveraging(decay=0.5))
    plain, _ = fit(tmp_path / "plain", 2)
    saved = torch.load(tmp_path / "averaged" / "last.ckpt", weights_only=True)
    network = timm.create_model("resnet10_cifar", in_chans=1, num_classes=10, channels=[8, 8, 16, 16])
    averaged = {
        key.removeprefix("model.backbone."): value
        for key, value in saved["state_dict"].items()
        if key.startswith("model.backbone.")
    }
    network.load_state_dict(averaged)
    assert not same(averaged, plain.model.backbone.state_dict())
    assert same(module.model.backbone.state_dict(), averaged)  # Lightning leaves the average behind
    current = {key.removeprefix("model."): value for key, value in saved["current_model_state"].items()}
    assert same(current, plain.model.state_dict())  # W and b too: averaging changes nothing of the training


def test_a_second_fit_goes_on_and_what_was_trained_is_saved_for_timm(tmp_path):
    module, _ = fit(tmp_path / "run", 1)
    fit(tmp_path / "again", 1, module=module)
    assert {branch.updates for branch in module.model.branches.values()} == {2 * 8}
    tlr.save_pretrained(module.model, tmp_path / "network")
    network = timm.create_model(f"local-dir:{tmp_path / 'network'}", pretrained=True)
    assert same(network.state_dict(), module.model.unwrap().state_dict())
