"""Layers with named low-rank adapters beside a frozen weight: linears, dense or 4-bit, convolutions, embeddings.

    W' = W + scaling * B A,    A (r, in), B (out, r)                              (LoRA: Hu et al. 2021, arXiv 2106.09685)
    W' = m (W + scaling * B A) / |W + scaling * B A|,    m (out,), norms of rows  (DoRA: Liu et al. 2024, arXiv 2402.09353)
    W' = W + scaling * B diag(E) A,    E (r,)                     (AdaLoRA: Zhang et al. 2023, arXiv 2303.10512; `adalora`)

Adapters are kept in fp32, or A and B in 16 bits where that is asked for. They are multiplied in the dtype of x: on bf16 activations the products are bf16
with fp32 accumulation inside the matrix product, on fp32 activations nothing is rounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from veneer import ops
from veneer.errors import VeneerError
from veneer.ops.blocks import AdaptedLinear
from veneer.ops.reference import TINY
from veneer.quant.linear import QuantizedLinear, autocast

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
Linear: TypeAlias = nn.Linear | QuantizedLinear | Conv1D
ROWS_AT_ONCE = 1 << 18  # elements of rows that are merged in fp32 at a time
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LoraFunction(torch.autograd.Function):
    """`ops.reference.linear` on a frozen base in one node.

    Saves x and h = scaling x A^T (r columns), nothing of the base: a 4-bit weight is decoded again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: Linear, scaling: float, bias: bool) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        scaled, b_ = (a * scaling).to(x.dtype), b.to(x.dtype)
        h_NR = ops.product([(x_ND, scaled, True)])
        added = base.bias.detach().to(x.dtype) if bias and base.bias is not None else None
        y_NO = ops.product([(x_ND, *frozen_weight(base, x.dtype)), (h_NR, b_, True)], added)
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
            weight, by_row = frozen_weight(ctx.base, dy.dtype)
            dx = ops.product([(dy_NO, weight, not by_row), (dh_NR, scaled, False)]).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            da = ops.outer_sum(dh_NR, x_ND).mul_(ctx.scaling).to(ctx.types[0])
        if ctx.needs_input_grad[2]:
            db = ops.outer_sum(h_NR, dy_NO, transposed=True).to(ctx.types[1])
        return dx, da, db, None, None, None


class ScaledRows(torch.autograd.Function):
    """unit * diag(E) A of A (r, ...) and E (r,): AdaLoRA makes it in every layer of every step, so in few calls."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, diagonal: Tensor, unit: float) -> Tensor:
        scale = (diagonal * unit).view(-1, *[1] * (a.dim() - 1))
        ctx.save_for_backward(a, scale)
        ctx.unit = unit
        return a * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        a, scale = ctx.saved_tensors
        d_diagonal = torch.linalg.vecdot(d.flatten(1), a.flatten(1)).mul_(ctx.unit) if ctx.needs_input_grad[1] else None
        return d * scale if ctx.needs_input_grad[0] else None, d_diagonal, None


def frozen_weight(base: Linear, dtype: torch.dtype) -> tuple[Any, bool]:
    """The weight of a frozen linear as `ops.product` takes it: a tensor in `dtype` or the 4-bit one, and whether it lies
    as (out, in); transformers' Conv1D has (in, out)."""
    if isinstance(base, QuantizedLinear):
        return base.tensor(), True
    return base.weight.detach().to(dtype), not isinstance(base, Conv1D)


class LoraLayer(nn.Module):
    """A frozen layer and its adapters, of which at most one is active. With none active it is the base, exactly.

    A subclass says how its factors lie (`shapes`), what they add up to (`_update`) and what the layer computes.
    `weight` and `bias` are the base's.
    """

    KEYS = ("lora_A.weight", "lora_B.weight")  # what PEFT's files call the factors
    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_E = nn.ParameterDict()  # AdaLoRA's diagonal (r,)
        self.magnitude = nn.ParameterDict()  # DoRA's m, shaped to multiply the weight
        self.lora_bias = nn.ParameterDict()  # of B (out,): y + scaling * bias
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active: str | None = None
        self.began: dict[str, tuple[Tensor, Tensor]] = {}  # A and B at step 0 of adapters that have a base of their own
        self.bases: dict[str | None, Any] = {}  # those bases, and under None the layer's; `base_layer` is one of them

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and of B at rank r."""
        return (r, self.in_features), (self.out_features, r)

    @property
    def sides(self) -> tuple[int, int]:
        """Of the matrix that the update is: no rank is above the smaller one."""
        return self.out_features, self.in_features

    def start(self, r: int, init: str, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A and B in fp32 at step 0, whose update is zero."""
        a, b = self.shapes(r)
        return initial_factor(a, r, init, generator), torch.zeros(b)

    def add(
        self,
        name: str,
        a: Tensor,
        b: Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        magnitude: Tensor | None = None,
        diagonal: Tensor | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Add an adapter on the base's device: A and B shaped as `shapes` says, kept in `dtype`; in fp32 with a magnitude
        it is DoRA, with a diagonal (r,) AdaLoRA; bias (out,) is B's."""
        expected = self.shapes(self.rank_of(a))
        if (tuple(a.shape), tuple(b.shape)) != expected:
            raise VeneerError(
                f"adapter {name!r}: found A {tuple(a.shape)} and B {tuple(b.shape)}, expected {expected[0]} and {expected[1]}"
            )
        for factors, value in zip(self.factors(), (a, b, diagonal, magnitude, bias), strict=True):
            if value is not None:
                kept = dtype if factors in (self.lora_A, self.lora_B) else torch.float32
                factors[name] = nn.Parameter(value.to(device=self.weight.device, dtype=kept))
        self.scaling[name], self.dropout[name] = scaling, dropout

    def remove(self, name: str) -> None:
        if self.active == name:
            self.use(None)
        for factors in (*self.factors(), self.scaling, self.dropout, self.began, self.bases):
            if name in factors:
                del factors[name]  # type: ignore[attr-defined]

    def use(self, name: str | None) -> None:
        """Make an adapter of this layer the active one, on the base it belongs to; None: the bare base."""
        self.active = name if name in self.lora_A else None
        base = self.base_of(self.active)
        if base is not self.base_layer:
            self.base_layer = base.train(self.base_layer.training)

    def base_of(self, name: str | None) -> Any:
        """What stands under an adapter: a base of its own (PiSSA, LoftQ: `starts.py`), or the layer's."""
        return self.bases.get(name, self.bases.get(None, self.base_layer))

    def put_base(self, name: str, base: nn.Module) -> None:
        """Give an adapter, as it is at step 0, a base of its own, from now on while it is active."""
        self.bases.setdefault(None, self.base_layer)
        self.bases[name] = base
        self.began[name] = (self.lora_A[name].detach().clone(), self.lora_B[name].detach().clone())

    def _apply(self, fn: Any, recurse: bool = True) -> LoraLayer:
        for base in self.bases.values():  # those that are not in place are no submodules
            if base is not self.base_layer:
                base._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[return-value]

    def factors(self) -> tuple[nn.ParameterDict, ...]:
        """All that adapters train here, by kind: A, B, AdaLoRA's diagonal, DoRA's magnitude, B's bias; each by adapter."""
        return self.lora_A, self.lora_B, self.lora_E, self.magnitude, self.lora_bias

    def rank(self, name: str) -> int:
        return self.rank_of(self.lora_A[name])

    def rank_of(self, a: Tensor) -> int:
        return int(a.shape[0])

    @property
    def unit(self) -> float:
        """What AdaLoRA's diagonal is counted in: sqrt(out / 3).

        Adam moves every number alike. LoRA's update grows by rate x sqrt(out) x the length of a row of A, 1/sqrt(3); a
        singular value by the rate alone: in these units both learn at the same rate (docs/numerics.md has the figures).
        """
        return math.sqrt(self.out_features / 3)

    def a(self, name: str) -> Tensor:
        """A as it is multiplied, in fp32: AdaLoRA's rows are scaled by its diagonal."""
        a = self.lora_A[name].float()
        if name not in self.lora_E:
            return a
        return ScaledRows.apply(a, self.lora_E[name], self.unit)  # type: ignore[no-any-return]

    def b(self, name: str) -> Tensor:
        """B as it is multiplied, in fp32."""
        return self.lora_B[name].float()

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by the end of their names in PEFT's files."""
        found = {self.KEYS[0]: self.lora_A[name], self.KEYS[1]: self.lora_B[name]}
        if name in self.lora_E:
            found["lora_E"] = self.lora_E[name]
        if name in self.magnitude:
            found["lora_magnitude_vector"] = self.magnitude[name]
        if name in self.lora_bias:
            found["lora_B.bias"] = self.lora_bias[name]
        return found

    def delta(self, name: str) -> Tensor:
        """The update scaling * B A in the layout of the weight, fp32, before DoRA scales the sum."""
        return self.scaling[name] * self._update(self.a(name).detach(), self.b(name).detach())

    def _update(self, a: Tensor, b: Tensor) -> Tensor:
        return b @ a

    def as_matrices(self, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W (out, in), A (r, in) and B (out, r) of a weight and factors in this layer's layout, views; of experts one's."""
        return weight.flatten(1), a.flatten(1), b.flatten(1)

    def dense(self, base: Any = None) -> Tensor:
        """The base's weight in fp32; a 4-bit one decoded. base: another than the one in place."""
        base = self.base_layer if base is None else base
        return base.dequantize(torch.float32) if isinstance(base, QuantizedLinear) else base.weight.detach().float()

    def merged(self, name: str) -> Tensor:
        """The weight with this adapter in it, fp32, in the base's layout."""
        weight = self.dense(self.base_of(name))
        weight = weight + self.delta(name).to(weight.device)
        if name not in self.magnitude:
            return weight
        return weight * (self._over_rows(self.magnitude[name].detach()) / self._row_norms(weight).clamp_(min=TINY))

    def merged_to(self, name: str, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """`merged`, rounded once to `dtype`; out: a buffer to write into."""
        weight = self.merged(name)
        return weight.to(dtype) if out is None else out.copy_(weight)

    def merged_bias(self, name: str) -> Tensor | None:
        """The bias with this adapter's in it, fp32; None: it has none.

        Raises:
            VeneerError: the base has no bias to take it, as its class and config say.
        """
        if name not in self.lora_bias:
            return None
        if self.bias is None:
            raise VeneerError("the adapter has a bias (lora_bias), which a layer without one cannot hold")
        return self.bias.detach().float() + self.scaling[name] * self.lora_bias[name].detach()

    def _with_bias(self, y: Tensor, across: tuple[int, ...] = (-1,)) -> Tensor:
        """y and the active adapter's bias, where it has one."""
        if self.active is None or self.active not in self.lora_bias:
            return y
        return y + (self.scaling[self.active] * self.lora_bias[self.active]).to(y.dtype).view(across)

    # What DoRA scales: the rows (out) of W as (out, ...). A layout where `out` is not the first dimension overrides both.
    def _row_norms(self, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight.flatten(1), dim=1).view(-1, *[1] * (weight.dim() - 1))

    def _over_rows(self, magnitude: Tensor) -> Tensor:
        return magnitude.view(-1, *[1] * (self.weight.dim() - 1))

    def first_magnitude(self, weight: Tensor | None = None) -> Tensor:
        """DoRA's m at step 0: the norms of the rows of the frozen weight, or of the sum it starts from: nothing is scaled."""
        return self._row_norms(self.dense() if weight is None else weight).reshape(self.magnitude_shape())

    def magnitude_shape(self) -> tuple[int, ...]:
        return (self.out_features,)

    def row_scale(self, name: str) -> Tensor:
        """m / |W + scaling B A| (out,) fp32. As the paper proposes (section 4.3) the norm is a constant to the gradient."""
        with torch.no_grad():
            norms = self._row_norms(self.dense() + self.delta(name)).reshape(-1)
        return self.magnitude[name].reshape(-1) / norms.clamp_(min=TINY)

    def dropped(self, x: Tensor) -> Tensor:
        """x as the low-rank path sees it."""
        p = self.dropout[self.active] if self.active is not None and self.training else 0.0
        return F.dropout(x, p) if p else x

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: r={self.rank(name)}" for name in self.lora_A)
        return f"adapters={{{ranks}}}"


class LoraLinear(LoraLayer):
    """Of `nn.Linear`, `QuantizedLinear` and transformers' Conv1D, whose weight is (in, out)."""

    def __init__(self, base_layer: Linear) -> None:
        super().__init__(base_layer)
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.weight.shape
        else:
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def _update(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).T if isinstance(self.base_layer, Conv1D) else b @ a

    def as_matrices(self, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return weight.T if isinstance(self.base_layer, Conv1D) else weight, a, b

    def merged_to(self, name: str, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        base = self.base_of(name)
        dora, turned = name in self.magnitude, isinstance(base, Conv1D)
        if isinstance(base, QuantizedLinear) or (dora and turned) or (base.weight.dtype != dtype and not dora):
            return super().merged_to(name, dtype, out)
        weight = base.weight.detach()
        left, right = self.b(name).detach() * self.scaling[name], self.a(name).detach()
        left, right = (right.T, left.T) if turned else (left, right)
        left, right = left.to(weight.device), right.to(weight.device)
        if not dora:
            return ops.add_update(weight, left, right, out)
        out = torch.empty_like(weight, dtype=dtype) if out is None else out
        for start in range(0, len(weight), rows := max(1, ROWS_AT_ONCE // weight.shape[1])):
            some = slice(start, start + rows)
            total = ops.add_update(weight[some].float(), left[some], right)
            norms = torch.linalg.vector_norm(total, dim=1).clamp_(min=TINY)
            out[some] = total.mul_((self.magnitude[name].detach()[some] / norms)[:, None])
        return out

    def _row_norms(self, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight, dim=int(not isinstance(self.base_layer, Conv1D)), keepdim=True)

    def _over_rows(self, magnitude: Tensor) -> Tensor:
        return magnitude[None] if isinstance(self.base_layer, Conv1D) else magnitude[:, None]

    def row_scale(self, name: str) -> Tensor:
        """No dense update is made, and |W|^2 only once: `row_scales`."""
        return row_scales([(self, name, self.a(name), self.b(name))])[0]

    def _square_norms(self) -> Tensor:
        """|W|^2 by row (out,), fp32, kept as long as the weight is the same."""
        known, weight = self.__dict__.get("_squares"), self.base_layer.weight
        if known is None or known[0] is not weight or known[1] != weight._version or known[2].device != weight.device:
            squares = self._row_norms(self.dense()).reshape(-1).square()
            known = self.__dict__["_squares"] = (weight, weight._version, squares)
        return known[2]  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        name = self.active
        if name is None:
            return self.base_layer(x)  # type: ignore[no-any-return]
        x = autocast(x)
        a, b, scaling = self.a(name), self.b(name), self.scaling[name]
        dora = name in self.magnitude
        later = self.bias if dora or (self.bias is not None and self.bias.requires_grad) else None  # a bias added last
        low = self.dropped(x)
        if low is x:
            y = LoraFunction.apply(x, a, b, self.base_layer, scaling, later is None)
        else:
            y = self.base_layer(x) + scaling * ((low @ a.to(x.dtype).T) @ b.to(x.dtype).T)
            y = y if later is None else y - later.to(x.dtype)
        if dora:
            y = y * self.row_scale(name).to(x.dtype)
        return self._with_bias(y if later is None else y + later.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"


class LoraConv(LoraLayer):
    """Of Conv1d, Conv2d and Conv3d: A (r, in, *kernel) moves as the base does, then B (out, r / groups, 1, ...) in groups.

    As PEFT has it, A has no groups and sees zeros beyond the border. So with groups, or another border, the update is no
    convolution of the base's kind: such an adapter can be trained and used, but not merged, and not be DoRA.
    """

    def __init__(self, base_layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = base_layer.in_channels, base_layer.out_channels

    @property
    def sides(self) -> tuple[int, int]:
        return self.out_features, self.in_features * math.prod(self.weight.shape[2:])

    def shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        groups, kernel = self.base_layer.groups, self.weight.shape[2:]
        if r % groups:
            raise VeneerError(f"rank {r}: expected a multiple of the convolution's {groups} groups")
        return (r, self.in_features, *kernel), (self.out_features, r // groups, *[1] * len(kernel))

    def magnitude_shape(self) -> tuple[int, ...]:
        return (1, self.out_features, *[1] * (self.weight.dim() - 2))

    def _update(self, a: Tensor, b: Tensor) -> Tensor:
        base = self.base_layer
        if base.groups > 1 or base.padding_mode != "zeros":
            raise VeneerError(
                f"a convolution with {base.groups} groups and {base.padding_mode} beyond its border cannot hold its adapter",
                hint="leave it out of lora.targets, or use the adapter without merging it",
            )
        return (b.flatten(1) @ a.flatten(1)).view(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        name, base = self.active, self.base_layer
        if name is None:
            return base(x)  # type: ignore[no-any-return]
        a, b, scaling = self.a(name).to(x.dtype), self.b(name).to(x.dtype), self.scaling[name]
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[self.weight.dim() - 3]
        h = convolve(self.dropped(x), a, None, base.stride, base.padding, base.dilation)
        low = scaling * convolve(h, b, groups=base.groups)
        across = (1, -1, *[1] * (self.weight.dim() - 2))
        if name not in self.magnitude:
            return self._with_bias(base(x) + low, across)
        y = (base._conv_forward(x, base.weight, None) + low) * self.row_scale(name).to(x.dtype).view(across)
        return y if self.bias is None else y + self.bias.view(across)  # type: ignore[no-any-return]


class LoraEmbedding(LoraLayer):
    """Of nn.Embedding, weight (n, dim): row i gets scaling * B A[:, i], A (r, n) zero and B (dim, r) normal at the start.

    A model's own factor on its embeddings (Gemma's) is on the update too.
    """

    KEYS = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = base_layer.num_embeddings, base_layer.embedding_dim

    def start(self, r: int, init: str, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        a, b = self.shapes(r)
        return torch.zeros(a), torch.empty(b).normal_(generator=generator)

    def _update(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).T

    def as_matrices(self, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return weight.T, a, b

    def merged_to(self, name: str, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        weight = self.base_of(name).weight.detach()
        if name in self.magnitude or weight.dtype != dtype:
            return super().merged_to(name, dtype, out)
        left, right = self.a(name).detach().T * self.scaling[name], self.b(name).detach().T
        return ops.add_update(weight, left.to(weight.device), right.to(weight.device), out)

    def _row_norms(self, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight, dim=0, keepdim=True)

    def _over_rows(self, magnitude: Tensor) -> Tensor:
        return magnitude[None]

    def forward(self, ids: Tensor) -> Tensor:
        name, base = self.active, self.base_layer
        y = base(ids)
        if name is None:
            return y  # type: ignore[no-any-return]
        rows = F.embedding(ids, self.a(name).T, base.padding_idx, base.max_norm, base.norm_type)
        low = self.scaling[name] * (rows @ self.b(name).T) * getattr(base, "embed_scale", 1.0)
        y = y + low.to(y.dtype)
        return y * self.row_scale(name).to(y.dtype) if name in self.magnitude else y  # type: ignore[no-any-return]


def lora_layer(base: nn.Module) -> LoraLayer | None:
    """The layer that puts adapters on `base`; None: there is none for its kind."""
    if isinstance(base, nn.Linear | QuantizedLinear | Conv1D):
        return LoraLinear(base)
    if isinstance(base, CONVOLUTIONS):
        return LoraConv(base)
    return LoraEmbedding(base) if isinstance(base, nn.Embedding) else None


def row_scales(layers: Sequence[tuple[LoraLinear, str, Tensor, Tensor]]) -> list[Tensor]:
    """m / |W + scaling B A| (out,) fp32 of DoRA layers of one model: the layer, its adapter, A and B.

    Made anew for every pass, as optimizers exist that change parameters unseen by torch's version counters.
    """
    bases = [layer.base_layer for layer, *_ in layers]
    dtype = bases[0].compute_dtype if isinstance(bases[0], QuantizedLinear) else bases[0].weight.dtype
    with torch.no_grad():
        norms = ops.row_norms(
            [frozen_weight(base, dtype) for base in bases],
            [(a, b) for *_, a, b in layers],
            [layer.scaling[name] for layer, name, *_ in layers],
            [layer._square_norms() for layer, *_ in layers],
            dtype,
        )
    return [layer.magnitude[name] / norm for (layer, name, *_), norm in zip(layers, norms, strict=True)]


def adapted_linears(layers: Sequence[Any]) -> list[AdaptedLinear]:
    """Linears, with or without adapters, as the fused halves of a transformer layer take them.

    With dropout at work each has a mask of its own, whose seed is drawn from torch's generator: `torch.manual_seed` decides it.
    """
    found, dora = [], []
    for layer in layers:
        base, name = (layer.base_layer, layer.active) if isinstance(layer, LoraLinear) else (layer, None)
        if name is None:  # in full fine-tuning its weight is trained
            weight = base.weight if base.weight.requires_grad else frozen_weight(base, torch.bfloat16)[0]
            found.append(AdaptedLinear(weight, base.bias))
            continue
        weight = frozen_weight(base, torch.bfloat16)[0]
        a, b, scaling = layer.lora_A[name].float(), layer.lora_B[name].float(), layer.scaling[name]
        diagonal = layer.lora_E.get(name)
        if diagonal is not None:
            scaling *= layer.unit
        dropout = layer.dropout[name] if layer.training else 0.0
        seed = int(torch.randint(2**32, (), device="cpu")) if dropout else 0
        if name in layer.magnitude:
            dora.append((len(found), layer, name, a, b))
        found.append(AdaptedLinear(weight, base.bias, a, b, scaling, dropout, seed, diagonal=diagonal))
    for (at, *_), scale in zip(dora, row_scales([x[1:] for x in dora]) if dora else [], strict=True):
        found[at] = found[at]._replace(scale=scale)
    return found


def initial_factor(shape: tuple[int, ...], r: int, init: str, generator: torch.Generator | None = None) -> Tensor:
    """A in fp32 at step 0; B is zero, so the adapted layer is the base.

    kaiming: uniform in +-1/sqrt(in), which is Kaiming-uniform with a = sqrt(5); gaussian: N(0, 1/r^2), as PEFT does.
    """
    a = torch.empty(shape)
    if init == "kaiming":
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    elif init == "gaussian":
        nn.init.normal_(a, std=1 / r, generator=generator)
    else:
        raise VeneerError(f"init: found {init!r}, expected kaiming or gaussian")
    return a


def check_adapter_name(name: str) -> str:
    """Names become file and parameter names, so only letters, digits, `_` and `-` are allowed."""
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
        raise VeneerError(f"adapter name: found {name!r}, expected 1 to 64 letters, digits, _ or -")
    return name
