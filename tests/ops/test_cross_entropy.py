import pytest
import torch

from veneer.ops import cross_entropy as ce


@pytest.mark.parametrize("rows", [1, 255, 257, 600])
@pytest.mark.parametrize("trained_head", [False, True])
def test_loss_and_gradients_equal_the_reference(rows, trained_head):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 24, generator=g, requires_grad=True)
    weight = torch.randn(101, 24, generator=g).requires_grad_(trained_head)
    labels = torch.randint(0, 101, (rows,), generator=g)
    expected = ce.linear_cross_entropy_reference(hidden, weight, labels, 7)
    inputs = (hidden, weight) if trained_head else (hidden,)
    wanted = torch.autograd.grad(3 * expected, inputs)
    found = ce.linear_cross_entropy(hidden, weight, labels, 7)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(3 * found, inputs), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_supervised_row_gives_zero():
    hidden = torch.randn(0, 8, requires_grad=True)
    loss = ce.linear_cross_entropy(hidden, torch.randn(11, 8), torch.empty(0, dtype=torch.long), 1)
    loss.backward()
    assert float(loss) == 0 and hidden.grad.shape == (0, 8)
