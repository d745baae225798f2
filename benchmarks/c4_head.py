"""C4: frozen output head + cross-entropy, forward and backward to the hidden states: time and peak memory.

python -m benchmarks.run c4        2048 tokens, hidden 576, vocabulary 49152, bf16; against eager and chunked torch

The limit is two products (logits, gradient) at the machine's bf16 rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import Memory, seconds_of
from benchmarks.plan import Benchmark, Cell, Figure, Options, Percent, Record, Result, Results, Table, best, ratio

CHUNK = 256
VENEER, EAGER, CHUNKED = "veneer", "torch eager", f"torch, checkpointed chunks of {CHUNK}"
NAMES = {VENEER: "veneer", EAGER: "eager", CHUNKED: "chunked"}
CELLS = tuple(Cell(name, "benchmarks.c4_head:measure", {"form": form}) for name, form in NAMES.items())


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As transformers does it: all logits in bf16, then in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum") / labels.numel()


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    def piece(h: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, weight).float(), target, reduction="sum")

    pairs = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    parts = [checkpoint(piece, h, target, use_reentrant=False) for h, target in pairs]
    return torch.stack(parts).sum() / labels.numel()


def veneer_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from veneer import ops

    return ops.linear_cross_entropy(hidden, weight, labels, labels.numel())


def measure(options: Options, form: str) -> Record:
    """The peak is of one forward and backward, after the time was taken; errors are against fp32."""
    loss_of: Callable[..., Tensor] = {"veneer": veneer_head, "eager": eager, "chunked": chunked}[form]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.head_tokens, options.hidden, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(options.vocabulary, options.hidden, generator=generator) * 0.05).bfloat16()
    labels = torch.randint(options.vocabulary, (options.head_tokens,), generator=generator)

    def step() -> Tensor:
        hidden.grad = None
        loss = loss_of(hidden, weight, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    seconds = seconds_of(step, 4 * options.seconds)
    hidden.grad = None
    memory = Memory()
    loss = float(step().detach())
    peak = memory.over_import()
    assert hidden.grad is not None
    exact = hidden.detach().float().requires_grad_()
    exact_loss = eager(exact, weight.float(), labels)
    exact_loss.backward()  # type: ignore[no-untyped-call]
    assert exact.grad is not None
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "loss_error": abs(loss - float(exact_loss.detach())) / float(exact_loss.detach()),
        "gradient_error": float((hidden.grad.float() - exact.grad).norm() / exact.grad.norm()),
    }


def report(results: Results, limits: Result, options: Options) -> list[Table]:
    work = 4 * options.head_tokens * options.hidden * options.vocabulary / 1e9
    note = "errors are relative, against fp32; void when veneer's are over 1.5 times eager torch's (loss: or 0.01%)"
    table = Table("C4 frozen head + cross-entropy", [], [note])
    fastest = best([results[EAGER], results[CHUNKED]], lambda r: Figure(-s for s in r.figure("seconds")))
    for name, result in results.items():
        row: dict[str, Any] = {"contender": name, "ms": result.problem, "% of limit": None, "peak MB": None}
        row |= {
            "gradient error": None,
            "loss error": None,
            "time of fastest peer / this": None,
            "eager's peak / this": None,
        }
        table.rows.append(row)
        if not result.records:
            continue
        row["ms"] = result.figure(lambda record: record["seconds"] * 1e3)
        pairs = zip(result.figure("seconds"), limits.figure("bf16_gflops"), strict=False)
        row["% of limit"] = Percent(work / rate / seconds for seconds, rate in pairs)
        row["peak MB"] = result.figure(lambda record: record["peak_bytes"] / 1e6)
        first = result.records[0]
        row["gradient error"], row["loss error"] = f"{first['gradient_error']:.3%}", f"{first['loss_error']:.4%}"
        if name != VENEER or fastest is None or not results[EAGER].records:
            continue
        peer = results[EAGER].records[0]
        good = first["gradient_error"] <= 1.5 * peer["gradient_error"]
        good = good and first["loss_error"] <= max(1e-4, 1.5 * peer["loss_error"])
        row["time of fastest peer / this"] = (
            ratio(fastest.figure("seconds"), result.figure("seconds")) if good else "VOID"
        )
        less = ratio(results[EAGER].figure("peak_bytes"), result.figure("peak_bytes"))
        row["eager's peak / this"] = less if good else "VOID"
    return [table]


BENCHMARK = Benchmark("c4", "head + cross-entropy", "c4", CELLS, report)
