"""C12 on a GPU: the memory planned for a run beside what torch's allocator measured there.

python -m benchmarks.c12_gpu [--out FILE.json] [--only TEXT]      wanted: within 5%, never more than 2% under

Random weights in the shapes of known models, made on the GPU; a few optimizer steps on rows of the full length, as
`veneer.train` makes them. A line as each cell ends. It needs a GPU, torch, transformers and pydantic; no kernels, no files.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from veneer.machine import current_bytes
from veneer.models.fuse import batch_loss
from veneer.models.known import MODELS
from veneer.models.load import skeleton, skeleton_of
from veneer.planning.memory import Estimate, Run, estimate, prepared
from veneer.planning.plan import CONTEXT, HOST_LIBRARIES
from veneer.planning.speed import filled
from veneer.training.batches import batches
from veneer.training.data import Sample
from veneer.training.weights import trained_weights

LLAMA_1B = ("llama", {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
})  # fmt: skip
STEPS = 3
CELLS: tuple[tuple[str, Run], ...] = (
    ("llama 1B", Run(seq_len=2048)),
    ("llama 1B", Run(seq_len=512, batch_size=8, recompute="full")),
    ("llama 1B", Run(quantize="nf4", seq_len=1024, batch_size=4, packing=False)),
    ("llama 1B", Run(method="full", seq_len=1024)),
    ("llama 1B", Run(method="full", seq_len=512, batch_size=8, grad_accumulation=2, recompute="full")),
    ("llama3-8b", Run(seq_len=2048, recompute="full")),
    ("llama3-8b", Run(seq_len=1024)),
    ("llama3-8b", Run(quantize="nf4", seq_len=2048, recompute="full")),
    ("llama3-8b", Run(quantize="nf4", seq_len=512, batch_size=4, double_quant=False)),
    ("mistral-7b", Run(quantize="int8", seq_len=1024, batch_size=2, recompute="full", packing=False)),
)


class Padding(NamedTuple):
    """What `batches` asks of a tokenizer."""

    pad_token_id: int = 0


def skeleton_for(model: str) -> Any:
    return skeleton_of(LLAMA_1B[0], **LLAMA_1B[1]) if model == "llama 1B" else skeleton(model)


def measure(model: str, run: Run, device: torch.device) -> dict[str, Any]:
    """Peaks of torch's tensors, cuBLAS' memory among them, and of its segments."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    assert before < 1 << 28, f"{before:,} bytes of the cell before are still there"
    host = current_bytes()
    made = filled(prepared(skeleton_for(model), run), device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    loaded = torch.cuda.memory_allocated(device) - before
    weights = trained_weights(run.method, made, None)
    optimizer = torch.optim.AdamW(weights.parameters.values(), lr=1e-5)
    vocabulary = made.config.vocab_size
    rows = [torch.randint(vocabulary, (run.seq_len,)).tolist() for _ in range(run.batch_size)]
    samples = [Sample(ids, ids) for ids in rows]
    packing = run.packing and "attention" in made.veneer_parts
    times = []
    with weights.training():
        for _ in range(STEPS):
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            parts = []
            for _ in range(run.grad_accumulation):
                for batch in batches(samples, packing, Padding(), max(2048, run.seq_len), device):
                    part = batch_loss(made, batch, run.batch_size * run.seq_len)
                    part.backward()
                    parts.append(part.detach())
            gradients = [p.grad for p in weights.parameters.values() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            torch.nn.utils.clip_grads_with_norm_(weights.parameters.values(), 1.0, norm)
            optimizer.step()
            del gradients  # as in the loop: the next step's pass does not find them there
            weights.changed()
            float(sum(parts))
            times.append(time.perf_counter() - began)
    stats = torch.cuda.memory_stats(device)
    return {
        "loaded": loaded, "allocated": stats["allocated_bytes.all.peak"], "reserved": stats["reserved_bytes.all.peak"],
        "requested": stats["requested_bytes.all.peak"], "seconds_per_step": min(times), "host": current_bytes() - host,
        "before": before,
    }  # fmt: skip


def compared(model: str, run: Run, device: torch.device) -> dict[str, Any]:
    began = time.perf_counter()
    planned: Estimate = estimate(skeleton_for(model), run := run._replace(device="cuda", guard=False))
    planning = time.perf_counter() - began
    found = measure(model, run, device)
    gc.collect()
    inside = planned.phases["train"] - planned.parts["fragmentation"]  # tensors, and what cuBLAS takes
    return {
        "model": model, **run.asked(), **found, "planned_reserved": planned.phases["train"], "planned_allocated": inside,
        "parts": planned.parts, "planning_seconds": planning,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="all figures as JSON")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    options = parser.parse_args()
    host = current_bytes()
    device = torch.device("cuda")
    free, total = torch.cuda.mem_get_info()  # makes the context
    (
        torch.ones(8, 8, device=device, dtype=torch.bfloat16) @ torch.ones(8, 8, device=device, dtype=torch.bfloat16)
    ).sum().item()
    context = total - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    print(
        f"{torch.cuda.get_device_name()}, {total / 2**30:.2f} GiB, torch {torch.__version__}; used before: {(total - free) / 1e6:,.0f} MB"
    )
    print(
        f"context: {context / 1e6:,.0f} MB (taken: {CONTEXT / 1e6:,.0f}), of cuBLAS in torch: {torch.cuda.memory_allocated() / 1e6:,.0f} MB"
    )
    print(
        f"main memory: {(current_bytes() - host) / 1e6:,.0f} MB more with the GPU (taken: {HOST_LIBRARIES / 1e6:,.0f})",
        flush=True,
    )
    rows, wrong = [], []
    print(f"{'run':66} {'allocated':>10} {'planned':>8}        {'reserved':>9} {'planned':>8}", flush=True)
    for model, run in CELLS:
        kind = (run.quantize or "lora") if run.method == "lora" else "full"
        shape = f"{run.batch_size} x {run.seq_len}{'' if run.packing else ' padded'} x {run.grad_accumulation}"
        name = f"{model}, {kind}, recompute {run.recompute}, {shape}"
        if options.only not in name:
            continue
        try:
            row = compared(model, run, device)
        except Exception as error:  # a cell that fails takes none of the others with it
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            print(wrong[-1], flush=True)
            gc.collect()
            continue
        rows.append({"name": name, **row})
        allocated, reserved = row["planned_allocated"] / row["allocated"], row["planned_reserved"] / row["reserved"]
        print(
            f"{name:66} {row['allocated'] / 1e6:>10,.0f} {row['planned_allocated'] / 1e6:>8,.0f} {allocated:6.3f} "
            f"{row['reserved'] / 1e6:>9,.0f} {row['planned_reserved'] / 1e6:>8,.0f} {reserved:6.3f}   "
            f"{row['seconds_per_step']:.2f} s a step, planned in {row['planning_seconds']:.1f} s",
            flush=True,
        )
        if options.out is not None:
            options.out.write_text(
                json.dumps({"gpu": torch.cuda.get_device_name(), "context": context, "rows": rows}, indent=1)
            )
    ratios = [row["planned_reserved"] / row["reserved"] for row in rows]
    if ratios:
        near = sum(0.98 <= ratio <= 1.05 for ratio in ratios)
        print(f"{near} of {len(ratios)} cells from -2% to +5% (reserved); from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    for _name in ("llama3-8b", "mistral-7b"):
        assert _name in MODELS
    main()
