"""Adapters on the experts of a mixture, which are no layers: all of a block's experts are one 3-D parameter of a module.

    W'_e = W_e + scaling * B_e A_e     for each expert e of E

W (E, out, in), or (E, in, out) where the module says `is_transposed`. As PEFT's `target_parameters` has it, the factors of all
experts lie in two matrices: A (r E, in), one expert after the other; B (out, r E), for each of the r the experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from veneer import ops
from veneer.adapters.lora import LoraLayer
from veneer.quant.linear import autocast


class ExpertsFunction(torch.autograd.Function):
    """y = x W_e^T + (scaling x A_e^T) B_e^T for rows x sorted by expert; no update of a weight's size is ever made.

    Saves x and h = scaling x A^T (r columns). ends: where each expert's rows end.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, weight: Tensor, ends: list[int], scaling: float,
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        y = x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])
        h = None if a is None else x.new_empty(x.shape[0], a.shape[0] // weight.shape[0])
        for e, rows in _rows(ends):
            terms = [(x[rows], weight[e], not transposed)]
            if a is not None and b is not None and h is not None:
                a_e, b_e = _factors(a, b, e, len(ends), x.dtype)
                h[rows] = ops.product([(x[rows], a_e * scaling, True)])
                terms.append((h[rows], b_e, True))
            y[rows] = ops.product(terms)
        ctx.save_for_backward(x, h, a, b)
        ctx.weight, ctx.ends, ctx.scaling, ctx.transposed = weight, ends, scaling, transposed
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        experts, dy = len(ctx.ends), dy.contiguous()
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        da = torch.zeros(a.shape, device=x.device) if ctx.needs_input_grad[1] else None
        db = torch.zeros(b.shape, device=x.device) if ctx.needs_input_grad[2] else None
        for e, rows in _rows(ctx.ends):
            terms = [(dy[rows], ctx.weight[e], ctx.transposed)]
            if a is not None:
                a_e, b_e = _factors(a, b, e, experts, x.dtype)
                dh = ops.product([(dy[rows], b_e, False)])
                terms.append((dh, a_e * ctx.scaling, False))
                if da is not None:
                    da.view(experts, -1, a.shape[1])[e] = ops.outer_sum(dh, x[rows]) * ctx.scaling
                if db is not None:
                    db.view(b.shape[0], -1, experts)[..., e] = ops.outer_sum(h[rows], dy[rows], transposed=True)
            if dx is not None:
                dx[rows] = ops.product(terms)
        return (
            dx,
            None if da is None else da.to(a.dtype),
            None if db is None else db.to(b.dtype),
            None,
            None,
            None,
            None,
        )


def _rows(ends: list[int]) -> list[tuple[int, slice]]:
    """Each expert that has rows, and which they are."""
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]


def _factors(a: Tensor, b: Tensor, e: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A_e (r, in) and B_e (out, r) of one expert."""
    return a.view(experts, -1, a.shape[1])[e].to(dtype), b.view(b.shape[0], -1, experts)[..., e].to(dtype).contiguous()


class ExpertsWeight(torch.autograd.Function):
    """W + scaling * B A of all experts at once, in W's dtype; the gradients of A and B come from W's, one expert at a time."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, a: Tensor, b: Tensor, scaling: float, transposed: bool, again: _Again
    ) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.scaling, ctx.transposed, ctx.again = scaling, transposed, again
        return _added(weight, a, b, scaling, transposed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        experts = dw.shape[0]
        ctx.again.weight = None  # all that used it have had their turn
        da, db = torch.empty_like(a), torch.empty_like(b)
        for e in range(experts):
            a_e, b_e = _factors(a, b, e, experts, a.dtype)
            dw_e = (dw[e].T if ctx.transposed else dw[e]).to(a.dtype)
            da.view(experts, -1, a.shape[1])[e] = ctx.scaling * (b_e.T @ dw_e)
            db.view(b.shape[0], -1, experts)[..., e] = ctx.scaling * (dw_e @ a_e.T)
        return None, da, db, None, None, None


class _Again:
    """W' for the backward pass of what used it, which keeps this instead: made at the first use, let go after the last."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts
        self.weight: Tensor | None = None

    @torch.no_grad()
    def view(self, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        if self.weight is None:
            self.weight = _added(*self.parts)
        return self.weight.as_strided(size, stride, offset)


def _added(weight: Tensor, a: Tensor, b: Tensor, scaling: float, transposed: bool) -> Tensor:
    """W + scaling * B A in W's dtype, summed in the factors'."""
    total = torch.empty_like(weight)
    for e in range(weight.shape[0]):
        a_e, b_e = _factors(a, b, e, weight.shape[0], a.dtype)
        update = scaling * (b_e @ a_e)
        total[e] = weight[e].to(a.dtype) + (update.T if transposed else update)
    return total


class LoraParameter(LoraLayer):
    """Of one 3-D parameter; it computes nothing by itself, the module whose parameter it is does (`LoraExperts`)."""

    def __init__(self, owner: nn.Module, key: str) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # the owner is the base of `LoraExperts`: it must have one name only
        self.__dict__["owner"], self.key = owner, key
        self.transposed = bool(getattr(owner, "is_transposed", False))
        self.experts, first, second = self.weight.shape
        self.out_features, self.in_features = (second, first) if self.transposed else (first, second)

    @property
    def weight(self) -> Tensor:
        return getattr(self.owner, self.key)  # type: ignore[no-any-return]

    def dense(self, base: Any = None) -> Tensor:
        return self.weight.detach().float()

    def rank_of(self, a: Tensor) -> int:
        return int(a.shape[0]) // self.experts

    def shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r * self.experts, self.in_features), (self.out_features, r * self.experts)

    def _update(self, a: Tensor, b: Tensor) -> Tensor:
        zero = torch.zeros(self.weight.shape, device=a.device)
        return _added(zero, a, b, 1.0, self.transposed)

    def as_matrices(self, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        middle = self.experts // 2
        w = weight[middle]
        return w.T if self.transposed else w, *_factors(a, b, middle, self.experts, a.dtype)

    def of_expert(self, name: str, expert: int) -> tuple[Tensor, Tensor]:
        """L and R, fp32, for which L R is an adapter's update of one expert in the layout of the weight."""
        a, b = self.lora_A[name].detach().float(), self.lora_B[name].detach().float()
        a, b = _factors(a, b, expert, self.experts, a.dtype)
        return (self.scaling[name] * a.T, b.T) if self.transposed else (self.scaling[name] * b, a)

    def active_factors(self) -> tuple[Tensor, Tensor, float]:
        """A, B and the scaling of the active adapter."""
        assert self.active is not None
        return self.lora_A[self.active].float(), self.lora_B[self.active].float(), self.scaling[self.active]

    def merged(self, name: str) -> Tensor:
        """As every layer's, but in the weight's own dtype: all experts in fp32 at once would be a lot."""
        a, b = self.lora_A[name].detach().float(), self.lora_B[name].detach().float()
        return _added(self.weight.detach(), a, b, self.scaling[name], self.transposed)


class LoraExperts(nn.Module):
    """A module with 3-D parameters, and the adapters of those (`LoraParameter`) under the parameters' own names.

    The classes transformers calls experts (`use_experts_implementation`) compute on sorted rows here while an adapter is
    active, whichever implementation is set: they add low-rank products and never make W'. Any other module runs its own
    forward on W', made again in the backward pass. With no adapter active the module is the base, exactly.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer

    def part(self, key: str) -> LoraParameter:
        """The adapters of one parameter, made if there are none yet."""
        if key not in self._modules:
            self._modules[key] = LoraParameter(self.base_layer, key).train(self.training)
        return self._modules[key]  # type: ignore[return-value]

    def parts(self) -> dict[str, LoraParameter]:
        return {key: part for key, part in self._modules.items() if isinstance(part, LoraParameter)}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # a parent may ask for `num_experts` and the like

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        active = {key: part for key, part in self.parts().items() if part.active is not None}
        if not active:
            return self.base_layer(*args, **kwargs)
        if len(args) == 3 and not kwargs and _is_known(self.base_layer, active):
            return _forward(self.base_layer, active, *args)
        return self._on_merged(active, args, kwargs)

    def _on_merged(self, active: dict[str, LoraParameter], args: Any, kwargs: Any) -> Any:
        weights, again = {}, {}
        for key, part in active.items():
            parts = (part.weight, *part.active_factors(), part.transposed)
            made = _Again(*parts)
            weights[key] = ExpertsWeight.apply(*parts, made)
            again[weights[key].untyped_storage().data_ptr()] = made

        def keep(t: Tensor) -> Any:
            made = again.get(t.untyped_storage().data_ptr())
            return t if made is None else (made, t.size(), t.stride(), t.storage_offset())

        def give(kept: Any) -> Tensor:
            return kept[0].view(*kept[1:]) if isinstance(kept, tuple) else kept

        with torch.autograd.graph.saved_tensors_hooks(keep, give):
            return functional_call(self.base_layer, weights, args, kwargs)


def _is_known(base: Any, active: dict[str, LoraParameter]) -> bool:
    """Whether `_forward` computes what this module does: transformers' mark is on its class, all experts are here."""
    if not hasattr(type(base), "_apply_gate") or getattr(base, "_is_expert_parallel", True):
        return False
    names = {"gate_up_proj" if base.has_gate else "up_proj", "down_proj"}
    return active.keys() <= names and not any(getattr(base, name).requires_grad for name in names)


def _forward(
    base: Any, active: dict[str, LoraParameter], hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts' sum for hidden (T, D), experts and weights of each token (T, k): as transformers' `grouped_mm` has it."""
    k = top_k_index.shape[-1]
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    if hidden.is_meta:  # a plan: as many rows for each
        ends = [len(expert) * (e + 1) // base.num_experts for e in range(base.num_experts)]
    else:
        ends = torch.bincount(expert, minlength=base.num_experts).cumsum(0).tolist()

    def linear(x: Tensor, key: str) -> Tensor:
        part, weight = active.get(key), getattr(base, key)
        a, b, scaling = (None, None, 1.0) if part is None else part.active_factors()
        y = ExpertsFunction.apply(x.to(weight.dtype), a, b, weight, ends, scaling, base.is_transposed)
        return y + getattr(base, f"{key}_bias")[expert] if base.has_bias else y

    x = autocast(hidden)[order // k]
    y = base._apply_gate(linear(x, "gate_up_proj")) if base.has_gate else base.act_fn(linear(x, "up_proj"))
    y = linear(y, "down_proj")
    if base.has_post_expert_norm:
        y = base.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order, None]
    return y[torch.argsort(order)].view(-1, k, y.shape[-1]).sum(1).to(hidden.dtype)
