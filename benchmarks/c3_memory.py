"""C3: peak memory over import of the processes of C1 and C2, and of veneer with recompute.

python -m benchmarks.run c3        measures what C1 and C2 do not measure in the same run
"""

from __future__ import annotations

from typing import Any

from benchmarks import c1_lora_step as c1
from benchmarks import c2_qlora_step as c2
from benchmarks.plan import Agreement, Benchmark, Options, Result, Results, Table, ratio
from benchmarks.training import step_cell, tokens_per_second

RECOMPUTE = ("mlp", "full")
PARTS = {
    "LoRA": (c1, (*c1.CELLS, *(step_cell(f"veneer bf16, recompute {r}", "veneer", recompute=r) for r in RECOMPUTE))),
    "QLoRA": (c2, (*c2.CELLS, *(step_cell(f"veneer nf4, recompute {r}", "veneer", "nf4", r) for r in RECOMPUTE))),
}


def report(results: Results, limits: Result, options: Options) -> list[Table]:
    tables = []
    for title, (what, cells) in PARTS.items():
        agreement = Agreement(results[what.PEER], results[what.EXACT])
        others = {"PEFT": results[what.PEER], "checkpointed PEFT": results[f"{what.PEER} + checkpointing"]}
        table = Table(f"C3 memory of {title}", [], [agreement.note()])
        for result in (results[cell.name] for cell in cells):
            row: dict[str, Any] = {"contender": result.name, "peak GB": result.problem, "of which steps GB": None}
            row |= {f"peak of {name} / this": None for name in others} | {f"speed / {name}": None for name in others}
            table.rows.append(row)
            if not result.records:
                continue
            row["peak GB"] = result.figure(lambda record: record["peak_bytes"] / 1e9)
            row["of which steps GB"] = result.figure(lambda record: record["steps_peak_bytes"] / 1e9)
            reason = agreement.void(result) if result.name.startswith("veneer") else None
            table.notes += [reason] if reason else []
            for name, other in others.items():
                if other.records:
                    less = ratio(other.figure("peak_bytes"), result.figure("peak_bytes"))
                    speed = ratio(result.figure(tokens_per_second), other.figure(tokens_per_second))
                    row[f"peak of {name} / this"] = "VOID" if reason else less
                    row[f"speed / {name}"] = "VOID" if reason else speed
        table.notes.append("peak of the resident set over what it was after the imports: loading and all steps")
        tables.append(table)
    return tables


BENCHMARK = Benchmark(
    "c3", "peak memory", "steps", tuple(cell for _, cells in PARTS.values() for cell in cells), report
)
