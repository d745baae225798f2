"""The LoRA layer: a frozen linear, dense or 4-bit, with named low-rank adapters beside it.

    y = x W^T + b + scaling * dropout(x) A^T B^T,    A (r, in), B (out, r)        (Hu et al. 2021, arXiv 2106.09685)

Adapters are kept in fp32. They are multiplied in the dtype of x: on bf16 activations the products are bf16
with fp32 accumulation inside the matrix product, on fp32 activations nothing is rounded.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.errors import VeneerError
from veneer.quant.linear import Nf4Linear

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def lora_reference(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The definition, in plain torch; `LoraFunction` must equal it, gradients included."""
    return F.linear(x, weight, bias) + scaling * ((x @ a.to(x.dtype).T) @ b.to(x.dtype).T)


def base_weight(base: nn.Linear | Nf4Linear, dtype: torch.dtype) -> Tensor:
    """The dense (out, in) weight of a frozen linear in `dtype`; a 4-bit one is decoded anew each time."""
    return base.dequantize(dtype) if isinstance(base, Nf4Linear) else base.weight.to(dtype)


class LoraFunction(torch.autograd.Function):
    """`lora_reference` on a frozen base in one node.

    Saves x and h = x A^T (r columns), nothing of the base: a 4-bit weight is decoded again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: nn.Linear | Nf4Linear, scaling: float) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        h_NR = x_ND @ a.to(x.dtype).T
        y_NO = F.linear(x_ND, base_weight(base, x.dtype), None if base.bias is None else base.bias.to(x.dtype))
        y_NO.addmm_(h_NR, b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x_ND, h_NR, a, b)
        ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, h_NR, a, b = ctx.saved_tensors
        dy_NO = dy.reshape(-1, dy.shape[-1])
        dh_NR = (dy_NO @ b.to(dy.dtype)).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy_NO @ base_weight(ctx.base, dy.dtype)
            dx.addmm_(dh_NR, a.to(dy.dtype))
            dx = dx.view(ctx.shape)
        da = (dh_NR.T @ x_ND).to(a.dtype) if ctx.needs_input_grad[1] else None
        db = (dy_NO.T @ h_NR).to(b.dtype).mul_(ctx.scaling) if ctx.needs_input_grad[2] else None
        return dx, da, db, None, None


class LoraLinear(nn.Module):
    """A frozen `nn.Linear` or `Nf4Linear` and its adapters, of which at most one is active.

    With no active adapter it is the base, exactly. `weight`, `bias`, `in_features` and `out_features` are the base's.
    """

    def __init__(self, base_layer: nn.Linear | Nf4Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active: str | None = None

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def add(self, name: str, a: Tensor, b: Tensor, *, scaling: float, dropout: float = 0.0) -> None:
        """Add an adapter: A (r, in), B (out, r), kept in fp32 on the base's device."""
        if a.shape[1:] != (self.in_features,) or b.shape != (self.out_features, a.shape[0]):
            raise VeneerError(
                f"adapter {name!r}: found A {tuple(a.shape)} and B {tuple(b.shape)}, "
                f"expected (r, {self.in_features}) and ({self.out_features}, r)"
            )
        device = self.weight.device
        self.lora_A[name] = nn.Parameter(a.to(device=device, dtype=torch.float32))
        self.lora_B[name] = nn.Parameter(b.to(device=device, dtype=torch.float32))
        self.scaling[name], self.dropout[name] = scaling, dropout

    def remove(self, name: str) -> None:
        del self.lora_A[name], self.lora_B[name], self.scaling[name], self.dropout[name]
        if self.active == name:
            self.active = None

    def rank(self, name: str) -> int:
        return int(self.lora_A[name].shape[0])

    def delta(self, name: str) -> Tensor:
        """The update scaling * B A, shape (out, in), fp32."""
        return self.scaling[name] * (self.lora_B[name].detach() @ self.lora_A[name].detach())

    def forward(self, x: Tensor) -> Tensor:
        if self.active is None:
            return self.base_layer(x)
        a, b, scaling = self.lora_A[self.active], self.lora_B[self.active], self.scaling[self.active]
        dropout = self.dropout[self.active] if self.training else 0.0
        if dropout > 0:
            h = F.dropout(x, dropout) @ a.to(x.dtype).T
            return self.base_layer(x) + scaling * (h @ b.to(x.dtype).T)
        return LoraFunction.apply(x, a, b, self.base_layer, scaling)

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: r={self.rank(name)}" for name in self.lora_A)
        return f"in_features={self.in_features}, out_features={self.out_features}, adapters={{{ranks}}}"


def initial_factors(
    r: int, in_features: int, out_features: int, init: str = "kaiming", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) in fp32 at step 0: B is zero, so the adapted layer is the base.

    kaiming: A uniform in +-1/sqrt(in), which is Kaiming-uniform with a = sqrt(5); gaussian: A ~ N(0, 1/r^2), as PEFT does.
    """
    a = torch.empty(r, in_features)
    if init == "kaiming":
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    elif init == "gaussian":
        nn.init.normal_(a, std=1 / r, generator=generator)
    else:
        raise VeneerError(f"init: found {init!r}, expected kaiming or gaussian")
    return a, torch.zeros(out_features, r)


def check_adapter_name(name: str) -> str:
    """Names become file and parameter names, so only letters, digits, `_` and `-` are allowed."""
    if not ADAPTER_NAME.fullmatch(name):
        raise VeneerError(f"adapter name: found {name!r}, expected 1 to 64 letters, digits, _ or -")
    return name
