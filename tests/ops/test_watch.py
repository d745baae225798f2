"""What AdaLoRA does after and before each step, on every instruction set, beside its definition."""

import torch

from veneer import ops
from veneer.ops import native, products, reference

# (shape, dim that ranks lie along): factors A and B of odd sizes, a diagonal, and those of a convolution
SHAPES = [((5, 577), 0), ((5,), 0), ((577, 5), 1), ((24, 64), 0), ((64, 24), 1), ((3, 7, 2, 2), 0), ((11, 3, 1, 1), 1),
          ((1, 1), 0), ((1, 1), 1), ((17, 33), 1), ((130, 40), 1)]  # fmt: skip


def tensors(seed, missing=()):
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=g) for shape, _ in SHAPES]
    gradients = [None if at in missing else torch.randn(w.shape, generator=g) for at, w in enumerate(weights)]
    kept = [[torch.rand(w.shape, generator=g) for w in weights] for _ in range(2)]
    return weights, gradients, *kept


def forms():
    return [products.watch, *([] if native.missing() else [native.watch])]


def test_watch(isa, nan_empties):
    dims = [dim for _, dim in SHAPES]
    for step, missing in enumerate([(), (0, 2), range(len(SHAPES))]):
        given = tensors(step, missing)
        expected = reference.watch(*given, dims, 0.85)
        for form in (*forms(), ops.watch):
            again = tensors(step, missing)
            found = form(*again, dims, 0.85)
            for kind in range(2, 4):
                for one, other in zip(again[kind], given[kind], strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
            for (shape, dim), one, other in zip(SHAPES, found, expected, strict=True):
                assert one.shape == (shape[dim],)
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_watch_is_the_papers():
    w, g, mean, stray = (torch.tensor([[2.0, -3.0]]), torch.tensor([[0.5, 1.0]]), torch.ones(1, 2), torch.zeros(1, 2))
    worth = reference.watch([w], [g], [mean], [stray], [0], 0.75)[0]
    assert mean.tolist() == [[1.0, 1.5]] and stray.tolist() == [[0.0, 0.375]]  # v = 1, 3
    assert worth.tolist() == [(0.0 + 1.5 * 0.375) / 2]


def test_orthogonal(isa, nan_empties):
    pairs = [(shape, dim) for shape, dim in SHAPES if len(shape) > 1] * 2
    g = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=g) / 3 for shape, _ in pairs]
    start = [torch.randn(shape, generator=g) for shape, _ in pairs]
    dims = [dim for _, dim in pairs]
    expected = []
    for m, gradient, dim in zip(matrices, start, dims, strict=True):
        m = m.double().requires_grad_()
        rows = m.transpose(0, dim).flatten(1)
        penalty = ((rows @ rows.T - torch.eye(len(rows))) ** 2).sum()
        expected.append((gradient + 0.1 / 4 * torch.autograd.grad(penalty, m)[0]).float())
    for form in (
        reference.orthogonal,
        products.orthogonal,
        *([] if native.missing() else [native.orthogonal]),
        ops.orthogonal,
    ):
        found = [x.clone() for x in start]
        form(matrices, found, dims, 0.1)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
