"""A frozen 4-bit linear layer. The dense weight exists only inside one forward or backward product, never between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer import ops
from veneer.quant.nf4 import Nf4Tensor


class _Nf4Product(torch.autograd.Function):
    """y = x W^T + b with W decoded here and again in the backward pass: dx = dy W. Nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear, bias: bool) -> Tensor:
        ctx.layer = layer
        return layer.product(x, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        dx = ops.product([(dy.reshape(-1, dy.shape[-1]), ctx.layer.tensor(), False)])
        return dx.view(*dy.shape[:-1], -1), None, None


def autocast(x: Tensor) -> Tensor:
    """x in the type that an active `torch.autocast` asks of linear layers; our own functions do not see it otherwise."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Nf4Linear(nn.Module):
    """y = x W^T + b, W (out, in) in NF4. Frozen: the gradient goes to x only.

    Buffers: weight uint8 (ceil(n/2), 1); absmax uint8 or fp32; nested_absmax and offset fp32 when double quantised.
    `.to(dtype)` changes none of them: codes and constants keep their types, `compute_dtype` is set once.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def __init__(
        self, weight: Nf4Tensor, bias: Tensor | None = None, compute_dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        self.register_buffer("weight", weight.packed.view(-1, 1))
        self.register_buffer("absmax", weight.absmax)
        self.register_buffer("nested_absmax", weight.nested_absmax)
        self.register_buffer("offset", weight.offset)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, double_quant: bool = True, compute_dtype: torch.dtype = torch.bfloat16
    ) -> Nf4Linear:
        quantized = Nf4Tensor.quantize(linear.weight, double_quant=double_quant)
        return cls(quantized, linear.bias, compute_dtype).train(linear.training)

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    def tensor(self) -> Nf4Tensor:
        """The weight; one object as long as the buffers are the same."""
        parts = (self.weight, self.absmax, self.nested_absmax, self.offset)
        known, tensor = self.__dict__.get("_known", (None, None))
        if known is None or any(a is not b for a, b in zip(known, parts, strict=True)):
            shape = torch.Size((self.out_features, self.in_features))
            tensor = Nf4Tensor(self.weight.view(-1), self.absmax, shape, self.nested_absmax, self.offset)
            self.__dict__["_known"] = (parts, tensor)
        return tensor  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_known"}  # a copy makes its own

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), made anew."""
        return self.tensor().dequantize(dtype or self.compute_dtype)

    def product(self, x: Tensor, bias: bool = True) -> Tensor:
        added = self.bias.detach().to(x.dtype) if bias and self.bias is not None else None
        y = ops.product([(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), self.tensor(), True)], added)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def forward(self, x: Tensor) -> Tensor:
        x = autocast(x)
        if self.bias is not None and self.bias.requires_grad:
            return _Nf4Product.apply(x, self, False) + self.bias.to(x.dtype)
        if x.requires_grad and torch.is_grad_enabled():
            return _Nf4Product.apply(x, self, True)
        return self.product(x)  # one token waits for this: no node of autograd where nobody asks for it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nf4Linear:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        kind = "nf4, double quantised" if self.double_quant else "nf4"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"


def quantize_model(
    model: nn.Module,
    *,
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Replace every `nn.Linear` but the output head by an `Nf4Linear`, in place; returns their names.

    Each dense weight is freed as soon as its layer is done. Embeddings, norms and the head stay as they are.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]
    for done, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer = Nf4Linear.from_linear(getattr(owner, child), double_quant=double_quant, compute_dtype=compute_dtype)
        setattr(owner, child, layer)
        if progress is not None:
            progress(done + 1, len(names))
    return names
