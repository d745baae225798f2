"""Operations in torch's own, in the type of the activations, for any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.ops.reference import TINY


def dense(weight: Any, like: Tensor) -> Tensor:
    """A weight as a tensor of the type of `like`; a quantised one is decoded anew."""
    if isinstance(weight, Tensor):
        return weight.to(like.dtype)
    return weight.dequantize(like.dtype)  # type: ignore[no-any-return]


def product(
    terms: Sequence[tuple[Tensor, Any, bool]], bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    (a, weight, by_row), *rest = terms
    first = dense(weight, a)
    y = F.linear(a, first if by_row else first.T, None if bias is None else bias.to(a.dtype))
    for a, weight, by_row in rest:
        more = dense(weight, a)
        y.addmm_(a, more.T if by_row else more)
    return y if residual is None else y.add_(residual)


def row_norms(
    weights: Sequence[tuple[Any, bool]], factors: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float],
    squares: Sequence[Tensor], dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    found = []
    for weight, (a, b), s, square in zip(weights, factors, scalings, squares, strict=True):
        wa = product([(a.to(dtype), *weight)]).float()
        cross = 2 * s * (wa.T * b).sum(1) + s**2 * ((b @ (a @ a.T)) * b).sum(1)
        found.append((square + cross).clamp_(min=0).sqrt_().clamp_(min=TINY))
    return found


def watch(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], means: Sequence[Tensor], strays: Sequence[Tensor],
    dims: Sequence[int], beta: float,
) -> list[Tensor]:  # fmt: skip
    """Many tensors in one call each: on a GPU the calls are what costs."""
    gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    now = torch._foreach_mul(list(weights), gradients)
    torch._foreach_abs_(now)
    torch._foreach_lerp_(list(means), now, 1 - beta)
    torch._foreach_sub_(now, list(means))
    torch._foreach_abs_(now)
    torch._foreach_lerp_(list(strays), now, 1 - beta)
    worth = torch._foreach_mul(list(means), list(strays))
    return [w.transpose(0, dim).flatten(1).mean(1) if w.dim() > 1 else w for w, dim in zip(worth, dims, strict=True)]


def orthogonal(matrices: Sequence[Tensor], gradients: Sequence[Tensor], dims: Sequence[int], factor: float) -> None:
    """Those of one shape together in one product."""
    alike: dict[tuple[torch.Size, int], list[int]] = {}
    for at, (m, dim) in enumerate(zip(matrices, dims, strict=True)):
        alike.setdefault((m.shape, dim), []).append(at)
    for (shape, dim), places in alike.items():
        rows = torch.stack([matrices[at] for at in places]).transpose(1, dim + 1).flatten(2)
        gram = rows @ rows.transpose(1, 2)
        gram.diagonal(dim1=1, dim2=2).sub_(1)
        terms = (gram @ rows).view(len(places), *_moved(shape, dim)).transpose(1, dim + 1)
        torch._foreach_add_([gradients[at] for at in places], list(terms.unbind()), alpha=factor)


def _moved(shape: torch.Size, dim: int) -> tuple[int, ...]:
    """A shape with `dim` and its first dimension exchanged."""
    moved = list(shape)
    moved[0], moved[dim] = moved[dim], moved[0]
    return tuple(moved)


def outer_sum(left: Tensor, right: Tensor, *, transposed: bool = False) -> Tensor:
    return (right.T @ left if transposed else left.T @ right).float()
