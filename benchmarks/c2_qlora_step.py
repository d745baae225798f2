"""C2: the step of C1 on a 4-bit base (NF4, double quantised, computing in bf16), and QLoRA as a share of our own LoRA.

python -m benchmarks.run c2        bitsandbytes runs in train mode, without and with gradient checkpointing

Its kernels are those of its wheel: the ones it would fetch from the hub need the package `kernels` and a network.
"""

from __future__ import annotations

from benchmarks import c1_lora_step as c1
from benchmarks.plan import Agreement, Benchmark, Options, Result, Results, Table, ratio
from benchmarks.training import step_cell, tokens_per_second

VENEER, PEER, EXACT = "veneer nf4", "PEFT + bitsandbytes nf4", "PEFT + bitsandbytes nf4 in fp32"
CELLS = (
    step_cell(VENEER, "veneer", "nf4"),
    step_cell(PEER, "peft", "nf4"),
    step_cell("PEFT + bitsandbytes nf4 + checkpointing", "peft", "nf4", "full"),
    step_cell(EXACT, "peft", "nf4 fp32"),  # for the tolerance; without bf16 instructions the fastest peer
)


def report(results: Results, limits: Result, options: Options) -> list[Table]:
    lora = results[c1.VENEER]
    agreement = Agreement(results[PEER], results[EXACT])
    own = {cell.name: results[cell.name] for cell in CELLS}
    table = c1.step_table("C2 QLoRA step", own, limits, agreement, options)
    if lora.records and results[VENEER].records:
        share = ratio(results[VENEER].figure(tokens_per_second), lora.figure(tokens_per_second))
        table.notes.append(f"veneer's QLoRA runs at {share} of the speed of veneer's LoRA (C1) in the same rounds")
    return [table]


BENCHMARK = Benchmark("c2", "QLoRA step", "steps", (*CELLS, c1.CELLS[0]), report)
