"""bases: perplexity on every kind of base, as in table 2 of the QLoRA paper (Dettmers et al. 2023, arXiv 2305.14314).

python -m benchmarks.run bases --data rows.json --rounds 1      nothing is timed; chat rows, end to end, in blocks

Wanted, as the paper found: NF4 better than FP4 and than int4, and nothing lost to double quantisation. Models are compared
on the same blocks of text, so the differences of their losses, block by block, say how sure that is.
"""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor, nn

from benchmarks.data import usable_rows
from benchmarks.plan import Benchmark, Cell, Options, Record, Result, Results, Table
from veneer.ops.reference import BLOCK

BF16, NF4, NF4_PLAIN, INT4 = "bf16", "NF4, double quantised", "NF4", "int4"
FP4, FP4_PLAIN, INT8, MIXED = "FP4, double quantised", "FP4", "int8", "int8, x too but for outliers (LLM.int8())"
ARGUMENTS: dict[str, dict[str, object]] = {
    BF16: {},
    INT8: {"quantize": "int8"},
    MIXED: {"quantize": "int8", "threshold": 6.0},
    NF4_PLAIN: {"quantize": "nf4", "double_quant": False},
    NF4: {"quantize": "nf4"},
    FP4_PLAIN: {"quantize": "fp4", "double_quant": False},
    FP4: {"quantize": "fp4"},
    INT4: {"round_to_int4": True},
}
CELLS = tuple(Cell(name, "benchmarks.bases:measure", given, once=True) for name, given in ARGUMENTS.items())
BETTER = ((NF4, FP4), (NF4_PLAIN, FP4_PLAIN), (NF4_PLAIN, INT4))
SAME = ((NF4, NF4_PLAIN), (FP4, FP4_PLAIN))
SAME_WITHIN = 1e-3  # of the loss; or within two standard errors


def int4(weight: Tensor) -> Tensor:
    """A weight of any shape rounded to -7..7 sevenths of the absmax of its block of 64, and back: what NF4 is better than."""
    flat = weight.detach().float().reshape(-1)
    blocks = nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    step = (blocks.abs().amax(1, keepdim=True) / 7).clamp(min=1e-38)
    return ((blocks / step).round() * step).view(-1)[: flat.numel()].view(weight.shape).to(weight.dtype)


@torch.no_grad()
def measure(
    options: Options,
    quantize: str | None = None,
    double_quant: bool = True,
    threshold: float | None = None,
    round_to_int4: bool = False,
) -> Record:
    """The loss of each block of options.length tokens; every token but a block's first is predicted."""
    import veneer
    from veneer.quant.linear import quantized_layers
    from veneer.training.data import encode_rows, read_rows

    model, tokenizer = veneer.load(options.model, quantize=quantize, double_quant=double_quant)  # type: ignore[arg-type]
    layers = quantized_layers(model).values()
    for layer in layers:
        layer.outlier_threshold = threshold
    bits = sum(layer.tensor().nbytes for layer in layers) * 8
    count = sum(layer.in_features * layer.out_features for layer in layers)
    if round_to_int4:
        for module in model.modules():
            if type(module) is nn.Linear and module is not model.get_output_embeddings():
                module.weight.data = int4(module.weight)
    tokens: list[int] = []
    for row in usable_rows(options):
        if len(tokens) >= options.text_blocks * options.length:
            break
        tokens += encode_rows(read_rows([row]).rows, tokenizer, max_length=1 << 16).samples[0].input_ids
    blocks = torch.tensor(tokens[: len(tokens) // options.length * options.length]).view(-1, options.length)
    blocks = blocks[: options.text_blocks]
    losses = [float(model(input_ids=b[None], labels=b[None], skip_logits=True).loss) for b in blocks]
    return {
        "losses": losses,
        "tokens": blocks.numel(),
        "bits": bits / count if count else 4.5 if round_to_int4 else 16.0,
        "footprint": None if round_to_int4 else model.get_memory_footprint(),
    }


def report(results: Results, limits: Result, options: Options) -> list[Table]:
    table = Table("bases: perplexity of the same text on every kind of base", [])
    losses = {name: result.records[0]["losses"] for name, result in results.items() if result.records}
    for name, result in results.items():
        row: dict[str, str | None] = {"base": name, "bits a weight": result.problem, "model MB": None, "loss": None}
        row |= {"perplexity": None, "loss over bf16's (standard error)": None}
        table.rows.append(row)
        if not result.records:
            continue
        record = result.records[0]
        loss = statistics.mean(losses[name])
        row["bits a weight"] = f"{record['bits']:.3f}"
        row["model MB"] = None if record["footprint"] is None else f"{record['footprint'] / 1e6:.1f}"
        row["loss"], row["perplexity"] = f"{loss:.4f}", f"{math.exp(loss):.3f}"
        if name != BF16 and BF16 in losses:
            row["loss over bf16's (standard error)"] = "{:+.4f} ({:.4f})".format(*apart(losses[name], losses[BF16]))
        table.notes = [f"{record['tokens']:,} tokens in {len(losses[name])} blocks of {options.length}"]
    for a, b in (*BETTER, *SAME):
        if a not in losses or b not in losses:
            continue
        mean, error = apart(losses[a], losses[b])
        same = (a, b) in SAME
        good = mean <= max(2 * error, SAME_WITHIN * statistics.mean(losses[b])) if same else mean < 0
        good = good or options.data is None  # home commands are no text to judge by
        wanted = "no measurable cost" if same else "below 0"
        table.notes.append(
            f"{'' if good else 'NOT MET: '}loss of {a} less that of {b}: {mean:+.4f}, standard error {error:.4f}; wanted: {wanted}"
        )
    return [table]


def apart(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean and standard error of the differences, block by block."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else math.inf
    return statistics.mean(differences), spread / len(differences) ** 0.5


BENCHMARK = Benchmark("bases", "perplexity of each kind of base", "bases", CELLS, report)
