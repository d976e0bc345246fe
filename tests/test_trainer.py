"""Branches in transformers.Trainer: real runs on tiny models, their checkpoints, exports, and two processes."""

import copy
import importlib
import json
import math
import os
import re
import sys
import types
from pathlib import Path

import accelerate
import forked
import pytest
import timm
import torch
from processes.worker import free_port
from safetensors.torch import load_file
from states import same

import timm_lowrank as tlr
from timm_lowrank import CaptureError, LowRankConfig, LowRankError, LowRankModel, LowRankWarning
from timm_lowrank.checkpoint import load_branches

transformers = pytest.importorskip("transformers")

from timm_lowrank.integrations.trainer import LowRankCallback, LowRankMixin, LowRankTrainer  # noqa: E402
from timm_lowrank.integrations.transformers_models import RecordingForward  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity(level)


@pytest.fixture(scope="session")
def data(digits):
    """64 digits as the Trainer wants them."""
    pairs = zip(digits[0][:64], digits[1], strict=False)
    return [{"pixel_values": image, "labels": int(label)} for image, label in pairs]


@pytest.fixture(scope="session")
def images(data):
    """Eight of them, (8, 1, 8, 8)."""
    return torch.stack([one["pixel_values"] for one in data[:8]])


def small_vit(dropout=0.0):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, **shape, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0)
    )


def small_resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16], "depths": [1, 1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_channels=1, num_labels=10))


TIMM_ARGS = {"in_chans": 1, "img_size": 8, "patch_size": 4, "depth": 3}


def small_timm():
    config = transformers.TimmWrapperConfig(architecture="test_vit", num_labels=10, model_args=TIMM_ARGS)
    return transformers.TimmWrapperForImageClassification(config)


MODELS = {"vit": small_vit, "resnet": small_resnet, "timm": small_timm}
# vit.layers.1, in the first versions of transformers 5 vit.encoder.layer.1
VIT_LAYER = next(name for name, _ in small_vit().named_modules() if name.endswith(("vit.layers.1", "encoder.layer.1")))
ATTENTION = f"{VIT_LAYER}.attention"
LAYERS = {"vit": VIT_LAYER, "resnet": "resnet.encoder.stages.1", "timm": "blocks.1"}


def config(kind="timm", **values):
    branches = {LAYERS[kind]: 4, "pre_logits": 4}
    small = {"warmup_updates": 1, "project_every": 2, "reconstruction_weight": 0.5}
    return LowRankConfig(**{"branches": branches, **small, **values})


ARGUMENTS = {
    "use_cpu": True, "max_steps": 4, "learning_rate": 0.02, "optim": "sgd", "lr_scheduler_type": "constant",
    "save_strategy": "no", "logging_steps": 2, "report_to": [], "disable_tqdm": True, "log_level": "error",
}  # fmt: skip


@pytest.fixture
def build(data, tmp_path):
    """A function that makes a LowRankTrainer around one of MODELS, always with the same weights."""

    def make(kind="timm", *, model=None, lowrank=None, trainer=LowRankTrainer, **options):
        own = {"start_step", "start_epoch", "callbacks", "compute_loss_func", "example_input", "model_init"}
        keywords = {key: options.pop(key) for key in own & options.keys()}
        torch.manual_seed(0)
        if model is None and "model_init" not in keywords:
            model = MODELS[kind]()
        if trainer is not transformers.Trainer and not isinstance(model, LowRankModel):
            keywords["lowrank"] = lowrank or config(kind)
        arguments = {**ARGUMENTS, "output_dir": tmp_path / "run", "per_device_train_batch_size": 16, **options}
        arguments["output_dir"] = str(arguments["output_dir"])
        args = transformers.TrainingArguments(**arguments)
        made = trainer(model=model, args=args, train_dataset=data, eval_dataset=data[:16], **keywords)
        made.remove_callback(transformers.PrinterCallback)
        return made

    return make


def run(trainer, **keywords):
    trainer.train(**keywords)
    return trainer


def state_of(trainer):
    state = {f"model.{key}": value.detach().clone() for key, value in trainer.model.state_dict().items()}
    if getattr(trainer, "lowrank", None) is not None:
        state.update({f"branches.{key}": value.clone() for key, value in trainer.lowrank.branches.state_dict().items()})
    return state


def relative_difference(first, second):
    """The larger of those of all parameters together and of each branch's W."""
    pairs = [[torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) for trainer in (first, second)]]
    pairs += [
        [one.dense_weight(), other.dense_weight()]
        for one, other in zip(first.lowrank.branches.values(), second.lowrank.branches.values(), strict=True)
    ]
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


# ------------------------------------------------------------------------------------------------ models and layers


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:.*capped there")
def test_both_presets_train_and_leave_a_plain_model(kind, build, images, tmp_path):
    keys = list(MODELS[kind]().state_dict())
    trainer = run(build(kind, lowrank=config(kind, branches="2-LR"), max_steps=3, logging_steps=1))
    assert list(trainer.lowrank.branches) == [LAYERS[kind], "pre_logits"]
    assert [branch.updates for branch in trainer.lowrank.branches.values()] == [3, 3]
    assert list(trainer.model.state_dict()) == keys
    assert "forward" not in trainer.model.__dict__
    assert not hasattr(trainer.model, "lowrank_stage")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry[f"{LAYERS[kind]}.reconstruction"] > 0 for entry in logs)
    assert all(entry[f"{LAYERS[kind]}.rank"] > 0 and entry[f"{LAYERS[kind]}.outside"] > 0 for entry in logs)
    assert logs[-1]["penalty"] > 0
    assert trainer.evaluate()["eval_loss"] < logs[-1]["loss"]  # without the penalty

    trainer.save_model(tmp_path / "model")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(again(images).logits, trainer.model.eval()(images).logits)
    other = build(kind, lowrank=config(kind, branches="2-LR"), example_input=images)
    assert other.lowrank.branches["pre_logits"].updates == 0
    load_branches(other.lowrank, tmp_path / "model")
    assert other.lowrank.taps == trainer.lowrank.taps
    assert same(other.lowrank.branches.state_dict(), trainer.lowrank.branches.state_dict())
    # This package's own from_pretrained says what it is.
    name = type(trainer.model).__name__
    with pytest.raises(tlr.CheckpointError, match=rf"layout of transformers \(a {name}\).*load_branches.*export"):
        tlr.from_pretrained(tmp_path / "model")

    one = build(kind, lowrank=config(kind, branches="1-LR"), example_input=images)
    assert list(one.lowrank.branches) == ["pre_logits"]
    assert one.lowrank.branches["pre_logits"].num_features == trainer.lowrank.branches["pre_logits"].num_features


def test_other_folders_of_transformers_are_told_from_damaged_ones(build, tmp_path):
    build("vit").model.save_pretrained(tmp_path / "plain")
    with pytest.raises(tlr.CheckpointError, match=r"a ViTForImageClassification\), .*from_pretrained\. In timm's"):
        tlr.from_pretrained(tmp_path / "plain", lowrank=False)
    network = build(model=timm.create_model("test_vit", num_classes=10, **TIMM_ARGS)).model  # has a pretrained_cfg
    network.save_pretrained(tmp_path / "timm")
    if not any(key.startswith("timm_model.") for key in load_file(tmp_path / "timm" / "model.safetensors")):
        return  # the first versions of transformers 5 leave what timm reads
    with pytest.raises(tlr.CheckpointError, match="layout of transformers"):
        tlr.from_pretrained(tmp_path / "timm")


def test_layers_of_a_timm_wrapper_go_by_either_name_and_wrong_ones_are_named(build, images):
    trainer = build(lowrank=config(branches={"timm_model.blocks.1": 4}), example_input=images)
    assert list(trainer.lowrank.branches) == ["blocks.1"]
    with pytest.raises(ValueError, match=r"no layer 'block.1'. Did you mean: .*blocks\.1"):
        run(build(lowrank=config(branches={"block.1": 4})))
    with pytest.raises(ValueError, match=rf"no layer 'layers.1'. Did you mean: .*{re.escape(VIT_LAYER)}"):
        run(build("vit", lowrank=config(branches={"layers.1": 4})))
    names = dict(small_vit().named_modules())
    tuples = max((name for name in names if name in (ATTENTION, f"{ATTENTION}.attention")), key=len)
    with pytest.raises(CaptureError, match=f"'{re.escape(tuples)}' gives a tuple"):
        run(build("vit", lowrank=config(branches={tuples: 4})))


def test_a_timm_network_and_a_wrapped_one(build, images, tmp_path):
    network = timm.create_model("test_vit", num_classes=10, **TIMM_ARGS)
    trainer = run(build(model=network, max_steps=2))
    assert trainer.lowrank.unwrap() is network
    trainer.save_model(tmp_path)
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path)
    assert same({key.removeprefix("timm_model."): v for key, v in again.state_dict().items()}, network.state_dict())

    lowrank = tlr.wrap("test_vit", config(), num_classes=10, example_input=images, **TIMM_ARGS)
    trainer = run(build(model=lowrank, max_steps=2))
    assert trainer.lowrank is lowrank
    assert [branch.updates for branch in lowrank.branches.values()] == [2, 2]
    with pytest.raises(ValueError, match="wrapped already"):
        LowRankTrainer(model=lowrank, args=trainer.args, lowrank=config())


def test_export_of_the_timm_network(build, images, tmp_path):
    trainer = build(max_steps=3)
    with pytest.raises(tlr.CheckpointError, match="before the first training batch"):
        trainer.export(tmp_path / "network")
    run(trainer).export(
        tmp_path / "network", label_names=list("0123456789"), data_config={"mean": (0.5,), "std": (1.0,)}
    )
    network = timm.create_model(f"local-dir:{tmp_path / 'network'}", pretrained=True).eval()
    assert (network.pretrained_cfg["input_size"], list(network.pretrained_cfg["mean"])) == ((1, 8, 8), [0.5])
    assert same(network.state_dict(), trainer.lowrank.unwrap().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network(images), trainer.model.eval()(images).logits, rtol=1e-5, atol=1e-6)
    again = tlr.from_pretrained(tmp_path / "network")
    assert same(again.branches.state_dict(), trainer.lowrank.branches.state_dict())
    with pytest.raises(tlr.CheckpointError, match="ViTForImageClassification holds no timm network"):
        run(build("vit", max_steps=1)).export(tmp_path / "other")


def test_an_export_names_the_classes_in_the_order_of_the_logits(build, images, tmp_path):
    trainer = build(example_input=images)
    trainer.model.config.id2label = {index: f"class {index}" for index in reversed(range(10))}
    trainer.export(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == [f"class {i}" for i in range(10)]


# --------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.filterwarnings("ignore:label smoothing of this version")
@pytest.mark.parametrize(("kind", "options"), [("vit", {}), ("timm", {}), ("vit", {"label_smoothing_factor": 0.1})])
def test_accumulation_equals_one_batch(kind, options, build):
    whole = run(build(kind, **options))
    parts = run(build(kind, per_device_train_batch_size=8, gradient_accumulation_steps=2, **options))
    assert relative_difference(parts, whole) < 5e-6
    if kind == "timm":
        twice = run(build(kind, lowrank=config(kind, reconstruction_weight=1.0), **options))
        assert relative_difference(twice, whole) > 1e-3  # so a penalty that counts twice would be seen
    logged = [[entry["penalty"] for entry in one.state.log_history if "loss" in entry] for one in (whole, parts)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_accumulation_with_a_loss_function_of_ones_own(build):
    def summed(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    whole = run(build(compute_loss_func=summed))
    parts = run(build(compute_loss_func=summed, per_device_train_batch_size=8, gradient_accumulation_steps=2))
    assert relative_difference(parts, whole) < 5e-6
    assert relative_difference(whole, run(build())) < 3e-6


def test_a_loss_that_ignores_the_number_of_items_is_averaged(build):
    """Of ResNetForImageClassification the Trainer thinks that it divides by them; on two equal halves that is twice
    the loss."""
    options = {"max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1}
    with pytest.warns(LowRankWarning, match="ResNetForImageClassification takes num_items_in_batch and ignores it"):
        parts = run(build("resnet", gradient_accumulation_steps=2, **options))
    whole = run(build("resnet", **options))
    assert parts.state.log_history[0]["loss"] < 1.5 * whole.state.log_history[0]["loss"]


def test_the_loss_that_is_looked_at_is_that_of_the_next_class(build):
    """ViT's own loss ignores the number of items, and would note in the model's configuration what labels it saw."""

    class Summed(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

    class Mine(LowRankMixin, Summed):
        pass

    whole = run(build("vit", trainer=Mine))
    parts = run(build("vit", trainer=Mine, per_device_train_batch_size=8, gradient_accumulation_steps=2))
    assert relative_difference(parts, whole) < 5e-6
    assert relative_difference(whole, run(build("vit"))) < 5e-6
    assert whole.model.config.problem_type is None

    class Mean(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=None)
            return (loss, outputs) if return_outputs else loss

    class MineOfMean(LowRankMixin, Mean):
        pass

    with pytest.warns(LowRankWarning, match="Mean.compute_loss takes num_items_in_batch and ignores it"):
        run(build("vit", trainer=MineOfMean, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=1))


def test_before_switch_on_it_is_the_plain_trainer(build):
    plain = build("vit", trainer=transformers.Trainer)
    plain.train()
    off = run(build("vit", start_step=4))
    assert same(state_of(plain), {k: v for k, v in state_of(off).items() if k.startswith("model.")})
    assert off.lowrank.branches["pre_logits"].updates == 0
    assert all("penalty" not in entry for entry in off.state.log_history)
    late = run(build("vit", start_epoch=0.5, start_step=1))  # 4 steps are one epoch
    assert late.lowrank.branches["pre_logits"].updates == 2
    with pytest.raises(ValueError, match="must not be negative"):
        LowRankCallback(start_step=-1)


def test_evaluation_in_between_changes_nothing(build):
    plain = run(build())
    checked = run(build(eval_strategy="steps", eval_steps=1, eval_on_start=True))
    assert same(state_of(plain), state_of(checked))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_and_compilation_change_nothing(build):
    plain = state_of(run(build("vit", max_steps=3)))
    assert same(plain, state_of(run(build("vit", max_steps=3, gradient_checkpointing=True))))
    compiled = run(build("vit", max_steps=3, torch_compile=True, torch_compile_backend="eager"))
    assert same(plain, state_of(compiled))
    assert compiled.evaluate()["eval_loss"] > 0


def test_bfloat16(build):
    trainer = run(build("vit", bf16=True))
    assert trainer.lowrank.branches["pre_logits"].bias.dtype == torch.float32
    assert trainer.lowrank.branches["pre_logits"].updates == 4
    assert relative_difference(trainer, run(build("vit"))) < 0.2
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


def test_a_skipped_optimizer_step_is_no_update(build, images):
    trainer = build(example_input=images)
    trainer.model.train()
    trainer.compute_loss(trainer.model, {"pixel_values": images, "labels": torch.arange(8)})
    for skipped, updates in ((True, 0), (False, 1)):
        trainer._callback.on_optimizer_step(None, None, None, optimizer=types.SimpleNamespace(step_was_skipped=skipped))
        assert trainer.lowrank.branches["pre_logits"].updates == updates


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize(("kind", "view"), [("vit", None), ("timm", "token"), ("timm", "pool"), ("timm", "flatten")])
def test_a_resumed_run_ends_as_an_uninterrupted_one(build, tmp_path, kind, view):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7, "start_step": 1}
    options["model_init"] = (lambda: small_vit(dropout=0.1)) if kind == "vit" else small_timm
    viewed = {LAYERS[kind]: {"rank": 4, **({"view": view} if view else {})}, "pre_logits": 4}

    def trainer(branches=viewed, **more):
        return build(kind, lowrank=config(kind, branches=branches), **{**options, **more})

    whole = run(trainer(output_dir=tmp_path / "whole"))
    run(trainer(output_dir=tmp_path / "parts", max_steps=3))
    resumed = run(trainer(output_dir=tmp_path / "parts"), resume_from_checkpoint=True)
    assert resumed.lowrank.branches["pre_logits"].updates == 6
    assert resumed.lowrank.taps[0].view.kind == view or view is None
    assert same(state_of(whole), state_of(resumed))

    folder = tmp_path / "parts" / "checkpoint-6"
    if view == "token":
        other = {**viewed, LAYERS[kind]: {"rank": 4, "view": "pool"}}
        with pytest.raises(tlr.CheckpointError, match=r"blocks.1 \(rank 4 of 64, view token.* this .* view pool"):
            run(trainer(other), resume_from_checkpoint=str(folder))
    if kind == "vit":
        for name in ("lowrank.json", "lowrank.safetensors"):
            (folder / name).unlink()
        with pytest.warns(LowRankWarning, match="holds no branches: they start anew"):
            anew = run(trainer(start_step=0), resume_from_checkpoint=str(folder))
        assert anew.lowrank.branches["pre_logits"].updates == 1


def test_a_finished_run_is_resumed_and_saved_with_its_branches(build, tmp_path):
    run(build(output_dir=tmp_path / "run", save_strategy="epoch"))
    folder = tmp_path / "run" / "checkpoint-4"
    done = run(build(output_dir=tmp_path / "run"), resume_from_checkpoint=str(folder))
    assert done.lowrank is None  # there was no batch to build the branches for
    done.save_model(tmp_path / "kept")
    assert (tmp_path / "kept/lowrank.safetensors").read_bytes() == (folder / "lowrank.safetensors").read_bytes()


def test_the_best_model_comes_with_its_branches(build):
    calls = iter([0.1, 0.9, 0.8])
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"metric_for_best_model": "q", "load_best_model_at_end": True, "greater_is_better": True}
    trainer = build("vit", max_steps=3, **every, **best)
    trainer.compute_metrics = lambda prediction: {"q": next(calls)}
    run(trainer)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert trainer.lowrank.branches["pre_logits"].updates == 2
    assert same(type(trainer.model).from_pretrained(best).state_dict(), trainer.model.state_dict())


# ------------------------------------------------------------------------------------------- mixin and callback alone


class WeightedTrainer(transformers.Trainer):
    """Somebody's own Trainer, with half the loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (loss / 2, outputs) if return_outputs else loss / 2


def test_the_mixin_on_a_trainer_of_ones_own(build):
    class Mine(LowRankMixin, WeightedTrainer):
        pass

    plain, mine = (
        run(build("vit", trainer=trainer, max_steps=1, logging_steps=1)) for trainer in (LowRankTrainer, Mine)
    )
    entry, own = plain.state.log_history[0], mine.state.log_history[0]
    assert own["penalty"] == pytest.approx(entry["penalty"])
    assert own["loss"] == pytest.approx((entry["loss"] - entry["penalty"]) / 2 + entry["penalty"])


class PenaltyTrainer(transformers.Trainer):
    """A Trainer of a `LowRankModel` that adds the penalty itself."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + model.penalty() if model.training else loss
        return (loss, outputs) if return_outputs else loss


def test_the_callback_alone(build, images, tmp_path):
    def trainer(**options):
        torch.manual_seed(0)
        model = tlr.wrap(small_vit(), config("vit"), example_input=images)
        options = {"remove_unused_columns": False, "label_names": ["labels"], **options}
        return build(model=model, trainer=PenaltyTrainer, callbacks=[LowRankCallback(model, start_step=1)], **options)

    trained = run(trainer(output_dir=tmp_path / "a", save_strategy="steps", save_steps=3))
    assert trained.model.branches["pre_logits"].updates == 3
    resumed = run(trainer(output_dir=tmp_path / "b"), resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert same(state_of(trained), state_of(resumed))
    assert not (tmp_path / "a" / "checkpoint-3" / "lowrank.json").exists()  # its state is in the Trainer's own file
    with pytest.raises(ValueError, match="brings a LowRankCallback of its own"):
        build(callbacks=[LowRankCallback(None)])


class PlainNet(torch.nn.Sequential):
    """A network that knows nothing of transformers."""

    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))


@pytest.mark.parametrize("says", [None, True, False])
def test_accumulation_divides_the_loss_of_a_wrapped_network_as_that_of_the_plain_one(build, images, says):
    class Mine(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return torch.nn.functional.cross_entropy(model(inputs["pixel_values"]), inputs["labels"])

    ends = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = PlainNet()
        if says is not None:
            model.accepts_loss_kwargs = says
        if wrapped:
            model = tlr.wrap(model, {"pre_logits": 4}, example_input=images).enable(False)
        options = {"gradient_accumulation_steps": 2, "remove_unused_columns": False, "label_names": ["labels"]}
        trained = run(Mine(model, build(**options).args, train_dataset=build().train_dataset))
        ends.append((trained.model_accepts_loss_kwargs, [one["loss"] for one in trained.state.log_history[:-1]]))
    assert ends[0] == ends[1]


def test_regional_compilation_says_what_to_do(build, monkeypatch):
    for name, value in (("BACKEND", "EAGER"), ("USE_REGIONAL_COMPILATION", "true")):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(LowRankError, match=r"compile it as a whole, .*use_regional_compilation=False"):
            build("vit").train()
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_the_callback_keeps_branches_that_are_held_aside(build, images, tmp_path):
    lowrank = build(example_input=images).lowrank
    callback = LowRankCallback(lowrank)
    args = types.SimpleNamespace(output_dir=str(tmp_path), should_save=True, load_best_model_at_end=True)
    state = transformers.TrainerState(global_step=5, best_model_checkpoint=str(tmp_path / "checkpoint-5"))
    state.log_history.append({"loss": math.nan})
    lowrank.branches["pre_logits"].bias += 1
    before = copy.deepcopy(lowrank.branches.state_dict())
    callback.on_save(args, state, None, model=None)
    state.save_to_json(str(tmp_path / "checkpoint-5" / "trainer_state.json"))
    for event in (callback.on_train_begin, callback.on_train_end):
        lowrank.branches["pre_logits"].bias += 1
        event(args, state, None, model=None)
        assert same(lowrank.branches.state_dict(), before)
    elsewhere = types.SimpleNamespace(output_dir=str(tmp_path / "other"))
    with pytest.raises(tlr.CheckpointError, match=r"other/checkpoint-5 is not, .*: give LowRankCallback\(resume_from="):
        callback.on_train_begin(elsewhere, state, None, model=None)
    callback.resume_from = tmp_path / "checkpoint-5"
    lowrank.branches["pre_logits"].bias += 1
    callback.on_train_begin(elsewhere, state, None, model=None)
    assert same(lowrank.branches.state_dict(), before)
    state.log_history[0]["loss"] = 0.5  # another run at the same step
    with pytest.raises(tlr.CheckpointError, match="resumes at step 5 of a run whose checkpoint"):
        callback.on_train_begin(elsewhere, state, None, model=None)


def test_the_recording_forward_gives_the_model_its_forward_back(build, images):
    trainer = build("vit", example_input=images)
    model, lowrank = trainer.model.train(), trainer.lowrank
    replaced = RecordingForward(model, lowrank)
    copy.deepcopy(model)(images)  # such as an average of weights
    with pytest.raises(CaptureError, match="needs a forward pass"):
        lowrank.penalty()
    model(images)
    assert lowrank.penalty().requires_grad
    below = model.forward
    model.forward = lambda *args, **kwargs: below(*args, **kwargs)
    replaced.remove()
    model(images)
    with pytest.raises(CaptureError, match="needs a forward pass"):
        lowrank.penalty()


# -------------------------------------------------------------------------------------------- what does not go, and two


def test_what_the_branches_do_not_work_with(build, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(LowRankError, match=r"do not work with nn.DataParallel.*torchrun"):
        build()
    # Would be saved without its activation.
    odd = timm.create_model("test_resnet", num_classes=10, in_chans=1, act_layer=torch.nn.SiLU)
    with pytest.raises(tlr.CheckpointError, match=r"was made with act_layer as Python objects"):
        build(model=odd)


def test_without_transformers_the_error_names_it(monkeypatch):
    name = "timm_lowrank.integrations.trainer"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers accelerate"):
        importlib.import_module(name)


def one_of_two(rank, folder, port):
    """Trains in an environment as torchrun makes it, and keeps the state that it ends with."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 6, "ddp_backend": "gloo"}
    args = transformers.TrainingArguments(folder, **ARGUMENTS | sizes | options)
    torch.manual_seed(0)
    data = torch.load(f"{folder}/data.pt")
    trainer = run(LowRankTrainer(model=small_vit(), args=args, lowrank=config("vit"), train_dataset=data))
    torch.save(state_of(trainer), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def both(*arguments):
    """The two of them; they share what was imported."""
    torch.multiprocessing.start_processes(one_of_two, args=arguments, nprocs=2, start_method="fork")


def test_two_processes_are_as_one(build, data, tmp_path):
    """2 processes x 2 batches of 4 against one batch of 16."""
    torch.save(data, tmp_path / "data.pt")
    log = tmp_path / "log"
    started = forked.start(both, str(tmp_path), str(free_port()), log=log, environment={"OMP_NUM_THREADS": "1"})
    forked.finish(started, logs=[log])
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert same(first, second)
    alone = run(build("vit", max_steps=6))
    for key, value in state_of(alone).items():
        if key.startswith("model.") or key.endswith("bias"):
            assert (first[key] - value).norm() < 1e-4 * value.norm() + 1e-7, key
    assert (tmp_path / "checkpoint-6" / "lowrank.safetensors").is_file()
