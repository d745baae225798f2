"""Clock, peak memory and the machine's own limits; all of it for use inside a cell's process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.plan import Options, Record
from veneer.machine import current_bytes, peak_bytes, release_memory, reset_peak
from veneer.ops import arena


class Memory:
    """Peak memory over what the process held when this was made: make it right after the imports."""

    def __init__(self) -> None:
        gc.collect()
        release_memory()
        arena.release()  # what veneer's kernels would keep for the next step counts like anybody's
        self.base = current_bytes()
        reset_peak()
        self.before = 0

    def over_import(self) -> int:
        """The peak so far."""
        return max(self.before, peak_bytes() - self.base)

    def restart(self) -> None:
        """From here on `since` counts anew; `over_import` keeps what was before."""
        self.before = self.over_import()
        reset_peak()

    def since(self) -> int:
        """The peak since `restart`."""
        return peak_bytes() - self.base


def seconds_of(call: Callable[[], Any], at_least: float, least_calls: int = 3) -> float:
    """Median time of one call, after one call to warm up, over `at_least` seconds and `least_calls` calls."""
    call()
    times: list[float] = []
    end = time.perf_counter() + at_least
    while len(times) < least_calls or (time.perf_counter() < end and len(times) < 10_000):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def limits(options: Options) -> Record:
    """What this machine can do now: bf16 and fp32 products of torch, GFLOP/s; memory read and copy, GB/s (best of a few).

    read_cached_gbs: the same for 8 MB, about what a 4096x4096 NF4 weight takes.
    """
    m, n, k = options.gemm

    def fastest(call: Callable[[], Any], times: int) -> float:
        call()
        taken = []
        for _ in range(times):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
        return min(taken)

    record: Record = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        record[f"{name}_gflops"] = 2 * m * n * k / fastest(lambda a=a, b=b: a @ b.T, 4) / 1e9  # type: ignore[misc]
    x = torch.ones(options.read_bytes // 4)
    record["read_gbs"] = 4 * x.numel() / max(1e-9, min(fastest(x.max, 4), fastest(lambda: torch.dot(x, x), 4))) / 1e9
    y = torch.empty_like(x)
    record["copy_gbs"] = 8 * x.numel() / fastest(lambda: y.copy_(x), 3) / 1e9
    small = x[: 1 << 21]
    record["read_cached_gbs"] = 4 * small.numel() / fastest(lambda: torch.dot(small, small), 30) / 1e9
    return record


def environment(options: Options) -> Record:
    """Versions, and which instruction sets each library chose."""
    import importlib.metadata
    import platform

    from veneer.ops import native

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    names = ("veneer", "torch", "transformers", "peft", "bitsandbytes", "trl")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "veneer kernels": native.missing() or native.isa(),
        "torch capability": torch.backends.cpu.get_cpu_capability(),
    }
