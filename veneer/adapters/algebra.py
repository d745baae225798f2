"""What the factors of an update say about it, without ever making the dense matrix: its SVD, its rank, how low it could be.

    scaling * B A,  A (r, in), B (out, r):   B = Q_b R_b,  A^T = Q_a R_a,  R_b R_a^T = U S V^T (r x r)
    so  scaling * B A = (Q_b U) (scaling S) (Q_a V)^T,  at O((in + out) r^2) instead of O(in out r).

All of it in fp64 on the CPU: the factors are small, and singular values far below the largest mean something.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def factored_svd(a: Tensor, b: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k) descending, Vh (k, in) of scaling * B A, with k = min(r, in, out), fp64.

    Factors of more than two dimensions are flattened behind the first, as a convolution's A (r, in, h, w) must be.
    """
    a, b = (factor.detach().flatten(1).to("cpu", torch.float64) for factor in (a, b))
    qa, ra = torch.linalg.qr(a.T)
    qb, rb = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return qb @ u, s * abs(scaling), math.copysign(1.0, scaling) * vh @ qa.T


def singular_values(a: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """The S of `factored_svd` alone: min(r, in, out) values, descending, fp64."""
    a, b = (factor.detach().flatten(1).to("cpu", torch.float64) for factor in (a, b))
    ra, rb = torch.linalg.qr(a.T, mode="r")[1], torch.linalg.qr(b, mode="r")[1]
    return torch.linalg.svdvals(rb @ ra.T) * abs(scaling)


def frobenius_norm(s: Tensor) -> float:
    """The update's norm from its singular values: sqrt(sum s^2)."""
    return float(torch.linalg.vector_norm(s))


def effective_rank(s: Tensor) -> float:
    """exp(H(p)) with p = s / sum(s) (Roy & Vetterli 2007): k for k equal values, 1 when one dominates, 0 for no update."""
    total = s.sum()
    if total <= 0:
        return 0.0
    p = s / total
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def stable_rank(s: Tensor) -> float:
    """sum(s^2) / max(s)^2: at most the rank, little moved by small singular values; 0 for no update."""
    return float(s.square().sum() / s[0].square()) if s.numel() and s[0] > 0 else 0.0


def rank_keeping(s: Tensor, share: float) -> int:
    """The smallest k with s_1^2 + ... + s_k^2 >= share * sum(s^2); 0 for no update.

    No matrix of rank k is nearer to the update than its first k singular terms (Eckart & Young 1936): that is the least
    rank that could have held this share of the squared norm.
    """
    kept = torch.cumsum(s.square(), 0)
    if not s.numel() or kept[-1] <= 0:
        return 0
    return int((kept < share * kept[-1] * (1 - 1e-12)).sum()) + 1
