"""The two halves of a transformer layer, each one autograd node on the native kernels (bf16, CPU).

    attention_block:  y = x + o( attention( rotate(q), rotate(k), v ) ),   q, k, v = linears( rms_norm(x) )
    mlp_block:        y = x + down( activation(gate) * up ),               gate, up = linears( rms_norm(x) )

Every linear is 16-bit or quantised, with or without a low-rank term: W x + scaling B A dropout(x), and that with or
without a factor for each output (DoRA). 16-bit weights, biases and
norms that require a gradient get one (full fine-tuning); most often all of them are frozen. The definitions, in plain
torch, are `reference.attention_block` and `reference.mlp_block`. Beside y goes its rest, what rounding took from it, to
the next half: a residual stream of twice 8 digits, without gradients of 32 bits.

Saved for the backward pass: the normed input, q, k, v, the attention's output, gate and up. Made again, bit for bit:
activations, dropout's masks, the bf16 factors, and up of a quantised base (where gate and up are two linears). `recompute`
"mlp" makes gate and up again, "full" q, k and v as well. Measured, a step of 4x512 tokens on SmolLM2-135M (r 16, 2 cores
with AMX): dropout on all linears costs about 12%.

The factors c of y = c u + bias cost no pass over activations. Forward they are multiplied into the sums before the one
rounding; backward, where dy c is wanted, into the rows of W and B while those are packed, as dy stands on their left side.
The gradient of c is the sum of dy u over the tokens. y tells u where nothing was added to it: q, k, v, gate and up without
biases. Else, so of o and down, u is kept too, or made again with `recompute`.

Shapes: T tokens, D model width, H heads of width W, R all ranks of linears that share an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from veneer.ops import native
from veneer.ops.arena import empty
from veneer.ops.cross_entropy import OURS
from veneer.ops.reference import drop_scale

Recompute = Literal["none", "mlp", "full"]
_TELLING = 1e-20  # far below what a factor can be in earnest, far above bf16's smallest number


class AdaptedLinear(NamedTuple):
    """y = scale (x W^T + scaling (dropout(x) A^T diag(diagonal)) B^T) + bias. weight (out, in): bf16, or quantised, frozen.

    a (r, in) and b (out, r) fp32, or None both; diagonal (r,) fp32, AdaLoRA's, or None: 1. Each linear drops its own copy of x, as PEFT's modules do; the mask is
    a function of `seed` (`reference.kept`), so the backward pass makes it again. scale (out,) fp32, or None: 1.
    """

    weight: Any
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    seed: int = 0
    scale: Tensor | None = None
    diagonal: Tensor | None = None


class Norm(NamedTuple):
    """y = x (mean(x^2) + epsilon)^-1/2 (weight + shift); weight (D,)."""

    weight: Tensor
    epsilon: float
    shift: float = 0.0


class Attention(NamedTuple):
    """What the attention half is besides its linears. qkv: three linears, or one whose outputs lie side by side.

    cos, sin (T, rotated width / 2) fp32, or None; starts int32 (rows + 1): where packed rows begin, and T.
    """

    norm: Norm
    qkv: Sequence[AdaptedLinear]
    out: AdaptedLinear
    heads: int
    kv_heads: int
    width: int
    scale: float
    cos: Tensor | None
    sin: Tensor | None
    starts: Tensor
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    recompute: Recompute = "none"


class Mlp(NamedTuple):
    """What the MLP half is. gate_up: two linears, or one whose outputs lie side by side."""

    norm: Norm
    gate_up: Sequence[AdaptedLinear]
    down: AdaptedLinear
    activation: str = "silu"
    recompute: Recompute = "none"


def attention_block(x: Tensor, block: Attention, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (T, D) bf16 [and its rest] -> y (T, D) and its rest: `reference.attention_block`."""
    norms = _trained(block.norm), _trained(block.q_norm), _trained(block.k_norm)
    return _AttentionBlock.apply(x, rest, block, *norms, *_factors([*block.qkv, block.out]))  # type: ignore[no-any-return]


def mlp_block(x: Tensor, block: Mlp, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (T, D) bf16 [and its rest] -> y (T, D) and its rest: `reference.mlp_block`."""
    return _MlpBlock.apply(x, rest, block, _trained(block.norm), *_factors([*block.gate_up, block.down]))  # type: ignore[no-any-return]


def attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, starts: Tensor, scale: float
) -> Tensor:
    """q (T, H, W), k and v (T, H_kv, W) bf16 -> (T, H, W): `reference.attention`."""
    return _Attention.apply(q, k, v, cos, sin, starts, scale)  # type: ignore[no-any-return]


def rms_norm(x: Tensor, norm: Norm, rest: Tensor | None = None) -> Tensor:
    """x (T, D) bf16 [and its rest] -> (T, D): `reference.rms_norm`."""
    return _RmsNorm.apply(x, rest, norm, _trained(norm))  # type: ignore[no-any-return]


def _factors(group: Sequence[AdaptedLinear]) -> list[Tensor | None]:
    """What may be trained, six to a linear: what autograd has to see."""
    return [
        x
        for linear in group
        for x in (
            linear.a, linear.b, _trained(linear), _if_trained(linear.bias), _if_trained(linear.scale),
            _if_trained(linear.diagonal),
        )
    ]  # fmt: skip


def _trained(part: AdaptedLinear | Norm | None) -> Tensor | None:
    return None if part is None else _if_trained(part.weight)


def _if_trained(x: Any) -> Tensor | None:
    return x if isinstance(x, Tensor) and x.requires_grad else None


class _Group:
    """Linears that share an input, ready for the kernels: their A (scaled) in one matrix, so one product serves all.

    An odd rank gets a row, or column, of zeros: the kernels take depths in pairs. With dropout each A meets an x of its
    own; the factor 1 / (1 - p) is in the scaling, so what is left of dropout is exact: an element, or zero.
    """

    def __init__(self, group: Sequence[AdaptedLinear]) -> None:
        self.group, self.places, at = group, [], 0
        for linear in group:
            r = 0 if linear.a is None or linear.b is None else linear.a.shape[0]
            self.places.append(slice(at, at := at + r + r % 2))
        self.a = empty((at, group[0].weight.shape[1]), torch.bfloat16) if at else None
        self.b = [self._factors(linear, place) for linear, place in zip(group, self.places, strict=True)]
        self.drops = any(linear.a is not None and linear.dropout for linear in group)
        # a factor of 0 would hide u from its own gradient; any other stays what it is
        self.scales = [None if linear.scale is None else linear.scale.detach() + _TELLING for linear in group]
        self.trains = [_if_trained(linear.scale) is not None for linear in group]  # whose factors have a gradient

    def _factors(self, linear: AdaptedLinear, place: slice) -> Tensor | None:
        """Fill in the rows of A; returns B."""
        if self.a is None or linear.a is None or linear.b is None:
            return None
        (out, r), rows = linear.b.shape, self.a[place]
        b = torch.empty((out, rows.shape[0]), dtype=torch.bfloat16)
        if linear.diagonal is None:
            torch.mul(linear.a.detach(), _scaling(linear), out=rows[:r])
        else:
            native.scale_rows(linear.a.detach(), linear.diagonal.detach(), _scaling(linear), out=rows[:r])
        b[:, :r] = linear.b.detach()
        if r % 2:
            rows[r:].zero_()
            b[:, r:].zero_()
        return b

    def project(self, x: Tensor) -> Tensor | None:
        """h (T, R) = scaling dropout(x) A^T of all adapters."""
        if self.a is None or not self.drops:
            return None if self.a is None else native.product([(x, self.a, True)])
        h = empty((x.shape[0], self.a.shape[0]), x.dtype)
        for linear, place in self.adapters():
            native.product([(_masked(x, linear), self.a[place], True)], out=h[:, place])
        return h

    def adapters(self) -> list[tuple[AdaptedLinear, slice]]:
        """The linears that have one, and its place among all ranks."""
        return [(linear, at) for linear, at in zip(self.group, self.places, strict=True) if at.stop > at.start]

    def forward(
        self, x: Tensor, h: Tensor | None, start: int = 0, keep: bool = True, **more: Any
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The outputs y (T, out) of the linears from `start` on; with `keep` each u that its factor's gradient needs, else None.

        more: the residual stream, as `native.product` takes it.
        """
        found: list[Tensor] = []
        kept: list[Tensor | None] = []
        for i, linear in enumerate(self.group[start:], start):
            hidden = keep and self.trains[i] and (linear.bias is not None or "residual" in more)
            u = empty((x.shape[0], linear.weight.shape[0]), x.dtype) if hidden else None
            found.append(native.product(self.terms(i, x, h), linear.bias, scale=self.scales[i], plain=u, **more))
            kept.append(u)
        return found, kept

    def terms(self, i: int, x: Tensor, h: Tensor | None) -> list[tuple[Tensor, Any, bool]]:
        """What u of the i-th linear is the sum of."""
        low, b = [], self.b[i]
        if b is not None and h is not None:
            low = [(h[:, self.places[i]], b, True)]
        return [(x, self.group[i].weight, True), *low]

    def low_rank_gradient(self, dy: Sequence[Tensor]) -> Tensor | None:
        """dh (T, R) = scale dy B of each adapter; dy: the gradient of each linear's output."""
        if self.a is None:
            return None
        dh = empty((dy[0].shape[0], self.a.shape[0]), dy[0].dtype)
        for d, b, place, scale in zip(dy, self.b, self.places, self.scales, strict=True):
            if b is not None:
                native.product([(d, b, False)], out=dh[:, place], row_scales=[scale])
        return dh

    def input_gradient(self, dy: Sequence[Tensor], dh: Tensor | None) -> Tensor:
        """dx (T, in) = scale dy W + dropout(dh A), summed over the linears."""
        terms = [(d, linear.weight, False) for linear, d in zip(self.group, dy, strict=True)]
        if dh is None or self.a is None:
            return native.product(terms, row_scales=self.scales)
        if not self.drops:
            return native.product([*terms, (dh, self.a, False)], row_scales=self.scales)
        dx = None
        for linear, place in self.adapters():
            d = native.product([(dh[:, place], self.a[place], False)], residual=None if linear.dropout else dx)
            dx = native.masked(d, linear.dropout, linear.seed, dx, out=d) if linear.dropout else d
        return native.product(terms, residual=dx, row_scales=self.scales)

    def scale_gradients(
        self, dy: Sequence[Tensor], u: Sequence[Tensor | None], y: Sequence[Tensor] = (), dots: Sequence[Tensor] = ()
    ) -> list[Tensor | None]:
        """The sums of dy u over the tokens, from u or where that is None from y, or from `dots`, the sums of dy y."""
        found: list[Tensor | None] = [None] * len(self.group)
        for i, (told, scale) in enumerate(zip(u, self.scales, strict=True)):
            if told is not None:
                found[i] = native.column_dots(dy[i], told)
            elif self.trains[i] and scale is not None:
                found[i] = (dots[i] if dots else native.column_dots(dy[i], y[i])) / scale
        return found

    def factor_gradients(
        self,
        x: Tensor,
        h: Tensor | None,
        dy: Sequence[Tensor],
        dh: Tensor | None,
        d_scales: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """The gradients of a, b, weight, bias, scale and diagonal of each linear, in the order of `_factors`."""
        gradients: list[Tensor | None] = []
        da = None if dh is None or self.drops else native.outer_sum(dh, x)
        for linear, d, place, scale, d_scale in zip(self.group, dy, self.places, self.scales, d_scales, strict=True):
            d_diagonal = None
            if linear.a is None or dh is None or h is None:
                gradients += [None, None]
            else:
                r = linear.a.shape[0]
                own = native.outer_sum(dh[:, place], _masked(x, linear)) if da is None else da[place]
                db = native.outer_sum(h[:, place], d, transposed=True)
                if scale is not None:
                    db.mul_(scale[:, None])
                own = own[:r]
                if linear.diagonal is None:  # in place: a gradient that holds the others' memory too, they stay as long
                    own.mul_(_scaling(linear))
                else:
                    a, diagonal = linear.a.detach(), linear.diagonal.detach()
                    d_diagonal = native.scale_rows(own, diagonal, _scaling(linear), other=a)
                gradients += [own, db[:, :r].contiguous() if r % 2 else db]
            gradients.append(None if _trained(linear) is None else _weight_gradient(d, x, scale))
            gradients.append(None if _if_trained(linear.bias) is None else d.sum(0, dtype=torch.float32).to(d.dtype))
            gradients += [d_scale, d_diagonal]
        return gradients


def _scaling(linear: AdaptedLinear) -> float:
    return linear.scaling * drop_scale(linear.dropout)


def _weight_gradient(dy: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
    """dy^T x (out, in), summed in fp32 and rounded once; ours where torch has no fast bf16 product."""
    dy = dy if scale is None else dy * scale.to(dy.dtype)
    return native.outer_sum(dy, x).to(x.dtype) if native.isa() in OURS else dy.T @ x


def _masked(x: Tensor, linear: AdaptedLinear) -> Tensor:
    return native.masked(x, linear.dropout, linear.seed) if linear.dropout else x


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: Tensor | None, norm: Norm, weight: Tensor | None) -> Tensor:
        y, kept, rstd = _norm(ctx, x, rest, norm)
        ctx.save_for_backward(kept, rstd, weight)
        ctx.norm = norm
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, rstd, _ = ctx.saved_tensors
        d_weight = _norm_weight_gradient(dy, kept, rstd, ctx.norm, ctx.tells)
        return _norm_backward(ctx, dy, kept, rstd, ctx.norm, None), None, None, d_weight


def _norm(ctx: Any, x: Tensor, rest: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """y, and what to keep of it: y, which tells x, or where a factor is 0 x itself; and rstd."""
    y, rstd, ctx.tells = native.rms_norm(x, norm.weight, norm.epsilon, norm.shift, rest)
    return y, y if ctx.tells else x, rstd


def _norm_again(ctx: Any, kept: Tensor, norm: Norm) -> Tensor:
    return kept if ctx.tells else native.rms_norm(kept, norm.weight, norm.epsilon, norm.shift)[0]


def _norm_backward(ctx: Any, dy: Tensor, kept: Tensor, rstd: Tensor, norm: Norm, d_residual: Tensor | None) -> Tensor:
    return native.rms_norm_backward(dy, kept, norm.weight, rstd, norm.shift, d_residual, normed=ctx.tells)


def _norm_weight_gradient(dy: Tensor, kept: Tensor, rstd: Tensor, norm: Norm, normed: bool) -> Tensor | None:
    """sum over rows of dy x rstd, where x rstd is kept / (weight + shift) if `normed`; None: the weight is frozen."""
    if _trained(norm) is None:
        return None
    terms = dy.float().mul_(kept)
    if normed:
        return (terms.sum(0) / (norm.weight.float() + norm.shift)).to(norm.weight.dtype)
    return terms.mul_(rstd[:, None]).sum(0).to(norm.weight.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, starts: Tensor, scale: float
    ) -> Tensor:
        q, k, v = (_token_major(x) for x in (q, k, v))
        o, lse = native.attention_forward(q, k, v, cos, sin, starts, scale)
        ctx.save_for_backward(q, k, v, o, lse, cos, sin, starts)
        ctx.scale = scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Any, ...]:
        q, k, v, o, lse, cos, sin, starts = ctx.saved_tensors
        gradients = tuple(empty(x.shape, x.dtype) for x in (q, k, v))
        native.attention_backward(q, k, v, o, lse, d_o, cos, sin, starts, ctx.scale, gradients)  # type: ignore[arg-type]
        return *gradients, None, None, None, None


def _token_major(x: Tensor) -> Tensor:
    return x if x.stride()[1:] == (x.shape[2], 1) and x.stride(0) % 2 == 0 else x.contiguous()


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rest: Tensor | None, block: Attention, *trained: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        group, out = _Group(block.qkv), _Group([block.out])
        normed, kept, rstd = _norm(ctx, x, rest, block.norm)
        h = group.project(normed)
        keep = block.recompute != "full"
        qkv, us = group.forward(normed, h, keep=keep)
        del normed
        q, k, v = _heads(qkv, block)
        o, lse = native.attention_forward(
            _normed(q, block.q_norm), _normed(k, block.k_norm), v, block.cos, block.sin, block.starts, block.scale
        )
        flat = o.view(x.shape[0], -1)
        h_out = out.project(flat)
        y, rest, u_out = _add(ctx, out, flat, h_out, x, rest, keep)
        _save(ctx, block, (kept, rstd, o, lse, h, h_out), [*qkv, *us, u_out] if keep else [], trained)
        return y, rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Any, ...]:
        (kept, rstd, o, lse, h, h_out), outputs = _saved(ctx, 6)
        block, group, out = ctx.block, _Group(ctx.block.qkv), _Group([ctx.block.out])
        dy, flat = dy.contiguous(), o.view(dy.shape[0], -1)
        dh_out = out.low_rank_gradient([dy])
        d_o = out.input_gradient([dy], dh_out).view(o.shape)
        u_out = outputs[-1] if outputs else _again(out, flat, h_out)
        d_out_factors = out.factor_gradients(flat, h_out, [dy], dh_out, out.scale_gradients([dy], [u_out]))
        del u_out
        normed = _norm_again(ctx, kept, block.norm)
        n = len(block.qkv)
        qkv, us = (outputs[:n], outputs[n : 2 * n]) if outputs else group.forward(normed, h)
        del outputs
        q, k, v = _heads(qkv, block)
        d_qkv = [empty(y.shape, y.dtype) for y in qkv]
        dq, dk, dv = _heads(d_qkv, block)
        native.attention_backward(
            _normed(q, block.q_norm), _normed(k, block.k_norm), v, o, lse, d_o, block.cos, block.sin,
            block.starts, block.scale, (dq, dk, dv),
        )  # fmt: skip
        d_heads_norms = _normed_backward(dq, q, block.q_norm), _normed_backward(dk, k, block.k_norm)
        dh = group.low_rank_gradient(d_qkv)
        d_factors = group.factor_gradients(normed, h, d_qkv, dh, group.scale_gradients(d_qkv, us, qkv))
        dx, d_norm = _input_gradients(ctx, group, d_qkv, dh, kept, rstd, dy)
        return dx, None, None, d_norm, *d_heads_norms, *d_factors, *d_out_factors


class _MlpBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: Tensor | None, block: Mlp, *trained: Tensor | None) -> tuple[Tensor, Tensor]:
        group, down = _Group(block.gate_up), _Group([block.down])
        normed, kept, rstd = _norm(ctx, x, rest, block.norm)
        h = group.project(normed)
        n = _kept(block)
        both, us = group.forward(normed, h, keep=n > 0)
        del normed
        act = native.gated(*_gate_and_up(both), block.activation)
        del both[n:], us[n:]
        h_down = down.project(act)
        y, rest, u_down = _add(ctx, down, act, h_down, x, rest, n > 0)
        _save(ctx, block, (kept, rstd, h, h_down), [*both, *us, u_down] if n else [], trained)
        return y, rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Any, ...]:
        (kept, rstd, h, h_down), outputs = _saved(ctx, 4)
        block, group, down = ctx.block, _Group(ctx.block.gate_up), _Group([ctx.block.down])
        dy, n = dy.contiguous(), len(outputs) // 2
        both, us, u_down = outputs[:n], outputs[n : 2 * n], outputs[-1] if outputs else None
        del outputs
        normed = _norm_again(ctx, kept, block.norm)
        again, more = group.forward(normed, h, start=n)
        us += more
        # what was made again gives its place to its gradient; what was kept may be wanted by a second backward pass
        d_both = [*(empty(y.shape, y.dtype) for y in both), *again]
        gate, up = _gate_and_up([*both, *again])
        dh_down = down.low_rank_gradient([dy])
        d_act = down.input_gradient([dy], dh_down)
        dots = torch.empty((2, gate.shape[1]), dtype=torch.float32) if any(group.trains) else None
        act = native.gated_backward(d_act, gate, up, block.activation, _gate_and_up(d_both), out=d_act, dots=dots)
        u_down = _again(down, act, h_down) if n == 0 else u_down
        sums = () if dots is None else list(dots) if len(d_both) == 2 else [dots.view(-1)]
        d_scales = group.scale_gradients(d_both, us, dots=sums)
        d_down_scales = down.scale_gradients([dy], [u_down])
        d_down_factors = down.factor_gradients(act, h_down, [dy], dh_down, d_down_scales)
        del act, d_act, u_down, gate, up
        dh = group.low_rank_gradient(d_both)
        d_factors = group.factor_gradients(normed, h, d_both, dh, d_scales)
        del normed
        dx, d_norm = _input_gradients(ctx, group, d_both, dh, kept, rstd, dy)
        return dx, None, None, d_norm, *d_factors, *d_down_factors


def _input_gradients(
    ctx: Any, group: _Group, d_outputs: Sequence[Tensor], dh: Tensor | None, kept: Tensor, rstd: Tensor, dy: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What flows out of the start of a half, its norm: the gradients of x, residual dy included, and of the norm's weight."""
    norm, wanted = ctx.block.norm, ctx.needs_input_grad[0]
    if not wanted and _trained(norm) is None:
        return None, None
    d_normed = group.input_gradient(d_outputs, dh)
    d_norm = _norm_weight_gradient(d_normed, kept, rstd, norm, ctx.tells)
    return _norm_backward(ctx, d_normed, kept, rstd, norm, dy) if wanted else None, d_norm


def _kept(block: Mlp) -> int:
    """How many of gate and up stay for the backward pass. Who takes a quantised base is short of memory: up costs 2% there.

    One linear with both side by side is kept whole."""
    if block.recompute != "none":
        return 0
    return 1 if any(not isinstance(linear.weight, Tensor) for linear in block.gate_up) else len(block.gate_up)


def _save(ctx: Any, block: Attention | Mlp, few: Sequence[Any], outputs: Sequence[Tensor], trained: Any) -> None:
    """What is trained is saved only so that autograd notices when it is changed before the backward pass reads it."""
    ctx.save_for_backward(*few, *outputs, *trained)
    ctx.block, ctx.outputs = block, len(outputs)


def _saved(ctx: Any, few: int) -> tuple[Sequence[Any], list[Tensor]]:
    saved = ctx.saved_tensors
    return saved[:few], list(saved[few : few + ctx.outputs])


def _add(
    ctx: Any,
    last: _Group,
    x: Tensor,
    h: Tensor | None,
    residual: Tensor,
    residual_rest: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The end of a half: y = residual + last linear; what rounding took from y, which has no gradient of its own; u."""
    residual = residual.contiguous()
    rest = empty(residual.shape, residual.dtype)
    (y,), (u,) = last.forward(x, h, residual=residual, residual_rest=residual_rest, rest=rest, keep=keep)
    ctx.mark_non_differentiable(rest)
    ctx.set_materialize_grads(False)
    return y, rest, u


def _again(last: _Group, x: Tensor, h: Tensor | None) -> Tensor | None:
    """u of the last linear of a half, if its factor is trained: bit for bit what the forward pass had."""
    return native.product(last.terms(0, x, h)) if last.trains[0] else None


def _heads(qkv: Sequence[Tensor], block: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Views (T, H, W), (T, H_kv, W), (T, H_kv, W) of the three linears' outputs, or of one with all side by side."""
    heads = [y.view(y.shape[0], -1, block.width) for y in qkv]
    q, k, v = heads if len(heads) == 3 else heads[0].split((block.heads, block.kv_heads, block.kv_heads), dim=1)
    return q, k, v


def _gate_and_up(both: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    gate, up = both if len(both) == 2 else both[0].chunk(2, dim=1)
    return gate, up


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    """RMS norm of each head (T, H, W), as Qwen3 has it on q and k."""
    if norm is None:
        return x
    return native.rms_norm(x.reshape(-1, x.shape[-1]), norm.weight, norm.epsilon, norm.shift)[0].view(x.shape)


def _normed_backward(d: Tensor, x: Tensor, norm: Norm | None) -> Tensor | None:
    """Turn the gradient of the normed heads into that of the heads, in place; returns that of the norm's weight."""
    if norm is None:
        return None
    flat, d_flat = x.reshape(-1, x.shape[-1]), d.reshape(-1, x.shape[-1])
    rstd = native.rms_norm(flat, norm.weight, norm.epsilon, norm.shift)[1]
    d_weight = _norm_weight_gradient(d_flat, flat, rstd, norm, normed=False)
    dx = native.rms_norm_backward(d_flat, flat, norm.weight, rstd, norm.shift, None, normed=False)
    d.copy_(dx.view(d.shape))
    return d_weight
