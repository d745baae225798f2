"""A bounded reader of GGUF headers: every count is checked against the bytes left before anything is allocated.

No GGUF reaches the gguf package before it passed here: that reader hangs on a 49-byte file with a huge array count.
Layout: GGUF specification, versions 2 and 3 (github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from veneer.errors import VeneerError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# ggml type -> (elements a block, bytes a block)
_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
MAX_KEYS, MAX_TENSORS, MAX_STRING, MAX_ITEMS = 65_536, 65_536, 16 << 20, 16 << 20


@dataclass(frozen=True)
class GgufSummary:
    """What the header says: scalar metadata by key, and each tensor's name, shape and ggml type."""

    version: int
    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int]]


class _Reader:
    def __init__(self, path: Path, handle: BinaryIO) -> None:
        self.path, self.handle, self.size = path, handle, path.stat().st_size
        self.at = 0

    def fail(self, field: str, found: Any, expected: str) -> VeneerError:
        return VeneerError(
            f"{self.path}: damaged GGUF: {field} at byte {self.at}: found {found}, expected {expected}",
            hint="copy or download the file again",
        )

    def take(self, count: int, field: str) -> bytes:
        if count > self.size - self.at:
            raise self.fail(field, f"{self.size - self.at} bytes left", f"{count}")
        self.at += count
        return self.handle.read(count)

    def number(self, kind: str, field: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}"), field))[0]

    def count(self, field: str, limit: int, least_bytes: int) -> int:
        value = int(self.number("Q", field))
        limit = min(limit, (self.size - self.at) // least_bytes)
        if value > limit:
            raise self.fail(field, f"{value:,}", f"at most {limit:,}")
        return value

    def string(self, field: str) -> str:
        length = self.count(f"length of {field}", MAX_STRING, 1)
        return self.take(length, field).decode("utf-8", errors="replace")

    def value(self, kind: int, field: str) -> Any:
        """A scalar or a string; of an array only its length, its items are stepped over one by one."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], field)
        if kind == _STRING:
            return self.string(field)
        if kind != _ARRAY:
            raise self.fail(f"type of {field}", kind, "0 to 12")
        item = int(self.number("I", f"item type of {field}"))
        if item in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[item]}")
            items = self.count(f"items of {field}", MAX_ITEMS, width)
            self.at += items * width
            self.handle.seek(self.at)
        elif item == _STRING:
            items = self.count(f"items of {field}", MAX_ITEMS, 8)
            for _ in range(items):
                self.string(f"an item of {field}")
        else:
            raise self.fail(f"item type of {field}", item, "a number or a string; arrays of arrays are not read")
        return range(items)


def check_gguf(path: str | Path) -> GgufSummary:
    """Read a GGUF header, trusting nothing in it.

    Raises:
        VeneerError: no such file, not a GGUF, or any count, length, type, size or place that cannot be right.
    """
    path = Path(path)
    if not path.is_file():
        raise VeneerError(f"missing file: {path}")
    with open(path, "rb") as handle:
        r = _Reader(path, handle)
        magic = r.take(4, "magic")
        if magic != b"GGUF":
            raise r.fail("magic", magic, "b'GGUF'")
        version = int(r.number("I", "version"))
        if version not in (2, 3):
            raise r.fail("version", version, "2 or 3, little-endian")
        tensor_count = r.count("tensor count", MAX_TENSORS, 24)
        key_count = r.count("metadata count", MAX_KEYS, 12)
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = r.string("a metadata key")
            if key in metadata:
                raise r.fail("metadata key", repr(key), "each key once")
            metadata[key] = r.value(int(r.number("I", f"type of {key!r}")), repr(key))
        tensors, places = _tensors(r, tensor_count)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 65536 or alignment & (alignment - 1):
            raise r.fail("general.alignment", alignment, "a power of two up to 65,536")
        start = -(-r.at // alignment) * alignment
        for name, (offset, size) in places.items():
            if offset % alignment or start + offset + size > r.size:
                raise r.fail(f"place of tensor {name!r}", f"{offset:,} + {size:,}", f"aligned, inside {r.size:,} bytes")
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise VeneerError(f"{path}: damaged GGUF: general.architecture is missing")
    scalars = {key: value for key, value in metadata.items() if not isinstance(value, range)}
    return GgufSummary(version, architecture, scalars, tensors)


def _tensors(r: _Reader, count: int) -> tuple[dict[str, tuple[tuple[int, ...], int]], dict[str, tuple[int, int]]]:
    tensors: dict[str, tuple[tuple[int, ...], int]] = {}
    places: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        name = r.string("a tensor name")
        dimensions = int(r.number("I", f"dimensions of {name!r}"))
        if name in tensors or not 1 <= dimensions <= 4:
            raise r.fail(f"tensor {name!r}", f"{dimensions} dimensions", "each name once, 1 to 4 dimensions")
        shape = tuple(int(r.number("Q", f"shape of {name!r}")) for _ in range(dimensions))
        kind = int(r.number("I", f"type of {name!r}"))
        offset = int(r.number("Q", f"offset of {name!r}"))
        elements = 1
        for size in shape:
            elements *= size
        if kind not in _TYPES:
            raise r.fail(f"type of tensor {name!r}", kind, "a ggml type in use")
        per_block, width = _TYPES[kind]
        if elements == 0 or shape[0] % per_block:
            raise r.fail(f"shape of tensor {name!r}", shape, f"rows of a multiple of {per_block}")
        tensors[name] = (shape[::-1], kind)
        places[name] = (offset, elements // per_block * width)
    return tensors, places
