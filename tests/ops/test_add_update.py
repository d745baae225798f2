"""An update added to a weight and rounded once, on every instruction set."""

import pytest
import torch

from veneer import ops
from veneer.ops import native, reference

SHAPES = [(1, 1, 1), (7, 5, 3), (8, 16, 1), (9, 17, 16), (33, 100, 4), (64, 576, 16), (130, 31, 70)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_add_update(isa, nan_empties, dtype):
    g = torch.Generator().manual_seed(0)
    for m, n, r in SHAPES:
        weight = torch.randn(m, n, generator=g).to(dtype)
        left, right = torch.randn(m, r, generator=g) * 0.1, torch.randn(r, n, generator=g) * 0.1
        exact = weight.double() + left.double() @ right.double()
        for form in (reference.add_update, native.add_update, ops.add_update):
            found = form(weight, left, right)
            assert found.dtype == dtype and found.shape == weight.shape
            if dtype == torch.float32:
                torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
            else:  # rounded once: nearest to the exact sum but where fp32 is a hair from the middle of two numbers
                off = found != exact.to(dtype)
                assert float(off.double().mean()) < 0.01 + 1.5 / off.numel()
                torch.testing.assert_close(found, exact.to(dtype))
            buffer = torch.full_like(weight, float("nan"))
            assert form(weight, left, right, buffer) is buffer and torch.equal(buffer, found)
            same = weight.clone()
            form(same, left, right, same)
            assert torch.equal(same, found)


def test_bf16_is_rounded_as_torch_does(isa):
    weight = torch.tensor([[1.0, -1.0, 3.0e38, 1e-39, 0.0, float("inf")]], dtype=torch.bfloat16)
    right = torch.tensor([[2**-9, 2**-9 + 2**-20, 3.0e38, 1e-40, -0.0, 1.0]])
    expected = (weight.float() + right).to(torch.bfloat16)
    assert torch.equal(native.add_update(weight, torch.ones(1, 1), right), expected)
