"""Spectra of activations: against torch's SVD in float64, and the certificate of the streaming form."""

import copy
import pickle

import pytest
import torch

from timm_lowrank.core import spectrum
from timm_lowrank.core.spectrum import Sketch, effective_rank, singular_energies, variance_ratio

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


DOUBLE = torch.float64
RANKS = [1, 5, 10, 20, 50, 100, 500]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def reference(activations):
    """Squared singular values of the centred activations, the slow and plain way."""
    matrix = activations.double().flatten(1)
    return torch.linalg.svdvals(matrix - matrix.mean(0)).square()


def ratios(energies, ranks):
    return [float(energies[:rank].sum() / energies.sum()) for rank in ranks]


def decaying(n, m, decay, noise=0.0):
    """(n, m) float64 with singular values i^-decay, away from the origin, and some white noise."""
    generator, count = seeded(), min(n, m)
    left, right = (torch.linalg.qr(torch.randn(k, count, generator=generator, dtype=DOUBLE))[0] for k in (n, m))
    matrix = (left * torch.arange(1, count + 1, dtype=DOUBLE) ** -decay) @ right.T
    matrix += noise * torch.randn(n, m, generator=generator, dtype=DOUBLE)
    return matrix + 3.0 * torch.rand(m, generator=generator, dtype=DOUBLE)


def low_rank(n, m, rank):
    """(n, m) float64 of exactly `rank` after centring, with a mean."""
    generator = seeded()
    left = torch.randn(n, rank, generator=generator, dtype=DOUBLE)
    return left @ torch.randn(rank, m, generator=generator, dtype=DOUBLE) + 5.0


@pytest.fixture(scope="module")
def pixels(digits):
    """Real images of handwritten digits, (1797, 64)."""
    return digits[0].flatten(1).double()


@pytest.fixture(scope="module")
def features(pixels):
    """Random ReLU features of the digits, (1797, 300)."""
    return (pixels @ torch.randn(64, 300, generator=seeded(), dtype=DOUBLE) - 1.0).relu()


# exact


def test_by_hand():
    """Rows (1, 2), (3, 2), (2, 5), (2, -1) about (2, 2): energies 18 and 2."""
    rows = torch.tensor([[1.0, 2.0], [3.0, 2.0], [2.0, 5.0], [2.0, -1.0]])
    torch.testing.assert_close(singular_energies(rows), torch.tensor([18.0, 2.0], dtype=torch.float64))
    assert variance_ratio(rows, [1, 2]) == pytest.approx([0.9, 1.0])
    assert [effective_rank(rows, share) for share in (0.5, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]


def test_equal_directions_reach_their_share_in_spite_of_round_off():
    rows = torch.cat([torch.eye(10), -torch.eye(10)])
    assert [effective_rank(rows, share / 10) for share in range(1, 11)] == list(range(1, 11))


def check_exact(matrix):
    expected = reference(matrix)
    torch.testing.assert_close(singular_energies(matrix), expected, **CLOSE)
    assert variance_ratio(matrix, RANKS) == pytest.approx(ratios(expected, RANKS), abs=1e-12)
    share = expected.cumsum(0) / expected.sum()
    assert effective_rank(matrix, 0.9) == int((share < 0.9).sum()) + 1
    assert effective_rank(matrix) == int((share < 0.99).sum()) + 1


@pytest.mark.parametrize("rows", [None, 40, 2])
def test_exact_on_digits(pixels, features, rows):
    check_exact(pixels[:rows])
    check_exact(features[:rows])


@pytest.mark.parametrize("shape", [(30, 200), (200, 30), (64, 64), (2, 5), (5, 1)])
@pytest.mark.parametrize("decay", [0.5, 1.0, 3.0])
def test_exact_on_decaying_spectra(shape, decay):
    check_exact(decaying(*shape, decay))


@pytest.mark.parametrize("rows", [None, 50])
def test_blocks_bound_the_float64_work_and_do_not_change_the_result(features, monkeypatch, rows):
    """Of n x m values, float64 work only ever holds a block; the Gram matrix has the smaller side."""
    matrix, sizes, double = features[:rows].float(), [], torch.Tensor.double
    expected = singular_energies(matrix)
    monkeypatch.setattr(spectrum, "BLOCK_ELEMENTS", 1_000)
    monkeypatch.setattr(torch.Tensor, "double", lambda tensor: sizes.append(tensor.numel()) or double(tensor))
    torch.testing.assert_close(singular_energies(matrix), expected, **CLOSE)
    assert 0 < max(sizes) <= 1_000


def test_rank_deficient_activations_reach_exactly_one():
    for shape in ((40, 90), (90, 40)):
        matrix = low_rank(*shape, rank=5)
        assert variance_ratio(matrix, [6, 40, 10_000]) == [1.0, 1.0, 1.0]
        assert effective_rank(matrix, 1.0) == 5
        assert (singular_energies(matrix) > 0).sum() == 5


def test_higher_dimensions_and_views_are_flattened():
    maps = decaying(40, 96, 1.0).reshape(40, 6, 4, 4)
    expected = singular_energies(maps.flatten(1))
    views = [maps, maps.contiguous(memory_format=torch.channels_last), maps.transpose(2, 3)]
    for view in [*views, maps.repeat_interleave(2, 0)[::2], maps.clone().requires_grad_()]:
        torch.testing.assert_close(singular_energies(view), expected, **CLOSE)
        torch.testing.assert_close(Sketch.of([view], 96).energies()[:39], expected[:39], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_input_is_read_as_it_is(features, dtype):
    """No arithmetic takes place in the input's own dtype: the result is that of its exact values."""
    features = (features * 30).to(dtype)
    for part in (features, features[:60]):
        torch.testing.assert_close(singular_energies(part), reference(part), **CLOSE)
    lower = torch.tensor(variance_ratio(features.split(100), [1, 10, 100], sketch_size=300))
    exact = torch.tensor(ratios(reference(features), [1, 10, 100]))
    torch.testing.assert_close(lower, exact, rtol=0, atol=1e-3)


# streaming


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1797])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("size", [12, 40, 100])
def test_certificate_on_digits(features, batch_size, dtype, size):
    features = features.to(dtype)
    summary = Sketch.of(features.split(batch_size), size)
    assert summary.dtype == dtype
    check_certificate(summary, features)
    assert summary.error_bound <= summary.total / size


def check_certificate(summary, matrix):
    expected = reference(matrix)
    energies, round_off = summary.energies(), 1e-13 * float(expected.sum())
    assert summary.count == len(matrix)
    assert summary.total == pytest.approx(float(expected.sum()), rel=1e-11)
    padded = torch.zeros_like(expected)
    padded[: len(energies)] = energies
    assert (padded <= expected + round_off).all()
    assert (expected <= padded + summary.error_bound + round_off).all()
    assert (energies[1:] <= energies[:-1]).all()
    ranks = list(range(1, len(expected) + 5))
    for exact, (lower, upper) in zip(ratios(expected, ranks), summary.variance_ratio(ranks), strict=True):
        assert 0.0 <= lower <= exact + 1e-12
        assert exact - 1e-12 <= upper <= 1.0


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(400, 150), (150, 400)])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_certificate_on_decaying_spectra(shape, decay, dtype):
    matrix = decaying(*shape, decay, noise=1e-3).to(dtype)
    summary = Sketch.of(matrix.split([1, 2, 97, 10, shape[0] - 110]), 20)
    check_certificate(summary, matrix)
    assert summary.error_bound > 0


def test_certificate_is_useful(features):
    """At four times the rank of interest the interval is narrow on real features."""
    bounds = Sketch.of(features.split(50), 80).variance_ratio([1, 5, 10, 20])
    assert all(upper - lower < 0.05 for lower, upper in bounds)
    assert bounds[2][0] > 0.6


@pytest.mark.parametrize("batch_size", [1, 3, 50, 500])
def test_exact_while_the_rank_is_at_most_the_size(batch_size):
    matrix = low_rank(500, 120, rank=15)
    expected = reference(matrix)
    for dtype, tolerance in ((DOUBLE, 1e-11), (torch.float32, 2e-5)):
        summary, total = Sketch.of(matrix.to(dtype).split(batch_size), 15), float(expected.sum())
        assert summary.error_bound <= tolerance * total
        torch.testing.assert_close(summary.energies()[:15], expected[:15], rtol=0, atol=tolerance * total)


def test_exact_while_the_rows_fit_into_the_buffer():
    matrix = decaying(60, 200, 0.3)
    summary = Sketch.of(matrix.split(9), 40)
    assert summary.error_bound <= 1e-12 * summary.total
    torch.testing.assert_close(summary.energies(), reference(matrix)[:59], **CLOSE)
    rounded = Sketch(200, 40)
    rounded.update(matrix)
    check_certificate(rounded, matrix)  # whose bound holds what rounding the rows to float32 has changed


def test_no_cancellation_far_from_the_origin():
    """E[x^2] - mean^2 would lose every digit of this spread."""
    matrix = 1e6 + 1e-4 * decaying(300, 40, 1.0)
    expected = reference(matrix)
    torch.testing.assert_close(singular_energies(matrix)[:5], expected[:5], rtol=1e-3, atol=0)
    summary = Sketch.of(matrix.split(1), 40)
    torch.testing.assert_close(summary.energies()[:5], expected[:5], rtol=1e-3, atol=0)
    assert summary.total == pytest.approx(float(expected.sum()), rel=1e-3)


def test_streams_return_the_certified_side(features):
    exact, sketch = variance_ratio(features, [1, 10, 50]), Sketch.of(features.split(64), 128)
    streamed = variance_ratio(iter(features.split(64)), [1, 10, 50])
    assert streamed == [lower for lower, _ in sketch.variance_ratio([1, 10, 50])]
    assert all(low <= high + 1e-12 for low, high in zip(streamed, exact, strict=True))
    lower, upper = sketch.effective_rank(0.9)
    assert lower <= effective_rank(features, 0.9) <= upper == effective_rank(features.split(64), 0.9, sketch_size=128)
    assert effective_rank(features.split(64), 0.9) == effective_rank(features, 0.9)  # 512 exceeds the width
    assert torch.equal(singular_energies(features.split(64), sketch_size=128), sketch.energies())


def test_size_follows_the_largest_rank(features, monkeypatch):
    sizes = []
    original = Sketch.of
    monkeypatch.setattr(Sketch, "of", lambda data, size: sizes.append(size) or original(data, size))
    for arguments in ({"ranks": [3]}, {"ranks": [10, 200]}, {"ranks": [10], "sketch_size": 33}):
        variance_ratio([features[:100]], **arguments)
    assert sizes == [128, 400, 33]


def test_stream_whose_sketch_is_too_small(features):
    with pytest.raises(ValueError, match=r"certifies no more than 0\.\d+ of the variance.*enlarge the sketch"):
        effective_rank(features.split(100), 0.99, sketch_size=10)


def test_ranks_beyond_what_the_rows_can_have():
    rows = decaying(10, 50, 0.5)
    assert variance_ratio([rows], [9, 100]) == [1.0, 1.0]
    assert Sketch.of([rows], 4).variance_ratio([9]) == [(1.0, 1.0)]
    assert Sketch.of([rows], 4).variance_ratio([8])[0][0] < 1.0


def test_the_sketch_never_makes_a_matrix_of_the_features(monkeypatch):
    matrix = decaying(90, 3_000, 1.0).float()
    shapes = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: shapes.append(tuple(gram.shape)) or eigh(gram))
    summary = Sketch(3_000, 16)
    summary.update(matrix)
    assert set(shapes) == {(32, 32)}
    held = [value.numel() for value in vars(summary).values() if isinstance(value, torch.Tensor)]
    assert sum(held) == 32 * 3_000 + 3_000


def test_empty_batches_between_others_do_nothing():
    rows = decaying(20, 6, 0.5)
    expected = Sketch.of([rows]).energies()
    torch.testing.assert_close(Sketch.of([rows[:0], rows[:3], rows[:0], rows[3:]]).energies(), expected)


def test_mixed_dtypes_and_copies():
    rows = decaying(40, 10, 0.5).float()
    summary = Sketch.of([rows[:20]], 5)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(summary)))
    summary.update(rows[20:])
    twin.update(rows[20:].double())
    assert torch.equal(summary.energies(), twin.energies())


def test_input_is_not_changed_and_global_state_is_left_alone(random_stream):
    rows = decaying(300, 30, 0.5)
    before = rows.clone()
    singular_energies(rows)
    variance_ratio(rows.split(7), [2], sketch_size=4)
    assert torch.equal(rows, before)
    assert random_stream()


# errors

ROWS = torch.tensor([[1.0, 2.0], [3.0, 2.0], [2.0, 5.0]])


FUNCTIONS = [singular_energies, effective_rank, lambda activations: variance_ratio(activations, [1])]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("activations", "error", "message"),
    [
        (torch.empty(0, 4), ValueError, "empty: no rows"),
        (torch.empty(4, 0), ValueError, "m >= 1 features"),
        (torch.ones(4), ValueError, r"shape \(n, m\)"),
        (torch.ones(1, 4), ValueError, "one row has no variance"),
        (torch.full((5, 4), 0.1), ValueError, "no variance: all rows are equal"),
        (torch.zeros(5, 4), ValueError, "no variance: all rows are equal"),
        (ROWS / 0.0, ValueError, "NaN or infinite"),
        (torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), ValueError, "NaN or infinite"),
        (ROWS.double() * 1e200, ValueError, "divide them by a constant"),
        (torch.ones(3, 4, dtype=torch.int64), TypeError, "floating-point dtype, got torch.int64"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_activations_without_a_spectrum(function, activations, error, message, streaming):
    with pytest.raises(error, match=message):
        function([activations] if streaming else activations)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("stream", "error", "message"),
    [
        ([], ValueError, "there was no batch"),
        ([ROWS, ROWS[:, :1]], ValueError, "batch 1: the batch has 1 features, the sketch is of 2"),
        ([ROWS, ROWS * float("inf")], ValueError, "batch 1: activations hold NaN or infinite"),
        ([(ROWS, 1)], TypeError, "batch 0: activations must be tensors, got tuple"),
        ([torch.full((1, 3), 0.1)] * 9, ValueError, "all rows are equal"),
    ],
)
def test_streams_without_a_spectrum(function, stream, error, message):
    with pytest.raises(error, match=message):
        function(iter(stream))


@pytest.mark.parametrize("activations", [ROWS, [ROWS]])
@pytest.mark.parametrize("ranks", [[], [0], [1, -2], [1.5], [True], ["2"], 0])
def test_bad_ranks(activations, ranks):
    with pytest.raises(ValueError, match="ranks"):
        variance_ratio(activations, ranks)


@pytest.mark.parametrize("activations", [ROWS, [ROWS]])
@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_bad_share(activations, share):
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
        effective_rank(activations, share)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "at least 1"), ((4, 0), "at least 1"), ((4, 2, torch.bfloat16), "dtype must be"), ((4,), "no rows")],
)
def test_bad_sketches(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sketch(*arguments).energies()


def test_a_refused_batch_leaves_the_sketch_as_it_was():
    summary = Sketch.of([ROWS], 2)
    expected = summary.energies()
    for bad in (ROWS * float("nan"), ROWS[:, :1], ROWS.double() * 1e35):
        with pytest.raises(ValueError, match=r"finite|width|features|divide"):
            summary.update(bad)
    assert summary.count == 3
    assert torch.equal(summary.energies(), expected)
