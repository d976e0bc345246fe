"""`LowRankTask` in loops of timm's shape: what it adds to the loss, when it updates, and what it leaves as it was."""

import copy
import io

import pytest
import timm
import torch
from states import same
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, dispatch_clip_grad
from torch import nn

import timm_lowrank as tlr
from timm_lowrank import LowRankConfig
from timm_lowrank.errors import LowRankWarning
from timm_lowrank.integrations import timm_task
from timm_lowrank.integrations.timm_task import LowRankMultiLabelTask, LowRankTask

CONFIG = LowRankConfig(branches={"layer3": 8, "pre_logits": 6}, warmup_updates=1, project_every=4, scale="unit")
ZEROS = torch.zeros(1, 3, 16, 16)


def network():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10)


def make_task(kind=LowRankTask, config=CONFIG, **kwargs):
    return kind(network(), verbose=False, **{"lowrank": config, "example_input": ZEROS, **kwargs})


def sgd(task):
    return create_optimizer_v2(task.get_trainable_module(), "sgd", lr=0.05, weight_decay=1e-4, momentum=0.9)


@pytest.fixture(scope="module")
def batches(digits):
    """12 batches of 8 digits as (8, 3, 16, 16), and their labels."""
    images = nn.functional.interpolate(digits[0][:96], 16).expand(-1, 3, -1, -1)
    return list(zip(images.split(8), digits[1][:96].split(8), strict=True))


def train(task, optimizer, batches, *, accumulate=1, start=0, ema=True):
    """Steps as timm's script makes them; the losses."""
    task.get_trainable_module().train()
    losses = []
    for index, (images, labels) in enumerate(batches):
        loss = task(images, labels)["loss"] / accumulate
        loss.backward()
        losses.append(loss.item())
        if (index + 1) % accumulate:
            continue
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            task.update_ema(step=start + (index + 1) // accumulate)
    return losses


def updates(task):
    """Update Steps of each branch."""
    return {branch.updates for branch in task.lowrank.branches.values()}


def test_a_step_of_the_task_is_the_step_of_the_loop_in_the_readme(batches):
    task, model = make_task(), tlr.wrap(network(), CONFIG, example_input=ZEROS).train()
    optimizer, own = sgd(task), sgd(ClassificationTask(model.backbone, verbose=False))
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images), labels) + model.penalty(labels)
        own.zero_grad()
        loss.backward()
        own.step()
        model.update()
    losses = train(task, optimizer, batches)
    assert losses[-1] == loss.item()
    assert same(task.lowrank.state_dict(), model.state_dict())


def test_the_parts_of_the_loss(batches):
    task = make_task()
    train(task, sgd(task), batches[:3])
    result = task(*batches[3])
    assert result["penalty"] > 0
    assert torch.equal(result["loss"], result["task_loss"] + result["penalty"])
    assert torch.equal(result["task_loss"], task.criterion(result["output"], batches[3][1]))
    task.get_eval_model().eval()
    assert set(task(*batches[3])) == {"loss", "output"}
    task.train()
    with torch.no_grad():
        assert task(*batches[3])["loss"].isfinite()


# ------------------------------------------------------------------------------------------------- the Update Step


@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_update_per_optimizer_step(batches, accumulate):
    task = make_task()
    train(task, sgd(task), batches, accumulate=accumulate)
    assert updates(task) == {12 // accumulate}
    task.update_ema()
    task.update_ema()
    assert updates(task) == {12 // accumulate}
    assert task.updates == 12 // accumulate


def test_an_attached_optimizer_makes_the_update_and_update_ema_no_second_one(batches):
    plain = make_task()
    train(plain, sgd(plain), batches, accumulate=2)
    for ema in (True, False):
        attached = make_task()
        optimizer = sgd(attached)
        assert attached.attach(optimizer) is attached
        train(attached, optimizer, batches, accumulate=2, ema=ema)
        assert same(plain.lowrank.state_dict(), attached.lowrank.state_dict())


@pytest.mark.parametrize(
    ("attached", "what"), [(True, "optimizer never stepped"), (False, r"update_ema\(\) was never called")]
)
def test_a_loop_that_never_updates_is_warned_once(batches, monkeypatch, attached, what):
    monkeypatch.setattr(timm_task, "STEPS_BEFORE_WARNING", 3)
    task = make_task(start_update=2)
    optimizer = sgd(task)
    if attached:
        task.attach(torch.optim.SGD(task.parameters(), 0.1))
    with pytest.warns(LowRankWarning, match=what) as warned:
        train(task, optimizer, batches[:5], ema=attached)
    assert len(warned) == 1


def test_a_step_at_learning_rate_0_counts_where_a_batch_waits_for_it(batches):
    """As the first ones of a warm-up are."""
    task = make_task()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.0)
    task.attach(optimizer)
    train(task, optimizer, batches[:2])
    assert (task.updates, task.lowrank.branches["layer3"].updates) == (2, 2)
    optimizer.step()
    assert task.updates == 2, "as torch.distributed.checkpoint makes one to load an optimizer"


def test_a_loop_that_never_updates_hears_it_from_the_task_alone(batches, monkeypatch):
    monkeypatch.setattr("timm_lowrank.core.model.STEPS_BEFORE_WARNING", 3)
    monkeypatch.setattr(timm_task, "STEPS_BEFORE_WARNING", 3)
    task = make_task()
    with pytest.warns(LowRankWarning, match=r"call task.update_ema\(\) after each optimizer step") as warned:
        train(task, sgd(task), batches[:8], ema=False)
    assert len([one for one in warned if "no effect" in str(one.message)]) == 1


@pytest.mark.parametrize("on", [True, False])
def test_a_switch_of_the_user_comes_back_with_the_state(batches, on):
    task, loaded = make_task(), make_task()
    train(task, sgd(task), batches[:2])
    task.lowrank.enable(on)
    loaded.load_task_state(task.get_task_state())
    assert loaded.lowrank.enabled == on
    late = make_task(start_update=1)  # whose own business it is
    late.load_task_state(task.get_task_state())
    assert late.lowrank.enabled


# ----------------------------------------------------------------------------------------------------- switch-on


def test_plain_training_until_the_start_update(batches):
    task, plain = make_task(start_update=5), ClassificationTask(network(), verbose=False)
    losses = train(task, sgd(task), batches[:5])
    plain_losses = train(plain, sgd(plain), batches[:5])
    assert losses == plain_losses
    assert same(task.backbone.state_dict(), plain.get_trainable_module().state_dict())
    assert task.lowrank.enabled
    assert "penalty" in task(*batches[5])


def test_the_start_epoch_needs_to_be_told_the_epoch(batches):
    task = make_task(start_epoch=2)
    optimizer = sgd(task)
    with pytest.raises(RuntimeError, match="set_epoch"):
        train(task, optimizer, batches[:1])
    seen = []
    for epoch in range(4):
        task.set_epoch(epoch)
        seen.append(task.lowrank.enabled)
        train(task, optimizer, batches[:2])
    assert seen == [False, False, True, True]
    assert (task.updates, updates(task)) == (8, {4})


def test_branches_that_the_user_switched_off_stay_off(batches):
    task = make_task(start_update=1)
    optimizer = sgd(task)
    train(task, optimizer, batches[:2])
    task.lowrank.enable(False)
    train(task, optimizer, batches[2:4])
    assert updates(task) == {1}


def test_branches_that_come_on_while_batches_accumulate(batches):
    task = make_task(start_epoch=1)
    optimizer = sgd(task)
    task.set_epoch(0)
    task.train()
    task(*batches[0])["loss"].backward()
    task.set_epoch(1)
    optimizer.step()
    task.update_ema()
    assert (task.updates, updates(task)) == (1, {0})


# ------------------------------------------------------------------------------- what timm sees: groups, clip, EMA


def test_the_groups_of_the_optimizer_are_those_of_plain_training():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10, img_size=32)
    task = LowRankTask(model, lowrank=LowRankConfig(branches={"pre_logits": 4}), verbose=False)
    kwargs = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.7}
    groups = create_optimizer_v2(task.get_trainable_module(), **kwargs).param_groups
    plain = create_optimizer_v2(model, **kwargs).param_groups
    assert [[id(p) for p in group["params"]] for group in groups] == [[id(p) for p in g["params"]] for g in plain]
    assert [g["weight_decay"] for g in groups] == [g["weight_decay"] for g in plain]
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert id(model.pos_embed) not in decayed
    assert id(model.head.weight) in decayed


def test_clipping_sees_every_parameter_of_the_network_and_the_gradient_of_the_penalty(batches):
    task = make_task()
    train(task, sgd(task), batches[:3])
    names = [name for name, _ in task.backbone.named_parameters()]
    assert [id(p) for p in task.get_clip_parameters()] == [id(p) for p in task.backbone.parameters()]
    assert len(task.get_clip_parameters(exclude_head=True)) == len(names) - 2
    task(*batches[3])["loss"].backward()
    dispatch_clip_grad(task.get_clip_parameters(), 0.01)
    norm = torch.stack([p.grad.norm() for p in task.backbone.parameters()]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("late", [False, True], ids=["before compile", "after compile"])
def test_the_ema_is_one_of_the_plain_network(batches, late):
    task = make_task()
    optimizer = sgd(task)
    if not late:
        task.setup_ema(decay=0.5)
    task.compile(backend="eager")
    if late:
        task.setup_ema(decay=0.5)
    expected = copy.deepcopy(task.backbone.state_dict())
    for index, batch in enumerate(batches[:3]):
        train(task, optimizer, [batch], start=10 + index)
        new = task.backbone.state_dict()
        expected = {k: v.lerp(new[k], 0.5) if v.is_floating_point() else new[k].clone() for k, v in expected.items()}
    state = task.get_checkpoint_state(ema=True)
    assert set(state) == {"state_dict_ema"}
    assert state["state_dict_ema"].keys() == network().state_dict().keys()
    for key, value in expected.items():
        torch.testing.assert_close(state["state_dict_ema"][key], value)


def test_a_compiled_task_trains_as_the_plain_one_and_validates_the_plain_network(batches):
    task, compiled = make_task(), make_task()
    optimizer = sgd(compiled)
    torch._dynamo.reset()
    compiled.compile(backend="eager")
    losses = train(task, sgd(task), batches[:4])
    assert train(compiled, optimizer, batches[:2]) == pytest.approx(losses[:2], rel=1e-5)
    evaluated = compiled.get_eval_model().eval()
    with torch.inference_mode():
        assert torch.equal(evaluated(batches[0][0]), compiled.backbone(batches[0][0]))
    assert train(compiled, optimizer, batches[2:4]) == pytest.approx(losses[2:], rel=1e-5)
    assert updates(compiled) == {4}
    assert compiled.get_checkpoint_state()["state_dict"].keys() == network().state_dict().keys()


# ----------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_timms_saver_resumes_to_the_bit_and_loads_into_a_plain_network(batches, tmp_path):
    task = make_task(start_update=2)
    optimizer = sgd(task)
    task.setup_ema(decay=0.5)
    train(task, optimizer, batches[:6])
    folder = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    CheckpointSaver(task.backbone, optimizer, task=task, **folder).save_checkpoint(0, metric=1.0)
    saved = copy.deepcopy((task.backbone.state_dict(), task.trainable_module_ema.module.state_dict()))
    train(task, optimizer, batches[6:], start=6)

    other = make_task(start_update=2)
    other_optimizer = sgd(other)
    assert resume_task_checkpoint(other, tmp_path / "last.pth.tar", optimizer=other_optimizer, log_info=False) == 1
    other.setup_ema(decay=0.5)
    load_task_ema_checkpoint(other, tmp_path / "last.pth.tar")
    assert other.lowrank.enabled
    train(other, other_optimizer, batches[6:], start=6)
    assert same(task.lowrank.state_dict(), other.lowrank.state_dict())
    assert same(task.trainable_module_ema.state_dict(), other.trainable_module_ema.state_dict())
    assert task.updates == other.updates == 12

    plain = network()
    for expected, use_ema in zip(saved, [False, True], strict=True):
        timm.models.load_checkpoint(plain, str(tmp_path / "last.pth.tar"), use_ema=use_ema)
        assert same(plain.state_dict(), expected)


def test_a_checkpoint_of_plain_training_is_a_start_with_new_branches(batches, caplog):
    plain, task = ClassificationTask(network(), verbose=False), make_task()
    train(plain, sgd(plain), batches[:2])
    task.load_checkpoint_state(plain.get_checkpoint_state()["state_dict"])
    assert "holds no low-rank branches" in caplog.text
    assert same(task.backbone.state_dict(), plain.get_trainable_module().state_dict())
    assert updates(task) == {0}


def test_a_checkpoint_with_other_branches_is_refused():
    tokens, other = ({"layer3": {"rank": 8, "view": view}, "pre_logits": 6} for view in ("token", "pool"))
    state = make_task(config=LowRankConfig(branches=tokens)).get_task_state()
    saved = r"layer3 \(rank 8 of 192, view token, channel_dim 1\), pre_logits \(rank 6 of 96\)"
    own = r"layer3 \(rank 8 of 192, view pool, "
    with pytest.raises(ValueError, match=f"in the checkpoint are {saved}, and those of this model {own}"):
        make_task(config=LowRankConfig(branches=other)).load_task_state(state)


def test_the_state_of_the_task_needs_no_pickled_code_and_may_be_an_older_one(batches):
    task = make_task()
    train(task, sgd(task), batches[:2])
    buffer = io.BytesIO()
    torch.save(task.get_task_state(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert LowRankConfig.from_dict(state["config"]) == CONFIG
    assert task.get_task_state(ema=True) == {}
    older = {key: state[key] for key in ("branches", "config", "updates")}
    older["sizes"] = {layer: [size["num_features"], size["rank"]] for layer, size in state["layers"].items()}
    for saved in (state, older):
        other = make_task()
        other.load_task_state(saved)
        assert same(other.lowrank.branches.state_dict(), task.lowrank.branches.state_dict())
        assert other.updates == 2
    older["sizes"]["layer3"] = [12, 8]
    with pytest.raises(ValueError, match=r"layer3 \(rank 8 of 12\)"):
        make_task().load_task_state(older)


# ------------------------------------------------------------------------------------------- targets and mistakes


def test_soft_and_multi_label_targets(batches):
    images, labels = batches[0]
    soft = nn.functional.one_hot(labels, 10).float() * 0.8 + 0.02
    mixed = make_task(criterion_kwargs={"soft_targets": True})
    train(mixed, sgd(mixed), [(images, soft)] * 3)
    several = make_task(LowRankMultiLabelTask, threshold=0.4)
    train(several, sgd(several), [(images, soft)] * 3)
    assert updates(mixed) == updates(several) == {3}
    assert (several.threshold, type(several.criterion).__name__) == (0.4, "BinaryCrossEntropy")
    with pytest.raises(ValueError, match="dense floating-point targets"):
        several(images, labels)


def test_mistakes_are_named():
    model = tlr.wrap(network(), CONFIG, example_input=ZEROS)
    assert LowRankTask(model, verbose=False).lowrank is model
    with pytest.raises(TypeError, match=r"model\.unwrap\(\)"):
        LowRankTask(model, lowrank=CONFIG, verbose=False)
    with pytest.raises(ValueError, match="Did you mean: layer3"):
        make_task(config=LowRankConfig(branches={"layr3": 8}))
    with pytest.raises(ValueError, match="start_epoch=-1"):
        make_task(start_epoch=-1)
    with pytest.raises(ValueError, match="scripted"):
        LowRankTask(torch.jit.ScriptModule(), verbose=False)
    with pytest.raises(TypeError, match="torch optimizer, not a ResNet"):
        make_task().attach(network())


def test_a_copy_of_the_task_trains_by_itself(batches):
    task = make_task()
    train(task, sgd(task), batches[:2])
    other = copy.deepcopy(task)
    assert other.lowrank is not task.lowrank
    train(other, sgd(other), batches[2:4])
    assert (updates(task), updates(other)) == ({2}, {4})
