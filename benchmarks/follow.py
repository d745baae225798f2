"""follow: do our losses follow PEFT's? 20 steps on chat rows, from the same adapter; nothing is timed.

python -m benchmarks.run follow --data rows.jsonl      PEFT gets padded batches, veneer the same rows packed

Wanted: each loss within 0.5% of PEFT's bf16 run, and as close to its fp32 run as PEFT's own bf16 run is. The second is
judged by the root mean square over the steps: the largest of 20 rounding errors is a matter of luck. How far runs drift
apart depends on the learning rate: AdamW turns the rounding of a small gradient into a whole step (--learning-rate).
"""

from __future__ import annotations

import math

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
        "follow: losses of the same steps",
        [],
        [f"{options.follow_steps} steps of {options.follow_batch} chat rows, learning rate {options.learning_rate:g}"],
    )
    for a, b in ((VENEER, PEER), (VENEER, EXACT), (PEER, EXACT)):
        one, two = results[a], results[b]
        row: dict[str, str | None] = {"run": a, "against": b, "loss, largest": one.problem or two.problem}
        row |= {"loss, root mean square": None, "gradient norm, largest": None}
        table.rows.append(row)
        if one.records and two.records:
            x, y = one.records[0], two.records[0]
            apart = _apart(x["losses"], y["losses"])
            row["loss, largest"], row["loss, root mean square"] = f"{max(apart):.2%}", f"{_rms(apart):.2%}"
            row["gradient norm, largest"] = f"{difference(x['grad_norms'], y['grad_norms']):.2%}"
    if all(results[name].records for name in (VENEER, PEER, EXACT)):
        a, b, c = (results[name].records[0]["losses"] for name in (VENEER, PEER, EXACT))
        for wanted, found, allowed in (
            ("within 0.5% of PEFT's bf16 run at every step", difference(a, b), 0.005),
            (
                "as close to PEFT's fp32 run as its bf16 run is, root mean square",
                _rms(_apart(a, c)),
                _rms(_apart(b, c)),
            ),
        ):
            verdict = "met" if found <= allowed else "NOT MET"
            table.notes.append(f"{verdict}: {wanted}: found {found:.2%}, allowed {allowed:.2%}")
    steps = Table("follow: step by step", [])
    for step in range(options.follow_steps):
        losses = {r.name: f"{r.records[0]['losses'][step]:.4f}" for r in results.values() if r.records}
        norms = {f"{r.name}: norm": f"{r.records[0]['grad_norms'][step]:.4f}" for r in results.values() if r.records}
        steps.rows.append({"step": str(step + 1), **losses, **norms})
    return [table, steps]


def _apart(found: list[float], expected: list[float]) -> list[float]:
    return [difference([p], [q]) for p, q in zip(found, expected, strict=True)]


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


BENCHMARK = Benchmark("follow", "losses step by step", "follow", CELLS, report)
