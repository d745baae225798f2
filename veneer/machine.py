"""What this process uses of the machine: memory now and at its peak, and giving back what is free.

Given a GPU as `device`, the functions speak of this process's tensors on it; otherwise of its main memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterable
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


def available_bytes() -> int:
    """The memory that the system could give to processes now without swapping, in bytes, and a container's limit leaves; where
    the system does not say: all there is."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            free = _free_pages(subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=5).stdout) or free
    return min([free, *_left_by_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _free_pages(said: str) -> int:
    """Bytes that macOS' vm_stat calls free, or could free at once."""
    size = re.search(r"page size of (\d+) bytes", said)
    pages = re.findall(r"Pages (?:free|inactive|speculative|purgeable): +(\d+)", said)
    return int(size[1]) * sum(map(int, pages)) if size else 0


def _left_by_limits(file: Path, root: Path) -> list[int]:
    """What each control group that this process is in leaves of its limit (Linux: containers, Slurm); pages of files that it
    could let go of do not count as taken.

    Args:
        file: says which groups (/proc/self/cgroup). root: where they are (/sys/fs/cgroup).
    """
    found = []
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            number, kinds, path = line.split(":", 2)
            if number == "0":  # version 2: one tree
                tree, names = root, ("memory.max", "memory.current", "inactive_file ")
            elif "memory" in kinds.split(","):
                tree, names = (
                    root / "memory",
                    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
                )
            else:
                continue
            inside = Path(path.lstrip("/"))
            for group in (inside, *inside.parents):  # in a container its own group is the root
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                    limit, taken = (int((tree / group / name).read_text()) for name in names[:2])
                    told = (tree / group / "memory.stat").read_text().splitlines()
                    files = sum(int(line.split()[1]) for line in told if line.startswith(names[2]))
                    found.append(max(0, limit - taken + files))
    return found


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


class MappedFiles:
    """The files that are mapped into this process's memory now; of tensors that lie in them memory can be given back, as it
    can be read again. Where the system does not say (not Linux), none are known."""

    def __init__(self, paths: Iterable[Path]) -> None:
        names = {str(path.resolve()) for path in paths}
        self.ranges: list[tuple[int, int]] = []
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/maps").read_text().splitlines():
                place, _, _, _, _, *name = line.split(maxsplit=5)
                if name and name[0] in names:
                    start, end = (int(part, 16) for part in place.split("-"))
                    self.ranges.append((start, end))

    def release(self, tensor: torch.Tensor) -> None:
        """Let go of the pages that only this tensor lies on, if it lies in one of the files."""
        start, page = tensor.data_ptr(), mmap.PAGESIZE
        end = start + tensor.nbytes
        if not any(low <= start and end <= high for low, high in self.ranges):
            return
        first, last = -(-start // page) * page, end // page * page
        if last > first:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _gpu(device: torch.device | None) -> Any:
    """torch's functions for a device that is a GPU, else None; torch is not imported for any other."""
    if device is None or device.type != "cuda":
        return None
    from torch import cuda

    return cuda
