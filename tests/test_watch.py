"""A training loop that forgets half of the branch is told so, once."""

import warnings

import pytest
import torch
from torch.nn import functional

import timm_lowrank as tlr
from timm_lowrank import LossHook, LowRankConfig, LowRankWarning, attach
from timm_lowrank.core.model import STEPS_BEFORE_WARNING

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1])


@pytest.fixture
def model(small_net):
    return tlr.wrap(small_net(), LowRankConfig(branches={"hidden": 3}), example_input=IMAGES).train()


def loop(model, steps, *, penalty=True, update=True):
    for _ in range(steps):
        model(IMAGES)
        if penalty:
            model.penalty()
        if update:
            model.update()


def told(action):
    """The warnings of `action`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if issubclass(w.category, LowRankWarning)]


def test_a_penalty_that_is_never_used(model):
    assert told(lambda: loop(model, STEPS_BEFORE_WARNING - 1, penalty=False, update=False)) == []
    (message,) = told(lambda: loop(model, 1, penalty=False, update=False))
    assert f"{STEPS_BEFORE_WARNING} training forwards passed, but penalty() was never called" in message
    assert "no effect" in message
    assert "add model.penalty() to the loss" in message
    assert "LossHook" in message
    assert told(lambda: loop(model, 2 * STEPS_BEFORE_WARNING, penalty=False, update=False)) == [], "once is enough"


def test_an_update_that_is_never_called(model):
    (message,) = told(lambda: loop(model, 3 * STEPS_BEFORE_WARNING, update=False))
    assert f"penalty() was called {STEPS_BEFORE_WARNING} times, but update() never" in message
    assert "call model.update() after optimizer.step()" in message
    assert "attach(optimizer, model)" in message


def test_a_loop_that_does_both_hears_nothing(model):
    assert told(lambda: loop(model, 2 * STEPS_BEFORE_WARNING)) == []


def test_so_does_one_with_a_loss_hook_and_an_attached_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach(optimizer, model)
    criterion = LossHook(functional.cross_entropy, model)

    def train():
        for _ in range(2 * STEPS_BEFORE_WARNING):
            criterion(model(IMAGES), LABELS).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()

    assert told(train) == []


def test_forwards_that_no_branch_watches_do_not_count(model):
    def others():
        model.enable(False)
        loop(model, 2 * STEPS_BEFORE_WARNING, penalty=False, update=False)
        model.enable().eval()
        loop(model, 2 * STEPS_BEFORE_WARNING, penalty=False, update=False)
        model.train()

    assert told(others) == []
    assert len(told(lambda: loop(model, STEPS_BEFORE_WARNING, penalty=False, update=False))) == 1


def test_a_few_forwards_before_an_evaluation_are_no_training(model):
    def look():
        loop(model, 3, penalty=False, update=False)
        model.eval()

    assert told(look) == []


def test_a_compiled_network_is_told_when_training_pauses(model):
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def train():
        for _ in range(2 * STEPS_BEFORE_WARNING):
            compiled(IMAGES)
        model.eval()

    (message,) = told(train)
    assert "a compiled network was trained, but penalty() was never called" in message
    model.train()
    assert told(train) == []


def test_a_compiled_network_whose_penalty_is_used_hears_nothing(model):
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def train():
        for _ in range(3):
            compiled(IMAGES)
            model.penalty()
            model.update()
        model.eval()

    assert told(train) == []
