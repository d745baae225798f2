"""The table of operations: everything that has more than one implementation, with one contract each.

| operation | reference | native (C++) | torch |
`reference` is the definition. `native` runs on CPU tensors when the library is there; where it says so, bf16 only.
`torch` is our own form in torch's operations, for any device and type: taken where native cannot be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.ops import arena, blocks, cross_entropy, native, products, reference


@dataclass(frozen=True)
class Operation:
    """One row of the table. bf16: the native form takes bf16 only."""

    reference: Callable[..., Any]
    native: Callable[..., Any] | None = None
    torch: Callable[..., Any] | None = None
    bf16: bool = False


TABLE = {
    "quantize_4bit": Operation(reference.quantize_4bit, native=native.quantize_4bit),
    "dequantize_4bit": Operation(reference.dequantize_4bit, native=native.dequantize_4bit),
    "double_quantize": Operation(reference.double_quantize, native=native.double_quantize),
    "double_dequantize": Operation(reference.double_dequantize),
    "quantize_int8": Operation(reference.quantize_int8),
    "dequantize_int8": Operation(reference.dequantize_int8),
    "mixed_int8_product": Operation(reference.mixed_int8_product),
    "product": Operation(reference.product, native=native.product, torch=products.product, bf16=True),
    "outer_sum": Operation(reference.outer_sum, native=native.outer_sum, torch=products.outer_sum, bf16=True),
    "row_norms": Operation(reference.row_norms, native=native.row_norms, torch=products.row_norms, bf16=True),
    "watch": Operation(reference.watch, native=native.watch, torch=products.watch),
    "orthogonal": Operation(reference.orthogonal, native=native.orthogonal, torch=products.orthogonal),
    "add_update": Operation(reference.add_update, native=native.add_update),
    "sparse_sum": Operation(reference.sparse_sum, native=native.sparse_sum),
    "attention": Operation(reference.attention, native=blocks.attention, bf16=True),
    "rms_norm": Operation(
        lambda x, norm, rest=None: reference.rms_norm(x, norm.weight, norm.epsilon, norm.shift, rest),
        native=blocks.rms_norm,
        bf16=True,
    ),
    "attention_block": Operation(reference.attention_block, native=blocks.attention_block, bf16=True),
    "mlp_block": Operation(reference.mlp_block, native=blocks.mlp_block, bf16=True),
    "linear_cross_entropy": Operation(
        reference.linear_cross_entropy, native=cross_entropy.native_form, torch=cross_entropy.torch_form, bf16=True
    ),
}


def choose(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> tuple[Callable[..., Any], str, str]:
    """The implementation of an operation for a device and a type of the activations, the column it is from, and why."""
    row = TABLE[name]
    why = _not_native(row, device, dtype)
    if why is None:
        assert row.native is not None
        return row.native, "native", f"instruction set {native.isa()}" + (", bf16" if row.bf16 else "")
    if row.torch is not None:
        return row.torch, "torch", why
    return row.reference, "reference", why


def _not_native(row: Operation, device: torch.device | str, dtype: torch.dtype) -> str | None:
    if row.native is None:
        return "no other implementation yet"
    if torch.device(device).type != ("cpu" if arena.dry is None else "meta"):
        return "the native kernels are for the CPU"
    if row.bf16 and dtype != torch.bfloat16:
        return f"the native kernel is for bf16, not {str(dtype).removeprefix('torch.')}"
    reason = native.missing()
    return None if reason is None else f"native kernels {reason}"


def describe(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> list[dict[str, str]]:
    """What `veneer kernels` prints: each operation, the implementation chosen, and the reason."""
    return [{"operation": n, "chosen": (c := choose(n, device, dtype))[1], "reason": c[2]} for n in TABLE]


def quantize_4bit(weight: Tensor, kind: str = "nf4") -> tuple[Tensor, Tensor]:
    """Weight of any shape, n elements of fp32, bf16 or fp16 -> packed uint8 (ceil(n/2),), absmax fp32 (ceil(n/64),).

    kind: "nf4" or "fp4", the code-book.
    """
    return choose("quantize_4bit", weight.device)[0](weight, kind)  # type: ignore[no-any-return]


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
    """The weight again, value of the code * absmax in fp32 rounded once to `dtype`, in the given shape.

    With `nested` and `offset`, absmax holds the uint8 codes of `double_quantize`. out: a buffer to write into.
    """
    form = choose("dequantize_4bit", packed.device)[0]
    return form(packed, absmax, shape, dtype, nested, offset, out, kind)  # type: ignore[no-any-return]


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax fp32 (m,) -> codes uint8 (m,), nested absmax fp32 (ceil(m/256),), offset fp32 ()."""
    return choose("double_quantize", absmax.device)[0](absmax)  # type: ignore[no-any-return]


def double_dequantize(code: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """absmax fp32 (m,) from `double_quantize`'s three parts."""
    return choose("double_dequantize", code.device)[0](code, nested, offset)  # type: ignore[no-any-return]


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in), fp32, bf16 or fp16 -> codes int8 (out, in), absmax fp32 (out,)."""
    return choose("quantize_int8", weight.device)[0](weight)  # type: ignore[no-any-return]


def dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) again: code * (absmax / 127) in fp32, rounded once to `dtype`."""
    return choose("dequantize_int8", codes.device)[0](codes, absmax, dtype)  # type: ignore[no-any-return]


def mixed_int8_product(
    x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None = None, threshold: float = 6.0
) -> Tensor:
    """LLM.int8(): y (m, out) of x (m, in) and an int8 weight, x in 8 bits too but for its outlier columns. No gradient."""
    return choose("mixed_int8_product", x.device)[0](x, codes, absmax, bias, threshold)  # type: ignore[no-any-return]


def product(
    terms: Sequence[tuple[Tensor, Any, bool]], bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """y (m, n) = sum of a W^T (W (n, depth), third item true) or a W (W (depth, n)) [+ bias (n,)] [+ residual (m, n)].

    Each term is (a (m, depth), W, by_row); W is a tensor or a quantised weight (`veneer.quant`). The native form
    sums all terms in fp32 and rounds once. No gradient flows: it is for the inside of autograd functions.
    """
    a = terms[0][0]
    form = choose("product", a.device, a.dtype)[0]
    if form is native.product and not native.worth_it(terms):
        form = products.product
    return form(terms, bias, residual)  # type: ignore[no-any-return]


def outer_sum(left: Tensor, right: Tensor, *, transposed: bool = False) -> Tensor:
    """left (tokens, r), right (tokens, n) -> left^T right (r, n) in fp32; `transposed`: (n, r)."""
    return choose("outer_sum", left.device, left.dtype)[0](left, right, transposed=transposed)  # type: ignore[no-any-return]


def row_norms(
    weights: Sequence[tuple[Any, bool]], factors: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float],
    squares: Sequence[Tensor], dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Of each weight |W + scaling B A| of its rows (out,) fp32, at least `reference.TINY`. No gradient flows.

    weights: a tensor or a quantised one and `by_row`: (out, in), or (in, out) if not; factors: a (r, in) and b (out, r)
    fp32; squares (out,) fp32: |W|^2 by row. The others than the definition go from |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>:
    no dense update is made, and W A^T is multiplied in `dtype`.
    """
    form = choose("row_norms", squares[0].device, dtype)[0]
    return form(weights, factors, scalings, squares, dtype)  # type: ignore[no-any-return]


def watch(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], means: Sequence[Tensor], strays: Sequence[Tensor],
    dims: Sequence[int], beta: float,
) -> list[Tensor]:  # fmt: skip
    """What AdaLoRA keeps of its factors after a step (arXiv 2303.10512, equations 8 to 10), all tensors fp32, in place:

    mean <- beta mean + (1 - beta) v with v = |w dL/dw|, and stray <- beta stray + (1 - beta) |v - mean|.
    Returns of each tensor the average of mean * stray over all dimensions but `dim` (0, or 1 of a matrix): (size of dim,).
    """
    form = choose("watch", weights[0].device, torch.float32)[0]
    return form(weights, gradients, means, strays, dims, beta)  # type: ignore[no-any-return]


def orthogonal(matrices: Sequence[Tensor], gradients: Sequence[Tensor], dims: Sequence[int], factor: float) -> None:
    """gradient += factor (M M^T - I) M for dim 0, factor M (M^T M - I) for dim 1, fp32, in place: that of
    factor / 4 |M M^T - I|^2, or |M^T M - I|^2. A tensor of more dimensions is a matrix of `dim` and all the others."""
    choose("orthogonal", matrices[0].device, torch.float32)[0](matrices, gradients, dims, factor)


def add_update(weight: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """W + left right, summed in fp32 and rounded once: W (m, n) fp32, bf16 or fp16, left (m, r) and right (r, n) fp32.

    out: a buffer of W's shape and type to write into; it may be W. No gradient flows.
    """
    return choose("add_update", weight.device)[0](weight, left, right, out)  # type: ignore[no-any-return]


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf: `isfinite().all()` in one pass that makes nothing (18 times as fast in bf16)."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # torch can hardly compute with 8-bit floats
        tensor = tensor.float()
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor.detach()))  # a NaN is both of them


def sparse_sum(
    parts: Sequence[Tensor], weights: Sequence[float], limits: Sequence[float], seeds: Sequence[int], p: float = 0.0,
    elect: str | None = None,
) -> Tensor:  # fmt: skip
    """sum of weight * pruned (rows, width) fp32, of parts (rows, width) fp32: at most 64 in one pass.

    pruned: v where |v| >= its limit, and with p > 0 where `reference.kept` says so under its seed (below 2^32), times
    `drop_scale(p)`; else 0. elect: a part of negative weight is turned round first; each place elects the sign of the sum
    ("total"), or of the sum of signs ("frequency"), 0 being positive; the result is the mean of |weight| * pruned over the
    parts that have it, 0 where none has (TIES: Yadav et al. 2023, arXiv 2306.01708). No gradient flows.
    """
    return choose("sparse_sum", parts[0].device)[0](parts, weights, limits, seeds, p, elect)  # type: ignore[no-any-return]


def attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, starts: Tensor, scale: float
) -> Tensor:
    """Causal attention with the rotary embedding, packed rows isolated: q (T, H, W), k and v (T, G, W) -> (T, H, W).

    cos and sin fp32 (T, rotated width / 2), or None; starts int32 (rows + 1), from 0 to T. Differentiable in q, k, v.
    """
    return choose("attention", q.device, q.dtype)[0](q, k, v, cos, sin, starts, scale)  # type: ignore[no-any-return]


def rms_norm(x: Tensor, norm: blocks.Norm, rest: Tensor | None = None) -> Tensor:
    """x (T, D) -> x (mean(x^2) + epsilon)^-1/2 (weight + shift), in fp32, rounded once. Differentiable in x and weight.

    rest (T, D): what the rounding of x took from it, if it is known; so too in the two halves of a layer.
    """
    return choose("rms_norm", x.device, x.dtype)[0](x, norm, rest)  # type: ignore[no-any-return]


def attention_block(x: Tensor, block: blocks.Attention, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y (T, D) = x + o(attention(rotate(q), rotate(k), v)), q, k, v = linears(rms_norm(x)); linears with or without LoRA.

    Returns y, and its rest (T, D), of the same type: the residual stream has twice the digits of that type.
    """
    return choose("attention_block", x.device, x.dtype)[0](x, block, rest)  # type: ignore[no-any-return]


def mlp_block(x: Tensor, block: blocks.Mlp, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y (T, D) = x + down(activation(gate) * up), gate, up = linears(rms_norm(x)); all linears frozen + LoRA.

    Returns y and its rest, as `attention_block`.
    """
    return choose("mlp_block", x.device, x.dtype)[0](x, block, rest)  # type: ignore[no-any-return]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    items: float | Tensor,
    changed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Scalar fp32 sum of cross-entropies / items: hidden (N, D), weight (V, D), labels (N,), all supervised.

    changed: ids (n,), each once, and rows (n, D) in the place of the weight's; the gradient goes to these rows.
    """
    form = choose("linear_cross_entropy", hidden.device, hidden.dtype)[0]
    if weight.dtype != hidden.dtype:
        form = cross_entropy.torch_form
    return form(hidden, weight, labels, items, changed)  # type: ignore[no-any-return]
