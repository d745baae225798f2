"""Products whose depth, columns and rows are cut in more than one piece, on every instruction set."""

import pytest
import torch

from veneer.ops import native, reference


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


@pytest.mark.parametrize("width", [16, 48, 272])
def test_attention_of_odd_lengths_and_any_width(isa, width):
    g = torch.Generator().manual_seed(width)
    q, k, v = (torch.randn(131, 2, width, generator=g).bfloat16() for _ in range(3))
    starts = torch.tensor([0, 66, 131], dtype=torch.int32)
    found, _ = native.attention_forward(q, k, v, None, None, starts, width**-0.5)
    expected = reference.attention(q.float(), k.float(), v.float(), None, None, starts, width**-0.5)
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)
