"""The console command: what it prints, its exit status, and that the scripts are the same code."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from timm_lowrank import __version__
from timm_lowrank.cli import COMMANDS, main
from timm_lowrank.training.recipe import Recipe, recipe_names

ROOT = Path(__file__).parent.parent


def fails(capsys, *arguments):
    """The one message of a command that must fail with status 1."""
    assert main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    return printed.err


def helped(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_version_and_commands(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"timm-lowrank {__version__}\n"
    text = helped(capsys)
    assert all(name in text for name in COMMANDS)
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name, capsys):
    assert f"timm-lowrank {name} " in helped(capsys, name).split("\n\n", 1)[1]


def test_the_help_of_train_shows_every_recipe_and_every_key(capsys):
    text = helped(capsys, "train")
    assert all(name in text for name in recipe_names())
    shown = text.partition("keys of a recipe")[2]
    for field in dataclasses.fields(Recipe):
        assert f"\n  {field.name} " in shown, field.name
    assert "0.0005" in shown or "5e-4" in shown  # the default of weight_decay


def test_recipes_are_found_by_name_and_are_those_of_the_folder():
    assert sorted(recipe_names()) == sorted(path.stem for path in (ROOT / "recipes" / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "cifar10-smal"], "cifar10-small"),
        (["train", "digits", "--config", "digits"], "two recipes"),
        (["train", "--set", "epocs=3"], "Did you mean: epochs"),
        (["evaluate", "no/such/run"], "no/such/run"),
        (["compare", "no/such/run"], "no/such/run"),
        (["push", "no/such/run", "me/x", "--dry-run", "preview"], "no/such/run"),
        (["pull", "not a repository"], "not a repository"),
        (["layers", "resnet1"], "Did you mean"),
    ],
)
def test_a_mistake_is_one_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["matplotlib.figure", "sklearn.linear_model"])
def test_a_package_that_is_missing_is_said_before_measuring(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install" in fails(capsys, "evaluate", "no/such/run")


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def interrupted(given):
        raise KeyboardInterrupt

    declare, _, after = COMMANDS["layers"]
    monkeypatch.setitem(COMMANDS, "layers", (declare, interrupted, after))
    assert main(["layers", "resnet18"]) == 130
    assert capsys.readouterr().err == f"interrupted: {after}\n"


def test_train_evaluate_compare_say_where_they_wrote_and_what_comes_next(
    capsys, tmp_path, monkeypatch, fresh_accelerate
):
    monkeypatch.chdir(tmp_path)
    short = ["--set", "epochs=2", "--set", "pretrain_epochs=1", "--set", "lowrank.warmup_updates=2"]
    assert (
        main(["train", *short, "--set", "model_args.channels=[8, 8, 8, 8]", "--set", "lowrank.branches={layer3: 4}"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "written to runs/digits" in printed
    assert "timm-lowrank evaluate runs/digits" in printed
    assert yaml.safe_load(Path("runs/digits/config.yaml").read_text())["epochs"] == 2
    assert main(["evaluate", "runs/digits", "--limit", "20", "--train-limit", "100"]) == 0
    printed = capsys.readouterr().out
    assert "runs/digits: report.html, evaluation.json" in printed
    assert "the page: runs/digits/report.html" in printed
    assert "timm-lowrank push runs/digits USER/NAME" in printed
    command = json.loads(Path("runs/digits/evaluation.json").read_text())["command"]
    assert command == "timm-lowrank evaluate runs/digits --limit 20 --train-limit 100"
    assert main(["compare", "runs/digits", "--json", "figures.json"]) == 0
    printed = capsys.readouterr().out
    assert "written to figures.json" in printed
    assert "layer3" in printed


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("recipes/train.py", "train"),
        ("recipes/evaluate.py", "evaluate"),
        ("recipes/compare.py", "compare"),
        ("hub/push.py", "push"),
        ("hub/pull.py", "pull"),
    ],
)
def test_the_scripts_are_the_same_commands(path, command, monkeypatch):
    """They are what `accelerate launch` and torchrun take; everything they do is the console command's."""
    received = []
    monkeypatch.setattr("timm_lowrank.cli.main", lambda arguments=None: received.append(arguments) or 7)
    monkeypatch.setattr(sys, "argv", [path, "one", "--two"])
    spec = importlib.util.spec_from_file_location("script", ROOT / path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with pytest.raises(SystemExit) as left:
        script.main()
    assert left.value.code == 7
    assert received == [[command, "one", "--two"]]


def test_python_m_is_the_console_command():
    done = subprocess.run(
        [sys.executable, "-m", "timm_lowrank", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"timm-lowrank {__version__}\n"
