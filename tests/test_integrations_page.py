"""Every program of docs/integrations.md runs as it stands."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import forked
import huggingface_hub.constants
import pytest

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
PROGRAMS = [(language, text) for language, text in BLOCKS if language in ("python", "sh")]
HEADINGS = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_there_is_a_program_for_every_loop():
    wanted = {
        "A plain PyTorch loop": "plain PyTorch",
        "A loop with accelerate": "accelerate",
        "timm.task": "timm.task",
        "timm's train.py": "timm's train.py",
        "Lightning": "Lightning",
        "transformers.Trainer": "transformers.Trainer",
    }
    assert [heading for heading in HEADINGS if heading in wanted] == list(wanted)
    table = PAGE.read_text(encoding="utf-8").split("| loop | optimizer |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert [row[0] for row in rows] == list(wanted.values())
    assert all(len(row) == 5 and all(row) for row in rows)
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    for section in sections:
        if section.splitlines()[0] in wanted:
            assert "```python" in section or "```sh" in section


@pytest.mark.parametrize(("language", "program"), PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_are_short(language, program):
    assert len(program.splitlines()) <= 40
    assert max(map(len, program.splitlines())) <= 120


def run_program(path):
    """As `python PATH` does in the folder of the file."""
    os.chdir(path.parent)
    sys.argv, sys.path[0] = [path.name], str(path.parent)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    runpy.run_path(path.name, run_name="__main__")


@pytest.mark.parametrize(("language", "program"), PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_run(language, program, tmp_path):
    for package in re.findall(r"^import (lightning)$", program, re.MULTILINE):
        pytest.importorskip(package)
    path = tmp_path / ("program.py" if language == "python" else "program.sh")
    path.write_text(program, encoding="utf-8")
    (tmp_path / "tests").symlink_to(PAGE.parent.parent / "tests")  # as in a clone
    if language == "python":
        log, errors = tmp_path / "out", tmp_path / "err"
        forked.finish(forked.start(run_program, path, log=log, errors=errors), logs=[errors])
        said, complained = log.read_text(), errors.read_text()
    else:
        search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": search, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = ["bash", "-e", path.name]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        said, complained = result.stdout, result.stderr
    assert "no effect" not in complained
    accuracies = re.findall(r"accuracy\D*?(\d+(?:\.\d+)?)(%?)", said, re.IGNORECASE)
    assert accuracies, f"the program prints its accuracy: {said[-500:]}"
    value, percent = accuracies[-1]
    assert float(value) > (70 if percent else 0.7), "it learns"


def test_links_lead_to_headings():
    text = PAGE.read_text(encoding="utf-8")
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADINGS}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
