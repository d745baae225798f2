"""follow: do our losses follow PEFT's? 20 steps on chat rows, batch 8, from the same adapter; nothing is timed.

python -m benchmarks.run follow --data rows.jsonl      PEFT gets padded batches, veneer the same rows packed

Wanted: each loss within 0.5% of PEFT's bf16 run, and as close to its fp32 run as PEFT's own bf16 run is.
"""

from __future__ import annotations

from benchmarks.plan import Benchmark, Options, Result, Results, Table, difference
from benchmarks.training import step_cell

VENEER, PEER, EXACT = "veneer bf16", "PEFT bf16", "PEFT fp32"
CELLS = (
    step_cell(VENEER, "veneer", data="chat", once=True),
    step_cell(PEER, "peft", data="chat", once=True),
    step_cell(EXACT, "peft", "fp32", data="chat", once=True),
)


def report(results: Results, limits: Result, options: Options) -> list[Table]:
    table = Table(
        "follow: losses of the same steps", [], [f"{options.follow_steps} steps of {options.batch} chat rows"]
    )
    for a, b in ((VENEER, PEER), (VENEER, EXACT), (PEER, EXACT)):
        one, two = results[a], results[b]
        row: dict[str, str | None] = {"run": a, "against": b, "loss, largest": one.problem or two.problem}
        row |= {"loss, mean": None, "gradient norm, largest": None}
        table.rows.append(row)
        if one.records and two.records:
            x, y = one.records[0], two.records[0]
            apart = [difference([p], [q]) for p, q in zip(x["losses"], y["losses"], strict=True)]
            row["loss, largest"], row["loss, mean"] = f"{max(apart):.2%}", f"{sum(apart) / len(apart):.2%}"
            row["gradient norm, largest"] = f"{difference(x['grad_norms'], y['grad_norms']):.2%}"
    if all(results[name].records for name in (VENEER, PEER, EXACT)):
        a, b, c = (results[name].records[0]["losses"] for name in (VENEER, PEER, EXACT))
        for wanted, found, allowed in (
            ("within 0.5% of PEFT's bf16 run", difference(a, b), 0.005),
            ("as close to PEFT's fp32 run as its bf16 run is", difference(a, c), difference(b, c)),
        ):
            verdict = "met" if found <= allowed else "NOT MET"
            table.notes.append(f"{verdict}: {wanted}: largest {found:.2%}, allowed {allowed:.2%}")
    steps = Table("follow: step by step", [])
    for step in range(options.follow_steps):
        losses = {r.name: f"{r.records[0]['losses'][step]:.4f}" for r in results.values() if r.records}
        norms = {f"{r.name}: norm": f"{r.records[0]['grad_norms'][step]:.4f}" for r in results.values() if r.records}
        steps.rows.append({"step": str(step + 1), **losses, **norms})
    return [table, steps]


BENCHMARK = Benchmark("follow", "losses step by step", "follow", CELLS, report)
