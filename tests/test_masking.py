"""The diagnosis of gradient masking, on networks of which the answer is known."""

import math
import sys
from functools import partial

import pytest
import torch
from attacked import Around, noisy, quantised, right
from evaluations import figure, make_evaluation
from torch import nn
from torch.nn import functional

from timm_lowrank.errors import EvaluationError
from timm_lowrank.evaluation import PixelModel
from timm_lowrank.evaluation.attacks.gradient import margins, pgd
from timm_lowrank.evaluation.masking import (
    BUDGETS,
    Budget,
    PGDAccuracy,
    accuracies_of,
    diagnose,
    diagnose_published,
    judge,
    observe,
)
from timm_lowrank.evaluation.masking.observations import best_signs, square
from timm_lowrank.evaluation.masking.verdict import CHANCE, FEWEST, at_least, at_most
from timm_lowrank.evaluation.results import MASKED, SOUND, SUSPECT, AttackProtocol, Kind

SHORT = Budget(steps=12, more_steps=30, restarts=2, signs=10, queries=120, draws=8)
BRIEF = Budget(steps=5, more_steps=10, restarts=2, signs=4, queries=40, draws=3)  # where its findings do not matter
COUNT = 200


def fit(images, labels, eps, epochs, seed):
    """A small network trained on clean images, or on those of a four-step PGD."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(100):
            batch, wanted = images[index], labels[index]
            points = (batch + eps * (2 * torch.rand_like(batch) - 1)).clamp(0, 1)
            for _ in range(4 if eps else 0):
                points.requires_grad_(True)
                (gradient,) = torch.autograd.grad(functional.cross_entropy(network(points), wanted), points)
                points = points.detach() + eps / 2.5 * gradient.sign()
                points = points.clamp(batch - eps, batch + eps).clamp(0, 1)
            optimizer.zero_grad()
            functional.cross_entropy(network(points), wanted).backward()
            optimizer.step()
    network.zero_grad()
    return network.eval()


@pytest.fixture(scope="module")
def trained(digits):
    """By seed: a plain network and an adversarially trained one; and a plain one to craft black-box attacks on."""
    images, labels = (part[:1000] for part in digits)
    with torch.random.fork_rng(devices=[]):
        networks = {seed: {"plain": fit(images, labels, 0, 8, seed)} for seed in (0, 1)}
        for seed in (0, 1):
            networks[seed]["PGD-trained"] = fit(images, labels, 0.15, 11, seed)
        return networks, fit(images, labels, 0, 8, seed=2)


@pytest.fixture(scope="module")
def unseen(digits):
    """Test images (200, 1, 8, 8) and their labels."""
    return tuple(part[1200 : 1200 + COUNT] for part in digits)


class Step(nn.Module):
    """A ReLU in stairs, without a straight-through gradient."""

    def forward(self, values):
        return torch.floor(8 * values.relu()) / 8


def thermometer(images):
    """How many of 15 marks a pixel has passed; comparisons, so that there is no graph to the pixels at all."""
    marks = (torch.arange(15) + 0.5) / 15
    return (images[..., None] > marks).float().mean(dim=-1)


def ripple(images):
    return images + 0.02 * (500 * images).sin()


def random_ripple(images):
    return images + 0.02 * (500 * images + 7 * torch.rand_like(images)).sin()


BLIND = {"black box", "Square", "zero gradients", "unbounded radius"}
SIGNS = {"random signs"}  # far weaker than the others, so that they need not be ahead
KNOWN = {  # how it is made of the plain network, the verdict, what has to fail, what may fail besides
    "plain": (lambda plain: plain, SOUND, set(), set()),
    "logits x 1e4": (
        lambda plain: Around(plain, after=lambda x: 1e4 * x), MASKED, BLIND | {"saturated logits"}, SIGNS
    ),
    "quantised input": (lambda plain: Around(plain, quantised), MASKED, BLIND, SIGNS),
    "thermometer input": (lambda plain: Around(plain, thermometer), MASKED, BLIND, SIGNS),
    "sign input": (lambda plain: Around(plain, lambda x: (x - 0.45).sign() / 2 + 0.5), MASKED, BLIND, SIGNS),
    "step activation": (lambda plain: nn.Sequential(plain[0], Step(), *plain[2:]).eval(), MASKED, BLIND, SIGNS),
    "infinite gradient": (lambda plain: Around(plain, lambda x: x + (x - x.detach()).sqrt()), MASKED, BLIND, SIGNS),
    "ripple": (
        lambda plain: Around(plain, ripple), MASKED,
        {"black box", "Square", "smooth loss"}, SIGNS | {"single step", "restarts"},
    ),
    "noisy input": (
        lambda plain: Around(plain, noisy), SUSPECT,
        {"deterministic"}, {"smooth loss", "more steps"},
    ),
    "random ripple": (
        lambda plain: Around(plain, random_ripple), MASKED,
        {"deterministic", "averaged gradients", "smooth loss", "black box"},
        SIGNS | {"Square", "single step", "more steps"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "eps", "seed"),
    [("plain", 0.2, 1), *((name, *(((0.1, 0), (0.2, 1))[number % 2])) for number, name in enumerate(KNOWN))],
)
def test_the_verdict_is_right_where_the_answer_is_known(name, eps, seed, trained, unseen):
    build, verdict, must, may = KNOWN[name]
    networks, source = trained
    diagnosis = diagnose(build(networks[seed]["plain"]), *unseen, eps=eps, seed=seed, source=source, budget=SHORT)
    assert diagnosis.verdict == verdict, diagnosis.summary
    assert must <= set(diagnosis.failed) <= must | may, diagnosis.failed


@pytest.mark.parametrize(("eps", "seed"), [(0.1, 1), (0.2, 0)])
def test_an_adversarially_trained_network_is_not_suspected(eps, seed, trained, unseen):
    networks, source = trained
    columns = observe(networks[seed]["PGD-trained"], *unseen, eps=eps, seed=seed, source=source, budget=SHORT)
    assert judge(columns).failed == ()
    assert judge(columns).verdict == SOUND
    plain = observe(networks[seed]["plain"], *unseen, eps=eps, seed=seed, budget=SHORT)
    assert columns["pgd"].sum() > plain["pgd"].sum()  # it is robust, not merely unattacked


def test_a_network_that_falls_to_nothing_masks_nothing(trained, unseen):
    diagnosis = diagnose(trained[0][0]["plain"], *unseen, eps=0.35, source=trained[1], budget=SHORT)
    assert diagnosis.verdict == SOUND
    assert "leaves nothing right" in named(diagnosis, "double radius").says


def named(diagnosis, name):
    (check,) = [check for check in diagnosis.checks if check.name == name]
    return check


def test_every_check_keeps_its_numbers_and_a_sentence(trained, unseen):
    diagnosis = diagnose(Around(trained[0][0]["plain"], after=lambda x: 1e4 * x), *unseen, eps=8 / 255, budget=SHORT)
    assert len({check.name for check in diagnosis.checks}) == len(diagnosis.checks) == 14
    for check in diagnosis.checks:
        assert check.says.endswith(".")
        assert (check.passed is True) == (check.value is not None and check.value <= check.limit)
    assert named(diagnosis, "black box").passed is None  # there was no second network
    assert named(diagnosis, "black box").value is None
    assert "PGD-12 at 8/255" in named(diagnosis, "saturated logits").says
    assert "exactly 1 on 100.0 %" in named(diagnosis, "saturated logits").says


def columns_of(count=1000, **shares):
    """Columns of a sound network, except where a share (or a column) is given; images withstand in a fixed order."""
    defaults = {
        "clean": 0.95, "fgsm": 0.6, "pgd": 0.5, "pgd_more_steps": 0.495, "pgd_margin": 0.49, "pgd_double": 0.1,
        "pgd_unbounded": 0.0, "signs": 0.8, "square": 0.6, "transfer": 0.7, "repeats": 1.0, "finite_gradient": 1.0,
        "zero_gradient": 0.0, "saturated": 0.1,
    }  # fmt: skip
    shares = defaults | shares
    made = {name: torch.arange(count) < round(count * share) for name, share in shares.items()}
    made["restarts_withstood"] = torch.where(made["pgd"], 4.0, -1.0)
    made["pgd_averaged"] = torch.full((count,), torch.nan)
    made["kept_promise"] = torch.ones(count)
    for name, value in {"eps": 8 / 255, "unit": 0, **vars(BUDGETS["quick"])}.items():
        made[f"setting.{name}"] = torch.full((count,), float(value), dtype=torch.float64)
    return made


def test_columns_of_a_sound_network_pass():
    diagnosis = judge(columns_of())
    assert diagnosis.verdict == SOUND
    assert [check.name for check in diagnosis.checks if check.passed is None] == ["AutoAttack", "averaged gradients"]


@pytest.mark.parametrize(
    ("name", "good", "bad", "verdict"),
    [
        ("black box", {"transfer": 0.49}, {"transfer": 0.47}, MASKED),
        ("Square", {"square": 0.49}, {"square": 0.47}, MASKED),
        ("AutoAttack", {"autoattack": 0.46}, {"autoattack": 0.43}, MASKED),
        ("random signs", {"signs": 0.49}, {"signs": 0.47}, MASKED),
        ("single step", {"fgsm": 0.49}, {"fgsm": 0.47}, MASKED),
        ("saturated logits", {"pgd_margin": 0.46}, {"pgd_margin": 0.43}, MASKED),
        ("unbounded radius", {"pgd_unbounded": 0.04}, {"pgd_unbounded": 0.08}, MASKED),
        ("zero gradients", {"zero_gradient": 0.01}, {"zero_gradient": 0.03}, MASKED),
        ("zero gradients", {"finite_gradient": 0.99}, {"finite_gradient": 0.97}, MASKED),
        ("double radius", {"pgd_double": 0.3}, {"pgd_double": 0.45}, SUSPECT),
        ("more steps", {"pgd_more_steps": 0.515}, {"pgd_more_steps": 0.53}, SUSPECT),
        ("more steps", {"pgd_more_steps": 0.485}, {"pgd_more_steps": 0.47, "fgsm": 0.6}, SUSPECT),
    ],
)
def test_each_check_fails_beyond_its_limit_and_alone(name, good, bad, verdict):
    assert judge(columns_of(**good)).verdict == SOUND
    assert named(judge(columns_of(**good)), name).passed is True
    diagnosis = judge(columns_of(**bad))
    assert diagnosis.failed == (name,)
    assert diagnosis.verdict == verdict
    assert name in diagnosis.summary


def test_restarts_that_go_on_helping_are_suspect():
    columns = columns_of()
    columns["restarts_withstood"][:60] = 0.0  # the first of four restarts broke many: that is not going on
    assert named(judge(columns), "restarts").passed is True
    columns["restarts_withstood"][60:90] = 3.0  # the last one, too
    diagnosis = judge(columns)
    assert (diagnosis.failed, diagnosis.verdict) == (("restarts",), SUSPECT)
    assert named(diagnosis, "restarts").value == pytest.approx(0.03)
    assert "after 2 more random starts 44.0 %, after 4 41.0 %" in named(diagnosis, "restarts").says


def test_a_loss_that_breaks_the_promise_of_its_gradient_is_suspect():
    columns = columns_of()
    for count, promise, passed in ((90, 0.1, True), (150, 0.1, False), (600, torch.nan, None)):
        columns["kept_promise"][:count] = promise
        assert named(judge(columns), "smooth loss").passed is passed  # without a gradient: another check's business
        assert judge(columns).verdict == (SUSPECT if passed is False else SOUND)


def test_averaged_gradients_tell_noise_that_hides_from_noise_that_does_not():
    columns = columns_of(repeats=0.0)
    for share, failed, verdict in ((470, (), SUSPECT), (300, ("averaged gradients",), MASKED)):
        columns["pgd_averaged"] = (torch.arange(1000) < share).float()
        diagnosis = judge(columns)
        assert (diagnosis.failed, diagnosis.verdict) == ((*failed, "deterministic"), verdict)
        assert named(diagnosis, "restarts").passed is None


def test_a_difference_within_chance_is_undecided_and_more_images_decide_it():
    few, many = judge(columns_of(100, square=0.46)), judge(columns_of(1000, square=0.46))
    assert named(few, "Square").passed is None
    assert named(few, "Square").value == pytest.approx(0.04)
    assert few.verdict == SOUND
    assert "Undecided, for too few images: Square" in few.summary
    assert "from a difference of 7.0 points on" in few.summary
    assert named(many, "Square").passed is False
    assert "from a difference of 2.0 points on" in many.summary


def test_the_binomial_tails_are_exact():
    for count, probability in ((7, 0.5), (12, 0.05), (40, 0.2)):
        for hits in range(count + 1):
            terms = [math.comb(count, k) * probability**k * (1 - probability) ** (count - k) for k in range(count + 1)]
            assert at_least(hits, count, probability) == pytest.approx(math.fsum(terms[hits:]), rel=1e-9)
            assert at_most(hits, count, probability) == pytest.approx(math.fsum(terms[: hits + 1]), rel=1e-9)
    assert at_most(0, 10, 0.0) == 1
    assert at_least(1, 10, 0.0) == 0
    assert at_least(FEWEST, FEWEST, 0.5) < CHANCE <= at_least(FEWEST - 1, FEWEST - 1, 0.5)


@pytest.mark.parametrize("kind", ["plain", "noisy input"])
def test_the_same_seed_gives_the_same_columns_and_nothing_is_left_behind(kind, trained, unseen, random_stream):
    network = KNOWN[kind][0](trained[0][0]["plain"]).train()
    images, labels = (part[:60] for part in unseen)
    first = observe(network, images, labels, eps=0.1, source=trained[1], budget=BRIEF)
    assert random_stream()
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    torch.manual_seed(7)
    again = observe(network, images, labels, eps=0.1, source=trained[1], budget=BRIEF)
    network.eval()
    for name in first:
        assert torch.equal(first[name].nan_to_num(-9), again[name].nan_to_num(-9)), name
        assert first[name].shape == (60,)
    other = observe(network, images, labels, eps=0.1, source=trained[1], budget=BRIEF, seed=5)
    assert first.keys() == other.keys()
    assert any(not torch.equal(first[name].nan_to_num(-9), other[name].nan_to_num(-9)) for name in first)


def test_parts_of_the_images_observed_apart_are_the_whole(trained, unseen):
    network, source = trained[0][0]["plain"], trained[1]
    images, labels = (part[:90] for part in unseen)
    whole = observe(network, images, labels, eps=0.1, source=source, budget=SHORT)
    parts = [
        observe(network, images[rows], labels[rows], eps=0.1, source=source, budget=SHORT)
        for rows in (slice(0, 40), slice(40, 90))
    ]
    joined = {name: torch.cat([part[name] for part in parts]) for name in whole}
    batched = observe(network, images, labels, eps=0.1, source=source, budget=SHORT, batch_size=40)
    for name in whole.keys() - {"square"}:  # its squares are those of the batch
        torch.testing.assert_close(joined[name], whole[name], equal_nan=True, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(batched[name], whole[name], equal_nan=True, rtol=1e-3, atol=1e-3)
    assert (joined["square"] == whole["square"]).float().mean() > 0.8
    assert judge(joined).verdict == judge(whole).verdict == SOUND


def test_the_shorter_attack_is_the_longer_one_on_its_way_and_restarts_are_new(trained, unseen):
    network = trained[0][0]["PGD-trained"]
    images, labels = unseen
    columns = observe(network, images, labels, eps=0.2, seed=3, budget=SHORT)
    adversarial = pgd(network, images, labels, eps=0.2, steps=SHORT.steps, generator=torch.Generator().manual_seed(3))
    withstood = right(network, adversarial, labels) & columns["clean"]
    assert torch.equal(columns["pgd"], withstood)
    assert 0 < columns["pgd"].sum() < columns["clean"].sum()
    withstood = columns["restarts_withstood"]  # and restarts are new starts
    assert torch.equal(withstood < 0, ~columns["pgd"])
    assert {0, 1, 2} <= set(withstood.tolist()), "each start breaks images that the one before could not"


class Bent(nn.Module):
    """Two classes; the margin of the first is u - u^2 / 4 - 1 with u the sum of the pixels above 0.5."""

    def forward(self, images):
        above = (images - 0.5).flatten(1).sum(dim=1)
        return torch.stack([torch.ones_like(above), above - above**2 / 4], dim=1)


def test_the_kept_promise_is_that_of_the_worst_step():
    images, labels = torch.full((3, 1, 8, 8), 0.5), torch.zeros(3, dtype=torch.int64)
    columns = observe(Bent(), images, labels, eps=0.1, budget=SHORT)
    # 64 pixels up by a quarter of the radius: u = 1.6 was promised, 1.6 - 0.64 is gained.
    torch.testing.assert_close(columns["kept_promise"], torch.full((3,), 0.6))
    rising = observe(Bent(), images * 0.8, labels, eps=0.1, budget=SHORT)
    # u = -6.4: the slope there is 4.2 and falls to 3.4 on the way, so the quadratic term takes 0.64 of 6.72.
    torch.testing.assert_close(rising["kept_promise"], torch.full((3,), (6.72 - 0.64) / 6.72))


def test_attacks_without_gradients_stay_in_the_ball_and_find_the_best_they_tried(trained, unseen, random_stream):
    network, (images, labels) = trained[0][0]["plain"], unseen
    with torch.no_grad():
        before = margins(network(images), labels)
        few, many = (best_signs(network, images, labels, eps=0.1, count=count, seed=0) for count in (3, 12))
        reached = [margins(network(points), labels) for points in (few, many)]
        assert (reached[1] >= reached[0] - 1e-5).all()
        assert (reached[1] > reached[0] + 1e-3).float().mean() > 0.4  # each of 12 is the best with equal chances
        up, down = ((images + 0.1 * sign).clamp(0, 1) for sign in (1, -1))
        assert ((many == up) | (many == down)).all()
        points = square(network, images, labels, eps=0.1, queries=100, seed=0)
        assert (points - images).abs().max() <= 0.1 + 1e-6
        assert (margins(network(points), labels) > 0).sum() > (before > 0).sum() + 20
    assert random_stream()


def test_a_given_autoattack_is_compared(trained, unseen):
    few = tuple(part[:40] for part in unseen)
    for withstood in (torch.arange(40) < 5, torch.ones(40, dtype=torch.bool)):
        columns = observe(trained[0][0]["plain"], *few, eps=0.1, autoattack=withstood, budget=BRIEF)
        assert torch.equal(columns["autoattack"], columns["clean"] & withstood)
        assert named(judge(columns), "AutoAttack").value is not None


def test_without_pyautoattack_it_says_what_to_install(trained, unseen, monkeypatch):
    for name in ("pyautoattack", "autoattack"):
        monkeypatch.setitem(sys.modules, name, None)
    network, images, labels = trained[0][0]["plain"], unseen[0][:30], unseen[1][:30]
    with pytest.raises(ImportError, match=r"timm_lowrank\[evaluate\]"):
        observe(network, images, labels, eps=0.1, budget=SHORT)
    diagnosis = diagnose(network, images, labels, eps=0.1, budget=Budget(steps=2, more_steps=3, queries=0))
    assert named(diagnosis, "Square").passed is None
    assert "not run" in named(diagnosis, "Square").says


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eps": 0.0}, "eps must be a finite number above 0"),
        ({"budget": "quik"}, "did you mean 'quick'"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size"),
        ({"images": torch.full((4, 1, 8, 8), 3.0)}, r"must lie in \[0, 1\]"),
        ({"images": torch.rand(0, 1, 8, 8), "labels": torch.zeros(0, dtype=torch.int64)}, "no images"),
        ({"labels": torch.tensor([0, 1, 2, 10])}, r"labels must lie in 0\.\.9"),
        ({"autoattack": torch.zeros(3, dtype=torch.bool)}, "autoattack must be bool"),
        ({"autoattack": torch.zeros(4)}, "autoattack must be bool"),
    ],
)
def test_observe_names_what_is_wrong(changed, message, trained):
    arguments = {"images": torch.rand(4, 1, 8, 8), "labels": torch.tensor([0, 1, 2, 3]), "eps": 0.1, "budget": SHORT}
    with pytest.raises(EvaluationError, match=message):
        observe(trained[0][0]["plain"], **(arguments | changed))


@pytest.mark.parametrize(
    "lengths", [{"steps": 0}, {"more_steps": 20}, {"restarts": 1}, {"queries": -1}, {"signs": 1.5}]
)
def test_a_budget_names_what_is_wrong(lengths):
    with pytest.raises(EvaluationError, match=next(iter(lengths))):
        Budget(**lengths)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({name: column for name, column in columns_of().items() if name != "pgd"}, "lack the columns pgd"),
        (columns_of() | {"square": torch.ones(7, dtype=torch.bool)}, "one number for each image"),
        (columns_of() | {"setting.eps": torch.linspace(0.1, 0.2, 1000)}, "eps must be the same"),
        (columns_of(clean=0.006), "right on 6 of 1000 images"),
    ],
)
def test_judge_names_what_is_wrong(columns, message):
    with pytest.raises(EvaluationError, match=message):
        judge(columns)
    judge(columns_of(clean=0.007, pgd=0.007))  # does not raise


def test_a_diagnosis_in_normalised_units_is_one_of_the_same_ball(trained, unseen):
    """With one standard deviation for all channels the ball is one in pixels too: the same columns, and it says so."""
    network, source = trained[0][0]["plain"], trained[1]
    images, labels = unseen[0][:40], unseen[1][:40]
    model, other = (PixelModel(one, (0.0,), (0.25,)).eval() for one in (Scaled(network, 0.25), Scaled(source, 0.25)))
    options = {"budget": SHORT, "seed": 3, "source": other}
    normalized = observe(model, images, labels, eps=0.4, radius_unit="normalized", **options)
    in_pixels = observe(model, images, labels, eps=0.1, **options)
    attacked = [name for name in in_pixels if not name.startswith("setting.") and name != "kept_promise"]
    assert len(attacked) == 16
    for name in attacked:
        assert (normalized[name].nan_to_num() != in_pixels[name].nan_to_num()).double().mean() <= 0.025, name
    assert (normalized["setting.unit"].unique().item(), in_pixels["setting.unit"].unique().item()) == (1, 0)
    assert "PGD-12 at 102/255 in normalised units leaves" in " ".join(one.says for one in judge(normalized).checks)


class Scaled(nn.Module):
    """Undoes the normalisation of a `PixelModel` of mean 0."""

    def __init__(self, network, std):
        super().__init__()
        self.network, self.std = network, std

    def forward(self, images):
        return self.network(self.std * images)


@pytest.mark.parametrize("attack", [partial(square, queries=60), partial(best_signs, count=10)])
def test_attacks_without_gradients_keep_to_the_radius_of_each_channel(attack, digits):
    unit = torch.tensor([0.05, 0.2, 0.1]).view(1, 3, 1, 1)
    images = 0.2 + 0.6 * digits[0][:12].expand(-1, 3, -1, -1).contiguous()
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with torch.no_grad():
        labels = network(images).argmax(1)
    change = (attack(network, images, labels, eps=0.5, unit=unit, seed=0) - images).abs().amax(dim=(0, 2, 3))
    torch.testing.assert_close(change, 0.5 * unit.flatten(), atol=1e-6, rtol=1e-5)


# ---- figures without a network ----

# Table 1 of the paper, per cent: radii 8, 10, 16 and 20 of 255, each with 7 and 20 steps; then without an attack.
PRINTED = {
    "CIFAR-10, R50, N-LR": ((43.1, 31.0, 38.5, 21.8, 31.2, 7.8, 28.9, 4.5), None, 95.4),
    "CIFAR-10, R50, 1-LR": (
        (79.1, 78.5, 78.6, 78.1, 77.9, 77.0, 77.1, 76.6), (64.7, 56.8, 59.0, 47.5, 51.2, 28.0, 48.3, 20.6), 95.4
    ),
    "CIFAR-10, R18, 2-LR": (
        (54.7, 37.6, 52.4, 33.1, 48.7, 25.7, 48.0, 23.6), (68.0, 62.5, 62.3, 53.4, 53.8, 33.5, 50.8, 25.8), 94.5
    ),
    "CIFAR-100, R50, N-LR": ((37.2, 29.9, 34.1, 24.6, 29.8, 15.9, 34.1, 13.3), None, 85.8),
    "CIFAR-100, R50, 1-LR": (
        (45.3, 38.7, 43.7, 35.8, 40.9, 31.5, 40.0, 29.8), (52.4, 46.2, 48.1, 38.8, 42.0, 25.4, 48.1, 20.9), 85.8
    ),
}  # fmt: skip


def cells_of(white, black=None):
    columns = [(eps / 255, steps) for eps in (8, 10, 16, 20) for steps in (7, 20)]
    return [
        PGDAccuracy(eps=eps, steps=steps, white_box=one / 100, black_box=None if black is None else black[n] / 100)
        for n, ((eps, steps), one) in enumerate(zip(columns, white, strict=True))
    ]


@pytest.mark.parametrize(
    ("row", "verdict", "failed"),
    [
        ("CIFAR-10, R50, N-LR", SUSPECT, ("more steps",)),
        ("CIFAR-10, R50, 1-LR", MASKED, ("black box", "double radius")),
        ("CIFAR-10, R18, 2-LR", SUSPECT, ("more steps",)),
        ("CIFAR-100, R50, N-LR", SUSPECT, ("more steps", "larger radius")),
        ("CIFAR-100, R50, 1-LR", MASKED, ("black box", "more steps", "double radius")),
    ],
)
def test_printed_figures_say_what_they_can(row, verdict, failed):
    white, black, clean = PRINTED[row]
    diagnosis = diagnose_published(cells_of(white, black), clean=clean / 100)
    assert (diagnosis.verdict, diagnosis.failed) == (verdict, failed)
    box = named(diagnosis, "black box")
    if black is None:
        assert (box.passed, box.value) == (None, None)
    else:
        assert box.value == pytest.approx(max(w - b for w, b in zip(white, black, strict=True)) / 100)
    if row == "CIFAR-10, R50, 1-LR":
        assert "at 20/255 with 20 steps leaves 76.6 % right, black box 20.6 % (8 of 8" in diagnosis.summary
        assert named(diagnosis, "double radius").value == pytest.approx(77.0 / 78.5)


def test_printed_figures_of_few_images_or_few_cells_decide_less():
    white, black, _ = PRINTED["CIFAR-100, R50, 1-LR"]
    few = diagnose_published(cells_of(white, black), images=40)
    assert few.verdict == SOUND
    assert named(few, "black box").undecided
    assert named(few, "double radius").value is None  # no clean accuracy
    one = diagnose_published([PGDAccuracy(eps=8 / 255, steps=20, white_box=0.785)])
    assert one.verdict == SOUND
    assert [check.passed for check in one.checks] == [None] * 5
    textbook = diagnose_published([PGDAccuracy(eps=8 / 255, steps=20, white_box=0.785, black_box=0.568)])
    assert textbook.verdict == MASKED
    helped = diagnose_published([PGDAccuracy(eps=8 / 255, steps=20, white_box=0.785)], clean=0.7)
    assert helped.failed == ("clean accuracy",)
    undone = [PGDAccuracy(eps=8 / 255, steps=steps, white_box=share) for steps, share in ((7, 0.3), (20, 0.4))]
    assert "undo what the first ones did" in diagnose_published(undone).summary


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagnose_published([]), "give accuracies under white-box attacks"),
        (lambda: diagnose_published(2 * cells_of(PRINTED["CIFAR-10, R50, N-LR"][0])), "one for each radius"),
        (lambda: PGDAccuracy(eps=8 / 255, steps=20, white_box=78.5), "white_box must be a share.*divide per cent"),
        (lambda: PGDAccuracy(eps=0, steps=20), "eps must be"),
        (lambda: diagnose_published(cells_of(PRINTED["CIFAR-10, R50, N-LR"][0]), clean=95.4), "clean must be a share"),
    ],
)
def test_figures_that_are_none_are_one_error(call, message):
    with pytest.raises(EvaluationError, match=message):
        call()


def test_figures_on_few_images_are_judged_as_such():
    """Three points between two numbers of steps: of 10,000 images beyond chance, of 1,000 not."""
    cells = [{"eps": 8 / 255, "steps": steps, "white_box": share} for steps, share in ((7, 0.31), (20, 0.28))]
    assert diagnose_published(PGDAccuracy(**cell) for cell in cells).verdict == SUSPECT
    assert diagnose_published((PGDAccuracy(**cell) for cell in cells), images=1000).verdict == SOUND
    assert diagnose_published(PGDAccuracy(**cell, images=1000) for cell in cells).verdict == SOUND


def test_the_figures_of_an_evaluation_are_read_by_unit_and_step():
    def figures(kind, unit, setting, share, **changes):
        for eps, steps in ((8 / 255, 7), (8 / 255, 20)):
            attack = AttackProtocol(
                name="PGD", eps=eps, steps=steps, radius_unit=unit, setting=setting, restarts=1, **changes
            )
            key = f"{kind}-{unit}-{setting}-{steps}-{changes}"
            yield figure(key, "PGD", round(360 * share) + steps, kind=kind, attack=attack)

    made = (
        *figures(Kind.ATTACK, "pixel", "Madry", 0.5), *figures(Kind.TRANSFER, "pixel", "Madry", 0.4),
        *figures(Kind.ATTACK, "normalized", "Madry", 0.7), *figures(Kind.ATTACK, "pixel", "paper", 0.8),
        *figures(Kind.ATTACK, "pixel", "Madry", 0.1, norm="l2"),
        *figures(Kind.ATTACK, "pixel", "Madry", 0.1, targeted=True),
    )  # fmt: skip
    evaluation = make_evaluation(figures=made)
    assert accuracies_of(evaluation, "2-LR") == [
        PGDAccuracy(eps=8 / 255, steps=steps, white_box=(180 + steps) / 360, black_box=(144 + steps) / 360, images=360)
        for steps in (7, 20)
    ]
    assert [one.white_box for one in accuracies_of(evaluation, "2-LR", radius_unit="normalized")] == [
        259 / 360,
        272 / 360,
    ]
    assert [one.black_box for one in accuracies_of(evaluation, "2-LR", setting="paper")] == [None, None]
    with pytest.raises(EvaluationError, match="--suite paper"):
        accuracies_of(evaluation, "plain")
