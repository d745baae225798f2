"""The matrix of known models: what is arithmetic in it, and what it says of other figures."""

import pytest

from veneer.models.known import MODELS
from veneer.models.load import skeleton
from veneer.report import plan_matrix
from veneer.report.plan_matrix import GIVEN, WEIGHTS, describe, matrix

LAYERS = 4


def count_of(layers):
    return 2 * 32000 * 4096 + layers * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096


@pytest.fixture(scope="module")
def table():
    """Of four of its layers: what 32 take is arithmetic, and takes a minute."""
    kind, sizes = MODELS["llama-7b"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan_matrix, "SIZES", {"7B": "llama-7b"})
        patched.setitem(MODELS, "llama-7b", (kind, {**sizes, "num_hidden_layers": LAYERS}))
        return matrix(seq_len=128, rank=8)


def test_weights_are_arithmetic(table):
    rows = {row["method"]: row for row in table["rows"]}
    count = count_of(LAYERS)
    linears = LAYERS * (4 * 4096**2 + 3 * 4096 * 11008)
    assert rows["full"]["parameters"] == count and rows["full"]["weights"] == rows["lora"]["weights"] == 2 * count
    assert rows["full"]["trained"] == 16 * count
    assert rows["qlora"]["weights"] == linears // 2 + 2 * (count - linears)
    assert rows["qlora"]["constants"] == pytest.approx(linears / 64 * (1 + 4 / 256), rel=1e-3)
    adapter = 8 * LAYERS * (4 * 8192 + 3 * (4096 + 11008))
    assert rows["lora"]["trained"] == rows["qlora"]["trained"] == 16 * adapter
    (weights,) = table["weights"]
    assert weights["gb"] == [count * width / 1e9 for width in (4, 2, 1, 0.5)]
    whole = count_of(32)
    assert whole == sum(p.numel() for p in skeleton("llama-7b").parameters())
    for width, theirs in zip((4, 2, 1, 0.5), WEIGHTS["7B"], strict=True):
        assert whole * width / 1e9 == pytest.approx(theirs, rel=0.05)


def test_what_is_printed(table):
    assert all(row["peak_bytes"] >= row["recompute_bytes"] > row["weights"] for row in table["rows"])
    text = describe(table)
    assert "| 7B | full |" in text and f"| {GIVEN['7B', 'full']} |" in text and "28, 14, 7, 3.5" in text
    count = count_of(LAYERS) / 1e9
    assert f"8 bytes a parameter ({8 * count:.0f} GB" in text and f"18 bytes a parameter ({18 * count:.0f} GB" in text
