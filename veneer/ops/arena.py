"""Memory for what the native kernels write: activations, taken and given back many times a step.

One stretch of address space, handed out first fit from its start. What lives long (gradients, optimizer state) is not
in it, so a step finds it empty again: no holes build up, no page is cleared twice, and the system may use huge pages.
Measured, a step of 4x512 tokens on SmolLM2-135M (2 cores): 8% faster and 0.2 GB smaller than with malloc.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import math
import mmap
import os
import sys
import weakref
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1 << 16  # bytes; less is left to malloc
_ALIGN = 128
_MAP_NORESERVE = 0x4000  # Linux; Python's mmap names it from 3.13 on


class Places:
    """First fit in `size` bytes: where each block lies; no memory. A block is free again when its owner is gone."""

    def __init__(self, size: int) -> None:
        self.free = [(0, size)]  # (start, end), in order, never touching
        self.high = 0  # no byte from here on was ever used
        self.owners: dict[int, weakref.ref[Any]] = {}
        self.returned: list[tuple[int, int]] = []

    def take(self, size: int) -> tuple[int, int] | None:
        """Start and end of `size` bytes; None when there is no room."""
        self.collect()
        size = -(-size // _ALIGN) * _ALIGN
        for i, (start, end) in enumerate(self.free):
            if end - start >= size:
                self.free[i : i + 1] = [(start + size, end)] if end - start > size else []
                self.high = max(self.high, start + size)
                return start, start + size
        return None

    def own(self, place: tuple[int, int], owner: Any) -> None:
        """Give the place back when `owner` is gone."""
        self.owners[place[0]] = weakref.ref(owner, functools.partial(self._give_back, place))

    def _give_back(self, place: tuple[int, int], _: Any) -> None:
        self.returned.append(place)  # no more: this may run at any moment, even in the middle of `take`

    def collect(self) -> None:
        while self.returned:
            start, end = self.returned.pop()
            del self.owners[start]
            i = bisect.bisect(self.free, (start, end))
            if i < len(self.free) and self.free[i][0] == end:
                end = self.free.pop(i)[1]
            if i > 0 and self.free[i - 1][1] == start:
                i -= 1
                start = self.free.pop(i)[0]
            self.free.insert(i, (start, end))


class Arena:
    """First-fit memory of `size` bytes of address space. A block is free again when the last tensor on it is gone."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self.memory)
        self.places = Places(size)

    def take(self, size: int) -> memoryview | None:
        """`size` bytes, uninitialised; None when there is no room."""
        place = self.places.take(size)
        if place is None:
            return None
        block = self.view[slice(*place)]
        self.places.own(place, block)
        return block

    def release(self) -> None:
        """Give the pages that no tensor uses back to the system."""
        self.places.collect()
        for start, end in self.places.free:
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, min(end, self.places.high)
            if last > first:
                self.memory.madvise(mmap.MADV_DONTNEED, first, last - first)


dry: Any = None  # the `dry_run.DryRun` that is on
_arena: Arena | bool | None = None  # False: this system has no room for one


def on_cpu(tensor: Tensor) -> bool:
    """Whether it is the CPU's; in a dry run, whether it stands for such a one."""
    return tensor.device.type == ("cpu" if dry is None else "meta")


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As torch.empty on the CPU, from the arena where that is worth it."""
    size = math.prod(shape) * dtype.itemsize
    if dry is not None and size >= SMALLEST:
        return dry.empty(shape, dtype)  # type: ignore[no-any-return]
    arena = _get() if size >= SMALLEST else None
    block = None if arena is None else arena.take(size)
    if block is None:
        return torch.empty(shape, dtype=dtype)
    out = torch.frombuffer(block, dtype=dtype, count=math.prod(shape)).view(shape)
    if torch.utils.deterministic.fill_uninitialized_memory and torch.are_deterministic_algorithms_enabled():
        out.fill_(math.nan)
    return out


def release() -> None:
    """Give unused pages back, as after a training run."""
    if isinstance(_arena, Arena):
        _arena.release()


def _get() -> Arena | None:
    global _arena
    if _arena is None:
        _arena = False
        if sys.platform == "linux":
            with contextlib.suppress(OSError, ValueError):
                _arena = Arena(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return _arena if isinstance(_arena, Arena) else None
