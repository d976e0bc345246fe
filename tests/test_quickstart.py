"""examples/quickstart.ipynb: its code cells run from top to bottom, and say what the text promises."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number + 1}", "exec"), names)
    printed = capsys.readouterr().out
    assert "layer3: " in printed
    ranks = {name: names["tlr"].spectrum.effective_rank(values) for name, values in names["new"].items()}
    assert ranks["low rank"] < ranks["plain"]
    assert names["clean"] > 0.9  # of the low-rank network, the last one of the loop
    assert {path.name for path in (tmp_path / "quickstart-model").iterdir()} == {
        "config.json", "model.safetensors", "lowrank.json", "lowrank.safetensors",
    }  # fmt: skip
