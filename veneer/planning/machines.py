"""Common GPUs and computers, and how much memory they have for a run: what `budget` takes by name."""

from __future__ import annotations

from typing import NamedTuple

GIB = 1 << 30
SYSTEM = 2 * GIB  # of a computer's main memory: what its system and a desktop are taken to need


class Machine(NamedTuple):
    """vram: bytes of the GPU, 0: a computer that is planned without one; ram: bytes of main memory, 0: not known."""

    vram: int
    ram: int


def _gpu(gib: float) -> Machine:
    return Machine(int(gib * GIB), 0)


def _computer(gib: int) -> Machine:
    return Machine(0, gib * GIB - SYSTEM)


# Of GPUs what torch reports (`total_memory`), rounded down, which is less than the name says: the driver, and on some error
# correction, take their part.
MACHINES = {
    "rtx-3060": _gpu(11.7),
    "rtx-3090": _gpu(23.5),
    "rtx-4060-ti": _gpu(15.5),
    "rtx-4070": _gpu(11.7),
    "rtx-4080": _gpu(15.5),
    "rtx-4090": _gpu(23.5),
    "rtx-5090": _gpu(31.3),
    "t4": _gpu(14.5),
    "a10g": _gpu(22.0),
    "l4": _gpu(22.0),
    "l40s": _gpu(44.3),
    "a6000": _gpu(47.4),
    "a100-40gb": _gpu(39.3),
    "a100-80gb": _gpu(79.1),
    "h100": _gpu(79.1),
    "h200": _gpu(139.5),
    "pc-8gb": _computer(8),
    "pc-16gb": _computer(16),
    "pc-32gb": _computer(32),
    "pc-64gb": _computer(64),
    "pc-128gb": _computer(128),
    "macbook-8gb": _computer(8),
    "macbook-16gb": _computer(16),
    "macbook-32gb": _computer(32),
    "macbook-64gb": _computer(64),
}
