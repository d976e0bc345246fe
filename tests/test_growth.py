"""benchmarks/growth.py: its formula beside the code and beside what was measured, and the table of the latter."""

import pytest
import torch
from scripts import ROOT, benchmark
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(scope="module")
def growth():
    with benchmark("growth") as module:
        yield module


@pytest.fixture(scope="module")
def rows(growth):
    return growth.read(ROOT / "docs" / "growth.json").rows


class Counter(TorchDispatchMode):
    """Multiply-adds of products; torch's own counter leaves out those in place. Decompositions are none."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.made += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("values", [
    {}, {"rank": 200}, {"batch": 8, "rank": 20}, {"features": 4096}, {"precision": "bf16", "batch": 128},
], ids=str)  # fmt: skip
def test_the_formula_counts_the_products_that_are_made(growth, values, monkeypatch):
    """Over a cycle of ten updates with its projection."""
    monkeypatch.setattr("timm_lowrank.core.branch.multiplies_in_bfloat16", lambda device: device.type == "cpu")
    point = growth.Point(**{"features": 1024, "batch": 96, "rank": 40, **values})
    run = growth.Run(point)
    for _ in range(growth.EVERY * (1 + -(-point.rank // (growth.EVERY * point.entering)))):
        run.update()
    with Counter() as counter:
        for _ in range(growth.EVERY):
            run.update()
    assert run.model.branches["0"].weight.kept == point.rank
    made = growth.products(point)
    assert counter.made / growth.EVERY == pytest.approx(made.single + made.half + made.double, rel=0.1)


def test_the_formula_is_within_its_factor_of_what_was_measured(growth, rows):
    constants = growth.fit(rows)
    assert constants.per_product > 0
    assert constants.per_update > 0
    for row in rows:
        assert 1 / growth.FACTOR < constants.ms(row.point) / row.ms < growth.FACTOR, row.point
        for formula, seen in ((growth.state_mib, row.state_mib), (growth.peak_mib, row.peak_mib)):
            expected = formula(row.point)
            assert expected / growth.MEMORY_FACTOR < seen < growth.MEMORY_FACTOR * expected + growth.KEPT_MIB, row.point
        assert growth.sent_mib(row.point) == pytest.approx(row.sent_mib, rel=0.02)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_time_is_linear_in_the_features(growth, rows, precision):
    ms = {row.point: row.ms for row in rows}
    wide, base = growth.Point(features=200_704, precision=precision), growth.Point(precision=precision)
    assert ms[wide] / ms[base] <= 13


def test_the_table_and_the_points_are_those_that_were_measured(growth, rows):
    assert growth.table(rows) in (ROOT / "docs" / "measurements.md").read_text()
    assert len({row.point for row in rows}) == len(rows)
    assert {row.point for row in rows} <= set(growth.points())


def test_a_point_is_measured_in_processes_of_its_own(growth, tmp_path):
    row = growth.measure(growth.Point(features=4096, rank=16, batch=8))
    assert row.ms == pytest.approx(row.penalty_ms + row.backward_ms + row.update_ms + row.projection_ms)
    assert min(row.penalty_ms, row.backward_ms) > 0
    assert min(row.state_mib, row.peak_mib) > 1.5  # MiB, which B alone takes; 64 features take less than chance
    growth.picture(tmp_path / "growth.png", [row])
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert torch.get_num_threads() >= 1
