"""Runs as `timm-lowrank train` and `timm-lowrank evaluate` leave them, made in a moment of a small network."""

import dataclasses
import hashlib
import json

import timm
import torch
import yaml
from evaluations import AUTOATTACK, DATA, PGD, SOUND, figure, make_evaluation

import timm_lowrank as tlr
from timm_lowrank.evaluation.results import Kind, NetworkInfo, Value, read_evaluation, write_evaluation
from timm_lowrank.files import weights_sha256
from timm_lowrank.training.run import BranchSummary, DataSummary, Losses, Summary

REPO = "alice/tiny"
LAYER = "pre_logits"
SIZE = (3, 32, 32)
SOURCE = "uoft-cs/cifar10"
CHECKPOINT = {"config.json", "model.safetensors", "lowrank.json", "lowrank.safetensors"}
COMMIT, BLOB = "/commit/", "/blobs/"


def in_repo(hub, repo=REPO, revision="main"):
    """The files of a repository without the one that the Hub makes itself."""
    return {name: data for name, data in hub.repo(repo).files(revision).items() if name != ".gitattributes"}


def weights(hub):
    """The path under which the network's weights are stored."""
    return BLOB + hashlib.sha256(in_repo(hub)["model.safetensors"]).hexdigest()


def images():
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))


def trained(name="test_resnet", **options):
    """A small network after two updates of its branch."""
    config = tlr.LowRankConfig(branches={LAYER: 4}, warmup_updates=0, project_every=2)
    model = tlr.wrap(name, config, num_classes=3, example_input=images(), **options).train()
    for _ in range(2):
        model(torch.randn(4, *SIZE))
        model.penalty()
        model.update()
    return model.eval()


def share(hits):
    return Value.share(hits, 200)


FIGURES = (
    figure("clean", "clean test images", share(180), share(190), kind=Kind.CLEAN),
    figure("pgd", "PGD-20, 8/255", share(60), share(20), attack=PGD),
    figure("rank", "rank", Value(7, of=200), Value(19, of=200), kind=Kind.EFFECTIVE_RANK, layer=LAYER, unit="count"),
    figure("5", "on 5", share(150), share(148), kind=Kind.COMPRESSION, layer=LAYER, directions=5),
    figure("10", "on 10", share(170), share(90), kind=Kind.COMPRESSION, layer=LAYER, directions=10),
    figure("autoattack", "AutoAttack, L_inf 8/255", share(3), share(0), attack=AUTOATTACK),
    figure("apgd", "broken by apgd-ce", share(177), share(190), attack=AUTOATTACK, kind=Kind.BROKEN_BY, better=None),
)


def evaluation(model, plain, **changes):
    """Of a network beside another one, given as checkpoint folders."""
    digests = [
        weights_sha256(timm.create_model(f"local-dir:{f}", pretrained=True).state_dict()) for f in (model, plain)
    ]
    networks = (
        NetworkInfo(title="2-LR", weights=digests[0], branches={LAYER: 4}),
        NetworkInfo(title="plain", weights=digests[1]),
    )
    data = dataclasses.replace(DATA, source=SOURCE, images=200, image_size=SIZE, fingerprint="f" * 64, origin="hub")
    fields = {"figures": FIGURES, "data": data, "networks": networks, "warnings": (), "verdicts": {"2-LR": SOUND}}
    return make_evaluation(**fields | changes)


def edit(run, **changes):
    """Changes fields of the evaluation of a run; each is given, or made of what it was."""
    before = read_evaluation(run / "evaluation.json")
    new = {name: value(getattr(before, name)) if callable(value) else value for name, value in changes.items()}
    write_evaluation(dataclasses.replace(before, **new), run / "evaluation.json")


def summary(name="tiny", lowrank=True, accuracy=0.9005, twin=None):
    """What a run says of itself."""
    branch = BranchSummary(
        features=64, target_rank=4 if lowrank else None, effective_rank=7 if lowrank else 19, variance_ratio={10: 0.9}
    )
    data = DataSummary(
        source=SOURCE, fingerprint="f" * 64, train_images=5000, test_images=2000, image_size=SIZE, classes=3,
        origin="hub",
    )  # fmt: skip
    return Summary(
        name=name, model="test_resnet", lowrank=lowrank, weights="last", clean_accuracy=accuracy, data=data,
        losses=Losses(train=0.1, test=0.2), train_accuracy=1.0, branches={LAYER: branch}, epochs=3, optimizer_steps=30,
        seconds=3.2, images_per_second=10.0, device="cpu, 1 threads", processes=1, precision="no", seed=0,
        versions={"torch": torch.__version__}, twin=twin, twin_folder="twin" if twin else None,
    )  # fmt: skip


def make_run(folder, name="test_resnet", evaluated=True, **options):
    """A finished run with its plain twin, and the network that was trained in it."""
    torch.manual_seed(0)
    model = trained(name, **options)
    looks = {"input_size": SIZE, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    tlr.save_pretrained(model, folder / "model", label_names=["a", "b", "c"], data_config=looks)
    plain = timm.create_model(name, num_classes=3, **options)
    tlr.save_pretrained(plain, folder / "twin" / "model", data_config=looks)
    (folder / "plots").mkdir()
    (folder / "plots" / "spectrum.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    recipe = {
        "name": "tiny", "model": name, "model_args": options, "data": SOURCE, "epochs": 3,
        "lowrank": {"branches": {LAYER: 4}}, "batch_size": 4, "learning_rate": 0.1, "schedule": "step",
        "milestones": [1, 2], "seed": 0, "spectrum_images": 500,
    }  # fmt: skip
    plain = {**recipe, "name": "tiny (plain)", "lowrank": {**recipe["lowrank"], "enabled": False}}
    for run, own in ((folder, recipe), (folder / "twin", plain)):
        (run / "config.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    twin = summary("tiny (plain)", lowrank=False, accuracy=0.9105)
    write(folder / "twin" / "summary.json", twin.to_dict())
    write(folder / "summary.json", summary(twin=twin).to_dict())
    if evaluated:
        write_evaluation(evaluation(folder / "model", folder / "twin" / "model"), folder / "evaluation.json")
    return model


def write(path, content):
    path.write_text(json.dumps(content))


def change(path, **keys):
    """Sets keys of a JSON file."""
    write(path, {**json.loads(path.read_text()), **keys})
