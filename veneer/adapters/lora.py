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

from veneer import ops
from veneer.errors import VeneerError
from veneer.ops.blocks import AdaptedLinear
from veneer.quant.linear import QuantizedLinear, autocast

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class LoraFunction(torch.autograd.Function):
    """`ops.reference.linear` on a frozen base in one node.

    Saves x and h = scaling x A^T (r columns), nothing of the base: a 4-bit weight is decoded again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: nn.Linear | QuantizedLinear, scaling: float) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        scaled, b_ = (a * scaling).to(x.dtype), b.to(x.dtype)
        h_NR = ops.product([(x_ND, scaled, True)])
        bias = None if base.bias is None else base.bias.to(x.dtype)
        y_NO = ops.product([(x_ND, frozen_weight(base, x.dtype), True), (h_NR, b_, True)], bias)
        ctx.save_for_backward(x_ND, h_NR, scaled, b_)
        ctx.base, ctx.scaling, ctx.shape, ctx.types = base, scaling, x.shape, (a.dtype, b.dtype)
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, h_NR, scaled, b_ = ctx.saved_tensors
        dy_NO = dy.reshape(-1, dy.shape[-1])
        dh_NR = ops.product([(dy_NO, b_, False)])
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            weight = frozen_weight(ctx.base, dy.dtype)
            dx = ops.product([(dy_NO, weight, False), (dh_NR, scaled, False)]).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            da = ops.outer_sum(dh_NR, x_ND).mul_(ctx.scaling).to(ctx.types[0])
        if ctx.needs_input_grad[2]:
            db = ops.outer_sum(h_NR, dy_NO, transposed=True).to(ctx.types[1])
        return dx, da, db, None, None


def frozen_weight(base: nn.Linear | QuantizedLinear, dtype: torch.dtype) -> Any:
    """The weight (out, in) of a frozen linear as `ops.product` takes it: a tensor in `dtype`, or the 4-bit one."""
    return base.tensor() if isinstance(base, QuantizedLinear) else base.weight.detach().to(dtype)


class LoraLinear(nn.Module):
    """A frozen `nn.Linear` or `QuantizedLinear` and its adapters, of which at most one is active.

    With no active adapter it is the base, exactly. `weight`, `bias`, `in_features` and `out_features` are the base's.
    """

    def __init__(self, base_layer: nn.Linear | QuantizedLinear) -> None:
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
        x = autocast(x)
        a, b, scaling = self.lora_A[self.active], self.lora_B[self.active], self.scaling[self.active]
        dropout = self.dropout[self.active] if self.training else 0.0
        if dropout > 0:
            h = F.dropout(x, dropout) @ a.to(x.dtype).T
            return self.base_layer(x) + scaling * (h @ b.to(x.dtype).T)
        return LoraFunction.apply(x, a, b, self.base_layer, scaling)

    def frozen(self) -> AdaptedLinear:
        """This layer as the fused halves of a transformer layer take it; with dropout at work, with a mask of its own.

        The mask's seed is drawn from torch's generator: `torch.manual_seed` decides it.
        """
        if self.active is None:
            return plain_linear(self.base_layer)
        linear = plain_linear(self.base_layer)._replace(
            a=self.lora_A[self.active], b=self.lora_B[self.active], scaling=self.scaling[self.active]
        )
        dropout = self.dropout[self.active] if self.training else 0.0
        return linear._replace(dropout=dropout, seed=int(torch.randint(2**32, ()))) if dropout else linear

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: r={self.rank(name)}" for name in self.lora_A)
        return f"in_features={self.in_features}, out_features={self.out_features}, adapters={{{ranks}}}"


def plain_linear(layer: nn.Linear | QuantizedLinear) -> AdaptedLinear:
    """A layer without an adapter, as the fused halves take it."""
    return AdaptedLinear(frozen_weight(layer, torch.bfloat16), layer.bias)


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
