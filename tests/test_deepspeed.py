"""DeepSpeed is refused. The package is not needed: a stand-in engine calls the model as the real one does.

The real one was found to leave hooks of the module `deepspeed.runtime.engine` on the model that it is given, and to
call it from there; the last test says whether that is still so where DeepSpeed is installed.
"""

import importlib.util
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import timm_lowrank as tlr
from timm_lowrank.core.distributed import refuse_deepspeed_optimizer

ENGINE = """
class DeepSpeedEngine:
    def __init__(self, module, optimizer=None, hooks=False):
        self.module, self.optimizer = module, optimizer
        if hooks:
            module.register_forward_pre_hook(lambda *_: None)
    def __call__(self, *inputs):
        return self.module(*inputs)
class DeepSpeedOptimizer: pass
class DeepSpeedZeroOptimizer(DeepSpeedOptimizer):
    def __init__(self, optimizer): self.optimizer = optimizer
"""
ADVICE = r"DeepSpeed.*DistributedDataParallel or FSDP2.*accelerate launch"


def stand_in(monkeypatch, name, source):
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(source, module.__dict__)
    return module


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    return stand_in(monkeypatch, "deepspeed.runtime.engine", ENGINE)


@pytest.fixture
def model(small_net):
    config = tlr.LowRankConfig(branches={"hidden": 4})
    return tlr.wrap(small_net(), config, example_input=torch.zeros(1, 1, 8, 8)).train()


IMAGES = torch.zeros(2, 1, 8, 8)


def test_a_forward_in_an_engine_is_an_error(engine, model):
    model(IMAGES)  # DeepSpeed was imported by something; that alone is no reason
    run = engine.DeepSpeedEngine(model)
    for called in (run, engine.DeepSpeedEngine(nn.Sequential(nn.Identity(), model))):
        with pytest.raises(tlr.LowRankError, match=ADVICE):
            called(IMAGES)
    model.enable(False)
    run(IMAGES)
    model.enable().eval()
    run(IMAGES)  # evaluation is none of the branches' business
    engine.DeepSpeedEngine(model.train(), hooks=True)
    with pytest.raises(tlr.LowRankError, match=ADVICE):
        model(IMAGES)


def test_nothing_is_looked_at_where_deepspeed_was_never_imported(monkeypatch, model):
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.setattr("sys._getframe", lambda depth: pytest.fail("the frames were walked"))
    model(IMAGES)


def test_optimizers_of_an_engine_are_refused(engine, monkeypatch):
    raw = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    zero = engine.DeepSpeedZeroOptimizer(raw)
    source = "class DeepSpeedOptimizerWrapper:\n    def __init__(self, optimizer): self.optimizer = optimizer"
    wrapper = stand_in(monkeypatch, "accelerate.utils.deepspeed", source).DeepSpeedOptimizerWrapper
    for optimizer in (zero, wrapper(zero), wrapper(raw), engine.DeepSpeedEngine(nn.Identity(), zero)):
        with pytest.raises(tlr.LowRankError, match=ADVICE):
            refuse_deepspeed_optimizer(optimizer)
    source = "import torch\nclass FusedAdam(torch.optim.Adam): pass"
    fused = stand_in(monkeypatch, "deepspeed.ops.adam.fused_adam", source).FusedAdam
    for needs_no_engine in (raw, fused(raw.param_groups[0]["params"])):
        refuse_deepspeed_optimizer(needs_no_engine)


def test_attach_refuses_them(engine, model):
    with pytest.raises(tlr.LowRankError, match=ADVICE):
        tlr.attach(engine.DeepSpeedZeroOptimizer(torch.optim.SGD(model.parameters(), lr=0.1)), model)


REAL = """
import os, torch, deepspeed, timm_lowrank as tlr
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
model = tlr.wrap(network, tlr.LowRankConfig(branches={"1": 4}), example_input=torch.zeros(1, 1, 4, 4)).train()
raw = torch.optim.SGD(model.parameters(), lr=0.1)
settings = {"train_batch_size": 4, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=raw, config=settings)
for job in (lambda: engine(torch.zeros(4, 1, 4, 4)), lambda: tlr.attach(optimizer, model)):
    try:
        job()
    except tlr.LowRankError as error:
        print("refused:", error)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_the_real_engine_is_refused():
    ran = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, timeout=600)
    assert ran.stdout.count("refused:") == 2, ran.stdout + ran.stderr
