"""Rank projections: by hand, the factored twins against the dense ones, and both against the optimum."""

import pytest
import torch

from timm_lowrank import CollapseError, ProjectionWarning
from timm_lowrank.core import projection

DOUBLE = torch.float64
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=seeded(seed))


def symmetric(width, eigenvalues, seed=0):
    """A symmetric matrix (width, width) with the given nonzero eigenvalues, and its eigenvectors (width, count)."""
    vectors = torch.linalg.qr(random(width, len(eigenvalues), seed=seed))[0]
    return (vectors * torch.tensor(eigenvalues, dtype=DOUBLE)) @ vectors.T, vectors


def decaying(count, power=1.0):
    return [(i + 1) ** -power for i in range(count)]


def best(matrix, rank):
    """The optimum, by the singular value decomposition."""
    u, s, v = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def rank_of(matrix):
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-9))


def dense(result, basis):
    """The (m, m) matrix of a `CoreProjection` in the coordinates of `basis` (k, m)."""
    q = basis.T @ result.vectors
    return (q * result.eigenvalues) @ q.T


def as_core(width, rows, seed=0, positive=True):
    """A row basis B (k, m), a core M (k, k), and W = B^T M B."""
    basis, root = random(rows, width, seed=seed), random(rows, rows, seed=seed + 1)
    core = root @ root.T / rows if positive else (root + root.T) / 2
    return basis, core, basis.T @ core @ basis


METHODS = ("exact", "nystrom", "subspace")


def twins(method, width, rank, columns=None, runs=2, oversampling=3):
    """A method of W (m, m), and of M and B with W = B^T M B, both with the same random choices."""
    samples = projection.nystrom_samples(width, rank, columns, runs, seeded(3))
    start = projection.widen(None, width, rank, oversampling, seeded(3))
    return {
        "exact": (lambda w: projection.exact(w, rank), lambda m, b: projection.exact_factored(m, b @ b.T, rank)),
        "nystrom": (
            lambda w: projection.nystrom(w, rank, columns, runs, seeded(3)),
            lambda m, b: projection.nystrom_factored(m, b @ b.T, rank, [b[:, sample] for sample in samples]),
        ),
        "subspace": (
            lambda w: projection.subspace(w, rank, None, oversampling, seeded(3)),
            lambda m, b: projection.subspace_factored(m, b @ b.T, rank, b @ start),
        ),
    }[method]


# by hand


@pytest.mark.parametrize(("rank", "kept"), [(1, [0, -3, 0]), (2, [0, -3, 2]), (3, [1, -3, 2])])
def test_exact_keeps_the_largest_magnitude_not_the_largest_value(rank, kept):
    matrix, expected = (torch.diag(torch.tensor(values, dtype=DOUBLE)) for values in ([1, -3, 2], kept))
    assert torch.allclose(projection.exact(matrix, rank), expected)


def test_exact_of_two_by_two():
    """[[2, 1], [1, 2]] has the eigenvalue 3 on (1, 1) and 1 on (1, -1)."""
    matrix = torch.tensor([[2.0, 1], [1, 2]], dtype=DOUBLE)
    assert torch.allclose(projection.exact(matrix, 1), torch.full((2, 2), 1.5, dtype=DOUBLE))


def test_nystrom_of_one_column():
    """Of [[2, 1], [1, 2]] with one column: C Z^+ C^T is [[2, 1], [1, 1/2]] or [[1/2, 1], [1, 2]]."""
    matrix = torch.tensor([[2.0, 1], [1, 2]], dtype=DOUBLE)
    possible = {0: [[2.0, 1], [1, 0.5]], 1: [[0.5, 1], [1, 2.0]]}
    seen = set()
    for seed in range(20):
        (sample,) = projection.nystrom_samples(2, 1, 1, 1, seeded(seed))
        result = projection.nystrom(matrix, 1, columns=1, runs=1, generator=seeded(seed))
        assert torch.allclose(result, torch.tensor(possible[int(sample)], dtype=DOUBLE))
        seen.add(int(sample))
    assert seen == {0, 1}


def test_subspace_of_three_by_three():
    """From the start e1 + e2, W = diag(4, 2, 1) sees (4, 2, 0) only: the Ritz value there is (4*16 + 2*4) / 20."""
    matrix = torch.diag(torch.tensor([4.0, 2, 1], dtype=DOUBLE))
    start = torch.tensor([[1.0], [1], [0]], dtype=DOUBLE)
    result = projection.subspace(matrix, 1, start, oversampling=0)
    direction = torch.tensor([4.0, 2, 0], dtype=DOUBLE)
    assert torch.allclose(result, 3.6 * torch.outer(direction, direction) / 20)


# promises about every result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("width", "rank"), [(12, 3), (12, 12), (5, 1)])
def test_results_are_symmetric_and_of_the_rank(method, width, rank):
    matrix, _ = symmetric(width, decaying(width, 0.5))
    result = twins(method, width, rank)[0](matrix)
    assert torch.allclose(result, result.T, **CLOSE)
    assert rank_of(result) <= rank
    assert float(torch.linalg.eigvalsh(result)[-1]) > 0.3, "something of the largest eigenvalue, which is 1, is kept"


@pytest.mark.parametrize("method", METHODS)
def test_zero_stays_zero(method):
    slow, fast = twins(method, 6, 2)
    assert torch.equal(slow(torch.zeros(6, 6, dtype=DOUBLE)), torch.zeros(6, 6, dtype=DOUBLE))
    result = fast(torch.zeros(4, 4, dtype=DOUBLE), random(4, 6))
    assert (result.vectors.shape, result.eigenvalues.shape) == ((4, 0), (0,))


def test_random_choices_come_from_the_generator_alone(random_stream):
    matrix, _ = symmetric(10, decaying(10))
    for method in (projection.nystrom, projection.subspace):
        first, again, other = (method(matrix, 2, generator=seeded(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert random_stream()


def test_nystrom_samples():
    samples = projection.nystrom_samples(10, 3, None, 5, seeded())
    assert len(samples) == 5
    for sample in samples:
        assert sample.shape == (6,), "l = 2 r"
        assert sample.unique().numel() == 6, "without replacement"
    assert len({tuple(sample.tolist()) for sample in samples}) > 1
    assert [len(s) for s in projection.nystrom_samples(4, 3, None, 2, seeded())] == [4, 4], "no more than there are"
    assert [len(s) for s in projection.nystrom_samples(10, 3, 9, 1, seeded())] == [9]


# the factored twins


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_exact_twins(rank, positive):
    basis, core, matrix = as_core(30, 9, positive=positive)
    result = projection.exact_factored(core, basis @ basis.T, rank)
    assert torch.allclose(dense(result, basis), projection.exact(matrix, rank), **CLOSE)
    assert torch.allclose(dense(result, basis), best(matrix, rank), **CLOSE)


@pytest.mark.parametrize("runs", [1, 4])
@pytest.mark.parametrize("columns", [None, 9, 4])
def test_nystrom_twins(runs, columns):
    basis, core, matrix = as_core(30, 9)
    slow, fast = twins("nystrom", 30, 4, columns, runs)
    assert torch.allclose(dense(fast(core, basis), basis), slow(matrix), **CLOSE)


@pytest.mark.parametrize("oversampling", [0, 3])
@pytest.mark.parametrize("warm", [True, False])
def test_subspace_twins(warm, oversampling):
    basis, core, matrix = as_core(30, 9, positive=False)
    start = random(30, 4, seed=7) if warm else None
    wide = projection.widen(start, 30, 4, oversampling, seeded(3))
    result = projection.subspace_factored(core, basis @ basis.T, 4, basis @ wide)
    slow = projection.subspace(matrix, 4, start, oversampling, seeded(3))
    assert torch.allclose(dense(result, basis), slow, **CLOSE)


def test_results_are_orthonormal_in_the_basis():
    basis, core, _ = as_core(30, 9)
    result = projection.exact_factored(core, basis @ basis.T, 5)
    q = basis.T @ result.vectors
    assert torch.allclose(q.T @ q, torch.eye(5, dtype=DOUBLE), **CLOSE)
    assert (result.eigenvalues.abs().diff() <= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_dependent_rows_do_not_matter(method):
    """Rows that were seen twice make the Gram matrix singular, and so does a row of zeros."""
    basis, core, _ = as_core(30, 9)
    basis = torch.cat([basis, basis[:4], torch.zeros(1, 30, dtype=DOUBLE)])
    root = torch.cat([torch.linalg.cholesky(core), random(5, 9)])
    core = root @ root.T
    matrix = basis.T @ core @ basis
    slow, fast = twins(method, 30, 4, columns=12)
    assert torch.allclose(dense(fast(core, basis), basis), slow(matrix), rtol=1e-7, atol=1e-7 * float(matrix.norm()))


# errors relative to the optimum


def relative_error(result, matrix, rank):
    return float((matrix - result).norm() / (matrix - best(matrix, rank)).norm())


def test_subspace_with_a_warm_start_is_near_the_optimum():
    """W moves little between two projections: one step from the old eigenvectors must reach 1.01 of the best error."""
    matrix, vectors = symmetric(200, decaying(200))
    moved = matrix + 0.05 * symmetric(200, decaying(200), seed=5)[0]
    result = projection.subspace(moved, 20, vectors[:, :20], generator=seeded())
    assert 1 - 1e-9 <= relative_error(result, moved, 20) < 1.01
    cold = projection.subspace(moved, 20, None, oversampling=0, generator=seeded())
    assert relative_error(cold, moved, 20) > 1.05, "the start is what makes it good"


def test_subspace_finds_a_direction_orthogonal_to_the_start_through_random_columns():
    eigenvalues = [10.0, 3.0, 2.0, 1.0]
    matrix, vectors = symmetric(40, eigenvalues)
    start = vectors[:, 1:3]  # exactly orthogonal to the largest direction, and invariant
    blind = projection.subspace(matrix, 2, start, oversampling=0)
    seeing = projection.subspace(matrix, 2, start, oversampling=2, generator=seeded())
    largest = vectors[:, 0]
    assert abs(float(largest @ blind @ largest)) < 1e-12
    assert float(largest @ seeing @ largest) == pytest.approx(10.0, rel=1e-9)
    assert relative_error(seeing, matrix, 2) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("runs", [1, 3])
def test_nystrom_is_exact_for_positive_matrices_of_the_rank(runs):
    matrix, _ = symmetric(40, [5.0, 3.0, 1.0])
    assert torch.allclose(projection.nystrom(matrix, 3, runs=runs, generator=seeded()), matrix, **CLOSE)
    assert torch.allclose(projection.nystrom(matrix, 6, runs=runs, generator=seeded()), matrix, **CLOSE)


def test_the_ensemble_has_a_higher_rank_until_it_is_truncated():
    matrix, _ = symmetric(60, decaying(60))
    loose = projection.nystrom(matrix, 4, runs=4, generator=seeded(), truncate=False)
    tight = projection.nystrom(matrix, 4, runs=4, generator=seeded())
    assert 4 < rank_of(loose) <= 16
    assert rank_of(tight) == 4
    assert torch.allclose(tight, best(loose, 4), **CLOSE)


def test_more_runs_of_nystrom_are_better_on_average():
    matrix, _ = symmetric(60, decaying(60, 2))

    def error(runs):
        options = {"runs": runs, "truncate": False}
        results = [projection.nystrom(matrix, 4, generator=seeded(seed), **options) for seed in range(12)]
        return sum(relative_error(result, matrix, 4) for result in results)

    assert error(8) < error(1)


# the ladder for factorisations that fail


@pytest.fixture
def failing_eigh(monkeypatch):
    """A function that makes the next `times` eigendecompositions fail, and the list of the matrices that were tried."""
    tried, real, left = [], torch.linalg.eigh, [0]

    def eigh(matrix):
        tried.append(matrix)
        if left[0] > 0:
            left[0] -= 1
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return real(matrix)

    def fail(times):
        left[0] = times
        return tried

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return fail


def test_a_failure_is_smoothed_by_a_named_amount_which_is_taken_off_again(failing_eigh):
    matrix, _ = symmetric(10, decaying(10))
    expected = best(matrix, 3)
    tried = failing_eigh(0)
    projection.exact(matrix, 3)
    assert len(tried) == 1
    assert torch.equal(tried.pop(), matrix), "no smoothing without need"
    failing_eigh(1)
    amount = 1e-3 * float(matrix.diagonal().abs().mean())
    with pytest.warns(ProjectionWarning, match=f"{amount:.1e} I"):
        result = projection.exact(matrix, 3)
    assert len(tried) == 2
    assert torch.allclose(tried[1] - matrix, amount * torch.eye(10, dtype=DOUBLE), **CLOSE)
    assert torch.allclose(result, expected, **CLOSE)


def test_smoothing_grows_and_ends_in_an_error(failing_eigh):
    matrix, _ = symmetric(10, decaying(10))
    tried = failing_eigh(99)
    mean = float(matrix.diagonal().abs().mean())
    with (
        pytest.warns(ProjectionWarning) as warned,
        pytest.raises(CollapseError, match=rf"failed 3 times.*{mean / 100:.1e} I"),
    ):
        projection.exact(matrix, 3)
    for warning, amount in zip(warned, (1e-3, 1e-2), strict=True):
        assert f"{amount * mean:.1e} I" in str(warning.message)
    added = [float((m - matrix).diagonal().mean()) for m in tried]
    assert added == pytest.approx([0, mean / 1000, mean / 100])


@pytest.mark.parametrize("method", [projection.exact, projection.nystrom])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(method, value):
    matrix, _ = symmetric(6, decaying(6))
    matrix[:] = value
    with pytest.raises(CollapseError, match="NaN or infinite"):
        method(matrix, 2)
