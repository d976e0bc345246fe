"""Spectra of activations: against torch's SVD in float64, and the certificate of the streaming form."""

import copy
import pickle

import pytest
import torch

from timm_lowrank.core import spectrum
from timm_lowrank.core.spectrum import Sketch, effective_rank, singular_energies, variance_ratio

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def reference(activations):
    """Squared singular values of the centred activations, the slow and plain way."""
    matrix = activations.double().flatten(1)
    return torch.linalg.svdvals(matrix - matrix.mean(0)).square()


def ratios(energies, ranks):
    return [float(energies[:rank].sum() / energies.sum()) for rank in ranks]


def decaying(n, m, decay, seed=0, mean=3.0, noise=0.0):
    """(n, m) float64 with singular values i^-decay, away from the origin, and some white noise."""
    generator = torch.Generator().manual_seed(seed)
    count = min(n, m)
    left = torch.linalg.qr(torch.randn(n, count, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(m, count, generator=generator, dtype=torch.float64))[0]
    values = torch.arange(1, count + 1, dtype=torch.float64) ** -decay
    matrix = (left * values) @ right.T
    matrix += noise * torch.randn(n, m, generator=generator, dtype=torch.float64)
    return matrix + mean * torch.rand(m, generator=generator, dtype=torch.float64)


def low_rank(n, m, rank, seed=0):
    """(n, m) float64 of exactly `rank` after centring, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, m, generator=generator, dtype=torch.float64)
    return left @ right + 5.0


@pytest.fixture(scope="module")
def digits():
    """1,797 real images of handwritten digits, (1797, 64), and random ReLU features of them, (1797, 300)."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels = torch.from_numpy(datasets.load_digits().data) / 16.0
    weight = torch.randn(64, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return pixels, (pixels @ weight - 1.0).relu()


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


@pytest.mark.parametrize("part", [slice(None), slice(0, 40), slice(0, 2)])
def test_exact_on_digits(digits, part):
    for full in digits:
        features = full[part]
        expected = reference(features)
        torch.testing.assert_close(singular_energies(features), expected, **CLOSE)
        ranks = [1, 5, 10, 20, 50, 100, 500]
        assert variance_ratio(features, ranks) == pytest.approx(ratios(expected, ranks), abs=1e-12)
        share = expected.cumsum(0) / expected.sum()
        assert effective_rank(features, 0.9) == int((share < 0.9).sum()) + 1
        assert effective_rank(features) == int((share < 0.99).sum()) + 1


@pytest.mark.parametrize("shape", [(30, 200), (200, 30), (64, 64), (2, 5), (5, 1)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_exact_on_decaying_spectra(shape, decay):
    matrix = decaying(*shape, decay)
    expected = reference(matrix)
    torch.testing.assert_close(singular_energies(matrix), expected, **CLOSE)
    assert variance_ratio(matrix, [1, 3]) == pytest.approx(ratios(expected, [1, 3]), abs=1e-12)


def test_blocks_do_not_change_the_result(digits, monkeypatch):
    expected = [singular_energies(features) for features in (digits[1], digits[1][:50])]
    monkeypatch.setattr(spectrum, "BLOCK_ELEMENTS", 1_000)
    for features, energies in zip((digits[1], digits[1][:50]), expected, strict=True):
        torch.testing.assert_close(singular_energies(features), energies, **CLOSE)


def test_no_float64_copy_of_the_whole_matrix(digits, monkeypatch):
    """Of n x m values, float64 work only ever holds a block; the Gram matrix has the smaller side."""
    monkeypatch.setattr(spectrum, "BLOCK_ELEMENTS", 1_000)
    sizes = []
    double = torch.Tensor.double

    def spy(tensor):
        sizes.append(tensor.numel())
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "double", spy)
    singular_energies(digits[1].float())
    singular_energies(digits[1][:50].float())
    assert 0 < max(sizes) <= 1_000


def test_rank_deficient_activations_reach_exactly_one():
    for shape in ((40, 90), (90, 40)):
        matrix = low_rank(*shape, rank=5)
        assert variance_ratio(matrix, [5, 6, 40, 10_000])[1:] == [1.0, 1.0, 1.0]
        assert effective_rank(matrix, 1.0) == 5
        assert (singular_energies(matrix) > 0).sum() == 5


def test_shift_scale_and_rotation_do_not_matter():
    matrix = decaying(50, 20, 1.0)
    rotation = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1)).double())[0]
    expected = variance_ratio(matrix, [1, 4])
    assert variance_ratio(1e4 + 1e-3 * matrix @ rotation, [1, 4]) == pytest.approx(expected, abs=1e-6)


def test_higher_dimensions_and_views_are_flattened():
    maps = decaying(40, 96, 1.0).reshape(40, 6, 4, 4)
    expected = singular_energies(maps.flatten(1))
    views = [maps, maps.contiguous(memory_format=torch.channels_last), maps.transpose(2, 3)]
    views += [
        maps.repeat_interleave(2, 0)[::2],
        maps.expand(1, -1, -1, -1, -1)[0],
        maps.clone().requires_grad_(),
    ]
    for view in views:
        torch.testing.assert_close(singular_energies(view), expected, **CLOSE)
        torch.testing.assert_close(Sketch.of([view], 96).energies()[:39], expected[:39], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_input_is_read_as_it_is(digits, dtype):
    """No arithmetic takes place in the input's own dtype: the result is that of its exact values."""
    features = (digits[1] * 30).to(dtype)
    for part in (features, features[:60]):
        torch.testing.assert_close(singular_energies(part), reference(part), **CLOSE)
    lower = torch.tensor(variance_ratio(features.split(100), [1, 10, 100], sketch_size=300))
    exact = torch.tensor(ratios(reference(features), [1, 10, 100]))
    torch.testing.assert_close(lower, exact, rtol=0, atol=1e-3)


# streaming


def batches(matrix, size):
    return (matrix[start : start + size] for start in range(0, len(matrix), size))


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1797])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [12, 40, 100])
def test_certificate_on_digits(digits, batch_size, dtype, size):
    features = digits[1].to(dtype)
    expected = reference(features)
    summary = Sketch.of(batches(features, batch_size), size)
    assert summary.dtype == dtype
    check_certificate(summary, features)
    assert summary.error_bound <= float(expected.sum()) / size


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certificate_on_decaying_spectra(shape, decay, dtype):
    matrix = decaying(*shape, decay, noise=1e-3).to(dtype)
    summary = Sketch.of(matrix.split([1, 2, 97, 10, shape[0] - 110]), 20)
    check_certificate(summary, matrix)
    assert summary.error_bound > 0


def test_certificate_is_useful(digits):
    """At four times the rank of interest the interval is narrow on real features."""
    bounds = Sketch.of(digits[1].split(50), 80).variance_ratio([1, 5, 10, 20])
    assert all(upper - lower < 0.05 for lower, upper in bounds)
    assert bounds[2][0] > 0.6


@pytest.mark.parametrize("batch_size", [1, 3, 50, 500])
def test_exact_while_the_rank_is_at_most_the_size(batch_size):
    matrix = low_rank(500, 120, rank=15)
    expected = reference(matrix)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        summary, total = Sketch.of(batches(matrix.to(dtype), batch_size), 15), float(expected.sum())
        assert summary.error_bound <= tolerance * total
        torch.testing.assert_close(summary.energies()[:15], expected[:15], rtol=0, atol=tolerance * total)


def test_exact_while_the_rows_fit_into_the_buffer():
    matrix = decaying(60, 200, 0.3)
    summary = Sketch.of(matrix.split(9), 40)
    assert summary.error_bound <= 1e-12 * summary.total
    torch.testing.assert_close(summary.energies(), reference(matrix)[:59], **CLOSE)


def test_no_cancellation_far_from_the_origin():
    """E[x^2] - mean^2 would lose every digit of this spread."""
    matrix = 1e6 + 1e-4 * decaying(300, 40, 1.0)
    expected = reference(matrix)
    summary = Sketch.of(batches(matrix, 1), 40)
    torch.testing.assert_close(summary.energies()[:5], expected[:5], rtol=1e-3, atol=0)
    assert summary.total == pytest.approx(float(expected.sum()), rel=1e-3)


def test_streams_return_the_certified_side(digits):
    features = digits[1]
    exact = variance_ratio(features, [1, 10, 50])
    streamed = variance_ratio(batches(features, 64), [1, 10, 50])
    summary = Sketch(300, 128, dtype=torch.float64)
    summary.update(features)
    assert streamed == pytest.approx([lower for lower, _ in summary.variance_ratio([1, 10, 50])], abs=0.01)
    assert all(low <= high + 1e-12 for low, high in zip(streamed, exact, strict=True))
    lower, upper = Sketch.of(features.split(64), 150).effective_rank(0.9)
    assert lower <= effective_rank(features, 0.9) <= upper == effective_rank(features.split(64), 0.9, sketch_size=150)
    assert effective_rank(features.split(64), 0.9) == effective_rank(features, 0.9)  # 512 exceeds the width
    torch.testing.assert_close(
        singular_energies(features.split(64), sketch_size=150),
        Sketch.of(features.split(64), 150).energies(),
    )


def test_size_follows_the_largest_rank(digits, monkeypatch):
    sizes = []
    original = Sketch.of
    monkeypatch.setattr(Sketch, "of", lambda data, size: sizes.append(size) or original(data, size))
    for arguments in ({"ranks": [3]}, {"ranks": [10, 200]}, {"ranks": [10], "sketch_size": 33}):
        variance_ratio([digits[1][:100]], **arguments)
    assert sizes == [128, 400, 33]


def test_stream_whose_sketch_is_too_small(digits):
    with pytest.raises(ValueError, match=r"certifies no more than 0\.\d+ of the variance.*enlarge the sketch"):
        effective_rank(digits[1].split(100), 0.99, sketch_size=10)


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
    summary = Sketch(10, 5)
    summary.update(rows[:20])
    twin = pickle.loads(pickle.dumps(copy.deepcopy(summary)))
    summary.update(rows[20:])
    twin.update(rows[20:].double())
    assert torch.equal(summary.energies(), twin.energies())


def test_input_is_not_changed_and_global_state_is_left_alone():
    rows = decaying(300, 30, 0.5)
    before, state = rows.clone(), torch.get_rng_state()
    singular_energies(rows)
    variance_ratio(batches(rows, 7), [2], sketch_size=4)
    assert torch.equal(rows, before)
    assert torch.equal(state, torch.get_rng_state())


# errors

ROWS = torch.tensor([[1.0, 2.0], [3.0, 2.0], [2.0, 5.0]])


@pytest.mark.parametrize("function", [singular_energies, effective_rank, lambda a: variance_ratio(a, [1])])
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


@pytest.mark.parametrize("function", [singular_energies, effective_rank, lambda a: variance_ratio(a, [1])])
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


def test_bad_sketches():
    with pytest.raises(ValueError, match="at least 1"):
        Sketch(0)
    with pytest.raises(ValueError, match="at least 1"):
        Sketch(4, size=0)
    with pytest.raises(ValueError, match="dtype must be"):
        Sketch(4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no rows"):
        Sketch(4).energies()


def test_a_refused_batch_leaves_the_sketch_as_it_was():
    summary = Sketch(2, 2)
    summary.update(ROWS)
    expected = summary.energies()
    for bad in (ROWS * float("nan"), ROWS[:, :1], ROWS.double() * 1e35):
        with pytest.raises(ValueError, match=r"finite|width|features|divide"):
            summary.update(bad)
    assert summary.count == 3
    assert torch.equal(summary.energies(), expected)
