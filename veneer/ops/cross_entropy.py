"""Output head and cross-entropy in one, a piece of the rows at a time, so that the full logits never exist.

    loss = sum_n [ logsumexp(h_n W^T) - (h_n W^T)[label_n] ] / items

h (N, D), W (V, D), some rows of which another tensor may stand in for. The gradient is made in the forward pass, while a piece's logits are at hand: the backward
pass only scales it. Memory: one piece of logits instead of N x V of them, twice, in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.ops import native
from veneer.ops.arena import empty

PIECE = 512  # rows: 50 MB of bf16 logits at V = 49152. With 256, the product that makes them runs at 60% of the speed
BACK = 256  # rows of it for the gradient: with 512, that product runs at 60%
OURS = ("avx2", "avx512")  # sets without bf16 instructions, where torch's bf16 products run at 1 to 60 GFLOP/s


def _torch_softmax(logits: Tensor, labels: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Sum of the losses of a piece, and factor times the gradient of its logits in their dtype; 0: not wanted."""
    dtype, logits = logits.dtype, logits.float()
    target = logits.gather(1, labels[:, None])
    lse = logits.logsumexp(1, keepdim=True)
    loss = (lse - target).sum()
    if not factor:
        return loss, logits
    d_logits = logits.sub_(lse).exp_()
    d_logits.scatter_add_(1, labels[:, None], torch.full_like(target, -1.0))
    return loss, d_logits.mul_(factor).to(dtype)


def _native_softmax(logits: Tensor, labels: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return native.cross_entropy_(logits, labels, factor).sum(), logits


def _product(a: Tensor, weight: Tensor, by_row: bool, ours: bool, out: Tensor) -> None:
    """out = a W^T (by row) or a W, by our own kernel where torch has no fast one."""
    if not ours:
        torch.mm(a, weight.T if by_row else weight, out=out)
        return
    even = a.shape[1] // 2 * 2  # the kernel takes the depth in pairs
    rest = a[:, even:] * (weight[:, even:].T if by_row else weight[even:]) if even < a.shape[1] else None
    native.product([(a[:, :even], weight[:, :even] if by_row else weight[:even], by_row)], residual=rest, out=out)


def _piece(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    factor: float,
    kernels: bool,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    changed: tuple[Tensor, Tensor] | None,
    d_rows: Tensor | None,
) -> Tensor:
    """The loss of some rows, and their part of the gradients. Its logits are gone when it returns, before the next ones."""
    ours, softmax = False, _torch_softmax
    if kernels:
        ours, softmax = native.isa() in OURS, _native_softmax
    shape = (h.shape[0], weight.shape[0])
    logits = empty(shape, h.dtype) if kernels else h.new_empty(shape)
    _product(h, weight, True, ours, logits)
    if changed is not None:
        logits.index_copy_(1, changed[0], h @ changed[1].T)
    loss, d_logits = softmax(logits, labels, factor)
    d_changed = None
    if changed is not None and factor:
        d_changed = d_logits[:, changed[0]]
        d_logits.index_fill_(1, changed[0], 0)  # of the weight's own rows nothing was used
        if d_rows is not None:
            d_rows += (d_changed.T @ h).float()
    if d_hidden is not None:
        back = PIECE if ours else BACK  # ours is slower on fewer rows
        for d, out in zip(d_logits.split(back), d_hidden.split(back), strict=True):
            _product(d, weight, False, ours, out)
        if changed is not None and d_changed is not None:
            d_hidden += d_changed @ changed[1]
    if d_weight is not None:
        d_weight += native.outer_sum(h, d_logits, transposed=True) if ours else (d_logits.T @ h).float()
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, items: float | Tensor, kernels: bool,
        ids: Tensor | None, rows: Tensor | None,
    ) -> Tensor:  # fmt: skip
        want_hidden, want_weight, *_, want_rows = ctx.needs_input_grad
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        d_rows = torch.zeros_like(rows, dtype=torch.float32) if rows is not None and want_rows else None
        changed = None if ids is None or rows is None else (ids, rows)
        # Divided before it is rounded, so only once. fp16 has not the range for that.
        wanted = want_hidden or want_weight or want_rows
        factor = 0.0 if not wanted else 1.0 if hidden.dtype == torch.float16 else 1 / float(items)
        for start in range(0, hidden.shape[0], PIECE):
            at = slice(start, start + PIECE)
            out = None if d_hidden is None else d_hidden[at]
            loss += _piece(hidden[at], weight, labels[at], factor, kernels, out, d_weight, changed, d_rows)
        ctx.save_for_backward(*(g for g in (d_hidden, d_weight, d_rows) if g is not None))
        ctx.left, ctx.weight_dtype = 1 / float(items) / factor if factor else 1.0, weight.dtype
        return loss / items

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = list(ctx.saved_tensors)
        known = (
            1.0 if d_loss.is_meta else float(d_loss) if d_loss.device.type == "cpu" else d_loss
        )  # a GPU is not waited for
        scale: Any = known * ctx.left
        as_it_is = isinstance(scale, float) and scale == 1
        want_hidden, want_weight, *_, want_rows = ctx.needs_input_grad
        d_hidden = gradients.pop(0) if want_hidden else None
        d_weight = gradients.pop(0) if want_weight else None
        d_rows = gradients.pop(0) if want_rows else None
        return (
            d_hidden if d_hidden is None or as_it_is else d_hidden * scale,
            None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
            None if d_rows is None else (d_rows * scale).to(ctx.weight_dtype),
        )


Changed = tuple[Tensor, Tensor]  # ids (n,), and the rows (n, D) in the place of the weight's


def torch_form(
    hidden: Tensor, weight: Tensor, labels: Tensor, items: float | Tensor, changed: Changed | None = None
) -> Tensor:
    """Scalar fp32 loss of N supervised rows: hidden (N, D), weight (V, D) of the same dtype, labels (N,) in [0, V).

    Equals `reference.linear_cross_entropy`, gradients of hidden and weight included. `items`: what to divide by.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, items, False, *(changed or (None, None)))


def native_form(
    hidden: Tensor, weight: Tensor, labels: Tensor, items: float | Tensor, changed: Changed | None = None
) -> Tensor:
    """The same, with softmax and its gradient in one native pass over bf16 logits."""
    return _LinearCrossEntropy.apply(hidden, weight, labels, items, True, *(changed or (None, None)))
