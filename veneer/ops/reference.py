"""The definition of every operation in plain torch. The only code-books are here.

NF4 and FP4 (Dettmers et al. 2023, QLoRA, arXiv 2305.14314) and int8 (Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339)
as bitsandbytes writes them: docs/formats.md.
Arithmetic is spelled out where rounding depends on it, because codes and constants must equal bitsandbytes' bit for bit.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64  # weights that share one absmax
NESTED_BLOCK = 256  # absmax values that share one second-level absmax
INT8_STEPS = 127  # from 0 to a row's absmax


class CodeBook(NamedTuple):
    """The 16 values of a 4-bit type by code, fp32; the codes in the order of their values, int32; the 15 midpoints."""

    values: Tensor
    order: Tensor
    midpoints: Tensor


def _code_book(values: Tensor) -> CodeBook:
    ordered, order = values.sort(stable=True)
    return CodeBook(values, order.to(torch.int32), (ordered[:-1] + ordered[1:]) / 2)


CODE_BOOKS = {
    # quantiles of the normal distribution, one of them 0
    "nf4": _code_book(torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ])),
    # sign, two bits of exponent, one of mantissa; there are two zeros, and 1/192 in the place of 1/24
    # a sign, two bits of exponent, one of mantissa, all over 12; code 8 is a second zero
    "fp4": _code_book(torch.tensor([s * v for s in (1.0, -1.0) for v in (0.0, 0.0625, 8, 12, 4, 6, 2, 3)]) / 12 + 0.0),
}  # fmt: skip
_TINY = 1e-38  # smallest absmax divided by: a block of zeros must not give NaN
TINY = 1e-30  # smallest norm of a weight's row divided by: a row of zeros, as of a padding token, stays one


def _dynamic_map() -> Tensor:
    """The 8-bit signed dynamic data type (Dettmers et al. 2022, arXiv 2110.02861): 256 sorted fp32 values in [-1, 1].

    Seven decades 10^-6 ... 1; decade i has 2^i equal steps of [0.1, 1], each step's middle is a value, both signs; 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += [sign * v for v in (10.0 ** (i - 6) * middles).tolist() for sign in (1, -1)]
    return torch.tensor(sorted(values), dtype=torch.float32)


DYNAMIC_MAP = _dynamic_map()


@functools.cache
def _code_book_on(kind: str, device: torch.device) -> CodeBook:
    """Copied once: a GPU is waited for at every copy."""
    return CodeBook(*(part.to(device) for part in CODE_BOOKS[kind]))


@functools.cache
def _dynamic_map_on(device: torch.device) -> Tensor:
    return DYNAMIC_MAP.to(device)


def quantize_4bit(weight: Tensor, kind: str = "nf4") -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight of any shape (n elements, fp32/bf16/fp16), taken flat in blocks of 64.

    kind: "nf4" or "fp4". A value goes to the nearest of the code-book; one in the middle to the smaller.
    Returns: packed uint8 (ceil(n/2),), the earlier weight in the high nibble; absmax fp32 (ceil(n/64),).
    """
    flat = weight.detach().reshape(-1).float()
    n = flat.numel()
    whole = n // BLOCK * BLOCK
    book = _code_book_on(kind, flat.device)
    blocks = flat[:whole].view(-1, BLOCK)
    absmax = blocks.abs().amax(1) if whole else flat.new_empty(0)
    scaled = flat.new_zeros(n + n % 2)  # an odd end is padded with zero
    scaled[:whole] = (blocks * (1 / absmax.clamp(min=_TINY)).unsqueeze(1)).clamp(-1, 1).view(-1)
    if whole < n:  # a short last block: bitsandbytes divides here, and keeps the clamped absmax
        rest = flat[whole:].abs().amax().clamp(min=_TINY)
        scaled[whole:n] = (flat[whole:] / rest).clamp(-1, 1)
        absmax = torch.cat([absmax, rest.view(1)])
    code = book.order[torch.bucketize(scaled, book.midpoints)].to(torch.uint8)
    return (code[0::2] << 4) | code[1::2], absmax


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, ...] | torch.Size,
    dtype: torch.dtype,
    nested: Tensor | None = None,
    offset: Tensor | None = None,
    out: Tensor | None = None,
    kind: str = "nf4",
) -> Tensor:
    """value of the code * absmax in fp32, rounded once to `dtype`; shape as given, written into `out` when there is one.

    With `nested` and `offset`, absmax holds the codes of `double_quantize`.
    """
    if nested is not None and offset is not None:
        absmax = double_dequantize(absmax, nested, offset)
    n = int(torch.Size(shape).numel())
    code = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:n]
    value = _code_book_on(kind, packed.device).values[code.long()]
    weight = (value * absmax.repeat_interleave(BLOCK)[:n]).to(dtype).view(shape)
    return weight if out is None else out.copy_(weight)


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of the scales: absmax (m,) fp32 -> codes uint8 (m,), nested absmax fp32 (ceil(m/256),), offset fp32 ().

    offset = mean(absmax); absmax - offset, in blocks of 256, goes to the nearest value of the dynamic map.
    """
    offset = absmax.mean()
    centred = absmax - offset
    m = centred.numel()
    blocks = torch.nn.functional.pad(centred, (0, -m % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    scaled = (blocks / nested.unsqueeze(1)).reshape(-1)[:m]
    step = ((scaled + 1) / 2 * 65535 + 0.5).floor()
    table = double_quantize_table().to(absmax.device)
    code = table[step.nan_to_num(0.0).long()]  # not a number: a block of equal scales; its code is 0
    return torch.where(scaled.isnan(), torch.zeros_like(code), code), nested, offset


@functools.cache
def double_quantize_table() -> Tensor:
    """The code of each of 65,536 steps from -1 to 1, uint8: bitsandbytes looks codes up, it takes not the nearest value."""
    step = torch.arange(65536, dtype=torch.float32) / 65535 * 2 - 1
    return torch.bucketize(step, (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / 2).to(torch.uint8)


def double_dequantize(code: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """absmax (m,) fp32 = map[code] * nested absmax + offset."""
    value = _dynamic_map_on(code.device)[code.long()]
    return value * nested.repeat_interleave(NESTED_BLOCK)[: code.numel()] + offset


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> codes int8 (out, in), absmax fp32 (out,): w * 127 / absmax of its row, to nearest even.

    As bitsandbytes does, of the weight in fp16. A row of zeros has codes 0 and absmax 0.
    """
    half = weight.detach().half().float()
    absmax = half.abs().amax(1)
    factor = torch.where(absmax == 0, 0.0, INT8_STEPS / absmax)
    return half.mul_(factor[:, None]).round_().to(torch.int8), absmax


def int8_scale(absmax: Tensor) -> Tensor:
    """What the codes of a row are multiplied with: absmax / 127, as bitsandbytes rounds it."""
    return absmax * (1.0 / INT8_STEPS)


def dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """code * (absmax / 127) in fp32, rounded once to `dtype`; (out, in)."""
    return (codes * int8_scale(absmax)[:, None]).to(dtype)


def mixed_int8_product(
    x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None = None, threshold: float = 6.0
) -> Tensor:
    """LLM.int8() (Dettmers et al. 2022): y (m, out) of x (m, in) and an int8 weight (out, in), both sides in 8 bits.

    Columns of x with an element of at least `threshold` are outliers: multiplied as they are, with the decoded weight.
    The others are rounded to int8 by the absmax of their row, outlier elements left out, and summed in whole numbers.
    """
    large = x.abs() >= threshold
    outliers = large.any(0)
    rounded, scale = quantize_int8(x.masked_fill(large, 0))
    rounded[:, outliers] = 0
    pieces = zip(rounded.float().split(1024, 1), codes.float().split(1024, 1), strict=True)
    whole = torch.stack([(a @ b.T).double() for a, b in pieces]).sum(0)  # exact: below 2^24 each
    y = whole.float() * (int8_scale(scale)[:, None] * int8_scale(absmax)[None])
    y = y if bias is None else y + bias.float()
    columns = x[:, outliers].float() @ dequantize_int8(codes[:, outliers], absmax, x.dtype).float().T
    return (y + columns).to(x.dtype)


# ---- the parts of a transformer layer -------------------------------------------------------------------------------


def product(
    terms: Sequence[tuple[Tensor, Any, bool]], bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """y (m, n) = sum of a W^T (`by_row`, W (n, depth)) or a W (W (depth, n)) + bias + residual, summed in fp32."""
    a = terms[0][0]
    total = sum(a.float() @ (w.T if by_row else w) for a, w, by_row in ((a, _dense(w), by) for a, w, by in terms))
    for extra in (bias, residual):
        total = total if extra is None else total + extra.float()
    return total.to(a.dtype)  # type: ignore[union-attr]


def outer_sum(left: Tensor, right: Tensor, *, transposed: bool = False) -> Tensor:
    """left (tokens, r), right (tokens, n) -> left^T right (r, n) fp32, or its transpose."""
    total = left.float().T @ right.float()
    return total.T.contiguous() if transposed else total


def row_norms(
    weights: Sequence[tuple[Any, bool]], factors: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float],
    squares: Sequence[Tensor], dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """|W + scaling B A| of each row (out,) fp32, at least TINY; W (out, in), or (in, out) if not `by_row`."""
    found = []
    for (weight, by_row), (a, b), scaling in zip(weights, factors, scalings, strict=True):
        dense = _dense(weight).float() if by_row else _dense(weight).float().T
        found.append(torch.linalg.vector_norm(dense + scaling * b @ a, dim=1).clamp_(min=TINY))
    return found


def watch(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], means: Sequence[Tensor], strays: Sequence[Tensor],
    dims: Sequence[int], beta: float,
) -> list[Tensor]:  # fmt: skip
    """AdaLoRA's running means of v = |w dL/dw| and of |v - mean|, in place, and the average of their product along `dim`."""
    found = []
    for w, g, mean, stray, dim in zip(weights, gradients, means, strays, dims, strict=True):
        now = torch.zeros_like(w) if g is None else (w * g).abs_()
        mean.lerp_(now, 1 - beta)
        stray.lerp_(now.sub_(mean).abs_(), 1 - beta)
        worth = mean * stray
        found.append(worth.transpose(0, dim).flatten(1).mean(1) if w.dim() > 1 else worth)
    return found


def orthogonal(matrices: Sequence[Tensor], gradients: Sequence[Tensor], dims: Sequence[int], factor: float) -> None:
    """gradient += factor (M M^T - I) M for dim 0, factor M (M^T M - I) for dim 1; M flat but for that dimension."""
    for m, gradient, dim in zip(matrices, gradients, dims, strict=True):
        rows = m.transpose(0, dim).flatten(1)
        identity = torch.eye(len(rows), dtype=m.dtype, device=m.device)
        term = factor * (rows @ rows.T - identity) @ rows
        gradient.add_((term if dim == 0 else term.T).view(m.shape))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, shift: float = 0.0, rest: Tensor | None = None) -> Tensor:
    """x (..., D) [+ its rest] -> x (mean(x^2) + epsilon)^-1/2 (weight + shift), in fp32, rounded once."""
    wide = _whole(x, rest)
    return (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt() * (weight.float() + shift)).to(x.dtype)


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """activation(gate) * up in fp32, rounded once; "silu" or "gelu_tanh"."""
    wide = gate.float()
    value = F.silu(wide) if activation == "silu" else F.gelu(wide, approximate="tanh")
    return (value * up.float()).to(gate.dtype)


def masked(x: Tensor, p: float, seed: int, residual: Tensor | None = None) -> Tensor:
    """x (T, D) where `kept`, else 0 [+ residual, in fp32, rounded once]: dropout without its factor, `drop_scale`."""
    y = torch.where(kept(x.shape[0], x.shape[1], p, seed).to(x.device), x, 0.0)
    return y if residual is None else (y.float() + residual.float()).to(x.dtype)


def kept(rows: int, width: int, p: float, seed: int) -> Tensor:
    """Which elements dropout keeps, bool (rows, width): those whose 16 bits of a hash are at least `drop_limit`.

    Counter-based random numbers (Salmon et al. 2011): a function of seed (below 2^32), row and column, the same on every
    machine, so that nothing of a mask need be stored. One hash serves two columns.
    """
    return hashed(rows, width, seed) >= drop_limit(p)


def hashed(rows: int, width: int, seed: int) -> Tensor:
    """Whole numbers below 65,536, int64 (rows, width), of `kept`."""
    row, pair = (torch.arange(n) * 0x9E3779B9 & 0xFFFFFFFF for n in (rows, (width + 1) // 2))
    words = _mix(pair ^ _mix(row ^ seed)[:, None])
    return torch.stack([words & 0xFFFF, words >> 16], -1).view(rows, -1)[:, :width]


def add_update(weight: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """W (m, n) + left (m, r) right (r, n) in fp32, rounded once to W's dtype."""
    merged = (weight.float() + left @ right).to(weight.dtype)
    return merged if out is None else out.copy_(merged)


ELECTIONS = ("total", "frequency")


def sparse_sum(
    parts: Sequence[Tensor], weights: Sequence[float], limits: Sequence[float], seeds: Sequence[int], p: float,
    elect: str | None,
) -> Tensor:  # fmt: skip
    """Parts (rows, width) fp32, pruned, then added, or added where they have the elected sign; see `ops.sparse_sum`."""
    pruned = []
    for part, limit, seed in zip(parts, limits, seeds, strict=True):
        kept_ = part.abs() >= limit
        if drop_limit(p):
            part, kept_ = part * drop_scale(p), kept_ & kept(part.shape[0], part.shape[1], p, seed)
        pruned.append(torch.where(kept_, part, 0.0))
    if elect is None:
        return sum((part * weight for part, weight in zip(pruned, weights, strict=True)), torch.zeros(()))
    turned = [-part if weight < 0 else part for part, weight in zip(pruned, weights, strict=True)]
    votes = sum((part.sign() if elect == "frequency" else part for part in turned), torch.zeros(()))
    agree = [(votes >= 0) & (part > 0) | (votes < 0) & (part < 0) for part in turned]
    total = sum((part * abs(w) * hit for part, w, hit in zip(turned, weights, agree, strict=True)), torch.zeros(()))
    return total / torch.stack(agree).sum(0).clamp(min=1)


def drop_limit(p: float) -> int:
    """How many of 65,536 elements dropout takes away: p is rounded to such a share."""
    assert 0 <= p < 1, p
    return min(round(p * 65536), 65535)


def drop_scale(p: float) -> float:
    """1 / (1 - p), of the rounded p."""
    return 65536 / (65536 - drop_limit(p))


def _mix(h: Tensor) -> Tensor:
    """The 32-bit hash lowbias32 (C. Wellons, 2018, "Prospecting for hash functions") of int64 below 2^32."""
    h = (h ^ h >> 16) * 0x7FEB352D & 0xFFFFFFFF
    h = (h ^ h >> 15) * 0x846CA68B & 0xFFFFFFFF  # 64 bits wrap, the low 32 are right
    return h ^ h >> 16


def rotate(x_THW: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotary embedding of the first 2 n of W, n = columns of cos: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    if cos is None or sin is None:
        return x_THW
    n = cos.shape[1]
    first, second, rest = x_THW[..., :n], x_THW[..., n : 2 * n], x_THW[..., 2 * n :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x_THW.dtype)


def attention(
    q_THW: Tensor, k_TGW: Tensor, v_TGW: Tensor, cos: Tensor | None, sin: Tensor | None, starts: Tensor, scale: float
) -> Tensor:
    """Causal attention within each row [starts[i], starts[i + 1]) of T tokens, H query heads on G key-value heads."""
    q, k = rotate(q_THW, cos, sin).float(), rotate(k_TGW, cos, sin).float()
    each = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(each, 1), v_TGW.float().repeat_interleave(each, 1)
    rows = []
    for start, end in itertools.pairwise(starts.tolist()):
        score = torch.einsum("qhw,khw->hqk", q[start:end], k[start:end]) * scale
        hidden = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        weight = score.masked_fill(hidden, -math.inf).softmax(-1)
        rows.append(torch.einsum("hqk,khw->qhw", weight, v[start:end]))
    return torch.cat(rows).to(q_THW.dtype)


def linear(x: Tensor, layer: Any) -> Tensor:
    """scale (x W^T + scaling (dropout(x) A^T diag(diagonal)) B^T) + bias of an `AdaptedLinear`."""
    y = x @ _dense(layer.weight).to(x.dtype).T
    if layer.a is not None:
        low = masked(x, layer.dropout, layer.seed) * drop_scale(layer.dropout) if layer.dropout else x
        a = layer.a if layer.diagonal is None else layer.a * layer.diagonal[:, None]
        y = y + layer.scaling * (low @ a.to(x.dtype).T) @ layer.b.to(x.dtype).T
    y = y if layer.scale is None else y * layer.scale.to(x.dtype)
    return y if layer.bias is None else y + layer.bias.to(x.dtype)


def attention_block(x: Tensor, block: Any, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The attention half of a layer, x (T, D) and its rest -> y and its rest: see `veneer.ops.blocks`."""
    normed = rms_norm(x, block.norm.weight, block.norm.epsilon, block.norm.shift, rest)
    heads = torch.cat([linear(normed, layer) for layer in block.qkv], -1).view(x.shape[0], -1, block.width)
    q, k, v = heads.split((block.heads, block.kv_heads, block.kv_heads), dim=1)
    q = q if block.q_norm is None else rms_norm(q, *block.q_norm)
    k = k if block.k_norm is None else rms_norm(k, *block.k_norm)
    o = attention(q, k, v, block.cos, block.sin, block.starts, block.scale)
    return _parted(_whole(x, rest) + linear(o.reshape(x.shape[0], -1), block.out).float(), x.dtype)


def mlp_block(x: Tensor, block: Any, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The MLP half of a layer, x (T, D) and its rest -> y and its rest: see `veneer.ops.blocks`."""
    normed = rms_norm(x, block.norm.weight, block.norm.epsilon, block.norm.shift, rest)
    gate, up = torch.cat([linear(normed, layer) for layer in block.gate_up], -1).chunk(2, -1)
    return _parted(_whole(x, rest) + linear(gated(gate, up, block.activation), block.down).float(), x.dtype)


def _whole(x: Tensor, rest: Tensor | None) -> Tensor:
    return x.float() if rest is None else x.float() + rest.float()


def _parted(total: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A sum in fp32, rounded, and what rounding took from it, which has no gradient."""
    y = total.to(dtype)
    return y, (total - y.float()).detach().to(dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    items: float | Tensor,
    changed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """fp32 softmax over logits computed in the dtype of `hidden`; labels (N,), all supervised. changed: ids and their rows."""
    if changed is not None:
        weight = weight.index_copy(0, *changed)
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum") / items


def _dense(weight: Any) -> Tensor:
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize(torch.float32)  # type: ignore[no-any-return]
