"""What DoRA needs of the kernels: scaled outputs and weights, sums of products by column, lengths of rows; each ISA."""

import pytest
import torch

from veneer import ops
from veneer.ops import native, products, reference
from veneer.quant.linear import quantize

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="no compiler built the kernels")
SIZES = [(1, 48, 96), (3, 50, 70), (17, 33, 64), (41, 96, 130), (70, 300, 4100)]
KINDS = [None, "nf4", "int8"]


def operands(rows, out, inner, kind=None):
    g = torch.Generator().manual_seed(rows + out)
    w = torch.randn(out, inner, generator=g).bfloat16()
    a = torch.randn(rows, inner, generator=g).bfloat16()
    return a, quantize(w, kind) if kind else w, torch.randn(out, generator=g), g


def close(found, expected, error=0.0):
    expected = expected.float()
    torch.testing.assert_close(
        found.float(), expected, rtol=8e-3, atol=(1e-5 + error) * float(expected.abs().max()) + 1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "out", "inner"), SIZES)
def test_the_sum_is_scaled_before_what_is_added_and_kept_as_it_was(isa, nan_empties, rows, out, inner, kind):
    a, w, scale, g = operands(rows, out, inner, kind)
    h, b = torch.randn(rows, 6, generator=g).bfloat16(), torch.randn(out, 6, generator=g).bfloat16()
    bias, residual = torch.randn(out, generator=g).bfloat16(), torch.randn(rows, out, generator=g).bfloat16()
    terms = [(a, w, True), (h, b, True)]
    plain, rest = (torch.full((rows, out), torch.nan, dtype=torch.bfloat16) for _ in range(2))
    y = native.product(terms, bias, residual, scale=scale, plain=plain, rest=rest)
    exact = a.float() @ (w if kind is None else w.dequantize(torch.bfloat16)).float().T + h.float() @ b.float().T
    whole = 0.005 if kind else 0.0  # few rows are multiplied with the weight before it is rounded to bf16
    close(plain, exact, whole)
    expected = exact * scale + bias.float() + residual.float()
    close(y, expected, whole)
    assert float((y.float() + rest.float() - expected).norm() / expected.norm()) < (4e-3 if kind else 1e-4)
    assert torch.equal(native.product(terms), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "out", "inner"), SIZES)
def test_rows_of_a_weight_are_scaled_on_the_way(isa, nan_empties, rows, out, inner, kind):
    """dy W of a W whose outputs were scaled; a term without a scale beside it."""
    out += out % 2
    _, w, scale, g = operands(rows, out, inner, kind)
    dy, dh, a = (torch.randn(n, m, generator=g).bfloat16() for n, m in ((rows, out), (rows, 6), (6, inner)))
    dense = (w if kind is None else w.dequantize(torch.bfloat16)).float()
    scaled = (scale[:, None] * dense).bfloat16()
    found = native.product([(dy, w, False), (dh, a, False)], row_scales=[scale, None])
    close(found, reference.product([(dy, scaled, False), (dh, a, False)]))


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 50), (75, 48), (130, 577), (515, 1536)])
def test_column_dots(isa, nan_empties, rows, n):
    g = torch.Generator().manual_seed(n)
    x, y = torch.randn(rows, n + 10, generator=g).bfloat16()[:, 4 : n + 4], torch.randn(rows, n, generator=g).bfloat16()
    torch.testing.assert_close(native.column_dots(x, y), (x.float() * y.float()).sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("rows", "width"), [(1, 6), (33, 50), (70, 1100)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_backward_sums_its_gradients_times_their_inputs(isa, nan_empties, rows, width, activation):
    g = torch.Generator().manual_seed(width)
    both = torch.randn(rows, 2 * width, generator=g).bfloat16()
    (gate, up), d_out = both.chunk(2, 1), torch.randn(rows, width, generator=g).bfloat16()
    exact = [x.float().requires_grad_() for x in (gate, up)]
    gradients = torch.autograd.grad(reference.gated(*exact, activation), exact, d_out.float())
    expected = torch.stack([(d * x).sum(0) for d, x in zip(gradients, exact, strict=True)]).detach()
    dots = torch.full((2, width), torch.nan)
    plain = native.gated_backward(d_out, gate, up, activation, torch.empty_like(both).chunk(2, 1))
    again = torch.empty_like(both)
    found = native.gated_backward(d_out, gate, up, activation, again.chunk(2, 1), dots=dots)
    torch.testing.assert_close(dots, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found, plain)
    place = both.clone()  # the gradients may lie over what they are gradients of
    over = place.chunk(2, 1)
    same = torch.full((2, width), torch.nan)
    native.gated_backward(d_out, *over, activation, over, dots=same)
    assert torch.equal(place, again) and torch.equal(same, dots)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("out", "inner", "r"), [(1, 2, 1), (31, 66, 3), (48, 576, 16), (97, 64, 17), (200, 130, 40), (160, 1536, 8)]
)
def test_row_norms(isa, nan_empties, out, inner, r, kind):
    _, w, _, g = operands(1, out, inner, kind)
    a, b = torch.randn(r, inner, generator=g) / inner**0.5, torch.randn(out, r, generator=g)
    dense = (w if kind is None else w.dequantize(torch.bfloat16)).float()
    if kind is None:
        w[out // 2] = dense[out // 2] = b[out // 2] = 0
    squares = dense.square().sum(1)
    given = ([(a, b)], [0.7], [squares], torch.bfloat16)
    expected = reference.row_norms([(dense, True)], *given)[0]
    for form in (native.row_norms, products.row_norms, ops.row_norms):
        # of W A^T in bf16: as much of |W| as that may be off
        found, limit = form([(w, True)], *given)[0], 2e-3 * float(squares.max().sqrt())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=limit)
        assert kind is not None or found[out // 2] == expected[out // 2] == torch.tensor(reference.TINY)
    turned = reference.row_norms([(dense.T.contiguous(), False)], *given)[0]
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=0)
    if kind is None:
        close(native.row_norms([(w.T, False)], *given)[0], expected, 3e-3)
    else:
        assert native.row_norms([(w, True)], [(a, b * torch.nan)], *given[1:])[0].isnan().all()


def test_row_norms_of_many_weights_at_once(isa, nan_empties):
    many = []
    for out, inner, r, kind in ((97, 64, 17, None), (33, 130, 3, "nf4"), (1, 2, 1, None), (576, 192, 40, "int8")):
        _, w, s, g = operands(1, out, inner, kind)
        a, b = torch.randn(r, inner, generator=g) / inner**0.5, torch.randn(out, r, generator=g)
        dense = w if kind is None else w.dequantize(torch.bfloat16)
        many.append((((w, True)), (a, b), float(s[0]), dense.float().square().sum(1)))
    together = native.row_norms(*map(list, zip(*many, strict=True)), torch.bfloat16)
    for one, found in zip(many, together, strict=True):
        assert torch.equal(found, native.row_norms(*([x] for x in one), torch.bfloat16)[0])


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 50), (24, 577)])
def test_rows_are_scaled_and_their_products_summed(isa, nan_empties, rows, n):
    g = torch.Generator().manual_seed(n)
    x, other, factors = (torch.randn(*shape, generator=g) for shape in ((rows, n), (rows, n), (rows,)))
    expected, half = 0.3 * factors[:, None] * x, torch.full((rows, n), torch.nan, dtype=torch.bfloat16)
    kept = x.clone()
    assert native.scale_rows(x, factors, 0.3, out=half) is None
    assert torch.equal(x, kept) and torch.equal(half, (x * (factors * 0.3)[:, None]).bfloat16())
    dots = native.scale_rows(x, factors, 0.3, other=other)
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(dots, 0.3 * (kept * other).sum(1), rtol=1e-4, atol=1e-5)
