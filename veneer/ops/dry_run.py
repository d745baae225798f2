"""What a step takes of memory, from the step's own code: its tensors are on the meta device, with neither memory nor arithmetic.

While a dry run is on, tensors on the meta device stand for the CPU's: the native kernels take them and do nothing, and the
arena's books are kept without an arena. So whatever the step does with memory is seen, for any model and method, and there
is no second description of it that could be wrong. What torch's own kernels use inside themselves is not seen.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from veneer.ops import arena

_aten = torch.ops.aten
FACTORIES = {_aten.empty, _aten.empty_strided, _aten.zeros, _aten.ones, _aten.full, _aten.arange, _aten.scalar_tensor}


class DryRun(TorchDispatchMode):
    """A context. Bytes: `places.high` of the arena, `beside` of all other tensors that live now, `most` they were at once.

    Args:
        there: tensors that are there before, and not counted.
        cpu: False: the tensors stand for a GPU's, which has neither native kernels nor an arena.
    """

    def __init__(self, there: Iterable[Tensor] = (), *, cpu: bool = True) -> None:
        super().__init__()
        self.cpu = cpu
        self.places = arena.Places(1 << 62)
        self.beside = self.most = 0
        self._known: dict[int, Any] = {}  # storages that were seen, by their address
        self._device = torch.device("meta")
        for tensor in there:
            self._see(tensor, 0)

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
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf, leaf.untyped_storage().nbytes())
        return out

    def _see(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self._known:
            return
        self._known[key] = weakref.ref(storage, functools.partial(self._gone, key, size))
        self.beside += size
        self.most = max(self.most, self.beside)

    @property
    def peak(self) -> int:
        """What the step has taken so far: the arena's pages stay, malloc's go back."""
        return self.places.high + self.most

    @property
    def live(self) -> int:
        """What tensors take now."""
        self.places.collect()
        high = self.places.high
        free = sum(min(end, high) - start for start, end in self.places.free if start < high)
        return high - free + self.beside

    def _gone(self, key: int, size: int, _: Any) -> None:
        del self._known[key]
        self.beside -= size


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
        return tuple(x.new_empty(x.shape) for x in ctx.saved_tensors[:3])


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What torch's own attention that never makes all scores takes: q (B, H, T, D), k and v (B, G, S, D) -> (B, T, H, D).

    On the meta device torch would take the way that does make them.
    """
    return _Attention.apply(query, key, value)  # type: ignore[no-any-return]
