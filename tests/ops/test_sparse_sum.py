"""Sparse updates added, or added where signs agree: every instruction set beside the definition, and that beside itself."""

import pytest
import torch

from veneer import ops
from veneer.ops import native, reference

SHAPES = [(1, 1), (3, 7), (5, 16), (2, 33), (7, 1023), (3, 1024), (2, 1025), (4, 2050), (1, 5000)]


def given(shape, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randn(shape, generator=g) for _ in range(count)]
    parts[-1][0, : shape[1] // 2] = 0
    weights = [1.0, -0.5, 2.0, 0.25, -1.5][:count]
    return parts, weights, [0.0, 0.3, 0.9, 0.1, 0.5][:count], [7, 2**32 - 1, 0, 12345, 99][:count]


@pytest.mark.parametrize("p", [0.0, 0.35, 0.9])
@pytest.mark.parametrize("elect", [None, "total", "frequency"])
def test_sparse_sum(isa, nan_empties, elect, p):
    for shape in SHAPES:
        for count in (1, 2, 5):
            arguments = given(shape, count)
            before = [part.clone() for part in arguments[0]]
            expected = reference.sparse_sum(*arguments, p, elect)
            for form in (ops.sparse_sum, *([] if native.missing() else [native.sparse_sum])):
                found = form(*arguments, p, elect)
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            assert all(torch.equal(a, b) for a, b in zip(arguments[0], before, strict=True))


def test_masks_are_those_of_kept(isa):
    x = torch.rand(9, 1031) + 1
    for p in (0.1, 0.5, 0.99):
        found = ops.sparse_sum([x], [1.0], [0.0], [42], p)
        assert torch.equal(found != 0, reference.kept(9, 1031, p, 42))
        torch.testing.assert_close(found[found != 0], (x * reference.drop_scale(p))[found != 0])


def test_many_parts_go_the_slow_way():
    parts, one = [torch.full((2, 3), 1.0)] * 70, [1.0] * 70
    found = ops.sparse_sum(parts, one, [0.0] * 70, [0] * 70, 0.0, "total")
    assert torch.equal(found, torch.ones(2, 3))


def test_elections_by_hand():
    parts = [
        torch.tensor([[3.0, -1.0, 0.0, 2.0]]),
        torch.tensor([[-1.0, -1.0, 0.0, -2.0]]),
        torch.tensor([[-1.0, 5.0, 0.0, 0.0]]),
    ]

    def of(weights, elect):
        return ops.sparse_sum(parts, weights, [0.0] * 3, [0] * 3, 0.0, elect).tolist()[0]

    assert of([1.0, 1.0, 1.0], "total") == [3.0, 5.0, 0.0, 2.0]  # 2 - 2 = 0 counts as positive
    assert of([1.0, 1.0, 1.0], "frequency") == [-1.0, -1.0, 0.0, 2.0]
    assert of([1.0, -1.0, 1.0], "total") == [2.0, 3.0, 0.0, 2.0]  # the second turned round
    assert of([1.0, 1.0, 1.0], None) == [1.0, 3.0, 0.0, 0.0]
