"""`LowRankBranch`: against Algorithm 2 written down literally, and everything that training does to it."""

import copy
import re

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import timm_lowrank as tlr
from timm_lowrank import CollapseError, LowRankBranch, LowRankConfig
from timm_lowrank.core import factored
from timm_lowrank.core.config import PROJECTIONS, SCALES, STEP_RULES, STORAGES

DOUBLE = torch.float64

# No warm-up: the penalty has its whole weight from the first batch on.
PLAIN = {"warmup_updates": 0, "reconstruction_weight": 1.0, "scale": "unit"}


def batches(count, rows=8, width=24, seed=0, size=1.0):
    """Batches (rows, width) float64 with a decaying spectrum about a mean, both of which drift as a network's do."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=DOUBLE, generator=generator)

    mixing = torch.linalg.qr(randn(width, width))[0] * torch.arange(1, width + 1, dtype=DOUBLE) ** -0.7
    mean = randn(width) / width**0.5
    for _ in range(count):
        mixing = mixing + 0.02 * randn(width, width) / width
        mean = mean + 0.02 * randn(width) / width**0.5
        yield size * (randn(rows, width) @ mixing.T + mean)


def config(**values):
    return LowRankConfig(**{**PLAIN, "project_every": 4, "update_rows": None, "oversampling": 3, **values})


def build(width=24, rank=4, dtype=DOUBLE, **values):
    return LowRankBranch(width, rank, config(**values), dtype=dtype)


def train(branch, rows):
    """One training step of the branch; the loss and its gradient in the activations."""
    rows = rows.clone().requires_grad_()
    loss = branch.penalty(rows)
    loss.backward()
    branch.update()
    return loss.detach(), rows.grad


def train_all(branch, rows):
    for batch in rows:
        train(branch, batch)
    return branch


def trained(updates=6, **values):
    return train_all(build(**values), batches(updates))


def difference(actual, expected, floor=1e-300):
    """The largest difference, relative to the largest entry of what is expected or to `floor`."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(floor))


def eigenvalues(branch):
    return torch.linalg.eigvalsh(branch.dense_weight())


def assert_same_w_and_b(branch, twin, tolerance=0.0):
    """W and b are equal, to the bit where no tolerance is given."""
    assert difference(branch.dense_weight(), twin.dense_weight()) <= tolerance
    assert difference(branch.bias, twin.bias) <= tolerance


def rank_of(branch, rtol=1e-9):
    return int(torch.linalg.matrix_rank(branch.dense_weight(), rtol=rtol))


# against Algorithm 2


class LiteralAlgorithm2:
    """The paper's layer, line by line: W_s and b by autograd, the projection by singular value decomposition.

    Independent of the package: no line of it is called here.
    """

    def __init__(self, width, rank, weights, step_size, project_every):
        self.matrix = torch.zeros(width, width, dtype=DOUBLE, requires_grad=True)
        self.bias = torch.zeros(width, dtype=DOUBLE, requires_grad=True)
        self.rank, self.weights, self.step_size, self.project_every = rank, weights, step_size, project_every
        self.updates = 0

    def loss(self, a):
        w = (self.matrix + self.matrix.T) / 2
        z = (a + self.bias) @ w
        d1 = self.weights[0] / len(a) * ((z - (a + self.bias)) ** 2).sum()
        d2 = self.weights[1] / len(a) * sum(abs(1 - row.norm()) for row in a)
        return d1 + d2

    def train(self, a):
        a = a.clone().requires_grad_()
        loss = self.loss(a)
        loss.backward()
        with torch.no_grad():
            self.matrix -= self.step_size * self.matrix.grad
            self.bias -= self.step_size * self.bias.grad
            self.updates += 1
            if self.updates % self.project_every == 0:
                u, s, v = torch.linalg.svd((self.matrix + self.matrix.T) / 2)
                self.matrix.copy_((u[:, : self.rank] * s[: self.rank]) @ v[: self.rank])
        self.matrix.grad = self.bias.grad = None
        return loss.detach(), a.grad


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("norm_weight", [0.0, 0.3])
def test_as_printed_it_is_the_paper_s_algorithm(storage, norm_weight):
    literal = LiteralAlgorithm2(24, 4, (0.7, norm_weight), 0.2, 4)
    printed = {"scale": "paper", "step_rule": "fixed", "projection": "exact", "step_size": 0.2}
    branch = build(storage=storage, reconstruction_weight=0.7, norm_weight=norm_weight, **printed)
    moved = []
    for rows in batches(80):
        (loss, gradient), (expected_loss, expected_gradient) = train(branch, rows), literal.train(rows)
        assert difference(loss, expected_loss) < 1e-10
        assert difference(gradient, expected_gradient) < 1e-10
        assert difference(branch.bias, literal.bias.detach()) < 1e-10
        assert difference(branch.dense_weight(), literal.matrix.detach()) < 1e-10
        moved.append(float(branch.bias.norm()))
    assert moved[-1] > moved[0] > 0
    assert rank_of(branch) == 4


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("step_rule", STEP_RULES)
@pytest.mark.parametrize("scale", SCALES)
def test_factored_and_dense_storage_agree(scale, step_rule, projection):
    """48 updates with 12 projections, in loss, gradient to the activations, W and b, to 1e-10."""
    values = {"scale": scale, "step_rule": step_rule, "projection": projection, "norm_weight": 0.1, "step_size": 0.3}
    fast, slow = build(**values), build(storage="dense", **values)
    for rows in batches(48):
        (loss, gradient), (expected_loss, expected_gradient) = train(fast, rows), train(slow, rows)
        assert difference(loss, expected_loss) < 1e-10
        assert difference(gradient, expected_gradient, floor=1e-3) < 1e-10  # zero at W = 0 on the unit scale
        assert_same_w_and_b(fast, slow, 1e-10)
    assert rank_of(fast) == 4
    assert difference(fast.weight.eigenvalues()[:4], slow.weight.eigenvalues()[:4]) < 1e-9
    assert fast.effective_rank() == slow.effective_rank() > 0


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_storages_agree_when_rows_are_drawn_and_batches_accumulated(projection):
    fast, slow = (build(storage=storage, projection=projection, update_rows=5) for storage in STORAGES)
    for rows in batches(24, rows=14):
        for branch in (fast, slow):
            for part in rows.split([8, 2, 4]):
                branch.penalty(part.clone().requires_grad_()).backward()
            branch.update()
        assert_same_w_and_b(fast, slow, 1e-10)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scale", SCALES)
def test_gradient_to_the_activations(scale, storage):
    branch = trained(scale=scale, storage=storage, norm_weight=0.2).eval()
    (rows,) = batches(1, rows=3, seed=5)
    assert torch.autograd.gradcheck(branch.penalty, rows.requires_grad_())


@pytest.mark.parametrize("scale", SCALES)
def test_a_float32_gradient_is_exact_where_the_mean_is_a_thousand_times_the_spread(scale):
    """s a + s b in the place of s (a + b) would be rounded at the size of b, in all rows alike."""
    branch, exact = build(scale=scale, dtype=torch.float32), build(scale=scale)
    *before, rows = ((300 + rows).float() for rows in batches(7))
    train_all(branch, before)
    exact.load_state_dict(branch.state_dict())
    (loss, gradient), (expected_loss, expected) = (train(one, rows.to(one.bias)) for one in (branch, exact))
    assert 500 < exact.bias.norm() / exact.reference_norm < 2000
    assert difference(loss, expected_loss) < 2e-5
    assert difference(gradient, expected) < 2e-5


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_activations_of_any_dtype_have_gradients_of_it(dtype, scale, storage):
    """A network in double precision, too: the branch stays as it is."""
    branch = build(scale=scale, storage=storage, dtype=torch.float32, norm_weight=0.1)
    train_all(branch, (rows.float() for rows in batches(6)))
    twin = copy.deepcopy(branch)
    (rows,) = batches(1, seed=5)
    rows = rows.to(dtype)
    (loss, gradient), (expected_loss, expected) = train(branch, rows), train(twin, rows.float())
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert difference(loss, expected_loss) < 1e-6
    assert difference(gradient.float(), expected) < max(1e-5, torch.finfo(dtype).eps)


@pytest.mark.parametrize("storage", STORAGES)
def test_hooks_on_the_activations_run_once(storage):
    branch, calls = trained(storage=storage), []
    (rows,) = batches(1, seed=5)
    alone = rows.clone().requires_grad_()
    branch.eval().penalty(alone).backward()
    rows.requires_grad_().register_hook(lambda grad: calls.append(grad) or 2 * grad)
    branch.penalty(rows).backward()
    assert len(calls) == 1
    assert torch.equal(rows.grad, 2 * alone.grad)


@pytest.mark.parametrize("scale", SCALES)
def test_a_penalty_may_be_changed_in_place(scale):
    """As `loss = model.penalty(); loss += task` does, and dividing it by accumulated parts; the report is of before."""
    branch = trained(scale=scale, norm_weight=0.1).eval()
    (rows,) = batches(1, seed=5)
    alone, again = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    expected = branch.penalty(alone)
    (expected / 2 + 3).backward()
    penalty = branch.penalty(again)
    penalty /= 2
    penalty += 3
    penalty.backward()
    assert torch.allclose(again.grad, alone.grad, atol=1e-12)
    assert branch.report().penalty == pytest.approx(float(expected.detach()))
    with torch.no_grad():
        looked = branch.penalty(rows)
        looked += 1
    assert branch.report().penalty == pytest.approx(float(expected.detach()))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scale", SCALES)
def test_in_inference_mode_it_can_be_looked_at(scale, storage):
    for branch in (build(scale=scale, storage=storage), trained(scale=scale, storage=storage)):
        (rows,) = batches(1, seed=5)
        with torch.no_grad():
            expected = branch.penalty(rows)
        with torch.inference_mode():
            assert torch.equal(branch.penalty(rows), expected)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scale", SCALES)
def test_the_loss_and_its_parts_by_hand(scale, storage):
    branch = trained(storage=storage, scale=scale, reconstruction_weight=2.0, norm_weight=0.5).eval()
    (rows,) = batches(1, seed=5)
    total, parts = branch.penalty(rows), branch.losses()
    centred = rows + branch.bias
    norms = centred.norm(dim=1)
    divisors = {
        "unit": norms,
        "reference": branch.reference_norm,
        "batch": norms.square().mean().sqrt(),
        "paper": torch.ones(1, dtype=DOUBLE),
    }
    errors = (centred @ branch.dense_weight() - centred).square().sum(1)
    sizes = rows.norm(dim=1) if scale == "paper" else norms / divisors[scale]
    reconstruction, norm = (errors / divisors[scale].square()).mean(), (1 - sizes).abs().mean()
    assert torch.allclose(parts["reconstruction"], reconstruction)
    assert torch.allclose(parts["norm"], norm)
    assert torch.allclose(parts["activation_norm"], norms.square().mean().sqrt())
    assert torch.allclose(parts["outside"], errors.sum() / norms.square().sum())
    assert torch.allclose(total, 2 * reconstruction + 0.5 * norm)
    assert all(not part.requires_grad for part in parts.values())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("length", "held"), [(1.9, False), (2.5, True)])
def test_the_mean_of_a_layer_is_held_to_a_multiple_of_its_spread(storage, scale, length, held):
    branch = trained(storage=storage, scale=scale, reconstruction_weight=2.0, norm_weight=0.0).eval()
    (rows,) = batches(1, seed=5)
    rows = rows - rows.mean(0)
    bound, spread = branch.offset[0], rows.square().sum(1).mean().sqrt()
    mean = torch.randn(rows.shape[1], dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    mean = mean * (length * bound / 2 * spread / mean.norm())
    branch.load_state_dict(branch.state_dict() | {"bias": -mean, "offset": torch.stack([bound, spread])})
    rows = (rows + mean).requires_grad_()
    total = branch.penalty(rows)
    (gradient,) = torch.autograd.grad(total, rows)
    total, without = total.detach(), 2 * branch.losses()["reconstruction"]
    excess = (rows.mean(0).norm() - bound * spread).clamp_min(0) / branch.reference_norm
    (expected,) = torch.autograd.grad(2 * excess.square(), rows)
    branch.load_state_dict(branch.state_dict() | {"offset": torch.stack([1e3 * bound, spread])})
    (others,) = torch.autograd.grad(branch.penalty(rows), rows)
    if scale == "paper" or not held:
        assert torch.equal(gradient, others)
        assert difference(total, without) < 1e-12
    else:
        assert difference(total, without + 2 * excess.detach().square()) < 1e-12
        assert difference(gradient, others + expected) < 1e-12
        assert expected.norm() > 0.01 * others.norm()


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_the_bound_of_the_mean_is_measured_once_and_kept(offset):
    first, *others = batches(20)
    branch = build()
    train(branch, first + offset)
    spread = (first - first.mean(0)).square().sum(1).mean().sqrt()
    ratio = (first + offset).mean(0).norm() / spread
    assert (ratio > 1) == (offset > 0)
    assert difference(branch.offset[0], 2 * ratio.clamp_min(1)) < 1e-12
    for rows in others:
        bias = branch.bias
        train(branch, rows)
        assert difference(branch.offset[0], 2 * ratio.clamp_min(1)) < 1e-12
        assert difference(branch.offset[1], (rows + bias).square().sum(1).mean().sqrt()) < 1e-12
    state, loaded = branch.state_dict(), build()
    loaded.load_state_dict(state)
    assert torch.equal(loaded.offset, branch.offset)
    del state["offset"]  # as earlier versions wrote it: b is what tells of the mean
    loaded.load_state_dict(state)
    expected = 2 * (branch.bias.norm() / branch.reference_norm).clamp_min(1)
    assert difference(loaded.offset, torch.stack([expected, branch.reference_norm])) < 1e-12


def test_the_reference_scale_grows_with_the_layer_and_never_shrinks():
    first, *others = batches(60)
    branch = build(scale="reference")
    train(branch, first)
    expected = (first - first.mean(0)).square().sum(1).mean().sqrt()
    assert difference(branch.reference_norm, expected) < 1e-12
    train_all(branch, [rows / 5 for rows in others[:20]])
    assert difference(branch.reference_norm, expected) < 1e-12
    for rows in others[20:]:
        spread = (2 * rows + branch.bias).square().sum(1).mean().sqrt()
        train(branch, 2 * rows)
        expected = max(expected, 0.99 * expected + 0.01 * spread)
        assert difference(branch.reference_norm, expected) < 1e-12
    train(branch, 1e6 * first)
    assert difference(branch.reference_norm, 1.03 * expected) < 1e-12, "one wild update changes little"


def test_a_layer_that_begins_nearly_constant_is_pulled_with_the_weight_that_was_asked_for():
    """As the class token of a transformer that is trained from scratch, which spreads a twentieth of what it will."""
    branch = build(scale="reference", warmup_updates=50)
    drawn = list(batches(200))
    shift = 15 * drawn[0].norm(dim=1).mean() / len(drawn[0][0]) ** 0.5
    for step, rows in enumerate(drawn):
        train(branch, shift + rows * min(1.0, 0.05 + step / 100))
        if step >= 100:
            assert branch.losses()["reconstruction"] < 3  # 0.05^-2 = 400 times the share outside, if taken once


def test_the_warmup_adapts_the_branch_before_it_pulls():
    branch, plain = build(warmup_updates=5), build()
    shares = []
    for rows in batches(14):
        (loss, gradient), (full, _) = train(branch, rows), train(plain, rows)
        shares.append(float(loss / full))
        assert (float(gradient.norm()) > 0) == (shares[-1] > 0)
        assert torch.equal(branch.dense_weight(), plain.dense_weight()), "W and b learn from the first batch on"
    assert shares == pytest.approx([0, 0, 0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


# nothing of size m x m


class NothingLarge(TorchDispatchMode):
    """Raises when an operation makes a tensor of `numbers` elements or decomposes a matrix with a side of `side`."""

    DECOMPOSITION = re.compile(r"eig|svd|qr|cholesky|lu_factor|ldl|inv|solve|lstsq")

    def __init__(self, numbers, side):
        super().__init__()
        self.numbers, self.side, self.operations, self.decompositions = numbers, side, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.DECOMPOSITION.search(name):
            self.decompositions += 1
            sides = [max(x.shape[-2:], default=0) for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            if max(sides, default=0) >= self.side:
                raise AssertionError(f"{name} of a matrix with a side of {max(sides)}")
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        largest = max((x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)), default=0)
        if largest >= self.numbers:
            raise AssertionError(f"{name} made a tensor of {largest} numbers")
        return result


WIDE = 2048


def run_wide(storage, projection, updates=11):
    values = {"project_every": 5, "update_rows": 16, "storage": storage, "projection": projection}
    branch = LowRankBranch(WIDE, 24, LowRankConfig(**{**PLAIN, **values}))
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        _, gradient = train(branch, torch.randn(32, WIDE, generator=generator))
    restored = LowRankBranch(WIDE, 24, LowRankConfig(**{**PLAIN, **values}))
    restored.load_state_dict(branch.state_dict())
    assert branch.factor().shape == (WIDE, 24)
    assert 0 < branch.effective_rank() <= 24 + 16
    return gradient


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_nothing_of_size_m_by_m_is_made(projection):
    with NothingLarge(WIDE * WIDE, WIDE // 2) as guard:
        gradient = run_wide("factored", projection)
    assert float(gradient.norm()) > 0
    assert guard.operations > 500
    assert guard.decompositions >= 4


@pytest.mark.parametrize("limits", [(WIDE * WIDE, 10**9), (10**12, WIDE // 2)], ids=["tensors", "decompositions"])
def test_the_guard_does_fire(limits):
    with (
        pytest.raises(AssertionError, match=r"made a tensor of 4194304|of a matrix with a side of 2048"),
        NothingLarge(*limits),
    ):
        run_wide("dense", "exact", updates=5)


# stability


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_normalized_rule_is_stable_at_any_norm(monkeypatch, scale, projection):
    """||I - W||_2 <= 1 always, so W stays between 0 and 2, for batches and rows of norms from 1e-4 to 1e6."""
    monkeypatch.setattr("timm_lowrank.core.branch._BLOWN_UP", float("inf"))  # no layer of one network does this
    branch = build(scale=scale, projection=projection, step_size=1.0)
    generator = torch.Generator().manual_seed(1)
    for i, rows in enumerate(batches(40)):
        sizes = 10 ** (10 * torch.rand(8 if i % 2 else 1, 1, dtype=DOUBLE, generator=generator) - 4)
        train(branch, rows / rows.norm(dim=1, keepdim=True) * sizes)
        distance = float((1 - eigenvalues(branch)).abs().max())
        assert distance <= 1 + 1e-9
    assert float(eigenvalues(branch).max()) > 1e-3


@pytest.mark.parametrize("rows", [1, 8, 50])
def test_the_normalized_step_is_nearly_the_largest_that_is_stable(rows):
    """The first step from W = 0 gives 2 s C with s below 1 / lambda_max(C), but above 1 / (p^(1/8) lambda_max(C))."""
    branch = build(scale="paper", step_size=1.0)
    branch.reference_norm, branch._initialized = torch.ones((), dtype=DOUBLE), True  # with b at zero
    (batch,) = batches(1, rows=rows)
    train(branch, batch)
    largest = float(eigenvalues(branch).max())
    assert 2 / rows**0.125 - 1e-9 <= largest <= 2 + 1e-9


def test_single_precision_stays_stable():
    branch = build(dtype=torch.float32, step_size=1.0, project_every=10)
    train_all(branch, (rows.float() for rows in batches(400)))
    assert float((1 - eigenvalues(branch)).abs().max()) <= 1 + 1e-4
    assert rank_of(branch, rtol=1e-5) == 4
    basis = branch.weight.basis
    assert torch.allclose(basis @ basis.T, torch.eye(4), atol=1e-4), "kept orthonormal through 40 projections"


def test_rounding_of_the_kept_rows_is_measured_now_and_then():
    """Between two measurements they count as orthonormal, which in single precision they are not quite."""
    branch, measured = build(dtype=torch.float32, project_every=1), []
    for rows in batches(40):
        train(branch, rows.float())
        basis = branch.weight.basis
        measured.append(torch.equal(branch.weight.gram, basis @ basis.T))
        assert measured[-1] or torch.equal(branch.weight.gram, torch.eye(len(basis)))
    assert [i + 1 for i, yes in enumerate(measured) if yes] == [20, 40]


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("storage", STORAGES)
def test_the_rank_is_kept_after_every_projection(storage, projection):
    branch = build(storage=storage, projection=projection, nystrom_runs=5)
    ranks = []
    for rows in batches(24):
        train(branch, rows)
        ranks.append(rank_of(branch))
    assert ranks[3::4] == [4] * 6
    assert max(ranks) > 4, "it grows in between"
    factor = branch.factor()
    assert factor.shape == (24, 4)
    assert torch.allclose(factor @ factor.T, branch.dense_weight(), atol=1e-9)
    assert 1 <= branch.effective_rank() <= 4


@pytest.mark.parametrize("update_rows", [None, 5])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_projection_may_come_between_penalty_and_update(storage, update_rows):
    values = {"storage": storage, "projection": "exact", "update_rows": update_rows}
    branch, twin = trained(**values), trained(**values)
    first, second = batches(2, seed=1)
    twin.project()
    for one, projects in ((branch, True), (twin, False)):
        one.penalty(first)
        one.penalty(second)
        if projects:
            one.project()
        one.update()
    assert_same_w_and_b(branch, twin, 1e-9)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("updates", [0, 3])
def test_w_is_zero_at_first_and_stays_so_without_variation(storage, updates):
    branch = train_all(build(storage=storage, project_every=100), [torch.ones(4, 24, dtype=DOUBLE)] * updates)
    assert (branch.losses() == {}) == (not updates)
    for _ in range(2):
        assert torch.equal(branch.dense_weight(), torch.zeros(24, 24, dtype=DOUBLE))
        assert branch.effective_rank() == float(branch.factor().norm()) == 0
        branch.weight.project(torch.Generator())


def test_it_learns_the_subspace_of_the_data():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(40, 3, dtype=DOUBLE, generator=generator))[0]
    branch = build(width=40, rank=3, project_every=10, update_rows=16)
    for _ in range(100):
        inside = torch.randn(32, 3, dtype=DOUBLE, generator=generator) @ directions.T
        loss, _ = train(branch, inside + 0.01 * torch.randn(32, 40, dtype=DOUBLE, generator=generator) + 2.0)
    projector = directions @ directions.T
    assert float((branch.dense_weight() - projector).norm()) < 0.1
    assert float((branch.bias + 2.0).abs().max()) < 0.2
    assert float(loss) < 0.02


# rows that enter W


def test_the_growth_of_the_basis_is_bounded():
    branch = build(update_rows=3, project_every=5, rank=4)
    sizes = []
    for rows in batches(20):
        train(branch, rows)
        sizes.append(branch.weight.basis.shape[0])
    assert max(sizes) == 4 + 3 * 5 - 3, "just before a projection"
    assert sizes[4::5] == [4] * 4


@pytest.mark.parametrize("sizes", [[10], [5, 5], [7, 1, 2]], ids=str)
def test_rows_are_drawn_evenly_whatever_the_batches_are(sizes):
    """Every row of an update enters W equally often, also when micro-batches are of different sizes."""
    drawn, seeds = torch.zeros(10), 300
    rows = torch.eye(10, 24, dtype=DOUBLE)
    for seed in range(seeds):
        branch = build(scale="paper", step_rule="fixed", update_rows=3, seed=seed)
        for part in rows.split(sizes):
            branch.penalty(part)
        branch.update()
        entered = branch.dense_weight().diagonal()[:10] > 0
        assert int(entered.sum()) == 3
        drawn += entered
    expected = seeds * 3 / 10
    chi_square = float(((drawn - expected).square() / expected).sum()) / 0.7  # drawn without replacement
    assert chi_square < 27.9, "the 0.999 quantile of 9 degrees of freedom"


def test_draws_depend_on_seed_and_update_alone(random_stream):
    def run(seed):
        return trained(update_rows=3, seed=seed).dense_weight()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert run(2**62 + 1).isfinite().all()
    assert run(-5).isfinite().all()
    assert random_stream()


def test_the_loss_sees_every_row():
    (rows,) = batches(1)
    losses = [trained(update_rows=None).eval().penalty(rows), trained(update_rows=None).train().penalty(rows)]
    drawn = trained(update_rows=None)
    drawn.config = config(update_rows=2)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], drawn.penalty(rows))


# accumulation, precision, skipped steps


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("step_rule", STEP_RULES)
@pytest.mark.parametrize("parts", [[4, 4], [1, 5, 2]])
def test_micro_batches_are_one_batch(storage, step_rule, parts):
    values = {"storage": storage, "step_rule": step_rule, "scale": "reference", "step_size": 0.3}
    whole, split = trained(4, **values), trained(4, **values)
    for rows in batches(8, seed=3):
        _, gradient = train(whole, rows)
        pieces = [piece.clone().requires_grad_() for piece in rows.split(parts)]
        for piece in pieces:
            (split.penalty(piece) * len(piece) / len(rows)).backward()
        split.update()
        assert difference(torch.cat([piece.grad for piece in pieces]), gradient) < 1e-10
        assert_same_w_and_b(split, whole, 1e-10)


@pytest.mark.parametrize("update_rows", [None, 5])
def test_a_batch_that_is_gone_through_in_pieces_gives_the_same(monkeypatch, update_rows):
    """As a wide layer's are. The first two projections are of a W whose rank is below the target rank."""
    monkeypatch.setattr("timm_lowrank.core.factored._PIECE", 1)
    monkeypatch.setattr("timm_lowrank.core.factored._COLUMNS", 7)
    assert len(factored.pieces(60, 8, torch.device("cpu"), 7)) == 9
    values = {"width": 60, "rank": 40, "update_rows": update_rows, "norm_weight": 0.1}
    fast, slow = (build(storage=storage, **values) for storage in STORAGES)
    for rows in batches(32, width=60):
        (loss, gradient), (expected_loss, expected_gradient) = train(fast, rows), train(slow, rows)
        assert difference(loss, expected_loss) < 1e-10
        assert difference(gradient, expected_gradient, floor=1e-3) < 1e-10
        assert_same_w_and_b(fast, slow, 1e-10)


class Copies(TorchDispatchMode):
    """The number of tensors of at least `numbers` elements that are made, views left out."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.made = numbers, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not any(value.alias_info for value in func._schema.returns):
            self.made += sum(x.numel() >= self.numbers for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["reference", "unit"])
def test_of_what_is_as_large_as_the_batch_only_the_gradient_is_made(monkeypatch, scale, dtype):
    monkeypatch.setattr("timm_lowrank.core.branch.multiplies_in_bfloat16", lambda device: True)
    monkeypatch.setattr("timm_lowrank.core.factored._PIECE", 2**12)
    branch = build(4096, 4, torch.float32, scale=scale, update_rows=8, project_every=2)
    for rows in batches(3, rows=32, width=4):
        rows = rows.repeat(1, 1024).to(dtype).requires_grad_()
        with Copies(rows.numel()) as copies:
            loss = branch.penalty(rows)
        assert copies.made == 0
        with Copies(rows.numel()) as copies:
            loss.backward()
        assert copies.made == 1
        branch.update()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations(monkeypatch, dtype):
    monkeypatch.setattr("timm_lowrank.core.branch.multiplies_in_bfloat16", lambda device: False)
    branch, twin = (build(dtype=torch.float32) for _ in range(2))
    for rows in batches(6):
        low = rows.to(dtype)
        loss, gradient = train(branch, low)
        expected_loss, expected = train(twin, low.float())
        assert (loss.dtype, gradient.dtype, branch.bias.dtype) == (torch.float32, dtype, torch.float32)
        assert torch.equal(loss, expected_loss)
        assert torch.equal(gradient, expected.to(dtype))
    assert torch.equal(branch.dense_weight(), twin.dense_weight())


@pytest.mark.parametrize("parts", [[32], [20, 12]])
@pytest.mark.parametrize("outside", [0.3, 0.01])
def test_products_in_bfloat16_do_not_change_w_and_the_gradient_by_a_rounding(monkeypatch, outside, parts):
    """Beside the float64 twin, and beside the branch in float32, which is given the same activations."""
    monkeypatch.setattr("timm_lowrank.core.branch.multiplies_in_bfloat16", lambda device: device.type == "cpu")
    options = {"update_rows": 8, "scale": "reference", "project_every": 5}
    half, whole = (build(512, 12, torch.float32, **options) for _ in range(2))
    twin = build(512, 12, **options)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 512, dtype=DOUBLE, generator=generator) * torch.arange(1, 13)[:, None] ** -0.5
    for _ in range(40):
        rows = torch.randn(32, 12, dtype=DOUBLE, generator=generator) @ mixing + 1
        rows = rows + outside**0.5 * torch.randn(32, 512, dtype=DOUBLE, generator=generator)
        rows = [part.bfloat16() for part in rows.split(parts)]
        bias, seen = twin.bias, []
        for branch, dtype in ((half, torch.bfloat16), (whole, torch.float32), (twin, DOUBLE)):
            inputs = [part.to(dtype, copy=True).requires_grad_() for part in rows]
            loss = sum(branch.penalty(part) for part in inputs)
            loss.backward()
            branch.update()
            seen.append((float(loss.detach()), torch.cat([part.grad.double() for part in inputs])))
        (loss, gradient), _, (exact, expected) = seen
        if branch.updates > 1:  # b and the unit of the loss are set by the first
            # In units of |x|^2 and of its gradient: what is left of them where W x is as near to x as bfloat16 can say.
            scaled = [(part + bias) / twin.reference_norm for part in rows]
            assert abs(loss - exact) < 2**-11 * sum(part.square().sum(dim=1).mean() for part in scaled)
            pull = torch.cat([2 / len(part) * part for part in scaled]) / twin.reference_norm
            assert (gradient - expected).norm() < 2**-8 * pull.norm()
        assert_same_w_and_b(half, whole, 1e-5)
    assert half.weight._half is not None
    assert whole.weight._half is None


@pytest.mark.parametrize("storage", STORAGES)
def test_autocast_changes_nothing(storage):
    """Nor does a backward() in its block, which torch advises against, where the branch has a backward of its own."""
    branch, twin = (build(dtype=torch.float32, storage=storage) for _ in range(2))
    for rows in batches(6):
        expected, expected_gradient = train(twin, rows.float())
        rows = rows.float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = branch.penalty(rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=storage == "factored"):
            loss.backward()
            branch.update()
        assert torch.equal(loss, expected)
        assert torch.equal(rows.grad, expected_gradient)
    assert_same_w_and_b(branch, twin)


@pytest.mark.parametrize("convert", ["half", "double", "bfloat16", "float"])
def test_a_model_s_change_of_precision_leaves_it_alone(convert):
    model = nn.ModuleDict({"branch": trained(dtype=torch.float32), "layer": nn.Linear(2, 2)})
    before = copy.deepcopy(model["branch"].state_dict())
    getattr(model, convert)()
    after = model["branch"].state_dict()
    assert {key: value.dtype for key, value in after.items()} == {key: value.dtype for key, value in before.items()}
    assert all(torch.equal(after[key], before[key]) for key in before)
    (rows,) = batches(1)
    train(model["branch"], rows.to(model["layer"].weight.dtype))


def test_it_is_neither_parameter_nor_buffer():
    branch = trained()
    assert list(branch.parameters()) == []
    assert list(branch.buffers()) == []
    assert all(not value.requires_grad for value in branch.state_dict().values())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_batch_with_an_overflow_that_a_scaler_skips_does_not_enter(storage, scale, bad):
    """A gradient scaler skips the optimizer's step and with it the update; the next good batch must not pay for it."""
    branch, twin = (trained(storage=storage, scale=scale) for _ in range(2))
    overflow, good = batches(2, seed=3)
    overflow[:, 1] = bad
    assert not branch.penalty(overflow.requires_grad_()).isfinite(), "the scaler must see it"
    train(branch, good)
    train(twin, good)
    assert torch.equal(branch.bias, twin.bias)
    assert difference(branch.dense_weight(), twin.dense_weight()) < 1e-12
    train_all(branch, batches(6, seed=4))
    assert branch.dense_weight().isfinite().all()
    assert rank_of(branch) >= 4


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scale", ["unit", "reference"])
def test_an_overflow_in_the_very_first_batch_is_not_taken_for_the_scale(storage, scale):
    branch = build(storage=storage, scale=scale)
    overflow, good, *others = batches(10)
    overflow[0, 0] = float("inf")
    branch.penalty(overflow)
    train(branch, good)
    assert difference(branch.reference_norm, (good - good.mean(0)).square().sum(1).mean().sqrt()) < 1e-12
    train_all(branch, others)
    assert branch.dense_weight().isfinite().all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("place", [0, 3])
def test_a_batch_whose_squares_overflow_does_not_enter(storage, scale, place):
    values = {"storage": storage, "scale": scale, "dtype": torch.float32, "project_every": 2}
    rows = [batch.float() for batch in batches(8)]
    branch, twin = build(**values), build(**values)
    for at, batch in enumerate(rows):
        if at == place:
            branch.penalty(batch * 1e25)
        train(branch, batch)
        train(twin, batch)
    assert torch.equal(branch.bias, twin.bias)
    assert torch.equal(branch.reference_norm, twin.reference_norm)
    assert difference(branch.dense_weight(), twin.dense_weight()) < (1e-4 if place else 1)
    build(**values).load_state_dict(branch.state_dict())  # which takes nothing that is not finite


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_layer_of_zeros_has_its_scale_from_the_first_update_that_is_not(storage, scale):
    """As the output of a block whose last normalisation begins at zero."""
    branch, twin = (build(storage=storage, scale=scale, project_every=100) for _ in range(2))
    train_all(branch, [torch.zeros(8, 24, dtype=DOUBLE)] * 2)
    for rows in batches(6):
        (loss, _), (expected, _) = train(branch, rows), train(twin, rows)
        assert float(loss) == pytest.approx(float(expected), rel=1e-9)
    assert torch.equal(branch.reference_norm, twin.reference_norm)
    assert_same_w_and_b(branch, twin, 1e-9)


@pytest.mark.parametrize("scale", SCALES)
def test_a_batch_of_zeros_in_front_of_others_of_one_update_is_not_taken_for_the_scale(scale):
    branch, twin = build(scale=scale), build(scale=scale)
    zeros, (rows, more) = torch.zeros(8, 24, dtype=DOUBLE), batches(2)
    branch.penalty(zeros)
    assert float(branch.penalty(rows)) == pytest.approx(float(twin.penalty(rows)))
    branch.update()
    twin.forget_batches()
    train(twin, torch.cat([zeros, rows]))
    assert torch.allclose(branch.reference_norm, twin.reference_norm)
    assert difference(branch.bias, twin.bias) < 1e-9
    assert scale == "batch" or difference(train(branch, more)[0], train(twin, more)[0]) < 1e-9


@pytest.mark.parametrize("rows", [3, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_rounding_of_the_mean_of_equal_rows_is_no_spread(rows, dtype):
    branch = build(scale="reference", dtype=dtype)
    row = torch.randn(1, 24, dtype=dtype, generator=torch.Generator().manual_seed(0))
    train_all(branch, [row.expand(rows, 24)])
    assert float(branch.reference_norm) == pytest.approx(float(row.norm()), rel=1e-5)


def test_what_was_taken_from_a_batch_that_is_forgotten_is_taken_anew():
    branch, twin = build(scale="reference"), build(scale="reference")
    odd, rows = batches(2)
    branch.penalty(odd * 1e-3 + 50)
    branch.forget_batches()
    assert torch.equal(train(branch, rows)[0], train(twin, rows)[0])


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_rows_of_nearly_dependent_ones_are_kept_orthonormal(projection):
    """Of a spectrum that falls fast, in single precision, where the target rank is more than the data's."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(256, 256, generator=generator))[0] * torch.arange(1, 257) ** -2.0
    branch = build(width=256, rank=100, dtype=torch.float32, projection=projection, project_every=10, oversampling=10)
    for update in range(40):
        train(branch, torch.randn(32, 256, generator=generator) @ mixing.T)
        if update % 10 == 9:
            rows = branch.weight.spanning_rows().double()
            assert (rows @ rows.T - torch.eye(len(rows), dtype=DOUBLE)).abs().max() < 5e-3
    build(width=256, rank=100, dtype=torch.float32).load_state_dict(branch.state_dict())


# state


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
def test_a_file_resumes_bit_for_bit(tmp_path, storage, projection, dtype):
    """From the start, in the middle of an interval, and right after a projection."""
    own = torch.float32 if dtype == torch.bfloat16 else dtype
    values = {"storage": storage, "projection": projection, "update_rows": 5, "dtype": own}
    rows = [batch.to(dtype) for batch in batches(15)]
    for stop in (0, 1, 4, 7):
        straight = train_all(build(**values), rows[:stop])
        safetensors.torch.save_file(straight.state_dict(), tmp_path / "branch.safetensors")
        resumed = build(**values)
        resumed.load_state_dict(safetensors.torch.load_file(tmp_path / "branch.safetensors"))
        for batch in rows[stop:]:
            (loss, gradient), (expected_loss, expected) = train(resumed, batch), train(straight, batch)
            assert torch.equal(loss, expected_loss)
            assert torch.equal(gradient, expected)
        assert_same_w_and_b(resumed, straight)
        assert resumed.updates == straight.updates == 15


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("updates", [0, 6])
def test_a_state_dict_is_a_copy_without_empty_and_shared_tensors(storage, updates):
    """Writers of checkpoints drop those."""
    branch = trained(updates, storage=storage)
    state = branch.state_dict()
    assert min(value.numel() for value in state.values()) > 0
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
    before, twin = copy.deepcopy(state), copy.deepcopy(branch)
    train_all(branch, batches(5))
    assert all(torch.equal(state[key], before[key]) for key in state)
    branch.load_state_dict(state)
    for value in state.values():
        value.zero_()
    assert_same_w_and_b(branch, twin)


@pytest.mark.parametrize("storage", STORAGES)
def test_batches_that_wait_are_forgotten_when_a_state_is_loaded(storage):
    branch, twin = trained(storage=storage), trained(storage=storage)
    first, second = batches(2, seed=3)
    state = branch.state_dict()
    branch.penalty(first)
    branch.load_state_dict(state)
    with pytest.raises(RuntimeError, match="without a penalty"):
        branch.update()
    train(branch, second)
    train(twin, second)
    assert_same_w_and_b(branch, twin)


@pytest.mark.parametrize("storage", STORAGES)
def test_wrong_state_dicts(storage):
    state, branch, twin = (trained(storage=storage) for _ in range(3))
    state = state.state_dict()
    matrix = "basis" if storage == "factored" else "matrix"
    for wrong, message in (
        ({"bias": torch.zeros(30)}, r"a bias of shape \(30,\) does not fit 24 features"),
        ({matrix: torch.zeros(3, 23)}, r"low-rank branch.*shape \(3, 23\).* does not fit a layer of 24 features"),
        ({"extra": torch.zeros(1)}, r'Unexpected key.*"extra"'),
    ):
        with pytest.raises(RuntimeError, match=message):
            branch.load_state_dict({**state, **wrong})
        assert_same_w_and_b(branch, twin)
    with pytest.raises(RuntimeError, match=r'Missing key.*"counters"'):
        branch.load_state_dict({key: value for key, value in state.items() if key != "counters"})
    with pytest.raises(RuntimeError, match="Missing key"):
        build(storage=STORAGES[1 - STORAGES.index(storage)]).load_state_dict(state)


# errors


@pytest.mark.parametrize("rank", [0, -1, 25])
def test_ranks_that_do_not_fit(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} must lie between 1 and .*24"):
        LowRankBranch(24, rank)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_w_and_b_are_not_kept_in_half_precision(dtype):
    with pytest.raises(ValueError, match=f"must be torch.float32 or torch.float64, not {dtype}"):
        LowRankBranch(24, 4, dtype=dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_report_of_a_batch_that_is_not_finite_does_not_say_that_there_was_none(value):
    branch, (rows,) = build(), batches(1)
    branch.penalty(rows * value)
    assert "inf% of the energy outside W" in str(branch.report())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3, 23), r"\(3, 23\) do not fit \(batch, 24\); was the model wrapped for another image size"),
        (torch.zeros(24), r"\(24,\) do not fit"),
        (torch.zeros(3, 24, 1), r"\(3, 24, 1\) do not fit"),
        (torch.zeros(3, 24, dtype=torch.int64), "must be floating point, not torch.int64"),
        (torch.zeros(0, 24), "empty batch"),
    ],
)
def test_wrong_activations(rows, message):
    branch = build()
    branch.name = "layer3"
    with pytest.raises(ValueError, match=f"'layer3'.*{message}"):
        branch.penalty(rows)
    assert not branch.waiting


def test_an_update_needs_a_penalty():
    branch = build()
    branch.name = "layer3"
    (rows,) = batches(1)

    def without_gradients():
        with torch.no_grad():
            branch.train().penalty(rows)

    for idle in (lambda: None, lambda: branch.eval().penalty(rows), without_gradients, lambda: train(branch, rows)):
        idle()
        with pytest.raises(RuntimeError, match=r"'layer3' without a penalty\(\)"):
            branch.update()


def test_an_update_between_penalty_and_backward_is_an_error():
    branch = trained()
    (rows,) = batches(1)
    loss = branch.penalty(rows.requires_grad_())
    branch.update()
    with pytest.raises(RuntimeError, match=r"updated between penalty\(\) and backward"):
        loss.backward()


# collapse


def collapse(images, labels, seed=0, epochs=9, **values):
    """Train a network with a hidden layer of 256 features on real digits, with a branch from the fourth epoch on.

    Returns the accuracies at switch-on and at the end, and the error that stopped the training.
    """
    torch.manual_seed(seed)
    images, labels = images[:1000].flatten(1), labels[:1000]
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    model = tlr.wrap(
        network, LowRankConfig(**{**PLAIN, "branches": {"1": 10}, **values}), example_input=images[:2]
    ).enable(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def accuracy():
        return float((network(images).argmax(1) == labels).float().mean())

    before, error = 0.0, None
    try:
        for epoch in range(epochs):
            if epoch == 3:
                before = accuracy()
                model.enable()
            for chosen in torch.randperm(1000).split(50):
                loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen]) + model.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                model.update()
    except CollapseError as caught:
        error = caught
    return before, accuracy(), error


@pytest.mark.parametrize(("step_rule", "step_size", "weight"), [("fixed", 0.001, 1.0), ("normalized", 0.5, 5.0)])
def test_the_printed_l_c_alone_kills_a_layer_at_weight_1_and_says_so(digits, step_rule, step_size, weight):
    steps = {"step_rule": step_rule, "step_size": step_size}
    before, after, error = collapse(*digits, scale="paper", reconstruction_weight=weight, norm_weight=0.0, **steps)
    assert before > 0.85
    assert after < 0.2
    assert "layer '1' collapsed" in str(error)
    assert "Lower strength, reconstruction_weight" in str(error)


@pytest.mark.parametrize("weights", [{"reconstruction_weight": 1.0}, {"strength": 1.0}])
def test_with_both_its_terms_the_printed_loss_trains(digits, weights):
    """L_n has the weight of L_c: at 1 the layer lives, though it costs accuracy; at the default it costs none."""
    settings = {"reconstruction_weight": None, **weights}
    before, after, error = collapse(*digits, scale="paper", **settings)
    assert error is None
    assert after > before - (0.1 if "reconstruction_weight" in weights else 0.03)


@pytest.mark.parametrize("weight", [1.0, 5.0])
def test_the_unit_scale_does_not_kill_it(digits, weight):
    before, after, error = collapse(*digits, scale="unit", reconstruction_weight=weight)
    assert error is None
    assert after > before - 0.03


@pytest.mark.parametrize("storage", STORAGES)
def test_dead_activations_are_a_collapse_although_b_has_not_followed_yet(storage):
    """A dead layer is equal for all samples, not zero about -b, which moves slowly."""
    branch = trained(5, storage=storage, scale="paper", step_rule="fixed", step_size=1e-3)
    dead = torch.full((8, 24), 0.5, dtype=DOUBLE)
    with pytest.raises(CollapseError, match=r"collapsed: after 8 updates the root mean square norm"):
        train_all(branch, [dead] * 4)


@pytest.mark.parametrize("step_rule", STEP_RULES)
def test_activations_with_a_large_mean_are_no_collapse(step_rule):
    branch = build(step_rule=step_rule, scale="unit", step_size=1e-3)
    assert train_all(branch, [rows + 1e4 for rows in batches(9)]).updates == 9


def test_batches_of_one_sample_are_no_collapse():
    branch = build(project_every=2, scale="reference")
    first, *others = batches(9, rows=1)
    assert train_all(branch, [first, *others]).updates == 9
    assert 1 <= float(branch.reference_norm / first.norm()) <= 1.03**8, "its length, for want of a spread"


@pytest.mark.parametrize("storage", STORAGES)
def test_one_sample_over_and_over_is_no_collapse_until_it_dies(storage):
    branch, (row,) = build(project_every=1, storage=storage), batches(1, rows=1)
    assert train_all(branch, [row] * 5).updates == 5
    with pytest.raises(CollapseError, match="collapsed"):
        train_all(branch, [row * 1e-9] * 400)


def test_room_for_rows_never_takes_more_than_an_interval_between_projections(monkeypatch):
    reserve, taken = factored.FactoredWeight._reserve, []

    def watched(weight, count):
        held, before = weight.size + weight.pending, len(weight._buffer)
        reserve(weight, count)
        taken.append(len(weight._buffer) if len(weight._buffer) == before else 2 * held)  # copied from old to new

    monkeypatch.setattr(factored.FactoredWeight, "_reserve", watched)
    branch = build(rank=12, update_rows=6, project_every=10, width=100)
    train_all(branch, batches(25, width=100))
    assert max(taken) == len(branch.weight._buffer) == 12 + 6 * 10


def test_a_start_as_wide_as_the_factor_is_high_needs_no_random_columns(monkeypatch):
    monkeypatch.setattr("timm_lowrank.core.projection.random_columns", None)
    exact, branch = (build(width=60, rank=30, projection=name) for name in ("exact", "subspace"))
    for rows in batches(4, width=60):
        train(exact, rows)
        train(branch, rows)
    assert branch.weight.projections == 1
    assert_same_w_and_b(branch, exact, 1e-10)


def test_room_for_rows_is_made_as_they_come():
    branch = build(project_every=10**9, update_rows=64, storage="factored")
    assert train_all(branch, batches(5)).updates == 5
    kept = branch.weight.size
    assert kept <= len(branch.weight._buffer) <= 2 * kept


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("before", "updates"), [(5, 6), (0, 1), (7, 8)], ids=["between", "from the first", "projection"]
)
def test_activations_that_stay_not_finite_are_an_error_at_the_second_update(storage, value, before, updates):
    branch = trained(before, storage=storage)
    branch.name = "layer3"
    broken = torch.full((8, 24), value, dtype=DOUBLE)
    with pytest.raises(CollapseError, match=f"activations of layer 'layer3' are not finite after {updates} updates"):
        train_all(branch, [broken] * 4)
    assert branch.updates == updates
    assert branch.dense_weight().isfinite().all()
    assert branch.bias.isfinite().all()


ODD = {
    "not finite": torch.full((8, 24), torch.inf, dtype=DOUBLE),  # as a gradient scaler has them, whose step is skipped
    "all alike": torch.ones(8, 24, dtype=DOUBLE),  # duplicates, or blank images
    "huge": 1e6 * torch.randn(8, 24, dtype=DOUBLE),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("odd", ODD)
def test_one_odd_batch_now_and_then_is_no_collapse_at_a_projection_either(storage, odd):
    branch = trained(3, storage=storage)  # the next update projects, and every fourth one behind it
    for rows in batches(4):
        branch = copy.deepcopy(train_all(branch, [ODD[odd], rows]))
    assert branch.updates == 11
    assert branch.weight.eigenvalues().isfinite().all()


@pytest.mark.parametrize("storage", STORAGES)
def test_a_layer_that_blows_up_is_named(storage):
    branch = build(storage=storage, project_every=2)
    branch.name = "layer3"
    rows = torch.randn(8, branch.num_features, dtype=DOUBLE)
    train_all(branch, [rows, rows * 1e6])
    with pytest.raises(CollapseError, match=r"layer 'layer3' blew up: after 2 updates"):
        train(branch, rows * 1e6)


def test_a_penalty_that_is_looked_at_before_training_has_the_scale_of_its_batch():
    branch, (rows,) = build(scale="reference", warmup_updates=0), batches(1)
    with torch.no_grad():
        looked_at = branch.penalty(rows)
    assert not branch.waiting
    assert float(looked_at) == pytest.approx(branch.loss_weights.reconstruction, rel=1e-6), "of W = 0 all is outside"


def test_a_branch_that_was_built_without_memory_gets_some():
    with torch.device("meta"):
        branch = LowRankBranch(24, 4, config(scale="reference"), classes=3)
    branch.to_empty(device="cpu")
    twin = LowRankBranch(24, 4, config(scale="reference"), classes=3)
    for one in (branch, twin):
        train_all(one, (rows.float() for rows in batches(6)))
    assert_same_w_and_b(branch, twin)


def test_draws_are_made_on_the_processor_whatever_the_default_device_is():
    usual, (torch_default, twin) = list(batches(9, rows=80)), (build(update_rows=16), build(update_rows=16))
    train_all(twin, usual)
    torch.set_default_device("meta")
    try:
        for rows in usual:
            train(torch_default, rows)
        state = torch_default.state_dict()
    finally:
        torch.set_default_device(None)
    assert_same_w_and_b(torch_default, twin)
    assert {value.device.type for value in state.values()} == {"cpu"}


BROKEN = {
    "NaN in W": ({"basis": lambda t: t * torch.nan}, "W holds values that are NaN"),
    "NaN in b": ({"bias": lambda t: t * torch.nan}, "b or the reference norm is NaN"),
    "asymmetric core": ({"core": lambda t: t + torch.ones_like(t).triu(1)}, "core of W is not symmetric"),
    "foreign Gram matrix": ({"gram": lambda t: 2 * t}, "Gram matrix is not that of the factor"),
    "rank": ({"factored": lambda t: t + 5}, "do not fit the target rank 4"),
    "counters": ({"counters": lambda t: t[:1]}, "counters have other shapes"),
    "no counters": ({"factored": lambda t: t[:0]}, "While loading"),
}


@pytest.mark.parametrize(("changes", "message"), BROKEN.values(), ids=BROKEN)
def test_a_branch_that_makes_no_sense_is_not_loaded(changes, message):
    branch = train_all(build(), batches(5))
    state = {key: changes[key](value) if key in changes else value for key, value in branch.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        build().load_state_dict(state)
