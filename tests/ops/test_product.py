import pytest
import torch

from veneer.ops import native, products, reference
from veneer.quant.linear import quantize

SIZES = [
    (1, 1, 2),
    (1, 33, 384),
    (2, 7, 128),
    (3, 9, 192),
    (1, 5, 64),
    (4, 5, 640),
    (11, 9, 256),
    (12, 66, 128),
    (1, 48, 96),
    (5, 16, 64),
    (7, 63, 130),
    (65, 200, 96),
    (130, 64, 66),
    (3, 50, 4162),
    (41, 70, 9000),
    (17, 40, 6272),
    (70, 300, 9000),
    (600, 1500, 2048),
]


def operands(m, n, depth, kind, by_row):
    g = torch.Generator().manual_seed(m * n + depth)
    a = torch.randn(m, depth, generator=g).bfloat16()
    w = torch.randn((n, depth) if by_row else (depth, n), generator=g)
    if kind == "bf16":
        return a, w.bfloat16()
    return a, quantize(w, kind.removesuffix("-dq"), double_quant=kind.endswith("-dq"))


def close(found, expected, error=1e-5):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=8e-3, atol=error * float(expected.abs().max()) + 1e-6
    )


def in_whole_numbers(isa, m, depth):
    """Whether a 4-bit weight by row is multiplied in whole numbers, from unrounded values: csrc/few_rows.h."""
    return depth % 64 == 0 and m <= {"avx512": 11, "avx512bf16": 2, "amx": 2}.get(isa, 0)


def multiplied(w, m, isa, by_row=True):
    """The dense weight that a product with m rows uses, and the error it may have."""
    if isinstance(w, torch.Tensor):
        return w, 1e-5
    if w.kind == "int8":  # few rows: the codes themselves, in fp32
        return w.dequantize(torch.float32 if by_row and m < 12 else torch.bfloat16), 1e-5
    whole = by_row and in_whole_numbers(isa, m, w.shape[1])
    return w.dequantize(torch.float32 if whole else torch.bfloat16), 2e-4 if whole else 1e-5


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("kind", ["bf16", "nf4", "nf4-dq", "fp4", "fp4-dq", "int8"])
@pytest.mark.parametrize(("m", "n", "depth"), SIZES)
def test_product_equals_reference(isa, nan_empties, m, n, depth, kind, by_row):
    a, w = operands(m, n, depth, kind, by_row)
    dense, error = multiplied(w, m, isa, by_row)
    close(native.product([(a, w, by_row)]), reference.product([(a, dense, by_row)]), error)


def test_terms_bias_and_residual_are_summed_before_rounding(isa, nan_empties):
    (a, w), (b, v), (c, u) = (
        operands(9, 70, 96, "bf16", True),
        operands(9, 70, 16, "bf16", False),
        operands(9, 70, 5000, "nf4", True),
    )
    bias, residual = torch.randn(70).bfloat16(), torch.randn(9, 70).bfloat16()
    terms = [(a, w, True), (b, v, False), (c, u, True)]
    dense = [*terms[:2], (c, u.dequantize(torch.bfloat16), True)]
    close(native.product(terms, bias, residual), reference.product(dense, bias, residual))


@pytest.mark.parametrize("m", [1, 2, 3, 11])
@pytest.mark.parametrize("depth", [96, 256])
@pytest.mark.parametrize("kind", ["nf4-dq", "fp4", "int8"])
def test_few_rows_take_terms_bias_and_residual(isa, nan_empties, m, depth, kind):
    (a, w), (b, v) = operands(m, 70, depth, kind, True), operands(m, 70, 16, "bf16", True)
    bias, residual = torch.randn(70).bfloat16(), torch.randn(m, 90).bfloat16()[:, 20:]
    found = native.product([(a, w, True), (b, v, True)], bias, residual)
    dense, error = multiplied(w, m, isa)
    close(found, reference.product([(a, dense, True), (b, v, True)], bias, residual), error)


@pytest.mark.parametrize("m", [1, 2, 7])
@pytest.mark.parametrize("scale", ["even", "outliers", "wide", "tiny", "huge"])
@pytest.mark.parametrize("kind", ["nf4-dq", "fp4-dq"])
def test_few_rows_are_nearer_to_the_4_bit_weight_than_its_bf16_form(isa, m, scale, kind):
    """Of x in any range: a few elements far larger, 20 orders of magnitude in one block, subnormal, near overflow."""
    a, w = operands(m, 70, 448, kind, True)
    a[:, 100:110] = 0
    if scale == "outliers":
        a[:, [3, 200, 447]] *= 5000
    elif scale == "wide":
        a = (a.float() * torch.logspace(-10, 10, 448)).bfloat16()
    elif scale != "even":
        a = (a.float() * (1e-38 if scale == "tiny" else 1e34)).bfloat16()
    exact = a.double() @ w.dequantize(torch.float32).double().T
    rounded = (a.double() @ w.dequantize(torch.bfloat16).double().T).float().bfloat16()
    found = native.product([(a, w, True)])
    if scale == "tiny":
        assert (found.double() - exact).abs().max() <= 448 * 2.0**-115 * w.dequantize(torch.float32).abs().max()
        return
    error, allowed = ((y.double() - exact).norm() for y in (found, rounded))
    assert error <= allowed * (1 if in_whole_numbers(isa, m, 448) else 1.05)


@pytest.mark.parametrize("m", [1, 2, 7])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("kind", ["nf4-dq", "fp4-dq", "int8"])
def test_what_is_not_finite_stays_so(isa, m, value, kind):
    a, w = operands(m, 70, 128, kind, True)
    a[0, 77] = value
    found, expected = native.product([(a, w, True)]), reference.product([(a, w.dequantize(torch.bfloat16), True)])
    assert torch.equal(found[0].isfinite(), expected[0].isfinite()) and found[1:].isfinite().all()
    assert torch.equal(found[0].isnan(), expected[0].isnan())


@pytest.mark.parametrize("columns", [True, False])
def test_inputs_that_are_slices_or_turned(isa, columns):
    a = torch.randn(20, 200).bfloat16()[:, 40:136]
    w = torch.randn(96, 50).bfloat16().T if columns else torch.randn(50, 300).bfloat16()[:, 7:103]
    out = torch.zeros(20, 120, dtype=torch.bfloat16)
    native.product([(a, w, True)], out=out[:, 11:61])
    close(out[:, 11:61], reference.product([(a, w, True)]))
    assert not out[:, :11].any() and not out[:, 61:].any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tokens", "r", "n"), [(1, 1, 1), (2, 3, 50), (7, 16, 64), (515, 48, 130), (256, 2, 200)])
def test_outer_sum_equals_reference(isa, nan_empties, tokens, r, n, transposed):
    left, right = torch.randn(tokens, r).bfloat16(), torch.randn(tokens, n + 6).bfloat16()[:, 3 : n + 3]
    found = native.outer_sum(left, right, transposed=transposed)
    torch.testing.assert_close(found, reference.outer_sum(left, right, transposed=transposed), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("by_row", [True, False])
def test_no_rows_give_no_rows(isa, kind, by_row):
    a, w = operands(0, 20, 64, kind, by_row)
    assert native.product([(a, w, by_row)]).shape == (0, 20)


def test_torch_form_equals_reference_in_fp32():
    a, w, b, v = torch.randn(4, 33), torch.randn(20, 33), torch.randn(4, 3), torch.randn(3, 20)
    bias, residual = torch.randn(20), torch.randn(4, 20)
    terms = [(a, w, True), (b, v, False)]
    torch.testing.assert_close(products.product(terms, bias, residual), reference.product(terms, bias, residual))


def test_an_isa_gives_the_same_result_every_time(isa):
    a, w = operands(300, 200, 96, "nf4", True)
    first = native.product([(a, w, True)])
    assert all(torch.equal(first, native.product([(a, w, True)])) for _ in range(3))
