"""The table of operations: everything that has more than one implementation, with one contract each.

| operation | reference | native (C++) | triton |
Tensors on the CPU take the native column when the library is there; what is missing falls to the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.ops import cross_entropy, native, reference


@dataclass(frozen=True)
class Operation:
    """One row: the definition in plain torch and, where there is one, the native or the fused form."""

    reference: Callable[..., Any]
    native: Callable[..., Any] | None = None
    torch: Callable[..., Any] | None = None  # our own autograd in torch ops, for any device


TABLE = {
    "nf4_quantize": Operation(reference.nf4_quantize, native=native.nf4_quantize),
    "nf4_dequantize": Operation(reference.nf4_dequantize, native=native.nf4_dequantize),
    "double_quantize": Operation(reference.double_quantize),
    "double_dequantize": Operation(reference.double_dequantize),
    "linear_cross_entropy": Operation(
        cross_entropy.linear_cross_entropy_reference, torch=cross_entropy.linear_cross_entropy
    ),
}


def choose(name: str, device: torch.device | str = "cpu") -> tuple[Callable[..., Any], str, str]:
    """The implementation of an operation for a device, the column it is from, and why."""
    row = TABLE[name]
    if row.torch is not None:
        return row.torch, "torch", "in pieces, gradient in the forward pass"
    if row.native is None:
        return row.reference, "reference", "no other implementation yet"
    if torch.device(device).type != "cpu":
        return row.reference, "reference", "the native kernels are for the CPU"
    reason = native.missing()
    if reason is not None:
        return row.reference, "reference", f"native kernels {reason}"
    return row.native, "native", f"instruction set {native.isa()}"


def describe(device: torch.device | str = "cpu") -> list[dict[str, str]]:
    """What `veneer kernels` prints: each operation, the implementation chosen, and the reason."""
    return [{"operation": n, "chosen": (c := choose(n, device))[1], "reason": c[2]} for n in TABLE]


def nf4_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight of any shape, n elements of fp32, bf16 or fp16 -> packed uint8 (ceil(n/2),), absmax fp32 (ceil(n/64),)."""
    return choose("nf4_quantize", weight.device)[0](weight)  # type: ignore[no-any-return]


def nf4_dequantize(packed: Tensor, absmax: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight again, code * absmax in fp32 rounded once to `dtype`, in the given shape."""
    return choose("nf4_dequantize", packed.device)[0](packed, absmax, shape, dtype)  # type: ignore[no-any-return]


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax fp32 (m,) -> codes uint8 (m,), nested absmax fp32 (ceil(m/256),), offset fp32 ()."""
    return choose("double_quantize", absmax.device)[0](absmax)  # type: ignore[no-any-return]


def double_dequantize(code: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """absmax fp32 (m,) from `double_quantize`'s three parts."""
    return choose("double_dequantize", code.device)[0](code, nested, offset)  # type: ignore[no-any-return]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, items: float | Tensor) -> Tensor:
    """Scalar fp32 sum of cross-entropies / items: hidden (N, D), weight (V, D), labels (N,), all supervised."""
    return choose("linear_cross_entropy", hidden.device)[0](hidden, weight, labels, items)  # type: ignore[no-any-return]
