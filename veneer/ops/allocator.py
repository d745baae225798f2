"""torch's caching allocator of a GPU, on paper: which blocks and segments it would take for these tensors.

Rules of c10/cuda/CUDACachingAllocator.cpp with its default settings: sizes in steps of 512 B; blocks up to 1 MiB are cut from
segments of 2 MiB, larger ones from segments of 20 MiB or, from 10 MiB on, of their own size in steps of 2 MiB; the
smallest free block that is large enough is taken, and what is left of it is a block of its own where that is worth it.
A segment is never given back. What the GPU has less room for is the segments; what of them is in no tensor is fragmentation.
"""

from __future__ import annotations

import bisect

STEP, SMALL, SMALL_SEGMENT = 512, 1 << 20, 2 << 20
OWN_SEGMENT, LARGE_SEGMENT, ROUND = 10 << 20, 20 << 20, 2 << 20


class Block:
    """A piece of a segment; `before` and `after` are its neighbours in it."""

    __slots__ = ("after", "before", "free", "size", "small", "start")

    def __init__(self, start: int, size: int, small: bool) -> None:
        self.start, self.size, self.small, self.free = start, size, small, False
        self.before: Block | None = None
        self.after: Block | None = None


class Blocks:
    """Bytes: `allocated` now, `most` at once, `lately` the same since it was set, `reserved` in segments."""

    def __init__(self) -> None:
        self.allocated = self.most = self.lately = self.reserved = 0
        self._free: dict[bool, list[tuple[int, int]]] = {
            True: [],
            False: [],
        }  # (size, start), small ones and large ones
        self._at: dict[int, Block] = {}
        self._returned: list[Block] = []

    def take(self, size: int) -> Block:
        """A block for a tensor of so many bytes."""
        self.collect()
        size = max(STEP, -(-size // STEP) * STEP)
        small = size <= SMALL
        free = self._free[small]
        found = bisect.bisect_left(free, (size, -1))
        block = self._at[free.pop(found)[1]] if found < len(free) else self._segment(size, small)
        block.free = False
        left = block.size - size
        if left >= STEP if small else left > SMALL:
            rest = Block(block.start + size, left, small)
            rest.before, rest.after, block.size = block, block.after, size
            if block.after is not None:
                block.after.before = rest
            block.after = rest
            self._put(rest)
        self.allocated += block.size
        self.most, self.lately = max(self.most, self.allocated), max(self.lately, self.allocated)
        return block

    def give_back(self, block: Block) -> None:
        """When its tensor is gone. That may be at any moment, even in the middle of `take`."""
        self._returned.append(block)

    def collect(self) -> None:
        """Join the blocks that were given back with their free neighbours."""
        while self._returned:
            block = self._returned.pop()
            self.allocated -= block.size
            for other in (block.before, block.after):
                if other is not None and other.free:
                    free = self._free[other.small]
                    del free[bisect.bisect_left(free, (other.size, other.start))]
                    block = _joined(*((other, block) if other is block.before else (block, other)))
            self._put(block)

    def _segment(self, size: int, small: bool) -> Block:
        own = -(-size // ROUND) * ROUND if size >= OWN_SEGMENT else LARGE_SEGMENT
        block = Block(self.reserved, SMALL_SEGMENT if small else own, small)
        self.reserved += block.size
        self._at[block.start] = block
        return block

    def _put(self, block: Block) -> None:
        block.free = True
        self._at[block.start] = block
        bisect.insort(self._free[block.small], (block.size, block.start))


def _joined(first: Block, second: Block) -> Block:
    first.size, first.after = first.size + second.size, second.after
    if second.after is not None:
        second.after.before = first
    return first
