"""C6: NF4 quantise (double quantised) and dequantise a 4096 x 4096 fp32 weight, against bitsandbytes, bit for bit.

python -m benchmarks.run c6        the limit is the machine's memory read bandwidth over the bytes read and written
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import seconds_of
from benchmarks.plan import Benchmark, Cell, Figure, Options, Percent, Record, Result, Results, Table, ratio

VENEER, PEER = "veneer", "bitsandbytes"
CELLS = (
    Cell(VENEER, "benchmarks.c6_quantize:measure", {"by": "veneer"}),
    Cell(PEER, "benchmarks.c6_quantize:measure", {"by": "bitsandbytes"}, ("bitsandbytes",)),
)
PACKED = 0.516  # bytes a weight: code, absmax code, share of the nested constants


def measure(options: Options, by: str) -> Record:
    weight = torch.randn(options.quantize, generator=torch.Generator().manual_seed(0)) * 0.05
    parts: dict[str, Tensor]
    if by == "veneer":
        from veneer.quant.four_bit import FourBitTensor

        made = FourBitTensor.quantize(weight)
        assert made.nested_absmax is not None and made.offset is not None
        parts = {"codes": made.packed, "absmax": made.absmax, "nested": made.nested_absmax, "offset": made.offset}
        dense = made.dequantize(torch.float32)
        quantize: Any = lambda: FourBitTensor.quantize(weight)  # noqa: E731
        dequantize: Any = lambda: made.dequantize(torch.float32)  # noqa: E731
    else:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        parts = {"codes": codes, "absmax": state.absmax, "nested": state.state2.absmax, "offset": state.offset}
        dense = dequantize_4bit(codes, state)
        quantize = lambda: quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)  # noqa: E731
        dequantize = lambda: dequantize_4bit(codes, state)  # noqa: E731
    parts["dequantised"] = dense
    return {
        "quantise": seconds_of(quantize, options.seconds),
        "dequantise": seconds_of(dequantize, options.seconds),
        "sha256": {
            n: hashlib.sha256(t.detach().contiguous().view(-1).numpy().tobytes()).hexdigest() for n, t in parts.items()
        },
    }


def report(results: Results, limits: Result, options: Options) -> list[Table]:
    table = Table("C6 NF4 quantise and dequantise", [])
    count, ours, peer = options.quantize[0] * options.quantize[1], results[VENEER], results[PEER]
    different: list[str] = []
    if ours.records and peer.records:
        a, b = ours.records[0]["sha256"], peer.records[0]["sha256"]
        different = [name for name in a if a[name] != b[name]]
        table.notes.append(
            f"VOID: not bit-equal: {', '.join(different)}" if different else f"bit-equal: {', '.join(a)}"
        )
    for result in (ours, peer):
        for work in ("quantise", "dequantise"):
            row: dict[str, Any] = {
                "contender": result.name,
                "work": work,
                "G weights/s": result.problem,
                "% of limit": None,
            }
            row["ratio"] = None
            table.rows.append(row)
            if not result.records:
                continue
            row["G weights/s"] = Figure(count / seconds / 1e9 for seconds in result.figure(work))
            pairs = zip(result.figure(work), limits.figure("read_gbs"), strict=False)
            row["% of limit"] = Percent(count * (4 + PACKED) / seconds / 1e9 / rate for seconds, rate in pairs)
            if result is ours and peer.records:
                row["ratio"] = "VOID" if different else ratio(peer.figure(work), result.figure(work))
    return [table]


BENCHMARK = Benchmark("c6", "NF4 quantise and dequantise", "c6", CELLS, report)
