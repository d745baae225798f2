"""What the factors of an update say about it, without ever making the dense matrix: its SVD, its rank, how low it could be;
and factors of a dense matrix that no memory need hold.

    scaling * B A,  A (r, in), B (out, r):   B = Q_b R_b,  A^T = Q_a R_a,  R_b R_a^T = U S V^T (r x r)
    so  scaling * B A = (Q_b U) (scaling S) (Q_a V)^T,  at O((in + out) r^2) instead of O(in out r).

All that is of factors in fp64 on the CPU: they are small, and singular values far below the largest mean something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

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


class LowRank(NamedTuple):
    """B A, the nearest matrix of its rank to another one: B (out, k), A (k, in) fp32 of equal lengths; the squared Frobenius
    norm of the whole, and of what B A leaves out."""

    b: Tensor
    a: Tensor
    squared: float
    lost: float


NOTHING = 1e-9  # a singular value below this share of the largest is rounding of fp32 factors


def truncated(a: Tensor, b: Tensor, rank: int | None = None, max_error: float | None = None) -> LowRank:
    """B A of a lower rank: `rank`, or the smallest whose error is at most `max_error` of its norm; left out, its own.

    Optimal in the Frobenius norm (Eckart & Young 1936). a (r, in), b (out, r), of any floating-point type.
    """
    if rank is not None and max_error is None and rank < min(len(a), len(b), a.shape[1]):
        return _from_grams(a, b, rank)
    u, s, vh = factored_svd(a, b)
    rounding = 1e-14 * float(torch.linalg.vector_norm(a.double()) * torch.linalg.vector_norm(b.double()))
    s = torch.where(s > rounding, s, 0.0)  # what is left where updates cancel out
    k = kept_rank(s, int((s > NOTHING * s[0]).sum()), rank, max_error)
    root = s[:k].sqrt()
    squared = float(s.square().sum())
    return LowRank((u[:, :k] * root).float(), (root[:, None] * vh[:k]).float(), squared, float(s[k:].square().sum()))


def _from_grams(a: Tensor, b: Tensor, rank: int) -> LowRank:
    """The same at a given rank without a QR of the factors. With A A^T = Q L Q^T and C = L^1/2 Q^T B^T B Q L^1/2 = W S^2 W^T
    the right singular vectors of B A are the rows of W^T L^-1/2 Q^T A. In fp64 they are exact to about 1e-8, while fp32
    factors are to 6e-8; what is smaller than that, as where `linear` asks for the rank, is lost in the squares."""
    a, b = a.double(), b.double()
    lengths = torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=0)
    even = torch.where((lengths[0] > 0) & (lengths[1] > 0), (lengths[1] / lengths[0]).sqrt(), 1.0)
    a, b = a * even[:, None], b / even  # of one length, lest what is small in A alone be lost
    values, q = torch.linalg.eigh(a @ a.T)
    values = torch.where(values > 1e-15 * values[-1], values, 0.0)
    half = q * values.sqrt()
    inverse = q * torch.where(values > 0, values.rsqrt(), 0.0)
    squares, w = torch.linalg.eigh(half.T @ (b.T @ b) @ half)
    squares = squares.clamp(min=0)
    w = w.flip(1)[:, :rank]
    right = (inverse @ w).T @ a
    left = b @ (half @ w)
    root = torch.linalg.vector_norm(left, dim=0).sqrt()
    scale = torch.where(root > 0, 1 / root, 0.0)
    squared = float(squares.sum())
    lost = float(squares[: len(squares) - rank].sum())
    return LowRank((left * scale).float(), (root[:, None] * right).float(), squared, lost)


def kept_rank(s: Tensor, own: int, rank: int | None, max_error: float | None) -> int:
    """How many of the singular values s stay: at most `own` and `rank`, few enough for `max_error`, at least one."""
    k = own if max_error is None else min(own, rank_keeping(s, 1 - max_error**2))
    return max(1, k if rank is None else min(k, rank))


DIRECT = 2048  # the smaller side up to which a dense matrix is decomposed through its Gram matrix
OVERSAMPLED, PASSES = 16, 7  # of the block Krylov method: columns beyond the rank, times the matrix is made


@dataclass(frozen=True)
class RowBlocks:
    """A dense matrix made one block of rows at a time: the same block of the same rows every time it is asked."""

    shape: tuple[int, int]
    block: int  # rows
    rows: Callable[[int, int], Tensor]  # (start, stop) -> fp32 (stop - start, width)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Each block with its first row."""
        for start in range(0, self.shape[0], self.block):
            yield start, self.rows(start, min(start + self.block, self.shape[0]))


def nearest_factors(matrix: RowBlocks, rank: int | None = None, max_error: float | None = None) -> LowRank:
    """`truncated` of a dense matrix: through the Gram matrix of its smaller side where that is small, else with a block
    Krylov method (Musco & Musco 2015, arXiv 1504.05477) that keeps factors and one block of rows in memory. Ranks above half
    the smaller side take one matrix of the columns, or this one."""
    out, width = matrix.shape
    if min(out, width) <= DIRECT:
        return _directly(matrix, rank, max_error)
    return _by_krylov(matrix, rank, max_error)


def _directly(matrix: RowBlocks, rank: int | None, max_error: float | None) -> LowRank:
    return _by_gram(torch.cat([rows for _, rows in matrix]), rank, max_error)


def _by_gram(m: Tensor, rank: int | None, max_error: float | None) -> LowRank:
    tall = m.shape[0] > m.shape[1]
    wide = m.T if tall else m
    if max_error is not None:  # squares of small singular values are told from zero in fp64 only
        wide = wide.double()
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    s = values.flip(0).clamp_(min=0).sqrt_()
    k = kept_rank(s.double(), len(s), rank, max_error)
    basis = vectors.flip(1)[:, :k].to(m.dtype)  # orthonormal: what M has along it is the best of rank k
    along = basis.T @ (m.T if tall else m)
    root = torch.linalg.vector_norm(along, dim=1).sqrt_()
    along, basis = along / root.clamp(min=torch.finfo(m.dtype).tiny)[:, None], basis * root
    b, a = (along.T.contiguous(), basis.T.contiguous()) if tall else (basis, along)
    lost = torch.linalg.vector_norm(torch.addmm(m, b, a, alpha=-1), dtype=torch.float64)
    return LowRank(b, a, float(torch.linalg.vector_norm(m, dtype=torch.float64).square()), float(lost.square()))


def _by_width(matrix: RowBlocks, rank: int | None, max_error: float | None) -> LowRank:
    """Through the Gram matrix of the columns, in fp64: for ranks of which a Krylov space would be all columns anyway."""
    out, width = matrix.shape
    gram, squared = torch.zeros(width, width, dtype=torch.float64), 0.0
    for _, rows in matrix:
        gram.addmm_(rows.double().T, rows.double())
        squared += float(torch.linalg.vector_norm(rows, dtype=torch.float64).square())
    values, vectors = torch.linalg.eigh(gram)
    s = values.flip(0)[: min(out, width)].clamp_(min=0).sqrt_()
    k = kept_rank(s, len(s), rank, max_error)
    turned, root = vectors.flip(1)[:, :k], s[:k].sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    b = torch.empty(out, k)
    for start, rows in matrix:
        b[start : start + len(rows)] = (rows.double() @ turned / root).float()
    return LowRank(b, (root[:, None] * turned.T).float(), squared, max(0.0, squared - float(s[:k].square().sum())))


def _by_krylov(matrix: RowBlocks, rank: int | None, max_error: float | None, columns: int | None = None) -> LowRank:
    out, width = matrix.shape
    columns = columns or (rank or DIRECT // 8) + OVERSAMPLED
    if 2 * columns > min(out, width):
        return (_by_width if width <= out else _directly)(matrix, rank, max_error)
    passes = min(PASSES, width // columns)
    x = torch.randn(width, columns, generator=torch.Generator().manual_seed(0))
    spaces: list[Tensor] = []
    squared = 0.0
    for _ in range(passes):  # each: x <- M^T M x, orthogonal to those before
        x = torch.linalg.qr(x)[0]
        for _ in range(2):
            x = torch.linalg.qr(x - sum((q @ (q.T @ x) for q in spaces), torch.zeros(())))[0]
        spaces.append(x)
        x = sum((rows.T @ (rows @ x) for _, rows in matrix), torch.zeros(()))
    q = torch.linalg.qr(torch.cat(spaces, 1))[0]
    projected = torch.empty(out, q.shape[1])
    for start, rows in matrix:
        projected[start : start + len(rows)] = rows @ q
        squared += float(torch.linalg.vector_norm(rows, dtype=torch.float64).square())
    values, vectors = torch.linalg.eigh(projected.double().T @ projected.double())
    s = values.flip(0).clamp_(min=0).sqrt_()
    if max_error is not None and rank is None and float(s.square().sum()) < (1 - max_error**2) * squared:
        return _by_krylov(matrix, rank, max_error, 2 * columns)  # the space that was looked at does not hold enough
    k = kept_rank(s, len(s), rank, max_error)
    root = s[:k].sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    turned = vectors.flip(1)[:, :k]
    b = (projected.double() @ turned / root).float()
    a = (root[:, None] * (turned.T @ q.T.double())).float()
    return LowRank(b, a, squared, max(0.0, squared - float(s[:k].square().sum())))
