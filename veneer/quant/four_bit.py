"""A weight in NF4 or FP4, with or without double quantisation: what is stored, how large it is, how it is read back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer import ops
from veneer.errors import VeneerError
from veneer.ops.reference import BLOCK, CODE_BOOKS, NESTED_BLOCK


@dataclass
class FourBitTensor:
    """packed uint8 (ceil(n/2),); absmax: fp32 (ceil(n/64),), or uint8 codes when `nested_absmax` and `offset` are there.

    kind: "nf4" or "fp4" (Dettmers et al. 2023, QLoRA, arXiv 2305.14314).
    """

    packed: Tensor
    absmax: Tensor
    shape: torch.Size
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None
    kind: str = "nf4"

    @classmethod
    def quantize(cls, weight: Tensor, kind: str = "nf4", *, double_quant: bool = True) -> FourBitTensor:
        """4.5 bits a weight, 4.127 with double quantisation.

        Raises:
            VeneerError: the weight is empty, not a floating-point tensor, or holds NaN or Inf.
        """
        require_weight(weight, kind)
        packed, absmax = ops.quantize_4bit(weight, kind)
        require_finite(absmax, kind)
        if not double_quant:
            return cls(packed, absmax, weight.shape, kind=kind)
        codes, nested, offset = ops.double_quantize(absmax)
        return cls(packed, codes, weight.shape, nested, offset, kind)

    @classmethod
    def hollow(cls, shape: torch.Size, kind: str = "nf4", *, double_quant: bool = True) -> FourBitTensor:
        """One without memory, on the meta device."""
        n = shape.numel()
        blocks = -(-n // BLOCK)
        packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device="meta")
        absmax = torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32, device="meta")
        if not double_quant:
            return cls(packed, absmax, shape, kind=kind)
        nested = torch.empty(-(-blocks // NESTED_BLOCK), dtype=torch.float32, device="meta")
        return cls(packed, absmax, shape, nested, torch.empty((), dtype=torch.float32, device="meta"), kind)

    def nearest(self, weight: Tensor) -> FourBitTensor:
        """Another weight of this shape in the codes nearest to it under the scales that this one has."""
        scales = self.scales().repeat_interleave(BLOCK)[: weight.numel()]
        book = CODE_BOOKS[self.kind]
        scaled = weight.detach().float().reshape(-1).cpu() / scales.cpu().clamp(min=torch.finfo(torch.float32).tiny)
        code = book.order[torch.bucketize(scaled, book.midpoints)].to(torch.uint8)
        code = torch.nn.functional.pad(code, (0, code.numel() % 2))
        packed = (code[0::2] << 4 | code[1::2]).to(self.packed.device)
        return FourBitTensor(packed, self.absmax, self.shape, self.nested_absmax, self.offset, self.kind)

    def scales(self) -> Tensor:
        """absmax as fp32 (ceil(n/64),)."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        return ops.double_dequantize(self.absmax, self.nested_absmax, self.offset)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        parts = (self.packed, self.absmax, self.shape, dtype, self.nested_absmax, self.offset)
        return ops.dequantize_4bit(*parts, kind=self.kind)

    @property
    def nbytes(self) -> int:
        parts = (self.packed, self.absmax, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)


def require_weight(weight: Tensor, kind: str) -> None:
    """Raise VeneerError for what cannot be quantised: nothing, or whole numbers."""
    if weight.numel() == 0 or not weight.is_floating_point():
        found = f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise VeneerError(f"{kind}: found {found}, expected floating-point weights, at least one")


def require_finite(absmax: Tensor, kind: str) -> None:
    """Raise VeneerError when the absmax of some weights is not a number or infinite: then a weight is."""
    if not bool(torch.isfinite(absmax).all()):
        raise VeneerError(
            f"{kind}: found NaN or Inf in the weight", hint="the model's file is damaged or its training diverged"
        )
