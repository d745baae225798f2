"""The matrix of known models: what is arithmetic in it, and what it says of other figures."""

import pytest

from veneer.report import plan_matrix
from veneer.report.plan_matrix import GIVEN, WEIGHTS, describe, matrix


@pytest.fixture(scope="module")
def table():
    sizes, plan_matrix.SIZES = plan_matrix.SIZES, {"7B": "llama-7b"}
    try:
        return matrix(seq_len=128, rank=8)
    finally:
        plan_matrix.SIZES = sizes


def test_weights_are_arithmetic(table):
    rows = {row["method"]: row for row in table["rows"]}
    count = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert rows["full"]["parameters"] == count and rows["full"]["weights"] == rows["lora"]["weights"] == 2 * count
    assert rows["full"]["trained"] == 16 * count
    assert rows["qlora"]["weights"] == linears // 2 + 2 * (count - linears)
    assert rows["qlora"]["constants"] == pytest.approx(linears / 64 * (1 + 4 / 256), rel=1e-3)
    adapter = 8 * 32 * (4 * 8192 + 3 * (4096 + 11008))
    assert rows["lora"]["trained"] == rows["qlora"]["trained"] == 16 * adapter
    (weights,) = table["weights"]
    assert weights["gb"] == [count * width / 1e9 for width in (4, 2, 1, 0.5)]
    for ours, theirs in zip(weights["gb"], WEIGHTS["7B"], strict=True):
        assert ours == pytest.approx(theirs, rel=0.05)


def test_what_is_printed(table):
    assert all(row["peak_bytes"] >= row["recompute_bytes"] > row["weights"] for row in table["rows"])
    text = describe(table)
    assert "| 7B | full |" in text and f"| {GIVEN['7B', 'full']} |" in text and "28, 14, 7, 3.5" in text
    assert "8 bytes a parameter (54 GB" in text and "18 bytes a parameter (121 GB" in text
