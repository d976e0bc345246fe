"""The launcher of timm's train script, on a stand-in of the same shape: `timm_standin.py`, which knows no low rank."""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from states import same

from timm_lowrank import LowRankConfig
from timm_lowrank.integrations import timm_train
from timm_lowrank.integrations.timm_train import ScriptError, ScriptPatch, loaded_script, read_config, split_arguments

SCRIPT = Path(__file__).with_name("timm_standin.py")
BRANCHES = ["branches.layer3=8", "branches.pre_logits=6", "warmup_updates=1", "project_every=2", "scale=unit"]
LOWRANK = ["--lowrank", "1-LR", *(word for override in BRANCHES for word in ("--lowrank-set", override))]


def run(output, *arguments):
    timm_train.main([str(SCRIPT), *LOWRANK, "--output", str(output), *arguments])
    return load(output / "last.pth.tar")


def load(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def updates(checkpoint):
    """Update Steps of each branch."""
    return {int(v[0]) for key, v in checkpoint["task_state"]["branches"].items() if key.endswith("counters")}


@pytest.fixture
def stops(capsys):
    """A function that runs the launcher, which must end in status 2, and gives the last line of what it says."""

    def check(*arguments):
        with pytest.raises(SystemExit) as stopped:
            timm_train.main([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return check


# ---------------------------------------------------------------------------------------------------- training


def test_a_run_that_is_cut_short_resumes_to_the_bit_with_ema_accumulation_and_clipping(tmp_path):
    extras = ["--epochs", "3", "--model-ema", "--grad-accum-steps", "2", "--clip-grad", "1.0"]
    whole = run(tmp_path / "whole", *extras)
    run(tmp_path / "cut", *extras, "--stop-after", "1")
    resumed = run(tmp_path / "resumed", *extras, "--resume", str(tmp_path / "cut" / "last.pth.tar"))
    assert updates(whole) == {6}  # 3 batches of an epoch, two of them together, make 2 updates
    for part in ("state_dict", "state_dict_ema"):
        assert same(whole[part], resumed[part])
    assert same(whole["task_state"]["branches"], resumed["task_state"]["branches"])
    assert whole["task_state"]["config"]["branches"] == {"layer3": 8, "pre_logits": 6}

    plain = timm.create_model("test_resnet", num_classes=10)
    timm.models.load_checkpoint(plain, str(tmp_path / "whole" / "last.pth.tar"), use_ema=False)
    assert same(plain.state_dict(), whole["state_dict"])


def test_before_the_start_epoch_training_is_plain_and_the_script_is_what_it_was(tmp_path):
    joined = run(tmp_path / "joined", "--lowrank-start-epoch", "1", "--epochs", "1")
    with loaded_script(SCRIPT, ["--epochs", "1"]) as script:
        plain = script.main()
    assert same(joined["state_dict"], plain.get_trainable_module().state_dict())
    assert updates(joined) == {0}
    on = run(tmp_path / "on", "--lowrank-start-epoch", "1", "--resume", str(tmp_path / "joined" / "last.pth.tar"))
    assert updates(on) == {3}
    assert not same(on["state_dict"], joined["state_dict"])


def test_the_log_and_the_summary_say_how_far_the_branches_are(tmp_path, caplog):
    with caplog.at_level("INFO"):
        checkpoint = run(tmp_path, "--lowrank-start-epoch", "1", "--epochs", "3")
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == list("012")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Branches: ")]
    assert len(lines) == 2  # of the epochs in which they are on
    for layer, rank in (("layer3", 8), ("pre_logits", 6)):
        assert [row[f"train_{layer}.outside"] for row in rows[:1]] == ["nan"]
        assert all(0 < float(row[f"train_{layer}.outside"]) < 1 for row in rows[1:])
        assert all(float(row[f"train_{layer}.penalty"]) > 0 for row in rows[1:])
        assert int(rows[-1][f"train_{layer}.rank"]) == rank  # 6 updates, projected at every second one
        share = float(rows[-1][f"train_{layer}.outside"])
        assert f"{layer}: penalty" in lines[-1]
        assert f"{share:.1%} of the energy outside W, rank {rank} (target {rank}) after 6 updates" in lines[-1]
    assert updates(checkpoint) == {6}


def test_a_script_whose_epochs_measure_something_else_still_logs_the_branches(tmp_path, caplog):
    source = SCRIPT.read_text().replace("OrderedDict(loss=sum(losses) / len(losses))", "sum(losses) / len(losses)")
    source = source.replace("measured['loss']", "measured").replace("epoch, measured,", "epoch, {},")
    (tmp_path / "other.py").write_text(source)
    with caplog.at_level("INFO"):
        timm_train.main([str(tmp_path / "other.py"), *LOWRANK, "--epochs", "1"])
    assert "Branches: layer3: penalty" in caplog.text


@pytest.mark.parametrize("arguments", ["--amp --bce-loss --opt adamw", "--multi-label --opt lookahead_adamw"])
def test_the_update_step_follows_the_optimizer(tmp_path, arguments):
    checkpoint = run(tmp_path, *arguments.split())
    assert updates(checkpoint) == {6} == {int(checkpoint["optimizer"]["state"][0]["step"])}
    assert checkpoint["state_dict"].keys() == timm.create_model("test_resnet").state_dict().keys()


def test_steps_that_the_gradient_scaler_skips_do_not_count(tmp_path):
    checkpoint = run(tmp_path, "--loss-scale", "1e38", "--opt", "adamw", "--lowrank-set", "reconstruction_weight=1e4")
    steps = int(checkpoint["optimizer"]["state"][0]["step"])
    assert 0 < steps < 6
    assert updates(checkpoint) == {steps}


def test_two_processes_train_one_model_together(tmp_path):
    """Launched as users do; the saved network is plain, and W and b are alike on both."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    module = ["-m", timm_train.__name__, str(SCRIPT), *LOWRANK, "--output", str(tmp_path), "--grad-accum-steps", "2"]
    done = subprocess.run([*launch, *module], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    checkpoint = load(tmp_path / "last.pth.tar")
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["branches"] for rank in (0, 1)]
    assert same(states[0], states[1])
    assert same(states[0], checkpoint["task_state"]["branches"])
    assert updates(checkpoint) == {2}  # 2 batches of an epoch and process, taken together
    assert done.stdout.count("epoch 1:") == 1
    plain = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(tmp_path / "last.pth.tar"))
    assert same(plain.state_dict(), checkpoint["state_dict"])


# ---------------------------------------------------------------------------------------------- the command line


def test_arguments_are_told_apart_and_keep_their_order():
    words = ["--model", "a", "--lowrank", "2-LR", "data", "-b", "3", "--lowrank-set=x=1", "--lowranks", "--lowrank-set"]
    own, others = split_arguments([*words, "y=2", "--", "-c"])
    assert own == ["--lowrank", "2-LR", "--lowrank-set=x=1", "--lowrank-set", "y=2"]
    assert others == ["--model", "a", "data", "-b", "3", "--lowranks", "--", "-c"]


def test_help_is_that_of_the_launcher_and_of_the_script(capsys):
    timm_train.main(["--help"])
    assert "--lowrank-start-epoch" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        timm_train.main([str(SCRIPT), "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert shown.index("--lowrank-start-epoch") < shown.index("--grad-accum-steps")
    assert "usage: timm_standin.py" in shown


def test_the_script_leaves_the_interpreter_as_it_was():
    before = sys.argv, list(sys.path)
    with loaded_script(SCRIPT, ["--epochs", "7"]) as script:
        assert sys.argv == [str(SCRIPT), "--epochs", "7"]
        assert sys.path[0] == str(SCRIPT.parent)
        assert script.parser.parse_args().epochs == 7
    assert (sys.argv, sys.path) == before
    assert "timm_train_script" not in sys.modules


def test_configurations_from_presets_files_and_overrides(tmp_path):
    assert read_config("2-LR") == LowRankConfig(branches="2-LR")
    yaml = tmp_path / "a.yaml"
    yaml.write_text("branches: {layer3: 8}\nreconstruction_weight: 5e-1\n")
    assert read_config(str(yaml), ["branches.layer4.0=3", "step_size=1e-1"]) == LowRankConfig(
        branches={"layer3": 8, "layer4.0": 3}, reconstruction_weight=0.5, step_size=0.1
    )
    config = LowRankConfig(branches={"layer3": {"rank": 3, "norm_weight": 1.0}}, seed=4)
    (tmp_path / "b.json").write_text(json.dumps(config.to_dict()))
    assert read_config(str(tmp_path / "b.json")) == config


def test_configurations_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "broken.yaml").write_text("branches: {")
    (tmp_path / "cat.yaml").write_bytes(b"\xff\xfe\x00")
    for source, override, message in [
        ("2LR", "", "Did you mean: 2-LR"),
        (tmp_path / "lists.yaml", "", "Did you mean: list.yaml"),
        (tmp_path / "list.yaml", "", "holds no mapping"),
        (tmp_path / "broken.yaml", "", "not valid YAML"),
        (tmp_path / "cat.yaml", "", "cannot be read"),
        (tmp_path, "", "cannot be read"),
        ("1-LR", "stepsize=1", "Did you mean: step_size"),
        ("1-LR", "step_size", "KEY=VALUE"),
        ("1-LR", "step_size={", "not valid YAML"),
        ("1-LR", "step_size=a", "must lie in"),
    ]:
        with pytest.raises(ScriptError, match=message):
            read_config(str(source), [override] if override else [])


def test_wrong_command_lines_end_in_one_line(stops, tmp_path):
    assert "first argument must be the path" in stops()
    assert "first argument must be the path" in stops("--lowrank", "1-LR")
    assert "--lowrank is missing: 1-LR, 2-LR" in stops(SCRIPT)
    assert "unrecognized arguments: --lowrank-foo 3" in stops(SCRIPT, "--lowrank", "1-LR", "--lowrank-foo", "3")
    assert "expected one argument" in stops(SCRIPT, "--lowrank")
    assert "no number of epochs" in stops(SCRIPT, "--lowrank", "1-LR", "--lowrank-start-epoch", "-3")
    assert "not part of its wheel" in stops(tmp_path / "train.py", "--lowrank", "1-LR")
    assert "unrecognized arguments: --epoch-count" in stops(SCRIPT, "--lowrank", "1-LR", "--epoch-count")


def test_what_a_branch_cannot_go_with_is_refused(stops):
    run = [SCRIPT, "--lowrank", "1-LR"]
    assert "layr3" in stops(*run, "--lowrank-set", "branches.layr3=8")
    assert "leave out --kd-model-name" in stops(*run, "--kd-model-name", "test_resnet")
    assert "leave out --torchscript" in stops(*run, "--torchscript")


# --------------------------------------------------------------------------------------------------- other scripts


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("print('hello')", "not timm's train script"),
        ("from timm import utils\nx = 1", "not timm's train script"),
        ("def main(:", "no Python script"),
        ("\0", "no Python script"),
        ("from timm.models import create_model\ndef main(): pass", "does not use timm.task.ClassificationTask"),
        ("from timm.task import ClassificationTask\ndef main(): pass", r"does not use task.update_ema\(\)"),
    ],
)
def test_other_scripts_are_told_from_their_source_and_never_run(tmp_path, source, message):
    path = tmp_path / "other.py"
    path.write_text(source + "\nraise SystemError")
    with pytest.raises(ScriptError, match=message), loaded_script(path, []):
        pass


def test_the_start_epoch_needs_a_script_that_has_epochs(tmp_path):
    source = SCRIPT.read_text().replace("train_one_epoch", "train_some")
    (tmp_path / "other.py").write_text(source)
    with pytest.raises(ScriptError, match="no train_one_epoch"), loaded_script(tmp_path / "other.py", []) as script:
        ScriptPatch(LowRankConfig(), start_epoch=3).install(script)
