"""A frozen linear layer in 4 or 8 bits. Its dense weight exists only inside one forward or backward product, never between."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from veneer import ops
from veneer.errors import VeneerError
from veneer.quant.four_bit import FourBitTensor
from veneer.quant.int8 import Int8Tensor

QuantizedTensor: TypeAlias = FourBitTensor | Int8Tensor


def quantize(weight: Tensor, kind: str = "nf4", *, double_quant: bool = True) -> QuantizedTensor:
    """weight (out, in) to "nf4", "fp4" (with `double_quant` their constants to 8 bits) or "int8"; one on the meta device to one there.

    Raises:
        VeneerError: the weight is empty, not a floating-point tensor, or holds NaN or Inf.
    """
    if weight.is_meta:
        if kind == "int8":
            return Int8Tensor.hollow(weight.shape)
        return FourBitTensor.hollow(weight.shape, kind, double_quant=double_quant)
    if kind == "int8":
        return Int8Tensor.quantize(weight)
    return FourBitTensor.quantize(weight, kind, double_quant=double_quant)


class _Product(torch.autograd.Function):
    """y = x W^T + b with W decoded here and again in the backward pass: dx = dy W. Nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, bias: bool) -> Tensor:
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
    return x.to(torch.get_autocast_dtype(kind)) if kind != "meta" and torch.is_autocast_enabled(kind) else x


class QuantizedLinear(nn.Module):
    """y = x W^T + b, W (out, in) in NF4, FP4 or int8. Frozen: the gradient goes to x only.

    Buffers, 4-bit: weight uint8 (ceil(n/2), 1); absmax uint8 or fp32; nested_absmax and offset fp32 when double quantised.
    int8: weight int8 (out, in), absmax fp32 (out,). `.to(dtype)` changes none of them; `compute_dtype` is set once.

    x stays in its own type: LLM.int8() multiplies outlier columns of x in 16 bits and rounds the others to int8, we
    multiply all columns in 16 bits. That is nearer to the dense layer, and rounding x would have no gradient. Where
    `outlier_threshold` is set (paper: 6.0), an int8 layer without an adapter, in eval mode and without gradients, multiplies as the paper does.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    outlier_threshold: float | None = None

    def __init__(
        self, weight: QuantizedTensor, bias: Tensor | None = None, compute_dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.kind, self.compute_dtype = weight.kind, compute_dtype
        self.out_features, self.in_features = weight.shape
        parts: dict[str, Tensor | None] = {"absmax": weight.absmax, "nested_absmax": None, "offset": None}
        if isinstance(weight, Int8Tensor):
            parts |= {"weight": weight.codes}
        else:
            nested = {"nested_absmax": weight.nested_absmax, "offset": weight.offset}
            parts |= {"weight": weight.packed.view(-1, 1), **nested}
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        kind: str = "nf4",
        *,
        double_quant: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> QuantizedLinear:
        quantized = quantize(linear.weight, kind, double_quant=double_quant)
        return cls(quantized, linear.bias, compute_dtype).train(linear.training)

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    def tensor(self) -> QuantizedTensor:
        """The weight; one object as long as the buffers are the same."""
        parts = (self.weight, self.absmax, self.nested_absmax, self.offset)
        known, tensor = self.__dict__.get("_known", (None, None))
        if known is None or any(a is not b for a, b in zip(known, parts, strict=True)):
            if self.kind == "int8":
                tensor = Int8Tensor(self.weight, self.absmax)
            else:
                shape = torch.Size((self.out_features, self.in_features))
                nested = (self.nested_absmax, self.offset)
                tensor = FourBitTensor(self.weight.view(-1), self.absmax, shape, *nested, self.kind)
            self.__dict__["_known"] = (parts, tensor)
        return tensor  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_known"}  # a copy makes its own

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), made anew."""
        return self.tensor().dequantize(dtype or self.compute_dtype)

    @property
    def rounds_inputs(self) -> bool:
        """Whether x is rounded to int8 now, as far as no gradient is asked for."""
        return self.outlier_threshold is not None and self.kind == "int8" and not self.training

    def product(self, x: Tensor, bias: bool = True) -> Tensor:
        added = self.bias.detach().to(x.dtype) if bias and self.bias is not None else None
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = ops.product([(flat, self.tensor(), True)], added)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def forward(self, x: Tensor) -> Tensor:
        x = autocast(x)
        if self.bias is not None and self.bias.requires_grad:
            return _Product.apply(x, self, False) + self.bias.to(x.dtype)
        if x.requires_grad and torch.is_grad_enabled():
            return _Product.apply(x, self, True)
        if self.rounds_inputs:
            y = ops.mixed_int8_product(
                x.reshape(-1, x.shape[-1]), self.weight, self.absmax, self.bias, self.outlier_threshold or 0.0
            )
            return y.view(*x.shape[:-1], -1)
        return self.product(x)  # one token waits for this: no node of autograd where nobody asks for it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        kind = f"{self.kind}, double quantised" if self.double_quant else self.kind
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised linears of a model by name, those inside LoRA layers too."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def quantize_model(
    model: nn.Module,
    kind: str = "nf4",
    *,
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[int, int], None] | None = None,
    replaced: Callable[[Tensor], None] | None = None,
) -> list[str]:
    """Replace every `nn.Linear` but the output head by a `QuantizedLinear`, in place; returns their names.

    Each dense weight is freed as soon as its layer is done; `replaced` is called with it before. Embeddings, norms and the head stay as they are.

    Warns of how many parameters stay as they are where that is more than half: a mixture's experts, GPT-2's Conv1D.

    Raises:
        VeneerError: for every weight that is empty, not floating-point, or holds NaN or Inf; all at once. Or there is no
            `nn.Linear` but the head.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]
    if not names:
        raise VeneerError(
            f"quantize {kind}: found no linear layers in {type(model).__name__} but its head (GPT-2's Conv1D is none)",
            hint="load it without quantize",
        )
    inside = sum(model.get_submodule(name).weight.numel() for name in names)  # type: ignore[operator, union-attr]
    apart = [model.get_input_embeddings(), head] if hasattr(model, "get_input_embeddings") else []
    outside = sum(p.numel() for p in model.parameters()) - inside
    outside -= sum(p.numel() for p in {id(m.weight): m.weight for m in apart if m is not None}.values())
    if outside > inside:
        warnings.warn(
            f"quantize {kind}: {inside:,} parameters in linear layers; {outside:,} stay in 16 bits, as a mixture's experts do",
            stacklevel=3,
        )
    problems: list[str] = []
    for done, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        linear = getattr(owner, child)
        try:
            layer = QuantizedLinear.from_linear(linear, kind, double_quant=double_quant, compute_dtype=compute_dtype)
        except VeneerError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
            continue
        setattr(owner, child, layer)
        if replaced is not None:
            replaced(linear.weight)
        del linear
        if progress is not None:
            progress(done + 1, len(names))
    if problems:
        raise VeneerError(problems, hint="the model's file is damaged or its training diverged")
    return names
