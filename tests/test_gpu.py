"""Branches on a CUDA device: the numbers of a CPU, in every precision that people train in, and no waiting in a step.

python -m pytest -m gpu tests/test_gpu.py
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import timm
import torch
from runs import assert_same_run
from torch import nn

import timm_lowrank as tlr
from timm_lowrank.core.branch import LowRankBranch
from timm_lowrank.data import load_data
from timm_lowrank.errors import CollapseError
from timm_lowrank.evaluation import attacks
from timm_lowrank.training import Recipe, train
from timm_lowrank.training import loop as training_loop
from timm_lowrank.training.run import RunFolder
from timm_lowrank.training.state import build, seeded

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("fresh_accelerate"),
]

SMALL = {
    "name": "small",
    "model": "resnet10_cifar",
    "model_args": {"channels": [8, 8, 16, 16]},
    "data_args": {"train_limit": 450, "test_limit": 100},
    "lowrank": {"branches": {"layer3": 6, "pre_logits": 4}, "warmup_updates": 3, "project_every": 8},
    "epochs": 3,
    "pretrain_epochs": 1,
    "batch_size": 64,
    "learning_rate": 0.05,
    "ema_decay": 0.9,
}


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Convolutions in float32, with the same result each time."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Copies and readings for which the host would wait for the device raise."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rows_of(count: int, rows: int = 24, width: int = 96) -> list[torch.Tensor]:
    """Batches (rows, width) float64 with a decaying spectrum about a mean."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, dtype=torch.float64, generator=generator)
    mixing = torch.linalg.qr(mixing)[0] * torch.arange(1, width + 1) ** -0.7
    return [torch.randn(rows, width, dtype=torch.float64, generator=generator) @ mixing.T + 0.1 for _ in range(count)]


def branch_of(device: torch.device, dtype: torch.dtype = torch.float64, **values: object) -> LowRankBranch:
    options = {"warmup_updates": 2, "project_every": 4, "update_rows": 16, "oversampling": 3, **values}
    return LowRankBranch(96, 6, tlr.LowRankConfig(**options), device, dtype)


def trained(branch: LowRankBranch, updates: int = 12, parts: int = 1) -> list[torch.Tensor]:
    """The loss and the gradient in the activations of each batch, float64 on the CPU."""
    seen = []
    for number, batch in enumerate(rows_of(updates * parts)):
        rows = batch.to(branch.bias).requires_grad_()
        loss = branch.penalty(rows)
        loss.backward()
        seen += [loss.detach(), rows.grad]
        if (number + 1) % parts == 0:
            branch.update()
    return [value.cpu().double() for value in seen]


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """Relative to the largest entry."""
    one, two = one.detach().cpu().double(), two.detach().cpu().double()
    return float((one - two).abs().max() / two.abs().max().clamp_min(1e-30))


def wrapped(**values: object) -> tlr.LowRankModel:
    torch.manual_seed(0)
    network = timm.create_model("resnet10_cifar", num_classes=10, in_chans=3, channels=[16, 16, 32, 32])
    options = {"branches": {"layer3": 8, "pre_logits": 6}, "warmup_updates": 2, **values}
    return tlr.wrap(network, tlr.LowRankConfig(**options), example_input=torch.zeros(2, 3, 16, 16)).to(DEVICE)


def images_of(count: int, batch: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, batch, 3, 16, 16, generator=generator)
    labels = torch.randint(10, (count, batch), generator=generator)
    return list(zip(images.to(DEVICE), labels.to(DEVICE), strict=True))


def run_steps(model, batches, *, call=None, precision=None, parts=1, optimizer=None) -> list[torch.Tensor]:
    """A free loop of training; the penalties."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    penalties = []
    model.train()
    for number, (images, labels) in enumerate(batches):
        with torch.autocast(DEVICE.type, precision, enabled=precision is not None):
            loss = nn.functional.cross_entropy((model if call is None else call)(images), labels)
        penalties.append(model.penalty())
        (loss + penalties[-1]).backward()
        if (number + 1) % parts == 0:
            optimizer.step()
            optimizer.zero_grad()
            model.update()
    return [penalty.detach() for penalty in penalties]


# -------------------------------------------------------------------------------------------------- numbers of a branch


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("projection", ["subspace", "nystrom", "exact"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-3)])
def test_a_branch_has_the_numbers_of_its_float64_twin_on_a_cpu(projection, dtype, tolerance, parts):
    branch, twin = (
        branch_of(DEVICE, dtype, projection=projection),
        branch_of(torch.device("cpu"), projection=projection),
    )
    for one, two in zip(trained(branch, parts=parts), trained(twin, parts=parts), strict=True):
        assert difference(one, two) < tolerance
    assert difference(branch.dense_weight(), twin.dense_weight()) < tolerance
    assert difference(branch.bias, twin.bias) < tolerance
    assert branch.effective_rank() <= 6


@pytest.mark.parametrize("projection", ["subspace", "nystrom", "exact"])
def test_factored_and_dense_storage_agree(projection):
    factored, dense = (branch_of(DEVICE, projection=projection, storage=kind) for kind in ("factored", "dense"))
    for one, two in zip(trained(factored), trained(dense), strict=True):
        assert difference(one, two) < 1e-8
    assert difference(factored.dense_weight(), dense.dense_weight()) < 1e-8


@pytest.mark.parametrize("storage", ["factored", "dense"])
def test_a_saved_branch_goes_on_as_if_it_had_not_been_saved(storage, tmp_path):
    whole, first, second = (branch_of(DEVICE, torch.float32, storage=storage) for _ in range(3))
    trained(whole, 12)
    trained(first, 6)
    torch.save(first.state_dict(), tmp_path / "branch.pt")
    second.load_state_dict(torch.load(tmp_path / "branch.pt", map_location="cpu"))
    for batch in rows_of(12)[6:]:
        second.penalty(batch.to(second.bias).requires_grad_()).backward()
        second.update()
    assert torch.equal(second.dense_weight(), whole.dense_weight())
    assert torch.equal(second.bias, whole.bias)


def test_a_branch_moves_between_devices_with_batches_that_wait():
    branch = branch_of(torch.device("cpu"))
    trained(branch, 5)
    twin = copy.deepcopy(branch)
    batch = rows_of(6)[5]
    branch.penalty(batch.clone().requires_grad_())
    moved = branch.to(DEVICE)
    moved.update()
    twin.penalty(batch.clone().requires_grad_())
    twin.update()
    assert moved.bias.device.type == DEVICE.type
    assert difference(moved.dense_weight(), twin.dense_weight()) < 1e-10


def test_activations_that_stay_not_finite_are_seen_an_update_later_than_on_a_cpu():
    branch = branch_of(DEVICE)
    trained(branch, 4)
    for batch in rows_of(3):
        branch.penalty((batch.to(DEVICE) * torch.nan).requires_grad_())
        torch.cuda.synchronize()  # else the host may learn it later still
        expected = pytest.raises(CollapseError, match="not finite") if branch.updates == 6 else contextlib.nullcontext()
        with expected:
            branch.update()
    assert branch.updates == 6


# ------------------------------------------------------------------------------------------------------- whole networks


def test_a_network_trains_as_on_a_cpu():
    with exact():
        model = wrapped()
        twin = copy.deepcopy(model).cpu()
        batches = images_of(12)
        penalties = run_steps(model, batches)
        with torch.autocast("cpu", enabled=False):
            expected = run_steps(twin, [(images.cpu(), labels.cpu()) for images, labels in batches])
    for one, two in zip(penalties, expected, strict=True):
        assert torch.allclose(one.cpu(), two, rtol=0.02, atol=1e-5)
    for layer, branch in model.branches.items():
        assert difference(branch.dense_weight(), twin.branches[layer].dense_weight()) < 0.02


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_branches_compute_in_float32_under_autocast(precision):
    with exact():
        model = wrapped()
        twin = copy.deepcopy(model)
        penalties = run_steps(model, images_of(12), precision=precision)
        expected = run_steps(twin, images_of(12))
    for branch in model.branches.values():
        assert branch.bias.dtype == branch.dense_weight().dtype == torch.float32
    assert penalties[-1].dtype == torch.float32
    assert torch.stack(penalties).isfinite().all()
    assert 0.5 < penalties[-1] / expected[-1] < 2  # a network that trained in half precision is another one


def test_channels_last_gives_the_same_numbers():
    with exact():
        model = wrapped()
        twin = copy.deepcopy(model)
        model = model.to(memory_format=torch.channels_last)
        batches = [(images.to(memory_format=torch.channels_last), labels) for images, labels in images_of(8)]
        for one, two in zip(run_steps(model, batches), run_steps(twin, images_of(8)), strict=True):
            assert torch.allclose(one, two, rtol=0.02, atol=1e-5)


def test_a_compiled_network_trains_as_an_eager_one():
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.Tanh(), nn.Linear(64, 10))
    config = tlr.LowRankConfig(branches={"2": 6}, warmup_updates=2, project_every=4)
    model = tlr.wrap(network, config, example_input=torch.zeros(2, 3, 16, 16)).to(DEVICE)
    twin = copy.deepcopy(model)
    penalties = run_steps(model, images_of(10), call=torch.compile(model, fullgraph=True))
    for one, two in zip(penalties, run_steps(twin, images_of(10)), strict=True):
        assert torch.allclose(one, two, rtol=1e-2, atol=1e-5)
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- nothing waits in a step


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("values", [{}, {"update_rows": None}, {"scale": "unit", "norm_weight": 0.1}])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_between_two_projections_does_not_wait_for_the_device(values, precision, parts):
    model = wrapped(project_every=100, **values)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    batches = images_of(4 * parts)
    run_steps(model, batches[: 2 * parts], precision=precision, parts=parts, optimizer=optimizer)  # b is set here
    with waiting_is_an_error():
        run_steps(model, batches[2 * parts :], precision=precision, parts=parts, optimizer=optimizer)
    assert all(branch.updates == 4 for branch in model.branches.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_of_the_recipe_does_not_wait_for_the_device(precision, tmp_path):
    lowrank = {**SMALL["lowrank"], "project_every": 100}
    recipe = Recipe.from_dict({**SMALL, "lowrank": lowrank, "precision": precision, "channels_last": True})
    with seeded(0):
        state = build(recipe, load_data(recipe.data, **recipe.data_options()), tmp_path)
        state.network.train()
        means = training_loop.Means(DEVICE, state.classes)
        steps = [
            (lambda batch=batch: training_loop._train_step(state, *batch, 1.0, means, shares=False))
            for batch in state.train_batches.epoch(0)
        ]
        for step in steps[:3]:
            step()
        with waiting_is_an_error():
            for step in steps[3:]:
                step()
    assert state.progress.step == len(steps) == 7
    assert means.now("train_loss", "penalty").keys() == {"train_loss", "penalty"}


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_interrupted_run_ends_as_one_that_was_not(precision, tmp_path, monkeypatch):
    recipe = Recipe.from_dict({**SMALL, "precision": precision, "save_every_steps": 3})
    with exact():
        train(recipe, tmp_path / "whole")
        save = RunFolder.save

        def stopping(self, accelerator, epoch, step=0):
            save(self, accelerator, epoch, step)
            if (epoch, step) == (1, 6):
                raise KeyboardInterrupt

        monkeypatch.setattr(RunFolder, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "interrupted")
        monkeypatch.setattr(RunFolder, "save", save)
        train(recipe, tmp_path / "interrupted", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "interrupted")


def test_batches_on_the_device_are_those_of_an_epoch_that_is_taken_up_later(tmp_path):
    recipe = Recipe.from_dict(SMALL)
    with seeded(0):
        batches = build(recipe, load_data(recipe.data, **recipe.data_options()), tmp_path).train_batches
    whole, rest = list(batches.epoch(2)), list(batches.epoch(2, first=3))
    assert whole[0][0].device.type == DEVICE.type
    assert len(rest) == len(whole) - 3
    for (images, labels), (again, same) in zip(whole[3:], rest, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, same)


def test_attacks_find_what_they_find_on_a_cpu():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5)).eval()
    images = torch.rand(20, 3, 4, 4)
    labels = network(images).argmax(dim=1)
    device = copy.deepcopy(network).to(DEVICE)
    for attack in (
        lambda model, x, y: attacks.pgd(model, x, y, eps=0.1, steps=10, restarts=2),
        lambda model, x, y: attacks.pgd(model, x, y, eps=0.5, steps=10, norm="l2"),
        lambda model, x, y: attacks.deepfool(model, x, y, steps=10),
    ):
        one, two = attack(device, images.to(DEVICE), labels.to(DEVICE)), attack(network, images, labels)
        assert one.device.type == DEVICE.type
        near = (one.cpu() - two).abs() < 1e-4  # the sign of a gradient of zero is anybody's
        assert near.float().mean() > 0.99
