import pytest
import torch

from veneer.ops import native, products, reference
from veneer.quant.nf4 import Nf4Tensor

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
]


def operands(m, n, depth, kind, by_row):
    g = torch.Generator().manual_seed(m * n + depth)
    a = torch.randn(m, depth, generator=g).bfloat16()
    w = torch.randn((n, depth) if by_row else (depth, n), generator=g)
    if kind == "bf16":
        return a, w.bfloat16()
    return a, Nf4Tensor.quantize(w, double_quant=kind == "nf4-dq")


def close(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=8e-3, atol=1e-5 * float(expected.abs().max()) + 1e-6
    )


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("kind", ["bf16", "nf4", "nf4-dq"])
@pytest.mark.parametrize(("m", "n", "depth"), SIZES)
def test_product_equals_reference(isa, nan_empties, m, n, depth, kind, by_row):
    a, w = operands(m, n, depth, kind, by_row)
    dense = w if kind == "bf16" else w.dequantize(torch.bfloat16)
    close(native.product([(a, w, by_row)]), reference.product([(a, dense, by_row)]))


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


@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize("depth", [96, 256])
def test_few_rows_take_terms_bias_and_residual(isa, nan_empties, m, depth):
    (a, w), (b, v) = operands(m, 70, depth, "nf4-dq", True), operands(m, 70, 16, "bf16", True)
    bias, residual = torch.randn(70).bfloat16(), torch.randn(m, 90).bfloat16()[:, 20:]
    found = native.product([(a, w, True), (b, v, True)], bias, residual)
    close(found, reference.product([(a, w.dequantize(torch.bfloat16), True), (b, v, True)], bias, residual))


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


def test_torch_form_equals_reference_in_fp32():
    a, w, b, v = torch.randn(4, 33), torch.randn(20, 33), torch.randn(4, 3), torch.randn(3, 20)
    bias, residual = torch.randn(20), torch.randn(4, 20)
    terms = [(a, w, True), (b, v, False)]
    torch.testing.assert_close(products.product(terms, bias, residual), reference.product(terms, bias, residual))


def test_an_isa_gives_the_same_result_every_time(isa):
    a, w = operands(300, 200, 96, "nf4", True)
    first = native.product([(a, w, True)])
    assert all(torch.equal(first, native.product([(a, w, True)])) for _ in range(3))
