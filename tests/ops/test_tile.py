"""Products whose depth, columns and rows are cut in more than one piece, on every instruction set."""

import pytest
import torch

from veneer.ops import blocks, native, reference
from veneer.quant.four_bit import FourBitTensor


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize(("m", "n", "depth"), [(97, 300, 530), (53, 590, 258), (1100, 70, 514), (49, 17, 1026)])
def test_cut_products_equal_reference(isa, nan_empties, m, n, depth, by_row):
    g = torch.Generator().manual_seed(m)
    a = torch.randn(m, depth + 2, generator=g).bfloat16()[:, 2:]
    w = torch.randn((n, depth) if by_row else (depth, n), generator=g).bfloat16()
    b, v = torch.randn(m, 6, generator=g).bfloat16(), torch.randn(n, 6, generator=g).bfloat16()
    residual, bias = torch.randn(m, n, generator=g).bfloat16(), torch.randn(n, generator=g).bfloat16()
    terms = [(a, w, by_row), (b, v, True)]
    found, expected = native.product(terms, bias, residual), reference.product(terms, bias, residual)
    torch.testing.assert_close(found.float(), expected.float(), rtol=8e-3, atol=1e-5 * float(expected.abs().max()))


# On the matrix unit: panels of each thread and those left over, shared panels; pieces of the depth, stretches of it; rows
# of A that collide in the first-level cache (2048), and tails.
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "depth"),
    [(100, 590, 1410), (1100, 190, 1410), (40, 100, 2048), (1200, 90, 2048), (70, 130, 6650), (16, 64, 3204)],
)
def test_deep_products_and_their_rests(isa, nan_empties, m, n, depth, four_bit):
    g = torch.Generator().manual_seed(m)
    a, b, v = (torch.randn(shape, generator=g).bfloat16() for shape in ((m, depth), (m, 6), (n, 6)))
    w = (torch.randn(n, depth, generator=g) / depth**0.5).bfloat16()
    w = FourBitTensor.quantize(w) if four_bit else w
    residual = torch.randn(m, n, generator=g).bfloat16()
    more = (torch.randn(m, n, generator=g) * residual.float().abs() / 512).bfloat16()
    rest = torch.empty(m, n, dtype=torch.bfloat16)
    found = native.product([(a, w, True), (b, v, True)], residual=residual, residual_rest=more, rest=rest)
    wide = w.dequantize(torch.bfloat16).float() if four_bit else w.float()
    exact = a.float() @ wide.T + b.float() @ v.float().T + residual.float() + more.float()
    torch.testing.assert_close(found.float() + rest.float(), exact, rtol=2e-5, atol=5e-5)
    torch.testing.assert_close(found.float(), exact, rtol=4e-3, atol=5e-5)


@pytest.mark.parametrize("width", [48, 272])
def test_attention_gradients_of_any_width(isa, nan_empties, width):
    g = torch.Generator().manual_seed(width)
    exact = [torch.randn(131, h, width, generator=g).bfloat16().float().requires_grad_() for h in (4, 2, 2)]
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in exact)
    starts = torch.tensor([0, 66, 131], dtype=torch.int32)
    dy = torch.randn(131, 4, width, generator=g).bfloat16()
    y = blocks.attention(q, k, v, None, None, starts, width**-0.5)
    y_ = reference.attention(*exact, None, None, starts, width**-0.5)
    for a, b in zip(torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(y_, exact, dy.float()), strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 0.01


@pytest.mark.parametrize("width", [16, 48, 272])
def test_attention_of_odd_lengths_and_any_width(isa, width):
    g = torch.Generator().manual_seed(width)
    q, k, v = (torch.randn(131, 2, width, generator=g).bfloat16() for _ in range(3))
    starts = torch.tensor([0, 66, 131], dtype=torch.int32)
    found, _ = native.attention_forward(q, k, v, None, None, starts, width**-0.5)
    expected = reference.attention(q.float(), k.float(), v.float(), None, None, starts, width**-0.5)
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)
