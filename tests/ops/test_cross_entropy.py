import weakref

import pytest
import torch

from veneer import ops
from veneer.ops import cross_entropy as ce
from veneer.ops import native, reference


@pytest.mark.parametrize("rows", [1, 255, 257, 600])
@pytest.mark.parametrize("trained_head", [False, True])
def test_loss_and_gradients_equal_the_reference(rows, trained_head):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 24, generator=g, requires_grad=True)
    weight = torch.randn(101, 24, generator=g).requires_grad_(trained_head)
    labels = torch.randint(0, 101, (rows,), generator=g)
    expected = reference.linear_cross_entropy(hidden, weight, labels, 7)
    inputs = (hidden, weight) if trained_head else (hidden,)
    wanted = torch.autograd.grad(3 * expected, inputs)
    found = ops.linear_cross_entropy(hidden, weight, labels, 7)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(3 * found, inputs), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"),
    [(1, 5, 32), (3, 16, 32), (257, 101, 32), (300, 1000, 32), (600, 300, 32), (70, 101, 33)],  # 33: a bias as a column
)
@pytest.mark.parametrize("trained_head", [False, True])
def test_native_form_is_as_close_to_fp32_as_torch_in_bf16(isa, rows, vocabulary, width, trained_head):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, width, generator=g).bfloat16().requires_grad_(trained_head)
    labels = torch.randint(0, vocabulary, (rows,), generator=g)
    inputs = (hidden, weight) if trained_head else (hidden,)
    exact = [x.detach().float().requires_grad_(x.requires_grad) for x in (hidden, weight)]
    expected = reference.linear_cross_entropy(*exact, labels, 7)
    wanted = torch.autograd.grad(expected, [x for x in exact if x.requires_grad])
    loss = ce.native_form(hidden, weight, labels, 7)
    torch.testing.assert_close(loss, expected, rtol=3e-3, atol=1e-3)
    for found, want in zip(torch.autograd.grad(loss, inputs), wanted, strict=True):
        assert float((found.float() - want).norm() / want.norm().clamp(min=1e-6)) < 0.01


def test_native_softmax_in_place(isa):
    logits = (torch.randn(5, 77, generator=torch.Generator().manual_seed(1)) * 30).bfloat16()
    labels = torch.tensor([0, 76, 3, 10, 64])
    wide = logits.float()
    expected = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    gradient = wide.softmax(1) - torch.nn.functional.one_hot(labels, 77)
    loss = native.cross_entropy_(logits, labels, 0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.float(), 0.3 * gradient, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_logit_gives_a_bad_loss(isa, bad):
    logits = torch.zeros(2, 40, dtype=torch.bfloat16)
    logits[1, 7] = bad
    loss = native.cross_entropy_(logits, torch.tensor([1, 2]), 1.0)
    assert loss[0].isfinite() and not loss[1].isfinite()


def test_no_supervised_row_gives_zero():
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(0, 8, dtype=dtype, requires_grad=True)
        loss = ops.linear_cross_entropy(hidden, torch.randn(11, 8, dtype=dtype), torch.empty(0, dtype=torch.long), 1)
        loss.backward()
        assert float(loss) == 0 and hidden.grad.shape == (0, 8)


@pytest.mark.skipif(native.missing() is not None, reason="no compiler built the kernels")
def test_the_logits_of_one_piece_are_gone_before_the_next(monkeypatch):
    held, made = [], []

    def counting(shape, dtype):
        held.append(sum(tensor() is not None for tensor in made))
        out = torch.empty(shape, dtype=dtype)
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(ce, "empty", counting)
    monkeypatch.setattr(ce, "PIECE", 16)
    hidden, weight = torch.randn(50, 8).bfloat16().requires_grad_(), torch.randn(30, 8).bfloat16()
    ce.native_form(hidden, weight, torch.randint(0, 30, (50,)), 50.0).backward()
    assert held == [0, 0, 0, 0]
