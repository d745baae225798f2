"""A weight in 8 bits, absmax by row (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339): 8 bits a weight, 32 a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer import ops
from veneer.errors import VeneerError
from veneer.quant.four_bit import require_finite, require_weight


@dataclass
class Int8Tensor:
    """codes int8 (out, in); absmax fp32 (out,), which bitsandbytes calls SCB. Value: code * absmax / 127."""

    codes: Tensor
    absmax: Tensor
    kind = "int8"

    @classmethod
    def quantize(cls, weight: Tensor) -> Int8Tensor:
        """weight (out, in). As bitsandbytes does, by way of fp16.

        Raises:
            VeneerError: the weight is empty, not a floating-point tensor, or holds NaN, Inf or what fp16 cannot hold.
        """
        require_weight(weight, "int8")
        codes, absmax = ops.quantize_int8(weight)
        if not bool(absmax.isfinite().all()) and bool(weight.isfinite().all()):
            raise VeneerError(
                "int8: found weights beyond 65,504, which its way by fp16 cannot hold", hint="take nf4 or fp4"
            )
        require_finite(absmax, "int8")
        return cls(codes, absmax)

    @classmethod
    def hollow(cls, shape: torch.Size) -> Int8Tensor:
        """One without memory, on the meta device."""
        codes = torch.empty(shape, dtype=torch.int8, device="meta")
        return cls(codes, torch.empty(shape[0], dtype=torch.float32, device="meta"))

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return ops.dequantize_int8(self.codes, self.absmax, dtype)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes
