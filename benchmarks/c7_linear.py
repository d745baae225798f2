"""C7: an NF4 linear layer on 1 to 2048 rows of bf16, shapes of SmolLM2-135M and 4096 x 4096.

python -m benchmarks.run c7        against bitsandbytes in train mode, its fused kernel in eval mode, and dense bf16

The limit is the larger of weight bytes / read bandwidth and 2 M N K / bf16 product rate. Layers run again and again, so
small ones stay in the caches: over 100% of the memory's bandwidth is possible for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.measure import seconds_of
from benchmarks.plan import Benchmark, Cell, Figure, Options, Percent, Record, Result, Results, Table, ratio

VENEER, TRAIN, EVAL, DENSE = "veneer", "bitsandbytes train", "bitsandbytes eval", "torch bf16"
FUNCTION = "benchmarks.c7_linear:measure"
CELLS = (
    Cell(VENEER, FUNCTION, {"by": "veneer"}),
    Cell(EVAL, FUNCTION, {"by": "eval"}, ("bitsandbytes",)),
    Cell(DENSE, FUNCTION, {"by": "dense"}),
    Cell(TRAIN, FUNCTION, {"by": "train"}, ("bitsandbytes",)),
)
ERROR_TOLERANCE = 0.01  # of an output against the fp32 product with the same 4-bit weight; bf16 rounding alone is 0.2%


@torch.no_grad()
def measure(options: Options, by: str) -> Record:
    """Seconds and relative error of each "OUTxIN M"; the reference is the fp32 product of the dequantised weight."""
    from veneer.quant.linear import QuantizedLinear

    record: Record = {"seconds": {}, "error": {}, "fused": True}
    for out, inside in options.linears:
        dense = nn.Linear(inside, out, bias=False, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        dense.weight.copy_(torch.randn(out, inside, generator=generator) * 0.05)
        dense.requires_grad_(False)
        ours = QuantizedLinear.from_linear(dense)
        exact = ours.dequantize(torch.float32)
        layer: Any
        if by == "veneer":
            layer = ours.eval()
        elif by == "dense":
            dense.weight.copy_(exact)
            layer = dense.eval()
        else:
            from bitsandbytes.nn import Linear4bit, Params4bit

            layer = Linear4bit(inside, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            layer.weight = Params4bit(dense.weight.data.clone(), requires_grad=False, quant_type="nf4")
            layer = layer.to("cpu").train(by == "train")
        for rows in options.linear_rows:
            x = torch.randn(rows, inside, generator=generator).bfloat16()
            expected = x.float() @ exact.T
            name = f"{out}x{inside} {rows}"
            record["error"][name] = float((layer(x).float() - expected).norm() / expected.norm())
            state = getattr(layer.weight, "quant_state", None)
            record["fused"] &= bool(getattr(state, "packing_format_for_cpu", False))
            record["seconds"][name] = seconds_of(lambda x=x, layer=layer: layer(x), options.seconds)  # type: ignore[misc]
    return record


def report(results: Results, limits: Result, options: Options) -> list[Table]:
    note = f"ms; void where veneer's error against fp32 is over {ERROR_TOLERANCE:.0%}, or twice dense bf16's"
    table = Table("C7 NF4 linear", [], [note, "dense bf16 multiplies the dequantised weight"])
    table.notes += [f"{result.name}: {result.problem}" for result in results.values() if result.problem]
    ours = results[VENEER]
    if results[EVAL].records and not results[EVAL].records[0]["fused"]:
        table.notes.append(
            "bitsandbytes has no fused eval kernel on this CPU (it needs AVX512-BF16): that column is as train"
        )
    for out, inside in options.linears:
        for rows in options.linear_rows:
            name = f"{out}x{inside} {rows}"
            row: dict[str, Any] = {"out x in": f"{out} x {inside}", "M": str(rows)}
            table.rows.append(row)
            for who, result in results.items():
                row[who] = (
                    Figure(record["seconds"][name] * 1e3 for record in result.records) if result.records else None
                )
            row["% of limit"] = None
            row |= {f"{who} / veneer": None for who in (EVAL, DENSE, TRAIN)}
            if not ours.records:
                continue
            least = [
                max(out * inside * 0.516 / r["read_gbs"], 2 * rows * out * inside / r["bf16_gflops"]) / 1e9
                for r in limits.records
            ]
            seconds = Figure(record["seconds"][name] for record in ours.records)
            row["% of limit"] = Percent(limit / s for limit, s in zip(least, seconds, strict=False))
            allowed = ERROR_TOLERANCE
            if results[DENSE].records:
                allowed = min(allowed, 2 * results[DENSE].records[0]["error"][name] + 1e-4)
            good = ours.records[0]["error"][name] <= allowed
            for who in (EVAL, DENSE, TRAIN):
                if results[who].records:
                    theirs = Figure(record["seconds"][name] for record in results[who].records)
                    row[f"{who} / veneer"] = ratio(theirs, seconds) if good else "VOID"
    return [table]


BENCHMARK = Benchmark("c7", "NF4 linear", "c7", CELLS, report)
