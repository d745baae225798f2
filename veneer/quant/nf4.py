"""A weight in NF4, with or without double quantisation: what is stored, how large it is, how it is read back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer import ops
from veneer.errors import VeneerError


@dataclass
class Nf4Tensor:
    """packed uint8 (ceil(n/2),); absmax: fp32 (ceil(n/64),), or uint8 codes when `nested_absmax` and `offset` are there."""

    packed: Tensor
    absmax: Tensor
    shape: torch.Size
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def quantize(cls, weight: Tensor, *, double_quant: bool = True) -> Nf4Tensor:
        """4.5 bits a weight, 4.127 with double quantisation.

        Raises:
            VeneerError: the weight is empty, not a floating-point tensor, or holds NaN or Inf.
        """
        if weight.numel() == 0 or not weight.is_floating_point():
            raise VeneerError(
                f"NF4: found {weight.dtype} of shape {tuple(weight.shape)}, expected floating-point weights"
            )
        packed, absmax = ops.nf4_quantize(weight)
        if not bool(torch.isfinite(absmax).all()):
            raise VeneerError(
                "NF4: found NaN or Inf in the weight", hint="the model's file is damaged or its training diverged"
            )
        if not double_quant:
            return cls(packed, absmax, weight.shape)
        codes, nested, offset = ops.double_quantize(absmax)
        return cls(packed, codes, weight.shape, nested, offset)

    def scales(self) -> Tensor:
        """absmax as fp32 (ceil(n/64),)."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        return ops.double_dequantize(self.absmax, self.nested_absmax, self.offset)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return ops.nf4_dequantize(self.packed, self.absmax, self.shape, dtype, self.nested_absmax, self.offset)

    @property
    def nbytes(self) -> int:
        parts = (self.packed, self.absmax, self.nested_absmax, self.offset)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)
