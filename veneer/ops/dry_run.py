"""What a step takes of memory, from the step's own code: its tensors are on the meta device, with neither memory nor arithmetic.

While a dry run is on, tensors on the meta device stand for the CPU's: the native kernels take them and do nothing, and the
arena's books are kept without an arena. So whatever the step does with memory is seen, for any model and method, and there
is no second description of it that could be wrong. What torch's own kernels use inside themselves is not seen.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from veneer.ops import arena
from veneer.ops.allocator import Blocks

_aten = torch.ops.aten
FACTORIES = {_aten.empty, _aten.empty_strided, _aten.zeros, _aten.ones, _aten.full, _aten.arange, _aten.scalar_tensor}
AS_LARGE_INSIDE = {_aten.logsumexp}  # torch's kernel makes one more tensor of the input's size


class DryRun(TorchDispatchMode):
    """A context. Bytes: `places.high` of the arena, `beside` of all other tensors that live now, `most` they were at once.

    Args:
        there: tensors that are there before; the CPU's are not counted.
        cpu: False: the tensors stand for a GPU's, which has neither native kernels nor an arena; all are counted, in the
            `blocks` that torch's allocator would give them.
    """

    def __init__(self, there: Iterable[Tensor] = (), *, cpu: bool = True) -> None:
        super().__init__()
        self.cpu, self.blocks = cpu, Blocks()
        self.places = arena.Places(1 << 62)
        self.beside = self.most = self._lately = 0
        self._known: dict[int, Any] = {}  # storages that were seen, by their address
        self._results: dict[
            Any, tuple[Any, ...]
        ] = {}  # shape, strides and dtype of what operations give, by what they are given
        self._device = torch.device("meta")
        for tensor in there:
            self._see(tensor, 0 if cpu else tensor.untyped_storage().nbytes())

    def __enter__(self) -> DryRun:
        assert arena.dry is None, "one dry run at a time"
        arena.dry = self if self.cpu else None
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        arena.dry = None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As `arena.empty`."""
        with torch.utils._python_dispatch._disable_current_modes():
            tensor = torch.empty(shape, dtype=dtype, device="meta")
        place = self.places.take(tensor.nbytes)
        assert place is not None
        self.places.own(place, tensor.untyped_storage())
        self._see(tensor, 0)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in FACTORIES:
            kwargs = {**kwargs, "device": self._device}
        out = self._out(func, args, kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf, leaf.untyped_storage().nbytes())
        if func.overloadpacket in AS_LARGE_INSIDE:
            self._see(torch.empty_like(args[0]), args[0].nbytes)
        return out

    def _out(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives. Many of the meta device's are Python, and take longer than the real ones: what was asked
        before is not asked again, and what changes a tensor in place is not done at all."""
        kind = _kind(func)
        if kind == "in place" and _asked(args[0]) is not None:  # else a step counter, which is a real number
            return args[0] if func._schema.returns else None
        if kind != "new" or (asked := _asked((args, kwargs))) is None:
            return func(*args, **kwargs)
        if (found := self._results.get((func, asked))) is not None:
            shape, strides, dtype = found
            return torch.empty_strided(shape, strides, dtype=dtype, device=self._device)
        out = func(*args, **kwargs)
        if out.is_meta and not out.storage_offset():
            self._results[func, asked] = out.shape, out.stride(), out.dtype
        return out

    def _see(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self._known:
            return
        if self.cpu:
            gone = functools.partial(self._gone, key, size)
            self.beside += size
            self.most, self._lately = max(self.most, self.beside), max(self._lately, self.beside)
        elif size and tensor.is_meta:
            gone = functools.partial(self._given_back, key, self.blocks.take(size))
        else:
            return
        self._known[key] = weakref.ref(storage, gone)

    @property
    def peak(self) -> int:
        """What the step has taken so far: the arena's pages stay, malloc's go back. Of a GPU what tensors were at once."""
        return self.places.high + self.most if self.cpu else self.blocks.most

    def restart(self) -> None:
        """Count `lately` from here on."""
        self.blocks.collect()
        self._lately, self.blocks.lately = self.beside, self.blocks.allocated

    @property
    def lately(self) -> int:
        """As `peak`, since `restart`."""
        return self.places.high + self._lately if self.cpu else self.blocks.lately

    @property
    def live(self) -> int:
        """What tensors take now."""
        if not self.cpu:
            self.blocks.collect()
            return self.blocks.allocated
        self.places.collect()
        high = self.places.high
        free = sum(min(end, high) - start for start, end in self.places.free if start < high)
        return high - free + self.beside

    def _gone(self, key: int, size: int, _: Any) -> None:
        del self._known[key]
        self.beside -= size

    def _given_back(self, key: int, block: Any, _: Any) -> None:
        del self._known[key]
        self.blocks.give_back(block)


# In place, with nothing else to them. Others of these names may change a tensor's shape, as squeeze_ does.
_IN_PLACE = re.compile(
    r"aten::(_foreach_\w+|add|sub|mul|div|copy|zero|fill|addcmul|addcdiv|lerp|sqrt|clamp_min|clamp_max)_"
)


@functools.cache
def _kind(func: Any) -> str:
    """Of an operation: "in place"; "new", which gives one tensor that no other shares its memory with; or "other"."""
    schema = func._schema
    if _IN_PLACE.fullmatch(schema.name):
        return "in place"
    shared = any(part.alias_info is not None for part in (*schema.arguments, *schema.returns))
    return "new" if not shared and [str(part.type) for part in schema.returns] == ["Tensor"] else "other"


def _asked(value: Any) -> Any:
    """Arguments, with what their tensors look like in their place; None: one is not on the meta device."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else None
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, list | tuple):
        found = tuple(("none",) if item is None else _asked(item) for item in value)
        return None if None in found else found
    return type(value), value


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, heads, tokens, width = q.shape
        out = q.new_empty((rows, tokens, heads, width))
        ctx.save_for_backward(q, k, v, out, q.new_empty((rows, heads, tokens), dtype=torch.float32))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        q, k, v = ctx.saved_tensors[:3]
        made = tuple(x.new_empty(x.shape) for x in (q, k, v))
        if (
            arena.dry is None
        ):  # a GPU's kernel: the sum of dq in fp32, and dk, dv of every head before those of a group are added
            q.new_empty(q.shape, dtype=torch.float32), [q.new_empty(q.shape) for x in (k, v) if x.shape != q.shape]
        return made


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What torch's own attention that never makes all scores takes: q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D), as
    its kernel lays it out: (B, T, H, D) turned.

    On the meta device torch would take the way that does make them.
    """
    return _Attention.apply(query, key, value).transpose(1, 2)  # type: ignore[no-any-return]
