"""C1: one LoRA training step, rank 16 on all linears, 4 x 512 tokens, SmolLM2-135M: tokens a second.

python -m benchmarks.run c1        the limit is the machine's own product rate / 0.6 GFLOP a token

The rate: fp32 for fp32; for bf16 the faster of both, which without bf16 instructions is fp32.
"""

from __future__ import annotations

from typing import Any

from benchmarks.plan import Agreement, Benchmark, Options, Percent, Result, Results, Table, best, ratio
from benchmarks.training import FLOP_A_TOKEN, step_cell, tokens_per_second

VENEER, PEER, EXACT = "veneer bf16", "PEFT bf16", "PEFT fp32"
CELLS = (
    step_cell(VENEER, "veneer"),
    step_cell(PEER, "peft"),
    step_cell("PEFT bf16 + checkpointing", "peft", recompute="full"),
    step_cell(EXACT, "peft", "fp32"),
)


def step_table(title: str, results: Results, limits: Result, agreement: Agreement, options: Options) -> Table:
    """Speed of each contender, veneer's as a ratio to the best of the others; void when it does not learn as the peer."""
    speeds = {name: result.figure(tokens_per_second) for name, result in results.items() if result.records}
    peers = [r for r in results.values() if not r.name.startswith("veneer")]
    fastest = best(peers, lambda r: speeds[r.name])
    table = Table(title, [], [agreement.note()])
    for name, result in results.items():
        row: dict[str, Any] = dict.fromkeys(
            ("contender", "tok/s", "% of limit", "ratio to best peer", "loss apart", "norm apart")
        )
        row["contender"], row["tok/s"] = name, result.problem
        table.rows.append(row)
        if not result.records:
            continue
        row["tok/s"] = speeds[name]
        rate = limits.figure("fp32_gflops" if "fp32" in name else lambda r: max(r["bf16_gflops"], r["fp32_gflops"]))
        row["% of limit"] = Percent(s * FLOP_A_TOKEN / r / 1e9 for s, r in zip(speeds[name], rate, strict=False))
        apart = agreement.apart(result)
        if apart is not None:
            row["loss apart"], row["norm apart"] = (f"{value:.2%}" for value in apart)
        if name.startswith("veneer"):
            reason = agreement.void(result)
            table.notes += [reason] if reason else []
            row["ratio to best peer"] = "VOID" if reason or not fastest else ratio(speeds[name], speeds[fastest.name])
    if fastest:
        table.notes.append(f"best peer: {fastest.name}")
    table.notes.append(
        f"{options.rows} x {options.length} tokens, all learned; a step is forward, backward, clipping and AdamW; "
        f"{options.warmup} step to warm up, then the median of {options.steps} in each process"
    )
    return table


def report(results: Results, limits: Result, options: Options) -> list[Table]:
    return [step_table("C1 LoRA step", results, limits, Agreement(results[PEER], results[EXACT]), options)]


BENCHMARK = Benchmark("c1", "LoRA step", "steps", CELLS, report)
