"""The card of a checkpoint whose owner writes none: how to load it, and nothing that was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .files import LOWRANK_CONFIG, NETWORK_CONFIG, known_architecture, module_to_import, read_json

# Those that hub/push.py writes anew, between their marks; here only the first two have something to say.
SECTIONS = ("about", "loading", "low-rank", "robustness", "limits", "training", "files", "citation")
TAGS = ["image-classification", "timm", "transformers", "timm_lowrank"]


def minimal_card(folder: Path, repo_id: str) -> str:
    """README.md for a checkpoint folder: metadata, what it is, three ways to load it, and that nothing was evaluated.

    Args:
        folder: as `save_pretrained` writes it.
        repo_id: USER/NAME, for the snippets.
    """
    config = read_json(folder / NETWORK_CONFIG)
    architecture = known_architecture(config, folder)
    data = ModelCardData(library_name="timm", pipeline_tag="image-classification", tags=TAGS)
    written = {
        "about": f"""# {repo_id.split("/")[-1]}

{_description(folder, config, architecture)}

No evaluation was published with it: neither its accuracy nor its robustness is known from this page.""",
        "loading": f"## Loading\n\n{snippets(repo_id, architecture)}",
    }
    sections = "\n\n".join(mark(name, written.get(name, "")) for name in SECTIONS)
    return f"---\n{data.to_yaml()}\n---\n\n{sections}\n"


def mark(name: str, body: str = "") -> str:
    """A generated section between its two marks, which a later push writes anew."""
    return f"<!-- generated: {name} -->\n{body}{chr(10) if body else ''}<!-- end of generated: {name} -->"


def _description(folder: Path, config: Mapping[str, Any], architecture: str) -> str:
    cfg = config.get("pretrained_cfg", {})
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    text = (
        f"`{architecture}` for {config.get('num_classes')} classes and images of {channels} x {height} x {width}, "
        f"normalised with mean {tuple(cfg.get('mean', ()))} and standard deviation {tuple(cfg.get('std', ()))}."
    )
    if (folder / LOWRANK_CONFIG).is_file():
        layers = read_json(folder / LOWRANK_CONFIG)["layers"]
        listed = ", ".join(f"`{layer}` (target rank {size['rank']})" for layer, size in layers.items())
        text += (
            " It was trained with timm_lowrank, whose branches pull the activations of a layer into a low-dimensional "
            f"subspace: {listed}. They are gone when the network predicts."
        )
    return text


def snippets(repo_id: str, architecture: str) -> str:
    """How to load a repository with timm, with transformers and with timm_lowrank, in Markdown.

    An architecture that is not timm's own has to be registered by an import, which the snippets show.
    """
    package = module_to_import(architecture)
    needed = f"import {package}  # registers {architecture} with timm\n" if package else ""
    return f"""With timm:

```python
import timm
{needed}network = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
```

With transformers:

```python
from transformers import AutoModelForImageClassification
{needed}network = AutoModelForImageClassification.from_pretrained("{repo_id}").eval()
```

With timm_lowrank, to train on with its branches if it has some:

```python
import timm_lowrank as tlr
model = tlr.from_pretrained("{repo_id}")
```"""
