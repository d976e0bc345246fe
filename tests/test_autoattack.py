"""AutoAttack through the adapter: the bits of the package called directly, and none of its traps."""

import inspect
import sys
import types

import pytest
import torch
from attacked import Around, noisy, quantised, right, trained

from timm_lowrank.errors import EvaluationError
from timm_lowrank.evaluation.attacks import auto, autoattack, run_autoattack

pyautoattack = pytest.importorskip("pyautoattack")

EPS = 10 / 255
SHORT = {"iterations": 5, "queries": 20}


@pytest.fixture
def net(small_net, digits):
    return trained(small_net, digits)


@pytest.fixture
def batch(digits):
    return digits[0][-24:], digits[1][-24:]


def direct(model, images, labels, *, eps, norm, version, seed, batch_size, iterations, queries):
    """The images of the package itself, as its own documentation calls it, with a shorter schedule."""
    with torch.random.fork_rng(devices=[]):
        runner = pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=seed, version=version)
        for part in ("apgd", "apgd_targeted"):
            old = getattr(runner, part)
            names = set(inspect.signature(type(old).__init__).parameters) - {"self", "predict", "n_iter", "seed"}
            same = {name: getattr(old, name) for name in names if hasattr(old, name)}
            if part == "apgd_targeted":
                same.pop("loss", None)
            setattr(runner, part, type(old)(model, n_iter=iterations, seed=seed, **same))
        runner.fab.n_iter, runner.square.n_queries = iterations, queries
        images, _ = runner.run_standard_evaluation(images, labels, batch_size=batch_size)
    return images


def upstream_attacks(version):
    return pyautoattack.AutoAttack(None, version=version).attacks_to_run


# ---- the same bits ----


@pytest.mark.parametrize(
    ("norm", "version", "eps"),
    [("linf", "standard", EPS), ("l2", "standard", 0.4), ("linf", "plus", EPS), ("l2", "rand", 0.4)],
)
def test_the_images_are_those_of_the_package_called_directly(net, batch, norm, version, eps):
    short = {"iterations": 3, "queries": 10} if version != "standard" else SHORT
    result = run_autoattack(net, *batch, eps=eps, norm=norm, version=version, seed=3, batch_size=10, **short)
    name = {"linf": "Linf", "l2": "L2"}[norm]
    expected = direct(net, *batch, eps=eps, norm=name, version=version, seed=3, batch_size=10, **short)
    assert torch.equal(result.images, expected)
    assert 0 < right(net, result.images, batch[1]).sum() < right(net, *batch).sum()


def test_the_same_call_gives_the_same_bits_and_another_seed_others(net, batch):
    settings = {"eps": EPS, **SHORT}
    first = autoattack(net, *batch, **settings)
    torch.rand(3)
    assert torch.equal(first, autoattack(net, *batch, **settings))
    assert not torch.equal(first, autoattack(net, *batch, seed=1, **settings))
    with torch.inference_mode(), torch.autocast("cpu"):
        assert torch.equal(first, autoattack(net, batch[0].clone(), batch[1].clone(), **settings))


def as_upstream(monkeypatch):
    """A module `autoattack` with the calls of the original, on the algorithms that are installed."""

    class AutoAttack(pyautoattack.AutoAttack):
        def __init__(self, model, norm="Linf", eps=0.3, seed=None, verbose=True, attacks_to_run=(), version="standard",
                     is_tf_model=False, device="cuda", log_path=None):  # fmt: skip
            super().__init__(model, norm=norm, eps=eps, seed=seed, version=version, device=device)
            self.verbose = verbose

        def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
            self.logger.log("progress")
            self.logger.log("Warning: it seems odd! See flags_doc.md for details.")
            images, labels = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs)
            return (images, labels) if return_labels else images

    AutoAttack.__module__ = "autoattack.autoattack"
    package = types.ModuleType("autoattack")
    package.AutoAttack, package.__path__ = AutoAttack, []
    monkeypatch.setitem(sys.modules, "autoattack", package)
    monkeypatch.setitem(sys.modules, "autoattack.checks", pyautoattack.checks)


def test_the_original_package_is_used_where_only_that_is_installed(net, batch, monkeypatch):
    as_upstream(monkeypatch)
    ours = run_autoattack(net, *batch, eps=EPS, batch_size=10, **SHORT)
    assert ours.package.startswith("pyautoattack 0.")
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    result = run_autoattack(net, *batch, eps=EPS, batch_size=10, **SHORT)
    assert result.package.split()[0] == "autoattack"
    assert torch.equal(result.images, ours.images)
    assert result.broken_by == ours.broken_by
    assert "it seems odd!" in result.flags
    assert not any("progress" in flag for flag in result.flags)


def test_without_either_package_the_error_says_what_to_install(net, batch, monkeypatch):
    monkeypatch.setattr(auto, "PACKAGES", ("pyautoattack_that_is_not_there",))
    with pytest.raises(ImportError, match=r"pip install 'timm_lowrank\[evaluate\]'"):
        autoattack(net, *batch, eps=EPS)


# ---- the protocol ----


@pytest.fixture
def seen(monkeypatch):
    """The settings of every run of the package, which then does nothing."""
    runs = []

    def run(self, images, labels, *, batch_size):
        runs.append(
            {
                "runner": self, "attacks": self.attacks_to_run, "batch_size": batch_size, "images": len(images),
                "eps": self.epsilon, "norm": self.norm, "seed": self.seed, "eot": self.apgd.eot_iter,
                "iterations": (self.apgd.n_iter, self.apgd_targeted.n_iter, self.fab.n_iter, self.apgd.n_iter_2),
                "restarts": (self.apgd.n_restarts, self.apgd_targeted.n_restarts, self.fab.n_restarts),
                "targets": (self.apgd_targeted.n_target_classes, self.fab.n_target_classes),
                "queries": self.square.n_queries,
            }
        )  # fmt: skip
        return images, labels

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", run)
    return runs


@pytest.mark.parametrize(
    ("version", "names", "restarts", "eot"),
    [
        ("standard", ["apgd-ce", "apgd-t", "fab-t", "square"], (1, 1, 1), 1),
        ("plus", ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"], (5, 1, 5), 1),
        ("rand", ["apgd-ce", "apgd-dlr"], None, 20),
    ],
)
def test_the_default_is_the_full_protocol(net, batch, seen, version, names, restarts, eot):
    result = run_autoattack(net, *batch, eps=EPS, version=version, seed=4)
    assert [run["attacks"] for run in seen] == [[name] for name in names]
    expected = {
        "batch_size": 250, "images": int(right(net, *batch).sum()), "eps": EPS, "norm": "Linf", "seed": 4, "eot": eot,
        "iterations": (100, 100, 100, 22), "targets": (9, 9), "queries": 5000,
    }  # fmt: skip
    expected |= {"restarts": restarts} if restarts else {}
    for run in seen:
        assert {name: run[name] for name in expected} == expected
    assert result.flags == ()
    assert torch.equal(result.images, batch[0])
    assert set(result.broken_by) == {None, "clean"}


@pytest.mark.parametrize("iterations", [7, 50, 150])
def test_another_length_is_as_if_the_package_had_been_built_with_it(net, batch, seen, iterations):
    autoattack(net, *batch, eps=EPS, attacks=["apgd-ce"], iterations=iterations, queries=77)
    runner = seen[0]["runner"]
    for part in (runner.apgd, runner.apgd_targeted):
        fresh = vars(type(part)(net, n_iter=iterations, eps=EPS))
        names = [name for name in fresh if "n_iter" in name or name == "size_decr"]
        assert len(names) == 5
        assert {name: vars(part)[name] for name in names} == {name: fresh[name] for name in names}
    assert (runner.fab.n_iter, runner.square.n_queries) == (iterations, 77)


@pytest.mark.parametrize(
    ("classes", "version", "names"),
    [
        (2, "standard", ["apgd-ce", "fab-t", "square"]),
        (3, "standard", ["apgd-ce", "fab-t", "square"]),
        (3, "rand", ["apgd-ce", "apgd-dlr"]),
        (4, "standard", ["apgd-ce", "apgd-t", "fab-t", "square"]),
        (2, "plus", ["apgd-ce", "fab", "square", "fab-t"]),
    ],
)
def test_fewer_classes_get_the_attacks_and_targets_that_exist(small_net, batch, seen, classes, version, names):
    images, labels = batch
    result = run_autoattack(small_net(classes).eval(), images, labels % classes, eps=EPS, version=version)
    assert [run["attacks"] for run in seen] == [[name] for name in names]
    assert {run["targets"] for run in seen} == {(classes - 1, classes - 1)}
    every = upstream_attacks(version)
    assert [flag.split()[0] for flag in result.flags] == [name for name in every if name not in names]


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("version", ["standard", "plus"])
def test_networks_of_few_classes_are_attacked(small_net, batch, classes, version):
    images, labels = batch
    torch.manual_seed(1)
    model = small_net(classes).eval()
    labels = model(images).argmax(dim=1) if version == "plus" else labels % classes
    result = run_autoattack(model, images, labels, eps=0.1, version=version, iterations=3, queries=10)
    names = {None, "clean", *upstream_attacks(version)} - ({"apgd-t"} if classes < 4 else set())
    assert set(result.broken_by) <= names
    assert (result.images - images).abs().max() <= 0.1 + 1e-6


def test_each_image_is_broken_by_the_first_attack_that_can(net, batch):
    images, labels = batch
    result = run_autoattack(net, images, labels, eps=EPS, **SHORT)
    clean, after = right(net, images, labels), right(net, result.images, labels)
    assert [name == "clean" for name in result.broken_by] == (~clean).tolist()
    assert [name is None for name in result.broken_by] == after.tolist()
    changed = (result.images != images).flatten(1).any(dim=1)
    assert changed.tolist() == [name not in (None, "clean") for name in result.broken_by]
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert (result.images - images).abs().max() <= EPS + 1e-6
    first = run_autoattack(net, images, labels, eps=EPS, attacks=["apgd-ce"], **SHORT)
    ours = [name == "apgd-ce" for name in result.broken_by]
    assert [name == "apgd-ce" for name in first.broken_by] == ours
    assert any(ours)
    assert torch.equal(result.images[ours], first.images[ours])
    square = run_autoattack(net, images, labels, eps=EPS, attacks=("square",), **SHORT)
    assert set(square.broken_by) == {None, "clean", "square"}


def test_no_image_and_one_image(net, batch):
    for count, names in ((0, 0), (1, 1)):
        result = run_autoattack(net, batch[0][:count], batch[1][:count], eps=0.3, **SHORT)
        assert (result.images.shape, len(result.broken_by)) == ((count, 1, 8, 8), names)


def test_a_batch_that_the_network_gets_all_wrong(net, batch):
    images = batch[0][:4]
    with torch.no_grad():
        wrong = (net(images).argmax(1) + 1) % 10
    result = run_autoattack(net, images, wrong, eps=0.3, **SHORT)
    assert result.broken_by == ("clean",) * 4
    assert run_autoattack(net, images, wrong.numpy(), eps=0.3, **SHORT).broken_by == result.broken_by
    assert torch.equal(result.images, images)


# ---- what is left as it was ----


def test_nothing_of_the_package_is_left_behind(net, batch, random_stream):
    net.train()
    weights = [parameter.clone() for parameter in net.parameters()]
    counts = dict(pyautoattack.checks.funcs)
    tracer = sys.gettrace()

    def trace(frame, event, argument):
        return None

    sys.settrace(trace)
    try:
        autoattack(net, *batch, eps=EPS, norm="l2", iterations=2, queries=4)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(tracer)
    assert random_stream()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(old, new) for old, new in zip(weights, net.parameters(), strict=True))
    assert all(module.training for module in net.modules())
    assert pyautoattack.checks.funcs == counts


def test_one_dynamic_network_does_not_mark_the_next(net, batch, monkeypatch):
    def optimise(images):
        with torch.enable_grad():
            point = torch.zeros(1, requires_grad=True)
            (point**2).sum().backward()
        return images

    few = {"eps": EPS, "attacks": ["apgd-ce"], "iterations": 2}
    assert any("dynamic" in flag for flag in run_autoattack(Around(net, optimise), *batch, **few).flags)
    assert not any("dynamic" in flag for flag in run_autoattack(net, *batch, **few).flags)
    monkeypatch.setitem(pyautoattack.checks.funcs, "grad", 1)  # as a run of the package by itself leaves it
    assert not any("dynamic" in flag for flag in run_autoattack(net, *batch, **few).flags)
    assert pyautoattack.checks.funcs["grad"] == 1


# ---- flags ----


def test_the_flags_are_data_and_silent(net, batch, capfd):
    result = run_autoattack(Around(net, noisy), *batch, eps=EPS, attacks=["apgd-ce"], iterations=2)
    assert any("randomized" in flag for flag in result.flags)
    assert any(flag.startswith("shortened to 2 iterations") for flag in result.flags)
    assert len(set(result.flags)) == len(result.flags)
    assert not any("flags_doc" in flag for flag in result.flags)
    assert capfd.readouterr() == ("", "")


def test_masked_gradients_and_their_discovery_by_square_are_flagged(net, batch):
    masked = Around(net, lambda images: quantised(images, 4))
    result = run_autoattack(masked, *batch, eps=0.2, batch_size=7, iterations=2, queries=100)
    count = int(right(masked, *batch).sum())
    assert f"the gradient of the cross-entropy is zero for {count} of {count} images" in result.flags
    broken = result.broken_by.count("square")
    assert broken > 2
    assert any(flag.startswith(f"Square, which sees no gradients, broke {broken} of 24") for flag in result.flags)
    assert sum("points with zero gradient" in flag for flag in result.flags) == 1
    corner = torch.arange(64).view(8, 8) == 0  # a gradient that is zero in one pixel is none that is zero
    sound = run_autoattack(Around(net, lambda x: x.masked_fill(corner, 0)), *batch, eps=0.2, iterations=10, queries=20)
    assert all(flag.startswith("shortened") for flag in sound.flags)


# ---- networks and images of other kinds ----


def test_channels_last_networks_and_images_are_attacked(batch, small_net):
    torch.manual_seed(0)
    model = small_net(channels=3).to(memory_format=torch.channels_last).eval()
    images = batch[0].repeat(1, 3, 1, 1).to(memory_format=torch.channels_last)
    labels = model(images).argmax(dim=1)
    with pytest.raises(RuntimeError, match="view size is not compatible"):  # the trap
        direct(model, images, labels, eps=1e-4, norm="Linf", version="standard", seed=0, batch_size=250, **SHORT)
    assert autoattack(model, images, labels, eps=1e-4, **SHORT).is_contiguous()
    result = autoattack(model, images, labels, eps=0.05, attacks=["apgd-t"], **SHORT)
    assert not right(model, result, labels).all()


# ---- what cannot be ----


NO_GRADIENT = {"before": torch.Tensor.detach}


def first(classes, model):
    return Around(model, after=lambda logits: logits[:, :classes])


WRONG_CALLS = {
    "eps": (lambda m, x, y: autoattack(m, x, y, eps=0), "eps must be a finite number above 0"),
    "norm": (lambda m, x, y: autoattack(m, x, y, eps=1, norm="Linf"), "did you mean 'linf'"),
    "version": (lambda m, x, y: autoattack(m, x, y, eps=1, version="standart"), "did you mean 'standard'"),
    "custom": (lambda m, x, y: autoattack(m, x, y, eps=1, version="custom"), "version must be one of"),
    "attacks": (lambda m, x, y: autoattack(m, x, y, eps=1, attacks=["fab"]), "attacks must be one of 'apgd-ce', "),
    "no attacks": (lambda m, x, y: autoattack(m, x, y, eps=1, attacks=[]), "attacks is empty"),
    "seed": (lambda m, x, y: autoattack(m, x, y, eps=1, seed=None), "seed must be a whole number"),
    "batch_size": (lambda m, x, y: autoattack(m, x, y, eps=1, batch_size=0), "batch_size must be"),
    "iterations": (lambda m, x, y: autoattack(m, x, y, eps=1, iterations=0), "iterations must be"),
    "queries": (lambda m, x, y: autoattack(m, x, y, eps=1, queries=0.5), "queries must be"),
    "pixels": (lambda m, x, y: autoattack(m, x * 2, y, eps=1), r"pixels must lie in \[0, 1\]"),
    "labels": (lambda m, x, y: autoattack(m, x, y + 1, eps=1), r"labels must lie in 0\.\.9"),
    "one class": (lambda m, x, y: autoattack(first(1, m), x, y * 0, eps=1), "at least two classes"),
    "too few classes": (
        lambda m, x, y: autoattack(first(3, m), x, y % 3, eps=1, attacks=["apgd-t"]), "apgd-t needs 4 classes"
    ),
    "no gradient": (lambda m, x, y: autoattack(Around(m, **NO_GRADIENT), x, y, eps=1), "that torch can differentiate"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_is_one_clear_error(name, net, batch):
    call, message = WRONG_CALLS[name]
    with pytest.raises(EvaluationError, match=message):
        call(net, *batch)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_network_whose_logits_are_not_finite_is_an_error(net, batch, value):
    broken = Around(net, after=lambda logits: logits + value)
    with pytest.raises(EvaluationError, match="100% of the images get logits that are NaN or infinite"):
        run_autoattack(broken, *batch, eps=EPS, **SHORT)


def test_square_needs_no_gradient(net, batch):
    model = Around(net, **NO_GRADIENT)
    assert autoattack(model, *batch, eps=EPS, attacks=["square"], queries=5).shape == batch[0].shape


def test_the_settings_of_the_versions_are_those_of_the_package():
    for version, names in auto.VERSIONS.items():
        assert list(names) == upstream_attacks(version)
