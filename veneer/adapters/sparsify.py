"""Updates made sparse before they are added, and added where they agree: TIES, DARE, DELLA and magnitude pruning.

Every update is D = scaling * B A of one layer, dense for one block of rows at a time: signs and magnitudes of a product
cannot be had from its factors. All masks are functions of the seed and of the update itself, not of its place in the list.

    TIES   keep the `density` largest |D| of each, elect the sign with the larger sum, average those that have it
           (Yadav et al. 2023, arXiv 2306.01708)
    DARE   keep each with probability `density`, divide by it (Yu et al. 2023, arXiv 2311.03099)
    DELLA  the same, more likely the larger it is in its row, then TIES's election (Deep et al. 2024, arXiv 2406.11617)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from veneer import ops
from veneer.adapters.algebra import RowBlocks
from veneer.ops.reference import hashed

BLOCK = 1 << 22  # elements of a block of rows; fixed, as another block rounds the products in another way

Prune = Literal["magnitude", "random", "della"]
Sign = Literal["total", "frequency"]


class Rule(NamedTuple):
    """How updates become one. elect: which sign wins at each place, None: all are added."""

    prune: Prune
    elect: Sign | None
    density: float
    window: float = 0.0  # of DELLA: how far apart the probabilities of the largest and the smallest are


class Update(NamedTuple):
    """One adapter's scaling * B A of a layer: B (out, r) with the scaling in it, A (r, in), fp32; its weight; and what its
    random numbers come from."""

    b: Tensor
    a: Tensor
    weight: float
    key: bytes


def dense_sum(updates: list[Update], rule: Rule, seed: int) -> RowBlocks:
    """sum w_i pruned(D_i), or with an election the average of those |w_i| pruned(sign(w_i) D_i) that have the elected sign.

    With weights of 1 the election and the average are those of the paper. A negative weight turns its update's votes, too.
    """
    shape = (updates[0].b.shape[0], updates[0].a.shape[1])
    block = max(1, BLOCK // shape[1])
    limits = [_limit(RowBlocks(shape, block, _dense(one)), rule) for one in updates]

    def rows(start: int, stop: int) -> Tensor:
        seeds = [_seed(one.key + f" {seed} {start}".encode()) for one in updates]
        parts, p = [one.b[start:stop] @ one.a for one in updates], 1 - rule.density if rule.prune == "random" else 0.0
        if rule.prune == "della" and rule.density < 1:
            parts = [_by_rank(d, rule, seed) for d, seed in zip(parts, seeds, strict=True)]
        return ops.sparse_sum(parts, [one.weight for one in updates], limits, seeds, p, rule.elect)

    return RowBlocks(shape, block, rows)


def _dense(one: Update) -> Callable[[int, int], Tensor]:
    return lambda start, stop: one.b[start:stop] @ one.a


def _limit(matrix: RowBlocks, rule: Rule) -> float:
    """The smallest |D| that magnitude pruning keeps."""
    if rule.prune != "magnitude" or rule.density >= 1:
        return 0.0
    return largest(matrix, int(rule.density * matrix.shape[0] * matrix.shape[1]))


def largest(matrix: RowBlocks, k: int) -> float:
    """The k-th largest absolute value of a matrix; above all of them for k = 0."""
    count = matrix.shape[0] * matrix.shape[1]
    if k == 0:
        return float("inf")
    if count <= matrix.block * matrix.shape[1]:
        rows = matrix.rows(0, matrix.shape[0])
        flat = rows.abs().flatten().numpy()
        return float(np.partition(flat, count - k)[count - k])
    # Not negative, they are ordered as the whole numbers with the same bits: the first 16, then those of the ones that begin so.
    prefix, left = _counts(matrix, k, lambda bits: bits >> 15, 1 << 16)
    second = _counts(matrix, left, lambda bits: torch.where(bits >> 15 == prefix, bits & 0x7FFF, -1), 1 << 15)[0]
    return float(torch.tensor(prefix << 15 | second, dtype=torch.int32).view(torch.float32))


def _counts(matrix: RowBlocks, k: int, key: Callable[[Tensor], Tensor], size: int) -> tuple[int, int]:
    """The key of the k-th largest, and how many of the k have the same; keys below 0 do not count."""
    total = torch.zeros(size, dtype=torch.int64)
    for _, rows in matrix:
        keys = key(rows.abs().contiguous().view(torch.int32)).flatten()
        total += torch.bincount(keys[keys >= 0].long(), minlength=size)
    above = total.flip(0).cumsum(0)
    at = int((above < k).sum())  # keys that all are among the k largest
    return size - 1 - at, k - int(above[at - 1] if at else 0)


def _by_rank(d: Tensor, rule: Rule, seed: int) -> Tensor:
    """DELLA's pruning: the smallest of a row goes with probability 1 - density + window / 2, the largest with - window / 2."""
    order = d.abs().argsort(1).argsort(1).float() / max(d.shape[1] - 1, 1)  # 0 the smallest of its row, 1 the largest
    limits = ((1 - rule.density + rule.window * (0.5 - order)) * 65536).round_().clamp_(0, 65535)
    return torch.where(hashed(d.shape[0], d.shape[1], seed) >= limits, d * (65536 / (65536 - limits)), 0.0)


def _seed(key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "little")
