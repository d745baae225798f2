"""What this process uses of the machine: memory now and at its peak, and giving back what is free.

Given a GPU as `device`, the functions speak of this process's tensors on it; otherwise of its main memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")


def peak_bytes(device: torch.device | None = None) -> int:
    """The most memory this process has held at once, in bytes, since it started or since `reset_peak`."""
    if (gpu := _gpu(device)) is not None:
        return int(gpu.max_memory_allocated(device))
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_bytes(device: torch.device | None = None) -> int:
    """The memory this process holds now, in bytes; where the system does not say: the peak."""
    if (gpu := _gpu(device)) is not None:
        return int(gpu.memory_allocated(device))
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return peak_bytes()


def reset_peak(device: torch.device | None = None) -> None:
    """Count the peak from now on, where the system can (Linux)."""
    if (gpu := _gpu(device)) is not None:
        gpu.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def release_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it otherwise (glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _gpu(device: torch.device | None) -> Any:
    """torch's functions for a device that is a GPU, else None; torch is not imported for any other."""
    if device is None or device.type != "cuda":
        return None
    from torch import cuda

    return cuda
