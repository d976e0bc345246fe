"""Error and time of the three rank projections, on a W that data with a decaying spectrum has built.

    python benchmarks/projection.py

Error is the Frobenius distance from W over that of the best rank-r approximation, so 1 is perfect. The best one
is had exactly from the factored form, also at 16,384 features, where an eigendecomposition of W would not end.
Time is that of a whole projection in factored form, the new basis included.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable

import torch
from measure import interleaved, print_table, write_json
from torch import Tensor

from timm_lowrank import LowRankBranch, LowRankConfig
from timm_lowrank.core.factored import FactoredWeight
from timm_lowrank.core.projection import exact_factored

BATCH = 128
METHODS: dict[str, dict[str, object]] = {
    "exact": {"projection": "exact"},
    "subspace": {"projection": "subspace"},
    "nystrom, 1 run": {"projection": "nystrom", "nystrom_runs": 1},
    "nystrom, 4 runs": {"projection": "nystrom", "nystrom_runs": 4},
}


def trained_branch(width: int, rank: int, device: torch.device) -> LowRankBranch:
    """A branch 39 updates into its training: the next one would bring the fourth projection."""
    generator = torch.Generator(device).manual_seed(0)
    scales = torch.arange(1, width + 1, device=device) ** -0.5  # singular values of natural image features decay so
    mixing = torch.randn(min(width, 2048), width, device=device, generator=generator) * scales[: min(width, 2048), None]
    branch = LowRankBranch(width, rank, LowRankConfig(branches={"layer": rank}), device)
    for _ in range(39):
        codes = torch.randn(BATCH, mixing.shape[0], device=device, generator=generator)
        branch.penalty((codes @ mixing).requires_grad_())
        branch.update()
    return branch


def distance(weight: FactoredWeight, basis: Tensor, core: Tensor) -> float:
    """||W - basis^T core basis||_F without an m x m matrix."""
    rows = torch.cat([weight.basis, basis]).double()
    size = weight.core.shape[0]
    difference = torch.zeros(rows.shape[0], rows.shape[0], dtype=torch.float64, device=rows.device)
    difference[:size, :size], difference[size:, size:] = weight.core.double(), -core.double()
    product = difference @ (rows @ rows.T)
    return float((product * product.T).sum().clamp_min(0).sqrt())


def project_copy(weight: FactoredWeight, options: dict[str, object]) -> Callable[[], FactoredWeight]:
    def run() -> FactoredWeight:
        config = dataclasses.replace(weight.config, **options)  # type: ignore[arg-type]
        copy = FactoredWeight(weight.num_features, weight.rank, config, weight.basis.device, weight.basis.dtype)
        copy.load_state(weight.state())
        copy.project(torch.Generator().manual_seed(0))
        return copy

    return run


def measure(width: int, rank: int, device: torch.device, rounds: int) -> list[dict[str, object]]:
    weight = trained_branch(width, rank, device).weight
    assert isinstance(weight, FactoredWeight)
    best = exact_factored(weight.core, weight.gram, rank)
    basis = best.vectors.T @ weight.basis.double()
    optimum = distance(weight, basis, torch.diag(best.eigenvalues))
    runs = {name: project_copy(weight, options) for name, options in METHODS.items()}
    results = {name: run() for name, run in runs.items()}
    seconds = interleaved(runs, rounds, device)
    return [
        {
            "width": width,
            "rank": rank,
            "method": name,
            "ms": 1000 * statistics.median(seconds[name]),
            "error": distance(weight, result.basis, result.core) / optimum,
            "kept": result.basis.shape[0],
        }
        for name, result in results.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="benchmarks/results/projection.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []
    for width, rank in ((512, 100), (2048, 200), (16384, 500)):
        rows += measure(width, rank, device, options.rounds)
    print_table(
        f"rank projection of W, {device}",
        ("features", "rank", "method", "ms", "error / best", "rank kept"),
        [(f"{r['width']:,}", r["rank"], r["method"], f"{r['ms']:.1f}", f"{r['error']:.4f}", r["kept"]) for r in rows],
    )
    write_json(options.output, {"device": str(device), "rows": rows})


if __name__ == "__main__":
    main()
