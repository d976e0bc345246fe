"""The console command: what it prints, its exit status, and that the scripts are the same code."""

import atexit
import ctypes
import dataclasses
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import yaml
from evaluations import SHORT_DIAGNOSIS
from pictures import RUNS, undrawn

import timm_lowrank
from timm_lowrank import LowRankConfig, __version__
from timm_lowrank.cli import COMMANDS, main
from timm_lowrank.evaluation.masking import BUDGETS
from timm_lowrank.training.checkpoints import damage
from timm_lowrank.training.recipe import Recipe, load_recipe, recipe_names

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


@pytest.mark.parametrize("precision", ["bf16", "float16", "mixed"])
def test_an_evaluation_in_half_precision_is_refused_with_the_reason(precision, capsys):
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "runs/none", "--precision", precision])
    assert left.value.code == 2
    printed = capsys.readouterr().err
    assert "networks are evaluated in float32 alone" in printed
    assert "gradient masking" in printed
    assert "./nowhere is no run folder" in fails(capsys, "evaluate", "./nowhere", "--precision", "float32")


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


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A folder of files and folders that are not what they are called."""
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "binary.yaml": b"\xff\xfe\x00\x01", "zeros.yaml": b"epochs: 3\x00", "empty.yaml": b"", "list.yaml": b"[1]",
        "tab.yaml": b"a:\n\t- b: [", "deep.yaml": b"[" * 600, "date.yaml": b"epochs: 2024-99-99",
        "page.md": b"\xff\xfe", "run/config.yaml": b"\x80\xff", "run/summary.json": b"", "run/model/config.json": b"",
        "net/config.json": b"", "net/model.safetensors": b"", "bytes/config.json": b"\xff\x80", "file": b"x",
        "array/config.json": b"[]", "other/config.json": b"{}", "evaluated/evaluation.json": b"\x80",
        "blank/evaluation.json": b"",
    }.items():  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    return {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}


HOSTILE = {
    "train ''": "there is no recipe ''",
    "train binary.yaml": "cannot read the recipe binary.yaml",
    "train zeros.yaml": "zeros.yaml is not valid YAML",
    "train empty.yaml": "empty.yaml must hold a mapping",
    "train list.yaml": "list.yaml must hold a mapping",
    "train tab.yaml": "tab.yaml is not valid YAML: .*line 2, column 1",
    "train deep.yaml": "deep.yaml is not valid YAML: lists and mappings inside each other",
    "train date.yaml": "date.yaml is not valid YAML: month must be in 1..12",
    "train --set epochs={": "--set epochs={: the value is not valid YAML",
    "train --set name=../x": "name='../x' is not the name of a folder",
    "train --set name=..": "name='..' is not the name of a folder",
    "train --set workers=1000000": "workers=1000000 must be <= 512",
    "train --data . --set image_size=1000000000000": "image_size=1000000000000 must be at least 1 and at most 8192",
    "train --set data_args.train_limit=1000000000000": "cannot take limit=1000000000000 of the 1437 images",
    "train --set seed=99999999999999999999": "seed=.* must be < 2\\*\\*63",
    "train --noise 5": "unrecognized arguments: --noise",
    "train --resume never": "argument --resume: invalid choice",
    "evaluate file": "file is no run folder",
    "evaluate run": "config.json is not valid JSON",
    "evaluate net": "config.json is not valid JSON",
    "evaluate bytes": "config.json is not valid JSON",
    "evaluate array": "config.json must hold a JSON object",
    "evaluate other": "config.json names no architecture",
    "evaluate run --limit -1": "argument --limit: -1 must be at least 1",
    "evaluate run --limit x": "argument --limit: 'x' is no whole number",
    "evaluate run --train-limit 0": "argument --train-limit: 0 must be at least 1",
    "evaluate run --spectrum-limit -2": "argument --spectrum-limit: -2 must be",
    "evaluate run --table-limit 0": "argument --table-limit: 0 must be",
    "evaluate run --batch-size 0": "argument --batch-size: 0 must be",
    "evaluate run --seed -1": "argument --seed: -1 must be at least 0",
    "evaluate run --seed 99999999999999999999": "argument --seed: .* less than",
    "evaluate run --radii 8 nan": "argument --radii: 'nan' is no number of levels",
    "evaluate run --radii 300": "argument --radii: '300' is no number of levels",
    "evaluate run --suite slow": "argument --suite: invalid choice: 'slow'",
    "evaluate run --output file": "the output file is a file",
    "compare run --noise 5": "unrecognized arguments: --noise 5",
    "compare run": "the recipe of the run in run cannot be read",
    "compare evaluated": "evaluation.json is not valid JSON",
    "compare blank": "evaluation.json is not valid JSON",
    "reproduce --table 0": "argument --table: 0 must be at least 1",
    "reproduce --table 5 --seeds -1": "argument --seeds: -1 must be at least 0",
    "reproduce --table 5 --images -1": "argument --images: -1 must be",
    "reproduce --figure 2 --train-images -5": "argument --train-images: -5 must be",
    "reproduce --table 5 --spectrum-limit 0": "argument --spectrum-limit: 0 must be",
    "reproduce --table 5 --runs file": "file/fixtures/cifar10.*: Not a directory",
    "reproduce --fill page.md": "cannot read the page page.md",
    "push run me/x --dry-run preview": "the recipe of the run in run cannot be read",
    "pull me/x --sha256 zz": "argument --sha256: 'zz' is no sha256",
    "pull me/x --sha256 ''": "argument --sha256: '' is no sha256",
    "layers resnet18 --depth -1": "argument --depth: -1 must be at least 0",
    "layers resnet18 --model-args []": "argument --model-args: '\\[]' is no JSON object",
    "layers resnet18 --model-args {": "argument --model-args: '{' is no JSON object",
    """layers resnet18 --model-args '{"in_chans": -1}'""": "resnet18 with {'in_chans': -1}: ",
}


@pytest.mark.parametrize("line", HOSTILE)
def test_hostile_arguments_and_files_are_one_line_and_leave_nothing(line, broken, capsys, tmp_path):
    try:
        status = main(shlex.split(line))
    except SystemExit as left:  # argparse's own way
        status = left.code
    assert status in (1, 2)
    (said,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{HOSTILE[line]}", said)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == broken


@pytest.mark.parametrize("written", ["precision: no", "precision: off", "precision: 'no'", "precision: false"])
def test_precision_no_is_a_word(written, tmp_path):
    (tmp_path / "a.yaml").write_text(f"model: resnet18\nepochs: 1\n{written}\n")
    assert load_recipe(tmp_path / "a.yaml").precision == "no"
    assert load_recipe("digits", [written.replace(": ", "=")]).precision == "no"


def test_memory_that_is_not_there_is_one_line(capsys, monkeypatch):
    def greedy(given):
        raise MemoryError

    monkeypatch.setitem(COMMANDS, "layers", (COMMANDS["layers"][0], greedy, ""))
    assert fails(capsys, "layers", "resnet18") == "error: layers needs more memory than there is\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_a_terminal_cannot_show_is_replaced(encoding, stream, monkeypatch):
    shown = "10.0 ± 1.0, 10⁻³, 图像, \udcff"
    written = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, stream, written)
    command = (COMMANDS["layers"][0], lambda given: print(shown, file=getattr(sys, stream)), "")
    monkeypatch.setitem(COMMANDS, "layers", command)
    assert main(["layers", "resnet18"]) == 0
    written.flush()
    assert written.buffer.getvalue().decode(encoding).strip() == shown.encode(encoding, "replace").decode(encoding)


def test_output_that_nobody_takes_is_no_traceback():
    """To the end of Python, which flushes once more: of two programs that share their start."""
    code = """if True:
        import os, sys
        from timm_lowrank import cli
        read, pipe = os.pipe()
        os.close(read)
        for place in (pipe, os.open("/dev/full", os.O_WRONLY)):
            if os.fork() == 0:
                os.dup2(place, 1)
                sys.exit(cli.main(["layers", "test_resnet"]))
            print("ended with", os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr, flush=True)
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    full = "error: layers: No space left on device\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", f"ended with 1\n{full}ended with 1\n")


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def interrupted(given):
        raise KeyboardInterrupt

    declare, _, after = COMMANDS["layers"]
    monkeypatch.setitem(COMMANDS, "layers", (declare, interrupted, after))
    assert main(["layers", "resnet18"]) == 130
    assert capsys.readouterr().err == f"interrupted: {after}\n"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setenv("RANK", "1")  # the first process says it
    assert main(["layers", "resnet18"]) == 130
    assert capsys.readouterr().err == ""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def lost_in_a_destructor():
    """Python only prints what is raised there, and goes on; modules that are imported leave many such callbacks."""

    class Gone:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    Gone()
    for _ in range(300):  # in Python itself the interruption is seen between two instructions, not inside of one
        time.sleep(0.1)
    raise AssertionError("it went on")


def turned_into_another_error():
    """As extensions do that are interrupted while they are loaded."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ImportError("initialization failed") from None


@pytest.mark.parametrize("interrupted", [lost_in_a_destructor, turned_into_another_error])
def test_ctrl_c_is_not_lost(interrupted, capsys, monkeypatch):
    declare, _, after = COMMANDS["layers"]
    monkeypatch.setitem(COMMANDS, "layers", (declare, lambda given: interrupted(), after))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = sys.unraisablehook
    assert main(["layers", "resnet18"]) == 130
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert capsys.readouterr().err == f"interrupted: {after}\n"
    assert sys.unraisablehook is before


def test_ctrl_c_before_a_command_begins_is_one_line(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("timm_lowrank.cli._parser", interrupted)
    assert main(["layers", "resnet18"]) == 130
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert capsys.readouterr().err == "interrupted: nothing was written\n"


def test_ctrl_c_at_the_end_of_the_process_prints_no_traceback(tmp_path):
    log, errors = tmp_path / "out", tmp_path / "err"
    process = forked.start(layers_and_a_minute, log=log, errors=errors)
    while not (log.exists() and log.read_text().endswith("leaving\n")):
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert log.read_text().endswith("leaving\n")
    assert errors.read_text() == ""
    assert process.exitcode == -signal.SIGINT


def layers_and_a_minute():
    """A command in a Python that takes long to end."""
    atexit.register(lambda: (print("leaving", flush=True), time.sleep(60)))
    # A forked process would leave without the last things that Python does.
    ctypes.pythonapi.Py_Exit(main(["layers", "test_resnet"]))


def test_ctrl_c_under_accelerate_launch_is_one_line_and_keeps_the_checkpoint(tmp_path):
    """To the whole group of processes, as a terminal sends it; what the launcher says of itself is its own."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    small = ["epochs=500", "twin=false", "pretrain_epochs=0", "data_args.train_limit=128", "batch_size=64"]
    small += ["model_args.channels=[8,8,8,8]", "lowrank.branches={layer3: 4}"]
    changes = [word for change in small for word in ("--set", change)]
    command = [*launch, "-m", "timm_lowrank", "train", *changes, "--output", str(tmp_path / "run")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    said = []
    for line in started.stdout:
        said.append(line)
        if line.startswith("epoch   2/"):
            os.killpg(started.pid, signal.SIGINT)
    assert started.wait(timeout=120) != 0
    assert said.count("interrupted: continue with the same command and --resume auto\n") == 1, "".join(said)
    assert not [line for line in said if line.startswith("  File") and "timm_lowrank" in line]
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert damage(newest) is None


def test_the_layers_of_a_network_with_arguments_are_wrapped_with_them(capsys):
    arguments = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "global_pool": "avg"}
    assert main(["layers", "vit_tiny_patch16_224", "--model-args", json.dumps(arguments)]) == 0
    said = capsys.readouterr().out.split("\nnext:\n  ")[1]
    model = eval(said, {"timm_lowrank": timm_lowrank, "LowRankConfig": LowRankConfig, "RANK": 4})
    assert (list(model.branches), model.backbone.embed_dim) == (["pre_logits"], 24)


def test_train_evaluate_compare_say_where_they_wrote_and_what_comes_next(
    capsys, tmp_path, monkeypatch, fresh_accelerate
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BUDGETS, "quick", SHORT_DIAGNOSIS)
    monkeypatch.setattr(RUNS, undrawn)
    short = ["--set", "epochs=2", "--set", "pretrain_epochs=1", "--set", "lowrank.warmup_updates=2"]
    short += ["--set", "data_args.train_limit=320"]
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
