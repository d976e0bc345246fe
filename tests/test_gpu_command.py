"""benchmarks/gpu.py on a CPU: what it plans, what it writes while it runs, and what is left when it is cut."""

import json
import time
import types
from pathlib import Path

import pytest
import torch
from scripts import benchmark

from timm_lowrank import cli
from timm_lowrank.training import load_recipe

LOG = """tests/test_gpu.py::test_one[1] PASSED     [ 25%]
tests/test_gpu.py::test_two[a b] FAILED           [ 50%]
tests/test_gpu.py::test_three SKIPPED (no) [ 75%]
tests/test_gpu.py::test_four """

BETWEEN = "between two projections"


@pytest.fixture(scope="module")
def gpu():
    with benchmark("gpu") as module:
        yield module


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("parts", ["tests,steps,compiled,train", "compiled", "train,steps", "train", "steps,tests"])
@pytest.mark.parametrize("minutes", [1.0, 9.0])
def test_a_plan_fits_into_the_time(gpu, capsys, parts, minutes):
    gpu.main(["--plan", "--minutes", str(minutes), "--parts", parts])
    plan = json.loads(capsys.readouterr().out)
    assert list(plan["seconds"]) == parts.split(",")
    assert min(plan["seconds"].values()) >= 10
    assert sum(plan["seconds"].values()) <= 60 * minutes
    assert bool(plan["cells"]) == ("steps" in parts or "compiled" in parts)
    assert any("compiled" in cell for cell in plan["cells"]) == ("compiled" in parts)


def test_wrong_parts_and_a_machine_without_a_gpu_are_refused(gpu, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in ((["--parts", "steps,trian"], "trian is not one of"), ([], "there is no CUDA device")):
        with pytest.raises(SystemExit):
            gpu.main(arguments)
        assert message in capsys.readouterr().err


def test_the_fast_settings_are_a_recipe(gpu):
    made = load_recipe(gpu.FAST, ["epochs=30", "pretrain_epochs=4"])
    assert (made.precision, made.schedule, made.milestones, made.channels_last) == ("bf16", "cosine", (), True)
    assert load_recipe("digits", [*gpu.TINY]).precision == "no"


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_whole_runs_on_a_cpu_and_leaves_each_part(gpu, monkeypatch, tmp_path, capsys):
    """In this process: starting six others takes a minute. How they are started the next test tries."""
    seen = []

    def start(arguments, log):
        seen.append(read(tmp_path))  # what is written by now
        if "pytest" in arguments:
            log.write_text(LOG)
        elif arguments[0] == gpu.__file__:
            gpu.main(arguments[1:])
        else:
            assert arguments[:2] == ["-m", "timm_lowrank"]
            assert cli.main(arguments[2:]) in (0, None)
        return types.SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(gpu, "start", start)
    gpu.main(["--tiny", "--minutes", "3", "--output", str(tmp_path)])
    result, text = read(tmp_path), (tmp_path / "results.md").read_text()
    assert [bool(at["tests"]) for at in seen] == [False, *[True] * 6]
    assert [bool(at["steps"]) for at in seen] == [False, False, *[True] * 5]
    assert [bool(at["profile"]) for at in seen] == [False, False, False, *[True] * 4]
    assert {key: result["tests"][key] for key in ("passed", "failed", "skipped", "failures")} == {
        "passed": 1, "failed": 1, "skipped": 1, "failures": ["tests/test_gpu.py::test_two[a b]"],
    }  # fmt: skip
    assert [row["variant"] for row in result["steps"]] == ["plain", "1-LR", "2-LR", "plain", "2-LR"]
    assert all(row["wall_ratio"] > 0 and row["wall_ms"] >= row["device_ms"] > 0 for row in result["steps"])
    profiled = [(part["variant"], part["phase"]) for part in result["profile"]]
    assert profiled == [("plain", BETWEEN), ("2-LR", BETWEEN), ("2-LR", "with a projection")]
    names = [{row["name"] for row in part["operations"]} for part in result["profile"]]
    assert all("aten::mkldnn_convolution" in some or "aten::convolution_backward" in some for some in names)
    assert not any(name.startswith("aten::linalg_") for name in names[0])
    assert all(0 < sum(row["host_ms"] for row in part["operations"]) <= part["host_ms"] for part in result["profile"])
    assert [(run["run"], run["epochs"], run["state"]) for run in result["train"]["runs"]] == [
        ("N-LR", 2, "finished"), ("2-LR", 2, "finished"),
    ]  # fmt: skip
    assert "penalty" in result["train"]["runs"][1]["metrics"][-1]
    assert text.count("| resnet10_cifar, batch 8, float32 |") == 3
    assert "| `aten::mm` |" in text
    assert "| 2-LR | 2 |" in text
    assert capsys.readouterr().out.endswith(text + "\n")


def test_a_process_that_takes_too_long_is_ended_and_what_it_wrote_is_kept(gpu, tmp_path):
    log, calls = tmp_path / "log", []
    process = gpu.start(["-c", "import time; print('begun'); time.sleep(60)"], log)
    while log.read_text() != "begun\n":
        assert process.poll() is None
        time.sleep(0.05)
    assert not gpu.wait([process], 0.3, lambda: calls.append(1))
    assert process.returncode not in (0, None)
    assert log.read_text() == "begun\n"
    assert calls
    ended = gpu.start(["-c", "import importlib.util; assert importlib.util.find_spec('timm_lowrank')"], log)
    assert gpu.wait([ended], 60)
    assert ended.returncode == 0
    run = tmp_path / "2-LR"
    run.mkdir()
    assert gpu._read_run("2-LR", run, process) is None
    header = "epoch,test_accuracy,images_per_second,seconds\n"
    (run / "metrics.csv").write_text(header + "1,0.5,100,2\n2,0.4,300,3\n")
    told = gpu._read_run("2-LR", run, process)
    assert (told["epochs"], told["test_accuracy"], told["best_test_accuracy"], told["seconds"]) == (2, 0.4, 0.5, 5)
    assert told["state"] == "cut"
