"""Runs as recipes/train.py and recipes/evaluate.py leave them, made in a moment of a small network."""

import json

import timm
import torch
import yaml

import timm_lowrank as tlr
from timm_lowrank.evaluation.intervals import wilson
from timm_lowrank.suites.subject import load_subject

REPO = "alice/tiny"
LAYER = "pre_logits"
SIZE = (3, 32, 32)


def images():
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))


def share(hits, of=200):
    low, high = wilson(hits, of)
    return {"value": hits / of, "low": low, "high": high, "hits": hits, "of": of}


def figure(key, label, values, unit="share", better="higher", **protocol):
    about = {**protocol, "images": 200, "seed": 0}
    return {
        "key": key, "group": "a group", "label": label, "unit": unit, "better": better, "protocol": about,
        "values": values,
    }  # fmt: skip


def verdict(word="no sign of gradient masking", *checks):
    return {"verdict": word, "summary": "All 3 checks passed, on 200 images.", "checks": list(checks)}


PGD = {
    "attack": "PGD, L_inf, cross-entropy, last iterate", "setting": "madry", "eps": "8/255", "steps": 20,
    "step_size": "2/255", "random_start": True, "restarts": 1,
}  # fmt: skip


def evaluation(run, plain, autoattack=True):
    """The content of an evaluation.json of a run beside another network."""
    networks = [load_subject(str(run / "model"), "2-LR"), load_subject(str(plain), "plain")]
    described = [network.description() for network in networks]
    described[1]["branches"] = {}
    figures = [
        figure("clean", "clean test images", {"2-LR": share(180), "plain": share(190)}),
        figure("pgd-madry-20-8-255", "PGD-20, 8/255 (madry)", {"2-LR": share(60), "plain": share(20)}, **PGD),
        figure(f"effective-rank-{LAYER}", f"{LAYER}: effective rank, 99 %",
               {"2-LR": {"value": 7.0, "of": 200}, "plain": {"value": 19.0, "of": 200}}, "count", None),
        figure(f"compression-{LAYER}-5", "on 5", {"2-LR": share(150), "plain": share(148)}, dimensions=5),
        figure(f"compression-{LAYER}-10", "on 10", {"2-LR": share(170), "plain": share(90)}, dimensions=10),
    ]  # fmt: skip
    if autoattack:
        values = {"2-LR": share(3), "plain": share(0)}
        about = {"attack": "AutoAttack standard, L_inf", "eps": "8/255", "norm": "L_inf", "steps": 100, "restarts": 1}
        figures.append(figure("autoattack-linf-8-255", "AutoAttack, L_inf 8/255", values, **about))
        broken = {"2-LR": share(177), "plain": share(190)}
        figures.append(figure("autoattack-linf-8-255-apgd-ce", "broken by apgd-ce", broken, better=None, **about))
    return {
        "format": 1, "suite": "quick", "seed": 0, "chunk": 100, "confidence": 0.95, "device": "cpu, 1 threads",
        "seconds": 1.0, "created": "2026-01-01T00:00:00+00:00", "versions": {"torch": torch.__version__},
        "data": {"source": "uoft-cs/cifar10", "split": "test", "images": 200, "image_size": list(SIZE),
                 "class_names": ["a", "b", "c"], "fingerprint": "f" * 64},
        "networks": described, "figures": figures, "curves": [], "strips": [],
        "verdicts": {"2-LR": verdict(), "plain": verdict()}, "warnings": [],
    }  # fmt: skip


def summary(name="tiny", lowrank=True, accuracy=0.9005, twin=None, source="uoft-cs/cifar10"):
    """The content of a summary.json."""
    branch = {"features": 64, "target_rank": 4 if lowrank else None, "effective_rank": 7 if lowrank else 19}
    return {
        "name": name, "model": "test_resnet", "lowrank": lowrank, "weights": "last", "clean_accuracy": accuracy,
        "branches": {LAYER: {**branch, "variance_ratio": {"10": 0.9}, "losses": {}}}, "seconds": 3.2,
        "device": "cpu, 1 threads", "seed": 0, "versions": {"torch": torch.__version__},
        "data": {"source": source, "fingerprint": "f" * 64, "train_images": 5000, "test_images": 2000,
                 "image_size": list(SIZE), "classes": 3},
        **({"twin": {"folder": "twin", **twin}} if twin else {}),
    }  # fmt: skip


def make_run(folder, name="test_resnet", evaluated=True, **options):
    """A finished run with its plain twin, and the network that was trained in it."""
    torch.manual_seed(0)
    config = tlr.LowRankConfig(branches={LAYER: 4}, warmup_updates=0, project_every=2)
    model = tlr.wrap(name, config, num_classes=3, example_input=images(), **options).train()
    for _ in range(2):
        model(torch.randn(4, *SIZE))
        model.penalty()
        model.update()
    looks = {"input_size": SIZE, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    tlr.save_pretrained(model, folder / "model", label_names=["a", "b", "c"], data_config=looks)
    plain = timm.create_model(name, num_classes=3, **options)
    tlr.save_pretrained(plain, folder / "twin" / "model", data_config=looks)
    (folder / "plots").mkdir()
    (folder / "plots" / "spectrum.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    recipe = {
        "name": "tiny", "model": name, "model_args": options, "data": "uoft-cs/cifar10", "epochs": 3,
        "lowrank": {"branches": {LAYER: 4}}, "batch_size": 4, "learning_rate": 0.1, "schedule": "step",
        "milestones": [1, 2], "seed": 0, "spectrum_images": 500,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    twin = summary("tiny (plain)", lowrank=False, accuracy=0.9105)
    write(folder / "summary.json", {**summary(twin=twin), "model": name})
    if evaluated:
        write(folder / "evaluation.json", evaluation(folder, folder / "twin" / "model"))
    return model.eval()


def write(path, content):
    path.write_text(json.dumps(content))


def change(path, **keys):
    """Sets keys of a JSON file."""
    write(path, {**json.loads(path.read_text()), **keys})
